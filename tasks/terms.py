"""--task terms: the terms of every image in one file, from which other analyses start (see saved.py)."""

from __future__ import annotations

import math

import report
from files import InputError
from saved import open_terms, save_terms

from .job import Job, open_split
from .passes import one_pass
from .processes import process_count
from .tables import print_settings, table


def run(job: Job) -> tuple[dict, list]:
    """Save the terms of the test images, or of all images of a folder that has no splits."""
    args = job.args
    if args.resume or process_count() > 1:
        raise InputError("--task terms writes its file in one go: leave out --resume, and start one process")
    args.save_every = math.inf  # one_pass would keep what --resume needs
    data, path = open_split(job, "test"), args.save or args.out / "terms" / "terms.safetensors"
    files = getattr(data, "files", None) or [data.caption(i) for i in range(len(data))]
    about = {"model": job.clip.name, "weights": job.clip.weights, "images": data.description}
    batches = (images for images, _ in one_pass(job, data, "terms"))
    error = save_terms(path, job.clip.model, batches, files, about)
    shapes = open_terms(path).shapes
    within = f"the terms sum to the embedding within {error:.0e} of its largest entry"
    where = print_settings(job, images=data.description, file=str(path), sum=within)
    header = ("in the file", "shape", "MB")
    sides = {name: " x ".join(f"{side:,}" for side in shape) for name, shape in shapes.items()}
    rows = [(name, sides[name], f"{4e-6 * math.prod(shape):,.1f}") for name, shape in shapes.items()]
    print("\n" + table(header, rows))
    results = {"settings": where, "file": str(path), "shapes": shapes, "error": error}
    return results, [report.section("What is in the file", report.table(header, rows))]
