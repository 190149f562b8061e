"""Schedules of pipelines: lists of actions per rank; made by name, completed with messages, proven to run, simulated.

Comes in: a family's name, numbers of ranks, stages and micro-batches, seconds of stages. Goes out: a `Schedule` that the executor runs,
its time and which seconds it depends on. The one idea: a schedule is a list of actions per rank, messages included, and the
list that is proven and simulated is the one that runs.

Modules, in reading order: ``actions``, ``families``, ``messages``, ``timeline``.
"""

from autopar.schedules.actions import COMPUTING, SENDS, Action, Kind, Schedule, StageEdge, parse_action
from autopar.schedules.families import SCHEDULES, check_schedule, forward_only, forwards_first, make_schedule, splits_backward
from autopar.schedules.messages import add_messages, peaks_in_flight
from autopar.schedules.timeline import StageTimes, Timeline, simulate

__all__ = [
    "COMPUTING",
    "SCHEDULES",
    "SENDS",
    "Action",
    "Kind",
    "Schedule",
    "StageEdge",
    "StageTimes",
    "Timeline",
    "add_messages",
    "check_schedule",
    "forward_only",
    "forwards_first",
    "make_schedule",
    "parse_action",
    "peaks_in_flight",
    "simulate",
    "splits_backward",
]
