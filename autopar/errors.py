"""Every error that autopar raises on purpose, drawn as a tree.

AutoparError
├── CaptureError        the model can't be turned into a graph (names the user's source line)
├── UnknownOpError      an op has no rule and ``strict=True`` was asked for
├── InputError          an argument, a machine name, a pin or a mesh that can't be used
├── PlanError           a plan file that is damaged, of another version, or made for another model or world
├── InfeasibleError     no placement satisfies the constraints (says which budget would have to grow)
├── ScheduleError       a pipeline schedule that can't run to its end (shows the ranks' actions and the step at fault)
├── PipelineError       a stage failed while a schedule ran (names the stage, the action and the micro-batch)
├── SolverError         the solver stopped without a usable answer
├── CommError           ranks run different collectives, or one is gone
└── VerificationError   a parallel run that disagrees with the single device's

Inner code states the fact; one outer place adds the op, the source line and the remedy.
"""

from collections.abc import Mapping


class AutoparError(Exception):
    """Base of all errors that autopar raises on purpose."""


class CaptureError(AutoparError):
    """The model can't be captured as one graph."""


class UnknownOpError(AutoparError):
    """An op without a rule was met under ``strict=True``."""


class InputError(AutoparError, ValueError):
    """An argument that can't be used: a machine, a pin, a mesh, a batch."""


class PlanError(AutoparError, ValueError):
    """A plan that can't be loaded, or that was made for something else."""


class InfeasibleError(AutoparError):
    """No plan satisfies the constraints; `needed` is the bytes that the leanest plan needs, 0 when memory isn't the reason."""

    needed: int = 0


class ScheduleError(AutoparError):
    """A pipeline schedule whose ranks can't all finish, or that computes something twice or never."""


class PipelineError(AutoparError):
    """A stage of a pipeline failed, or what it waited for never came."""


class SolverError(AutoparError):
    """The solver ended without a usable answer."""


class VerificationError(AutoparError):
    """The parallel program disagrees with the single-device program."""


class CommError(AutoparError):
    """Ranks disagree about the collective that they run, or a rank is gone."""


ERROR_TYPES: Mapping[str, type[AutoparError]] = {kind.__name__: kind for kind in AutoparError.__subclasses__()}
"""Every kind of error by name, for raising on one rank what another met."""
