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

from .accumulators import Accumulator, Largest, Rows, Sums
from .job import Job, open_split
from .passes import one_pass

CENTRE_IMAGES = 512


@dataclass
class Reference:
    """What the reference images say of every term; None for a term that the model does not have."""

    values: Moments  # of every head's values, [L, H, e]
    mlps: Tensor  # [L, d] mean
    stem: Tensor  # [d] mean
    own: Tensor | None  # [L, H, e] mean of what the class token's attention to itself adds to the values
    embedding: Moments  # [d]
    maps: Tensor  # [L, H, e, d] from values to terms, on the model's device
    error: float  # largest relative error of the sum of terms
    description: str
    pool: Tensor | None = None  # [d] mean of what attention pooling's own MLP adds

    def sum_error(self) -> str:
        """For the settings above a table."""
        return f"the terms sum to the embedding within {self.error:.0e} of its largest entry"


class Kept:
    """The values and embeddings of some images of a pass: memory does not grow with the number of images.

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
    job: Job, extra: Accumulator | None = None, data: Dataset | None = None, update: Callable | None = None
) -> Reference:
    """One pass over the reference images.

    Args:
        extra: a further accumulator of the pass.
        data: these images in place of the --reference split.
        update: called with every batch's terms and indices; by default the accumulator's own `update`.
    """
    data = open_split(job, job.args.reference) if data is None else data
    update = update or getattr(extra, "update", None)
    maps = head_maps(job.clip.model)
    depth, heads, width, dim = maps.shape
    values, embedding, sums, errors = Moments(width, (depth, heads)), Moments(dim), Sums(), Largest()
    accumulators = [values, embedding, sums, errors, *([] if extra is None else [extra])]
    for images, indices in one_pass(job, data, f"reference ({job.args.reference})", *accumulators):
        terms = decompose(job.clip.model, images)
        job.check_finite(terms.embedding)
        errors.add("sum of terms", terms.error())
        values.update(terms.values)
        embedding.update(terms.embedding.float())
        for name in ("mlps", "stem", "own", "pool"):  # of these, only the mean is needed
            if getattr(terms, name) is not None:
                sums.add(name, getattr(terms, name).cpu().double().sum(dim=0))
        if update is not None:
            update(terms, indices)
    means = {"own": None} | {name: (total / len(data)).to(maps) for name, total in sums.sums.items()}
    found = {"values": values, "embedding": embedding, "maps": maps, "error": errors.largest["sum of terms"]}
    return Reference(**found, description=data.description, **means)


def check_varies(variance: float, description: str) -> None:
    """Refuse reference images that all have the same embedding."""
    if not variance > 0:
        raise InputError(f"the reference images ({description}) all have the same embedding; raise --limit")


def centre(job: Job, data: Dataset) -> Tensor:
    """[d] the mean embedding of some of these images, drawn at random: data sets come sorted by class."""
    few = Subset(data, subset(len(data), CENTRE_IMAGES, job.args.seed))
    total = Sums()
    for images, _ in one_pass(job, few, "centre", total):
        total.add("embedding", decompose(job.clip.model, images).embedding.cpu().double().sum(dim=0))
    return (total["embedding"] / len(few)).float().to(job.clip.device)
