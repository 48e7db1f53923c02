"""The error for what a user gave and cannot be used; files; names that can be printed."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Those of ASCII and Latin-1, ends of lines and paragraphs, and what turns the direction of writing.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class InputError(ValueError):
    """Something the user gave cannot be used. One line: what was expected, what was found, what to do."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to, which replaces `path` when the block ends; after an error `path` is as it was.

    The name holds this process's number, so that two runs can write the same file at the same time.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def read_lines(path: Path, problem: str, hint: str = "") -> list[str]:
    """The lines of a text file in UTF-8, as text editors count them: other separators of Unicode end no line.

    Raises:
        InputError: `problem`, the reason, `hint`.
    """
    try:
        # read_text makes \r\n and \r of other systems \n, too.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{problem}: {getattr(error, 'strerror', None) or error}{hint}") from error


def visible(text: str, keep: str = "") -> str:
    """The text with its control characters as escapes: a terminal would obey those in a file's name."""
    return CONTROL.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """; did you mean 'places'? Empty where no word that is known is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep other processes out of it while the block runs.

    The system takes the lock back however this process ends, so no dead run blocks the next.

    Raises:
        InputError: the folder takes no file, or another process holds it.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise InputError(f"cannot write to --out {folder}: {error.strerror or error}") from error
    with file:
        try:
            _lock(file.fileno())
            ours = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except OSError as error:  # another errno: a file system without locks
            ours = error.errno not in (errno.EAGAIN, errno.EACCES)
        if not ours:
            hint = "wait for its end (--resume is for a run that was stopped), or give another --out"
            raise InputError(f"another run writes to {folder}: {hint}")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _lock(file: int) -> None:
    """Take the lock of an open file, or raise an OSError at once."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
