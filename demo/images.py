"""The demo world as data sets: images with labels, and images with masks. Each renders its own pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data import Waterbirds, subset
from masks import Masked

from . import ALIGNMENT, scenes
from .writing import WORDS, place, write_on


class DemoBirds(Dataset):
    """One split of the demo world. `facts` holds every factor of every image; see scenes.py.

    The train split holds other pictures than the model was trained on, from the same distribution: nearly all
    birds are where such birds live. val and test are balanced: the place says nothing about the bird.
    """

    classes = ("landbird", "waterbird")
    groups, named = Waterbirds.groups, Waterbirds.named
    place_texts = ("with a land background", "with a water background")
    sizes = {"train": 2000, "val": 2000, "test": 4096}  # noqa: RUF012
    seeds = {"train": 31, "val": 32, "test": 61}  # noqa: RUF012 test's is used nowhere else
    alignment = {"train": ALIGNMENT, "val": 0.5, "test": 0.5}  # noqa: RUF012

    def __init__(self, split: str, transform: Callable, limit: int | None = None, seed: int = 0) -> None:
        self.transform, self.seed = transform, self.seeds[split]
        facts = scenes.sample(self.sizes[split], self.seed, self.alignment[split])
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


class DemoSigns(DemoBirds):
    """The same world with a word on a sign in every picture: the name of a kind of bird; see writing.py.

    In the train and val splits the word is drawn at random. In the test split it is the name of another kind.
    The place says nothing about the bird. `variants` are those of written.py.
    """

    sizes = {"train": 2000, "val": 2000, "test": 2048}  # noqa: RUF012
    seeds = {"train": 33, "val": 34, "test": 63}  # noqa: RUF012 test's is used nowhere else
    alignment = dict.fromkeys(seeds, 0.5)
    variants = ("clean", "attacked", "own", "blank")

    def __init__(self, split: str, transform: Callable, limit: int | None = None, seed: int = 0) -> None:
        super().__init__(split, transform, limit, seed)
        kind, rng = self.all_facts["kind"], np.random.default_rng([self.seed, 2])
        shift = rng.integers(split == "test", len(WORDS), len(kind))  # never 0 for the test split
        self.facts |= {"word": torch.from_numpy((kind + shift) % len(WORDS))[self.rows]}
        self.classes, self.y, self.description = (
            self.kinds,
            self.facts["kind"],
            f"{self.description} with signs",
        )
        self.seen, self.written = self.facts["kind"], self.facts["word"]
        self.drawn: tuple[int, np.ndarray | None] = (-1, None)
        boxes = [place(WORDS[word], self._rng(i)) for i, word in enumerate(self.written)]
        self.boxes = torch.tensor([[top, left, top + h, left + w] for top, left, h, w in boxes]) / scenes.SIZE

    def picture(self, index: int, variant: str = "attacked") -> Image.Image:
        if self.drawn[0] != index:
            self.drawn = index, self.render(index)[0]  # its variants are asked for one after the other
        _, picture = self.drawn
        word = int(self.facts["kind" if variant == "own" else "word"][index])
        if variant != "clean":
            picture = write_on(picture, WORDS[word], self._rng(index), blank=variant == "blank")
        return Image.fromarray(picture)

    def load(self, index: int, variant: str) -> Tensor:
        """The transformed image in one of its variants."""
        return self.transform(self.picture(index, variant))

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, 3, self.rows[index]])

    def caption(self, index: int) -> str:
        return f"{super().caption(index)}, says {WORDS[int(self.written[index])]}"

    def fingerprint(self) -> list:
        return [*super().fingerprint(), self.written.tolist()]


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
