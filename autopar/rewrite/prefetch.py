"""Gathers of stored parameters are begun ahead of the block that reads them, so that they run while the blocks before it compute.

Comes in: the graph of a program, before its regions become submodules. Goes out: the same graph, in which each such gather is two calls.
"""

from __future__ import annotations

from torch import fx

from autopar.ops import collectives
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
