"""Colours of pictures: told apart by colour-blind readers, and light enough for black text on paper.

The hues are those of Okabe and Ito (2008, "Color Universal Design"), lightened until black text has a contrast of 10 to 1. Whatever a
colour says is written in words too, since paper may be grey.
"""

from __future__ import annotations

from collections.abc import Mapping

from autopar.pictures.outline import Kind

TEXT = "#1a1a1a"
"""Of text and lines."""

MUTED = "#595959"
"""Of what is beside the point: the order of boxes, captions."""

PAPER = "#ffffff"
"""Behind everything."""

PANEL = "#f5f5f5"
"""Behind the boxes of a stage."""

FILLS: Mapping[Kind, str] = {
    Kind.NOTHING: "#e6e6e6",
    Kind.BATCH: "#9fd4f5",
    Kind.FEATURES: "#f7c873",
    Kind.SEQUENCE: "#8ddcc0",
    Kind.BATCH_FEATURES: "#f4ec84",
    Kind.BATCH_SEQUENCE: "#e8bcd6",
    Kind.FEATURES_SEQUENCE: "#f5b899",
    Kind.ALL: "#b9c4f0",
}
"""Behind a box, by what is split of its work."""
