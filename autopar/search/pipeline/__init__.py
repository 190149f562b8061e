"""Blocks to stages and ways to run them: greedy assignments, the mixed-integer model, which configurations are looked at.

Comes in: solutions of the placement problem for one micro-batch. Goes out: the fastest pipeline found, with its bound.

Modules, in reading order: ``menus``, ``drafts``, ``assignment_model``, ``assignment``, ``variants``, ``placements``, ``configurations``.
"""

from autopar.search.pipeline.assignment import Assignment, BlockMenu, Variant
from autopar.search.pipeline.configurations import Pipelined, PipelineSearch
from autopar.search.pipeline.placements import Shape
from autopar.search.pipeline.variants import Choices, choices_of

__all__ = ["Assignment", "BlockMenu", "Choices", "PipelineSearch", "Pipelined", "Shape", "Variant", "choices_of"]
