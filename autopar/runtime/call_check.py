"""That all ranks make the same calls of a compiled model, and pass the same where they must.

Comes in: a rank's call. Goes out: nothing, or an error on every rank that names what differs, and on which ranks. Numbers that stand for
the call are compared every time (`autopar.runtime.agreement`); only when they differ do the ranks tell each other what they pass.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import InputError
from autopar.ops import Autocast
from autopar.runtime.agreement import Agreement, digest, group_by, name_ranks
from autopar.runtime.fingerprints import Projections, hash_tensors, project
from autopar.runtime.inputs import Call, InputReader

EXACT_CALLS = 2
"""Calls of a kind in which all elements of all inputs are compared; later ones compare a sample."""

_MODE, _FROZEN, _GRADIENTS, _COUNT = "the mode", "the set of frozen parameters", "the gradient mode", "the number of such calls before"
_AUTOCAST = "torch.autocast"
_HOOKED = "the set of parameters with hooks"
_SETTINGS = "what forward reads of Python (attributes, methods, variables, hooks)"
_BEFORE = " of the call before"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

_SAME_CALLS = "Every rank must make the same calls in the same modes, outside of an `if rank == 0`"
_WHOLE_BATCH = (
    'With inputs="global" every rank passes the same whole batch: where each rank loads its own part (a DistributedSampler), or draws its '
    'own random numbers, compile with inputs="local", or give all ranks the same seed'
)
_EQUAL_SIZES = (
    'With inputs="local" every rank passes as many samples as the others: where the data doesn\'t divide, drop the last batch '
    "(drop_last=True) or pad it"
)
_SHARED_SAMPLES = (
    "Ranks that share samples must pass the same: index, count = model.data_shard say which, as rank and num_replicas of a "
    "DistributedSampler"
)
_NO_BATCH = "What has no batch in dim 0 must be the same on every rank"


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank says of its call.

    Attributes:
        texts: name -> what is passed, without values of tensors; and what else must be the same.
        hashes: name -> hash of the tensor.
        projections: name -> (projections, norm) of a tensor of floating point.
        samples: names of the inputs of which the rank passes its samples.
        index: which share of the batch that is.
    """

    texts: dict[str, str]
    hashes: dict[str, int]
    projections: dict[str, list[float]]
    samples: list[str]
    index: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """What reports differ in: (what differs and where, what to do about it) each; and tensors that differ by rounding."""

    differences: tuple[tuple[str, str], ...]
    rounded: tuple[str, ...]


def compare(reports: Sequence[Report], *, is_local: bool) -> Comparison:
    """Compare the reports of all ranks, in rank order."""
    differences: list[tuple[str, str]] = []
    rounded: list[str] = []
    for name in dict.fromkeys(name for report in reports for name in report.texts):
        said = group_by([report.texts.get(name, "not given") for report in reports])
        if len(said) > 1:
            is_tensor = any(name in report.hashes for report in reports)
            remedy = _SAME_CALLS if not is_tensor else _EQUAL_SIZES if is_local else _WHOLE_BATCH
            differences.append((f"{name} is {', '.join(f'{text} on {who}' for text, who in said.items())}", remedy))
    if differences:
        # Where ranks make calls of other kinds, it says nothing that one of these kinds is new to a rank.
        differences = [(text, remedy) for text, remedy in differences if not text.startswith((_SETTINGS, _COUNT))] or differences
        return Comparison(tuple(differences), ())
    for name in reports[0].hashes:
        has_samples = name.removesuffix(_BEFORE) in reports[0].samples
        remedy = _WHOLE_BATCH if not is_local else _SHARED_SAMPLES if has_samples else _NO_BATCH
        firsts: dict[int, int] = {}
        for rank, report in enumerate(reports):
            first = firsts.setdefault(report.index if has_samples else 0, rank)
            if report.hashes[name] == reports[first].hashes[name]:
                continue
            is_late = name.endswith(_BEFORE) and name.removesuffix(_BEFORE) in report.projections
            if is_late or _is_close(reports[first].projections.get(name), report.projections.get(name)):
                rounded.append(name)  # a late one is looked at closely in the next call
                continue
            unlike = [other for other in range(len(reports)) if reports[other].index == report.index or not has_samples]
            unlike = [other for other in unlike if reports[other].hashes[name] != reports[first].hashes[name]]
            differences.append((f"{name} isn't the same on rank {first} and {name_ranks(unlike)}", remedy))
            break
    return Comparison(tuple(differences), tuple(dict.fromkeys(rounded)))


def _is_close(first: Sequence[float] | None, second: Sequence[float] | None) -> bool:
    if first is None or second is None:
        return False
    return Projections(tuple(first[:-1]), first[-1]).agrees(Projections(tuple(second[:-1]), second[-1]))


@dataclass(slots=True, eq=False)
class _Kind:
    """Calls of one kind, which run one program.

    Attributes:
        texts: name -> what this rank passes, without values of tensors, and what else must be the same on all ranks.
        digest: stands for `texts` and the structure of the call.
        names: per leaf its name.
        count: calls so far.
        alike: calls of the first ones in which all ranks passed the same samples.
        is_rounded: whether inputs differed by rounding.
    """

    texts: dict[str, str]
    digest: int
    names: list[str]
    count: int = 0
    alike: int = 0
    is_rounded: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _LateHashes:
    """Hashes of the call before that a GPU was still computing; `values` has them in the order of `names` when `done` has happened."""

    names: tuple[str, ...]
    values: Tensor
    done: torch.cuda.Event

    def wait(self) -> dict[str, int]:
        self.done.synchronize()
        return {name + _BEFORE: number for name, number in zip(self.names, self.values.tolist(), strict=True)}


class CallCheck:
    """Checks that all ranks make the same calls of one model, and pass the same where they must.

    Args:
        agreement: of all ranks.
        reader: gives arguments their names.
        model: the user's model.
        name: of the model, for messages.
        is_local: whether every rank passes its own samples.

    Sizes, flags and values that aren't tensors are compared in every call, before anything runs. So are tensors: all of them in the first
    calls of a kind, later a sample of each; on a GPU the samples are compared in the next call, so that nobody waits for the device.
    """

    def __init__(self, agreement: Agreement, reader: InputReader, model: nn.Module, name: str, is_local: bool) -> None:
        self._agreement = agreement
        self._reader = reader
        self._model = model
        self._name = name
        self._is_local = is_local
        self._kinds: dict[Hashable, _Kind] = {}
        self._late: _LateHashes | None = None
        self._has_warned = False

    def check(
        self, key: Hashable, call: Call, event: str, index: int, number: int, *, hooked: Sequence[str] = (), runs: bool = True
    ) -> bool:
        """Wait for all ranks to make this call, and compare what they pass.

        Args:
            key: of the kind of call.
            call: what this rank passes.
            event: what this rank does, for `Agreement.meet`.
            index: which share of the batch this rank passes; 0 where all pass the same.
            number: of the program for the settings that the model has now, 0 where it is to be made.
            hooked: names of the parameters that have hooks, whose gradients are summed over ranks one by one.
            runs: whether the call runs; otherwise values don't matter.

        Returns whether it is one of the first calls of its kind.

        Raises InputError that names what differs and the ranks, CommError when some rank doesn't make the call.
        """
        kind = self._kinds.get((key, runs))
        if kind is None:
            kind = self._kinds[key, runs] = self._describe_kind(call)
        is_exact = kind.count < EXACT_CALLS
        tensors = {name: leaf for name, leaf in zip(kind.names, call.leaves, strict=True) if isinstance(leaf, Tensor)} if runs else {}
        hashes = self._hash(tensors, None if is_exact else kind.count, may_be_late=not (is_exact or kind.is_rounded))
        samples = {name for name, flag in zip(kind.names, call.has_samples, strict=True) if flag}
        of_samples = {name: number for name, number in hashes.items() if name.removesuffix(_BEFORE) in samples}
        of_others = {name: number for name, number in hashes.items() if name not in of_samples}
        modes = torch.is_grad_enabled() + 2 * torch.is_inference_mode_enabled() + 4 * number
        of_all = [kind.digest, modes, kind.count, digest(repr(hooked)), digest(repr(of_others))]
        facts = self._agreement.meet(event, [*of_all, index, digest(repr(of_samples))])
        shares: dict[int, tuple[int, ...]] = {}
        if any(other[:5] != facts[0][:5] or shares.setdefault(other[5], other) != other for other in facts):
            late = {name: number for name, number in hashes.items() if name not in tensors}
            self._explain(kind, _report(kind, tensors, late, samples, index, modes, hooked))
        elif is_exact and samples and len(shares) > 1 and len({other[6] for other in facts}) == 1:
            self._warn_of_copies(kind)
        kind.count += runs
        return is_exact

    def _describe_kind(self, call: Call) -> _Kind:
        names = self._reader.names(call.args, call.kwargs)
        texts = {name: _as_text(leaf) for name, leaf in zip(names, call.leaves, strict=True)}
        unlike = ", ".join(name for name, module in self._model.named_modules() if module.training != self._model.training)
        texts[_MODE] = ("training" if self._model.training else "evaluation") + (f" but for {unlike}" if unlike else "")
        texts[_FROZEN] = ", ".join(name for name, parameter in self._model.named_parameters() if not parameter.requires_grad) or "empty"
        texts[_AUTOCAST] = str(Autocast.now())
        return _Kind(texts, digest(repr((sorted(texts.items()), _ADDRESS.sub("", str(call.signature[0]))))), names)

    def _hash(self, tensors: Mapping[str, Tensor], offset: int | None, *, may_be_late: bool) -> dict[str, int]:
        """Hashes by name: of this call's tensors, except those that are late, and of the late ones of the call before."""
        hashes, self._late = {} if self._late is None else self._late.wait(), None
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, x in tensors.items():
            by_device.setdefault(x.device, {})[name] = x
        for device, group in by_device.items():
            values = hash_tensors(tuple(group.values()), offset)
            if may_be_late and device.type == "cuda":
                copy = torch.empty(len(group), dtype=torch.int64, pin_memory=True).copy_(values, non_blocking=True)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(torch.cuda.current_stream(device))
                self._late = _LateHashes(tuple(group), copy, done)
            else:
                hashes.update(zip(group, values.tolist(), strict=True))
        return hashes

    def _explain(self, kind: _Kind, own: Report) -> None:
        """Find out on which ranks what differs: raises InputError, or warns where it is by rounding only."""
        reports = [Report(**json.loads(text)) for text in self._agreement.gather(json.dumps(asdict(own)))]
        comparison = compare(reports, is_local=self._is_local)
        if comparison.differences:
            differences = "; ".join(text for text, _ in comparison.differences)
            remedies = ". ".join(dict.fromkeys(remedy for _, remedy in comparison.differences))
            raise InputError(f"the ranks pass different things to {self._name}: {differences}. {remedies}")
        kind.is_rounded = kind.is_rounded or bool(comparison.rounded)
        if comparison.rounded and self._agreement.is_first and not self._has_warned:
            self._has_warned = True
            names = ", ".join(comparison.rounded)
            warnings.warn(f"{names}, passed to {self._name}, isn't the same on all ranks but differs by rounding only", stacklevel=2)

    def _warn_of_copies(self, kind: _Kind) -> None:
        """Warn when all ranks pass the same samples in all first calls, as without a sampler."""
        kind.alike += 1
        if kind.alike == EXACT_CALLS and self._agreement.is_first:
            warnings.warn(
                f'all ranks pass the same samples to {self._name}, though with inputs="local" each passes its own: give the loader a '
                "DistributedSampler(dataset, num_replicas=count, rank=index) with index, count = model.data_shard, or seed the ranks "
                "differently",
                stacklevel=2,
            )


def _report(
    kind: _Kind, tensors: Mapping[str, Tensor], late: Mapping[str, int], samples: set[str], index: int, modes: int, hooked: Sequence[str]
) -> Report:
    """What this rank says of a call. The hashes don't depend on strides."""
    texts = {
        **kind.texts,
        _SETTINGS: f"as in capture {modes >> 2}" if modes >> 2 else "new",
        _HOOKED: ", ".join(hooked) or "empty",
        _GRADIENTS: "inference" if modes & 2 else "gradients" if modes & 1 else "no_grad",
        _COUNT: str(kind.count),
    }
    strided = {name: x for name, x in tensors.items() if x.layout is torch.strided}
    floating = {name: project(x) for name, x in strided.items() if x.is_floating_point() or x.is_complex()}
    return Report(
        texts,
        {**late, **{name: int(hash_tensors([x.contiguous()])) for name, x in strided.items()}},
        {name: [*projection.values, projection.norm] for name, projection in floating.items()},
        sorted(samples),
        index,
    )


def _as_text(leaf: Any) -> str:
    """An argument without the values of tensors, as text that is the same in every process."""
    if isinstance(leaf, Tensor):
        name = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        return name + (" that requires a gradient" if leaf.requires_grad else "")
    if isinstance(leaf, torch.device):
        return leaf.type
    if isinstance(leaf, set | frozenset):
        return f"{type(leaf).__name__} of {sorted(map(repr, leaf))}"
    return _ADDRESS.sub("", repr(leaf))
