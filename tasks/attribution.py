"""What the segmentation and heatmap tasks share: every method under one signature, the decomposition among them."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn

from baselines import METHODS
from data import InputError
from decompose import heatmap

OURS, OURS_ABS = "decomposition", "decomposition-abs"
PUBLISHED_SCORE = {"chefer2021-mm": "logit", "legrad": "cosine", "grad-eclip": "cosine"}  # the others: dot
NO_TEXT = ("raw-attention", "rollout")


def clipped(method: str) -> bool:
    """Are negative values of its maps set to zero before they are scaled? The paper does so with its own."""
    return method == OURS


def decomposition(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """[b, rows, cols] what the patches add to <embedding, texts[b]> through all heads (section 5 of the paper)."""
    unique, which = texts.unique(dim=0, return_inverse=True)  # images of one class share their text
    return heatmap(model, images, unique)[torch.arange(len(images), device=images.device), which]


def attribute(
    method: str, model: nn.Module, images: Tensor, texts: Tensor, score: str = "published"
) -> Tensor:
    """[b, rows, cols] one method's maps, texts [b, d]; `score` as --score says."""
    if method == OURS:
        return decomposition(model, images, texts)
    if (
        method == OURS_ABS
    ):  # evidence for or against: a part of the object that speaks for another class is still on the object
        return decomposition(model, images, texts).abs()
    options = {} if score == "published" else {"score": score}
    return METHODS[method](model, images, texts, **options).to(texts)


def score_of(method: str, score: str) -> str:
    """Which score a method explains, in words."""
    if method in NO_TEXT:
        return "-"
    if method in (OURS, OURS_ABS):
        return "dot"
    return PUBLISHED_SCORE.get(method, "dot") if score == "published" else score


def choose_methods(args: Namespace, extra: tuple[str, ...] = ()) -> list[str]:
    """--methods, each once, in the order given; all where it is not given."""
    known = [OURS, OURS_ABS, *METHODS, *extra]
    unknown = [name for name in args.methods or () if name not in known]
    if unknown:
        raise InputError(f"--methods knows no {unknown[0]!r}; it takes {', '.join(known)}")
    return list(dict.fromkeys(args.methods or known))
