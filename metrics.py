# MIT licence, copyright (c) 2026 The TextSpan reference authors; see LICENSE.
"""Do maps lie on the object? Pixel accuracy, mean IoU, average precision and two more, from running sums.

    segmentation = Segmentation()
    for maps, masks in batches: segmentation.update(maps, masks)     # [b, rows, cols], [b, height, width]
    segmentation.pixel_accuracy, segmentation.mean_iou, segmentation.mean_ap
    segmentation.pointing, segmentation.energy

The protocol is that of ImageNet-Segmentation in Chefer, Gur and Wolf 2021 (https://arxiv.org/abs/2012.09838),
which the paper follows in section 5: a map is resized to its mask bilinearly and scaled to 0..1, and what
lies above its mean is foreground. The last two need no threshold: does the map's maximum lie on the object
(the pointing game, Zhang et al. 2016, https://arxiv.org/abs/1608.00507, here without a margin),
and which part of its positive values does? This file needs torch alone.

Axes: b images, p pixels of one image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Segmentation:
    """Running sums over images: memory does not grow with them, and any split into batches gives the same.

    Args:
        clip: set negative values to zero before a map is scaled, as the paper's authors do with theirs.
    """

    def __init__(self, clip: bool = False) -> None:
        self.clip = clip
        self.images = 0
        self.labelled = 0  # pixels
        self.shared = [0, 0]  # pixels of background and foreground: intersection with the truth,
        self.either = [0, 0]  # union with it
        self.precision = 0.0  # sum over images of the average precision
        self.precision_squared = 0.0  # and of its square
        self.objects = 0  # images with a foreground, and sums over them:
        self.pointed = 0.0  # share of the map's maxima that are foreground
        self.inside = 0.0  # share of the map's positive values that lies in the foreground

    def update(self, maps: Tensor, masks: Tensor) -> Segmentation:
        """Add images.

        Args:
            maps: [b, rows, cols], of any range.
            masks: [b, height, width] integers: 1 foreground, 0 background, negative: not labelled, left out
                of every measure.

        Raises:
            ValueError: shapes that do not fit, a map that is not finite, another label, an image without a
                labelled pixel.
        """
        if maps.ndim != 3 or masks.ndim != 3 or len(maps) != len(masks):
            expected = "expected maps [b, rows, cols] and masks [b, height, width]"
            raise ValueError(f"{expected}, got {list(maps.shape)}, {list(masks.shape)}")
        if not len(maps):
            return self
        if not maps.isfinite().all():
            raise ValueError("a map holds a NaN or an infinity")
        if masks.is_floating_point() or masks.max() > 1:
            found = f"{masks.dtype} up to {masks.max()}"
            raise ValueError(f"masks must hold 1, 0 or a negative number, got {found}")
        if maps.device.type not in ("cpu", "cuda"):  # mps has no float64
            maps, masks = maps.cpu(), masks.cpu()
        truth = masks.flatten(1)  # [b, p]
        counted = truth >= 0
        if not counted.any(dim=1).all():
            raise ValueError("a mask holds no labelled pixel")
        resized = resize(maps, masks.shape[-2:], self.clip)
        scores = unit_range(resized).flatten(1)
        above = scores > scores.mean(dim=1, keepdim=True)
        for label in (0, 1):
            predicted, actual = (above == label) & counted, truth == label
            self.shared[label] += int((predicted & actual).sum())
            self.either[label] += int((predicted | actual).sum())
        self.labelled += int(counted.sum())
        # One ranking per image of twice its pixels: as foreground by the map, as background by 1 - map.
        both = torch.cat([1 - scores, scores], dim=1)
        precision = average_precision(both, torch.cat([truth == 0, truth == 1], dim=1), counted.repeat(1, 2))
        self.precision += float(precision.sum())
        self.precision_squared += float(precision.square().sum())
        self.images += len(maps)
        self._locate(resized.flatten(1), truth, counted)
        return self

    def _locate(self, values: Tensor, truth: Tensor, counted: Tensor) -> None:
        """Where do the highest and the positive values [b, p] lie?"""
        inside = truth == 1
        largest = values.abs().amax(dim=1, keepdim=True)
        peak = values.masked_fill(~counted, -torch.inf).amax(dim=1, keepdim=True)
        # Resizing repeats a value but for its last digits.
        highest = ((values >= peak - 1e-9 * largest) & counted).double()
        positive = values.clamp_min(0) * counted
        positive = torch.where(positive.sum(dim=1, keepdim=True) > 0, positive, counted.double())
        share = lambda x: float(((x * inside).sum(dim=1) / x.sum(dim=1)).sum())  # noqa: E731
        self.objects += int(inside.any(dim=1).sum())
        self.pointed += share(highest)
        self.inside += share(positive)

    def merge(self, other: Segmentation) -> Segmentation:
        """Add what `other` has seen."""
        if self.clip != other.clip:
            raise ValueError("one of the two clips its maps, the other does not")
        for name in ("images", "labelled", "precision", "precision_squared", "objects", "pointed", "inside"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for label in (0, 1):
            self.shared[label] += other.shared[label]
            self.either[label] += other.either[label]
        return self

    @property
    def pixel_accuracy(self) -> float:
        """Share of all labelled pixels that are on the right side."""
        return sum(self.shared) / self.labelled

    @property
    def mean_iou(self) -> float:
        """Intersection over union, each summed over all images; mean of background and foreground."""
        ratios = [shared / either for shared, either in zip(self.shared, self.either, strict=True) if either]
        return sum(ratios) / len(ratios)

    @property
    def mean_ap(self) -> float:
        """Mean over images of the average precision: about 0.5 for a random map, and for a constant one."""
        return self.precision / self.images

    @property
    def mean_ap_error(self) -> float:
        """Standard error of `mean_ap`, from its spread over images."""
        variance = max(0.0, self.precision_squared / self.images - self.mean_ap**2)
        return (variance / max(self.images - 1, 1)) ** 0.5

    @property
    def pointing(self) -> float:
        """Mean, over images with a foreground, of the share of the map's maxima that lies on it."""
        return self.pointed / max(self.objects, 1)

    @property
    def energy(self) -> float:
        """Mean, over images with a foreground, of the share of the positive values that lies on it.

        A map without positive values counts as a constant one, whose share is that of the foreground's area.
        """
        return self.inside / max(self.objects, 1)


def scale(maps: Tensor, size: tuple[int, int], clip: bool = False) -> Tensor:
    """[b, rows, cols] to [b, *size] float64: resized bilinearly, scaled to 0..1; a constant becomes 0.5."""
    return unit_range(resize(maps, size, clip))


def resize(maps: Tensor, size: tuple[int, int], clip: bool = False) -> Tensor:
    """[b, rows, cols] to [b, *size] float64, bilinearly; clip: negative values then become 0."""
    maps = F.interpolate(maps.double()[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return maps.clamp_min(0) if clip else maps


def unit_range(maps: Tensor) -> Tensor:
    """Each of the maps [b, rows, cols] scaled to 0..1; a constant becomes 0.5."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.5)


def average_precision(scores: Tensor, positive: Tensor, counted: Tensor | None = None) -> Tensor:
    """[b] area under each row's precision-recall steps, exactly: equal scores enter the ranking together.

    Sum over distinct scores s, from the highest, of (recall down to s - recall before it) * (precision down
    to s). This is sklearn.metrics.average_precision_score.

    Args:
        scores: [b, p].
        positive: [b, p] bool, what should have the high scores; at least one in each row.
        counted: [b, p] bool, entries that take part; None: all.
    """
    counted = torch.ones_like(positive) if counted is None else counted
    scores, order = scores.sort(dim=1, descending=True)
    hits = (positive & counted).gather(1, order).double().cumsum(dim=1)  # true positives down to each rank
    taken = counted.gather(1, order).double().cumsum(dim=1)
    last = torch.ones_like(positive)  # of its group of equal scores
    last[:, :-1] = scores[:, :-1] != scores[:, 1:]
    upto = torch.where(last, hits, 0)
    before = F.pad(upto.cummax(dim=1).values[:, :-1], (1, 0))  # true positives of all groups before
    return ((upto - before) * last * hits / taken.clamp_min(1)).sum(dim=1) / hits[:, -1]
