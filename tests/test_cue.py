"""cue.py against the shares of variance of explicit terms, and against directions worked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from cue import CueVotes, subspace
from textspan import Moments

SEEDS = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)

# Float64 on a few hundred numbers near 1: two routes differ by some 1e-14, a wrong term by 1e-3 or more. 1e-9
# lies far from both.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
L, H, E, D = 2, 3, 4, 6


def close(a: Tensor | float, b: Tensor | float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), **CLOSE
    )


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_texts(seed: int, t: int = 4) -> Tensor:
    return normalize(normal(seed, t, D), dim=1)


def pseudo_label(embedding: Tensor, texts: Tensor) -> Tensor:
    """The text that fits an image better than it fits these images on average."""
    fit = embedding @ texts.T
    return (fit - fit.mean(dim=0)).argmax(dim=1)


def world(seed: int, n: int = 60, t: int = 4, effect: float = 1.0):
    """Texts, maps, embeddings, and values that depend on the pseudo-label, the more the larger `effect`."""
    texts, maps, embedding = (
        unit_texts(seed, t),
        normal(seed + 1, L, H, E, D),
        normal(seed + 2, n, D) + normal(seed + 5, D),
    )
    values = (
        normal(seed + 3, n, L, H, E)
        + effect * normal(seed + 4, t, L, H, E)[pseudo_label(embedding, texts)]
        + 1
    )
    return texts, maps, embedding, values


def explained(
    texts: Tensor,
    maps: Tensor,
    embedding: Tensor,
    values: Tensor,
    batch: int = 1000,
    centre: Tensor | None = None,
) -> Tensor:
    """CueVotes on these images, their mean as the centre unless another is given."""
    votes = CueVotes(texts, maps, embedding.mean(dim=0).to(texts) if centre is None else centre)
    moments = Moments(values.shape[-1], tuple(values.shape[1:3]))
    for part, rows in zip(embedding.split(batch), values.split(batch), strict=True):
        votes.update(part, rows)
        moments.update(rows)
    return votes.explained(moments)


def share(terms: Tensor, label: Tensor) -> tuple[float, float]:
    """Of one head's terms [n, d]: the share of variance between labels, raw and as epsilon squared (SSb -
    (k-1) MSw) / SSt.
    """
    mean, total, between = terms.mean(dim=0), 0.0, 0.0
    groups = [terms[label == c] for c in label.unique()]
    for group in groups:
        between += len(group) * float((group.mean(dim=0) - mean).square().sum())
    total = float((terms - mean).square().sum())
    k, n = len(groups), len(terms)
    mean_square_within = (total - between) / (n - k)
    return between / total, max(0.0, (between - (k - 1) * mean_square_within) / total)


def explicit(texts: Tensor, maps: Tensor, embedding: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[L, H] raw and corrected shares from the terms values @ maps, written out."""
    label = pseudo_label(embedding, texts)
    both = [
        [share(values[:, i, j] @ maps[i, j], label) for j in range(maps.shape[1])] for i in range(len(maps))
    ]
    return torch.tensor(both, dtype=torch.float64).unbind(dim=-1)


# ---- pseudo-labels -----------------------------------------------------------------------------------------


def votes_around(centre: Tensor, texts: Tensor) -> CueVotes:
    return CueVotes(texts, torch.zeros(L, H, E, texts.shape[1]), centre)


@few
@given(seed=SEEDS, t=st.integers(1, 6))
def test_the_label_is_the_text_that_fits_an_image_better_than_it_fits_the_mean_image(seed, t):
    texts, _, embedding, _ = world(seed, t=t)
    assert torch.equal(
        votes_around(embedding.mean(dim=0), texts).labels(embedding), pseudo_label(embedding, texts)
    )


def test_a_text_near_to_everything_wins_all_votes_only_without_a_centre_by_hand():
    texts, images = torch.eye(2), torch.tensor([[10.0, 1.0], [10.0, -1.0]])
    assert votes_around(torch.tensor([10.0, 0.0]), texts).labels(images).tolist() == [1, 0]
    assert votes_around(torch.zeros(2), texts).labels(images).tolist() == [0, 0]


def test_votes_count_the_labels():
    texts, maps, embedding, values = world(0)
    votes = CueVotes(texts, maps, embedding.mean(dim=0))
    for _ in range(2):
        votes.update(embedding, values)
    assert votes.count.tolist() == (2 * torch.bincount(pseudo_label(embedding, texts), minlength=4)).tolist()


# ---- explained ---------------------------------------------------------------------------------------------


@few
@given(seed=SEEDS, n=st.integers(8, 60), t=st.integers(2, 6), effect=st.sampled_from([0.0, 0.3, 1.0]))
def test_explained_is_the_corrected_share_of_the_explicit_terms(seed, n, t, effect):
    data = world(seed, n, t, effect)
    close(explained(*data), explicit(*data)[1])


def test_explained_is_not_the_raw_share():
    data = world(0, n=20)
    assert (explicit(*data)[0] - explained(*data)).min() > 0.01


def test_explained_is_about_zero_when_values_do_not_depend_on_the_label():
    runs = [world(10 * seed, n=40, t=10, effect=0.0) for seed in range(5)]
    raw = torch.stack([explicit(*data)[0] for data in runs])
    corrected = torch.stack([explained(*data) for data in runs])
    # Chance gives (k - 1) / (n - 1) = 0.23 of raw share. Clamped at 0, the mean of 30 heads keeps about half
    # the spread of one head, sqrt(2 * 9 / 3) / 39 = 0.06: 0.03.
    assert 0.18 < raw.mean() < 0.28
    assert corrected.mean() < 0.05


def test_explained_is_one_when_the_label_determines_the_values_and_not_of_other_images():
    texts, maps, embedding, _ = world(0)
    values = normal(5, 4, L, H, E)[pseudo_label(embedding, texts)]
    close(explained(texts, maps, embedding, values), torch.ones(L, H))
    assert explained(texts, maps, embedding, values.roll(1, dims=0)).max() < 0.2


def test_each_head_gets_its_own_share():
    texts, maps, embedding, values = world(0, effect=0.0)
    values[:, 1, 2] = normal(5, 4, E)[pseudo_label(embedding, texts)]
    found = explained(texts, maps, embedding, values)
    close(found[1, 2], 1.0)
    assert found.flatten().sort().values[-2] < 0.2


def test_variance_counts_where_the_map_sends_it():
    # Each of the two axes of the values matters to one head only: the first axis tells the label, the second
    # does not.
    texts, _, embedding, _ = world(0)
    label = pseudo_label(embedding, texts)
    values = torch.stack([label.double(), normal(5, 60)], dim=1)[:, None, None].expand(60, 1, 2, 2)
    maps = torch.zeros(1, 2, 2, D, dtype=torch.float64)
    maps[0, 0, 0, 3] = maps[0, 1, 1, 3] = 1.0
    found = explained(texts, maps, embedding, values)
    close(found[0, 0], 1.0)
    assert found[0, 1] < 0.2


def test_a_share_by_hand():
    # Groups {0, 2} and {10, 12} on one axis: mean 6, SSt = 36 + 16 + 16 + 36 = 104, SSb = 4 * 25 = 100, SSw =
    # 4, n - k = 2. epsilon squared = (100 - 1 * 4 / 2) / 104.
    texts = torch.eye(2, dtype=torch.float64)
    values = torch.tensor([0.0, 2.0, 10.0, 12.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    maps = torch.tensor([[[[0.0, 7.0]]]])
    close(
        explained(texts, maps, texts[[0, 0, 1, 1]], values), torch.tensor([[98 / 104]], dtype=torch.float64)
    )


def test_a_label_with_one_image_counts_by_hand():
    # Groups {0, 2} and {10}: mean 4, SSt = 16 + 4 + 36 = 56, SSb = 2 * 9 + 36 = 54, SSw = 2, n - k = 1: (54 -
    # 1 * 2 / 1) / 56.
    texts = torch.eye(2, dtype=torch.float64)
    values = torch.tensor([0.0, 2.0, 10.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    found = explained(texts, torch.ones(1, 1, 1, 2), texts[[0, 0, 1]], values)
    close(found, torch.tensor([[52 / 56]], dtype=torch.float64))


@few
@given(seed=SEEDS)
def test_explained_lies_between_zero_and_one(seed):
    found = explained(*world(seed, n=12, t=5, effect=0.0))
    assert found.min() >= 0
    assert found.max() <= 1


@few
@given(seed=SEEDS, batch=st.integers(1, 60))
def test_batches_do_not_matter(seed, batch):
    data = world(seed)
    close(explained(*data, batch=batch), explained(*data))


@few
@given(seed=SEEDS)
def test_the_order_of_images_does_not_matter(seed):
    texts, maps, embedding, values = world(seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    close(explained(texts, maps, embedding[order], values[order]), explained(texts, maps, embedding, values))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_embeddings_and_their_centre_does_not_matter(scale):
    texts, maps, embedding, values = world(0)
    close(explained(texts, maps, scale * embedding, values), explained(texts, maps, embedding, values))


def test_a_constant_added_to_the_embeddings_matters_without_their_centre():
    texts, maps, embedding, values = world(0)
    close(
        explained(texts, maps, embedding + 9 * normal(9, D), values),
        explained(texts, maps, embedding, values),
    )
    moved = explained(texts, maps, embedding + 9 * normal(9, D), values, centre=embedding.mean(dim=0))
    assert (moved - explained(texts, maps, embedding, values)).abs().max() > 0.1


def test_the_direction_of_the_embeddings_matters():
    texts, maps, embedding, values = world(0)
    assert (
        explained(texts, maps, -embedding, values) - explained(texts, maps, embedding, values)
    ).abs().max() > 0.1


def test_a_constant_added_to_all_values_does_not_matter():
    texts, maps, embedding, values = world(0)
    close(explained(texts, maps, embedding, values + 5), explained(texts, maps, embedding, values))


@pytest.mark.parametrize("place", [0, 2, 4])
def test_texts_with_no_image_are_ignored(place):
    texts, maps, embedding, values = world(0)
    # All embeddings lie beyond the centre along the first axis, which the old texts do not see and the new
    # one opposes.
    texts[:, 0], embedding[:, 0] = 0, 5
    centre = embedding.mean(dim=0) - 5 * torch.eye(D, dtype=torch.float64)[0]
    values = values + normal(5, 4, L, H, E)[pseudo_label(embedding, texts)]
    more = torch.cat([texts[:place], -torch.eye(D, dtype=torch.float64)[:1], texts[place:]])
    found = explained(texts, maps, embedding, values, centre=centre)
    assert found.min() > 0.1
    close(explained(more, maps, embedding, values, centre=centre), found)


def test_texts_with_images_are_not_ignored():
    texts, maps, embedding, values = world(0)
    more = torch.cat([texts, unit_texts(7, 1)])
    assert (
        explained(more, maps, embedding, values) - explained(texts, maps, embedding, values)
    ).abs().max() > 1e-3


def test_one_text_explains_nothing():
    close(explained(*world(0, t=1)), torch.zeros(L, H))


def test_float32_is_summed_in_float64():
    texts, maps, embedding, values = (x.float() for x in world(0))
    values = values + 1000
    # The same float32 numbers, told apart as float64; the sums alone would lose 1e-4 in float32.
    close(
        explained(texts, maps, embedding, values), explained(texts, maps.double(), embedding, values.double())
    )


def test_embeddings_and_their_centre_may_differ_in_type_from_the_texts():
    texts, maps, embedding, values = world(0)
    close(
        explained(texts.float(), maps, embedding, values), explained(texts, maps, embedding.float(), values)
    )
    centre = embedding.mean(dim=0)
    found = explained(texts.float(), maps, embedding, values, centre=centre)
    close(found, explained(texts.float(), maps, embedding, values, centre=centre.float()))


def test_the_results_are_in_float64_per_head():
    found = explained(*(x.float() for x in world(0)))
    assert found.dtype == torch.float64
    assert found.shape == (L, H)


def test_a_head_that_writes_nothing_or_a_constant_does_not_look_at_the_cue():
    texts, maps, embedding, values = world(0)
    values[:, 0, 0] = 0
    close(explained(texts, maps, embedding, values)[0, 0], 0.0)
    values[:, 0, 1] = 0.1  # no binary fraction: its mean is off by rounding
    close(explained(texts, maps, embedding, values)[0, 1], 0.0)


def test_a_small_variance_around_a_large_constant_still_counts():
    texts, maps, embedding, values = world(0)  # 1e-4 of the norm, a thousand times what float32 rounds
    close(explained(texts, maps, embedding, values + 1e4), explained(texts, maps, embedding, values))


def test_a_variance_within_float32_rounding_does_not_count():
    texts, maps, embedding, values = world(0)
    values[:, 0, 1] = 1 + 1e-7 * normal(8, 4, E)[pseudo_label(embedding, texts)]  # which the label determines
    values[:, 1, 0] = 1 + 1e-5 * normal(8, 4, E)[pseudo_label(embedding, texts)]
    found = explained(texts, maps, embedding, values)
    assert found[0, 1] == 0
    assert found[1, 0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_the_scale_of_the_values_does_not_matter(scale):
    texts, maps, embedding, values = world(0)
    values[:, 0, 1] = 1 + 1e-7 * normal(8, 4, E)[pseudo_label(embedding, texts)]
    close(explained(texts, maps, embedding, scale * values), explained(texts, maps, embedding, values))


# ---- subspace ----------------------------------------------------------------------------------------------

SHARES = st.sampled_from([0.2, 0.5, 0.8, 0.95, 0.99])


@few
@given(seed=SEEDS, wanted=SHARES)
def test_the_directions_are_orthonormal(seed, wanted):
    Q = subspace(normal(seed, 5, D), wanted)
    close(Q @ Q.T, torch.eye(len(Q)))


@few
@given(seed=SEEDS, wanted=SHARES)
def test_the_directions_lie_within_the_differences_of_the_texts(seed, wanted):
    texts = normal(seed, 5, D)
    differences = texts[1:] - texts[0]
    Q = subspace(texts, wanted)
    close(Q @ torch.linalg.pinv(differences) @ differences, Q)


def test_all_of_the_variance_takes_only_directions_within_the_differences():
    for seed in range(20):
        texts = normal(seed, 6, 9)
        differences = texts[1:] - texts[0]
        Q = subspace(texts, 1.0)
        close(Q @ torch.linalg.pinv(differences) @ differences, Q)


def test_the_mean_of_the_texts_does_not_lie_within_the_directions():
    texts = normal(0, 5, D) + 3
    mean, Q = texts.mean(dim=0), subspace(texts)
    assert (mean - mean @ Q.T @ Q).norm() > 0.2 * mean.norm()


@few
@given(seed=SEEDS, wanted=SHARES)
def test_there_are_as_many_directions_as_hold_the_share_and_no_more(seed, wanted):
    texts = normal(seed, 5, D) * torch.linspace(0.2, 2, D, dtype=torch.float64)
    Q, covariance = subspace(texts, wanted), torch.cov(texts.T)
    held = torch.stack([q @ covariance @ q for q in Q]) / covariance.trace()
    assert held.sum() >= wanted
    assert held[:-1].sum() < wanted


@few
@given(seed=SEEDS)
def test_the_directions_are_the_principal_ones(seed):
    texts = normal(seed, 5, D)
    Q = subspace(texts, 0.5)
    top = torch.linalg.eigh(torch.cov(texts.T)).eigenvectors[:, -len(Q) :]
    # A projector onto eigenvectors moves by rounding over the gap to the next eigenvalue; 1e-6 allows gaps
    # down to 1e-9.
    torch.testing.assert_close(Q.T @ Q, top @ top.T, rtol=0, atol=1e-6)


def cross(*shares: float) -> Tensor:
    """Texts +-a e1, +-b e2, ... whose variance lies along the axes in these shares."""
    axes = torch.diag(torch.tensor(shares, dtype=torch.float64).sqrt())
    return torch.cat([axes, -axes])


@pytest.mark.parametrize(
    ("shares", "k"),
    [((0.96, 0.03, 0.01), 1), ((0.94, 0.05, 0.01), 2), ((0.9, 0.04, 0.06), 2), ((0.6, 0.3, 0.1), 3)],
)
def test_by_default_the_directions_hold_95_percent_by_hand(shares, k):
    Q = subspace(cross(*shares))
    axes = torch.tensor(shares).argsort(descending=True)[:k]
    close(Q.abs(), torch.eye(3)[axes])


@few
@given(seed=SEEDS, wanted=SHARES)
def test_the_same_vector_added_to_all_texts_does_not_matter(seed, wanted):
    texts = normal(seed, 5, D)
    a, b = subspace(texts, wanted), subspace(texts + 5 * normal(seed + 1, D), wanted)
    # Projectors, as in test_the_directions_are_the_principal_ones.
    torch.testing.assert_close(a.T @ a, b.T @ b, rtol=0, atol=1e-6)


def test_a_vector_added_to_one_text_matters():
    texts = normal(0, 5, D)
    a = subspace(texts)
    texts[0] += 5 * normal(1, D)
    b = subspace(texts)
    assert (a.T @ a - b.T @ b).abs().max() > 0.1


def test_two_texts_have_one_direction():
    texts = normal(0, 2, D)
    close(subspace(texts).abs(), normalize(texts[1:] - texts[:1], dim=1).abs())


def test_texts_that_hardly_differ_have_no_direction_to_take_out():
    assert len(subspace(normal(0, 1, D).expand(4, D))) == 0
    assert len(subspace(torch.zeros(4, D))) == 0
    assert len(subspace(normal(0, 1, D) + 1e-8 * normal(1, 4, D))) == 0
    differences = normal(1, 4, D)
    a, b = subspace(normal(0, 1, D) + 1e-4 * differences), subspace(differences)
    close(a.T @ a, b.T @ b)


@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_the_scale_of_the_texts_does_not_matter(scale):
    texts = normal(0, 5, D)
    a, b = subspace(scale * texts), subspace(texts)
    close(a.T @ a, b.T @ b)
    assert len(subspace(scale * (texts[:1] + 1e-8 * texts))) == 0


def test_the_directions_keep_the_type_of_the_texts():
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert subspace(normal(0, 5, D).to(dtype)).dtype == dtype


def test_votes_of_two_sets_merge_to_those_of_both():
    generator = torch.Generator().manual_seed(0)
    texts, maps = (
        torch.nn.functional.normalize(torch.randn(3, 6, generator=generator), dim=1),
        torch.ones(1, 2, 4, 6),
    )
    embedding, values = torch.randn(20, 6, generator=generator), torch.randn(20, 1, 2, 4, generator=generator)
    whole, first, second = (CueVotes(texts, maps, torch.zeros(6)) for _ in range(3))
    whole.update(embedding, values)
    first.update(embedding[:7], values[:7])
    second.update(embedding[7:], values[7:])
    first.merge(second)
    assert torch.equal(first.count, whole.count)
    torch.testing.assert_close(first.sum, whole.sum)
    assert not torch.equal(second.count, whole.count)
