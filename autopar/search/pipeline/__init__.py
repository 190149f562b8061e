"""Blocks to stages and ways to run them: greedy assignments, the mixed-integer model, which configurations are looked at.

Comes in: a `PipelineProblem` and configurations. Goes out: the fastest pipeline found, with its bound.

Modules, in reading order: ``block_options``, ``assignment_problem``, ``greedy``, ``assignment_model``, ``assignment``, ``variants``,
``configurations`` (which states what is proven), ``solutions``, ``best_first``.
"""

from autopar.search.pipeline.assignment import Assignment
from autopar.search.pipeline.best_first import Pipelined, search_pipelines
from autopar.search.pipeline.block_options import BlockOption, BlockOptions
from autopar.search.pipeline.configurations import Configuration, find_configurations, make_pipeline_problem
from autopar.search.pipeline.variants import Choices, choices_of

__all__ = [
    "Assignment",
    "BlockOption",
    "BlockOptions",
    "Choices",
    "Configuration",
    "Pipelined",
    "choices_of",
    "find_configurations",
    "make_pipeline_problem",
    "search_pipelines",
]
