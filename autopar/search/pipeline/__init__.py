"""Blocks to stages and ways to run them: greedy assignments, the mixed-integer model, which configurations are looked at.

Comes in: solutions of the placement problem for one micro-batch. Goes out: the fastest pipeline found, with its bound.

Modules, in reading order: ``assignment_problem``, ``greedy``, ``assignment_model``, ``assignment``, ``variants``, ``solutions``,
``configurations``.
"""

from autopar.search.pipeline.assignment import Assignment, BlockOption, BlockOptions
from autopar.search.pipeline.configurations import Pipelined, PipelineSearch
from autopar.search.pipeline.solutions import Configuration
from autopar.search.pipeline.variants import Choices, choices_of

__all__ = ["Assignment", "BlockOption", "BlockOptions", "Choices", "Configuration", "PipelineSearch", "Pipelined", "choices_of"]
