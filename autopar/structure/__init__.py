"""What is read off a graph before any mesh is known: repeated layers, roles of dims, blocks, micro-batches.

Comes in: a `Graph` and the spaces of its calls. Goes out: a `Model` and a `Chain` of blocks.

Modules, in reading order: ``measures``, ``repeats``, ``layers``, ``roles``, ``weights``, ``chain_order``, ``chain_cuts``, ``blocks``,
``attention_cores``, ``chain_reads``, ``microbatches``, ``saved``, ``model``.
"""

from autopar.structure.attention_cores import find_cores
from autopar.structure.blocks import Block, Chain, find_chain, relabel
from autopar.structure.chain_reads import ChainReads, read_chain
from autopar.structure.layers import Edge, Folded, fold, fold_as_planned, regroup
from autopar.structure.microbatches import MicroSplit, MicroSplitter, batch_size, split_microbatches
from autopar.structure.model import Model, RouteKey, find_tables, first_rank_axis, in_time, role_of
from autopar.structure.roles import Role, find_factors
from autopar.structure.weights import find_source, is_deferrable

__all__ = [
    "Block",
    "Chain",
    "ChainReads",
    "Edge",
    "Folded",
    "MicroSplit",
    "MicroSplitter",
    "Model",
    "Role",
    "RouteKey",
    "batch_size",
    "find_chain",
    "find_cores",
    "find_factors",
    "find_source",
    "find_tables",
    "first_rank_axis",
    "fold",
    "fold_as_planned",
    "in_time",
    "is_deferrable",
    "read_chain",
    "regroup",
    "relabel",
    "role_of",
    "split_microbatches",
]
