"""One pass over a data set: shared by several processes, saved on the way, and continued after a kill.

What a task learns from images is kept in parts (parts.py), and no task knows how its pass is split or saved:

    right = Sums()
    for images, indices in one_pass(clip, data, args, "test", right):
        right.add("right", ...)
    # here `right` holds what all processes have seen, the same in each of them

Under torchrun each process takes a contiguous share of the images, none twice; after the last one, parts are merged in the order of
the processes. That is a few messages for each pass, so they go through the CPU (gloo), wherever the model runs.

The state lies in OUT/TASK/.state: a file for each pass and process, replaced whole every --save-every seconds, and a file for each pass
that is over. Batches are the same after --resume as without a kill, and sums are exact copies, so the results are, bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data import InputError, batches
from zeroshot import Clip, default_bank, digest, weights_hash

from .parts import restore, state, twin

# The pass.


def one_pass(
    clip: Clip, data: Dataset, args: Namespace, title: str, *parts: Any
) -> Iterator[tuple[Any, Tensor]]:
    """(images as the model takes them, their indices) under a progress bar; after the last, `parts` are those of all processes.

    Whoever takes a batch must have added it to the parts before it asks for the next one. Titles differ within a task.

    Raises:
        InputError: an image that cannot be read; a state that another run left, or that cannot be saved.
    """
    rank, size = world()
    mine, book = share(len(data), rank, size), Book(args, clip, data, title)
    if book.over(parts):
        return
    done = book.restore(parts)
    workers = min(4, max(1, (os.cpu_count() or 1) // size)) if args.workers is None else args.workers
    args.alone = True  # other processes have other images: what goes wrong here they may not know
    for images, indices in batches(
        Subset(data, mine[done:]), args.batch_size, workers, title, clip.device, done
    ):
        yield _cast(images, clip.dtype), indices
        done += len(indices)
        book.save(parts, done)
    args.alone = False
    merge(parts)
    book.close(parts)


def share(count: int, rank: int, size: int) -> range:
    """The indices of process `rank` of `size`: all shares together are 0 to count - 1, in order."""
    return range(count * rank // size, count * (rank + 1) // size)


def _cast(images: Any, dtype: torch.dtype) -> Any:
    """The images, or the first of a list (of images, masks, ...), in the model's precision."""
    return [images[0].to(dtype), *images[1:]] if isinstance(images, list) else images.to(dtype)


# Processes.


def join(device: str) -> str:
    """Under torchrun, meet the other processes. Returns the device for this one: a GPU of its own where there are some."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo", timeout=timedelta(days=7)
        )  # of one process waiting for another; a dead one is noticed at once
    cards = torch.cuda.device_count()
    return f"cuda:{int(os.environ['LOCAL_RANK']) % cards}" if cards and device in ("auto", "cuda") else device


def world() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    return (
        (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    )


class ElsewhereError(InputError):
    """Something went wrong in another process."""


def merge(parts: tuple) -> None:
    """Every process's parts, merged in the order of the processes, in all of them."""
    rank, size = world()
    if size == 1:
        return
    mine = [state(part) for part in parts]
    for source in range(size):
        for part, seen in zip(parts, broadcast(mine if source == rank else None, source), strict=True):
            if source == 0:
                restore(part, seen)
            else:
                other = twin(part)
                restore(other, seen)
                part.merge(other)


def broadcast(x: Any, source: int = 0) -> Any:
    """What process `source` holds, in all of them."""
    box = [x]
    try:
        if world()[1] > 1:
            dist.broadcast_object_list(box, src=source)
    except RuntimeError as error:
        raise ElsewhereError(
            "another process stopped before the end of the pass; what it said tells why"
        ) from error
    return box[0]


def agree(wrong: str | None) -> None:
    """What one process found wrong is wrong for all, and they say the same."""
    for source in range(world()[1]):
        if said := broadcast(wrong, source):
            raise InputError(said)


# Files.


class Book:
    """The files of one pass."""

    def __init__(self, args: Namespace, clip: Clip, data: Dataset, title: str) -> None:
        self.args, self.saved = args, time.monotonic()
        self._what, self._run = (args, clip, data, title), None
        self.folder, slug = state_folder(args), re.sub(r"\W+", "-", title).strip("-")
        self.path, self.end = self.folder / f"{slug}.{world()[0]}.pt", self.folder / f"{slug}.pt"

    def over(self, parts: tuple) -> bool:
        """Is this pass over, in the run that is resumed? Then the parts are as it left them."""
        return (
            self.args.resume
            and self._fill(parts, broadcast(self._read(self.end) if world()[0] == 0 else None)) is not None
        )

    def restore(self, parts: tuple) -> int:
        """How many of its images this process has seen, in the run that is resumed; the parts are as they were then."""
        if not self.args.resume:
            return 0
        found = wrong = None
        try:
            found = self._fill(parts, self._read(self.path))
        except InputError as error:
            wrong = str(error)
        agree(wrong)
        return 0 if found is None else found["done"]

    @staticmethod
    def _fill(parts: tuple, found: dict | None) -> dict | None:
        for part, seen in zip(parts, [] if found is None else found["parts"], strict=found is not None):
            restore(part, seen)
        return found

    def save(self, parts: tuple, done: int) -> None:
        """Where --save-every seconds have passed."""
        if time.monotonic() - self.saved >= self.args.save_every:
            self._write(self.path, parts, done)
            self.saved = time.monotonic()

    def close(self, parts: tuple) -> None:
        """The pass is over. Runs that are shorter than --save-every leave nothing."""
        if world()[0] == 0 and time.monotonic() - self.args.started >= self.args.save_every:
            self._write(self.end, parts, 0)

    def _write(self, path: Path, parts: tuple, done: int) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear()
            torch.save({"run": self.run(), "done": done, "parts": [state(part) for part in parts]}, partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            with suppress(OSError):
                partial.unlink()
            told = getattr(error, "strerror", None) or "its disk may be full"
            raise InputError(
                f"cannot save the state in {self.folder}: {told}; make room and go on with --resume"
            ) from error

    def _clear(self) -> None:
        """What an earlier run left is gone when one that does not resume it has something to keep."""
        if not self.args.resume and not self.args.cleared:
            for path in self.folder.glob("*.pt"):
                owner = path.suffixes[0][1:] if len(path.suffixes) > 1 else "0"
                if owner == str(world()[0]):
                    path.unlink(missing_ok=True)
        self.args.cleared = True

    def run(self) -> dict[str, Any]:
        """The fingerprint, made when it is first needed: short runs need none."""
        self._run = self._run or fingerprint(*self._what)
        return self._run

    def _read(self, path: Path) -> dict | None:
        if not path.exists():
            return None
        try:
            found = torch.load(path, weights_only=True)
            theirs = found["run"]
        except Exception as error:  # torch raises many kinds
            raise InputError(
                f"cannot read the state {path}; remove it, or start anew without --resume"
            ) from error
        for what, ours in self.run().items():
            if theirs.get(what) != ours:
                was = (
                    f": {theirs.get(what)!r} then, {ours!r} now"
                    if what.startswith("--") or what == "processes"
                    else ""
                )
                raise InputError(
                    f"{path} is of another run ({what} differs{was}); repeat that one, or start anew without --resume"
                )
        return found


def state_folder(args: Namespace) -> Path:
    """Where a run keeps what it needs to go on."""
    return Path(args.out) / args.task / ".state"


def tell_of_state(args: Namespace) -> None:
    """Where an earlier run stopped, and this one does or does not go on from there: one line."""
    there = state_folder(args).exists()
    if there and not args.resume:
        print(
            f"note: {state_folder(args)} is of a run that stopped; this one starts anew, --resume would go on",
            file=sys.stderr,
        )
    if args.resume and not there:
        print(
            f"note: nothing to resume in {state_folder(args)}; this run starts from the beginning",
            file=sys.stderr,
        )


def forget(args: Namespace) -> None:
    """The run is over, its results are written."""
    shutil.rmtree(state_folder(args), ignore_errors=True)


NO_MATTER = ("resume", "workers", "out", "save_every", "started", "cleared", "alone", "list_models")
FILES = (
    "text_bank",
    "words",
    "classes",
    "image",
    "data",
)  # options that may name a file: what it holds counts, too


def fingerprint(args: Namespace, clip: Clip, data: Dataset, title: str) -> dict[str, Any]:
    """What must be the same for two runs to be one: weights, images (names and sizes), labels, options, files, and this program."""
    options = {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in vars(args).items()
        if name not in NO_MATTER
    }
    return {
        "pass": title,
        "processes": world()[1],
        **options,
        **{f"file of --{name}": _file_hash(getattr(args, name, None)) for name in FILES},
        "default bank": _file_hash(default_bank(clip)),
        "weights": weights_hash(clip.model),
        "images": digest(repr(_names(data)).encode()),
        "program": _program(),
        "torch": str(torch.__version__),
    }


def _names(data: Dataset) -> list:
    """What tells a data set's images, and what it says of them."""
    if isinstance(data, Subset):
        return [list(data.indices), *_names(data.dataset)]
    inner, labels = (
        getattr(data, "birds", None),
        [getattr(data, name, None) for name in ("y", "place", "labels")],
    )
    return [
        len(data),
        getattr(data, "rows", None),
        [*map(str, getattr(data, "files", ()))],
        _sizes(data),
        [None if values is None else values.tolist() for values in labels],
        *([] if inner is None else _names(inner)),
    ]


def _sizes(data: Any) -> list[int | None]:
    """In bytes, of images and masks: one that was replaced under its name has another, as a rule. A copy elsewhere has the same."""
    root, found = Path(getattr(data, "root", ".")), []
    for path in [*(root / file for file in getattr(data, "files", ())), *getattr(data, "masks", ())]:
        found.append(None)
        with suppress(OSError):
            found[-1] = path.stat().st_size
    return found


def _file_hash(value: Any) -> str | None:
    path = Path(value[0] if isinstance(value, list) else value or "")
    try:
        if not path.is_file():
            return None
        size = path.stat().st_size
        return digest(path.read_bytes()) if size < 2**26 else f"{size} bytes of {path.stat().st_mtime_ns}"
    except OSError:  # no file name at all
        return None


def _program() -> str:
    here = Path(__file__).parent
    files = [
        path for folder in (here.parent, here, here.parent / "demo") for path in sorted(folder.glob("*.py"))
    ]
    return digest(b"".join(path.read_bytes() for path in files))
