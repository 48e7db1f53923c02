"""Give each head a role: the category of texts that explains what it writes, where one does.

Reading a head's list of texts takes an expert, and its longest category often wins by size alone. Here every category is asked the
same question: give each image the category's text that fits it best; how much of the head's variance lies between images of
different text? A random set of as many texts, drawn from the whole bank, is asked too.

    roles = find_roles(values, maps, embedding, texts, categories)   # of some thousand images; no labels
    roles.name(layer, head)                                          # "places", or None

This is the rule by which cue.py finds the heads of a cue, for all categories at once. Axes as in decompose.py; c categories,
n images, t texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cue import THRESHOLD, corrected

NEGLIGIBLE = 1e-12  # variance over squared mean: values come in float32
ROUNDING = 1e-4  # of shares


@dataclass(frozen=True)
class Roles:
    """How far each category explains each head."""

    categories: list[str]
    share: Tensor  # [c, L, H] of the head's variance, between images of different text, corrected for the number of texts
    chance: Tensor  # [c, L, H] the same for random sets of as many texts, the mean over draws
    stable: Tensor  # [L, H] share of bootstrap samples of the images that give the same role

    def name(self, layer: int, head: int) -> str | None:
        """The role; None where no category explains over THRESHOLD, or not more than a random set of as many texts does."""
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
        order = torch.randperm(
            len(categories), generator=generator
        )  # one shuffle is a random set for every category
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
    """[n, L, H, e] float32: the heads' terms up to a rotation, so with their lengths and angles, in e dimensions instead of d."""
    maps = maps.float().cpu()
    return torch.einsum("nLHe,LHef->nLHf", values.float().cpu(), _factor(maps @ maps.mT))


def explained(written: Tensor, label: Tensor) -> Tensor:
    """[L, H] share of the variance of written [n, L, H, e] between images of different label, corrected for the number of labels."""
    mean = written.mean(dim=0)
    flat = (written - mean).flatten(1)
    count = torch.bincount(label)
    sums = torch.zeros(len(count), flat.shape[1]).index_add_(0, label, flat)
    seen = count > 0
    between = (sums[seen].square() / count[seen, None]).sum(dim=0).view(written.shape[1:]).sum(dim=-1)
    total = flat.square().sum(dim=0).view(written.shape[1:]).sum(dim=-1)
    varies = total > NEGLIGIBLE * len(written) * mean.square().sum(
        dim=-1
    )  # else the head always writes the same, but for rounding
    return torch.where(varies, corrected(between, total, len(written), int(seen.sum())), 0.0)


def _name(names: list[str], share: Tensor, chance: Tensor) -> str | None:
    best = int(share.argmax())
    return names[best] if share[best] > max(THRESHOLD, float(chance[best]) + ROUNDING) else None


def _factor(gram: Tensor) -> Tensor:
    """[..., e, e] F with F F' = gram, also where gram is singular."""
    strength, basis = torch.linalg.eigh(gram.double())
    return (basis * strength.clamp_min(0).sqrt()[..., None, :]).to(gram.dtype)
