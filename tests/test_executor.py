"""What the executor keeps of its messages: how long, and no longer than the schedule makes necessary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.checks import threads
from autopar.errors import CommError, PipelineError
from autopar.ir.layout import PIPELINE, Mesh, State, StateKind
from autopar.ops import comm
from autopar.rewrite.program import CrossingTensor, PipelineProgram, StageOutput, StageProgram
from autopar.runtime.executor import Executor, StageTensors
from autopar.runtime.mailbox import find_finished_sends
from autopar.schedules.actions import COMPUTING, SENDS, Action, Kind, Schedule, StageEdge, chain
from autopar.schedules.families import SCHEDULES, forward_only, make_schedule, splits_backward
from autopar.schedules.messages import add_messages
from autopar.structure.microbatches import MICROBATCH

FAMILIES = [(name, family.chunks or 2) for name, family in SCHEDULES.items()]


def make(name: str, ranks: int, microbatches: int, chunks: int) -> Schedule:
    return add_messages(make_schedule(name, ranks, microbatches, chunks), chain(ranks * chunks))


def test_sends_are_known_to_be_taken_when_an_answer_comes() -> None:
    # Rank 0: 0F0 0F1 0B0 0F2 0B1 0B2; rank 1: 1F0 1B0 1F1 1B1 1F2 1B2. The gradients of micro-batch i are sent after 1Fi.
    schedule = make("1f1b", 2, 3, 1)
    finished = {
        str(Action(awaited.stage, Kind.FORWARD if awaited.is_forward else Kind.BACKWARD, awaited.microbatch)): [*map(str, sends)]
        for awaited, sends in find_finished_sends(schedule, 0).items()
    }
    assert finished == {"0B0": ["0SF0>1"], "0B1": ["0SF1>1"], "0B2": ["0SF2>1"]}
    # Rank 0 sends 0F1 before 0B0 and 0F2 after it; nothing comes after 0B1 and 0B2.
    assert {str(step.microbatch): [*map(str, sends)] for step, sends in find_finished_sends(schedule, 1).items()} == {"2": ["1SB0>0"]}


def run_to(schedule: Schedule, group: int, end: int) -> list[int]:
    """How far every rank has come at least when `group` may run its action at position `end`: others go on only where they must."""
    at = [0] * schedule.ranks
    sent: set[Action] = set()

    def advance(rank: int, until: int) -> None:
        while at[rank] < until:
            action = schedule.actions[rank][at[rank]]
            for other in receives_of(schedule, action):
                source = schedule.rank_of[other.stage]
                if other not in sent:
                    advance(source, schedule.actions[source].index(other) + 1)
            if action.kind in SENDS:
                sent.add(action)
            at[rank] += 1

    advance(group, end)
    for needed in receives_of(schedule, schedule.actions[group][end]):
        source = schedule.rank_of[needed.stage]
        advance(source, max(at[source], schedule.actions[source].index(needed) + 1))
    return at


def receives_of(schedule: Schedule, action: Action) -> list[Action]:
    """The sends, of other ranks, that a computing action waits for, in a chain of stages."""
    if action.kind not in COMPUTING or action.kind is Kind.BACKWARD_WEIGHT:
        return []
    forward = action.kind is Kind.FORWARD
    peer = action.stage - 1 if forward else action.stage + 1
    if not 0 <= peer < schedule.stages or schedule.rank_of[peer] == schedule.rank_of[action.stage]:
        return []
    return [Action(peer, Kind.SEND_FORWARD if forward else Kind.SEND_BACKWARD, action.microbatch, action.stage)]


@pytest.mark.parametrize(("name", "chunks"), FAMILIES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_known_to_be_taken_is_taken_even_by_the_slowest_ranks(name: str, chunks: int, ranks: int) -> None:
    schedule = make(name, ranks, 6, chunks)
    checked = 0
    for group in range(ranks):
        for step, sends in find_finished_sends(schedule, group).items():
            kinds = (Kind.FORWARD,) if step.is_forward else (Kind.BACKWARD, Kind.BACKWARD_INPUT)
            here = next(
                i
                for i, a in enumerate(schedule.actions[group])
                if a.kind in kinds and (a.stage, a.microbatch) == (step.stage, step.microbatch)
            )
            at = run_to(schedule, group, here)
            for send in sends:
                assert schedule.actions[group].index(send) < here
                peer = schedule.rank_of[send.peer]
                user = next(i for i, a in enumerate(schedule.actions[peer]) if send in receives_of(schedule, a))
                assert user < at[peer], f"{send} may not be taken yet at {schedule.actions[group][here]}"
                checked += 1
    assert checked


@pytest.mark.parametrize(("name", "chunks"), [(name, chunks) for name, chunks in FAMILIES if name != "gpipe"])
def test_sends_held_do_not_grow_with_the_micro_batches(name: str, chunks: int) -> None:
    most = {count: max(most_held(make(name, 3, count, chunks), group) for group in range(3)) for count in (12, 24)}
    assert most[12] == most[24]


def most_held(schedule: Schedule, group: int) -> int:
    taken = find_finished_sends(schedule, group)
    going: set[Action] = set()
    most = 0
    for action in schedule.actions[group]:
        for step, sends in taken.items():
            if (step.stage, step.microbatch) == (action.stage, action.microbatch) and (
                action.kind is Kind.FORWARD if step.is_forward else action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)
            ):
                going -= set(sends)
        if action.kind in SENDS:
            going.add(action)
            most = max(most, len(going))
    return most


# --- the executor with messages that can't be asked, as over gloo -----------------------------------------------------------


class Scale(nn.Module):
    """A stage: (weight, input, what is received) -> what is sent, or a part of the loss."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, weight: Tensor, x: Tensor, *received: Tensor) -> tuple[Tensor, ...]:
        axis = comm.axis(MICROBATCH)
        value = x.chunk(axis.size)[axis.index] if self.first else received[0]
        value = (value @ weight).tanh()
        return ((value.square().sum() if self.last else value),)


def make_pipeline(schedule: Schedule, rows: int) -> PipelineProgram:
    last = schedule.stages - 1
    boundary = CrossingTensor("x", (rows, 3), torch.float64, True)
    stages = {
        stage: StageProgram(
            module=Scale(stage == 0, stage == last),
            prologue=None,
            parameters=(stage,),
            buffers=(),
            receives={stage - 1: (boundary,)} if stage else {},
            sends={stage + 1: ((0, boundary),)} if stage < last else {},
            outputs=(StageOutput(0, 0, State(StateKind.PARTIAL)),) if stage == last else (),
        )
        for stage in range(schedule.stages)
    }
    inference = add_messages(forward_only(schedule.rank_of, schedule.microbatches), ())
    return PipelineProgram(stages, schedule, inference, 0, frozenset(), {0: frozenset()}, frozenset(), {0: schedule.rank_of[last]}, False)


class Unasked:
    """A sent message that doesn't tell when it is over; to wait for one that wasn't taken yet is an error."""

    late = False

    def __init__(self, exchange: comm.Rendezvous, source: int, to: int, number: int, x: Tensor) -> None:
        self.where, self.exchange, self.x = (source, to, number), exchange, x

    def is_done(self) -> bool:
        return False

    def wait(self) -> Tensor:
        if not self.late:
            assert not self.exchange.has_arrived(*self.where), f"message {self.where} isn't taken yet"
        return self.x


@pytest.mark.parametrize(("name", "chunks"), [(name, chunks) for name, chunks in FAMILIES if not splits_backward(name)])
def test_sends_are_let_go_while_the_schedule_runs(name: str, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, count, rows = 3, 12, 2
    schedule = make(name, ranks, count, chunks)
    pipeline = make_pipeline(schedule, rows)
    weights = [torch.randn(3, 3, dtype=torch.float64) for _ in range(schedule.stages)]
    x = torch.randn(rows * count, 3, dtype=torch.float64)
    send = comm.ThreadAxis.send
    numbers: dict[tuple[int, int], int] = {}

    def unasked(self: comm.ThreadAxis, x: Tensor, to: int) -> comm.Message:
        pair = (self.index, to)
        numbers[pair] = numbers.get(pair, -1) + 1
        return Unasked(self.exchange, *pair, numbers[pair], send(self, x, to).wait())

    monkeypatch.setattr(comm.ThreadAxis, "send", unasked)

    def work(rank: int) -> tuple[dict[int, Tensor | None], int]:
        leaves = {i: w.clone().requires_grad_() for i, w in enumerate(weights) if schedule.rank_of[i] == rank}
        tensors = {i: StageTensors([leaf], [], [x]) for i, leaf in leaves.items()}
        axis = comm.current()[PIPELINE]
        output_gradients = {0: torch.ones((), dtype=torch.float64)}
        executor = Executor(
            pipeline,
            schedule,
            rank,
            axis,
            {},
            tensors,
            output_gradients=output_gradients,
            finished_sends=find_finished_sends(schedule, rank),
        )
        most = 0
        for action in schedule.actions[rank]:
            executor._run_action(action)
            most = max(most, len(executor.mailbox.pending_sends))
        return {i: leaf.grad for i, leaf in leaves.items()}, most

    results = threads.run(Mesh((PIPELINE,), (ranks,)), work)
    for rank, (gradients, most) in enumerate(results):
        assert most == most_held(schedule, rank)
        assert gradients.keys() == {i for i in range(schedule.stages) if schedule.rank_of[i] == rank}
    leaves = [w.clone().requires_grad_() for w in weights]
    value = x
    for leaf in leaves:
        value = (value @ leaf).tanh()
    value.square().sum().backward()
    for gradients, _ in results:
        for i, gradient in gradients.items():
            torch.testing.assert_close(gradient, leaves[i].grad)


class Scripted:
    """A message that says it is done when told so; waits are counted, or fail with `error`."""

    def __init__(self, x: Tensor, is_over: bool = False, error: Exception | None = None) -> None:
        self.x, self.is_over, self.error, self.waits = x, is_over, error, 0

    def is_done(self) -> bool:
        return self.is_over

    def wait(self) -> Tensor:
        self.waits += 1
        if self.error is not None:
            raise self.error
        return self.x


def make_executor(
    monkeypatch: pytest.MonkeyPatch, rank: int, sent: list[Scripted], lost: Exception | None = None, untaken: Exception | None = None
) -> Executor:
    """Rank `rank` of two under 1f1b, whose messages are `Scripted`; those that it sends are noted in `sent`."""
    schedule = make("1f1b", 2, 4, 1)
    pipeline = make_pipeline(schedule, 2)

    def send(self: comm.ThreadAxis, x: Tensor, to: int) -> comm.Message:
        sent.append(Scripted(x, error=untaken))
        return sent[-1]

    def receive(self: comm.ThreadAxis, source: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> comm.Message:
        return Scripted(torch.zeros(shape, dtype=dtype), error=lost)

    monkeypatch.setattr(comm.ThreadAxis, "send", send)
    monkeypatch.setattr(comm.ThreadAxis, "receive", receive)
    x = torch.ones(8, 3, dtype=torch.float64)
    tensors = {rank: StageTensors([torch.eye(3, dtype=torch.float64).requires_grad_()], [], [x])}
    axis = comm.ThreadAxis(PIPELINE, rank, comm.Rendezvous(2))
    output_gradients = {0: torch.ones((), dtype=torch.float64)}
    return Executor(
        pipeline,
        schedule,
        rank,
        axis,
        {},
        tensors,
        output_gradients=output_gradients,
        finished_sends=find_finished_sends(schedule, rank) if untaken is None else None,
    )


def test_every_send_is_waited_for_before_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Scripted] = []
    executor = make_executor(monkeypatch, 0, sent)
    for action in executor.actions:
        executor._run_action(action)
        going = [message for messages in executor.mailbox.pending_sends.values() for message in messages]
        assert all(message.waits == 1 for message in sent if not any(message is one for one in going))
    assert len(sent) == 4
    assert all(message.waits == 1 for message in sent)


def test_a_send_is_kept_until_all_its_tensors_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Scripted] = []
    executor = make_executor(monkeypatch, 0, sent)
    first, second, third = (Action(0, Kind.SEND_FORWARD, index, 1) for index in range(3))
    executor.mailbox.send(first, [torch.zeros(1), torch.zeros(1)])
    sent[0].is_over = True
    executor.mailbox.send(second, [torch.zeros(1)])
    assert list(executor.mailbox.pending_sends) == [first, second]
    sent[1].is_over = True
    executor.mailbox.send(third, [torch.zeros(1)])
    assert list(executor.mailbox.pending_sends) == [second, third]


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, r"CommError: the gradients of stage 1 \(pipeline rank 1\) never came: aborted"),
        (1, r"CommError: the values of stage 0 \(pipeline rank 0\) never came: aborted"),
    ],
)
def test_a_message_that_never_comes_is_a_lost_rank(monkeypatch: pytest.MonkeyPatch, rank: int, words: str) -> None:
    executor = make_executor(monkeypatch, rank, [], RuntimeError("aborted"))
    with pytest.raises(PipelineError, match=words) as caught:
        executor.run()
    assert isinstance(caught.value.__cause__, CommError)


def test_a_message_that_nobody_takes_is_a_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = make_executor(monkeypatch, 1, [], untaken=RuntimeError("aborted"))
    with pytest.raises(PipelineError, match=r"send of gradients .*: CommError: stage 0 \(pipeline rank 0\) never took it: aborted"):
        executor.run()


class Sum(nn.Module):
    """A stage of an inference that adds up what is received, or takes its micro-batch."""

    def forward(self, x: Tensor, *received: Tensor) -> tuple[Tensor, ...]:
        axis = comm.axis(MICROBATCH)
        return (torch.stack(received).sum(0) + 1 if received else x.chunk(axis.size)[axis.index],)


def test_an_inference_keeps_results_until_the_last_stage_that_reads_them_has_its_own() -> None:
    """Stage 0 sends to stages 1 and 2."""
    rows, count = 2, 3
    boundary = CrossingTensor("x", (rows, 3), torch.float64, False)
    edges = [(0, 1), (0, 2), (1, 2)]
    stages = {
        stage: StageProgram(
            module=Sum(),
            prologue=None,
            parameters=(),
            buffers=(),
            receives={source: (boundary,) for source, to in edges if to == stage},
            sends={to: ((0, boundary),) for source, to in edges if source == stage},
            outputs=(StageOutput(0, 0, State(StateKind.SHARD, 0)),) if stage == 2 else (),
        )
        for stage in range(3)
    }
    schedule = add_messages(forward_only((0, 1, 2), count), [StageEdge(source, to, False) for source, to in edges])
    pipeline = PipelineProgram(stages, schedule, schedule, 0, frozenset(), {0: frozenset()}, frozenset(), {0: 2}, False)
    x = torch.randn(rows * count, 3, dtype=torch.float64)

    def work(rank: int) -> Tensor | None:
        executor = Executor(pipeline, schedule, rank, comm.current()[PIPELINE], {}, {rank: StageTensors([], [], [x])})
        executor.run()
        assert executor.is_idle
        assert not executor._in_stages
        return executor.join(0) if rank == 2 else None

    torch.testing.assert_close(threads.run(Mesh((PIPELINE,), (3,)), work)[2], 2 * x + 2)
