"""What the reference images say of every term: means, and moments of every head's values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, einsum, nn
from torch.utils.data import Dataset, Subset

from data import subset
from decompose import Decomposition, decompose, head_maps, open_tower
from files import InputError
from textspan import Moments

from .accumulators import Accumulator, Largest, Rows, Sums
from .job import Job, open_split
from .passes import one_pass

CENTRE_IMAGES = 512


@dataclass
class Reference:
    """What the reference images say of every term; None for a term that the model does not have."""

    values: Moments | Mean  # of every head's values, [L, H, e]; the authors' terms: of the terms, [L, H, d]
    mlps: Tensor  # [L, d] mean
    stem: Tensor  # [d] mean
    own: Tensor | None  # [L, H, e] mean of what the class token's attention to itself adds to the values
    embedding: Moments  # [d]
    maps: Tensor  # [L, H, e, d] from values to terms, on the model's device; the authors' terms: 1, [d, d]
    error: float  # largest relative error of the sum of terms
    description: str
    pool: Tensor | None = None  # [d] mean of what attention pooling's own MLP adds
    terms_of: Callable = decompose  # (model, images) -> the terms that these are the means of

    def read(self, vectors: Tensor) -> Tensor:
        """[L, H, e, k] from values to the terms' dot products with these vectors [k, d]."""
        return (self.maps @ vectors.T).expand(*self.values.mean.shape[:2], -1, -1)

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


class Mean(Sums):
    """The mean of tensors [b, ...]; Moments of the authors' terms, [L, H, d, d], would take gigabytes."""

    def update(self, x: Tensor) -> None:
        self.add("count", len(x))
        self.add("total", x.cpu().double().sum(dim=0))

    @property
    def mean(self) -> Tensor:
        return self["total"] / self["count"]


@torch.no_grad()
def authors_terms(model: nn.Module, images: Tensor) -> Decomposition:
    """The authors' terms (docs/paper.md): convention="paper", each image's over the norm of its embedding.

    `values` [b, L, H, d] are the heads' terms themselves, and `own` [b, L, H, d] is part of them.
    """
    terms, tower = decompose(model, images, convention="paper"), open_tower(model, "paper")
    # Every source token has the same share of what belongs to no token.
    share, maps = 1 / (tower.prefix + prod(tower.grid(images))), [W @ tower.G("paper") for W in tower.W_O]
    own = einsum("bLHe,LHed->bLHd", terms.own - share * terms.values, torch.stack(maps)) + share * terms.heads
    parts = vars(terms) | {"embedding": terms.embedding.to(own), "values": terms.heads, "own": own}
    norm = parts["embedding"].norm(dim=1)
    return Decomposition(
        **{k: einsum("b...,b->b...", x, 1 / norm) for k, x in parts.items() if x is not None}
    )


def summarise(
    job: Job,
    extra: Accumulator | Sequence[Accumulator] = (),
    data: Dataset | None = None,
    update: Callable | None = None,
    terms_of: Callable = decompose,
) -> Reference:
    """One pass over the reference images.

    Args:
        extra: one or more further accumulators of the pass.
        data: these images in place of the --reference split.
        update: called with every batch's terms and indices; by default the only accumulator's own `update`.
        terms_of: decompose or authors_terms.
    """
    data = open_split(job, job.args.reference) if data is None else data
    update = update or getattr(extra, "update", None)
    maps = head_maps(job.clip.model)
    depth, heads, width, dim = maps.shape
    values, embedding, sums, errors = Moments(width, (depth, heads)), Moments(dim), Sums(), Largest()
    title = f"reference ({job.args.reference})"
    if terms_of is authors_terms:
        values, maps, title = Mean(), torch.eye(dim).to(maps), "means of the authors' terms"
    accumulators = [values, embedding, sums, errors, *(extra if isinstance(extra, Sequence) else [extra])]
    for images, indices in one_pass(job, data, title, *accumulators):
        terms = terms_of(job.clip.model, images)
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
    return Reference(**found, description=data.description, terms_of=terms_of, **means)


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
