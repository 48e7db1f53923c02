"""The demo world as data sets: images with labels, and images with masks. Each renders its own pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data import subset
from masks import Masked

from . import ALIGNMENT, scenes


class DemoBirds(Dataset):
    """One split of the demo world. `facts` holds every factor of every image; see scenes.py.

    The train split holds other pictures than the model was trained on, from the same distribution: nearly all
    birds are where such birds live. val and test are balanced: the place says nothing about the bird.
    """

    classes = ("landbird", "waterbird")
    sizes = {"train": 2000, "val": 2000, "test": 4096}  # noqa: RUF012
    seeds = {"train": 31, "val": 32, "test": 61}  # noqa: RUF012 test's is used nowhere else

    def __init__(self, split: str, transform: Callable, limit: int | None = None, seed: int = 0) -> None:
        self.transform, self.seed = transform, self.seeds[split]
        facts = scenes.sample(self.sizes[split], self.seed, alignment=ALIGNMENT if split == "train" else 0.5)
        self.rows = subset(self.sizes[split], limit, seed)
        self.all_facts = facts
        self.facts = {name: torch.from_numpy(values[self.rows]) for name, values in facts.items()}
        self.kinds = scenes.FACTORS["kind"]
        self.y, self.place = (self.facts[name] // scenes.FIRST_WATER for name in ("kind", "place"))
        self.description = f"demo world, {split} split, {len(self.rows):,} images"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.picture(index)), index

    def picture(self, index: int) -> Image.Image:
        """The image before the transform."""
        return Image.fromarray(self.render(index)[0])

    def caption(self, index: int) -> str:
        """What the picture shows, in words."""
        factors = scenes.FACTORS
        kind, colour, place, light, style = (factors[name][int(self.facts[name][index])] for name in factors)
        return f"{colour} {kind}, {place}, {light}, {style}"

    def render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The picture [64, 64, 3], and the bird's mask [64, 64] (0 to 255, soft at the edge)."""
        return scenes.render(self.all_facts, self.rows[index], self.seed)

    def fingerprint(self) -> list:
        """What tells this data set from another: its rows and labels."""
        return [self.rows, self.y.tolist(), self.place.tolist()]


class DemoMasks(Masked):
    """The demo's balanced test split; the mask is the bird, and what an image shows is its kind."""

    def __init__(self, transform: Callable, *limit_and_seed: int, split: str = "test", **options) -> None:
        super().__init__(transform, *limit_and_seed, **options)
        self.birds = DemoBirds(split, transform, self.limit, self.seed)
        self.names, self.labels = list(self.birds.kinds), self.birds.facts["kind"]
        self.rows, self.description = self.birds.rows, self.birds.description

    def pair(self, index: int) -> tuple[Image.Image, np.ndarray]:
        picture, mask = self.birds.render(index)
        return Image.fromarray(picture), (mask > 127).astype(int)  # its edge is soft

    def name(self, index: int) -> str:
        return f"picture {index} of the demo"

    def fingerprint(self) -> list:
        return [self.labels.tolist(), self.birds.fingerprint()]
