"""One pass over a data set: shared by several processes, saved on the way, and continued after a kill.

What a task learns from images is kept in parts. A part has `merge`, which adds what another of its kind has seen, and its state is
its attributes, or those that it names in `running`. So any pass can be split and saved, and none knows how:

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

import copy
import os
import re
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, Subset

from datasets import InputError, batches
from zeroshot import Clip, digest, weights_hash

# Parts that serve many tasks.


class Sums:
    """Numbers or tensors by name, added up in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    def add(self, name: str, x: Tensor | float) -> None:
        """x, or a tensor of it, once more."""
        x = x.detach().to("cpu", torch.float64) if isinstance(x, Tensor) else x
        self.sums[name] = self.sums[name] + x if name in self.sums else x

    def merge(self, other: Sums) -> None:
        for name, x in other.sums.items():
            self.add(name, x)

    def __getitem__(self, name: str) -> Any:
        return self.sums[name]


class Rows:
    """Tensors [b, ...] of every image, in the images' order; for what must be kept of each."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.rows.append(x.detach().cpu())

    def merge(self, other: Rows) -> None:
        self.rows = [*self.rows, *other.rows]

    def tensor(self) -> Tensor:
        """[n, ...]"""
        return torch.cat(self.rows)


class Largest:
    """The largest number by name; a NaN is larger than any."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def add(self, name: str, x: float) -> None:
        self.largest[name] = x if x != x else max(self.largest.get(name, x), x)

    def merge(self, other: Largest) -> None:
        for name, x in other.largest.items():
            self.add(name, x)


# The pass.


def one_pass(clip: Clip, data: Dataset, args: Namespace, title: str, *parts: Any) -> Iterator[tuple[Any, Tensor]]:
    """(images as the model takes them, their indices) under a progress bar; after the last, `parts` are those of all processes.

    Whoever takes a batch must have added it to the parts before it asks for the next one. Titles differ within a task.

    Raises:
        InputError: an image that cannot be read; a state that another run left, or that cannot be saved.
    """
    rank, size = world()
    first, last = len(data) * rank // size, len(data) * (rank + 1) // size
    book = Book(args, clip, data, title)
    if book.whole(parts):
        return
    done = book.restore(parts)
    rest = Subset(data, range(first + done, last))
    workers = min(4, max(1, (os.cpu_count() or 1) // size)) if args.workers is None else args.workers
    try:
        for images, indices in batches(rest, args.batch_size, workers, title, clip.device, done, quiet=rank > 0):
            yield _cast(images, clip.dtype), indices
            done += len(indices)
            book.save(parts, done)
    except InputError as error:
        error.everywhere = size == 1  # the other processes have other images
        raise
    merge(parts)
    book.close(parts)


def _cast(images: Any, dtype: torch.dtype) -> Any:
    """The images, or the first of a list (of images, masks, ...), in the model's precision."""
    return [images[0].to(dtype), *images[1:]] if isinstance(images, list) else images.to(dtype)


# Processes.


def join(device: str) -> str:
    """Under torchrun, meet the other processes. Returns the device for this one: a GPU of its own where there are some."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # of one process waiting for another; a dead one is noticed at once
    cards = torch.cuda.device_count()
    return f"cuda:{int(os.environ['LOCAL_RANK']) % cards}" if cards and device in ("auto", "cuda") else device


def world() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


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
                other = _twin(part)
                restore(other, seen)
                part.merge(other)


def broadcast(x: Any, source: int = 0) -> Any:
    """What process `source` holds, in all of them."""
    box = [x]
    try:
        if world()[1] > 1:
            dist.broadcast_object_list(box, src=source)
    except RuntimeError as error:
        raise InputError("another process stopped before the end of the pass; what it said tells why") from error
    return box[0]


# States of parts: what torch.load reads without unpickling.


def state(part: Any) -> dict:
    """A copy of all that changes in a part, on the CPU."""
    return {name: _packed(getattr(part, name)) for name in _running(part)}


def restore(part: Any, seen: dict) -> None:
    """What `state` gave, back into a part."""
    for name, value in seen.items():
        setattr(part, name, _unpacked(getattr(part, name), value))


def _running(part: Any) -> tuple[str, ...]:
    return tuple(getattr(part, "running", vars(part)))


def _packed(x: Any) -> Any:
    if hasattr(x, "merge"):
        return state(x)
    if isinstance(x, Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: _packed(value) for key, value in x.items()}
    return [_packed(value) for value in x] if isinstance(x, list) else x


def _unpacked(held: Any, value: Any) -> Any:
    if hasattr(held, "merge"):
        restore(held, value)
        return held
    if isinstance(value, dict):
        return {key: _unpacked(held.get(key), one) for key, one in value.items()}
    return value


def _twin(part: Any) -> Any:
    """A part of its own, to restore another state into; what does not change is shared."""
    other = copy.copy(part)
    for name in _running(part):
        held = getattr(part, name)
        if hasattr(held, "merge"):
            setattr(other, name, _twin(held))
        elif isinstance(held, dict):
            setattr(other, name, {key: _twin(one) if hasattr(one, "merge") else one for key, one in held.items()})
    return other


# Files.


class Book:
    """The files of one pass."""

    def __init__(self, args: Namespace, clip: Clip, data: Dataset, title: str) -> None:
        self.args, self.saved = args, time.monotonic()
        self._what, self._run = (args, clip, data, title), None
        self.folder, slug = state_folder(args), re.sub(r"\W+", "-", title).strip("-")
        self.path, self.end = self.folder / f"{slug}.{world()[0]}.pt", self.folder / f"{slug}.pt"

    def whole(self, parts: tuple) -> bool:
        """Is this pass over, in the run that is resumed? Then the parts are as it left them."""
        if not self.args.resume:
            return False
        found = broadcast(self._read(self.end) if world()[0] == 0 else None)
        for part, seen in zip(parts, found["parts"] if found else [], strict=False):
            restore(part, seen)
        return found is not None

    def restore(self, parts: tuple) -> int:
        """How many of its images this process has seen, in the run that is resumed."""
        found = self._read(self.path) if self.args.resume else None
        for part, seen in zip(parts, found["parts"] if found else [], strict=False):
            restore(part, seen)
        return found["done"] if found else 0

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
            partial.unlink(missing_ok=True)
            told = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
            raise InputError(f"cannot save the state in {self.folder}: {told}; make room and go on with --resume") from error

    def _clear(self) -> None:
        """What an earlier run left is gone when one that does not resume it has something to keep."""
        rank = world()[0]
        if not self.args.resume and not getattr(self.args, "cleared", False):
            for path in self.folder.glob("*.pt"):
                owner = path.suffixes[0][1:] if len(path.suffixes) > 1 else "0"
                if owner == str(rank):
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
            raise InputError(f"cannot read the state {path}; remove it, or start anew without --resume") from error
        for what, ours in self.run().items():
            if theirs.get(what) != ours:
                was = f": {theirs.get(what)!r} then, {ours!r} now" if what.startswith("--") or what == "processes" else ""
                raise InputError(f"{path} is of another run ({what} differs{was}); repeat that one, or start anew without --resume")
        return found


def state_folder(args: Namespace) -> Path:
    """Where a run keeps what it needs to go on."""
    return Path(args.out) / args.task / ".state"


def tell_of_state(args: Namespace) -> None:
    """Where an earlier run stopped, and this one does or does not go on from there: one line."""
    there = state_folder(args).exists()
    if there and not args.resume:
        print(f"note: {state_folder(args)} is of a run that stopped; this one starts anew, --resume would go on", file=sys.stderr)
    if args.resume and not there:
        print(f"note: nothing to resume in {state_folder(args)}; this run starts from the beginning", file=sys.stderr)


def forget(args: Namespace) -> None:
    """The run is over, its results are written."""
    shutil.rmtree(state_folder(args), ignore_errors=True)


NO_MATTER = ("resume", "workers", "out", "save_every", "started", "cleared", "task", "model", "pretrained", "list_models")
FILES = ("text_bank", "words", "classes", "image", "data")  # options that may name a file: what it holds counts, too


def fingerprint(args: Namespace, clip: Clip, data: Dataset, title: str) -> dict[str, Any]:
    """What must be the same for two runs to be one: weights, images (by name), options, files, and this program."""
    options = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items() if name not in NO_MATTER}
    return {
        "pass": title,
        "processes": world()[1],
        **options,
        **{f"file of --{name}": _file_hash(getattr(args, name, None)) for name in FILES},
        "weights": weights_hash(clip.model),
        "images": digest(repr(_names(data)).encode()),
        "program": _program(),
        "torch": str(torch.__version__),
    }


def _names(data: Dataset) -> list:
    """What tells a data set's images."""
    if isinstance(data, Subset):
        return [list(data.indices), *_names(data.dataset)]
    inner = getattr(data, "birds", None)
    return [len(data), getattr(data, "description", ""), getattr(data, "rows", None), [*map(str, getattr(data, "files", ()))],
            *([] if inner is None else _names(inner))]  # fmt: skip


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
    return digest(*(path.read_bytes() for path in sorted([*here.parent.glob("*.py"), *here.glob("*.py")])))
