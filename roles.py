# MIT licence, copyright (c) 2026 The TextSpan reference authors; see LICENSE.
"""Give each head a role: the category of texts that explains what it writes, where one does.

Reading a head's list of texts is subjective, and its longest category often wins by size alone. Here every
category is asked the same question: give each image the category's text that fits it best; how much of the
head's variance lies between images of different text? The best of many explains something of any head, so
the same is asked with the texts dealt to the categories at random.

    roles = find_roles(values, maps, embedding, texts, categories)   # of some thousand images; no labels
    roles.name(layer, head)                                          # "places", or None

This is the rule by which cue.py finds the heads of a cue, for all categories at once; the file needs cue.py
and torch. Axes as in decompose.py; c categories, n images, t texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cue import THRESHOLD, share_between

DRAWS = 40  # deals of the texts: the real bank is the best of 41 by chance for fewer than one head in 32
ROUNDING = 1e-4  # of shares


@dataclass(frozen=True)
class Roles:
    """How far each category explains each head, beside the most that any category does by chance."""

    categories: list[str]
    share: Tensor  # [c, L, H] of the head's variance that lies between images of different text
    halves: Tensor  # [2, c, L, H] the same in each half of the images
    bar: Tensor  # [L, H] the largest share of any category, over all deals of the texts at random
    used: list[int]  # texts of each category that fit some image best

    def name(self, layer: int, head: int) -> str | None:
        """The role: the category that explains most, if that is over THRESHOLD and the bar; else None.

        None, too, where another category, or none over THRESHOLD, explains most in one half of the images.
        The bar makes this a permutation test of the largest share, at 1 / (1 + number of deals) for a head.
        """
        share, bar = self.share[:, layer, head], float(self.bar[layer, head]) + ROUNDING
        best = int(share.argmax())
        halves = self.halves[:, :, layer, head]
        same = bool(((halves.argmax(dim=1) == best) & (halves.amax(dim=1) > THRESHOLD)).all())
        return self.categories[best] if same and share[best] > max(THRESHOLD, bar) else None


def find_roles(
    values: Tensor,
    maps: Tensor,
    embedding: Tensor,
    texts: Tensor,
    categories: Sequence[str],
    draws: int = DRAWS,
    seed: int = 0,
) -> Roles:
    """Ask every category of the bank.

    Args:
        values: [n, L, H, e] what decompose.decompose gives, of images in any order.
        maps: [L, H, e, d] from decompose.head_maps.
        embedding: [n, d] of the same images.
        texts: [t, d] unit vectors.
        categories: of each text.
        draws: times that the texts are dealt to the categories at random, which keep their sizes.
    """
    names, written = list(dict.fromkeys(categories)), in_own_space(values, maps)
    # Centred: some texts are near to every image, and would be the label of all of them.
    embedding = embedding.float().cpu()
    fit = (embedding - embedding.mean(dim=0)) @ texts.float().cpu().T  # [n, t]
    own = [torch.tensor([i for i, category in enumerate(categories) if category == name]) for name in names]
    labels = [fit[:, members].argmax(dim=1) for members in own]
    share_of, generator = explainer(written), torch.Generator().manual_seed(seed)
    share, halves = torch.stack([share_of(label) for label in labels]), []
    for rows in torch.randperm(len(written), generator=generator).tensor_split(2):
        share_of_half = explainer(written[rows])
        halves.append(torch.stack([share_of_half(label[rows]) for label in labels]))
    bar = torch.zeros(share.shape[1:])
    for _ in range(draws):
        order = torch.randperm(len(categories), generator=generator)  # one shuffle serves every category
        for members in order.split([len(members) for members in own]):
            bar = bar.maximum(share_of(fit[:, members].argmax(dim=1)))
    return Roles(names, share, torch.stack(halves), bar, [len(label.unique()) for label in labels])


def in_own_space(values: Tensor, maps: Tensor) -> Tensor:
    """[n, L, H, e] float32: the heads' terms in e dimensions instead of d, with the same lengths and angles.

    A term is x A. With S S' = A A', x S has its lengths and angles. An eigendecomposition finds S for all
    heads at once, singular ones too (Moments.factor in textspan.py is for one large matrix of low rank).
    """
    maps = maps.float().cpu()
    strength, basis = torch.linalg.eigh((maps @ maps.mT).double())
    S = (basis * strength.clamp_min(0).sqrt()[..., None, :]).float()
    return torch.einsum("nLHe,LHef->nLHf", values.float().cpu(), S)


def explained(written: Tensor, label: Tensor) -> Tensor:
    """[L, H] share of the variance of written [n, L, H, e] between images of different label [n]."""
    return explainer(written)(label)


def explainer(written: Tensor) -> Callable[[Tensor], Tensor]:
    """`explained` of these values, for many labels: the deviations are computed once."""
    mean = written.mean(dim=0)
    deviations = (written - mean).contiguous()
    total = deviations.square().sum(dim=0).sum(dim=-1)

    def share(label: Tensor) -> Tensor:
        count = torch.bincount(label)
        by_label = torch.zeros(len(count), *mean.shape).index_add_(0, label, deviations)
        return share_between(by_label, count, total, mean)

    return share
