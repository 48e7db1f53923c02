"""The error for what a user gave and cannot be used; text files read; files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
