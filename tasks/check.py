"""--task check: do the terms sum to the embedding?"""

from __future__ import annotations

import math
from argparse import Namespace

import open_clip
import torch
from tqdm import tqdm

import report
from decompose import DecompositionError, decompose, open_tower, token_scores
from neurons import neurons
from zeroshot import load_clip

from . import models, pages
from .common import open_split, print_settings, settings, table
from .parts import Largest
from .passes import one_pass

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
IMAGES = 64


def run(args: Namespace) -> tuple[dict, list]:
    """The error of the sum, in both conventions and by source token, over at most 64 images (--limit for another number)."""
    if args.model == "all":
        return run_all(args)
    args.limit = args.limit or IMAGES
    clip = load_clip(args.model, args.pretrained, args.device, args.precision, args.image_size, args.out)
    data = open_split(args, clip, "test")
    dtype = clip.dtype
    conventions = conventions_of(clip.model)
    worst = Largest()
    for images, _ in one_pass(clip, data, args, "check", worst):
        terms = decompose(clip.model, images, tolerance=TOLERANCE[dtype])
        texts = torch.nn.functional.normalize(terms.embedding[:1].to(terms.heads.dtype), dim=-1)
        heads, tokens = terms.heads @ texts.T, token_scores(clip.model, images, texts).sum(dim=3)
        for name in conventions:
            worst.add(
                f"terms, convention {name}",
                (terms if name == "term" else decompose(clip.model, images, convention=name)).error(),
            )
        worst.add("source tokens against heads", float((heads - tokens).abs().max() / heads.abs().max()))
    errors = worst.largest
    where = settings(args, clip, images=data.description, tolerance=f"{TOLERANCE[dtype]:.0e}")
    print_settings(where)
    print()
    print(
        table(
            ("largest error, relative", "", ""),
            [
                (name, f"{error:.1e}", "ok" if error <= TOLERANCE[dtype] else "TOO LARGE")
                for name, error in errors.items()
            ],
        )
    )
    if not all(error <= TOLERANCE[dtype] for error in errors.values()):
        raise DecompositionError(
            "an error above is larger than the tolerance; --precision fp32 tells rounding from a wrong sum"
        )
    results = {"settings": where, "tolerance": TOLERANCE[dtype], "errors": errors}
    return results, pages.check(results)


def conventions_of(model: torch.nn.Module) -> tuple[str, ...]:
    """Those that are defined for the model's read-out."""
    try:
        open_tower(model, convention="paper")
    except DecompositionError:
        return ("term",)
    return ("term", "paper")


def run_all(args: Namespace) -> tuple[dict, list]:
    """Every configuration that open_clip has, as a small copy with random weights, in float64: no downloads."""
    rows = []
    names = open_clip.list_models()
    for name in tqdm(names, desc="configurations", leave=False):
        found = models.listed(name)
        errors = None if found.tower is None else small_errors(found.name)
        readout = "" if found.tower is None else found.tower.name
        rows.append(
            {
                "model": name,
                "family": found.family,
                "readout": readout,
                "refusal": found.refusal,
                "errors": errors,
            }
        )
    where = {
        "models": f"the {len(names)} configurations of open_clip {open_clip.__version__}; random weights, float64, "
        f"{models.LAYERS} layers, width {models.WIDTH} (behind a convolutional stem: its own), {models.GRID} x {models.GRID} patches",
        "tolerance": f"{TOLERANCE[torch.float64]:.0e}",
        "errors": "relative, largest over 2 images: terms to embedding; source tokens to heads; neurons of the last layer to its MLP",
    }
    print_settings(where)
    print()
    header = ["model", "family", "read-out", "terms", "source tokens", "neurons"]
    cells = [
        [row["model"], row["family"], row["readout"], *(f"{error:.0e}" for error in row["errors"])]
        for row in rows
        if row["errors"]
    ]
    summary = families(rows)
    print(table(header, cells))
    print()
    print(table(SUMMARY, summary))
    refused = refusals(rows)
    for reason, group in refused:
        print(f"\nrefused, {reason}: {group}")
    good = [row for row in rows if row["errors"]]
    print(f"\n{len(good)} of {len(rows)} can be decomposed.")
    wrong = [row["model"] for row in good if not max(row["errors"]) <= TOLERANCE[torch.float64]]
    if wrong:
        raise DecompositionError(f"an error is larger than the tolerance: {', '.join(wrong)}")
    sections = [
        report.section("By family", report.table(SUMMARY, summary)),
        report.section("Refused", report.table(["why", "models"], refused)),
        report.section("Every model", report.table(header, cells)),
    ]
    return {"settings": {"model": "all", **where}, "models": rows}, sections


SUMMARY = ("family", "read-out", "models", "largest error")


def small_errors(name: str) -> list[float]:
    """Relative errors of a small copy: of the terms, of the source tokens, of the last layer's neurons."""
    model = models.small(name)
    images = models.pictures(model)
    terms = decompose(model, images, tolerance=math.inf)
    texts = torch.nn.functional.normalize(terms.embedding[:1], dim=-1)
    heads, tokens = terms.heads @ texts.T, token_scores(model, images, texts).sum(dim=3)
    return [
        terms.error(),
        float((heads - tokens).abs().max() / heads.abs().max()),
        neurons(model, images, -1).error(),
    ]


def families(rows: list[dict]) -> list[list[str]]:
    """Rows of the summary."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if row["errors"]:
            groups.setdefault((row["family"], row["readout"]), []).append(max(row["errors"]))
    return [[*group, str(len(errors)), f"{max(errors):.0e}"] for group, errors in sorted(groups.items())]


def refusals(rows: list[dict]) -> list[tuple[str, str]]:
    """Reasons, and the models of each."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row["refusal"]:
            groups.setdefault(row["refusal"], []).append(row["model"])
    return [(reason, ", ".join(names)) for reason, names in groups.items()]
