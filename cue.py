"""Find the heads that look at a cue, and take the cue out of them; with neither labels nor a language model.

A cue is a handful of texts ("in a forest", "at sea", ...). Every image of an unlabelled reference set gets as a pseudo-label the text
that fits it better than it fits other images; a head looks at the cue when these pseudo-labels explain enough of the variance of what
it writes.

    votes = CueVotes(texts, maps, centre)               # texts [t, d], maps [L, H, e, d] from decompose.head_maps, centre [d]
    for batch in ...: votes.update(terms.embedding, terms.values)
    votes.explained(moments)                            # [L, H]; heads above THRESHOLD
    subspace(texts)                                     # [k, d] the directions in which the texts differ

Axes as in decompose.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from textspan import Moments

THRESHOLD = 0.3  # of a head's variance; set before the demo's model was trained


class CueVotes:
    """Sums of every head's values by pseudo-label; memory does not grow with the number of images, and sums of several sets merge.

    Args:
        texts: [t, d] the cue's texts, unit vectors: longer ones would win more votes.
        maps: [L, H, e, d] from values to terms.
        centre: [d] a mean embedding of such images. Texts differ in how near they are to images at large ("near the water" is near to
            everything); without the centre those win most votes, and the pseudo-labels say little.
    """

    state_names = ("count", "sum")  # what changes, for whoever saves them

    def __init__(self, texts: Tensor, maps: Tensor, centre: Tensor) -> None:
        depth, heads, width, _ = maps.shape
        self.texts, self.maps, self.centre = texts, maps, centre.to(texts)
        self.count = torch.zeros(len(texts), dtype=torch.float64)
        self.sum = torch.zeros(len(texts), depth, heads, width, dtype=torch.float64)

    def update(self, embedding: Tensor, values: Tensor) -> None:
        """Add images: embedding [b, d], values [b, L, H, e]."""
        label = self.labels(embedding).cpu()
        self.count.index_add_(0, label, torch.ones(len(label), dtype=torch.float64))
        self.sum.index_add_(0, label, values.cpu().double())

    def merge(self, other: CueVotes) -> None:
        """Add what `other` has seen."""
        self.count, self.sum = self.count + other.count, self.sum + other.sum

    def labels(self, embedding: Tensor) -> Tensor:
        """[b] each image's pseudo-label, an index into the texts."""
        return ((embedding.to(self.texts) - self.centre) @ self.texts.T).argmax(dim=1)

    def explained(self, moments: Moments) -> Tensor:
        """[L, H] share of the variance of each head's term that lies between pseudo-labels, corrected for their number.

        Args:
            moments: of the same images' values.
        """
        A = self.maps.cpu().double()
        gram = A @ A.mT  # [L, H, e, e]: lengths of terms, from values
        seen = self.count > 0
        shift = self.sum[seen] / self.count[seen, None, None, None] - moments.mean  # [k, L, H, e]
        between = torch.einsum("k,kLHe,LHef,kLHf->LH", self.count[seen], shift, gram, shift)
        total = (gram * moments.scatter).sum(dim=(-2, -1))
        share = corrected(between, total, moments.count, int(seen.sum()))
        mean = torch.einsum("LHe,LHef,LHf->LH", moments.mean, gram, moments.mean)
        return torch.where(
            total > 1e-12 * moments.count * mean, share, 0.0
        )  # a head that always writes the same has no share


def corrected(between: Tensor, total: Tensor, images: int, groups: int) -> Tensor:
    """Share between / total of a variance over images that lies between groups of them, 0 where the groups are as good as random.

    Chance alone gives k groups of n images a share of (k - 1) / (n - 1); the correction (epsilon squared, Kelley 1935) makes it 0.
    Where every image is a group of its own, nothing is left to tell them from chance: 0, too.
    """
    if images <= groups:
        return torch.zeros_like(total)
    within = (total - between) / (images - groups)
    return (1 - within * (images - 1) / total).clamp_min(0)


def subspace(texts: Tensor, share: float = 0.95) -> Tensor:
    """[k, d] orthonormal directions in which the texts differ from each other, as many as hold `share` of their variance."""
    rows = texts.double()
    _, strength, directions = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    directions = directions[strength > 1e-6 * rows.norm()]  # the rest is rounding: texts come in float32
    held = strength.square().cumsum(0) / strength.square().sum()
    return directions[: int((held < share).sum()) + 1].to(texts)
