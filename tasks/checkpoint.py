"""Checkpoints of a pass over images, for --resume.

They lie in OUT/TASK/.state: a file for each pass and process, which is replaced every --save-every seconds,
and a file for each finished pass. Batches are the same after --resume as without a kill, and states are exact
copies, so the results are the same, bit for bit.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from files import InputError, atomic_write, visible
from zeroshot import default_bank, digest, weights_hash

from . import processes
from .accumulators import Accumulator, load_state_dict, state_dict
from .job import Job

IGNORED_OPTIONS = ("resume", "workers", "out", "save_every", "list_models")  # they change no result
FILE_OPTIONS = ("text_bank", "words", "classes", "image", "data")  # they may name a file; its contents count


class Checkpoint:
    """The files of one pass: `path` while it runs, for each process, and `final_path` when it is finished.

    The title names the pass; titles differ within a task.
    """

    def __init__(self, job: Job, data: Dataset, title: str) -> None:
        self.job = job
        self.saved = time.monotonic()
        self.fingerprint = cache(partial(fingerprint, job, data, title))  # short runs need none
        self.folder = job.checkpoint_folder
        slug = re.sub(r"\W+", "-", title).strip("-")
        self.path = self.folder / f"{slug}.{processes.process_rank()}.pt"
        self.final_path = self.folder / f"{slug}.pt"

    def load_finished(self, accumulators: Sequence[Accumulator]) -> bool:
        """Whether the resumed run has finished this pass; if so, the accumulators get what it found."""
        if not self.job.args.resume:
            return False
        found = processes.broadcast(self._read(self.final_path) if processes.process_rank() == 0 else None)
        return self._load(self.final_path, found, accumulators) is not None

    def load_unfinished(self, accumulators: Sequence[Accumulator]) -> int:
        """How many images this process has seen in the resumed run; the accumulators get what it found."""
        if not self.job.args.resume:
            return 0
        found = problem = None
        try:
            found = self._load(self.path, self._read(self.path), accumulators)
        except InputError as error:
            problem = str(error)
        processes.raise_everywhere(problem)
        return 0 if found is None else found["done"]

    @staticmethod
    def _load(path: Path, found: dict | None, accumulators: Sequence[Accumulator]) -> dict | None:
        if found is not None:
            with _readable(path):
                for accumulator, state in zip(accumulators, found["accumulators"], strict=True):
                    load_state_dict(accumulator, state)
        return found

    def save_if_due(self, accumulators: Sequence[Accumulator], done: int) -> None:
        """Save where --save-every seconds have passed since the last time."""
        if time.monotonic() - self.saved >= self.job.args.save_every:
            self.save(self.path, accumulators, done)
            self.saved = time.monotonic()

    def finish(self, accumulators: Sequence[Accumulator]) -> None:
        """Save the finished pass. Runs that are shorter than --save-every leave nothing."""
        long_enough = time.monotonic() - self.job.started >= self.job.args.save_every
        if processes.process_rank() == 0 and long_enough:
            self.save(self.final_path, accumulators, 0)

    def save(self, path: Path, accumulators: Sequence[Accumulator], done: int) -> None:
        """Write one file, whole or not at all.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._delete_old()
            states = [state_dict(accumulator) for accumulator in accumulators]
            with atomic_write(path) as partial:
                torch.save({"run": self.fingerprint(), "done": done, "accumulators": states}, partial)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            reason = getattr(error, "strerror", None) or "its disk may be full"
            failed = f"cannot save the state in {self.folder}: {reason}"
            raise InputError(f"{failed}; make room and go on with --resume") from error

    def _delete_old(self) -> None:
        """Delete what an earlier run left, when a run that does not resume it saves something itself."""
        if not self.job.args.resume and not self.job.old_checkpoints_deleted:
            for path in self.folder.glob("*.pt"):
                owner = path.suffixes[0][1:] if len(path.suffixes) > 1 else "0"
                if owner == str(processes.process_rank()):
                    path.unlink(missing_ok=True)
        self.job.old_checkpoints_deleted = True

    def _read(self, path: Path) -> dict | None:
        if not path.exists():
            return None
        with _readable(path):
            found = torch.load(path, weights_only=True)
            theirs = {**found["run"]}
            found["accumulators"], found["done"] = list(found["accumulators"]), int(found["done"])
        for key, ours in self.fingerprint().items():
            if theirs.get(key) != ours:
                shown = key.startswith("--") or key == "processes"
                values = f": {theirs.get(key)!r} then, {ours!r} now" if shown else ""
                hint = "repeat that one, or start anew without --resume"
                raise InputError(f"{path} is of another run ({key} differs{values}); {hint}")
        return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Any error inside becomes an InputError: torch raises many kinds, and a file may hold anything."""
    try:
        yield
    except Exception as error:
        hint = "remove it, or start anew without --resume"
        raise InputError(f"cannot read the state {path}; {hint}") from error


def print_resume_hint(job: Job) -> None:
    """One line if an earlier run stopped and this one does not resume it, or if --resume finds nothing."""
    folder, resume = job.checkpoint_folder, job.args.resume
    stopped = f"{folder} is of a run that stopped; this one starts anew, --resume would go on"
    nothing = f"nothing to resume in {folder}; this run starts from the beginning"
    if folder.exists() != resume:
        print(f"note: {visible(nothing if resume else stopped)}", file=sys.stderr)


def fingerprint(job: Job, data: Dataset, title: str) -> dict[str, Any]:
    """What must be equal for one run to continue another: options, files, weights, images, program."""
    args = vars(job.args) | {"device": job.device}
    options = {name: str(value) for name, value in args.items() if name not in IGNORED_OPTIONS}
    some = isinstance(data, Subset)
    images = [list(data.indices), data.dataset.fingerprint()] if some else data.fingerprint()
    return {
        "pass": title,
        "processes": processes.process_count(),
        **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
        **{f"file of --{name}": _file_hash(args.get(name)) for name in FILE_OPTIONS},
        "default bank": _file_hash(default_bank(job.clip)),
        "weights": weights_hash(job.clip.model),
        "images": digest(repr(images).encode()),
        "program": _program_hash(),
        "torch": str(torch.__version__),
    }


def _file_hash(value: Any) -> str | None:
    path = Path(value[0] if isinstance(value, list) else value or "")
    with suppress(OSError):  # the value cannot be a file's name at all
        if path.is_file():
            size = path.stat().st_size
            return digest(path.read_bytes()) if size < 2**26 else f"{size} bytes of {path.stat().st_mtime_ns}"
    return None


def _program_hash() -> str:
    here = Path(__file__).parent
    folders = (here.parent, here, here.parent / "demo")
    return digest(b"".join(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py"))))
