"""TextSpan: name what one attention head writes, as a short list of texts.

Reference: Gandelsman, Efros, Steinhardt, "Interpreting CLIP's Image Representation via Text-Based Decomposition",
https://arxiv.org/abs/2310.05916, Algorithm 1. This file needs torch alone.

    moments = Moments(d)
    for batch in ...: moments.update(batch)       # [n, d] contributions of one head; nothing else is kept
    span = textspan(moments, texts, size=20)      # [m, d] text embeddings
    [bank[i] for i in span.indices], span.explained

Glossary (code -> paper):
    n  images                                  (K)     C [n, d]  the head's contribution to each image, centred   (C)
    m  candidate texts                         (M)     R [m, d]  the texts' embeddings                            (R)
    d  joint image-text space                  (d')    j         the text picked in a step
    F [k, d]  any matrix with F' F = Cov(C), k at most the rank of C

Algorithm 1 scores text r by the variance of <c, r> over images. That is r' Cov(C) r = |F r|^2, so F may stand in for C: the same
texts are picked, and the cost no longer depends on the number of images. Both sides of D = R F' lose the picked direction in each
step, which is one rank-1 update of D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A direction whose share of the variance (of the squared norm, for texts) is below this is rounding error, not signal: float32
# contributions carry about 1e-7 of their norm, 1e-14 of its square.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class TextSpan:
    """The texts that span what a head writes, in the order picked."""

    indices: list[int]  # rows of `texts`
    directions: Tensor  # [size, d] float64, orthogonal: what each text adds to the ones before it
    explained: (
        Tensor  # [size] float64, share of the head's total variance that each step removes; sums to at most 1
    )


class Moments:
    """Count, mean and covariance of rows that arrive in batches, in float64.

    Any split into batches, and any order of merging, gives the same result up to rounding (Chan, Golub, LeVeque 1979).

    Args:
        dim: width of a row.
        batch: moments of many things at once, of every head say: Moments(e, (L, H)) takes rows [n, L, H, e], and moments[l, h] are
            those of one head.
    """

    def __init__(self, dim: int, batch: tuple[int, ...] = ()) -> None:
        self.count = 0
        self.mean = torch.zeros(*batch, dim, dtype=torch.float64)
        self.scatter = torch.zeros(*batch, dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)'

    def update(self, x: Tensor) -> Moments:
        """Add the rows of x [n, *batch, dim]."""
        if x.shape[1:] != self.mean.shape:
            raise ValueError(
                f"expected rows {list(self.mean.shape)} in a tensor [n, ...], got {list(x.shape)}"
            )
        x = x.detach().to("cpu", torch.float64)
        if not x.isfinite().all():
            broken = (~x.isfinite()).flatten(1).any(dim=1)
            raise ValueError(
                f"{int(broken.sum())} of {len(x)} rows hold a NaN or an infinity, the first is row {int(broken.nonzero()[0])}"
            )
        if len(x):
            mean = x.mean(dim=0)
            self._add(len(x), mean, torch.einsum("n...d,n...c->...dc", x - mean, x - mean))
        return self

    def merge(self, other: Moments) -> Moments:
        """Add what `other` has seen; `other` is left as it is."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge moments of {list(other.mean.shape)} into {list(self.mean.shape)}")
        if other.count:
            self._add(other.count, other.mean, other.scatter)
        return self

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total, shift = self.count + count, mean - self.mean
        between = shift[..., :, None] * shift[..., None, :] * (self.count * count / total)
        self.scatter = self.scatter + scatter + between
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[*batch, dim, dim] over the rows seen (divided by their number)."""
        return self.scatter / max(self.count, 1)

    def factor(self) -> Tensor:
        """[k, d] F with F' F = covariance, and k its rank: the directions that the rows vary along, 0 where all are the same but for
        rounding. Of one thing's moments: index those of many."""
        if not self.covariance.trace() > NEGLIGIBLE * self.mean.square().sum():
            return self.covariance[:0]
        return _factor(self.covariance)

    def map(self, A: Tensor) -> Moments:
        """The moments of x @ A for A [*batch, dim, other]: those of a head's term from those of its values, say."""
        A = A.detach().to("cpu", torch.float64)
        return self._like((self.mean[..., None, :] @ A).squeeze(-2), A.mT @ self.scatter @ A)

    def __getitem__(self, index: int | tuple[int, ...]) -> Moments:
        return self._like(self.mean[index], self.scatter[index])

    def _like(self, mean: Tensor, scatter: Tensor) -> Moments:
        other = Moments(0)
        other.count, other.mean, other.scatter = self.count, mean, scatter
        return other


def textspan(
    contributions: Tensor | Moments, texts: Tensor, size: int = 20, rank: int | None = 80
) -> TextSpan:
    """Greedily pick the texts along which a head's contributions vary most, each cleared of the ones before (Algorithm 1).

    Args:
        contributions: [n, d] the head's term for each image, or their Moments.
        texts: [m, d] embeddings of the candidates. Longer vectors score higher: normalise them unless that is wanted.
        size: number of texts to pick.
        rank: at least 1. First project the texts onto this many top right singular directions of the uncentred contributions, without
            normalising them again: what the authors' code does (80 holds every head of their models). A text then competes with the
            part of it that the head can write at all. Directions of negligible strength are left out, where their code
            keeps whatever rounding put there. None: no projection, the algorithm as printed.

    Returns:
        TextSpan. directions[i] is text i's embedding, projected, minus its projection onto directions[:i].

    Raises:
        ValueError: shapes that do not fit, NaN, no variance, or more texts wanted than the bank or the projected texts' directions hold
            (those of the uncentred contributions; without a projection, those of the joint space).
    """
    moments = (
        contributions
        if isinstance(contributions, Moments)
        else Moments(contributions.shape[-1]).update(contributions)
    )
    if moments.mean.ndim != 1:
        raise ValueError(
            f"expected the contributions of one head, got moments of {list(moments.mean.shape)}; index them: moments[l, h]"
        )
    R = texts.detach().to("cpu", torch.float64)
    if R.ndim != 2 or R.shape[1] != len(moments.mean):
        raise ValueError(
            f"texts must be [m, {len(moments.mean)}] like the contributions, got {list(R.shape)}"
        )
    length = torch.linalg.vector_norm(R, dim=1).square()  # [m]
    if not length.isfinite().all():
        raise ValueError("the texts' embeddings hold a NaN or an infinity")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, or None for no projection; got {rank}")
    if not 1 <= size <= len(R):
        raise ValueError(f"size must be between 1 and the number of texts, {len(R)}; got {size}")
    variance, F = moments.covariance.trace(), moments.factor()  # [k, d]
    if not len(F):
        raise ValueError(
            f"the contributions have no variance over {moments.count} images: there is nothing to name"
        )

    basis = torch.eye(R.shape[1], dtype=R.dtype)
    if rank is not None:
        # The uncentred contributions vary along F and the mean. From here on work in the projected space: [m, rank], not [m, d].
        _, strength, basis = torch.linalg.svd(torch.cat([F, moments.mean[None]]), full_matrices=False)
        basis = basis[:rank][
            strength[:rank].square() > NEGLIGIBLE * strength[0].square()
        ]  # [rank, d] orthonormal rows
        F, R = F @ basis.T, R @ basis.T
    return _pick(F, R, basis, length, size, variance)


def _pick(F: Tensor, R: Tensor, basis: Tensor, length: Tensor, size: int, variance: Tensor) -> TextSpan:
    indices, directions, explained = [], [], []
    D, R = R @ F.T, R.clone()  # [m, k]; the score of text j is |D_j|^2
    for _ in range(size):
        score = torch.linalg.vector_norm(D, dim=1).square()
        # Spanned by earlier picks, or not written by the head: what is left of such a text is rounding.
        score[score <= NEGLIGIBLE * variance * length] = 0
        j = int(score.argmax())
        if not score[j]:
            raise ValueError(
                f"the contributions hold {len(indices)} independent directions that a text can name; size={size} is too many"
            )
        norm = R[j].norm()
        r, d = R[j] / norm, D[j] / norm  # unit direction; F r
        indices.append(j)
        directions.append(R[j] @ basis)
        explained.append(d.square().sum() / variance)
        along = R @ r
        D.addr_(along, d, alpha=-1)  # (R - R r r')(F - F r r')' = R F' - (R r)(F r)'
        R.addr_(along, r, alpha=-1)
    return TextSpan(indices, torch.stack(directions), torch.stack(explained))


def reconstruct(contributions: Tensor, span: TextSpan, mean: Tensor) -> Tensor:
    """[n, d] the head as its texts tell it: the mean, plus the projection of what deviates from it onto the span's directions.

    Args:
        contributions: [n, d]; they need not be the ones that the texts were picked from.
        mean: [d] the mean to deviate from, of the images that the texts were picked on.
    """
    Q = (span.directions / span.directions.norm(dim=1, keepdim=True)).to(contributions)  # orthonormal rows
    mean = mean.to(contributions)
    return mean + (contributions - mean) @ Q.T @ Q


def _factor(covariance: Tensor) -> Tensor:
    """[k, d] F with F' F = covariance and k its rank, by Cholesky with pivoting.

    A head of width e has a covariance of rank e, so this takes e short steps; an eigendecomposition would not see the low rank.
    """
    left = covariance.diagonal().clone()  # the variance along each axis that no row of F explains yet
    F, total = torch.zeros_like(covariance), left.sum()
    for k in range(len(left)):
        p = int(left.argmax())
        if not left[p] > NEGLIGIBLE * total:
            return F[:k]
        F[k] = (covariance[p] - F[:k, p] @ F[:k]) / left[p].sqrt()
        left -= F[k].square()
    return F
