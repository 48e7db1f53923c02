# MIT licence, copyright (c) 2026 The TextSpan reference authors; see LICENSE.
"""Give each head a role: the category of texts that explains what it writes, where one does.

Reading a head's list of texts is subjective, and its longest category often wins by size alone. Here every
category is asked the same question: give each image the category's text that fits it best; how much of the
head's variance lies between images of different text? A random set of as many texts, drawn from the whole
bank, is asked too.

    roles = find_roles(values, maps, embedding, texts, categories)   # of some thousand images; no labels
    roles.name(layer, head)                                          # "places", or None

This is the rule by which cue.py finds the heads of a cue, for all categories at once; the file needs cue.py
and torch. Axes as in decompose.py; c categories, n images, t texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cue import THRESHOLD, share_between

ROUNDING = 1e-4  # of shares


@dataclass(frozen=True)
class Roles:
    """How far each category explains each head, corrected for the number of its texts."""

    categories: list[str]
    share: Tensor  # [c, L, H] of the head's variance that lies between images of different text
    chance: Tensor  # [c, L, H] the same for random sets of as many texts, the mean over draws
    stable: Tensor  # [L, H] share of bootstrap samples of the images that give the same role

    def name(self, layer: int, head: int) -> str | None:
        """The role; None where no category explains over THRESHOLD, or more than as many random texts do."""
        return _name(self.categories, self.share[:, layer, head], self.chance[:, layer, head])


def find_roles(
    values: Tensor,
    maps: Tensor,
    embedding: Tensor,
    texts: Tensor,
    categories: Sequence[str],
    draws: int = 5,
    bootstraps: int = 20,
    seed: int = 0,
) -> Roles:
    """Ask every category of the bank.

    Args:
        values: [n, L, H, e] what decompose.decompose gives, of images in any order.
        maps: [L, H, e, d] from decompose.head_maps.
        embedding: [n, d] of the same images.
        texts: [t, d] unit vectors.
        categories: of each text.
        draws: random sets of texts for each category.
        bootstraps: samples of the images, drawn with replacement.
    """
    names, written = list(dict.fromkeys(categories)), in_own_space(values, maps)
    # Centred: some texts are near to every image, and would be the label of all of them.
    embedding = embedding.float().cpu()
    fit = (embedding - embedding.mean(dim=0)) @ texts.float().cpu().T  # [n, t]
    own = [torch.tensor([i for i, category in enumerate(categories) if category == name]) for name in names]
    labels = [fit[:, members].argmax(dim=1) for members in own]
    share = torch.stack([explained(written, label) for label in labels])
    generator = torch.Generator().manual_seed(seed)
    chance = torch.zeros_like(share)
    for _ in range(draws):
        order = torch.randperm(len(categories), generator=generator)  # one shuffle serves every category
        for c, members in enumerate(order.split([len(members) for members in own])):
            chance[c] += explained(written, fit[:, members].argmax(dim=1)) / draws
    stable, heads = torch.zeros(share.shape[1:]), share.shape[1:].numel()
    found = [_name(names, share.flatten(1)[:, i], chance.flatten(1)[:, i]) for i in range(heads)]
    for _ in range(bootstraps):
        rows = torch.randint(len(written), (len(written),), generator=generator)
        again = torch.stack([explained(written[rows], label[rows]) for label in labels]).flatten(1)
        same = [_name(names, again[:, i], chance.flatten(1)[:, i]) == found[i] for i in range(heads)]
        stable += torch.tensor(same).view_as(stable) / bootstraps
    return Roles(names, share, chance, stable)


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
    mean = written.mean(dim=0)
    deviations = (written - mean).contiguous()
    count = torch.bincount(label)
    by_label = torch.zeros(len(count), *mean.shape).index_add_(0, label, deviations)
    return share_between(by_label, count, deviations.square().sum(dim=0).sum(dim=-1), mean)


def _name(names: list[str], share: Tensor, chance: Tensor) -> str | None:
    best = int(share.argmax())
    return names[best] if share[best] > max(THRESHOLD, float(chance[best]) + ROUNDING) else None
