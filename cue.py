# MIT licence, copyright (c) 2026 The TextSpan reference authors; see LICENSE.
"""Find the heads that look at a cue, and take the cue out of them; with neither labels nor a language model.

A cue is a handful of texts ("in a forest", "at sea", ...). Every image of an unlabelled reference set gets as
a pseudo-label the text that fits it better than it fits other images. A head looks at the cue when these
pseudo-labels explain enough of the variance of what it writes. This file needs torch alone.

    votes = CueVotes(texts, maps, centre)    # [t, d], [L, H, e, d] from decompose.head_maps, [d]
    for batch in ...: votes.update(terms.embedding, terms.values)
    votes.explained(moments)                 # [L, H]; heads above THRESHOLD
    subspace(texts)                          # [k, d] the directions in which the texts differ

Axes as in decompose.py; t texts, g groups of images.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

THRESHOLD = 0.3  # share of its variance from which a head looks at the cue; chosen before the demo was made
NEGLIGIBLE = 1e-12  # a variance below this share of the squared mean is rounding error: values are float32


class Moments(Protocol):
    """What `CueVotes.explained` reads of textspan.Moments."""

    mean: Tensor  # [L, H, e]
    scatter: Tensor  # [L, H, e, e] sum over images of (x - mean)(x - mean)'


class CueVotes:
    """Sums of every head's values by pseudo-label, which do not grow with the number of images, and merge.

    Args:
        texts: [t, d] the cue's texts, unit vectors: longer ones would win more votes.
        maps: [L, H, e, d] from values to terms.
        centre: [d] a mean embedding of such images. Some texts ("near the water") are near to images at
            large; without the centre those win most votes, and the pseudo-labels say little.
    """

    state_names = ("count", "sum", "embedding")  # what changes, for whoever saves them

    def __init__(self, texts: Tensor, maps: Tensor, centre: Tensor) -> None:
        depth, heads, width, _ = maps.shape
        self.texts, self.maps, self.centre = texts, maps, centre.to(texts)
        self.count = torch.zeros(len(texts), dtype=torch.float64)
        self.sum = torch.zeros(len(texts), depth, heads, width, dtype=torch.float64)
        self.embedding = torch.zeros(*texts.shape, dtype=torch.float64)  # [t, d] the sum of the embeddings

    def update(self, embedding: Tensor, values: Tensor) -> None:
        """Add images: embedding [b, d], values [b, L, H, e]."""
        label = self.labels(embedding).cpu()
        self.count.index_add_(0, label, torch.ones(len(label), dtype=torch.float64))
        self.sum.index_add_(0, label, values.cpu().double())
        self.embedding.index_add_(0, label, embedding.cpu().double())

    def merge(self, other: CueVotes) -> None:
        """Add what `other` has seen."""
        self.count, self.sum = self.count + other.count, self.sum + other.sum
        self.embedding = self.embedding + other.embedding

    def labels(self, embedding: Tensor) -> Tensor:
        """[b] each image's pseudo-label, an index into the texts."""
        return ((embedding.to(self.texts) - self.centre) @ self.texts.T).argmax(dim=1)

    def explained(self, moments: Moments) -> Tensor:
        """[L, H] share of the variance of each head's term between pseudo-labels; moments of the images."""
        A = self.maps.cpu().double()
        deviations = self.sum - self.count[:, None, None, None] * moments.mean
        total = (A @ A.mT * moments.scatter).sum(dim=(-2, -1))  # |x A|^2 = x A A' x'
        mean = torch.einsum("LHe,LHed->LHd", moments.mean, A)
        return share_between(torch.einsum("gLHe,LHed->gLHd", deviations, A), self.count, total, mean)


def share_between(deviations: Tensor, count: Tensor, total: Tensor, mean: Tensor) -> Tensor:
    """[...] share of the variance over images of vectors [..., c] that lies between groups of images.

    Chance alone gives g groups of n images a share of (g - 1) / (n - 1); the correction (epsilon squared,
    Kelley 1935) makes it 0. It is 0, too, where every image is a group of its own, which nothing tells from
    chance, and where all vectors are the same but for rounding.

    Args:
        deviations: [g, ..., c] sum over each group's images of the vector less the mean of all.
        count: [g] images of each group.
        total: [...] sum over all images of the squared length of that difference.
        mean: [..., c] of all images.
    """
    images, present = int(count.sum()), count > 0
    groups = int(present.sum())
    if images <= groups:
        return torch.zeros_like(total)
    per_image = count[present].view(-1, *[1] * mean.ndim)
    between = (deviations[present].square() / per_image).sum(dim=0).sum(dim=-1)
    within = (total - between) / (images - groups)
    share = (1 - within * (images - 1) / total).clamp_min(0)
    return torch.where(total > NEGLIGIBLE * images * mean.square().sum(dim=-1), share, 0.0)


def subspace(texts: Tensor, share: float = 0.95) -> Tensor:
    """[k, d] orthonormal directions in which the texts differ, as many as hold `share` of their variance."""
    rows = texts.cpu().double()  # first to the CPU: not every device has float64
    _, strength, directions = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    directions = directions[strength.square() > NEGLIGIBLE * rows.square().sum()]
    held = strength.square().cumsum(0) / strength.square().sum()
    return directions[: int((held < share).sum()) + 1].to(texts)
