"""One run of evaluate.py: its options, model and images, and what has happened in it so far."""

from __future__ import annotations

import textwrap
import time
from argparse import Namespace
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from PIL import Image
from torch import Tensor

import demo
from data import CelebA, ImageFolder, Waterbirds
from demo.images import DemoBirds, DemoSigns
from files import InputError
from pictures import read_picture
from zeroshot import Bank, Clip, classifier, default_bank, load_bank, load_clip, templates

from .models import check_decomposable
from .processes import init_processes

Images = DemoBirds | Waterbirds | CelebA | ImageFolder


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
        self.notes: dict[str, None] = {}  # what to say above the table, each once
        self.more_maps: dict[str, Callable] = {}  # (images, texts) -> maps, of rows that a pass came before

    @cached_property
    def clip(self) -> Clip:
        """The model of --model and --pretrained, loaded when it is first needed."""
        args = self.args
        reads = args.task == "typographic" and args.model is None and args.pretrained is None
        model = demo.WRITTEN if reads else args.model
        check_decomposable(model)
        clip = load_clip(model, args.pretrained, self.device, args.precision, args.image_size, args.out)
        self.notes |= dict.fromkeys(clip.notes)
        return clip

    def load_bank(self, path: str | None = None, what: str = "text bank") -> Bank:
        """A file of texts: the descriptions of --text-bank, or the default bank of the model."""
        path = path or self.args.text_bank or default_bank(self.clip)
        bank = load_bank(path, what)
        if bank.repeats:
            self.notes[f"{what} {path}: {bank.repeats:,} repeated texts are taken once"] = None
        return bank

    def check_finite(self, x: Tensor) -> None:
        """Refuse a model whose numbers overflow."""
        if not x.isfinite().all():
            model = f"{self.clip.name} in {self.args.precision}"
            raise InputError(f"{model} gives embeddings that are not numbers; try --precision fp32")

    @property
    def checkpoint_folder(self) -> Path:
        """Where this run keeps what --resume needs."""
        return Path(self.args.out) / self.args.task / ".state"


def open_split(job: Job, split: str, default_limit: int | None = None) -> Images:
    """--data: Waterbirds or CelebA by the files in it, or any folder of images; without it the demo."""
    args, options = job.args, (job.clip.preprocess, job.args.limit or default_limit, job.args.seed)
    if args.data is None:
        return (DemoSigns if job.clip.name == demo.WRITTEN else DemoBirds)(split, *options)
    other = CelebA if CelebA.folder(args.data) else ImageFolder
    kind = Waterbirds if (Path(args.data) / "metadata.csv").exists() else other
    return kind(args.data, split, *options)


def read_image(job: Job) -> Image.Image:
    """--image in RGB, upright: a file, or demo:N, picture N of the demo's test split."""
    name = job.args.image
    if not name.startswith("demo:"):
        return read_picture(Path(name))
    data = (DemoSigns if job.clip.name == demo.WRITTEN else DemoBirds)("test", job.clip.preprocess)
    numbers = [*map(str, range(len(data)))]
    if name.removeprefix("demo:") not in numbers:
        raise InputError(f"no image {name}: the demo's test split has demo:0 to demo:{numbers[-1]}")
    return data.picture(int(name.removeprefix("demo:")))


def zero_shot_problem(data: Images) -> tuple[list[str], Tensor]:
    """(the classes' names, the class of each image); in the demo the classes are kinds of birds."""
    if isinstance(data, DemoBirds):
        return list(data.kinds), data.facts["kind"]
    if data.y is None or len(data.classes) < 2:
        expected = "folders of images named by their class, two at least"
        raise InputError(data.unlabelled or f"{data.root} has no labels: expected {expected}")
    return list(data.classes), data.y


def check_class_names(names: list[str]) -> None:
    """Refuse what --classes cannot mean."""
    if not all(name.strip() for name in names):
        raise InputError("--classes holds a class without a name")
    twice = next((f"{name!r} twice in " for i, name in enumerate(names) if name in names[:i]), "")
    if twice or len(names) < 2:
        found = twice + textwrap.shorten(", ".join(names), 80)
        raise InputError(f"--classes needs at least two names, each once; found {found}")


def open_zero_shot(job: Job, default_limit: int | None = None) -> tuple[Images, list[str], Tensor, Tensor]:
    """(test images, the classes' names, the class of each image, classes' embeddings [c, d])."""
    test = open_split(job, "test", default_limit)
    names, labels = zero_shot_problem(test)
    return test, names, labels, classifier(job.clip, names, templates(job.clip), title="classes")
