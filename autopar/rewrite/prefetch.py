"""Gathers of stored parameters are begun ahead of the block that reads them, so that they run while the blocks before it compute.

Comes in: the graph of a program, before its regions become submodules. Goes out: the same graph, in which each such gather is two calls.
"""

from __future__ import annotations

import operator
from collections.abc import Collection

from torch import fx

from autopar.ops import begin_wholes, collectives, take_wholes
from autopar.structure import Chain


def begin_gathers_ahead(module: fx.GraphModule, chain: Chain, ahead: int) -> None:
    """Split every gather of a stored parameter into its begin, `ahead` blocks before the one that reads it, and its end, where it was.

    Before, with a block per product and `ahead` 1::

        all_gather = all_gather(p_0_weight, 'dp', 0, grad='reduce_scatter', save=False)
        linear = linear(x, all_gather)
        all_gather_1 = all_gather(p_1_weight, 'dp', 0, grad='reduce_scatter', save=False)
        linear_1 = linear(linear, all_gather_1)

    After::

        begun = begin_all_gather(p_0_weight, 'dp', 0, block=0)
        begun_1 = begin_all_gather(p_1_weight, 'dp', 0, block=1)
        all_gather = all_gather(p_0_weight, 'dp', 0, grad='reduce_scatter', save=False, begun=begun)
        linear = linear(x, all_gather)
        all_gather_1 = all_gather(p_1_weight, 'dp', 0, grad='reduce_scatter', save=False, begun=begun_1)
        linear_1 = linear(linear, all_gather_1)

    Blocks are those of the chain that gather, numbered in the order in which they run. The first ones' gathers are begun before anything
    else. So at any time the gathered parameters of ``1 + ahead`` blocks are in memory at most. A begin is in no block, and so stays outside
    of submodules that like layers share, and of regions that are run again.
    """
    if not ahead:
        return
    block_of = {name: number for number, block in enumerate(chain.blocks) for name in block.ops}
    first_nodes: dict[int, fx.Node] = {}
    gathers: dict[int, list[fx.Node]] = {}
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    for node in calls:
        number = block_of.get(node.meta.get("block") or "")
        if number is not None:
            first_nodes.setdefault(number, node)
            if node.meta.get("gathers_stored"):
                gathers.setdefault(number, []).append(node)
    order = [number for number in first_nodes if number in gathers]
    for place, number in enumerate(order):
        before = first_nodes[order[place - ahead]] if place > ahead else calls[0]
        for node in gathers[number]:
            with module.graph.inserting_before(before):
                options = {name: value for name, value in node.kwargs.items() if name in ("outer", "dtype", "size")}
                begun = module.graph.call_function(collectives.begin_all_gather, node.args, {**options, "block": place})
            begun.meta["block"] = None
            if "stack_trace" in node.meta:
                begun.meta["stack_trace"] = node.meta["stack_trace"]
            node.kwargs = {**node.kwargs, "begun": begun}
    module.recompile()


def gather_wholes(module: fx.GraphModule, held: Collection[str], chain: Chain, ahead: int) -> None:
    """Gather parameters that are stored in parts and computed with whole, block by block, each block's begun `ahead` blocks before.

    Before, with a block per product and `ahead` 1, where the program is given whole parameters::

        linear = linear(x, p_0_weight)
        linear_1 = linear(linear, p_1_weight)
        linear_2 = linear(linear_1, p_2_weight)

    After::

        begin_wholes = begin_wholes((p_0_weight,))
        begin_wholes_1 = begin_wholes((p_1_weight,))
        take_wholes = take_wholes(begin_wholes)
        getitem = take_wholes[0]
        linear = linear(x, getitem)
        begin_wholes_2 = begin_wholes((p_2_weight,))
        take_wholes_1 = take_wholes(begin_wholes_1)
        getitem_1 = take_wholes_1[0]
        linear_1 = linear(linear, getitem_1)
        ...

    A parameter is gathered for the first block that reads it and stays until the backward has read it, for all blocks. All of these calls
    are in no block, and so stay outside of submodules that like layers share, and of regions that are run again.

    Args:
        module: the graph; it is changed.
        held: names of the placeholders of these parameters.
        chain: the blocks.
        ahead: how many; 0 gathers where a block begins.
    """
    block_of = {name: number for number, block in enumerate(chain.blocks) for name in block.ops}
    parameters = {node for node in module.graph.find_nodes(op="placeholder") if node.target in held}
    # What runs first of each block that is the first to read some of them -> these. A call that is in no block is one by itself.
    new_reads: dict[fx.Node, list[fx.Node]] = {}
    first_nodes: dict[int, fx.Node] = {}
    seen: set[fx.Node] = set()
    calls = [node for node in module.graph.nodes if node.op in ("call_function", "output")]
    for node in calls:
        number = block_of.get(node.meta.get("block") or "")
        first = node if number is None else first_nodes.setdefault(number, node)
        new = [x for x in node.all_input_nodes if x in parameters and x not in seen]
        seen.update(new)
        if new:
            new_reads.setdefault(first, []).extend(new)
    order = [node for node in calls if node in new_reads]
    begun = []
    for place, first in enumerate(order):
        with module.graph.inserting_before(order[place - ahead] if place > ahead or not ahead else calls[0]):
            begun.append(module.graph.call_function(begin_wholes, (new_reads[first],)))
            begun[-1].meta["block"] = None
    for first, begin in zip(order, begun, strict=True):
        with module.graph.inserting_before(first):
            taken = module.graph.call_function(take_wholes, (begin,))
            items = [module.graph.call_function(operator.getitem, (taken, index)) for index in range(len(new_reads[first]))]
        for node in (taken, *items):
            node.meta["block"] = None
        for x, item in zip(new_reads[first], items, strict=True):
            for reader in [user for user in x.users if user is not begin]:
                reader.replace_input_with(x, item)
    module.recompile()
