# MIT licence, copyright (c) 2026 The TextSpan reference authors; see LICENSE.
"""Does a map show what the model uses? Replace pixels in the map's order, and watch the prediction.

    found = curves(classify, images, maps, true, shown, black, noise, classify(images))
    area(found["negative"], CURVES["negative"])     # [b], between 0 and 1

Four curves, each over the share of pixels that are replaced, or shown, in percent:

    positive   the highest pixels are made black: is the true class still predicted? (a low area is good)
    negative   the lowest pixels are made black: is the true class still predicted? (a high area is good)
    deletion   the highest pixels become noise: the score of the class that the map explains (low is good)
    insertion  the highest pixels alone are shown, on black: the score of that class (high is good)

Positive and negative are the perturbation test of Chefer, Gur and Wolf 2021 (https://arxiv.org/abs/2012.09838,
github.com/hila-chefer/Transformer-Explainability @c3e578f, baselines/ViT/pertubation_eval_from_hdf5.py): nine
steps of 10 %, black in [0, 1] before normalisation, the true label whichever class is explained. Deletion and
insertion use noise, black, and the first half of the pixels as Grad-ECLIP's code does, which counts right
answers in ten steps (github.com/Cyang-Zhao/Grad-Eclip @5c1b5cc, imagenet_eval_deletion.py). A score in place
of the answers is RISE's measure (https://arxiv.org/abs/1806.07421).

What is left when the lowest 90 % are black is the highest 10 % on black, so insertion needs no forward pass
of its own. With two steps of deletion there are 20 for each map. A step takes whole pixels, rounded down.
Such images are unlike those that the model was trained on, and random maps are strong rivals (SaCo, CVPR
2024): always measure one beside the others. This file needs torch alone.

Axes: b images, c classes, p pixels of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TENTHS, HALF, NOISY = range(10, 100, 10), range(10, 60, 10), (0, 25, 50)
# Percent of the pixels at each point of a curve.
CURVES = {"positive": TENTHS, "negative": TENTHS, "deletion": NOISY, "insertion": HALF}
PASSES = 2 * len(TENTHS) + len(NOISY) - 1  # and one of the unchanged images, which all maps share


@torch.no_grad()
def curves(
    classify: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    true: Tensor,
    shown: Tensor,
    black: Tensor,
    noise: Tensor,
    unchanged: Tensor,
) -> dict[str, Tensor]:
    """{name: [b, points]} for CURVES: 1 or 0 for a right answer or none, or the score of the class shown.

    Args:
        classify: from images to scores [b, c] (probabilities, say); called PASSES times.
        images: [b, channels, height, width] as the model takes them.
        maps: [b, rows, cols] of any range; resized bilinearly.
        true, shown: [b] the true class; the class that the map explains.
        black: what stands for black in the images, e.g. [channels, 1, 1].
        noise: like the images, of random numbers. Its first channel also orders pixels of equal value.
        unchanged: [b, c] classify(images).

    Raises:
        ValueError: a map that is not finite, or shapes that do not fit.
    """
    rank = ranks(maps, noise[:, 0])
    p = rank[0].numel()

    def without_highest(percent: int, filling: Tensor) -> Tensor:
        return classify(torch.where((rank < p * percent // 100)[:, None], filling.to(images), images))

    def without_lowest(percent: int) -> Tensor:
        return classify(torch.where((rank >= p - p * percent // 100)[:, None], black.to(images), images))

    def right(scores: list[Tensor]) -> Tensor:
        return torch.stack([score.argmax(dim=1) == true for score in scores], dim=1).float()

    def of_shown(scores: list[Tensor]) -> Tensor:
        return torch.cat([score.gather(1, shown[:, None]) for score in scores], dim=1).float()

    lowest_gone = {percent: without_lowest(percent) for percent in TENTHS}
    return {
        "positive": right([without_highest(percent, black) for percent in TENTHS]),
        "negative": right(list(lowest_gone.values())),
        "deletion": of_shown([unchanged, *(without_highest(percent, noise) for percent in NOISY[1:])]),
        "insertion": of_shown([lowest_gone[100 - percent] for percent in HALF]),
    }


def ranks(maps: Tensor, ties: Tensor) -> Tensor:
    """[b, height, width] the place of each pixel in its image, 0 where the resized map is highest.

    Args:
        maps: [b, rows, cols]
        ties: [b, height, width]; of pixels with the same value, the one with the lower number comes first.
    """
    if maps.ndim != 3 or len(maps) != len(ties):
        raise ValueError(f"expected maps [{len(ties)}, rows, cols], got {list(maps.shape)}")
    if not maps.isfinite().all():
        raise ValueError("a map holds a NaN or an infinity")
    maps, device = maps.cpu(), maps.device  # some devices have no float64
    values = F.interpolate(maps.double()[:, None], ties.shape[1:], mode="bilinear").flatten(1)
    largest = values.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    values = (values / largest * 1e9).round()  # resizing repeats a value but for its last digits
    order = ties.cpu().flatten(1).argsort(dim=1)
    order = order.gather(1, values.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return order.argsort(dim=1).view_as(ties).to(device)


def area(curve: Tensor, percent: Sequence[int]) -> Tensor:
    """[b] the area under each curve [b, points] by the trapezoidal rule, over its width: the mean height."""
    x = torch.tensor(percent, dtype=torch.float64)
    return torch.trapezoid(curve.cpu().double(), x, dim=1) / (x[-1] - x[0])
