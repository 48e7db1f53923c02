# MIT licence, copyright (c) 2026 The TextSpan reference authors; see LICENSE.
"""Other ways to take a cue out of an embedding, to compare with. None needs labels.

    P = leace(covariance, cross_covariance)     # [d, d] and [d, g], of reference images
    erased = x - (x - mean) @ P.T

This file needs torch alone.

Axes: d embedding   g groups of images: the cue's values
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 1e-12  # a variance below this share of the largest is rounding error: embeddings are float32


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
