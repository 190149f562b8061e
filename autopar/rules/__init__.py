"""What is known of each operator: the loops that it runs and its facts. Neither meshes nor costs.

Comes in: an `Op` and the tensors that it reads. Goes out: its `Space`, with the `Facts` that the rule states.

Modules, in reading order: ``notation``, ``contract``, ``convolution``, ``pointwise``, ``view``, ``index``, ``chunked_loss``, ``declared``,
``table``.
"""

from autopar.rules.chunked_loss import RETURNED, ChunkedLoss, ChunkedLosses, chunk_losses, find_chunked_losses
from autopar.rules.declared import read_target, readable_name, short_name
from autopar.rules.table import describe_declared, facts_of, find_spaces, has_rule, is_random, register_rule, rule

__all__ = [
    "RETURNED",
    "ChunkedLoss",
    "ChunkedLosses",
    "chunk_losses",
    "describe_declared",
    "facts_of",
    "find_chunked_losses",
    "find_spaces",
    "has_rule",
    "is_random",
    "read_target",
    "readable_name",
    "register_rule",
    "rule",
    "short_name",
]
