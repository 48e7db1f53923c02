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

import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from data import batches

from .accumulators import Accumulator
from .checkpoint import Checkpoint
from .job import Job
from .processes import merge_over_processes, process_count, process_rank


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
