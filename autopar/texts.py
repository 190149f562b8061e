"""Texts from outside: which characters are shown, exceptions in words, files that are read and written whole.

Comes in: names, messages and paths that users, their code and their files give. Goes out: text that can be printed, or an InputError.
"""

from __future__ import annotations

import os
import reprlib
import secrets
import stat
import unicodedata
from contextlib import suppress
from pathlib import Path

from autopar.errors import InputError

# Control characters, invisible ones that direct terminals and the order of text, halves of characters, and separators of lines.
_UNPRINTED = ("Cc", "Cf", "Cs", "Zl", "Zp")

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


def find_unprintable(text: str) -> str:
    r"""The first character of `text` that isn't to be printed, such as a tab; empty where there is none."""
    if text.isprintable():  # quick, and false for some harmless characters too
        return ""
    return next((character for character in text if unicodedata.category(character) in _UNPRINTED), "")


def printable(text: str) -> str:
    r"""`text` with every character that isn't to be printed written as Python writes it: a tab is ``\t``."""
    if text.isprintable():
        return text
    return "".join(ascii(each)[1:-1] if unicodedata.category(each) in _UNPRINTED else each for each in text)


def show_value(value: object) -> str:
    """``repr`` of a value from a file or of the user's, of bearable length."""
    return _REPR.repr(value)


def word_exception(error: BaseException) -> str:
    """``ValueError: text`` of any exception, also of one of a user's class whose text can't be made."""
    try:
        text = f"{error}"
    except Exception:
        text = "(its text can't be made)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_text(path: str | Path, most_bytes: int) -> str:
    """The text of a regular UTF-8 file of at most `most_bytes` bytes.

    Raises InputError that says why it can't be read, without its path, which the caller knows a better name for. Devices and pipes are
    refused, since reading them may never end.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise InputError("can't be read: it is a folder")
        if not stat.S_ISREG(mode):
            raise InputError("can't be read: it is no regular file, but a device or a pipe")
        with open(path, "rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise InputError(f"can't be read: it has more than {most_bytes:,} bytes")
        return data.decode("utf-8")
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        raise InputError(f"can't be read: {_word_reason(error)}") from error


def check_writable(path: str | Path) -> None:
    """Raise InputError, saying why, when `write_bytes` can't write a file there. A file that is there stays as it is."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise InputError(f"{path} can't be written: it is a folder; name a file in it")
        if not target.parent.is_dir():
            raise InputError(f"{path} can't be written: there is no folder {target.parent}")
        if _mode_of(target) is not None and not os.access(target, os.W_OK):
            raise InputError(f"{path} can't be written: Permission denied")
        if not _is_special(target):
            # What forbids it (permissions, a file system that is read-only or full) shows only when a file is made.
            beside = _name_beside(target)
            with open(beside, "xb"):
                pass
            beside.unlink()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be written: {_word_reason(error)}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a file as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file. One that is there is replaced only by a whole one, which has the same permissions. Raises OSError."""
    target = Path(os.path.realpath(path))
    if _is_special(target):
        target.write_bytes(data)  # a device or a pipe can't be replaced
        return
    beside = _name_beside(target)
    try:
        with open(beside, "xb") as file:
            mode = _mode_of(target)
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _name_beside(path: Path) -> Path:
    """A name in the same folder that no file has; it doesn't grow with the file's name, which may be as long as names can be."""
    return path.with_name(f".autopar-{secrets.token_hex(8)}")


def _mode_of(path: Path) -> int | None:
    """The mode of a file; None where there is none."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _is_special(path: Path) -> bool:
    """Whether there is something that is no regular file, such as a device."""
    mode = _mode_of(path)
    return mode is not None and not stat.S_ISREG(mode)


def _word_reason(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else f"{error}"
