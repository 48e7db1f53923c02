"""--task neurons --order 2: the main direction of what a neuron adds through later heads, and its texts.

A neuron's second-order effect is a vector for each image (neurons.second_order). Its main direction is the
first principal axis of these vectors over the reference images, as in Gandelsman et al.,
https://arxiv.org/abs/2406.04341. They take the 100 images of largest effect; a variance weights an image by the
square of the effect, so here all are taken. As in their paper, orthogonal matching pursuit names the direction:
a sum of few texts, each of which is picked for what the ones before it leave over.

Axes as in decompose.py; n neurons, r later heads.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cue import THRESHOLD
from demo.truth import AGREEMENTS, agreement
from neurons import Neurons
from roles import explained
from zeroshot import Bank

if TYPE_CHECKING:
    from .neurons import Activity

NAMES = ("its first text", "all its texts, by squared coefficients", "texts dealt at random")


class MainAxes:
    """The main direction of every neuron's effect, from the Activity of the reference images.

    Args:
        texts: [t, d] of the bank.
        size: number of texts to name a direction with.
    """

    def __init__(self, activity: Activity, texts: Tensor, bank: Bank, size: int) -> None:
        self.bank, self.size = bank, size
        self.texts = F.normalize(texts - texts.mean(dim=0), dim=1)  # less what all texts share
        directions = torch.stack([activity.direction(j) for j in range(len(activity.maps))])
        self.directions = F.normalize(directions, dim=1)  # [n, d]
        self.reads = torch.einsum("nrd,nd->nr", activity.maps, self.directions.to(activity.maps))
        reads, covariance = self.reads.double().cpu(), activity.rows.covariance
        variance = (covariance * activity.gram.cpu()).sum(dim=(1, 2))
        self.share = torch.einsum("nr,nrs,ns->n", reads, covariance, reads) / variance  # [n]

    def along(self, found: Neurons) -> Tensor:
        """[b, n] how far each neuron's effect goes along its direction."""
        return torch.einsum("brn,nr->bn", found.activations, self.reads)

    def describe(self, j: int) -> dict:
        """What --order 2 says of neuron j beside what --order 1 does."""
        picked, coefficients = pursuit(self.directions[j], self.texts, self.size)
        named = [(self.bank.texts[i], float(c)) for i, c in zip(picked, coefficients, strict=True)]
        return {"share": float(self.share[j]), "direction": named}

    def truth(self, fired: Tensor, facts: dict[str, Tensor]) -> dict:
        """How often the texts' category is the demo's factor that explains most of the effect of a neuron.

        fired: [images, n] what `along` gave, of images that had no part in finding the directions.
        """
        named = []
        for direction in self.directions:
            picked, coefficients = pursuit(direction, self.texts, self.size)
            categories, weights = [self.bank.categories[i] for i in picked], Counter()
            for category, coefficient in zip(categories, coefficients.square().tolist(), strict=True):
                weights[category] += coefficient
            named.append({"role": categories[0], "texts by category": weights})
        shares = {factor: explained(fired[:, None, :, None], values)[0] for factor, values in facts.items()}
        counts = agreement(shares, named)
        right = {name: counts[key] for name, key in zip(NAMES, AGREEMENTS, strict=True)}
        return {"neurons": counts["heads"], "clear neurons": counts["clear heads"], "right": right}


def pursuit(direction: Tensor, texts: Tensor, size: int) -> tuple[list[int], Tensor]:
    """A direction [d] as a sum of few texts [t, d]: which, and their coefficients."""
    picked, left, coefficients = [], direction, direction[:0]
    for _ in range(min(size, len(texts))):
        fit = (texts @ left).abs()
        fit[picked] = -1
        picked.append(int(fit.argmax()))
        coefficients = torch.linalg.lstsq(texts[picked].T, direction[:, None]).solution[:, 0]
        left = direction - coefficients @ texts[picked]
    return picked, coefficients


def truth_in_words(counts: dict) -> list[list[str]]:
    """Rows of a table, its header first."""
    clear = counts["clear neurons"]
    over = f"a factor explains over {THRESHOLD:.0%} of {clear} of {counts['neurons']} neurons; named by"
    right = [[name, f"{n:.1f} of {clear}", f"{n / max(clear, 1):.0%}"] for name, n in counts["right"].items()]
    return [[over, "right", ""], *right]
