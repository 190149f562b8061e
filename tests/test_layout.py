"""Spaces, placements and layouts: text forms, legality, local sizes."""

from __future__ import annotations

import pytest

from autopar.ir.layout import (
    PARTIAL,
    REPLICATE,
    REPLICATE_PARTIAL_GRAD,
    Mesh,
    fits,
    format_layout,
    format_placement,
    is_legal,
    local_outer,
    local_shape,
    operand_layout,
    parse_layout,
    parse_placement,
    result_layout,
    shard,
)
from autopar.ir.space import LoopKind, parse

LINEAR = parse("b s i, o i, o -> b s o", [(4, 6, 8), (12, 8), (12,)], [(4, 6, 12)], added=[2], flops=2)
MESH = Mesh(("dp", "tp"), (2, 2))


@pytest.mark.parametrize(
    ("placement", "needs", "made"),
    [
        ("b,o", ["S0,B", "B,S0", "B,S0"], "S0,S2"),
        ("b,o/3", ["S0,B", "B,S0/3", "B,S0/3"], "S0,S2/3"),
        ("s,i", ["S1,S2", "B,S1", "B,P"], "S1,P"),
        ("-,i", ["R,S2", "R,S1", "R,P"], "R,P"),
        ("b,b", ["S0,S0", "B,B", "B,B"], "S0,S0"),
    ],
)
def test_what_a_placement_means_for_each_tensor(placement: str, needs: list[str], made: str) -> None:
    parts = parse_placement(placement)
    assert is_legal(LINEAR, parts, MESH)
    assert [format_layout(operand_layout(LINEAR, parts, i)) for i in range(3)] == needs
    assert format_layout(result_layout(LINEAR, parts, 0)) == made
    assert format_placement(parts) == placement


@pytest.mark.parametrize("placement", ["o/5,-", "o/12,-", "+,-"])
def test_illegal_placements(placement: str) -> None:
    assert not is_legal(LINEAR, parse_placement(placement), MESH)


def test_a_whole_loop_is_never_split() -> None:
    softmax = parse("b c! -> b c!", [(4, 8)], [(4, 8)])
    assert softmax.loops["c"].kind is LoopKind.WHOLE
    assert not is_legal(softmax, parse_placement("c"), Mesh(("x",), (2,)))
    assert is_legal(softmax, parse_placement("b"), Mesh(("x",), (2,)))


def test_a_loop_that_the_result_lacks_is_summed() -> None:
    total = parse("b c -> b", [(4, 8)], [(4,)])
    assert format_layout(result_layout(total, parse_placement("c"), 0)) == "P"


def test_a_group_splits_inside_its_outer_blocks() -> None:
    view = parse("b (t h d) -> b t h d", [(4, 24)], [(4, 3, 4, 2)], view=True, linear=[0])
    parts = parse_placement("h")
    assert format_layout(operand_layout(view, parts, 0)) == "S1/3"
    assert format_layout(result_layout(view, parts, 0)) == "S2"
    assert format_layout(result_layout(view, parse_placement("+"), 0)) == "P"


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((8,), "S0,S0", True),
        ((6,), "S0,S0", False),
        ((12,), "S0,S0/2", True),  # two blocks on the first axis, each block split on the second
        ((12,), "S0,S0/3", False),  # the first axis cuts through a block of the second
        ((12,), "R,S0/3", True),
        ((12,), "S0/3,S0/3", True),
        ((9,), "S0/3,R", False),
    ],
)
def test_splits_are_even(shape: tuple[int, ...], layout: str, expected: bool) -> None:
    assert fits(shape, parse_layout(layout), MESH) is expected


def test_outer_blocks_as_a_rank_sees_them() -> None:
    layout = parse_layout("S0,S0/4")
    assert local_shape((16,), layout, MESH) == (4,)
    assert local_outer(layout, MESH, 0) == 1
    assert local_outer(layout, MESH, 1) == 2  # of four blocks a rank of the first axis has two


def test_text_forms_round_trip_and_refuse_nonsense() -> None:
    assert parse_layout("S0/3,R,B,P") == (shard(0, 3), REPLICATE, REPLICATE_PARTIAL_GRAD, PARTIAL)
    with pytest.raises(ValueError, match="no state of a layout"):
        parse_layout("S")
    with pytest.raises(ValueError, match="no part of a placement"):
        parse_placement("b/,o")


def test_coordinates_are_row_major() -> None:
    mesh = Mesh(("a", "b"), (2, 3))
    assert [mesh.coordinates(rank) for rank in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(
    ("text", "shape", "result", "message"),
    [
        ("b c -> b c", (2, 3, 4), (2, 3, 4), "has 2 dims"),
        ("b c -> b c", (2, 3), (2, 4), "doesn't have size 4"),
        ("b b -> b", (2, 2), (2,), "twice"),
    ],
)
def test_spaces_that_do_not_fit_their_tensors(text: str, shape: tuple[int, ...], result: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, [shape], [result])
