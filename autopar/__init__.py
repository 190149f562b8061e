"""autopar: an automatic parallelization compiler for PyTorch."""

from autopar.api import CompiledModule as CompiledModule
from autopar.api import compile as compile
from autopar.api import detect_cluster as detect_cluster
from autopar.api import plan as plan
from autopar.api import verify as verify
from autopar.cost_models import Cluster as Cluster
from autopar.plan import Plan as Plan
