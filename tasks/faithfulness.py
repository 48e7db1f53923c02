"""--task faithfulness: do a method's maps show what the model uses?

Pixels are replaced in the order of a map, as faithfulness.py says, and the zero-shot prediction is watched.
Two rows that look at nothing stand in every table: a map that is no better shows nothing of the model.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

import report
from baselines import BaselineError
from decompose import DecompositionError, image_embedding
from faithfulness import CURVES, PASSES, area, curves
from files import InputError
from zeroshot import Clip

from .accumulators import Rows
from .attribution import (
    BLOB,
    OURS,
    RANDOM,
    choose_methods,
    draw,
    map_of_heads,
    maps_of,
    print_refused,
    what_it_explains,
)
from .heads import head_name
from .job import Job, open_zero_shot
from .passes import one_pass
from .tables import Shown, print_settings, print_table, prompts_of, say
from .textspan import heads_of

IMAGES = 256  # unless --limit says another number: many forward passes for each
PROMPTS = {"predicted": "the predicted class", "true": "the true class"}
DRAWN = {  # whether high is good, and what is drawn
    "positive": (-1, "right, %", "Highest pixels made black (low is good)"),
    "negative": (1, "right, %", "Lowest pixels made black (high is good)"),
    "deletion": (-1, "probability, %", "Highest pixels become noise (low is good)"),
    "insertion": (1, "probability, %", "Highest pixels alone, on black (high is good)"),
}
NOTE = """\
Areas under four curves, ± standard error over images. positive, negative: right answers with the highest, or
the lowest, 10 to 90 % of the pixels black. deletion, insertion: probability of the explained class while the
highest half becomes noise, and with the highest 10 to 50 % alone on black. Low is good for positive and
deletion, high for the others. Not better than random by two standard errors, image by image:"""


def run(job: Job) -> tuple[dict, list]:
    """Four areas of every method, and how far they are from those of a random map."""
    args, clip = job.args, job.clip
    if args.prompt not in PROMPTS:
        raise InputError(f"--task faithfulness: --prompt takes predicted or true; found {args.prompt!r}")
    black, normalise = pixels_of(clip)
    test, names, labels, classes = open_zero_shot(job, IMAGES)
    asked, heads = choose_methods(args, extra=(BLOB, RANDOM)), []
    if args.role is not None:
        heads, row = heads_of(job), f"{OURS}: {args.role}"
        asked = [row, *asked]
        job.more_maps[row] = lambda images, texts: map_of_heads(clip.model, images, heads, texts)
    asked = [method for method in asked if method not in (BLOB, RANDOM)] + [BLOB, RANDOM]
    refused = refuse(job, asked, test, classes)
    methods = [method for method in asked if method not in refused]
    classify, right = classifier_of(job, classes), Rows()
    kept = {(method, name): Rows() for method in methods for name in CURVES}
    for images, indices in one_pass(job, test, "images", right, *kept.values()):
        true, unchanged = labels[indices].to(clip.device), classify(images)
        predicted = unchanged.argmax(dim=1)
        right.add(predicted == true)
        shown = predicted if args.prompt == "predicted" else true
        noise = normalise(draw(images.shape[1:], indices, args.seed + 1)).to(clip.device)
        for method in methods:
            maps = maps_of(method, job, images, indices, classes, shown)
            try:
                found = curves(classify, images, maps, true, shown, black, noise, unchanged)
            except ValueError as error:
                batch = f"images {int(indices[0])} to {int(indices[-1])}"
                raise InputError(f"{method} on {batch}: {error}") from error
            for name, curve in found.items():
                kept[method, name].add(curve)
    accuracy = 100 * float(right.tensor().double().mean())
    explained = f"{PROMPTS[args.prompt]}; answers are compared with the true class"
    passes = f"{PASSES} for each image and method; unchanged images: {accuracy:.1f} % right"
    more = {"heads": f"{', '.join(map(head_name, heads))} (role {args.role!r})"} if heads else {}
    more |= {"explained": explained, "prompts": prompts_of(clip, len(names)), "passes": passes}
    where = print_settings(job, images=test.description, **more)
    points = {key: rows.tensor() for key, rows in kept.items()}
    rows = {method: measures(method, points, args) for method in methods}
    numbers, notes = print_rows(rows)
    notes = (*notes, *print_refused(refused))
    results = {"settings": where, "unchanged": accuracy / 100, "rows": rows, "refused": refused}
    return results, page(rows, accuracy, (numbers, notes))


def refuse(job: Job, methods: list[str], test: Dataset, classes: Tensor) -> dict[str, str]:
    """{method: why it does not support the model}, tried on one image before the pass."""
    image, _ = test[0]
    if isinstance(image, str):
        raise InputError(image)
    refused, image, first = {}, image[None].to(job.clip.device, job.clip.dtype), torch.tensor([0])
    for method in methods:
        try:
            maps_of(method, job, image, first, classes, first.to(image.device))
        except (BaselineError, DecompositionError) as error:
            if job.args.methods or method in (BLOB, RANDOM):
                raise
            refused[method] = str(error)
    return refused


def classifier_of(job: Job, classes: Tensor) -> Callable[[Tensor], Tensor]:
    """From images to the probabilities [b, c] of the classes: CLIP's softmax or SigLIP's sigmoid."""
    scale, bias = (getattr(job.clip.model, name, None) for name in ("logit_scale", "logit_bias"))

    @torch.no_grad()
    def classify(images: Tensor) -> Tensor:
        embedding = image_embedding(job.clip.model, images).to(classes)
        job.check_finite(embedding)
        logits = F.normalize(embedding, dim=1) @ classes.T * (1 if scale is None else scale.exp())
        return logits.softmax(dim=1) if bias is None else (logits + bias).sigmoid()

    return classify


def pixels_of(clip: Clip) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(black [3, 1, 1] as the model takes it, what makes such numbers of pixels in 0..1)."""
    steps = getattr(clip.preprocess, "transforms", [])
    normalise = next((step for step in steps if type(step).__name__ == "Normalize"), None)
    if normalise is None:
        raise InputError("cannot tell what black is: the image transform has no step Normalize")
    return normalise(torch.zeros(3, 1, 1)).to(clip.device), normalise


def measures(method: str, points: dict[tuple[str, str], Tensor], args: Namespace) -> dict:
    """A row of the table. `points` [n, points] are of every image, by method and curve."""
    row = what_it_explains(method, args)
    for name, percent in CURVES.items():
        mine, random = (area(points[key, name], percent) for key in (method, RANDOM))
        heights = points[method, name].double().mean(dim=0).tolist()
        row[name] = {"area": mean(mine), "above random": mean(mine - random), "points": heights}
    return row


def mean(x: Tensor) -> tuple[float, float]:
    """(mean of x [n], its standard error)"""
    return float(x.mean()), float(x.std(correction=0)) / max(len(x) - 1, 1) ** 0.5


def print_rows(rows: dict[str, dict]) -> Shown:
    """The table, and which methods are no better than random."""
    cells = []
    for method, row in rows.items():
        areas = (row[name]["area"] for name in CURVES)
        figures = [f"{100 * area:.1f} ± {100 * error:.1f}" for area, error in areas]
        cells.append([method, row["score"], row["text"], *figures])
    lines = []
    for name, (sign, *_) in DRAWN.items():
        no_better = []
        for method, row in rows.items():
            difference, error = row[name]["above random"]
            ahead = error and sign * difference > 2 * error  # a single image has no error
            no_better += [method] * (method != RANDOM and not ahead)
        lines.append(f"  {name + ':':<11}{', '.join(no_better) or 'none'}")
    return print_table(["%", "score", "text", *CURVES], cells), say(NOTE, *lines)


def page(rows: dict[str, dict], unchanged: float, shown: Shown) -> list[str]:
    """The same for report.html, with the curves."""
    numbers, notes = shown
    lead = "What the prediction does when the pixels go that a map ranks highest, or lowest. "
    lead += "A map that is no better than a random one shows nothing of the model."
    drawn = []
    for name, (_, y_label, title) in DRAWN.items():
        heights = {method: (100 * y for y in row[name]["points"]) for method, row in rows.items()}
        series = {method: list(zip(CURVES[name], ys, strict=True)) for method, ys in heights.items()}
        lines = {"unchanged": unchanged} if y_label == "right, %" else {}
        drawn.append(report.curves(series, "pixels, %", y_label, title, lines))
    return [lead, report.section("Do the maps show what the model uses?", numbers, *drawn, note=notes)]
