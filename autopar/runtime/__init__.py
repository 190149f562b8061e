"""Programs behind the user's own training loop: process groups, stored parameters, gradients, schedules, failures.

Comes in: the user's module and a `Program`. Goes out: a module with the same calls. The one idea: to the user, parameters are DTensors of
the global sizes and calls mean what they mean on one device; inside, programs compute with plain tensors that share their storage.

Modules, in reading order: ``failures``, ``dtensor``, ``owned``, ``owned_rules``, ``dispatch``, ``tensor_methods``, ``states``,
``local_steps``, ``masters``, ``arrivals``, ``sums``, ``scattered``, ``gradients``, ``watching``, ``recording``, ``mailbox``, ``executor``,
``pipeline``, ``world``, ``checkpoints``, ``methods``, ``wrapping``, ``members``, ``storage``, ``agreement``, ``fingerprints``,
``parameters``, ``parts``, ``outputs``, ``inputs``, ``call_check``, ``pipeline_calls``, ``programs``, ``fusion``, ``module``.
"""

from autopar.runtime.agreement import form_agreement
from autopar.runtime.checkpoints import full_state_dict
from autopar.runtime.executor import Executor, StageTensors
from autopar.runtime.fusion import decide_fusion
from autopar.runtime.masters import MasterWeights, expect_masters
from autopar.runtime.module import ParallelModule
from autopar.runtime.storage import Init, StoredParameter

__all__ = [
    "Executor",
    "Init",
    "MasterWeights",
    "ParallelModule",
    "StageTensors",
    "StoredParameter",
    "decide_fusion",
    "expect_masters",
    "form_agreement",
    "full_state_dict",
]
