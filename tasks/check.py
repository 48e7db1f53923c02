"""--task check: do the terms sum to the embedding?"""

from __future__ import annotations

from argparse import Namespace

import torch

from decompose import DecompositionError, check, decompose, token_scores
from zeroshot import load_clip

from . import pages
from .common import open_split, print_settings, settings, stream, table

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
IMAGES = 64


def run(args: Namespace) -> tuple[dict, list]:
    """The error of the sum, in both conventions and by source token, over at most 64 images (--limit for another number)."""
    args.limit = args.limit or IMAGES
    clip = load_clip(args.model, args.pretrained, args.device, args.precision)
    data = open_split(args, clip, "test")
    dtype = clip.dtype
    errors = {"terms, convention term": 0.0, "terms, convention paper": 0.0, "source tokens against heads": 0.0}
    for images in stream(clip, data, args, "check"):
        check(clip.model, images, TOLERANCE[dtype])
        terms = decompose(clip.model, images)
        texts = torch.nn.functional.normalize(terms.embedding[:1].to(terms.heads.dtype), dim=-1)
        heads, tokens = terms.heads @ texts.T, token_scores(clip.model, images, texts).sum(dim=3)
        found = (
            terms.error(),
            decompose(clip.model, images, convention="paper").error(),
            float((heads - tokens).abs().max() / heads.abs().max()),
        )
        errors = {name: new if new != new else max(worst, new) for (name, worst), new in zip(errors.items(), found, strict=True)}
    where = settings(args, clip, images=data.description, tolerance=f"{TOLERANCE[dtype]:.0e}")
    print_settings(where)
    print()
    print(
        table(
            ("largest error, relative", "", ""),
            [(name, f"{error:.1e}", "ok" if error <= TOLERANCE[dtype] else "TOO LARGE") for name, error in errors.items()],
        )
    )
    if not all(error <= TOLERANCE[dtype] for error in errors.values()):
        raise DecompositionError("an error above is larger than the tolerance; --precision fp32 tells rounding from a wrong sum")
    results = {"settings": where, "tolerance": TOLERANCE[dtype], "errors": errors}
    return results, pages.check(results)
