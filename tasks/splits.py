"""The images of a task, and the classes that a zero-shot classifier has to tell apart."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from data import DemoBirds, ImageFolder, Waterbirds
from files import InputError
from zeroshot import classifier, templates

from .job import Job

Images = DemoBirds | Waterbirds | ImageFolder


def open_split(job: Job, split: str, default_limit: int | None = None) -> Images:
    """--data: Waterbirds where it holds metadata.csv, else any folder of images; without it the demo."""
    args, options = job.args, (job.clip.preprocess, job.args.limit or default_limit, job.args.seed)
    if args.data is None:
        return DemoBirds(split, *options)
    kind = Waterbirds if (Path(args.data) / "metadata.csv").exists() else ImageFolder
    return kind(args.data, split, *options)


def zero_shot_problem(data: Images) -> tuple[list[str], Tensor]:
    """(the classes' names, the class of each image); in the demo the classes are kinds of birds."""
    if isinstance(data, DemoBirds):
        return list(data.kinds), data.facts["kind"]
    if data.y is None or len(data.classes) < 2:
        raise InputError(
            f"{data.root} has no labels: expected folders of images named by their class, two at least"
        )
    return list(data.classes), data.y


def open_zero_shot(job: Job) -> tuple[Images, list[str], Tensor, Tensor]:
    """(test images, the classes' names, the class of each image, classes' embeddings [c, d])."""
    test = open_split(job, "test")
    names, labels = zero_shot_problem(test)
    return test, names, labels, classifier(job.clip, names, templates(job.clip), title="classes")
