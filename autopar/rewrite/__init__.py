"""Captured graph and plan to the program that each rank runs, with explicit collectives that name mesh axes. Decides nothing.

Comes in: `Captured` and a `Plan`. Goes out: a `Program`.

Modules, in reading order: ``program``, ``stages``, ``planned``, ``whole_batch``, ``builder``, ``moves``, ``calls``, ``graphs``,
``regions``, ``outline``, ``prefetch``, ``slots``, ``halves``, ``pipeline``, ``chunked_loss``, ``emit``, ``fuse``.
"""

from autopar.rewrite.emit import rewrite
from autopar.rewrite.fuse import fuse
from autopar.rewrite.program import CrossingTensor, PipelineProgram, Program, Slot, StageProgram
from autopar.rewrite.slots import mark_samples

__all__ = ["CrossingTensor", "PipelineProgram", "Program", "Slot", "StageProgram", "fuse", "mark_samples", "rewrite"]
