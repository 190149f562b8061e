"""What emitted programs call: collectives over named axes, kernels for split loops, random streams, recomputed regions.

Comes in: a rank's parts of tensors. Goes out: a rank's parts of tensors, with autograd through the communication. The one idea: a program
is the same for all ranks, names the axes of the mesh by text, and asks them at run time which part is this rank's.

Modules, in reading order: ``autocast``, ``rendezvous``, ``moved``, ``comm``, ``parts``, ``steps``, ``gathers``, ``wholes``,
``collectives``, ``exchanges``, ``rng``, ``bounds``, ``losses``, ``double_backward``, ``chunked_loss``, ``draws``, ``attention_blocks``,
``positions``, ``ring``, ``halo``, ``kernels``, ``weight_gradients``, ``padded``, ``deferrable``, ``recompute``, ``fused``, ``attention``,
``functions``.
"""

from autopar.ops.autocast import OFF as AUTOCAST_OFF
from autopar.ops.autocast import Autocast
from autopar.ops.collectives import gather_along, reduce_scatter_along, shard_along, sum_along, sum_gradient_along
from autopar.ops.comm import Axis, GroupAxis, Message, MicrobatchAxis
from autopar.ops.deferrable import DEFERRABLE
from autopar.ops.double_backward import refuse_double_backward
from autopar.ops.functions import FunctionCall, GradientHook, given_arguments
from autopar.ops.fused import Fused
from autopar.ops.gathers import deliver_to, regather
from autopar.ops.parts import join_parts, join_stack, pad_part, pad_whole, rows_of_part, rows_of_rank, split_parts, take_part, take_rows
from autopar.ops.recompute import Recomputed
from autopar.ops.weight_gradients import Deferred, deferring
from autopar.ops.wholes import StoredPart, begin_wholes, stand_for_whole, take_wholes

__all__ = [
    "AUTOCAST_OFF",
    "DEFERRABLE",
    "Autocast",
    "Axis",
    "Deferred",
    "FunctionCall",
    "Fused",
    "GradientHook",
    "GroupAxis",
    "Message",
    "MicrobatchAxis",
    "Recomputed",
    "StoredPart",
    "begin_wholes",
    "deferring",
    "deliver_to",
    "gather_along",
    "given_arguments",
    "join_parts",
    "join_stack",
    "pad_part",
    "pad_whole",
    "reduce_scatter_along",
    "refuse_double_backward",
    "regather",
    "rows_of_part",
    "rows_of_rank",
    "shard_along",
    "split_parts",
    "stand_for_whole",
    "sum_along",
    "sum_gradient_along",
    "take_part",
    "take_rows",
    "take_wholes",
]
