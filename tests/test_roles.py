"""roles.py against epsilon squared written out in numpy, and on worlds whose heads write one known factor
each.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from roles import Roles, explained, find_roles, in_own_space

SEEDS = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)

# roles.py works in float32, which rounds at 6e-8. Sums of some hundred numbers near 1 lose two digits of
# that; a wrong term would show at 1e-2. 1e-4 lies between.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
L, H, E, D = 2, 3, 4, 7


def close(a: Tensor | float, b: Tensor | float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), **CLOSE
    )


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(seed: int, high: int, n: int) -> Tensor:
    return torch.randint(high, (n,), generator=torch.Generator().manual_seed(seed))


# ---- explained ---------------------------------------------------------------------------------------------


def epsilon_squared(rows: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Of rows [n, e]: the share of variance between labels, raw, and as epsilon squared (SSb - (k - 1) MSw) /
    SSt.
    """
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    total = sum(float((row - mean) @ (row - mean)) for row in rows)
    between, kinds = 0.0, sorted(set(label.tolist()))
    for kind in kinds:
        group = rows[label == kind]
        shift = group.mean(axis=0) - mean
        between += len(group) * float(shift @ shift)
    mean_square_within = (total - between) / (len(rows) - len(kinds))
    return between / total, max(0.0, (between - (len(kinds) - 1) * mean_square_within) / total)


def explicit(written: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """[L, H] raw shares, [L, H] corrected ones."""
    rows, label = written.numpy(), label.numpy()
    both = [
        [epsilon_squared(rows[:, i, j], label) for j in range(rows.shape[2])] for i in range(rows.shape[1])
    ]
    return torch.tensor(both, dtype=torch.float64).unbind(dim=-1)


def labelled(seed: int, n: int = 60, k: int = 4, effect: float = 1.0) -> tuple[Tensor, Tensor]:
    """What heads write, [n, L, H, E], and labels [n] that it depends on, the more the larger `effect` is."""
    label = integers(seed, k, n)
    return normal(seed + 1, n, L, H, E) + effect * normal(seed + 2, k, L, H, E)[label] + 1, label


@few
@given(seed=SEEDS, n=st.integers(12, 80), k=st.integers(1, 8), effect=st.sampled_from([0.0, 0.3, 1.0, 3.0]))
def test_explained_is_epsilon_squared(seed, n, k, effect):
    written, label = labelled(seed, n, k, effect)
    close(explained(written, label), explicit(written, label)[1])


def test_a_share_by_hand_is_not_the_raw_share():
    # Groups {0, 2} and {10, 12} on one axis: mean 6, SSt = 36 + 16 + 16 + 36 = 104, SSb = 4 * 25 = 100, SSw =
    # 4, n - k = 2. Epsilon squared = (100 - 1 * 4 / 2) / 104.
    written = torch.tensor([0.0, 2.0, 10.0, 12.0]).reshape(4, 1, 1, 1)
    close(explained(written, torch.tensor([0, 0, 1, 1])), torch.tensor([[98 / 104]]))
    written, label = labelled(0, n=30, k=6)
    assert (explicit(written, label)[0] - explained(written, label)).min() > 0.01


def test_labels_at_random_explain_nothing_on_average_though_their_raw_share_is_of_chance():
    runs = [(normal(3 * seed, 60, L, H, E), integers(3 * seed + 1, 10, 60)) for seed in range(20)]
    # 120 heads. The share of one, unclamped, is 0 within sqrt(2 * 9 / 4) / 59 = 0.036 (four axes average);
    # clamped at 0, its mean is 0.4 of that, 0.014.
    assert torch.stack([explained(*run) for run in runs]).mean() < 0.025
    # (k - 1) / (n - 1) = 9 / 59 = 0.153, within 0.036 / sqrt(120) for the mean of all heads.
    assert 0.14 < torch.stack([explicit(*run)[0] for run in runs]).mean() < 0.17


@few
@given(seed=SEEDS, k=st.integers(2, 6))
def test_explained_is_one_where_the_label_determines_what_is_written(seed, k):
    label = torch.cat([torch.arange(k), integers(seed, k, 40)])
    close(explained(normal(seed + 1, k, L, H, E)[label], label), torch.ones(L, H))


def test_labels_of_other_images_do_not_explain():
    label = integers(0, 4, 60)
    assert explained(normal(1, 4, L, H, E)[label], label.roll(1)).max() < 0.2


@few
@given(seed=SEEDS)
def test_a_rotation_of_what_is_written_does_not_matter(seed):
    written, label = labelled(seed)
    turn, _ = torch.linalg.qr(normal(seed + 3, L, H, E, E))
    close(explained(torch.einsum("nLHe,LHef->nLHf", written, turn), label), explained(written, label))


def test_stretching_one_axis_matters():
    written, label = labelled(0)
    assert (
        explained(written * torch.tensor([9.0, 1, 1, 1]), label) - explained(written, label)
    ).abs().max() > 0.05


@few
@given(seed=SEEDS)
def test_a_constant_added_to_what_is_written_does_not_matter(seed):
    written, label = labelled(seed)
    close(explained(written + 9 * normal(seed + 3, L, H, E), label), explained(written, label))


@pytest.mark.parametrize("scale", [1e-4, -1.0, 1e4])
def test_the_scale_of_what_is_written_does_not_matter(scale):
    written, label = labelled(0)
    close(explained(scale * written, label), explained(written, label))


@few
@given(seed=SEEDS, names=st.permutations(range(9)))
def test_the_names_of_the_labels_do_not_matter(seed, names):
    written, label = labelled(seed)
    # 4 of 9 names: the others have no image
    close(explained(written, torch.tensor(names)[label]), explained(written, label))


def test_joining_two_labels_matters():
    written, label = labelled(0)
    assert (explained(written, label.clamp_max(2)) - explained(written, label)).abs().max() > 0.05


def test_each_head_has_its_own_share():
    written, label = labelled(0, effect=0.0)
    written[:, 1, 2] = normal(3, 4, E)[label]
    found = explained(written, label)
    close(found[1, 2], 1.0)
    assert found.flatten().sort().values[-2] < 0.2


def test_one_label_explains_nothing():
    written, _ = labelled(0)
    close(explained(written, torch.full((60,), 3)), torch.zeros(L, H))


def test_a_head_that_writes_nothing_has_no_share():
    written, label = labelled(0)
    written[:, 0, 1] = 0
    found = explained(written, label)
    assert found[0, 1] == 0
    assert found.flatten().sort().values[1] > 0.1


@pytest.mark.parametrize("n", [60, 1000])
# No binary fractions: a mean in float32 is off by rounding.
@pytest.mark.parametrize("constant", [0.1, 0.3, 1.7, 1e-3, -0.3])
def test_a_head_that_writes_a_constant_has_no_share(n, constant):
    written, label = labelled(0, n)
    written[:, 0, 1] = constant
    close(explained(written, label)[0, 1], 0.0)


def test_a_small_variance_around_a_large_constant_still_counts():
    # 1e-3 of the norm; float32 rounds at 6e-8, and so moves the share by some 1e-4
    written, label = labelled(0)
    far = torch.randint(900, 1100, (L, H, E), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(explained(written + far, label), explained(written, label), rtol=0, atol=1e-3)


@few
@given(seed=SEEDS)
def test_shares_lie_between_zero_and_one(seed):
    found = explained(*labelled(seed, n=12, k=6, effect=0.0))
    assert found.min() >= 0
    assert found.max() <= 1


# ---- in_own_space ------------------------------------------------------------------------------------------


def terms(values: Tensor, maps: Tensor) -> Tensor:
    return torch.einsum("nLHe,LHed->nLHd", values.double(), maps.double())


def products(rows: Tensor) -> Tensor:
    """[L, H, n, n] inner products of the rows of every head."""
    rows = rows.double().permute(1, 2, 0, 3)
    return rows @ rows.mT


MAPS = {
    "of full rank": lambda seed: normal(seed, L, H, E, D),
    "of rank two": lambda seed: normal(seed, L, H, E, 2) @ normal(seed + 1, L, H, 2, D),
    "into fewer dimensions": lambda seed: normal(seed, L, H, E, 3),
    "some of them zero": lambda seed: normal(seed, L, H, E, D) * torch.tensor([1.0, 0, 1]).view(1, 3, 1, 1),
    "of half precision": lambda seed: normal(seed, L, H, E, D).bfloat16(),
}


@few
@given(seed=SEEDS, kind=st.sampled_from(list(MAPS)))
def test_own_space_keeps_lengths_and_angles_of_the_terms(seed, kind):
    values, maps = normal(seed + 5, 12, L, H, E), MAPS[kind](seed)
    close(products(in_own_space(values, maps)), products(terms(values, maps)))


def test_values_alone_have_other_lengths_and_angles():
    values, maps = normal(5, 12, L, H, E), MAPS["of full rank"](0)
    assert (products(values) - products(terms(values, maps))).abs().max() > 1


def test_own_space_is_as_wide_as_the_values_in_float32():
    found = in_own_space(normal(0, 12, L, H, E).double(), normal(1, L, H, E, D).double())
    assert found.shape == (12, L, H, E)
    assert found.dtype == torch.float32


def test_shares_in_own_space_are_those_of_the_terms():
    values, label = labelled(0)
    maps = normal(9, L, H, E, D) * torch.tensor([9.0, 1, 1, 1])[:, None]
    found = explained(in_own_space(values, maps), label)
    close(found, explicit(terms(values, maps), label)[1])
    assert (found - explained(values, label)).abs().max() > 0.05  # the values' own shares are others


# ---- find_roles --------------------------------------------------------------------------------------------

WIDE = 40  # dimensions of the world's embedding


def world(seed: int = 0, n: int = 400, unrelated: int = 60):
    """Images of five colours and four shapes; six heads, of which one writes the colour, one the shape, one a
    constant.

    Texts lie along the axes of the colours (0 to 4) and shapes (5 to 8). `unrelated` texts of a third
    category lie in the 20 dimensions where images differ at random. Texts of the three categories stand
    mixed, not one category after the other.
    """
    colour, shape = integers(seed, 5, n), integers(seed + 1, 4, n)
    axes = torch.eye(WIDE)
    embedding = (
        axes[colour] + axes[5 + shape] + torch.cat([torch.zeros(n, 20), 0.3 * normal(seed + 2, n, 20)], dim=1)
    )
    embedding = embedding + 3 * axes[9] + 0.05 * normal(seed + 3, n, WIDE)
    away = torch.cat([torch.zeros(unrelated, 20), normal(seed + 4, unrelated, 20)], dim=1)
    texts = normalize(torch.cat([axes[:5], axes[5:9], away]), dim=1)
    categories = ["colours"] * 5 + ["shapes"] * 4 + ["unrelated"] * unrelated
    mixed = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed + 5))
    by_colour, by_shape, noise = (
        normal(seed + 6, 5, E)[colour],
        normal(seed + 7, 4, E)[shape],
        normal(seed + 8, n, E),
    )
    heads = {
        "colour": by_colour + 0.2 * noise,
        "shape": by_shape + 0.2 * noise,
        "noise": noise,
        "nothing": torch.zeros(n, E),
        "mostly shape": 0.7 * by_colour + 1.4 * by_shape + 0.2 * noise,
        "faintly colour": 0.4 * by_colour + noise,
    }
    values = torch.stack(list(heads.values()), dim=1)[:, None] + 1  # [n, 1, 6, E]
    maps = normal(seed + 9, 1, len(heads), E, WIDE)
    return (
        values,
        maps,
        embedding,
        texts[mixed],
        [categories[i] for i in mixed.tolist()],
        {"colours": colour, "shapes": shape},
        list(heads),
    )


def named(roles: Roles, heads: list[str]) -> dict[str, str | None]:
    return {head: roles.name(0, i) for i, head in enumerate(heads)}


@pytest.mark.parametrize("seed", [0, 100, 200])
def test_every_head_gets_the_factor_it_writes(seed):
    *given, _, heads = world(seed)
    assert named(find_roles(*given), heads) == {
        "colour": "colours",
        "shape": "shapes",
        "noise": None,
        "nothing": None,
        "mostly shape": "shapes",
        "faintly colour": None,
    }


def test_categories_stand_in_the_order_in_which_they_come():
    values, maps, embedding, texts, categories, *_ = world()
    for order in (range(len(texts)), range(len(texts) - 1, -1, -1)):
        given = [categories[i] for i in order]
        roles = find_roles(values, maps, embedding, texts[list(order)], given)
        assert roles.categories == sorted(set(categories), key=given.index)
        assert roles.name(0, 0) == "colours"


def test_shares_are_epsilon_squared_of_the_terms_between_true_factors():
    values, maps, embedding, texts, categories, truth, _ = world()
    roles = find_roles(values, maps, embedding, texts, categories)
    # Texts and images are so clear here that every image gets its own factor's text.
    for category, label in truth.items():
        share = roles.share[roles.categories.index(category)]
        drop = [0, 1, 2, 4, 5]  # "nothing" has no variance to divide by
        close(share[:, drop], explicit(terms(values, maps)[:, :, drop], label)[1])


def test_images_are_told_by_the_text_that_fits_them_better_than_it_fits_the_mean_image():
    values, maps, embedding, texts, categories, *_ = world()
    near = embedding + 5 * torch.eye(WIDE)[:1]  # every image is near to the text of the first colour
    assert find_roles(values, maps, near, texts, categories).name(0, 0) == "colours"
    label = (near @ texts[[i for i, name in enumerate(categories) if name == "colours"]].T).argmax(dim=1)
    assert len(label.unique()) == 1  # without the centre the colours' texts would tell nothing


def test_a_large_category_of_unrelated_texts_does_not_win_by_size():
    *given, _, heads = world(n=120)
    values, maps, embedding, texts, categories = given
    unrelated = (embedding - embedding.mean(dim=0)) @ texts[
        [i for i, name in enumerate(categories) if name == "unrelated"]
    ].T
    raw = explicit(terms(values, maps)[:, :, :3], unrelated.argmax(dim=1))[0]
    assert raw[0, 2] > 0.3  # of noise, above the threshold by size alone
    found = named(find_roles(*given), heads)
    assert "unrelated" not in found.values()
    assert found["colour"] == "colours"


def made_up(share: list[float], bar: float, *halves: list[float]) -> str | None:
    """The name that one head gets of categories a, b, ... with these shares."""
    each = torch.tensor([*(halves or [share, share])])[:, :, None, None]
    names = list("abc"[: len(share)])
    whole = torch.tensor(share)[:, None, None]
    return Roles(names, whole, each, torch.tensor([[bar]]), [1] * len(names)).name(0, 0)


def test_a_category_that_explains_no_more_than_texts_dealt_at_random_gives_no_role():
    assert made_up([0.5], bar=0.6) is None
    assert made_up([0.5], bar=0.5) is None
    assert made_up([0.5], bar=0.4) == "a"


@pytest.mark.parametrize(("share", "role"), [(0.29, None), (0.3, None), (0.31, "a")])
def test_a_category_must_explain_over_30_percent(share, role):
    assert made_up([share, 0.0], bar=0.0) == role


def test_the_role_is_the_category_that_explains_most():
    assert made_up([0.6, 0.5], bar=0.4) == "a"
    assert made_up([0.5, 0.6], bar=0.4) == "b"
    assert made_up([0.5, 0.6], bar=0.7) is None


def test_a_role_must_be_the_same_in_both_halves_of_the_images():
    assert made_up([0.5, 0.4], 0.2, [0.5, 0.4], [0.5, 0.4]) == "a"
    assert made_up([0.5, 0.4], 0.2, [0.5, 0.4], [0.4, 0.5]) is None
    assert made_up([0.5, 0.4], 0.2, [0.4, 0.5], [0.5, 0.4]) is None
    assert made_up([0.5, 0.4], 0.2, [0.5, 0.4], [0.3, 0.2]) is None  # no role there


def test_a_bank_of_one_category_gives_no_roles():
    # A random set of as many texts is the whole bank again: it explains exactly as much, so not more. Many
    # worlds, because in each of them rounding may fall either way.
    found = set()
    for seed in range(30):
        values, maps, embedding, texts, _, _, heads = world(seed)
        roles = find_roles(values, maps, embedding, texts, ["texts"] * len(texts), seed=seed)
        assert roles.share.max() > 0.3
        close(roles.bar[None], roles.share)
        found |= set(named(roles, heads).values())
    assert found == {None}


def test_the_bar_is_the_largest_share_of_any_category_in_any_deal():
    values, maps, embedding, texts, categories, *_ = world(n=100)
    fit = (embedding - embedding.mean(dim=0)) @ texts.T
    roles = find_roles(values, maps, embedding, texts, categories, draws=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    torch.randperm(len(values), generator=generator)  # the halves
    largest = torch.zeros(1, 6, dtype=torch.float64)
    for _ in range(3):
        dealt = torch.randperm(len(texts), generator=generator)
        for name in dict.fromkeys(categories):
            members, dealt = dealt[: categories.count(name)], dealt[categories.count(name) :]
            of_heads = explicit(terms(values, maps)[:, :, [0, 1, 2, 4, 5]], fit[:, members].argmax(dim=1))[1]
            largest[:, [0, 1, 2, 4, 5]] = largest[:, [0, 1, 2, 4, 5]].maximum(of_heads)
    close(roles.bar, largest)
    more = find_roles(values, maps, embedding, texts, categories, draws=30, seed=5).bar
    assert (more >= roles.bar).all()
    assert (more > roles.bar + 0.01).any()


def dealt(categories: list[str], seed: int) -> list[str]:
    order = torch.randperm(len(categories), generator=torch.Generator().manual_seed(seed))
    return [categories[i] for i in order]


def test_of_shuffled_banks_at_most_one_head_in_32_gets_a_role_and_of_the_true_one_most_do():
    values, maps, embedding, texts, categories, *_ = world(n=300)
    wide = torch.cat([values[:, :, [0, 1, 4]] + 0.3 * normal(i, 300, 1, 3, E) for i in range(4)], dim=2)
    read = maps[:, [0, 1, 4]].repeat(1, 4, 1, 1)  # 12 heads that a factor explains, and none by chance
    true = find_roles(wide, read, embedding, texts, categories)
    assert all(true.name(0, i) for i in range(12))
    given, loose = 0, 0
    for seed in range(30):
        roles = find_roles(wide, read, embedding, texts, dealt(categories, seed), seed=seed)
        given += sum(roles.name(0, i) is not None for i in range(12))
        loose += int((roles.share.amax(dim=0) > 0.3).sum())
    assert given <= 30 * 12 / 32
    assert loose > 30 * 12 / 4  # what the threshold alone would call a role


def test_few_images_give_no_roles():
    values, maps, embedding, texts, categories, _, heads = world(n=20)
    roles = find_roles(values, maps, embedding, texts, categories)
    assert roles.share.max() > 0.3
    assert named(roles, heads)["noise"] is named(roles, heads)["faintly colour"] is None


def test_the_texts_that_fit_some_image_best_are_counted_by_category():
    values, maps, embedding, texts, categories, *_ = world(n=100)
    roles = find_roles(values, maps, embedding, texts, categories, draws=0)
    used = dict(zip(roles.categories, roles.used, strict=True))
    assert (used["colours"], used["shapes"]) == (5, 4)
    assert 4 < used["unrelated"] < 60


def test_the_seed_fixes_the_draws():
    *given, _, _ = world(n=100)
    first, again, other = (find_roles(*given, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.bar, again.bar)
    assert torch.equal(first.halves, again.halves)
    assert not torch.equal(first.bar, other.bar)
    assert torch.equal(first.share, other.share)  # nothing is drawn for it


def test_the_order_of_images_changes_nothing_but_rounding_and_the_halves():
    values, maps, embedding, texts, categories, _, heads = world()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    a = find_roles(values, maps, embedding, texts, categories)
    b = find_roles(values[order], maps, embedding[order], texts, categories)
    close(a.share, b.share)
    close(a.bar, b.bar)
    assert named(a, heads) == named(b, heads)


def test_values_that_belong_to_other_images_get_no_role():
    values, maps, embedding, texts, categories, _, heads = world()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    assert set(named(find_roles(values[order], maps, embedding, texts, categories), heads).values()) == {None}


def test_the_defaults_are_forty_draws_and_seed_zero():
    *given, _, _ = world(n=100)
    a, b = find_roles(*given), find_roles(*given, draws=40, seed=0)
    assert torch.equal(a.bar, b.bar)
    assert torch.equal(a.halves, b.halves)


def test_the_halves_are_of_the_two_halves_of_the_images():
    values, maps, embedding, texts, categories, truth, _ = world(n=101)
    roles = find_roles(values, maps, embedding, texts, categories, draws=0)
    rows = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    for mine, found in zip((rows[:51], rows[51:]), roles.halves, strict=True):
        for category, label in truth.items():
            share = found[roles.categories.index(category)][:, [0, 1, 2, 4, 5]]
            close(share, explicit(terms(values, maps)[mine][:, :, [0, 1, 2, 4, 5]], label[mine])[1])


def test_a_head_at_the_threshold_has_no_role_though_it_is_above_in_the_whole():
    values, maps, embedding, texts, categories, truth, _ = world()
    colour, noise = values[:, :, :1] - 1, normal(77, len(values), 1, 1, E)
    strengths = torch.linspace(0.3, 3, 270)
    shares = [float(explicit(terms(colour + s * noise, maps[:, :1]), truth["colours"])[1]) for s in strengths]
    at = min((i for i in range(270) if shares[i] > 0.301), key=lambda i: shares[i])
    roles = find_roles(colour + strengths[at] * noise, maps[:, :1], embedding, texts, categories)
    assert roles.share.max() > max(0.3, float(roles.bar))
    assert roles.name(0, 0) is None
    at = min((i for i in range(270) if shares[i] > 0.5), key=lambda i: shares[i])
    roles = find_roles(colour + strengths[at] * noise, maps[:, :1], embedding, texts, categories)
    assert roles.name(0, 0) == "colours"


def test_roles_are_of_layer_and_head():
    values, maps, embedding, texts, categories, _, heads = world(n=120)
    roles = find_roles(values.view(-1, 3, 2, E), maps.view(3, 2, E, WIDE), embedding, texts, categories)
    assert roles.share.shape == (3, 3, 2)
    assert roles.halves.shape == (2, 3, 3, 2)
    assert roles.bar.shape == (3, 2)
    flat = find_roles(values, maps, embedding, texts, categories)
    close(roles.share.flatten(1), flat.share.flatten(1))
    close(roles.halves.flatten(2), flat.halves.flatten(2))
    close(roles.bar.flatten(), flat.bar.flatten())
    assert [roles.name(i // 2, i % 2) for i in range(6)] == list(named(flat, heads).values())


def test_what_is_given_may_be_in_float64():
    *given, categories, _, _ = world(n=100)
    a, b = (find_roles(*given, categories), find_roles(*(x.double() for x in given), categories))
    close(a.share, b.share)


def test_nothing_given_is_changed():
    *given, _, _ = world(n=60)
    before = [x.clone() for x in given[:4]]
    find_roles(*given)
    assert all(torch.equal(a, b) for a, b in zip(before, given[:4], strict=True))


def test_groups_as_many_as_images_explain_nothing():
    """Each image alone in its group leaves no variance within; that is no share of anything."""
    written = torch.randn(50, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(explained(written, torch.arange(50)), torch.zeros(1, 3))
    assert (explained(written, torch.arange(50) // 25) < 0.2).all()
    assert (
        explained(torch.arange(50.0).view(50, 1, 1, 1).expand_as(written), torch.arange(50) // 25) > 0.7
    ).all()
