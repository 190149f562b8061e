"""Every error that autopar raises on purpose, drawn as a tree.

AutoparError
├── CaptureError        the model can't be turned into a graph (names the user's source line)
├── UnknownOpError      an op has no rule, under ``strict=True``
├── InputError          an argument, a pin, a mesh or a file that can't be used
│   └── HardwareError   a machine, its profile or a cluster that can't be used
├── PlanError           a plan file that is damaged, of another version, or made for another model or world
├── InfeasibleError     no placement satisfies the constraints (says which budget would have to grow)
├── ScheduleError       a pipeline schedule that can't run to its end (shows the ranks' actions and the step at fault)
├── PipelineError       a stage failed while a schedule ran (names the stage, the action and the micro-batch)
├── SolverError         the solver stopped without a usable answer
├── CommError           ranks run different collectives, or one is gone
└── VerificationError   a parallel run that disagrees with the single device's

Inner code states the fact; an outer place adds the op, the user's source line and what to do.
"""

from collections.abc import Mapping


class AutoparError(Exception):
    """Base of all errors that autopar raises on purpose."""


class CaptureError(AutoparError):
    """The model can't be captured as one graph."""


class UnknownOpError(AutoparError):
    """The model has an op without a rule, and ``strict=True`` forbids to run it replicated."""


class InputError(AutoparError, ValueError):
    """An argument of the user that can't be used: a pin, a mesh, a batch, a file. Also a ValueError."""


class HardwareError(InputError):
    """A machine, cluster or machine profile that can't be used; the message lists every offender and what to try."""


class PlanError(AutoparError, ValueError):
    """A plan file that can't be loaded, or a plan that was made for another model or another number of ranks. Also a ValueError."""


class InfeasibleError(AutoparError):
    """No plan satisfies the constraints.

    Attributes:
        needed: bytes per device that the plan with the least memory needs; 0 when memory isn't the reason.
    """

    needed: int = 0


class ScheduleError(AutoparError):
    """A pipeline schedule whose ranks would wait for each other forever, or that computes something twice or never."""


class PipelineError(AutoparError):
    """A stage of a pipeline failed while a schedule ran, or waited for a message that never came."""


class SolverError(AutoparError):
    """The solver ended without a usable solution."""


class VerificationError(AutoparError):
    """The parallel program's outputs, gradients or buffers differ from the single device's."""


class CommError(AutoparError):
    """Ranks run different collectives at the same time, or a rank has ended."""


ERROR_TYPES: Mapping[str, type[AutoparError]] = {
    kind.__name__: kind for kind in (*AutoparError.__subclasses__(), *InputError.__subclasses__())
}
"""Name of an error -> its type, for raising on one rank what was raised on another."""
