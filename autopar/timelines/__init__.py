"""What happens on each rank during a step: as a plan predicts it, or as a run has recorded it.

Comes in: a `Plan`, or what a run has recorded. Goes out: a `Trace`, as data, as a file for trace viewers, and as a picture.

Modules, in reading order: ``trace``, ``memory``, ``predicted``, ``recorded``, ``chrome``, ``picture``.
"""

from autopar.timelines.chrome import MOST_BYTES, from_chrome, to_chrome
from autopar.timelines.picture import draw
from autopar.timelines.predicted import predict
from autopar.timelines.recorded import RankRecord, Sent, from_text, merge, to_text
from autopar.timelines.trace import COMMUNICATION, COMPUTE, MEETINGS, Event, Sample, Trace

__all__ = [
    "COMMUNICATION",
    "COMPUTE",
    "MEETINGS",
    "MOST_BYTES",
    "Event",
    "RankRecord",
    "Sample",
    "Sent",
    "Trace",
    "draw",
    "from_chrome",
    "from_text",
    "merge",
    "predict",
    "to_chrome",
    "to_text",
]
