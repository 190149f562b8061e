"""Does the search lose to its own pins? Pins are drawn at random over models, clusters and limits of memory.

``make pins-bench`` runs it. A *setting* is a model, a cluster and a limit of memory. Its *free plan* has no pins. Two things must hold:

- no pinned plan is faster than the lower bound that the free plan states, which is its step less its own gap;
- the free plan's own choices, stated as pins, return a plan of the same step: all of them together, and any part of them.

Draws depend on the seed alone. ``-o FILE`` writes a line of JSON per draw; a file that is there is completed, so a run may be stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from autopar.capture import Captured, capture
from autopar.cli.models import load_model
from autopar.cost_models import Cluster
from autopar.errors import AutoparError, HardwareError, InfeasibleError
from autopar.ir import Split, StateKind
from autopar.plans import Plan
from autopar.rules import find_spaces
from autopar.schedules import SCHEDULES
from tests.planning import make_plan
from tests.zoo import DEEP, ZOO

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
ROUNDING = 1e-5
"""Steps this close are equal: the search rounds every decision to a nanosecond."""

Build = Callable[[], tuple[nn.Module, Any]]


class Residual(nn.Module):
    """A chain of small products, each around a shortcut, on meta tensors."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 2 * width, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square after all layers, of `x` (batch, sequence, width)."""
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x.square().mean()


def _residual(width: int, layers: int, batch: int, length: int) -> tuple[nn.Module, Any]:
    with torch.device("meta"):
        return Residual(width, layers), (torch.zeros(batch, length, width),)


def _llama(batch: int, length: int, layers: int = 8, width: int = 2048) -> tuple[nn.Module, Any]:
    """A Llama of four queries a group, with long or short sequences, on meta tensors in bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 512,
        max_position_embeddings=length,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.empty(batch, length, dtype=torch.int64)
    return model, {"input_ids": ids, "labels": ids}


def _published(config: str, batch: int, length: int) -> tuple[nn.Module, Any]:
    loaded = load_model(f"hf:{CONFIGS / config}", batch=batch, seq=length, dtype="bfloat16")
    return loaded.model, loaded.example_inputs


MODELS: Mapping[str, Build] = {
    "residual": lambda: _residual(32, 2, 8, 64),
    "wide residual": lambda: _residual(2048, 6, 64, 512),
    "gpt2 deep": DEEP["gpt2_deep"],
    "llama": ZOO["llama"],
    "bert deep": DEEP["bert_deep"],
    "t5": ZOO["t5"],
    "resnet": ZOO["resnet"],
    "lstm": ZOO["lstm"],
    "dlrm": ZOO["dlrm"],
    "unet": DEEP["unet"],
    "gpt2 16x1024": lambda: _published("gpt2", 16, 1024),
    "llama 16x2048": lambda: _llama(16, 2048),
    "llama 2x32768": lambda: _llama(2, 32768),
    "llama 16x16384": lambda: _llama(16, 16384),
    "llama 1x131072": lambda: _llama(1, 131072),
    "llama-3-8b 8x8192": lambda: _published("llama-3-8b", 8, 8192),
    "llama-3-8b 1x131072": lambda: _published("llama-3-8b", 1, 131072),
}
"""Builders of a model and its example inputs, by name."""
SMALL = ("2xcpu", "4xcpu", "8xH100", "2x4xH100", "8xA100", "6xcpu")
LARGE = ("4xA100-80GB", "8xH100", "8xA100", "2x8xH100", "4x8xH100", "8xV100")
SHARES = (None, None, 0.9, 0.7, 0.5)
"""Limits of memory: none, or such a share of what the free plan without a limit takes beside what devices reserve."""


@dataclass(frozen=True)
class Draw:
    """What was pinned and what came of it.

    Attributes:
        model, cluster, share: the setting.
        kind: ``random`` pins, ``all`` choices of the free plan, or a ``part`` of them.
        pins: what was pinned.
        mesh: the mesh that was given beside the pins, where the free plan's axes are free.
        free_ns, bound_ns: nanoseconds of a step of the free plan, and its lower bound; 0 where nothing fits.
        pinned_ns: of the pinned plan; 0 where the pins can't be had, or nothing fits.
        outcome: ``kept``, ``faster`` (the free plan loses), ``slower`` (stated choices give a slower plan), ``refused``.
        free, pinned: both plans in words.
    """

    model: str
    cluster: str
    share: float | None
    kind: str
    pins: Mapping[str, Any]
    mesh: Mapping[str, int] | None
    free_ns: int
    bound_ns: int
    pinned_ns: int
    outcome: str
    free: str
    pinned: str

    @property
    def loss(self) -> float:
        """By how much of its step the free plan is slower than the pinned one; negative where it is faster."""
        return 1 - self.pinned_ns / self.free_ns if self.free_ns and self.pinned_ns else 0.0


def describe(plan: Plan, model: str) -> str:
    """The choices of a plan that can be pinned, in words."""
    words = ", ".join(f"{name}={value}" for name, value in state_choices(plan, model).items())
    return f"{plan.proof.candidates[plan.proof.chosen].name} on {plan.mesh}: {words}"


def state_choices(plan: Plan, model: str) -> dict[str, Any]:
    """The choices of a plan for a model of `MODELS` as pins: axes that split work, all that a pipeline has, what is alike everywhere."""
    pipeline = plan.pipeline
    pins: dict[str, Any] = dict(_axes(plan, model))
    recompute = {block.recompute for block in pipeline.blocks}
    if plan.proof.candidates[plan.proof.chosen].is_spread:
        pins |= {"pp": pipeline.ranks, "microbatches": pipeline.microbatches}
        pins |= {"schedule": pipeline.schedule, "chunks": pipeline.chunks} if pipeline.ranks > 1 else {}
        pins |= {"recompute": recompute.pop()} if len(recompute) == 1 else {}
    pins |= {"prefetch": plan.prefetch, "loss_chunks": plan.loss_chunks, "half_batches": plan.half_batches}
    if "dp" in pins and (level := _zero_level(plan)) is not None:
        pins["zero"] = level
    attention = [placement for name, placement in plan.placements.items() if "attention" in name]
    states = [part for placement in attention for part in placement if part is not None]
    if states and "cp" in pins:
        loops = {getattr(part, "loop", "") for placement in attention for part in placement}
        pins |= {"attention": "ring", "zigzag": any(getattr(part, "zigzag", False) for part in states)} if "ring" in loops else {}
    return {name: value for name, value in pins.items() if value is not False or name == "zigzag"}


def _axes(plan: Plan, model: str) -> dict[str, int]:
    """The product of the sizes of a plan's axes by their kind, of those with more than one rank that split some contraction."""
    sizes: dict[str, int] = {}
    contractions = [placement for name, placement in plan.placements.items() if name in _contractions(model)]
    for axis, (name, size) in enumerate(zip(plan.mesh.names, plan.mesh.sizes, strict=True)):
        kind = name.rstrip("0123456789")
        if not any(isinstance(placement[axis], Split) for placement in contractions):
            continue  # what splits nothing is called dp too
        if kind in ("dp", "cp", "tp") and size > 1:
            sizes[kind] = sizes.get(kind, 1) * size
    return sizes


@functools.cache
def _contractions(model: str) -> frozenset[str]:
    spaces, _ = find_spaces(captured(model).graph)
    return frozenset(name for name, space in spaces.items() if space.is_contraction)


def _zero_level(plan: Plan) -> int | None:
    """The ZeRO level of all parameters along the dp axes, if it is the same for all of them."""
    axes = [axis for axis, name in enumerate(plan.mesh.names) if name.startswith("dp")]
    parameters = [layout for name, layout in plan.layouts.items() if name.startswith("p_")]
    levels = set()
    for layout in parameters:
        for axis in axes:
            state = layout[axis]
            levels.add((state.level or 3) if state.kind is StateKind.SHARD else 0)
    return levels.pop() if len(levels) == 1 else None


def free_mesh(plan: Plan) -> dict[str, int] | None:
    """The mesh that asks for the same free axes, as the summary writes it; None where the axes are pinned to kinds by their names."""
    asked = plan.proof.candidates[plan.proof.chosen].free_mesh
    return dict(zip(asked.names, asked.sizes, strict=True)) if asked else None


def draw_pins(rng: random.Random, devices: int, batch: int) -> dict[str, Any]:
    """One to three pins of different kinds."""

    def divisor(number: int) -> int:
        return rng.choice([size for size in range(1, number + 1) if number % size == 0])

    kinds: Mapping[str, Callable[[], dict[str, Any]]] = {
        "dp": lambda: {"dp": divisor(devices)},
        "tp": lambda: {"tp": divisor(devices)},
        "cp": lambda: {"cp": divisor(devices)},
        "pp": lambda: {"pp": divisor(devices)},
        "microbatches": lambda: {"microbatches": divisor(batch)},
        "zero": lambda: {"zero": rng.randrange(4)},
        "zero_group": lambda: {"zero": rng.randrange(1, 4), "zero_group": max(2, divisor(devices))},
        "attention": lambda: {"attention": rng.choice(("ring", "ulysses", "gather")), "cp": divisor(devices)},
        "zigzag": lambda: {"zigzag": rng.random() < 0.5, "cp": divisor(devices)},
        "vocabulary": lambda: {"vocabulary": rng.random() < 0.5},
        "loss_chunks": lambda: {"loss_chunks": rng.choice((1, 2, 8, 64))},
        "prefetch": lambda: {"prefetch": rng.choice((0, 1, 2))},
        "half_batches": lambda: {"half_batches": rng.random() < 0.5},
        "schedule": lambda: {"schedule": rng.choice(list(SCHEDULES)), "pp": max(2, divisor(devices))},
        "chunks": lambda: {"chunks": rng.choice((1, 2)), "pp": divisor(devices)},
        "recompute": lambda: {"recompute": rng.choice(("none", "selective", "full"))},
    }
    weights = [4 if kind in ("dp", "tp", "cp", "pp") else 1 for kind in kinds]
    pins: dict[str, Any] = {}
    for kind in rng.choices(list(kinds), weights, k=rng.choice((1, 1, 2, 2, 3))):
        pins = {**kinds[kind](), **pins}
    return pins


@functools.lru_cache(maxsize=4)
def captured(name: str) -> Captured:
    """The captured model of `MODELS`."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return capture(model, inputs)


def _batch(found: Captured) -> int:
    return max((op.results[0].shape[0] for op in found.graph.ops if op.kind.name == "INPUT" and op.results[0].shape), default=1)


def plan_free(model: str, cluster: str, share: float | None) -> tuple[Cluster, Plan | None]:
    """The setting's cluster with its limit of memory, and the free plan; None where nothing fits."""
    devices = Cluster.parse(cluster)
    try:
        plan = make_plan(captured(model).graph, devices)
        if share is not None:
            devices = devices.with_memory(plan.memory.reserved + int((plan.memory.total - plan.memory.reserved) * share))
            plan = make_plan(captured(model).graph, devices)
    except InfeasibleError:
        return devices, None
    return devices, plan


def draw(model: str, cluster: str, share: float | None, seed: int, count: int) -> Iterator[Draw]:
    """`count` random pins in a setting; the free plan's choices, all of them and two parts."""
    rng = random.Random(f"{model}/{cluster}/{share}/{seed}")
    try:
        devices, free = plan_free(model, cluster, share)
    except HardwareError:  # devices that don't know the model's dtype
        return
    batch = _batch(captured(model))
    requests: list[tuple[str, dict[str, Any], dict[str, int] | None]] = []
    for _ in range(count):
        requests.append(("random", draw_pins(rng, devices.world_size, batch), None))
    if free is not None:
        choices, mesh = state_choices(free, model), free_mesh(free)
        if mesh is not None:  # the names say what the axes do, but ask for axes that do nothing else
            choices = {name: value for name, value in choices.items() if name not in ("dp", "cp", "tp", "zero")}
        requests.append(("all", choices, mesh))
        for _ in range(2):
            names = rng.sample(list(choices), rng.randint(1, max(1, len(choices) - 1))) if choices else []
            given_mesh = mesh if rng.random() < 0.5 else None
            names += ["pp"] if given_mesh is not None and "pp" in choices else []  # whose ranks the mesh is of
            requests.append(("part", {name: choices[name] for name in names}, given_mesh))
    for kind, pins, given_mesh in requests:
        yield _compare(Draw(model, cluster, share, kind, pins, given_mesh, 0, 0, 0, "", "", ""), free, devices)


def _compare(asked: Draw, free: Plan | None, devices: Cluster) -> Draw:
    """A draw with what came of it."""
    if free is not None:
        asked = replace(asked, free_ns=free.proof.objective_ns, bound_ns=free.proof.bound_ns, free=describe(free, asked.model))
    try:
        plan = make_plan(captured(asked.model).graph, devices, pins=asked.pins, mesh=asked.mesh)
    except AutoparError as error:
        outcome = "slower" if asked.kind != "random" else "refused"
        return replace(asked, outcome=outcome, pinned=f"{type(error).__name__}: {error}"[:200])
    pinned_ns = plan.proof.objective_ns
    outcome = "kept"
    if free is None or pinned_ns < asked.bound_ns * (1 - ROUNDING) - 1:
        outcome = "faster"
    elif asked.kind != "random" and pinned_ns > asked.free_ns * (1 + ROUNDING) + 1:
        outcome = "slower"
    return replace(asked, pinned_ns=pinned_ns, outcome=outcome, pinned=describe(plan, asked.model))


def settings(names: list[str]) -> Iterator[tuple[str, str, float | None]]:
    """The settings of these models, those of a model one after another since they share its capture."""
    for name in names:
        clusters = LARGE if " " in name and "deep" not in name else SMALL
        for cluster in clusters:
            for share in dict.fromkeys(SHARES):
                yield name, cluster, share


def main() -> None:
    """Draw, print what fails, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="part of the names of the models, all unless given")
    parser.add_argument("--cluster", default="", help="only this cluster")
    parser.add_argument("--share", type=float, default=1.0, help="part of the settings that are drawn")
    parser.add_argument("--draws", type=int, default=6, help="random pins in a setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="no setting is begun after so many")
    parser.add_argument("-o", type=Path, help="a file of lines of JSON, completed if it is there")
    arguments = parser.parse_args()
    rng, start = random.Random(arguments.seed), time.perf_counter()
    drawn = [Draw(**json.loads(line)) for line in arguments.o.read_text().splitlines()] if arguments.o and arguments.o.exists() else []
    known = {(one.model, one.cluster, one.share) for one in drawn}
    chosen = [setting for setting in settings(list(MODELS)) if rng.random() < arguments.share]
    for setting in chosen:
        if arguments.cluster not in ("", setting[1]):
            continue
        if arguments.models not in setting[0] or setting in known or time.perf_counter() - start > arguments.seconds:
            continue
        found = list(draw(*setting, arguments.seed, arguments.draws))
        drawn += found
        for one in found:
            if one.outcome in ("faster", "slower"):
                print(f"{one.outcome} {one.loss:+.2%} {one.model}, {one.cluster}, {one.share}, {one.kind}: {one.pins} {one.mesh or ''}")
                print(f"    free   {one.free_ns} (bound {one.bound_ns}) {one.free}\n    pinned {one.pinned_ns} {one.pinned}", flush=True)
        if arguments.o:
            with arguments.o.open("a") as file:
                file.writelines(json.dumps(asdict(one)) + "\n" for one in found)
    print(Counter((one.kind, one.outcome) for one in drawn))
    if drawn:
        worst = max(drawn, key=lambda one: one.loss)
        print(f"{len(drawn)} draws; the free plan loses by {worst.loss:.2%} at most: {worst.model}, {worst.cluster}, {worst.pins}")


if __name__ == "__main__":
    main()
