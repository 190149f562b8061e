"""Blocks to stages and ways to run them: greedy assignments, the mixed-integer model, which configurations are looked at.

Comes in: a `PipelineProblem` and configurations. Goes out: the fastest pipeline found, with its bound.

Modules, in reading order: ``block_options``, ``peaks``, ``assignment_problem``, ``greedy``, ``assignment_model``, ``assignment``,
``option_maker``, ``mixing``, ``configurations`` (which states what is proven), ``solutions``, ``search_state``,
``estimates``, ``best_first``.
"""

from autopar.search.pipeline.assignment_problem import PHASES, AssignmentCost, RankMemory, compute_cost, longest_path, make_problem
from autopar.search.pipeline.best_first import Pipelined, search_pipelines
from autopar.search.pipeline.block_options import BlockOption, BlockOptions
from autopar.search.pipeline.configurations import Configuration, find_configurations, make_pipeline_problem
from autopar.search.pipeline.option_maker import BlockOptionMaker
from autopar.search.pipeline.peaks import StageProfile, find_levels, find_update

__all__ = [
    "PHASES",
    "AssignmentCost",
    "BlockOption",
    "BlockOptionMaker",
    "BlockOptions",
    "Configuration",
    "Pipelined",
    "RankMemory",
    "StageProfile",
    "compute_cost",
    "find_configurations",
    "find_levels",
    "find_update",
    "longest_path",
    "make_pipeline_problem",
    "make_problem",
    "search_pipelines",
]
