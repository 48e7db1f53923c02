"""Segmentation measures: cases worked by hand, and a slow count of pixels one by one."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from metrics import Segmentation, average_precision, scale

# float64 sums of some thousand numbers up to 1: only the order of adding differs
EXACT = {"rtol": 0, "atol": 1e-12}


# The independent route: numpy, plain loops, one pixel or one threshold at a time.


def naive_precision(scores, positive, counted=None):
    """Mean over positives of the precision at their own score: how much of what scores at least as high is
    positive. In fractions.
    """
    counted = [True] * len(scores) if counted is None else counted
    rows = [(s, p) for s, p, c in zip(scores, positive, counted, strict=True) if c]
    found = []
    for score, is_positive in rows:
        if is_positive:
            above = [p for s, p in rows if s >= score]
            found.append(Fraction(int(sum(above)), len(above)))
    return float(sum(found) / len(found))


def naive_resize(grid, height, width):
    """Bilinear, half-pixel centres, the edge repeated."""
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * grid.shape[0] / height - 0.5, 0), grid.shape[0] - 1)
            u = min(max((x + 0.5) * grid.shape[1] / width - 0.5, 0), grid.shape[1] - 1)
            top, left = int(v), int(u)
            low, right = min(top + 1, grid.shape[0] - 1), min(left + 1, grid.shape[1] - 1)
            upper = grid[top, left] * (1 - u + left) + grid[top, right] * (u - left)
            lower = grid[low, left] * (1 - u + left) + grid[low, right] * (u - left)
            out[y, x] = upper * (1 - v + top) + lower * (v - top)
    return out


def naive_measures(maps, masks, clip=False):
    """(pixel accuracy, mIoU, mAP), one image and one pixel at a time."""
    right = labelled = 0
    inter, union, precisions = [0, 0], [0, 0], []
    for grid, mask in zip(maps.double().numpy(), masks.numpy(), strict=True):
        # torch's own resizing, judged below: at two of a map's edges it repeats a value up to its last digit
        # alone, and which of two such values ranks higher is chance.
        values = F.interpolate(torch.from_numpy(grid)[None, None], mask.shape, mode="bilinear")[0, 0].numpy()
        values = np.maximum(values, 0) if clip else values
        low, high = values.min(), values.max()
        values = (values - low) / (high - low) if high > low else np.full(mask.shape, 0.5)
        threshold = values.mean()
        scores, positive = [], []
        for value, label in zip(values.ravel(), mask.ravel(), strict=True):
            if label < 0:
                continue
            said = int(value > threshold)
            labelled += 1
            right += said == label
            for c in (0, 1):
                inter[c] += said == c == label
                union[c] += c in (said, label)
            scores += [1 - value, value]
            positive += [label == 0, label == 1]
        precisions.append(naive_precision(scores, positive))
    ious = [i / u for i, u in zip(inter, union, strict=True) if u]
    return right / labelled, sum(ious) / len(ious), sum(precisions) / len(precisions)


def figures(segmentation):
    return segmentation.pixel_accuracy, segmentation.mean_iou, segmentation.mean_ap


def sums(segmentation):
    return {name: value for name, value in vars(segmentation).items() if name != "clip"}


def measured(maps, masks, clip=False):
    return Segmentation(clip).update(maps, masks)


def one(values, labels, clip=False):
    """One image of one row, its map as wide as its mask."""
    return figures(measured(torch.tensor([[values]], dtype=torch.float64), torch.tensor([[labels]]), clip))


def problem(seed, b=5, grid=(3, 4), size=(9, 7), void=0.0):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(b, *grid, generator=generator)
    masks = (torch.rand(b, *size, generator=generator) < 0.4).long()
    masks[torch.rand(b, *size, generator=generator) < void] = -1
    return maps, masks


# Average precision.


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans(), st.booleans()), min_size=1, max_size=25))
def test_average_precision_is_the_mean_precision_at_the_positives(rows):
    scores, positive, counted = (list(column) for column in zip(*rows, strict=True))
    if not any(p and c for p, c in zip(positive, counted, strict=True)):
        positive[0] = counted[0] = True
    found = average_precision(
        torch.tensor([scores]).double(), torch.tensor([positive]), torch.tensor([counted])
    )
    assert found.item() == pytest.approx(naive_precision(scores, positive, counted), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=2, max_size=25))
def test_without_counted_every_entry_takes_part(rows):
    scores, positive = (list(column) for column in zip(*rows, strict=True))
    positive[0] = True
    found = average_precision(torch.tensor([scores]).double(), torch.tensor([positive]))
    assert found.item() == pytest.approx(naive_precision(scores, positive), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([4, 3, 2, 1], [1, 1, 0, 0], 1),  # perfect
        ([4, 3, 2, 1], [0, 0, 1, 1], (1 / 3 + 2 / 4) / 2),  # inverted
        ([4, 3, 2, 1], [1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([2, 2, 1, 1], [1, 0, 1, 0], (1 / 2 + 2 / 4) / 2),  # two pairs of ties
        ([3, 2, 2, 2], [0, 1, 1, 0], 2 / 4),  # a tie of three behind a negative
        ([7, 7, 7, 7, 7], [1, 0, 0, 1, 0], 2 / 5),  # constant: the share of positives
        ([1], [1], 1),
    ],
)
def test_average_precision_by_hand(scores, positive, expected):
    found = average_precision(torch.tensor([scores]).double(), torch.tensor([positive]).bool())
    assert found.item() == pytest.approx(expected, abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)))
def test_the_order_of_tied_entries_changes_nothing(order):
    scores = torch.tensor([[3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1]]).double()
    positive = torch.tensor([[1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0]]).bool()
    assert_close(
        average_precision(scores[:, order], positive[:, order]),
        average_precision(scores, positive),
        rtol=0,
        atol=0,
    )


def test_a_ranking_that_breaks_ties_by_position_would_differ():
    scores, positive = torch.tensor([[2.0, 2, 1, 1]]), torch.tensor([[True, False, True, False]])
    ranked = scores - torch.arange(4) * 1e-3  # positives first
    assert average_precision(ranked, positive).item() > average_precision(scores, positive).item() + 0.2


def test_rows_do_not_mix():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (6, 30), generator=generator).double()
    positive, counted = (torch.rand(6, 30, generator=generator) < share for share in (0.4, 0.8))
    alone = [average_precision(scores[i : i + 1], positive[i : i + 1], counted[i : i + 1]) for i in range(6)]
    assert_close(average_precision(scores, positive, counted), torch.cat(alone), rtol=0, atol=0)
    assert len({value.item() for value in alone}) == 6


def test_what_is_not_counted_may_have_any_score():
    scores, positive = torch.tensor([[5.0, 4, 3, 2]]), torch.tensor([[False, True, False, True]])
    counted = torch.tensor([[False, True, True, True]])
    assert average_precision(scores, positive, counted).item() == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(scores, positive).item() == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_the_arguments_are_left_as_they_were():
    scores, positive, counted = (
        torch.tensor([[1.0, 3, 2]]),
        torch.tensor([[True, False, True]]),
        torch.tensor([[True, True, False]]),
    )
    copies = [x.clone() for x in (scores, positive, counted)]
    average_precision(scores, positive, counted)
    assert all(torch.equal(x, copy) for x, copy in zip((scores, positive, counted), copies, strict=True))


# Resizing and scaling.


def test_both_axes_are_resized_each_by_its_own_factor():
    assert scale(torch.tensor([[[0.0, 1.0]]]), (1, 4)).tolist() == [[[0, 0.25, 0.75, 1]]]
    found = scale(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), (3, 4))
    by_hand = [[x + y for x in (0, 0.25, 0.75, 1)] for y in (0, 1, 2)]  # 0 to 3: columns add 1, rows add 2
    assert_close(found[0], torch.tensor(by_hand).double() / 3, **EXACT)


@pytest.mark.parametrize("size", [(9, 7), (3, 4), (2, 2), (1, 5)])
def test_resizing_is_bilinear_with_half_pixel_centres(size):
    maps = problem(3)[0]
    slow = np.stack([naive_resize(grid, *size) for grid in maps.double().numpy()])
    low, high = slow.min(axis=(1, 2), keepdims=True), slow.max(axis=(1, 2), keepdims=True)
    assert_close(scale(maps, size), torch.from_numpy((slow - low) / (high - low)), **EXACT)


def test_every_map_is_scaled_by_its_own_range():
    maps = problem(4)[0] * torch.tensor([1.0, 10, 100, 1e-3, 1e6]).view(5, 1, 1)
    scaled = scale(maps, (6, 8)).flatten(1)
    assert scaled.amin(dim=1).tolist() == [0] * 5
    assert scaled.amax(dim=1).tolist() == [1] * 5


def test_a_constant_map_becomes_a_half():
    maps = torch.stack([torch.full((2, 2), 7.0), torch.tensor([[0.0, 1], [1, 0]])])
    scaled = scale(maps, (2, 2))
    assert scaled[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert scaled[1].tolist() == [[0, 1], [1, 0]]


def test_scaling_is_in_float64_whatever_the_map_is_in():
    maps = problem(5)[0].bfloat16()
    assert scale(maps, (9, 7)).dtype == torch.float64
    assert_close(scale(maps, (9, 7)), scale(maps.double(), (9, 7)), rtol=0, atol=0)


def test_a_map_is_clipped_after_resizing_and_before_scaling():
    maps = torch.tensor([[[-1.0, 1.0]]])  # resized: -1, -.5, .5, 1
    assert scale(maps, (1, 4), clip=True).tolist() == [[[0, 0, 0.5, 1]]]
    assert scale(maps, (1, 4)).tolist() == [[[0, 0.25, 0.75, 1]]]
    maps = torch.tensor([[[-3.0, -1.0]]])
    assert scale(maps, (1, 2), clip=True).tolist() == [[[0.5, 0.5]]]
    assert scale(maps, (1, 2)).tolist() == [[[0, 1]]]


# All three measures.


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([0.0, 0.3]))
def test_the_measures_are_those_of_a_count_pixel_by_pixel(seed, clip, void):
    maps, masks = problem(seed, b=3, grid=(2, 3), size=(5, 4), void=void)
    masks[:, 0, 0] = 1  # each has a labelled pixel
    assert figures(measured(maps, masks, clip)) == pytest.approx(naive_measures(maps, masks, clip), abs=1e-12)


@pytest.mark.parametrize("size", [(4, 11), (11, 4), (1, 6), (6, 1)])
def test_masks_need_not_be_square(size):
    maps, masks = problem(1, size=size)
    assert figures(measured(maps, masks)) == pytest.approx(naive_measures(maps, masks), abs=1e-12)


def test_maps_with_many_ties_are_counted_right():
    generator = torch.Generator().manual_seed(2)
    maps = torch.randint(0, 3, (6, 4, 4), generator=generator).float()
    masks = torch.randint(0, 2, (6, 4, 4), generator=generator)
    assert figures(measured(maps, masks)) == pytest.approx(naive_measures(maps, masks), abs=1e-12)


def test_perfect_and_inverted_and_constant_maps():
    assert one([0, 1, 1, 0], [0, 1, 1, 0]) == (1, 1, 1)
    assert one([1, 0, 0, 1], [0, 1, 1, 0]) == (0, 0, 0.5)
    assert one([3, 3, 3, 3, 3], [0, 1, 0, 0, 1]) == pytest.approx((3 / 5, (3 / 5 + 0) / 2, 0.5))


def test_an_image_that_is_all_foreground_or_has_none():
    # The pixel at 0 is missed: foreground 2 of 3, background 0 of 1. Ranked: 1, .75 and .25, 0 for
    # foreground; positives first.
    assert one([0, 0.75, 1], [1, 1, 1]) == pytest.approx(
        (2 / 3, (2 / 3 + 0) / 2, (1 / 2 + 2 / 3 + 3 / 6) / 3)
    )
    # Ranked as (score, is it right): background 1 yes, 0 yes; foreground 0 no, 1 no.
    assert one([0, 1], [0, 0]) == pytest.approx((1 / 2, (1 / 2 + 0) / 2, 1 / 2))


def test_a_pixel_at_the_mean_is_background():
    assert one([0, 1, 2], [0, 0, 1])[0] == 1
    assert one([0, 1, 2], [0, 1, 1])[0] == pytest.approx(2 / 3)


def test_a_class_that_neither_map_nor_mask_holds_takes_no_part_in_the_mean_iou():
    assert one([0, 1], [-1, 1])[:2] == (1, 1)
    assert one([0, 1], [0, -1])[:2] == (1, 1)


def test_mean_iou_is_of_sums_over_images_and_not_a_mean_over_images():
    maps = torch.tensor([[[0.0, 0, 0, 1]], [[0, 1, 1, 1]]])
    masks = torch.tensor([[[0, 0, 0, 1]], [[0, 1, 0, 0]]])
    together = (4 / 6 + 2 / 4) / 2  # background: 3 + 1 shared of 3 + 3; foreground: 1 + 1 of 1 + 3
    per_image = ((1 + 1) / 2 + (1 / 3 + 1 / 3) / 2) / 2
    assert measured(maps, masks).mean_iou == pytest.approx(together)
    assert per_image != pytest.approx(together, abs=0.05)


def test_mean_average_precision_is_a_mean_over_images_and_not_over_pixels():
    maps, masks = problem(6, b=2)
    masks[1, 1:] = -1  # far fewer pixels
    halves = [measured(maps[i : i + 1], masks[i : i + 1]).mean_ap for i in range(2)]
    assert measured(maps, masks).mean_ap == pytest.approx(sum(halves) / 2, abs=1e-12)
    assert abs(halves[0] - halves[1]) > 0.02


# Pixels that are not labelled.


def test_a_pixel_without_a_label_counts_nowhere_but_in_the_mean_and_the_range():
    assert one([0, 1, 1, 0.25], [0, 1, -1, -7]) == (1, 1, 1)
    assert one([0, 1, 1, 0.25], [0, 1, 0, 1])[0] == 1 / 2
    # Scaled by all pixels: 0, .2, .4, 1 with mean .4, so the third is background; then 0, .5, 1, 1 with mean
    # .625.
    assert one([0, 0.2, 0.4, 1.0], [0, 0, 1, -1])[0] == pytest.approx(2 / 3)
    assert one([0, 0.2, 0.4, 0.4], [0, 0, 1, -1])[0] == 1


def test_average_precision_without_some_labels_is_that_of_the_others():
    values, labels = [0.1, 0.9, 0.4, 1.0, 0.0, 0.4], [0, 1, 1, -1, -1, 0]
    kept = [(v, label) for v, label in zip(values, labels, strict=True) if label >= 0]
    scores = [1 - v for v, _ in kept] + [v for v, _ in kept]
    expected = naive_precision(scores, [label == 0 for _, label in kept] + [label == 1 for _, label in kept])
    assert one(values, labels)[2] == pytest.approx(expected, abs=1e-12)


# Clipping.


def test_clipping_moves_the_threshold_where_values_are_negative():
    # Scaled 0, .8, .9, 1 with mean .675; clipped 0, 0, .5, 1 with mean .375.
    assert one([-8, 0, 1, 2], [0, 0, 1, 1])[0] == pytest.approx(3 / 4)
    assert one([-8, 0, 1, 2], [0, 0, 1, 1], clip=True)[0] == 1
    maps, masks = problem(7)
    assert sums(measured(maps.abs(), masks, clip=True)) == sums(measured(maps.abs(), masks))
    assert sums(measured(maps, masks, clip=True)) != sums(measured(maps, masks))


# Invariances.


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-100, 100))
def test_average_precision_does_not_see_scale_and_offset(seed, factor, offset):
    # As large as the masks: resizing would make values that are equal up to rounding.
    maps, masks = problem(seed, grid=(9, 7))
    maps = maps.double()
    assert measured(factor * maps + offset, masks).mean_ap == pytest.approx(
        measured(maps, masks).mean_ap, abs=1e-9
    )


def test_average_precision_sees_the_sign_but_hardly_scale_and_offset_of_a_resized_map():
    maps, masks = problem(8, b=4, grid=(8, 8), size=(64, 64))
    before, after = measured(maps.double(), masks).mean_ap, measured(0.3 * maps.double() + 7, masks).mean_ap
    # Two of a map's edges repeat values up to rounding: such pairs change places.
    assert before == pytest.approx(after, abs=1e-4)
    maps, masks = problem(8)
    assert abs(measured(-maps, masks).mean_ap - measured(maps, masks).mean_ap) > 0.02


def test_swapping_foreground_and_background_with_the_map_inverted_changes_no_average_precision():
    maps, masks = problem(9, grid=(9, 7))
    assert measured(-maps.double(), 1 - masks).mean_ap == pytest.approx(
        measured(maps, masks).mean_ap, abs=1e-12
    )
    assert measured(maps, 1 - masks).mean_ap != pytest.approx(measured(maps, masks).mean_ap, abs=1e-3)


def assert_same_sums(found, expected):
    for name, value in sums(expected).items():
        if name.startswith(("precision", "pointed", "inside")):
            assert getattr(found, name) == pytest.approx(value, rel=1e-13)  # added in another order
        else:
            assert getattr(found, name) == value


@pytest.mark.parametrize("split", [(1,) * 8, (3, 5), (7, 1), (2, 2, 2, 2)])
@pytest.mark.parametrize("clip", [False, True])
def test_any_split_into_batches_gives_the_same(split, clip):
    maps, masks = problem(10, b=8, void=0.2)
    parts = Segmentation(clip)
    for some, theirs in zip(maps.split(split), masks.split(split), strict=True):
        parts.update(some, theirs)
    assert_same_sums(parts, measured(maps, masks, clip))


def test_masks_of_different_sizes_can_come_in_batches_of_their_own():
    first, second = problem(11), problem(12, size=(5, 12))
    total = Segmentation().update(*first).update(*second)
    assert total.labelled == 5 * (9 * 7 + 5 * 12)
    assert total.mean_ap == pytest.approx(
        (measured(*first).mean_ap + measured(*second).mean_ap) / 2, abs=1e-12
    )


def test_the_order_of_images_changes_nothing_unless_masks_stay():
    maps, masks = problem(13, b=8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert_same_sums(measured(maps[order], masks[order]), measured(maps, masks))
    assert sums(measured(maps.roll(1, 0), masks)) != sums(measured(maps, masks))


def test_merging_is_having_seen_both():
    maps, masks = problem(14, b=8, void=0.2)
    merged = measured(maps[:3], masks[:3]).merge(measured(maps[3:], masks[3:]))
    assert_same_sums(merged, measured(maps, masks))


def test_merging_leaves_the_other_as_it_was():
    one_half, other = measured(*problem(15)), measured(*problem(16))
    before = sums(other)
    one_half.merge(other).update(*problem(17))
    assert sums(other) == before


def test_a_clipping_and_an_unclipping_one_do_not_merge():
    one_half = measured(*problem(15))
    before = sums(one_half)
    with pytest.raises(ValueError, match="clips"):
        one_half.merge(measured(*problem(16), clip=True))
    assert sums(one_half) == before


def test_two_counters_share_nothing():
    first, second = Segmentation(), Segmentation()
    first.update(*problem(0))
    assert sums(second) == sums(Segmentation())


def test_the_map_and_the_mask_are_left_as_they_were():
    maps, masks = problem(18, void=0.2)
    copies = maps.clone(), masks.clone()
    measured(maps, masks, clip=True)
    assert torch.equal(maps, copies[0])
    assert torch.equal(masks, copies[1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_masks_may_be_of_any_signed_integers(dtype):
    maps, masks = problem(19, void=0.2)
    assert sums(measured(maps, masks.to(dtype))) == sums(measured(maps, masks))


# Chance, and the spread.


def test_random_maps_have_an_average_precision_of_about_a_half():
    generator = torch.Generator().manual_seed(0)
    maps, masks = (
        torch.rand(200, 16, 16, generator=generator),
        torch.randint(0, 2, (200, 16, 16), generator=generator),
    )
    random = measured(maps, masks)
    # Few pixels rank a little above chance by luck: about (log n) / 2n with n = 512 entries, 0.006; and four
    # standard errors.
    assert abs(random.mean_ap - 0.5) < 0.006 + 4 * random.mean_ap_error
    assert measured(maps + 0.2 * masks, masks).mean_ap > 0.6


@pytest.mark.parametrize("b", [2, 40])
def test_the_standard_error_is_numpys(b):
    maps, masks = problem(20, b)
    each = [measured(maps[i : i + 1], masks[i : i + 1]).mean_ap for i in range(b)]
    # The variance is a difference of two sums: it keeps about 12 digits.
    assert measured(maps, masks).mean_ap_error == pytest.approx(np.std(each, ddof=1) / np.sqrt(b), rel=1e-9)


def test_images_that_are_all_alike_have_no_spread():
    maps, masks = problem(21, b=1)
    # The root of a rounded 0.
    assert measured(maps.expand(7, -1, -1), masks.expand(7, -1, -1)).mean_ap_error < 1e-8
    assert measured(maps, masks).mean_ap_error == 0
    for n in range(2, 30):  # rounding falls either way
        error = measured(maps.expand(n, -1, -1), masks.expand(n, -1, -1)).mean_ap_error
        assert isinstance(error, float)
        assert 0 <= error < 1e-7


# Where the maximum lies, and the positive values.


def located(values, labels, clip=False):
    """(pointing, energy) of one image of one row, its map as wide as its mask."""
    found = measured(torch.tensor([[values]], dtype=torch.float64), torch.tensor([[labels]]), clip)
    return found.pointing, found.energy


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([1, 5, 2, 0], [0, 1, 0, 0], (1, 5 / 8)),
        ([5, 1, 2, 0], [0, 1, 0, 0], (0, 1 / 8)),
        ([4, 4, 0, 4], [1, 1, 0, 0], (2 / 3, 8 / 12)),  # two of three maxima
        ([-4, 1, -2, 3], [1, 1, 0, 0], (0, 1 / 4)),  # negative values have no mass
        ([-4, 1, -2, 3], [0, 0, 1, 1], (1, 3 / 4)),
        ([7, 7, 7, 7, 7], [0, 1, 0, 0, 1], (2 / 5, 2 / 5)),  # constant: the share of the area
        ([0, 0, 0, 0], [0, 1, 0, 0], (1 / 4, 1 / 4)),
        ([-2, -1, -3, -3], [0, 1, 0, 0], (1, 1 / 4)),  # nothing positive
        ([9, 3, 2, 1], [-1, 1, 0, 0], (1, 3 / 6)),  # the largest is not labelled
        ([0, -1, -2, -3], [-1, 1, 0, 0], (1, 1 / 3)),  # and nothing else is positive
    ],
)
def test_pointing_and_energy_by_hand(values, labels, expected):
    assert located(values, labels) == pytest.approx(expected, abs=1e-12)


def test_a_clipped_map_without_positive_values_points_everywhere():
    assert located([-2, -1, -3, -3], [0, 1, 0, 0], clip=True) == (1 / 4, 1 / 4)


def test_pixels_that_resizing_repeats_up_to_rounding_are_all_maxima():
    maps, mask = torch.tensor([[[0.1, 0.1], [0.1, 0.1]]]).double(), torch.zeros(1, 7, 7, dtype=torch.long)
    mask[0, :3] = 1
    assert measured(maps, mask).pointing == pytest.approx(3 / 7, abs=1e-12)
    assert measured(1e-9 * maps, mask).pointing == pytest.approx(3 / 7, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([0.0, 0.3]))
def test_pointing_and_energy_are_those_of_a_count_pixel_by_pixel(seed, clip, void):
    maps, masks = problem(seed, b=3, grid=(2, 3), size=(5, 4), void=void)
    masks[0], masks[1, 0, 0], masks[2, 0, 0] = 0, 1, 1  # the first shows no object
    points, shares = [], []
    for grid, mask in zip(maps.double().numpy(), masks.numpy(), strict=True):
        values = naive_resize(grid, *mask.shape)
        pixels = [(max(v, 0) if clip else v, m) for v, m in zip(values.ravel(), mask.ravel(), strict=True)]
        pixels = [(v, m) for v, m in pixels if m >= 0]
        if not any(m for _, m in pixels):
            continue
        top = [m for v, m in pixels if v >= max(v for v, _ in pixels) - 1e-9]
        mass = sum(max(v, 0) for v, _ in pixels)
        inside = sum(max(v, 0) for v, m in pixels if m)
        points.append(sum(top) / len(top))
        shares.append(inside / mass if mass else sum(m for _, m in pixels) / len(pixels))
    found = measured(maps, masks, clip)
    assert (found.objects, len(points)) == (2, 2)
    assert found.pointing == pytest.approx(sum(points) / 2, abs=1e-12)
    assert found.energy == pytest.approx(sum(shares) / 2, abs=1e-12)


def test_without_any_object_there_is_nothing_to_point_at():
    assert located([0, 1], [0, 0]) == (0, 0)


# What it refuses, with its sums as they were.


def nan_map(maps, masks):
    maps[1, 0, 0] = float("nan")


def infinite_map(maps, masks):
    maps[1, 0, 0] = float("-inf")


def label_two(maps, masks):
    masks[2, 3, 3] = 2


def no_labelled_pixel(maps, masks):
    masks[2] = -1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nan_map, "NaN"),
        (infinite_map, "infinity"),
        (label_two, "up to 2"),
        (no_labelled_pixel, "no labelled pixel"),
    ],
)
def test_a_bad_image_leaves_the_sums_as_they_were(damage, message):
    total = measured(*problem(22))
    before = {name: list(value) if isinstance(value, list) else value for name, value in sums(total).items()}
    maps, masks = problem(23)
    damage(maps, masks)
    with pytest.raises(ValueError, match=message):
        total.update(maps, masks)
    assert sums(total) == before


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (torch.ones(2, 3, 3), torch.ones(2, 3, 3), "float32"),
        (torch.ones(2, 3, 3), torch.ones(3, 3, 3).long(), r"\[2, 3, 3\], \[3, 3, 3\]"),
        (torch.ones(1, 2, 3, 3), torch.ones(1, 3, 3).long(), r"\[1, 2, 3, 3\]"),
        (torch.ones(1, 3, 3), torch.ones(3, 3).long(), r"\[1, 3, 3\], \[3, 3\]"),
    ],
)
def test_shapes_and_types_that_do_not_fit_leave_the_sums_as_they_were(maps, masks, message):
    total = measured(*problem(22))
    before = {name: list(value) if isinstance(value, list) else value for name, value in sums(total).items()}
    with pytest.raises(ValueError, match=message):
        total.update(maps, masks)
    assert sums(total) == before


def test_no_images_add_nothing():
    total = measured(*problem(22))
    expected = sums(measured(*problem(22)))
    total.update(torch.zeros(0, 3, 4), torch.zeros(0, 9, 7).long())
    assert sums(total) == expected
