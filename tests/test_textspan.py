"""textspan.py against Algorithm 1 written naively, moments written out, and cases worked by hand."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from textspan import Moments, TextSpan, reconstruct, textspan

SEEDS = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)

# Everything runs in float64 on a few hundred numbers near 1, so two routes to the same number differ by some
# 1e-14 (1e-16 each, a hundred operations, conditioning of small random matrices); a wrong term shows at 1e-3
# or more. 1e-9 lies far from both.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def close(a: Tensor | float, b: Tensor | float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), **CLOSE
    )


def same(a: TextSpan, b: TextSpan) -> None:
    assert a.indices == b.indices
    close(a.directions, b.directions)
    close(a.explained, b.explained)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hand(*rows: object) -> Tensor:
    """Numbers worked by hand, in float64."""
    return torch.tensor(rows, dtype=torch.float64)


def rotation(seed: int, d: int) -> Tensor:
    return torch.linalg.qr(normal(seed, d, d)).Q


def head(seed: int, n: int = 30, d: int = 6, width: int = 6, offset: float = 1.0) -> Tensor:
    """[n, d] contributions of a head of that width, around a mean."""
    return normal(seed, n, width) @ normal(seed + 1, width, d) + offset * normal(seed + 2, d)


def bank(seed: int, m: int = 12, d: int = 6) -> Tensor:
    return normal(seed + 3, m, d)


def variance(C: Tensor) -> Tensor:
    """Total variance of rows, as a mean of squared distances."""
    return (C - C.mean(dim=0)).square().sum(dim=1).mean()


def without(X: Tensor, r: Tensor) -> Tensor:
    """The rows of X with direction r removed."""
    return X - torch.outer(X @ r, r) / (r @ r)


def top(C: Tensor, texts: Tensor, rank: int | None) -> Tensor:
    """The texts projected onto the top right singular vectors of the uncentred contributions, left in the
    full space.
    """
    V = torch.eye(C.shape[1], dtype=C.dtype) if rank is None else torch.linalg.svd(C).Vh[:rank]
    return texts @ V.T @ V


def naive(C: Tensor, texts: Tensor, size: int, rank: int | None) -> tuple[list[int], Tensor]:
    """Algorithm 1 as printed: picks, and each pick's row of R when it was picked."""
    R, C = top(C, texts, rank), C - C.mean(dim=0)
    picks, rows = [], []
    for _ in range(size):
        D = R @ C.T
        j = int(D.var(dim=1, correction=0).argmax())
        picks.append(j)
        rows.append(R[j])
        R, C = without(R, rows[-1]), without(C, rows[-1])
    return picks, torch.stack(rows)


# ---- the picks ---------------------------------------------------------------------------------------------


@few
@given(seed=SEEDS, size=st.integers(1, 6), m=st.integers(6, 25))
def test_the_picks_are_those_of_the_algorithm_written_naively(seed, size, m):
    C, texts = head(seed), bank(seed, m)
    picks, rows = naive(C, texts, size, rank=None)
    span = textspan(C, texts, size, rank=None)
    assert span.indices == picks
    close(span.directions, rows)


@few
@given(seed=SEEDS, rank=st.integers(1, 6), data=st.data())
def test_with_a_rank_the_texts_are_first_projected_onto_the_top_uncentred_directions(seed, rank, data):
    C, texts, size = head(seed), bank(seed), data.draw(st.integers(1, rank))
    picks, rows = naive(C, texts, size, rank)
    span = textspan(C, texts, size, rank)
    assert span.indices == picks
    close(span.directions, rows)


@pytest.mark.parametrize(
    ("shape", "size", "ranks"),
    [
        ({"d": 10, "width": 3}, 2, (None, 2, 3, 4)),  # narrower than the space; 4: its width and the mean
        ({"n": 4, "d": 10, "width": 10}, 3, (None, 4)),  # fewer images than dimensions
    ],
)
def test_heads_of_other_shapes_give_the_naive_picks_too(shape, size, ranks):
    C, texts = head(0, **shape), bank(0, 20, 10)
    for rank in ranks:
        assert textspan(C, texts, size, rank).indices == naive(C, texts, size, rank)[0]


def test_a_head_that_writes_along_the_last_axes_only_gives_the_naive_picks_too():
    C, texts = head(0), bank(0)
    C[:, :3] = 0
    assert textspan(C, texts, 3, None).indices == naive(C, texts, 3, None)[0]


def test_a_rank_of_the_whole_space_changes_nothing_and_a_lower_one_matters():
    C, texts = head(1, offset=3.0), bank(1)
    assert textspan(C, texts, 2, rank=2).indices != textspan(C, texts, 2, rank=None).indices
    C, texts = head(0), bank(0)
    same(textspan(C, texts, 4, rank=6), textspan(C, texts, 4, rank=None))


def test_the_default_is_20_texts_and_rank_80():
    C, texts = head(0, n=120, d=90, width=90), bank(0, 100, 90)
    span = textspan(C, texts)
    assert len(span.indices) == 20
    same(span, textspan(C, texts, 20, rank=80))
    assert span.explained[0] != textspan(C, texts, 20, rank=None).explained[0]


def test_projected_texts_are_not_normalised_again():
    # Uncentred, the first axis is the only one that counts. The long text lies mostly off it but has more of
    # it: 0.8 against 0.5.
    C = hand([10.0, 0.0], [8.0, 0.0], [9.0, 0.1], [9.0, -0.1])
    texts = hand([0.5, 0.0], [0.8, 5.0])
    span = textspan(C, texts, 1, rank=1)
    assert span.indices == [1]
    close(span.directions, hand([0.8, 0.0]))


# Rows (+-2, +-1): variance 4 along x, 1 along y.
CROSS = hand([2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0])


def test_a_longer_text_scores_higher_by_hand():
    span = textspan(CROSS, hand([1.0, 0.0], [0.0, 3.0]), 2, rank=None)  # scores 4 and 9
    assert span.indices == [1, 0]
    close(span.explained, hand(1 / 5, 4 / 5))
    close(span.directions, hand([0.0, 3.0], [1.0, 0.0]))


def test_unit_texts_are_picked_by_variance_by_hand():
    span = textspan(CROSS, torch.eye(2), 2, rank=None)  # scores 4 and 1: the control to the case above
    assert span.indices == [0, 1]
    close(span.explained, hand(4 / 5, 1 / 5))


def test_a_text_is_cleared_of_the_ones_before_by_hand():
    # (3, 1) scores 4 * 9 + 1 = 37, (2.9, 1) 34.64 and (0, 1.5) 2.25. Cleared of (3, 1), i.e. along (-1, 3) /
    # sqrt(10), the second keeps 0.1 / sqrt(10) of its length and the third 4.5 / sqrt(10): the third wins
    # though it scored least.
    span = textspan(CROSS, hand([3.0, 1.0], [2.9, 1.0], [0.0, 1.5]), 2, rank=None)
    assert span.indices == [0, 2]
    close(span.directions[1], hand(-0.45, 1.35))


def test_a_text_that_is_nearly_another_still_adds_a_direction_by_hand():
    # Cleared of the first, the second keeps a thousandth of its length: a millionth of its square, far above
    # rounding.
    span = textspan(CROSS, hand([1.0, 0.0], [1.001, 0.001]), 2, rank=None)
    assert span.indices == [1, 0]
    close(span.explained.sum(), 1.0)


# ---- what the picks say ------------------------------------------------------------------------------------


@few
@given(seed=SEEDS, rank=st.sampled_from([None, 4, 5]))
def test_directions_are_orthogonal(seed, rank):
    Q = textspan(head(seed), bank(seed), 4, rank).directions
    Q = Q / Q.norm(dim=1, keepdim=True)
    close(Q @ Q.T, torch.eye(4))


def test_the_picked_texts_themselves_are_not_orthogonal():
    texts = bank(0)[textspan(head(0), bank(0), 4, None).indices]
    assert (texts @ texts.T).fill_diagonal_(0).abs().max() > 0.5  # of vectors of norm about 2.4


@few
@given(seed=SEEDS, rank=st.sampled_from([None, 4, 5]))
def test_each_direction_is_its_projected_text_minus_what_the_directions_before_hold(seed, rank):
    C, texts = head(seed), bank(seed)
    span = textspan(C, texts, 4, rank)
    projected = top(C, texts, rank)[span.indices]
    for i in range(4):
        before = span.directions[:i]
        close(span.directions[i], projected[i] - projected[i] @ torch.linalg.pinv(before) @ before)


def test_a_direction_is_not_in_the_span_of_other_texts():
    span, texts = textspan(head(0), bank(0), 3, None), bank(0)
    others = texts[[j for j in range(12) if j not in span.indices][:2]]
    assert (span.directions - span.directions @ torch.linalg.pinv(others) @ others).norm(dim=1).min() > 0.1


@few
@given(seed=SEEDS, rank=st.sampled_from([None, 4, 5]))
def test_explained_is_the_variance_that_removing_each_direction_takes_away(seed, rank):
    C = head(seed)
    span, total, drops = textspan(C, bank(seed), 4, rank), variance(C), []
    for r in span.directions:
        drops.append(variance(C) - variance(without(C, r)))
        C = without(C, r)
    close(span.explained, torch.stack(drops) / total)


@few
@given(seed=SEEDS, size=st.integers(1, 5))
def test_explained_sums_to_less_than_one_while_the_picks_do_not_span_the_head(seed, size):
    explained = textspan(head(seed), bank(seed), size, None).explained
    assert explained.min() > 0
    assert explained.sum() < 1


@few
@given(seed=SEEDS, rank=st.sampled_from([None, 6, 80]))
def test_explained_sums_to_one_when_the_picks_span_the_head(seed, rank):
    close(textspan(head(seed), bank(seed), 6, rank).explained.sum(), 1.0)


def test_the_results_are_in_float64():
    span = textspan(head(0).float(), bank(0).float(), 2)
    assert span.directions.dtype == span.explained.dtype == torch.float64
    assert span.directions.shape == (2, 6)
    assert span.explained.shape == (2,)


def test_no_graph_is_kept():
    span = textspan(head(0).requires_grad_(), bank(0).requires_grad_(), 2)
    assert not span.directions.requires_grad
    assert not span.explained.requires_grad


def test_the_inputs_are_left_as_they_are():
    C, texts = head(0), bank(0)
    moments = Moments(6).update(C)
    textspan(moments, texts, 3)
    assert torch.equal(texts, bank(0))
    close(moments.covariance, torch.cov(C.T, correction=0))


def test_random_texts_explain_less_than_the_greedy_picks():
    C, texts = head(0), bank(0, 40)
    span = textspan(C, texts, 2, None)
    shares = []
    for seed in range(50):
        T = texts[torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:2]]
        shares.append(variance(C @ torch.linalg.pinv(T) @ T) / variance(C))
    assert torch.stack(shares).mean() < 0.75 * span.explained.sum()


# ---- the same from data and from moments -------------------------------------------------------------------


def split(x: Tensor, seed: int) -> list[Tensor]:
    """x in batches of random sizes, some of them empty."""
    cuts = sorted(random.Random(seed).choices(range(len(x) + 1), k=5))
    return [x[a:b] for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True)]


def moments_of(batches: list[Tensor]) -> Moments:
    moments = Moments(batches[0].shape[-1], tuple(batches[0].shape[1:-1]))
    for batch in batches:
        moments.update(batch)
    return moments


def merged(batches: list[Tensor], seed: int) -> Moments:
    """The batches' moments merged in random order."""
    parts = [moments_of([batch]) for batch in batches]
    random.Random(seed).shuffle(parts)
    while len(parts) > 1:
        parts[0].merge(parts.pop())
    return parts[0]


def same_moments(a: Moments, b: Moments) -> None:
    assert a.count == b.count
    close(a.mean, b.mean)
    close(a.scatter, b.scatter)
    close(a.covariance, b.covariance)


@few
@given(seed=SEEDS, rank=st.sampled_from([None, 4, 80]))
def test_data_and_their_moments_in_any_split_give_the_same_span(seed, rank):
    C, texts = head(seed), bank(seed)
    batches = split(C, seed)
    span = textspan(C, texts, 4, rank)
    same(textspan(moments_of([C]), texts, 4, rank), span)
    same(textspan(moments_of(batches), texts, 4, rank), span)
    same(textspan(merged(batches, seed), texts, 4, rank), span)


@few
@given(seed=SEEDS)
def test_moments_are_count_mean_and_covariance(seed):
    x = head(seed)
    for moments in (moments_of([x]), moments_of(split(x, seed)), merged(split(x, seed), seed)):
        assert moments.count == 30
        close(moments.mean, x.mean(dim=0))
        close(moments.covariance, torch.cov(x.T, correction=0))
        close(moments.scatter, 29 * torch.cov(x.T))


def test_moments_notice_one_row_less():
    x = head(0)
    assert not torch.allclose(moments_of([x[1:]]).covariance, torch.cov(x.T, correction=0), **CLOSE)


@few
@given(seed=SEEDS)
def test_merging_leaves_the_other_unchanged(seed):
    a, b = moments_of([head(seed)]), moments_of([head(seed + 9)])
    returned = a.merge(b)
    assert returned is a
    same_moments(b, moments_of([head(seed + 9)]))
    a.update(head(seed))  # and shares no memory with it
    same_moments(b, moments_of([head(seed + 9)]))


def test_merging_into_empty_moments_copies():
    part = moments_of([head(0)])
    whole = Moments(6).merge(part)
    same_moments(whole, part)
    whole.update(head(1))
    same_moments(part, moments_of([head(0)]))


def test_empty_moments_and_empty_updates_change_nothing():
    same_moments(moments_of([head(0)]).merge(Moments(6)), moments_of([head(0)]))
    same_moments(Moments(6).merge(Moments(6)), Moments(6))
    same_moments(Moments(6).update(torch.empty(0, 6)), Moments(6))
    same_moments(moments_of([head(0)]).update(torch.empty(0, 6)), moments_of([head(0)]))


def test_moments_of_nothing_are_zero():
    moments = Moments(3, (2,))
    assert moments.count == 0
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    assert torch.equal(moments.mean, torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(moments.covariance, torch.zeros(2, 3, 3, dtype=torch.float64))


@few
@given(seed=SEEDS)
def test_moments_of_many_heads_are_those_of_each(seed):
    x = normal(seed, 20, 2, 3, 4)
    moments = moments_of(split(x, seed))
    for layer in range(2):
        for h in range(3):
            same_moments(moments[layer, h], moments_of([x[:, layer, h]]))
        same_moments(moments[layer], moments_of([x[:, layer]]))


def test_moments_of_many_heads_can_be_merged():
    x = normal(0, 20, 2, 3, 4)
    same_moments(merged(split(x, 0), 0), moments_of([x]))


def test_one_head_taken_out_is_another_object():
    x = normal(0, 20, 2, 3)
    moments = moments_of([x])
    moments[1].update(x[:5, 1])
    same_moments(moments, moments_of([x]))


@few
@given(seed=SEEDS)
def test_mapped_moments_are_the_moments_of_mapped_rows(seed):
    x, A = normal(seed, 20, 2, 3, 4) + 1, normal(seed + 1, 2, 3, 4, 5)
    same_moments(moments_of([x]).map(A), moments_of([torch.einsum("nlhe,lhed->nlhd", x, A)]))


def test_a_map_can_be_in_float32_and_hold_a_graph():
    x, A = head(0), normal(1, 6, 4).float().requires_grad_()
    mapped = moments_of([x]).map(A)
    assert not mapped.mean.requires_grad
    same_moments(mapped, moments_of([x @ A.double()]))


def test_a_heads_span_comes_from_the_moments_of_its_values():
    x, A, texts = head(0, d=3, width=3), normal(1, 3, 6), bank(0)
    same(textspan(moments_of([x]).map(A), texts, 3), textspan(x @ A, texts, 3))


def far(dtype: torch.dtype) -> Tensor:
    """Rows of standard deviation 1 at a distance of a million, every number exact in float32 (steps of 1/16
    there).
    """
    return ((normal(0, 200, 3) * 16).round() / 16 + 1e6).to(dtype)


def test_float32_rows_are_summed_in_float64():
    moments = moments_of(list(far(torch.float32).split(7)))
    # Squares of 1e6 in float64 carry 1e-4; deviations are taken first, so 1e6 * 1e-16 * a few hundred rows is
    # left: below 1e-7.
    torch.testing.assert_close(
        moments.covariance, torch.cov(far(torch.float64).T, correction=0), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(moments.mean, far(torch.float64).mean(dim=0), rtol=0, atol=1e-7)


def test_summing_the_same_rows_in_float32_would_fail():
    x = far(torch.float32)
    covariance = x.T @ x / len(x) - torch.outer(x.mean(dim=0), x.mean(dim=0))
    assert (covariance.double() - torch.cov(far(torch.float64).T, correction=0)).abs().max() > 1
    assert (x.mean(dim=0).double() - far(torch.float64).mean(dim=0)).abs().max() > 1e-4


# ---- reconstruction ----------------------------------------------------------------------------------------


@few
@given(seed=SEEDS, rank=st.sampled_from([None, 3, 80]))
def test_what_reconstruction_leaves_is_what_is_not_explained(seed, rank):
    C = head(seed)
    span = textspan(C, bank(seed), 3, rank)
    left = C - reconstruct(C, span, C.mean(dim=0))
    close(variance(left) / variance(C), 1 - span.explained.sum())


@few
@given(seed=SEEDS, rank=st.sampled_from([None, 3, 4]))
def test_reconstruction_is_the_least_squares_projection_onto_the_projected_texts(seed, rank):
    C, texts = head(seed), bank(seed)
    span, mean = textspan(C, texts, 3, rank), C.mean(dim=0)
    T = top(C, texts, rank)[span.indices]
    close(reconstruct(C, span, mean), mean + (C - mean) @ torch.linalg.pinv(T) @ T)


@few
@given(seed=SEEDS)
def test_all_directions_of_a_narrow_head_reproduce_it(seed):
    C = head(seed, d=8, width=3)
    span = textspan(C, bank(seed, 12, 8), 4)  # its width and the mean
    close(reconstruct(C, span, C.mean(dim=0)), C)


def test_one_direction_does_not_reproduce_the_head():
    C = head(0)
    span = textspan(C, bank(0), 1)
    assert not torch.allclose(reconstruct(C, span, C.mean(dim=0)), C, atol=0.1)


def test_other_rows_are_reconstructed_around_the_mean_given_by_hand():
    span = textspan(CROSS, hand([0.0, 3.0], [0.0, 1.0]), 1, rank=None)  # along y
    rows, mean = hand([5.0, 7.0], [1.0, 0.0]), hand(10.0, 20.0)
    close(reconstruct(rows, span, mean), hand([10.0, 7.0], [10.0, 0.0]))


def test_reconstruction_keeps_the_type_of_the_rows():
    span = textspan(head(0), bank(0), 2)
    assert reconstruct(head(0).float(), span, head(0).mean(dim=0)).dtype == torch.float32


# ---- invariances -------------------------------------------------------------------------------------------

RANKS = st.sampled_from([None, 4, 80])


@few
@given(seed=SEEDS, rank=RANKS)
def test_reordered_images_and_texts_give_the_same_texts(seed, rank):
    C, texts = head(seed), bank(seed)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    same(textspan(C[order], texts, 4, rank), textspan(C, texts, 4, rank))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    picks = textspan(C, texts[order], 4, rank).indices
    assert order[picks].tolist() == textspan(C, texts, 4, rank).indices


@few
@given(seed=SEEDS)
def test_without_a_rank_a_constant_added_to_every_contribution_does_not_matter(seed):
    C, texts = head(seed), bank(seed)
    same(textspan(C + 5 * normal(seed + 9, 6), texts, 4, None), textspan(C, texts, 4, None))


def test_with_a_rank_a_constant_added_to_every_contribution_matters():
    C, texts = head(0), bank(0)
    assert textspan(C + 50 * normal(9, 6), texts, 2, 2).indices != textspan(C, texts, 2, 2).indices


@few
@given(seed=SEEDS, rank=RANKS, scale=st.sampled_from([-1e-9, 0.5, 1e9]))
def test_the_scale_of_contributions_and_texts_does_not_matter(seed, rank, scale):
    C, texts = head(seed), bank(seed)
    same(textspan(scale * C, texts, 4, rank), textspan(C, texts, 4, rank))
    a, b = textspan(C, scale * texts, 4, rank), textspan(C, texts, 4, rank)
    assert a.indices == b.indices
    close(a.directions / scale, b.directions)
    close(a.explained, b.explained)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_scale_of_one_text_matters(rank):
    C, texts = head(0), bank(0)
    last = naive(C, texts, 4, rank)[0][-1]
    texts[last] *= 1000
    assert textspan(C, texts, 4, rank).indices[0] == last


@few
@given(seed=SEEDS, rank=RANKS)
def test_rotating_contributions_and_texts_together_does_not_matter(seed, rank):
    C, texts, Q = head(seed), bank(seed), rotation(seed, 6)
    a, b = textspan(C @ Q, texts @ Q, 4, rank), textspan(C, texts, 4, rank)
    assert a.indices == b.indices
    close(a.directions @ Q.T, b.directions)
    close(a.explained, b.explained)


def test_rotating_the_texts_alone_matters():
    C, texts = head(0), bank(0)
    assert textspan(C, texts @ rotation(5, 6), 4).indices != textspan(C, texts, 4).indices


@few
@given(seed=SEEDS, rank=RANKS, size=st.integers(1, 3))
def test_a_longer_run_starts_with_the_shorter_one(seed, rank, size):
    C, texts = head(seed), bank(seed)
    long, short = textspan(C, texts, 4, rank), textspan(C, texts, size, rank)
    same(TextSpan(long.indices[:size], long.directions[:size], long.explained[:size]), short)


# ---- what cannot be named ----------------------------------------------------------------------------------


def test_texts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"texts must be \[m, 6\] like the contributions, got \[12, 5\]"):
        textspan(head(0), bank(0, d=5), 2)
    with pytest.raises(ValueError, match=r"texts must be \[m, 6\] like the contributions, got \[6\]"):
        textspan(head(0), bank(0)[0], 1)


@pytest.mark.parametrize("shape", [(6,), (3, 2, 6)])
def test_contributions_that_are_no_rows_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected rows \[6\]"):
        textspan(torch.ones(shape), bank(0), 2)


def test_moments_refuse_rows_and_moments_of_other_widths():
    with pytest.raises(ValueError, match=r"expected rows \[2, 3\] in a tensor \[n, ...\], got \[5, 3\]"):
        Moments(3, (2,)).update(torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"cannot merge moments of \[2, 3\] into \[3\]"):
        Moments(3).merge(Moments(3, (2,)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_broken_contributions_are_counted(bad):
    C = head(0)
    C[4, 1] = C[4, 2] = C[17, 5] = bad
    with pytest.raises(ValueError, match="2 of 30 rows hold a NaN or an infinity, the first is row 4"):
        textspan(C, bank(0), 2)


def test_broken_rows_of_many_heads_are_counted_once_each():
    x = normal(0, 9, 2, 3)
    x[8, 0, 0] = x[8, 1, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 9 rows hold a NaN or an infinity, the first is row 8"):
        Moments(3, (2,)).update(x)


def test_a_refused_batch_leaves_the_moments_as_they_were():
    moments = moments_of([head(0)])
    with pytest.raises(ValueError, match="NaN"):
        moments.update(torch.full((2, 6), float("nan")))
    same_moments(moments, moments_of([head(0)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_texts_are_refused(bad):
    texts = bank(0)
    texts[3, 2] = bad
    with pytest.raises(ValueError, match="texts' embeddings hold a NaN"):
        textspan(head(0), texts, 2)


@pytest.mark.parametrize("rank", [None, 80])
@pytest.mark.parametrize(
    "C", [torch.ones(30, 6), torch.full((30, 6), 0.1), torch.zeros(30, 6), head(0)[:1], head(0)[:0]]
)
def test_contributions_without_variance_are_refused(C, rank):
    with pytest.raises(ValueError, match=f"no variance over {len(C)} images"):
        textspan(C, bank(0), 1, rank)


def test_float32_rounding_around_a_constant_is_no_variance_and_a_hundred_times_it_is():
    # 1e-7 of the norm, what float32 rounds; 1e-14 of its square.
    with pytest.raises(ValueError, match="no variance"):
        textspan(1 + 1e-7 * normal(0, 30, 6), bank(0), 1)
    C = 1 + 1e-5 * normal(0, 30, 6)
    assert textspan(C, bank(0), 1, rank=None).indices == naive(C, bank(0), 1, None)[0]


@pytest.mark.parametrize("size", [0, -1, 13])
def test_sizes_that_the_bank_does_not_hold_are_refused(size):
    with pytest.raises(ValueError, match=f"size must be between 1 and the number of texts, 12; got {size}"):
        textspan(head(0), bank(0), size)


def test_as_many_texts_as_the_bank_holds_can_be_picked():
    assert sorted(textspan(head(0), bank(0, m=4), 4).indices) == [0, 1, 2, 3]


def mirrored(seed: int, width: int, d: int = 6) -> Tensor:
    """Contributions of that rank whose mean is zero."""
    C = head(seed, width=width, d=d, offset=0.0)
    return torch.cat([C, -C])


@few
@given(seed=SEEDS)
def test_more_texts_than_the_rank_of_the_contributions_are_refused(seed):
    assert len(textspan(mirrored(seed, 3), bank(seed), 3).indices) == 3
    with pytest.raises(
        ValueError, match="hold 3 independent directions that a text can name; size=4 is too many"
    ):
        textspan(mirrored(seed, 3), bank(seed), 4)


def test_the_mean_counts_toward_the_rank_of_the_contributions():
    C = mirrored(0, 3) + normal(9, 6)
    assert len(textspan(C, bank(0), 4).indices) == 4
    with pytest.raises(ValueError, match="hold 4 independent directions"):
        textspan(C, bank(0), 5)


def test_a_mean_at_the_level_of_rounding_does_not_count_toward_the_rank():
    C = mirrored(0, 3)  # of norm 2 or so; 1e-9 of it is 1e-18 of its square, 1e-5 is 1e-10
    assert len(textspan(C + 1e-5, bank(0), 4).indices) == 4
    with pytest.raises(ValueError, match="hold 3 independent directions"):
        textspan(C + 1e-9, bank(0), 4)


def test_more_texts_than_the_rank_asked_for_are_refused():
    with pytest.raises(ValueError, match="hold 2 independent directions"):
        textspan(head(0), bank(0), 3, rank=2)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be at least 1, or None for no projection; got {rank}"):
        textspan(head(0), bank(0), 1, rank)


def test_moments_of_many_heads_must_be_indexed():
    moments = Moments(6, (2, 3)).update(normal(0, 8, 2, 3, 6))
    with pytest.raises(ValueError, match=r"one head, got moments of \[2, 3, 6\]"):
        textspan(moments, normal(1, 5, 6), 1)
    assert len(textspan(moments[1, 2], normal(1, 5, 6), 1).indices) == 1


@pytest.mark.parametrize("rank", [None, 80])
def test_more_texts_than_the_space_has_directions_are_refused(rank):
    with pytest.raises(ValueError, match="hold 6 independent directions"):
        textspan(head(0), bank(0), 7, rank)


@pytest.mark.parametrize("rank", [None, 80])
@pytest.mark.parametrize(("strength", "seen"), [(1e-5, True), (1e-7, False)])
def test_directions_at_the_level_of_float32_rounding_do_not_count(strength, seen, rank):
    C = torch.diag(torch.tensor([1.0, strength], dtype=torch.float64))
    C = torch.cat([C, -C])
    if seen:
        assert textspan(C, torch.eye(2), 2, rank).indices == [0, 1]
    else:
        with pytest.raises(ValueError, match="hold 1 independent directions"):
            textspan(C, torch.eye(2), 2, rank)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_what_counts_as_rounding_does_not_depend_on_the_scale(scale):
    C = scale * torch.diag(torch.tensor([1.0, 1e-5], dtype=torch.float64))
    assert textspan(torch.cat([C, -C]), torch.eye(2), 2).indices == [0, 1]


def test_rounding_is_told_by_the_strongest_direction_be_it_the_mean():
    C = torch.diag(torch.tensor([0, 1e-5, 1e-8], dtype=torch.float64))
    C = torch.cat([C, -C]) + hand(1, 0, 0)  # float32 would round the third axis at 1e-7
    assert textspan(C, torch.eye(3), 1).indices == [1]
    with pytest.raises(ValueError, match="hold 1 independent directions"):
        textspan(C, torch.eye(3), 2)


@pytest.mark.parametrize("rank", [None, 80])
def test_texts_that_the_head_does_not_write_at_all_are_refused(rank):
    Q = rotation(0, 6)  # the head writes along the first three rows, the texts lie along the others
    C, texts = normal(1, 30, 3) @ Q[:3], normal(2, 10, 3) @ Q[3:]
    with pytest.raises(ValueError, match="hold 0 independent directions"):
        textspan(C, texts, 1, rank)


@pytest.mark.parametrize("rank", [None, 80])
def test_a_text_that_the_head_does_not_write_is_not_picked_after_one_that_it_writes(rank):
    Q = rotation(0, 6)
    C, texts = normal(1, 30, 3) @ Q[:3], torch.cat([Q[:1], normal(2, 10, 3) @ Q[3:]])
    assert textspan(C, texts, 1, rank).indices == [0]
    with pytest.raises(ValueError, match="hold 1 independent directions"):
        textspan(C, texts, 2, rank)


@few
@given(seed=SEEDS, rank=RANKS)
def test_duplicate_texts_are_never_picked_twice(seed, rank):
    C, texts = head(seed), bank(seed, 6)
    picks = textspan(C, texts.repeat(3, 1), 4, rank).indices
    assert [j % 6 for j in picks] == textspan(C, texts, 4, rank).indices
    assert len({j % 6 for j in picks}) == 4


@few
@given(seed=SEEDS, rank=RANKS)
def test_one_text_in_many_lengths_is_one_direction(seed, rank):
    texts = torch.outer(torch.linspace(0.1, 1, 9, dtype=torch.float64), normal(seed, 6))
    assert textspan(head(seed), texts, 1, rank).indices == [8]
    with pytest.raises(ValueError, match="hold 1 independent directions"):
        textspan(head(seed), texts, 2, rank)


def test_a_text_of_length_zero_is_never_picked():
    texts = torch.cat([torch.zeros(1, 6, dtype=torch.float64), bank(0, 3)])
    assert 0 not in textspan(head(0), texts, 3, None).indices
    with pytest.raises(ValueError, match="hold 3 independent directions"):
        textspan(head(0), texts, 4, None)


# Rounding is told from signal on any scale, of contributions and of texts.


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("rank", [80, None])
def test_what_rounding_leaves_is_picked_on_no_scale(scale, rank):
    """Three directions, forty texts: the fourth pick would be rounding."""
    generator = torch.Generator().manual_seed(0)
    C = (
        scale
        * torch.randn(100, 3, generator=generator, dtype=torch.float64)
        @ torch.randn(3, 12, generator=generator, dtype=torch.float64)
    )
    texts = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    span = textspan(C, texts, size=3, rank=rank)
    assert float(span.explained.sum()) == pytest.approx(1, abs=1e-9) or rank is None
    if rank is not None:
        with pytest.raises(ValueError, match="hold 3 independent directions"):
            textspan(C, texts, size=4, rank=rank)


@pytest.mark.parametrize("length", [1e-13, 1.0, 1e13])
def test_a_text_of_any_length_is_named(length):
    """It alone lies along the second axis."""
    C = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    texts = torch.tensor([[1.0, 0.0], [0.0, length]], dtype=torch.float64)
    assert sorted(textspan(C, texts, size=2).indices) == [0, 1]


@pytest.mark.parametrize("mean", [[3.0, -3.0, 0.0], [-3.0, -3.0, -3.0], [3.0, 3.0, 3.0]])
def test_rounding_about_a_mean_is_no_direction(mean):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    mean = torch.tensor(mean, dtype=torch.float64)
    assert len(Moments(3).update(mean + 1e-8 * noise).factor()) == 0
    assert len(Moments(3).update(mean + 1e-3 * noise).factor()) == 3


def test_a_factor_is_one_of_the_covariance_and_has_its_rank():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64) @ torch.randn(
        4, 9, generator=generator, dtype=torch.float64
    )
    moments = Moments(9).update(x)
    F = moments.factor()
    assert F.shape == (4, 9)
    torch.testing.assert_close(F.T @ F, torch.cov(x.T, correction=0), rtol=1e-10, atol=1e-10)
