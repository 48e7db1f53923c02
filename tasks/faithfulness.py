"""--task faithfulness: do a method's maps show what the model uses?

Pixels are replaced in the order of a map, as faithfulness.py says, and the zero-shot prediction is watched.
The two rows that look at nothing stand in every table: what is not better than they are shows nothing.
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
from faithfulness import CURVES, PASSES, area, curves, mean_and_error
from files import InputError
from zeroshot import Clip

from .accumulators import Rows
from .attribution import OURS, choose_methods, decomposition_of
from .heads import head_name
from .heatmap import print_refused
from .job import Job, open_zero_shot
from .passes import one_pass
from .retrieval import heads_of
from .segmentation import BLOB, RANDOM, contrasted, draw, maps_of, what_it_explains
from .tables import print_settings, prompts_of, table

IMAGES = 256  # unless --limit says another number: 20 forward passes for each image and method
PROMPTS = {"predicted": "the predicted class", "true": "the true class"}
# Which way is good, and what a curve shows.
GOOD = {"positive": -1, "negative": 1, "deletion": -1, "insertion": 1}
TITLES = {
    "positive": ("Highest pixels made black (low is good)", "right, %"),
    "negative": ("Lowest pixels made black (high is good)", "right, %"),
    "deletion": ("Highest pixels become noise (low is good)", "probability, %"),
    "insertion": ("Highest pixels shown on black (high is good)", "probability, %"),
}
Maps = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of images, indices, classes, classes shown


def run(job: Job) -> tuple[dict, list]:
    """Four areas of every method, and how far they are from those of a random map."""
    args, clip = job.args, job.clip
    if args.prompt not in PROMPTS:
        raise InputError(f"--task faithfulness: --prompt takes predicted or true; found {args.prompt!r}")
    test, names, labels, classes = open_zero_shot(job, IMAGES)
    methods, heads = choose_maps(job)
    refused = refuse(job, methods, test, classes)
    methods = {method: maps for method, maps in methods.items() if method not in refused}
    classify, black, normalise = classifier_of(job, classes), *pixels_of(clip)
    kept = {(method, name): Rows() for method in methods for name in CURVES}
    right = Rows()
    for images, indices in one_pass(job, test, "images", right, *kept.values()):
        true, unchanged = labels[indices].to(clip.device), classify(images)
        predicted = unchanged.argmax(dim=1)
        right.add(predicted == true)
        shown = predicted if args.prompt == "predicted" else true
        noise = normalise(draw(images.shape[1:], indices, args.seed + 1)).to(clip.device)
        for method, maps in methods.items():
            try:
                found = curves(
                    classify,
                    images,
                    maps(images, indices, classes, shown),
                    true,
                    shown,
                    black,
                    noise,
                    unchanged,
                )
            except ValueError as error:
                batch = f"images {int(indices[0])} to {int(indices[-1])}"
                raise InputError(f"{method} on {batch}: {error}") from error
            for name, curve in found.items():
                kept[method, name].add(curve)
    accuracy = float(right.tensor().double().mean())
    where = print_settings(
        job,
        images=test.description,
        explained=f"{PROMPTS[args.prompt]}; answers are compared with the true class",
        prompts=prompts_of(clip, len(names)),
        **heads,
        unchanged=f"{100 * accuracy:.1f} % right",
        passes=f"{PASSES} forward passes for each image and method",
    )
    points = {key: rows.tensor() for key, rows in kept.items()}
    rows = {method: measures(method, points, args) for method in methods}
    print_rows(rows)
    print_refused(refused)
    results = {"settings": where, "unchanged": accuracy, "rows": rows, "refused": refused}
    return results, page(rows, 100 * accuracy)


def choose_maps(job: Job) -> tuple[dict[str, Maps], dict[str, str]]:
    """({row: how its maps are made}, the heads of --role for the settings)."""

    def maps(method: str) -> Maps:
        return lambda images, *more: maps_of(method, job, images, *more)

    def role_maps(images: Tensor, _: Tensor, classes: Tensor, shown: Tensor) -> Tensor:
        texts = classes[shown] - classes.mean(dim=0) * contrasted(OURS, job.args.contrast)
        return decomposition_of(heads, job.clip.model, images, texts)

    asked, named = choose_methods(job.args, extra=(BLOB, RANDOM)), {}
    found = {method: maps(method) for method in asked if method not in (BLOB, RANDOM)}
    if job.args.role is not None:
        heads = heads_of(job)
        found = {role_row(job.args): role_maps} | found
        named = {"heads": f"{', '.join(map(head_name, heads))} (role {job.args.role!r})"}
    return found | {method: maps(method) for method in (BLOB, RANDOM)}, named


def role_row(args: Namespace) -> str:
    return f"{OURS}: {args.role}"


def refuse(job: Job, methods: dict[str, Maps], test: Dataset, classes: Tensor) -> dict[str, str]:
    """{method: why it does not support the model}, tried on one image before the pass."""
    image, _ = test[0]
    if isinstance(image, str):
        raise InputError(image)
    refused, image = {}, image[None].to(job.clip.device, job.clip.dtype)
    for method, maps in methods.items():
        try:
            maps(image, torch.tensor([0]), classes, torch.zeros(1, dtype=torch.long, device=image.device))
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
    """(black [3, 1, 1] as the model takes it, what makes pixels in 0..1 such values)."""
    steps = getattr(clip.preprocess, "transforms", [])
    normalise = next((step for step in steps if type(step).__name__ == "Normalize"), None)
    if normalise is None:
        raise InputError("cannot tell what black is: the image transform has no step Normalize")
    return normalise(torch.zeros(3, 1, 1)).to(clip.device), normalise


def measures(method: str, points: dict[tuple[str, str], Tensor], args: Namespace) -> dict:
    """A row of the table; points [n, points] by method and curve. Random: paired over the same images."""
    row = what_it_explains(OURS if method == role_row(args) else method, args)
    for name, percent in CURVES.items():
        mine, random = (area(points[key, name], percent) for key in (method, RANDOM))
        numbers = [*mean_and_error(mine), *mean_and_error(mine - random)]
        labels = ("area", "standard error", "over random", "standard error over random")
        heights = points[method, name].double().mean(dim=0).tolist()
        row[name] = dict(zip(labels, numbers, strict=True)) | {"points": heights}
    return row


def better(row: dict, name: str) -> bool:
    """Is a row better than random by over two standard errors?"""
    return GOOD[name] * row[name]["over random"] > 2 * row[name]["standard error over random"]


def print_rows(rows: dict[str, dict]) -> None:
    header = ["%", "score", "text", *CURVES]
    print("\n" + table(header, cells(rows)))
    print(
        "\nAreas under curves, ± standard error over images. Low is good: positive, deletion; high: the others."
    )
    print(
        "positive, negative: right answers when the highest, the lowest 10 to 90 % of the pixels are black;"
    )
    print(
        "deletion, insertion: probability of the explained class when the highest half becomes noise, when the"
    )
    print("highest 10 to 50 % are all that is shown. Not better than random, by two standard errors:")
    for name in CURVES:
        level = [method for method, row in rows.items() if method != RANDOM and not better(row, name)]
        print(f"  {name + ':':<11}{', '.join(level) or 'none'}")


def cells(rows: dict[str, dict]) -> list[list[str]]:
    """The cells of the table, on the terminal and on the page."""
    found = []
    for method, row in rows.items():
        areas = [f"{100 * row[n]['area']:.1f} ± {100 * row[n]['standard error']:.1f}" for n in CURVES]
        found.append([method, row["score"], row["text"], *areas])
    return found


def page(rows: dict[str, dict], unchanged: float) -> list[report.Html]:
    """The same for report.html, with the curves."""
    measured, drawn = report.table(["%", "score", "text", *CURVES], cells(rows)), []
    for name, percent in CURVES.items():
        title, y_label = TITLES[name]
        series = {
            method: [(x, 100 * y) for x, y in zip(percent, row[name]["points"], strict=True)]
            for method, row in rows.items()
        }
        lines = {"unchanged": unchanged} if y_label == "right, %" else {}
        drawn.append(report.curves(series, "pixels, %", y_label, title, lines))
    note = "Areas ± standard error over images. What is not better than random shows nothing of the model."
    return [report.section("Do the maps show what the model uses?", measured, *drawn, note=note)]
