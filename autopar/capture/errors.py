"""The error of a failed export in the user's words: their line, the reason, what to change.

Comes in: an exception of `torch.export`. Goes out: a CaptureError whose cause it is.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterator

from autopar.capture.fx_nodes import is_users, short_path
from autopar.errors import CaptureError
from autopar.texts import word_exception

# Characters of an exception's first line at most.
_SUMMARY = 500

_READS_DATA = frozenset(
    {"DataDependentOutputException", "GuardOnDataDependentSymNode", "UnsupportedDynamicShape", "DynamicOutputShapeException"}
)


def explain(error: BaseException, source: str = "") -> CaptureError:
    """The CaptureError to raise for an exception of the export or of a run of its graph; `source` is the line of the user's, if known."""
    source = source or _users_line(error)
    where = f"at `{source}`: " if source else ""
    reason, remedy = _reason(error)
    return CaptureError(f"the model can't be captured as one graph; {where}{reason}. {remedy}")


def _reason(error: BaseException) -> tuple[str, str]:
    """Why the export failed, and what the user can change."""
    names = {type(link).__name__ for link in _chain(error)}
    text = word_exception(error)
    if names & _READS_DATA or "data-dependent" in text.lower():
        return (
            "the line reads a value out of a tensor, and tensors have none while a graph is made",
            "Express the choice with torch.where or masking, pass the value as an argument that isn't a tensor,"
            " or do it outside the forward",
        )
    if "pytree" in text or ("Unsupported" in text and "output" in text):
        return (
            "the model returns an object whose contents torch doesn't know",
            "Return tensors in tuples, lists or dicts, or register the class: torch.export.register_dataclass for a dataclass",
        )
    summary = next(line.strip() for line in text.splitlines() if line.strip())
    return summary.rstrip(".")[:_SUMMARY], "Check that model(**example_inputs) runs with these inputs"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, its cause, the cause's cause, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _users_line(error: BaseException) -> str:
    """``file.py:12: code`` of the innermost frame that is the user's."""
    for link in _chain(error):
        frames = [frame for frame in traceback.extract_tb(link.__traceback__) if is_users(frame.filename)]
        if frames:
            frame = frames[-1]
            code = frame.line or linecache.getline(frame.filename, frame.lineno or 0)
            return f"{short_path(frame.filename)}:{frame.lineno}: {code.strip()}"
    return ""
