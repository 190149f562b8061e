"""A user's module and an example call to one flat graph, twice: of torch.fx, to be rewritten, and of `autopar.ir.graph`, to be planned.

Comes in: an `nn.Module` and example inputs. Goes out: `Captured`. The one idea: the module is exported with fake tensors, so nothing is
computed and a model on the meta device is captured like any other; a visible list of passes then makes one flat graph without submodules,
in-place ops and devices.

Modules, in reading order: ``fx_nodes``, ``calls``, ``errors``, ``settings``, ``attributes``, ``functions``, ``watch``, ``torch_modules``,
``transformers``, ``precision``, ``functionalize``, ``decompose``, ``autocast``, ``order``, ``working``, ``record``, ``masks``,
``normalize``, ``padding``, ``graph_of``, ``export``.
"""

from autopar.capture.calls import ExampleInputs, canonical, leaf_names, split_call
from autopar.capture.errors import refuse_wrapped
from autopar.capture.export import Captured, capture, refuse_tensors
from autopar.capture.fx_nodes import source_of, takes
from autopar.capture.precision import call_in_precision
from autopar.capture.settings import OF_CLASS, class_attribute, contents_of, variables_of
from autopar.capture.transformers import collects_outputs

__all__ = [
    "OF_CLASS",
    "Captured",
    "ExampleInputs",
    "call_in_precision",
    "canonical",
    "capture",
    "class_attribute",
    "collects_outputs",
    "contents_of",
    "leaf_names",
    "refuse_tensors",
    "refuse_wrapped",
    "source_of",
    "split_call",
    "takes",
    "variables_of",
]
