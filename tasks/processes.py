"""Several processes under torchrun: which one this is, and what they tell each other.

These are a few messages for each pass over the images, so they go through the CPU (gloo), wherever the model
runs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from files import InputError

from .accumulators import Accumulator, load_state_dict, state_dict


class OtherProcessError(InputError):
    """Something went wrong in another process, which says what it was."""


def init_processes(device: str) -> str:
    """The device for this process, which connects to the others: under torchrun a GPU of its own, if any."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if not dist.is_initialized():
        # One process may wait for another for days. A dead one is noticed at once.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    cards = torch.cuda.device_count()
    return f"cuda:{int(os.environ['LOCAL_RANK']) % cards}" if cards and device in ("auto", "cuda") else device


def process_rank() -> int:
    """This process's number, from 0. Process 0 alone prints and writes results."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def process_count() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcast(x: Any, source: int = 0) -> Any:
    """What process `source` passes here, returned in all processes.

    Raises:
        OtherProcessError: another process has ended.
    """
    box = [x]
    try:
        if process_count() > 1:
            dist.broadcast_object_list(box, src=source)
    except RuntimeError as error:
        message = "another process stopped before the end of the pass; what it said tells why"
        raise OtherProcessError(message) from error
    return box[0]


def raise_everywhere(problem: str | None) -> None:
    """Raise the first problem that any process found as an InputError in all of them."""
    for source in range(process_count()):
        if message := broadcast(problem, source):
            raise InputError(message)


def merge_over_processes(accumulators: Sequence[Accumulator]) -> None:
    """Merge all processes' accumulators in the order of the processes; afterwards all hold the same."""
    rank, count = process_rank(), process_count()
    if count == 1:
        return
    mine = [state_dict(accumulator) for accumulator in accumulators]
    for source in range(count):
        states = broadcast(mine if source == rank else None, source)
        for accumulator, state in zip(accumulators, states, strict=True):
            other = accumulator if source == 0 else copy.deepcopy(accumulator)
            load_state_dict(other, state)
            if source > 0:
                accumulator.merge(other)
