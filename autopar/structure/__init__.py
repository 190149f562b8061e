"""What is read off a graph before any mesh is known: repeated layers, roles of dims, blocks, micro-batches.

Comes in: a `Graph` and the spaces of its calls. Goes out: an `AnalyzedGraph` and a `Chain` of blocks.

Modules, in reading order: ``measures``, ``repeats``, ``layers``, ``roles``, ``weights``, ``chain_order``, ``chain_cuts``, ``blocks``,
``attention_cores``, ``chain_reads``, ``microbatches``, ``samples``, ``saved``, ``model``.
"""

from autopar.structure.attention_cores import find_cores
from autopar.structure.blocks import Block, Chain, find_chain, relabel
from autopar.structure.chain_reads import ChainReads, read_chain
from autopar.structure.layers import Edge, Folded, fold, fold_as_planned, regroup
from autopar.structure.measures import count_flops
from autopar.structure.microbatches import MicroSplit, MicroSplitter, batch_size, split_microbatches
from autopar.structure.model import AnalyzedGraph, RouteKey, find_constants, first_rank_axis, role_of, with_microbatch_axis
from autopar.structure.roles import Role, find_roles, grouped_heads
from autopar.structure.samples import find_samples
from autopar.structure.weights import find_source, is_deferrable

__all__ = [
    "AnalyzedGraph",
    "Block",
    "Chain",
    "ChainReads",
    "Edge",
    "Folded",
    "MicroSplit",
    "MicroSplitter",
    "Role",
    "RouteKey",
    "batch_size",
    "count_flops",
    "find_chain",
    "find_constants",
    "find_cores",
    "find_roles",
    "find_samples",
    "find_source",
    "first_rank_axis",
    "fold",
    "fold_as_planned",
    "grouped_heads",
    "is_deferrable",
    "read_chain",
    "regroup",
    "relabel",
    "role_of",
    "split_microbatches",
    "with_microbatch_axis",
]
