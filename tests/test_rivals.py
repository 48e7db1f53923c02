"""rivals.py: erasure against its theorems, and against other maps that erase as much."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import EXACT, FAR

from rivals import leace


def drawn(seed, images=400, dim=6, groups=3, rank=None):
    """Embeddings [n, d] whose mean depends on the group, the indicators [n, g], their moments."""
    generator = torch.Generator().manual_seed(seed)
    rank = dim if rank is None else rank
    group = torch.randint(groups, (images,), generator=generator)
    means = torch.randn(groups, rank, generator=generator, dtype=torch.float64)
    mixing = torch.randn(rank, dim, generator=generator, dtype=torch.float64)
    x = (means[group] + torch.randn(images, rank, generator=generator, dtype=torch.float64)) @ mixing
    z = F.one_hot(group, groups).double()
    centred = x - x.mean(dim=0)
    return x, z, centred.T @ centred / images, centred.T @ (z - z.mean(dim=0)) / images


def correlation(x, z):
    """Largest absolute covariance of x with the indicators, over the spread of x."""
    return float(((x - x.mean(dim=0)).T @ (z - z.mean(dim=0)) / len(x)).abs().max() / x.std())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([None, 5]))
def test_nothing_linear_is_left_of_the_groups(seed, groups, rank):
    x, z, covariance, cross = drawn(seed, groups=groups, rank=rank)
    P = leace(covariance, cross)
    erased = x - (x - x.mean(dim=0)) @ P.T
    assert correlation(x, z) > FAR
    assert correlation(erased, z) < EXACT
    assert (P @ P - P).abs().max() < 1e-8 * P.abs().max()  # a projection
    assert int(torch.linalg.matrix_rank(P, rtol=1e-8)) == groups - 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_of_the_maps_that_erase_it_changes_embeddings_least(seed):
    """Against the orthogonal projection off the group means, and against its own, perturbed."""
    x, z, covariance, cross = drawn(seed)
    P, centred = leace(covariance, cross), x - x.mean(dim=0)
    cost = (centred @ P.T).square().sum()
    directions = torch.linalg.svd(cross, full_matrices=False)[0][:, :2]
    orthogonal = directions @ directions.T
    assert correlation(x - centred @ orthogonal.T, z) < EXACT
    assert cost <= (centred @ orthogonal.T).square().sum() * (1 + 1e-9)
    generator = torch.Generator().manual_seed(seed)
    along = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    along -= along @ directions @ directions.T  # which maps the cross-covariance to zero: it still erases
    other = P + 0.1 * along
    assert correlation(x - centred @ other.T, z) < 1e-8
    assert cost <= (centred @ other.T).square().sum() * (1 + 1e-9)


def test_groups_that_do_not_differ_change_nothing():
    _, _, covariance, cross = drawn(0)
    P = leace(covariance, torch.zeros_like(cross))
    assert P.abs().max() < EXACT
    assert leace(covariance, cross).abs().max() > FAR


def test_a_direction_without_variance_is_left_alone():
    x, _, covariance, cross = drawn(1, rank=4)
    P = leace(covariance, cross)
    still = torch.linalg.eigh(covariance)[1][:, :2]
    assert (P @ still).abs().max() < 1e-6
    assert P.abs().max() > FAR
    assert (x @ still).std() < 1e-6 * x.std()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-5, 1e4]))
def test_the_projection_does_not_depend_on_the_scale_or_the_precision_of_embeddings(seed, scale):
    x, z, covariance, cross = drawn(seed)
    P, single = leace(covariance, cross), leace(covariance.float(), cross.float())
    assert (leace(covariance * scale**2, cross * scale) - P).abs().max() < 1e-7 * P.abs().max()
    assert single.dtype == torch.float64
    assert correlation(x - (x - x.mean(dim=0)) @ single.T, z) < 1e-3 * correlation(x, z)
