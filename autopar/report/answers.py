"""Answers to questions about a plan, in words and as data: what another plan would cost, and what less memory costs.

Comes in: plans that were really made (`autopar.counterfactuals`). Goes out: an `Answer` or a `Frontier`, which print as a screen of text.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, replace
from typing import Any

from autopar.ir import AS_MODEL, Precision, format_mesh, format_sizes, with_pipeline
from autopar.plans import Plan, Request
from autopar.report.charts import Axis, Point, draw_line_chart
from autopar.report.comparison import (
    align,
    compare_memory,
    compare_steps,
    decides_alike,
    tabulate_plans,
    word_ratio,
    word_terms,
)
from autopar.report.summary import count, describe_choice, describe_mesh, describe_recompute
from autopar.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Answer:
    """What a plan would be if something else had been asked for; ``print(answer)`` shows it beside the plan.

    Attributes:
        question: what was asked, ``tp=8, pp=4`` or ``batch=1024``.
        plan: the plan that the question is about.
        other: the plan for what was asked; None where none fits.
        reason: why there is none; else empty.
        needed_bytes: bytes of a device that the leanest plan found needs, where none fits; 0 where memory isn't the reason.
    """

    question: str
    plan: Plan
    other: Plan | None
    reason: str = ""
    needed_bytes: int = 0

    @property
    def is_better(self) -> bool:
        """Whether the other plan is faster and could take the plan's place: for the same program and devices, within their memory."""
        plan, other = self.plan, self.other
        if other is None or (plan.fingerprint, plan.cluster, plan.precision) != (other.fingerprint, other.cluster, other.precision):
            return False
        return other.memory.total <= plan.memory.budget and other.proof.objective_ns < plan.proof.objective_ns

    def __str__(self) -> str:
        if self.other is None:
            return f"{self.question} can't be had: {self.reason}"
        lines = [
            _word_answer(self, self.other),
            "",
            f"the plan: {describe_choice(self.plan)}",
            f"this one: {describe_choice(self.other)}",
            "",
            tabulate_plans(self.plan, self.other, ("the plan", "this one")),
            "",
        ]
        if notes := [note for note in self.other.notes if note not in self.plan.notes]:
            lines += ["Notes on this one", *(f"- {note}" for note in notes), ""]
        command = word_command(self.other.request, self.other.precision)
        if decides_alike(self.plan, self.other):
            lines.append("Both decide the same.")
        elif self.is_better:
            lines += [
                "It is faster than the plan and could take its place: what is proven of a plan isn't over all meshes and schedules.",
                f"Write it with -o FILE, or make it: {command}",
            ]
        else:
            lines.append(f"Made by: {command}")
        return "\n".join(lines)

    def to_data(self) -> dict[str, Any]:
        """The answer as JSON-ready data: seconds and bytes in the key names; differences are positive where the other plan has more."""
        other = self.other
        data: dict[str, Any] = {
            "question": self.question,
            "feasible": other is not None,
            "reason": self.reason,
            "needed_bytes": self.needed_bytes,
            "better": self.is_better,
            "plan": _plan_data(self.plan),
            "other": None if other is None else _plan_data(other),
        }
        if other is not None:
            data["notes"] = [note for note in other.notes if note not in self.plan.notes]
            data["difference_seconds"] = {part.name: part.change for part in compare_steps(self.plan, other)}
            data["difference_bytes"] = {part.name: part.change for part in compare_memory(self.plan, other)}
        return data


@dataclass(frozen=True)
class Frontier:
    """The fastest plans found for less and less memory of a device; ``print(frontier)`` shows them as a table.

    Attributes:
        plan: the plan that the question is about.
        points: plans from the one that needs most memory to the leanest, each slower than those before it: one that needs less memory and
            is no slower takes the place of others.
        budgets: bytes of a device that were planned for.
    """

    plan: Plan
    points: tuple[Plan, ...]
    budgets: tuple[int, ...]

    @property
    def fastest(self) -> Plan:
        """The fastest of the points, which needs most memory of them: the plan itself, unless a search for less found a better one."""
        return self.points[0]

    def at(self, nbytes: int) -> Plan | None:
        """The fastest of the points that fits `nbytes` on each device; None where none does."""
        return next((point for point in self.points if point.memory.total <= nbytes), None)

    def __str__(self) -> str:
        rows = [["memory per device", "step", "to the plan", "mesh", "what saves memory"]]
        for point in self.points:
            compared = word_ratio(self.plan.seconds.step, point.seconds.step)
            rows.append(
                [
                    format_bytes(point.memory.total),
                    format_seconds(point.seconds.step),
                    "the plan" if point is self.plan else compared,
                    format_mesh(with_pipeline(point.mesh, point.pipeline.ranks)),
                    _word_savings(point) or "-",
                ]
            )
        lines = [f"Step time over memory per device: {self.plan.model} on {self.plan.cluster}", "", align(rows, left={3, 4}), ""]
        fastest = self.fastest
        if fastest.proof.objective_ns < self.plan.proof.objective_ns:
            memory, step = format_bytes(fastest.memory.total), format_seconds(fastest.seconds.step)
            lines.append(f"A faster plan was found, with {memory} and {step}: a plan's proof isn't over all meshes and schedules.")
            lines.append(f"-o FILE.json writes it; it is made by: {word_command(fastest.request, fastest.precision)}")
        elif self.plan not in self.points:
            memory, step = format_bytes(self.plan.memory.total), format_seconds(self.plan.seconds.step)
            lines.append(f"The plan itself, with {memory} and {step}, isn't among them: one that needs less memory is as fast.")
        lines.append(f"Planned for {len(self.budgets)} budgets of memory. No plan was found that needs less than the last.")
        return "\n".join(lines)

    def to_svg(self) -> str:
        """The frontier as a picture, the text of an SVG file."""
        points = [_draw_point(point, "the plan" if point is self.plan else "") for point in reversed(self.points)]
        if points[0].label == "":
            points[0] = replace(points[0], label="leanest")
        marks = [] if self.plan in self.points else [_draw_point(self.plan, "the plan")]
        title = f"Step time over memory per device: {self.plan.model} on {self.plan.cluster}"
        x, y = Axis("memory per device", format_bytes), Axis("step", format_seconds)
        return draw_line_chart(title, x, y, points, marks=marks, stepped=True)

    def to_data(self) -> dict[str, Any]:
        """The frontier as JSON-ready data: seconds and bytes in the key names."""
        return {"plan": _plan_data(self.plan), "points": [_plan_data(point) for point in self.points], "budget_bytes": list(self.budgets)}


def word_command(request: Request, precision: Precision) -> str:
    """The command line that asks for a plan again; MODEL stands for a module that only Python knows."""
    words = ["autopar", "plan", request.model or "MODEL", "--cluster", request.cluster or "CLUSTER"]
    options = {"--batch": request.batch, "--seq": request.seq, "--dtype": request.dtype}
    words += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    if precision != AS_MODEL:
        words += ["--precision", str(precision)]
    if request.memory is not None:
        words += ["--memory", _write_exactly(request.memory)]
    words += [word for name, text in request.pins.texts.items() for word in ("--pin", f"{name}={text}")]
    if request.mesh_sizes:
        words += ["--mesh", format_sizes(request.mesh_sizes)]
    return shlex.join([*words, *(["--strict"] if request.strict else [])])


def _write_exactly(nbytes: int) -> str:
    """Bytes as the option takes them, none lost: ``40GB``, or the number alone."""
    return f"{nbytes // 10**9}GB" if nbytes % 10**9 == 0 else str(nbytes)


def _word_answer(answer: Answer, other: Plan) -> str:
    """The answer in a sentence: the step, how it compares, and which of its parts make the difference."""
    plan = answer.plan
    parts = [f"{answer.question} would take {format_seconds(other.seconds.step)}, {word_ratio(plan.seconds.step, other.seconds.step)}"]
    terms = word_terms(compare_steps(plan, other))
    if plan.work.samples != other.work.samples:
        each = [format_seconds(either.seconds.step / either.work.samples) for either in (plan, other)]
        terms = f"{terms}; per sample {each[1]} instead of {each[0]}"
    return ": ".join([*parts, *([terms] if terms else [])])


def _word_savings(plan: Plan) -> str:
    """What a plan does that saves memory, in a few words."""
    pipeline, kinds = plan.pipeline, describe_recompute(plan)
    parts = [f"recompute {kinds} of {count(len(pipeline.blocks), 'block')}"] if kinds else []
    parts += [f"{pipeline.microbatches} micro-batches"] if pipeline.microbatches > 1 else []
    parts += [f"loss in {plan.loss_chunks} chunks"] if plan.loss_chunks > 1 else []
    axes = [text for group in plan.groups for texts in group.axes.values() for text in texts.split(", ")]
    levels = [level for level, storage in _LEVELS.items() if storage in axes]
    return ", ".join([*parts, *([f"ZeRO {' and '.join(levels)}"] if levels else [])])


_LEVELS = {"1": "optimizer storage", "2": "optimizer and gradient storage", "3": "parameter storage"}
"""ZeRO level -> how a group of layers says that an axis stores in parts by it."""


def _draw_point(plan: Plan, label: str) -> Point:
    """A plan in the picture of a frontier."""
    memory, step = plan.memory.total, plan.seconds.step
    hint = f"{format_bytes(memory)}, {format_seconds(step)}: mesh {describe_mesh(plan)}"
    return Point(memory, step, hint, label, is_below=label == "the plan")


def _plan_data(plan: Plan) -> dict[str, Any]:
    mesh = with_pipeline(plan.mesh, plan.pipeline.ranks)
    return {
        "cluster": plan.cluster,
        "precision": str(plan.precision),
        "inputs": dict(plan.inputs),
        "mesh": dict(zip(mesh.names, mesh.sizes, strict=True)),
        "pipeline": {name: getattr(plan.pipeline, name) for name in ("ranks", "schedule", "chunks", "microbatches")},
        "seconds": {**asdict(plan.seconds), "step": plan.seconds.step},
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "pins": plan.request.pins.texts,
    }
