"""One run of evaluate.py: its options, its model, and what has happened in it so far."""

from __future__ import annotations

import time
from argparse import Namespace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from files import InputError
from zeroshot import Bank, Clip, default_bank, load_bank, load_clip

from .processes import init_processes


class Job:
    """What every task receives. Under torchrun each process has a Job of its own.

    Args:
        args: the options of evaluate.py. They are read only; what changes during a run is kept in the Job.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.device = init_processes(args.device)
        self.started = time.monotonic()
        # While a pass runs, each process has other images, so the others may not see an error of this one.
        self.in_pass = False
        self.old_checkpoints_deleted = False

    @cached_property
    def clip(self) -> Clip:
        """The model of --model and --pretrained, loaded when it is first needed."""
        args = self.args
        return load_clip(args.model, args.pretrained, self.device, args.precision, args.image_size, args.out)

    def load_bank(self) -> Bank:
        """The descriptions of --text-bank, or the default bank of the model."""
        return load_bank(self.args.text_bank or default_bank(self.clip))

    def check_finite(self, x: Tensor) -> None:
        """Refuse a model whose numbers overflow."""
        if not x.isfinite().all():
            raise InputError(
                f"{self.clip.name} in {self.args.precision} gives embeddings that are not numbers; "
                "try --precision fp32"
            )

    @property
    def checkpoint_folder(self) -> Path:
        """Where this run keeps what --resume needs."""
        return Path(self.args.out) / self.args.task / ".state"
