# MIT licence, copyright (c) 2026 The TextSpan reference authors; see LICENSE.
"""Published ways to take a cue out of zero-shot classification, to compare with. None needs labels.

    P = orth_proj(texts)                          # of the cue; class texts become classes @ P.T
    P = orth_cal(P, prompts)                      # the same, calibrated on prompts with class and cue
    x = roboshot(x, reject, accept)               # differences of texts: of the cue, of the classes
    x = tie(x, guess, texts, shift)               # each image along the cue's text that fits it
    scores = perception_clip(x @ prompts, scale)  # every class with every text of the cue
    P = leace(covariance, cross_covariance)       # of reference images; x becomes x - (x - mean) @ P.T

The length of an image's embedding does not change which class wins, so that no function here brings it to
one, unless the method depends on it. This file needs torch alone.

Axes: b images   c classes   t texts of the cue   d embedding   g groups of images: the cue's values
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEGLIGIBLE = 1e-12  # a variance below this share of the largest is rounding error: embeddings are float32


def orth_proj(texts: Tensor) -> Tensor:
    """[d, d] P0 = I - A' (A A')^-1 A, off the span of texts A [t, d] (Chuang et al. 2023, arXiv 2302.00070).

    Class texts become P0 z. The published code then brings them to unit length. It takes eight prompts; as
    many texts as the embedding has dimensions would leave nothing. cue.subspace has those that matter.
    """
    axes = span(texts)
    return torch.eye(texts.shape[1]).to(axes) - axes.T @ axes


def orth_cal(P0: Tensor, prompts: Tensor, strength: float = 1000.0) -> Tensor:
    """[d, d] P0 (I + strength M)^-1, which also draws pairs of prompts together (Chuang et al. 2023).

    M is the mean of (z_i - z_j)(z_i - z_j)' over pairs that name one class and differ in the cue. Directions
    in which such pairs differ by much more than 1 / strength are taken out, whatever else they mean.

    Args:
        P0: [d, d] of `orth_proj`.
        prompts: [c, t, d] unit vectors, each class with each of the cue's texts.
        strength: the paper's lambda; 1000 is the published code's.
    """
    z = prompts.cpu().double()
    deviations = z - z.mean(dim=1, keepdim=True)
    # Over the t (t - 1) / 2 pairs of one class, (z_i - z_j)(z_i - z_j)' sums to t times the scatter.
    M = torch.einsum("ctd,cte->de", deviations, deviations) * 2 / (len(z) * (z.shape[1] - 1))
    return torch.linalg.solve(torch.eye(len(M)).to(M) + strength * M, P0.T.to(M)).T  # M is symmetric


def roboshot(embedding: Tensor, reject: Tensor, accept: Tensor | None = None) -> Tensor:
    """[b, d] images without the span of `reject`, and with that of `accept` doubled (Adila et al. 2023).

    arXiv 2309.04344. The published code goes through orthonormal vectors of each span, one after the other,
    and brings images to unit length after each. As the vectors are orthogonal, only the length depends on it.

    Args:
        embedding: [b, d]
        reject: [pairs, d] differences of two texts that differ in the cue. There a language model names them.
        accept: [pairs, d] differences of two texts that tell the classes; None: the rejection alone.
    """
    rejected = span(reject).to(embedding)
    x = embedding - embedding @ rejected.T @ rejected
    if accept is None:
        return x
    accepted = span(accept).to(embedding)
    return x + x @ accepted.T @ accepted


def extremes(texts: Tensor, classes: Tensor) -> Tensor:
    """[pairs, d] for any two classes the text nearest to the one less that nearest to the other.

    These stand in for the answers of RoboShot's language model, which is asked for spurious differences
    between two classes. Texts [t, d] of the cue, classes [c, d].
    """
    first, second = torch.triu_indices(len(classes), len(classes), 1)
    cosines = texts @ classes.T
    nearer = cosines[:, first] - cosines[:, second]  # [t, pairs]
    pairs = torch.stack([nearer.argmax(dim=0), nearer.argmin(dim=0)]).unique(dim=1)
    return texts[pairs[0]] - texts[pairs[1]]


def tie(embedding: Tensor, guess: Tensor, texts: Tensor, shift: Tensor) -> Tensor:
    """[b, d] z - shift_a v_a, images z of unit length moved along the text v_a of their cue a.

    TIE knows the cue of every image, TIE* guesses it as the nearest text (Mitigating spurious correlations in
    zero-shot multimodal models, ICLR 2025, openreview.net/forum?id=UsRKFYR4lM).

    Args:
        embedding: [b, d]
        guess: [b] an index into the texts.
        texts: [t, d] unit vectors.
        shift: [t] the mean of v_a . z over the reference images with a: then their mean is orthogonal to v_a.
    """
    return F.normalize(embedding, dim=1) - shift[guess, None] * texts[guess]


def perception_clip(cosines: Tensor, scale: float) -> Tensor:
    """[b, c] the log of sum_a p(a | x) p(class | x, a), a constant aside (An et al. 2023, arXiv 2308.01313).

    The cue a is inferred from prompts with the class: p(a | x) is the sum of p(a, class | x) over classes.
    The published code can flatten it by a temperature. At its default, 1, the product is p(a, class | x).

    Args:
        cosines: [b, c, t] of images with prompts that name a class and a text of the cue.
        scale: what the model multiplies cosines by.
    """
    return (scale * cosines).logsumexp(dim=2)


def leace(covariance: Tensor, cross_covariance: Tensor) -> Tensor:
    """[d, d] the oblique projection P of least-squares concept erasure (Belrose et al. 2023, theorem 4.3).

    Of all affine maps after which no linear classifier can tell the groups, x - P (x - mean) changes x least.

    Args:
        covariance: [d, d] of the embeddings x.
        cross_covariance: [d, g] of x with the groups' indicators z.
    """
    variances, axes = torch.linalg.eigh(covariance.double())
    kept = variances > NEGLIGIBLE * variances[-1]
    axes, deviations = axes[:, kept], variances[kept].sqrt()
    whitened = (axes.T @ cross_covariance.double()) / deviations[:, None]
    directions, strength, _ = torch.linalg.svd(whitened, full_matrices=False)
    # The indicators sum to one, so there are fewer directions than groups.
    U = directions[:, strength.square() > NEGLIGIBLE * strength[0].square()]
    return (axes * deviations) @ U @ U.T @ (axes / deviations).T


def span(vectors: Tensor) -> Tensor:
    """[k, d] orthonormal directions that span vectors [n, d], in float64."""
    R = torch.linalg.qr(vectors.cpu().double(), mode="r").R  # the same Gram matrix R'R in at most d rows
    _, strength, directions = torch.linalg.svd(R, full_matrices=False)
    return directions[strength.square() > NEGLIGIBLE * strength[0].square()]
