"""What is known of each operator: the loops that it runs and its facts. Neither meshes nor costs.

Comes in: an `Op` and the tensors that it reads. Goes out: its `Space`.

Modules, in reading order: ``notation``, ``contract``, ``pointwise``, ``view``, ``index``, ``table``.
"""

from autopar.rules.notation import argument, operand
from autopar.rules.table import find_spaces

__all__ = ["argument", "find_spaces", "operand"]
