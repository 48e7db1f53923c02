"""What the reference images say of every term: means, and moments of every head's values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data import subset
from decompose import Decomposition, decompose, head_maps
from files import InputError
from textspan import Moments

from .accumulators import Accumulator, Rows, Sums
from .job import Job
from .passes import one_pass
from .splits import open_split

MEANS = ("mlps", "stem", "own", "pool")  # terms of which only the mean is needed
CENTRE_IMAGES = 512


@dataclass
class Reference:
    """Moments and means over the reference images. While the pass runs, the means are sums."""

    values: Moments  # of every head's values, [L, H, e]
    mlps: Tensor | None  # [L, d] mean
    stem: Tensor | None  # [d] mean
    # [L, H, e] mean of what the class token's attention to itself adds to the values, where a class token is
    # read
    own: Tensor | None
    embedding: Moments  # [d]
    maps: Tensor  # [L, H, e, d] from values to terms, on the model's device
    error: float  # largest relative error of the sum of terms
    description: str
    pool: Tensor | None = None  # [d] mean of what attention pooling's own MLP adds, where there is one
    state_names = ("values", "embedding", *MEANS, "error")

    def update(self, terms: Decomposition) -> None:
        """Add images."""
        self.error = max(self.error, terms.error())
        self.values.update(terms.values)
        self.embedding.update(terms.embedding.float())
        present = {name: x for name in MEANS if (x := getattr(terms, name)) is not None}
        self.add({name: x.sum(dim=0, dtype=torch.float64).cpu() for name, x in present.items()})

    def merge(self, other: Reference) -> None:
        """Add what `other` has seen."""
        self.values.merge(other.values)
        self.embedding.merge(other.embedding)
        self.add({name: getattr(other, name) for name in MEANS})
        self.error = max(self.error, other.error)

    def add(self, sums: dict[str, Tensor | None]) -> None:
        """Add sums of terms over images, by name; None where the model has no such term."""
        for name, x in sums.items():
            so_far = getattr(self, name)
            if x is not None:
                setattr(self, name, x if so_far is None else so_far + x)

    def divide(self, count: int) -> None:
        """From sums to means, when the pass is finished."""
        for name in MEANS:
            if getattr(self, name) is not None:
                setattr(self, name, (getattr(self, name) / count).to(self.maps))

    def total_variance(self) -> float:
        """Variance of the embedding over the images, summed over its axes.

        Raises:
            InputError: all images have the same embedding.
        """
        total = float(self.embedding.covariance.trace())
        check_varies(total, self.description)
        return total

    def sum_error(self) -> str:
        """For the settings above a table."""
        return f"the terms sum to the embedding within {self.error:.0e} of its largest entry"


def check_varies(variance: float, description: str) -> None:
    """Refuse reference images that all have the same embedding."""
    if not variance > 0:
        raise InputError(f"the reference images ({description}) all have the same embedding; raise --limit")


class Kept:
    """The values and embeddings of some images of a pass, so that memory does not grow with the number of images.

    Args:
        count: number of images of the data set.
        limit: how many of them to keep, drawn with the seed.
        layers: the layers whose heads' values are kept, in the heads' own space.
    """

    state_names = ("values", "embedding")

    def __init__(self, count: int, limit: int, seed: int, layers: slice) -> None:
        self.rows = subset(count, limit, seed)
        self.values = Rows()  # [n, l, H, e]
        self.embedding = Rows()  # [n, d]
        self._layers = layers
        self._wanted = torch.zeros(count, dtype=torch.bool)
        self._wanted[self.rows] = True

    def update(self, terms: Decomposition, indices: Tensor) -> None:
        """Add images, by their indices in the data set."""
        mine = self._wanted[indices].to(terms.values.device)
        self.values.add(terms.values[mine][:, self._layers])
        self.embedding.add(terms.embedding[mine].float())

    def merge(self, other: Kept) -> None:
        """Add what `other` has seen, of images that come later."""
        self.values.merge(other.values)
        self.embedding.merge(other.embedding)


def summarise(
    job: Job,
    accumulator: Accumulator | None = None,
    data: Dataset | None = None,
    update: Callable[[Decomposition, Tensor], None] | None = None,
) -> Reference:
    """One pass over the reference images.

    Args:
        accumulator: a further accumulator of the pass.
        data: these images in place of the --reference split.
        update: called with every batch's terms and indices; by default the accumulator's own `update`.
    """
    data = open_split(job, job.args.reference) if data is None else data
    maps = head_maps(job.clip.model)
    depth, heads, width, dim = maps.shape
    values = Moments(width, (depth, heads))
    reference = Reference(values, None, None, None, Moments(dim), maps, 0.0, data.description)
    update = getattr(accumulator, "update", None) if update is None else update
    accumulators = [reference] if accumulator is None else [reference, accumulator]
    for images, indices in one_pass(job, data, f"reference ({job.args.reference})", *accumulators):
        terms = decompose(job.clip.model, images)
        job.check_finite(terms.embedding)
        reference.update(terms)
        if update is not None:
            update(terms, indices)
    reference.divide(len(data))
    return reference


def centre(job: Job) -> Tensor:
    """[d] the mean embedding of some reference images, drawn at random: data sets come sorted by class."""
    data = open_split(job, job.args.reference)
    few = Subset(data, subset(len(data), CENTRE_IMAGES, job.args.seed))
    total = Sums()
    for images, _ in one_pass(job, few, "centre", total):
        total.add("embedding", decompose(job.clip.model, images).embedding.double().sum(dim=0))
    return (total["embedding"] / len(few)).float().to(job.clip.device)
