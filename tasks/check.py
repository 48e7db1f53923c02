"""--task check: do the terms sum to the embedding?"""

from __future__ import annotations

import math
from collections import defaultdict

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import report
from decompose import Decomposition, DecompositionError, decompose, open_tower, token_scores
from neurons import neurons

from . import models
from .accumulators import Largest
from .job import Job, open_split
from .passes import one_pass
from .tables import print_lines, print_settings, print_table, say

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
IMAGES = 64


def run(job: Job) -> tuple[dict, list]:
    """The error of the sum, in both conventions and by source token, over at most 64 images (or --limit)."""
    if job.args.model == "all":
        return run_all()
    model, tolerance = job.clip.model, TOLERANCE[job.clip.dtype]
    data = open_split(job, "test", default_limit=IMAGES)
    conventions = conventions_of(model)
    worst = Largest()
    for images, _ in one_pass(job, data, "check", worst):
        terms = decompose(model, images, tolerance=tolerance)
        for name in conventions:
            other = terms if name == "term" else decompose(model, images, convention=name)
            worst.add(f"terms, convention {name}", other.error())
        worst.add("source tokens against heads", token_error(model, images, terms))
    errors = worst.largest
    where = print_settings(job, images=data.description, tolerance=f"{tolerance:.0e}")
    header = ("largest error, relative", "", "")
    words = {name: "ok" if error <= tolerance else "TOO LARGE" for name, error in errors.items()}
    rows = [(name, f"{error:.1e}", words[name]) for name, error in errors.items()]
    shown = print_table(header, rows)
    if "TOO LARGE" in words.values():
        hint = "--precision fp32 tells rounding from a wrong sum"
        raise DecompositionError(f"an error above is larger than the tolerance; {hint}")
    lead = "The terms of each image, summed, are the embedding that the model itself gives, up to rounding."
    section = report.section("Do the terms sum to the embedding?", shown)
    return {"settings": where, "tolerance": tolerance, "errors": errors}, [lead, section]


def conventions_of(model: nn.Module) -> tuple[str, ...]:
    """Those that are defined for the model's read-out."""
    try:
        open_tower(model, convention="paper")
    except DecompositionError:
        return ("term",)
    return ("term", "paper")


def token_error(model: nn.Module, images: Tensor, terms: Decomposition) -> float:
    """How far the scores of source tokens, summed, are from those of their heads; relative to the largest."""
    texts = F.normalize(terms.embedding[:1].to(terms.heads.dtype), dim=-1)
    heads, tokens = terms.heads @ texts.T, token_scores(model, images, texts).sum(dim=3)
    return float((heads - tokens).abs().max() / heads.abs().max())


def run_all() -> tuple[dict, list]:
    """Every configuration of open_clip, as a small copy with random weights in float64: no downloads."""
    rows = [check_small(name) for name in tqdm(open_clip.list_models(), desc="configurations", leave=False)]
    what = f"the {len(rows)} configurations of open_clip {open_clip.__version__}; random weights, float64"
    width = f"width {models.WIDTH} (behind a convolutional stem: its own)"
    sums = "terms to embedding; source tokens to heads; neurons of the last layer to its MLP"
    where = {
        "models": f"{what}, {models.LAYERS} layers, {width}, {models.GRID} x {models.GRID} patches",
        "tolerance": f"{TOLERANCE[torch.float64]:.0e}",
        "errors": f"relative, largest over 2 images: {sums}",
    }
    print_lines(where)
    good = [row for row in rows if row["errors"]]
    keys = ("model", "family", "readout")
    cells = [[*map(row.get, keys), *(f"{error:.0e}" for error in row["errors"])] for row in good]
    header = ["model", "family", "read-out", "terms", "source tokens", "neurons"]
    summary, refused = families(good), refusals(rows)
    every, by_family = print_table(header, cells), print_table(SUMMARY, summary)
    for reason, group in refused:
        print(f"\nrefused, {reason}: {group}")
    (counted,) = say(f"{len(good)} of {len(rows)} can be decomposed.")
    wrong = [row["model"] for row in good if not max(row["errors"]) <= TOLERANCE[torch.float64]]
    if wrong:
        raise DecompositionError(f"an error is larger than the tolerance: {', '.join(wrong)}")
    sections = [
        f"Which models of open_clip are a sum of terms, and how exactly: {counted}",
        report.section("By family", by_family),
        report.section("Refused", report.table(["why", "models"], refused)),
        report.section("Every model", every),
    ]
    return {"settings": {"model": "all", **where}, "models": rows}, sections


def check_small(name: str) -> dict:
    """What one configuration is, and the errors of its small copy; or why it is refused."""
    found = models.listed(name)
    row = {"model": name, "family": found.family, "readout": "", "refusal": found.refusal, "errors": None}
    return row if found.tower is None else row | {"readout": found.tower.name, "errors": small_errors(name)}


SUMMARY = ("family", "read-out", "models", "largest error")


def small_errors(name: str) -> list[float]:
    """Relative errors of a small copy: of the terms, of the source tokens, of the last layer's neurons."""
    model = models.small(name)
    images = models.pictures(model)
    terms = decompose(model, images, tolerance=math.inf)
    return [terms.error(), token_error(model, images, terms), neurons(model, images, -1).error()]


def families(rows: list[dict]) -> list[list[str]]:
    """Rows of the summary, from the models that can be decomposed."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["family"], row["readout"]].append(max(row["errors"]))
    return [[*group, str(len(errors)), f"{max(errors):.0e}"] for group, errors in sorted(groups.items())]


def refusals(rows: list[dict]) -> list[tuple[str, str]]:
    """Reasons, and the models of each."""
    reasons = dict.fromkeys(row["refusal"] for row in rows if row["refusal"])
    return [(why, ", ".join(row["model"] for row in rows if row["refusal"] == why)) for why in reasons]
