"""What the tasks that make maps share: every attribution, the decomposition among them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection

import torch
from torch import Tensor, einsum, nn

from baselines import METHODS, Attribution
from decompose import heatmap, open_tower, token_scores
from files import InputError, did_you_mean
from zeroshot import Clip

from .heads import Head
from .job import Job


def decomposition(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """[b, rows, cols] what the patches add to <embedding, texts[b]> through all heads (paper, section 5)."""
    unique, which = texts.unique(dim=0, return_inverse=True)  # images of one class share their text
    return heatmap(model, images, unique)[torch.arange(len(images), device=images.device), which]


def map_of_heads(
    model: nn.Module, images: Tensor, heads: Collection[Head], texts: Tensor, chunk: int = 8
) -> Tensor:
    """[b, rows, columns] what each patch adds through these heads to <embedding, text>, texts [b, d]."""
    tower = open_tower(model, images=images)
    layers = sorted({layer for layer, _ in heads})
    mask = images.new_zeros(len(layers), len(tower.W_O[0]), dtype=tower.W_O[0].dtype)
    for layer, head in heads:
        mask[layers.index(layer), head] = 1
    found = []
    for i in range(0, len(images), chunk):  # every text is scored on every image of the chunk
        scores = token_scores(model, images[i : i + chunk], texts[i : i + chunk], layers)
        found.append(einsum("bLHNb,LH->bN", scores, mask))
    return torch.cat(found)[:, tower.prefix :].unflatten(1, tower.grid(images))


OURS, OURS_ABS = "decomposition", "decomposition-abs"
DECOMPOSITIONS = {
    OURS: Attribution(decomposition, "dot"),
    # Evidence for or against: a part of the object that speaks for another class is still on the object.
    OURS_ABS: Attribution(lambda *args: decomposition(*args).abs(), "dot"),
}
ATTRIBUTIONS = DECOMPOSITIONS | METHODS
BLOB, RANDOM = "centred blob", "random"  # rows that look at nothing: what a method must beat


def clipped(method: str) -> bool:
    """Are negative values of its maps set to zero before they are scaled? The paper does so with its own."""
    return method == OURS


def signed(method: str) -> bool:
    """Do its maps say by their sign what speaks for the text, and what against it?"""
    return method in (OURS, "lrp", "lrp-conserving")


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


def print_refused(refused: dict[str, str]) -> list[str]:
    """A line for each reason why methods do not support the model, {method: reason}; printed and returned."""
    lines = []
    for reason in dict.fromkeys(refused.values()):
        without = ", ".join(method for method in refused if refused[method] == reason)
        lines.append(f"Without {without}: {reason}")
        print(lines[-1])
    return lines


def maps_of(method: str, job: Job, images: Tensor, indices: Tensor, classes: Tensor, shown: Tensor) -> Tensor:
    """[b, rows, cols] what a method says of the classes shown [b]."""
    if method in (BLOB, RANDOM):
        return sanity(method, images, job.clip, indices, job.args.seed)
    texts = classes[shown]
    if contrasted(method, job.args.contrast):
        texts = texts - classes.mean(dim=0)
    if method in job.more_maps:
        return job.more_maps[method](images, texts)
    return attribute(method, job.clip.model, images, texts, job.args.score)


def contrasted(method: str, contrast: str) -> bool:
    """Does the method explain the class minus the mean over classes?"""
    chosen = contrast == "all" or (contrast == "paper" and method.startswith(OURS))
    return chosen and reads_text(method)


def reads_text(method: str) -> bool:
    """The rows that a pass comes before do; those that look at nothing do not."""
    return ATTRIBUTIONS[method].reads_text if method in ATTRIBUTIONS else method not in (BLOB, RANDOM)


def what_it_explains(method: str, args: Namespace) -> dict[str, str]:
    """The score and the text that a method explains, in words."""
    if not reads_text(method):
        return {"score": "-", "text": "-"}
    score = score_of(method, args.score) if method in ATTRIBUTIONS else "dot"
    return {"score": score, "text": "class - mean" if contrasted(method, args.contrast) else "class"}


def sanity(method: str, images: Tensor, clip: Clip, indices: Tensor, seed: int) -> Tensor:
    """[b, rows, cols] of one of the two rows that look at nothing."""
    rows, cols = open_tower(clip.model).grid(images)
    if method == BLOB:
        # The standard deviation is a quarter of the side.
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, cols), indexing="ij")
        return torch.exp(-2 * (x**2 + y**2)).expand(len(images), -1, -1).to(clip.device)
    return draw((rows, cols), indices, seed).to(clip.device)


def draw(shape: tuple[int, ...], indices: Tensor, seed: int) -> Tensor:
    """[b, *shape] random numbers from 0 to 1: an image's own, whatever the batch size."""
    seeds = [(seed * 1_000_003 + i) % 2**32 for i in indices.tolist()]  # the generator takes 32 bits
    return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
