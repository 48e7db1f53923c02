"""One pass over a data set: shared by several processes, saved on the way, and continued after a kill.

What a task learns from images is kept in accumulators, and no task knows how its pass is split or saved:

    right = Sums()
    for images, indices in one_pass(job, data, "test", right):
        right.add("right", ...)
    # here `right` holds what all processes have seen, the same in each of them

Under torchrun each process takes a contiguous share of the images, none twice; after the last one,
accumulators are merged in the order of the processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm

from files import InputError

from .accumulators import Accumulator
from .checkpoint import Checkpoint
from .job import Job
from .processes import merge_over_processes, process_count, process_rank

FIRST = 8  # images of the first batch, where batches are large: progress shows sooner


def one_pass(job: Job, data: Dataset, title: str, *accumulators: Accumulator) -> Iterator[tuple[Any, Tensor]]:
    """(images as the model takes them, their indices) under a progress bar.

    After the last batch the accumulators hold what all processes have seen. Whoever takes a batch must have
    added it to the accumulators before asking for the next one. Titles differ within a task.

    Raises:
        InputError: an image that cannot be read; a checkpoint of another run, or one that cannot be saved.
    """
    args, device, dtype = job.args, job.clip.device, job.clip.dtype
    checkpoint = Checkpoint(job, data, title)
    if checkpoint.load_finished(accumulators):
        return
    done = checkpoint.load_unfinished(accumulators)
    mine = Subset(data, share(len(data), process_rank(), process_count())[done:])
    processors = max(1, (os.cpu_count() or 1) // process_count())
    workers = min(4, processors) if args.workers is None else args.workers
    job.in_pass = True
    for images, indices in batches(mine, args.batch_size, workers, title, device, done):
        several = isinstance(images, list)  # images, masks, ...
        yield [images[0].to(dtype), *images[1:]] if several else images.to(dtype), indices
        done += len(indices)
        checkpoint.save_if_due(accumulators, done)
    job.in_pass = False
    merge_over_processes(accumulators)
    checkpoint.finish(accumulators)


def share(count: int, rank: int, size: int) -> range:
    """The indices of process `rank` of `size`: all shares together are 0 to count - 1, in order."""
    return range(count * rank // size, count * (rank + 1) // size)


def batches(
    data: Dataset, batch_size: int, workers: int, title: str, device: torch.device, done: int = 0
) -> Iterator[tuple[Any, Tensor]]:
    """(images on the device, indices) under a progress bar, every image once, in order.

    Images are a tensor, or a list of tensors where the data set gives more than the image (its mask, say).

    Args:
        done: number of images before these, for the progress bar.

    Raises:
        InputError: naming the first image that cannot be read; or workers that do not start, or die.
    """
    options = {"num_workers": workers, "worker_init_fn": _as_worker, "pin_memory": device.type == "cuda"}
    first = FIRST if batch_size > 4 * FIRST and not done else batch_size
    starts = [0, *range(first, len(data), batch_size)] if len(data) else []
    chunks = [range(start, end) for start, end in pairwise([*starts, len(data)])]
    loader = DataLoader(data, batch_sampler=chunks, collate_fn=_collate, **options)
    bar = {"desc": title, "unit": " images", "unit_scale": True, "leave": False}
    with tqdm(total=done + len(data), initial=done, **bar) as progress:
        for images, indices in _workers_alive(loader):
            if isinstance(images, str):
                raise InputError(images)
            several = isinstance(images, list)
            moved = [x.to(device, non_blocking=True) for x in (images if several else [images])]
            yield (moved if several else moved[0]), indices
            progress.update(len(indices))


def _workers_alive(loader: DataLoader) -> Iterator:
    """Its batches; or what happened to the processes that read them."""
    try:
        with _interrupt_waits():
            loaded = iter(loader)
        yield from loaded
    except OSError as error:
        what = f"cannot start {loader.num_workers} processes that read images ({error})"
        raise InputError(f"{what}; try fewer --workers") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "exited" not in str(error):
            raise
        what = "a worker process that reads images was killed, perhaps for its memory"
        raise InputError(f"{what}; try fewer --workers") from error


@contextlib.contextmanager
def _interrupt_waits() -> Iterator[None]:
    """Ctrl-C takes effect when the workers have started: Python ignores what is raised while it forks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _as_worker(_: int) -> None:
    """A terminal sends Ctrl-C to the workers, too; they end with the main process and print nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # of the thread that hands tensors over, when nobody takes them any more


def _collate(items: Sequence[tuple[Any, int]]) -> tuple[Any, Tensor]:
    broken = next((image for image, _ in items if isinstance(image, str)), None)
    images, indices = zip(*items, strict=True)
    return (broken or default_collate(images)), torch.tensor(indices)
