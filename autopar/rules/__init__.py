"""What is known of each operator: the loops that it runs and its facts. Neither meshes nor costs.

Comes in: an `Op` and the tensors that it reads. Goes out: its `Space`, with the `Facts` that the rule states.

Modules, in reading order: ``notation``, ``contract``, ``pointwise``, ``view``, ``index``, ``table``.
"""

from autopar.rules.table import facts_of, find_spaces, is_random

__all__ = ["facts_of", "find_spaces", "is_random"]
