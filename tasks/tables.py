"""What is printed: tables, accuracies with their intervals, and the settings above every table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.utils.data import Dataset

import report
from files import visible
from loading import Clip, activation
from zeroshot import templates

from .job import Job

SCORED = "on the images that are scored"
AUTHORS = "terms by the authors' convention, over the norm of the embedding; their MLPs include the stem"
Shown = tuple[report.Html, tuple[str, ...]]  # a table and the notes below it, printed, and for the page
FEW = 10  # images per text, below which the demo's images began to choose heads at random


def wilson(right: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of an accuracy (Wilson 1927), which stays inside 0..1 and holds for few images."""
    middle = (right + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(right * (1 - right) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def in_percent(accuracy: float, count: int) -> tuple[float, float, float]:
    """(accuracy, lower and upper end of its 95 % interval), in percent."""
    low, high = wilson(accuracy, count)
    return 100 * accuracy, 100 * low, 100 * high


def percent(accuracy: float, count: int) -> str:
    """ "54.8 [51.2, 58.3]": an accuracy in percent with its 95 % interval."""
    value, low, high = in_percent(accuracy, count)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def spread(shares: Iterable[float]) -> dict[str, float]:
    """For results.json: mean, standard deviation and maximum."""
    values = torch.tensor(list(shares), dtype=torch.float64)
    return {"mean": float(values.mean()), "std": float(values.std(correction=0)), "max": float(values.max())}


def images_per_text(images: int, used: int, texts: int) -> str:
    """How many texts divide the images, for the settings; with a warning where the images are few."""
    said = f"{images:,} images fit {used} of {texts} texts best, {images / used:.1f} images per text"
    warning = (
        f"WARNING: below {FEW} per text, chance explains much of a head; give more images or fewer texts"
    )
    return f"{said}; {warning}" if images < FEW * used else said


def in_tenths(shares: Iterable[float]) -> list[str]:
    """["54.8", ...]: shares in percent, for the cells of a table."""
    return [f"{100 * share:.1f}" for share in shares]


def mean_and_std(shares: Sequence[float]) -> str:
    """ "54.8 ± 2.1", in percent."""
    values = torch.tensor(shares, dtype=torch.float64)
    return f"{100 * values.mean():.1f} ± {100 * values.std(correction=0):.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what they hold; the first is aligned to the left, the others to the right."""
    header, *rows = [[*map(visible, row)] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (header, *rows)]
    title, *lines = ["  ".join(cells).rstrip() for cells in aligned]
    return "\n".join([title, "-" * len(title), *lines])


def print_settings(job: Job, **more: str) -> dict[str, str]:
    """Print what every table says of where its numbers come from; returned for the task's results."""
    clip, args = job.clip, job.args
    size = f", images of {args.image_size} pixels" if args.image_size else ""
    dtype = str(clip.dtype).removeprefix("torch.")
    model = f"{clip.name}, weights {clip.weights}, {activation(clip.model)}, {dtype} on {clip.device}{size}"
    notes = {"note": "; ".join(job.notes)} if job.notes else {}
    return print_lines({"model": model, **more, "seed": str(args.seed), **notes})


def print_lines(lines: dict[str, str]) -> dict[str, str]:
    """Print the lines, their values below each other, and return them."""
    width = max(map(len, lines)) + 2
    for key, value in lines.items():
        print(f"{key + ':':<{width}}{visible(value)}")
    return lines


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> report.Html:
    """Print the table, and return it for the page."""
    print("\n" + table(header, rows))
    return report.table(header, rows)


def say(*notes: str) -> tuple[str, ...]:
    """Print notes below a table, each from a new line, and return them for the page."""
    print("\n" + "\n".join(notes))
    return notes


def zero_shot_settings(
    job: Job, test: Dataset, means: str, classes: int | Sequence[str], note: str = SCORED
) -> dict[str, str]:
    """Test images; images that means come from, with a note where these are the test images; prompts."""
    means += f"; {note}" if job.args.reference == "test" else ""
    means += f"; {AUTHORS}" if job.args.protocol == "authors" else ""
    return {"test": test.description, "means": means, "prompts": prompts_of(job.clip, classes)}


def prompts_of(clip: Clip, classes: int | Sequence[str]) -> str:
    """Prompt templates and classes of a classifier: how many there are, or what they are."""
    classes = f"{classes:,} classes" if isinstance(classes, int) else " / ".join(classes)
    return f"{len(templates(clip))} templates, {classes}; {logits(clip)}"


def logits(clip: Clip) -> str:
    """What the model makes of a cosine: CLIP's softmax or SigLIP's sigmoid; the same class wins."""
    scale, bias = (getattr(clip.model, name, None) for name in ("logit_scale", "logit_bias"))
    if scale is None:
        return "cosines"
    scale = float(scale.detach().exp())
    if bias is None:
        return f"softmax of {scale:.1f} cosine"
    return f"sigmoid of {scale:.1f} cosine {float(bias.detach()):+.1f}"
