"""--task neurons --order 2: the main direction of what a neuron adds through later heads, and its texts.

A neuron's second-order effect is a vector for each image (neurons.second_order). Its main direction is the
first principal axis of these vectors over the reference images, as in Gandelsman et al.,
https://arxiv.org/abs/2406.04341. They take the 100 images of largest effect; a variance weights each image by
its squared effect, so here all are taken. As in their paper, orthogonal matching pursuit names the direction:
a sum of few texts, each of which is picked for what the ones before it leave over.

Axes as in decompose.py; n neurons, r later heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from neurons import Neurons
from zeroshot import Bank

if TYPE_CHECKING:
    from .neurons import Activity

DIRECTION = """Effect: the length of what a neuron adds through later heads. Direction: the one along which it
varies most over images, with its share of the variance, as a sum of texts."""


class MainAxes:
    """The main direction of every neuron's effect, from what the reference images say of it."""

    def __init__(self, activity: Activity, texts: Tensor, bank: Bank) -> None:
        self.bank, self.texts = bank, F.normalize(texts - texts.mean(dim=0), dim=1)  # less what all share
        self.directions = activity.directions()  # [n, d]
        self.reads = torch.einsum("nrd,nd->nr", activity.maps, self.directions.to(activity.maps))
        reads, covariance = self.reads.double().cpu(), activity.rows.covariance
        variance = (covariance * activity.gram.cpu()).sum(dim=(1, 2))
        self.share = torch.einsum("nr,nrs,ns->n", reads, covariance, reads) / variance  # [n]

    def along(self, found: Neurons) -> Tensor:
        """[b, n] how far each neuron's effect goes along its direction."""
        return torch.einsum("brn,nr->bn", found.activations, self.reads)

    def describe(self, j: int, size: int) -> dict:
        """The share of the variance of neuron j's effect along its direction, and texts whose sum this is."""
        named = [(self.bank.texts[i], c) for i, c in pursuit(self.directions[j], self.texts, size)]
        return {"share": float(self.share[j]), "direction": named}

    def categories(self) -> list[str]:
        """The category of the first text of every neuron's direction."""
        return [self.bank.categories[pursuit(x, self.texts, 1)[0][0]] for x in self.directions]


def pursuit(direction: Tensor, texts: Tensor, size: int) -> list[tuple[int, float]]:
    """A direction [d] as a sum of few texts [t, d] of unit length: which, and their coefficients."""
    picked, coefficients, left = [], direction[:0], direction
    for _ in range(min(size, len(texts))):
        fit = (texts @ left).abs()
        fit[picked] = -1
        picked.append(int(fit.argmax()))
        coefficients = torch.linalg.lstsq(texts[picked].T, direction[:, None]).solution[:, 0]
        left = direction - coefficients @ texts[picked]
    return list(zip(picked, coefficients.tolist(), strict=True))
