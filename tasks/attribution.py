"""What the segmentation and heatmap tasks share: every attribution, the decomposition among them."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn

from baselines import METHODS, Attribution
from decompose import heatmap, open_tower, token_scores
from files import InputError, did_you_mean

from .heads import Head


def decomposition(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """[b, rows, cols] what the patches add to <embedding, texts[b]> through all heads (paper, section 5)."""
    unique, which = texts.unique(dim=0, return_inverse=True)  # images of one class share their text
    return heatmap(model, images, unique)[torch.arange(len(images), device=images.device), which]


def decomposition_of(heads: list[Head], model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """The same through these heads alone."""
    unique, which = texts.unique(dim=0, return_inverse=True)
    layers, tower = sorted({layer for layer, _ in heads}), open_tower(model, images=images)
    scores = token_scores(model, images, unique, layers)  # [b, layers, H, N, t]
    scores = sum(scores[:, layers.index(layer), head] for layer, head in heads)
    rows = torch.arange(len(images), device=images.device)
    return scores[rows, tower.prefix :, which].unflatten(1, tower.grid(images))


OURS, OURS_ABS = "decomposition", "decomposition-abs"
DECOMPOSITIONS = {
    OURS: Attribution(decomposition, "dot"),
    # Evidence for or against: a part of the object that speaks for another class is still on the object.
    OURS_ABS: Attribution(lambda *args: decomposition(*args).abs(), "dot"),
}
ATTRIBUTIONS = DECOMPOSITIONS | METHODS


def clipped(method: str) -> bool:
    """Are negative values of its maps set to zero before they are scaled? The paper does so with its own."""
    return method == OURS


def attribute(
    method: str, model: nn.Module, images: Tensor, texts: Tensor, score: str = "published"
) -> Tensor:
    """[b, rows, cols] one method's maps, texts [b, d]; `score` as --score says."""
    options = {} if score == "published" or method in DECOMPOSITIONS else {"score": score}
    return ATTRIBUTIONS[method](model, images, texts, **options)


def score_of(method: str, score: str) -> str:
    """Which score a method explains, in words: of the decompositions always "dot"."""
    entry = ATTRIBUTIONS[method]
    if score == "published" or method in DECOMPOSITIONS or not entry.reads_text:
        return entry.score or "-"
    return score


def choose_methods(args: Namespace, extra: tuple[str, ...] = ()) -> list[str]:
    """--methods, with spaces or commas between, each once, in the order given; all where it is not given."""
    known = [*ATTRIBUTIONS, *extra]
    asked = [name.strip() for given in args.methods or () for name in given.split(",")]
    unknown = [name for name in asked if name not in known]
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise InputError(f"--methods knows no {unknown[0]!r}; it takes {', '.join(known)}{near}")
    return list(dict.fromkeys(asked or known))
