# MIT licence, copyright (c) 2026 The TextSpan reference authors; see LICENSE.
"""TextSpan: name what one attention head writes, as a short list of texts.

Reference: Gandelsman, Efros, Steinhardt, "Interpreting CLIP's Image Representation via Text-Based
Decomposition", https://arxiv.org/abs/2310.05916, Algorithm 1. This file needs torch alone.

    moments = Moments(d)
    for batch in ...: moments.update(batch)       # [n, d] contributions of one head; nothing else is kept
    span = textspan(moments, texts, size=20)      # [m, d] text embeddings
    [bank[i] for i in span.indices], span.explained

Glossary (code -> paper):
    n  images                    (K)     C [n, d]  the head's contribution to each image, centred   (C)
    m  candidate texts           (M)     R [m, d]  the texts' embeddings                            (R)
    d  joint image-text space    (d')    S [k, d]  a square root of the covariance: S' S = Cov(C), k its rank
    j  the text picked in a step         D [m, k]  the scores' square roots: D = R S'

Algorithm 1 scores text r by the variance of <c, r> over images. That is r' Cov(C) r = |S r|^2, so S can stand
in for C: the same texts are picked, and the cost no longer depends on the number of images. Each step removes
the picked direction from both R and S, which is one rank-1 update of D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A direction whose share of the variance (of the squared norm, for texts) is below this is rounding error.
# Contributions in float32 carry an error of about 1e-7 of their norm, which is 1e-14 of its square.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class TextSpan:
    """The texts that span what a head writes, in the order picked."""

    indices: list[int]  # rows of `texts`
    directions: Tensor  # [size, d] float64, orthogonal: what each text adds to the ones before it
    explained: Tensor  # [size] float64, share of the variance that each step removes; sums to at most 1


class Moments:
    """Count, mean and covariance of rows that arrive in batches, in float64.

    Any split into batches and any order of merging give the same up to rounding (Chan, Golub, LeVeque 1979).

    Args:
        dim: width of a row.
        heads: axes of many heads at once: Moments(e, (L, H)) takes rows [n, L, H, e], and moments[l, h] are
            the moments of one head.
    """

    def __init__(self, dim: int, heads: tuple[int, ...] = ()) -> None:
        self.count = 0
        self.mean = torch.zeros(*heads, dim, dtype=torch.float64)
        self.scatter = torch.zeros(*heads, dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)'

    def update(self, x: Tensor) -> Moments:
        """Add the rows of x [n, *heads, dim]."""
        if x.shape[1:] != self.mean.shape:
            expected = f"expected rows {list(self.mean.shape)} in a tensor [n, ...]"
            raise ValueError(f"{expected}, got {list(x.shape)}")
        x = x.detach().cpu().double()  # in this order: not every device has float64
        broken = (~x.isfinite()).flatten(1).any(dim=1).nonzero()
        if len(broken):
            rows = f"{len(broken)} of {len(x)} rows"
            raise ValueError(f"{rows} hold a NaN or an infinity, the first is row {int(broken[0])}")
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
        """[*heads, dim, dim] over the rows seen (divided by their number)."""
        return self.scatter / max(self.count, 1)

    def factor(self) -> Tensor:
        """[k, dim] S with S' S = covariance and k its rank. Only for one head's moments: index those of many.

        k is 0 where all rows are the same but for rounding. By Cholesky with pivoting: a head of width e has
        a covariance of rank e, so it takes e short steps. An eigendecomposition would not see the low rank.
        """
        covariance = self.covariance
        left = covariance.diagonal().clone()  # the variance along each axis that no row of S explains yet
        S, total = torch.zeros_like(covariance), left.sum()
        if not total > NEGLIGIBLE * self.mean.square().sum():
            return S[:0]
        for k in range(len(left)):
            p = int(left.argmax())
            if not left[p] > NEGLIGIBLE * total:
                return S[:k]
            S[k] = (covariance[p] - S[:k, p] @ S[:k]) / left[p].sqrt()
            left -= S[k].square()
        return S

    def map(self, A: Tensor) -> Moments:
        """The moments of x @ A for A [*heads, dim, other]: from those of values to those of terms, say."""
        A = A.detach().cpu().double()
        return self._with((self.mean[..., None, :] @ A).squeeze(-2), A.mT @ self.scatter @ A)

    def __getitem__(self, index: int | tuple[int, ...]) -> Moments:
        return self._with(self.mean[index], self.scatter[index])

    def _with(self, mean: Tensor, scatter: Tensor) -> Moments:
        other = Moments(0)
        other.count, other.mean, other.scatter = self.count, mean, scatter
        return other


def textspan(
    contributions: Tensor | Moments, texts: Tensor, size: int = 20, rank: int | None = 80
) -> TextSpan:
    """Greedily pick the texts along which a head's contributions vary most, each cleared of the ones before.

    Args:
        contributions: [n, d] the head's term for each image, or their Moments.
        texts: [m, d] embeddings of the candidates, normalised unless longer ones are to score higher.
        size: number of texts to pick.
        rank: at least 1. First project the texts onto this many top right singular directions of the
            uncentred contributions, without normalising them again: what the authors' code does (80 holds
            every head of their models). A text then competes with the part of it that the head can write at
            all. Negligible directions are left out, where their code keeps whatever rounding put there.
            None: no projection, the algorithm as printed.

    Returns:
        TextSpan. directions[i] is text i's embedding, projected, minus its projection onto directions[:i].

    Raises:
        ValueError: shapes that do not fit, NaN, no variance, or more texts wanted than there are, or than
            independent directions that a text can name.
    """
    moments = contributions
    if not isinstance(moments, Moments):
        moments = Moments(contributions.shape[-1]).update(contributions)
    R = texts.detach().cpu().double()
    _check(moments, R, size, rank)
    squared_norm = torch.linalg.vector_norm(R, dim=1).square()  # [m]
    variance, S = moments.covariance.trace(), moments.factor()
    if not len(S):
        found = f"the contributions have no variance over {moments.count} images"
        raise ValueError(f"{found}: there is nothing to name")
    if rank is None:
        basis = torch.eye(R.shape[1], dtype=R.dtype)
        R_left, D = R.clone(), R @ S.T
    else:
        basis = _top_directions(S, moments.mean, rank)
        R_left = R @ basis.T  # from here on the texts are [m, rank], not [m, d]
        D = R_left @ (S @ basis.T).T

    indices, directions, explained = [], [], []
    for _ in range(size):
        score = torch.linalg.vector_norm(D, dim=1).square()  # [m] the variance of <c, r>
        # Spanned by earlier picks, or not written by the head: what is left of such a text is rounding.
        score[score <= NEGLIGIBLE * variance * squared_norm] = 0
        j = int(score.argmax())
        if not score[j]:
            found = f"{len(indices)} independent directions that a text can name"
            raise ValueError(f"the contributions hold {found}; size={size} is too many")
        norm = R_left[j].norm()
        r, S_r = R_left[j] / norm, D[j] / norm  # a unit vector, and S r
        indices.append(j)
        directions.append(R_left[j] @ basis)
        explained.append(S_r.square().sum() / variance)
        along = R_left @ r
        D.addr_(along, S_r, alpha=-1)  # (R - R r r')(S - S r r')' = R S' - (R r)(S r)'
        R_left.addr_(along, r, alpha=-1)
    return TextSpan(indices, torch.stack(directions), torch.stack(explained))


def _check(moments: Moments, R: Tensor, size: int, rank: int | None) -> None:
    """Refuse what `textspan` cannot answer, with a ValueError."""
    if moments.mean.ndim != 1:
        found = f"moments of {list(moments.mean.shape)}; index them: moments[l, h]"
        raise ValueError(f"expected the contributions of one head, got {found}")
    if R.ndim != 2 or R.shape[1] != len(moments.mean):
        expected = f"texts must be [m, {len(moments.mean)}] like the contributions"
        raise ValueError(f"{expected}, got {list(R.shape)}")
    if not R.square().sum(dim=1).isfinite().all():
        raise ValueError("the texts' embeddings hold a NaN or an infinity")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, or None for no projection; got {rank}")
    if not 1 <= size <= len(R):
        raise ValueError(f"size must be between 1 and the number of texts, {len(R)}; got {size}")


def _top_directions(S: Tensor, mean: Tensor, rank: int) -> Tensor:
    """[at most rank, d] orthonormal rows: the uncentred contributions vary along those of S and the mean."""
    _, strength, basis = torch.linalg.svd(torch.cat([S, mean[None]]), full_matrices=False)
    return basis[:rank][strength[:rank].square() > NEGLIGIBLE * strength[0].square()]


def reconstruct(contributions: Tensor, span: TextSpan, mean: Tensor) -> Tensor:
    """[n, d] the head as its texts tell it: the mean, plus what deviates from it along the span's directions.

    Args:
        contributions: [n, d]; they need not be the ones that the texts were picked from.
        mean: [d] the mean to deviate from, of the images that the texts were picked on.
    """
    Q = (span.directions / span.directions.norm(dim=1, keepdim=True)).to(contributions)  # orthonormal rows
    mean = mean.to(contributions)
    return mean + (contributions - mean) @ Q.T @ Q
