"""rivals.py: each method against a route by loops, erasure against its theorems; their rows in the tables."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import run
from small import EXACT, FAR

import demo
from cue import CueVotes, subspace
from demo.images import DemoBirds
from rivals import extremes, leace, orth_cal, orth_proj, perception_clip, roboshot, span, tie
from tasks.rivals import JOINT, Guesses, with_published_last
from zeroshot import classifier, embed_texts, fill_templates, load_bank, load_clip, templates


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


# The other methods, by loops.


def units(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_orth_proj_leaves_the_residual_of_least_squares():
    texts, z = units(4, 9), units(5, 9, seed=1)
    fitted = texts.T @ torch.linalg.lstsq(texts.T, z.T).solution
    assert (z @ orth_proj(texts).T - (z.T - fitted).T).abs().max() < EXACT
    assert (z @ orth_proj(texts[:3]).T - (z.T - fitted).T).abs().max() > FAR


def test_texts_that_follow_from_the_others_change_nothing():
    """In float32, where they follow but for rounding."""
    texts = units(4, 9).float()
    again = torch.cat([texts, texts[:1], (texts[1:2] + texts[2:3]) / 2])
    assert len(span(again)) == 4
    assert (orth_proj(again) - orth_proj(texts)).abs().max() < 1e-6
    assert (orth_proj(torch.cat([texts, units(1, 9, seed=3).float()])) - orth_proj(texts)).abs().max() > FAR


def calibrated(P0, pairs, strength):
    M = sum(torch.outer(a - b, a - b) for a, b in pairs) / len(pairs)
    return P0 @ torch.linalg.inv(torch.eye(len(P0), dtype=torch.float64) + strength * M)


def test_orth_cal_is_the_closed_form_over_pairs_of_one_class_that_differ_in_the_cue():
    P0, prompts = orth_proj(units(2, 9, seed=1)), units(3, 4, 9)
    pairs = [pair for of_class in prompts for pair in combinations(of_class, 2)]
    assert (orth_cal(P0, prompts, 7.0) - calibrated(P0, pairs, 7.0)).abs().max() < EXACT
    of_cue = [pair for of_text in prompts.unbind(dim=1) for pair in combinations(of_text, 2)]
    assert (orth_cal(P0, prompts, 7.0) - calibrated(P0, of_cue, 7.0)).abs().max() > FAR
    swapped = calibrated(torch.eye(9, dtype=torch.float64), pairs, 7.0) @ P0
    assert (orth_cal(P0, prompts, 7.0) - swapped).abs().max() > FAR  # the order of the factors counts


def test_orth_cal_draws_the_pairs_together_and_without_strength_is_orth_proj():
    P0, prompts = torch.eye(9, dtype=torch.float64), units(2, 3, 9)
    P = orth_cal(P0, prompts, 1e9)
    after = prompts @ P.T
    assert (after - after.mean(dim=1, keepdim=True)).abs().max() < 1e-6
    assert (prompts - prompts.mean(dim=1, keepdim=True)).abs().max() > FAR
    assert torch.equal(orth_cal(P0, prompts, 0.0), P0)


def one_by_one(x, vectors, sign):
    """The published way: orthonormal vectors by QR, images brought to unit length after each."""
    x = F.normalize(x, dim=1)
    for q in torch.linalg.qr(vectors.T).Q.T:
        x = F.normalize(torch.stack([row + sign * (row @ q) * q for row in x]), dim=1)
    return x


def test_roboshot_gives_the_direction_of_the_published_loop():
    x, reject, accept = 3 * units(6, 9), units(2, 9, seed=1), units(3, 9, seed=2)
    rejected = one_by_one(x, reject, -1)
    assert (F.normalize(roboshot(x, reject), dim=1) - rejected).abs().max() < EXACT
    both = one_by_one(rejected, accept, 1)
    assert (F.normalize(roboshot(x, reject, accept), dim=1) - both).abs().max() < EXACT
    assert (F.normalize(roboshot(x, reject), dim=1) - both).abs().max() > FAR
    assert (F.normalize(x, dim=1) - rejected).abs().max() > FAR


def test_accepting_what_tells_two_classes_changes_no_decision_between_them():
    x, reject, classes = units(40, 9), units(2, 9, seed=1), units(2, 9, seed=2)
    before, after = (roboshot(x, reject, *more) @ classes.T for more in ((), (classes[:1] - classes[1:],)))
    assert torch.equal(before.argmax(dim=1), after.argmax(dim=1))
    other = roboshot(x, reject, units(4, 9, seed=3)) @ classes.T
    assert not torch.equal(before.argmax(dim=1), other.argmax(dim=1))


def test_for_any_two_classes_the_extreme_texts_are_those_nearest_to_the_one_and_the_other():
    texts, classes = units(5, 9), units(3, 9, seed=1)
    wanted = []
    for a, b in combinations(classes, 2):
        order = sorted(range(5), key=lambda i: float(texts[i] @ a - texts[i] @ b))
        wanted.append(texts[order[-1]] - texts[order[0]])
    found = extremes(texts, classes)
    assert all(any(torch.equal(row, pair) for row in found) for pair in wanted)
    assert len(found) == len({tuple(pair.tolist()) for pair in wanted})
    assert not any(torch.equal(row, texts[0] - texts[1]) for row in extremes(texts[2:], classes))


def test_tie_leaves_the_images_of_a_cue_orthogonal_to_its_text_on_average():
    x, texts, guess = 5 * units(30, 9), units(2, 9, seed=1), torch.arange(30) % 2
    z = F.normalize(x, dim=1)
    shift = torch.stack([(z[guess == a] @ texts[a]).mean() for a in range(2)])
    moved = tie(x, guess, texts, shift)
    for a in range(2):
        assert (moved[guess == a] @ texts[a]).mean().abs() < EXACT
        assert (tie(x, 1 - guess, texts, shift)[guess == a] @ texts[a]).mean().abs() > FAR
    by_hand = torch.stack([row - shift[a] * texts[a] for row, a in zip(z, guess.tolist(), strict=True)])
    assert (moved - by_hand).abs().max() < EXACT


def test_perception_clip_is_its_two_steps():
    cosines = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = perception_clip(cosines, 9.0).softmax(dim=1)
    for row, scores in zip(found, (9.0 * cosines).exp(), strict=True):
        infer = scores.sum(dim=0) / scores.sum()  # p(a | x)
        given = scores / scores.sum(dim=0)  # p(class | x, a)
        assert (sum(p * column for p, column in zip(infer, given.T, strict=True)) - row).abs().max() < EXACT
        assert (given.mean(dim=1) - row).abs().max() > FAR  # all texts alike


def test_any_scale_of_the_images_leaves_the_decisions():
    x, texts, classes = units(40, 9), units(3, 9, seed=1), units(4, 9, seed=2)
    longer = x * (1 + torch.arange(40)[:, None])
    guess, shift = torch.arange(40) % 3, units(3, 1, seed=4)[:, 0]
    for run_on in (lambda x: roboshot(x, texts), lambda x: tie(x, guess, texts, shift)):
        assert torch.equal((run_on(x) @ classes.T).argmax(dim=1), (run_on(longer) @ classes.T).argmax(dim=1))
    assert not torch.equal((x @ classes.T).argmax(dim=1), (roboshot(x, texts) @ classes.T).argmax(dim=1))


# What they need of the reference images.


def test_guesses_are_sums_over_images_by_pseudo_label_nearest_text_and_place():
    x, place = 4 * units(30, 9, seed=1) + 1, torch.arange(30) // 10
    nobodys = -F.normalize(x.sum(dim=0, keepdim=True), dim=1)  # a text that is nearest to no image
    texts = torch.cat([units(3, 9), nobodys])
    votes = CueVotes(texts, torch.zeros(1, 1, 2, 9), x.mean(dim=0))
    guesses, other = Guesses(votes, place), Guesses(votes, place)
    guesses.update(x[:12], torch.arange(12))
    other.update(x[12:], torch.arange(12, 30))
    guesses.merge(other)
    z = F.normalize(x, dim=1)
    near, vote = (z @ texts.T).argmax(dim=1), votes.labels(x)
    assert not torch.equal(near, vote)
    assert 3 not in near
    for name, label in (("nearest", near), ("vote", vote), ("place", place)):
        wanted = [(z[label == a] @ texts[a]).mean() if (label == a).any() else 0.0 for a in range(4)]
        assert (guesses.shift(name, texts) - torch.tensor(wanted)).abs().max() < EXACT
    mean, oblique = guesses.erasure()
    erased = z - (z - mean) @ oblique.T
    assert correlation(erased, F.one_hot(vote, 4).double()) < 1e-8
    assert correlation(z, F.one_hot(vote, 4).double()) > FAR


def test_published_rows_come_last_under_a_heading():
    lines = [["base", "1"], ["Orth-Proj (all texts)", "2"], ["TIE*", "3"]]
    found = with_published_last(lines, [["random", "4"]])
    assert [line[0] for line in found] == [
        "base",
        "random",
        "published, from the same texts",
        *["Orth-Proj (all texts)", "TIE*"],
    ]
    assert with_published_last(lines[:1], [["random", "4"]]) == [["base", "1"], ["random", "4"]]


# The rows of --task waterbirds, worked out again with the images' embeddings alone.

LIMIT = 128


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    argv = f"--task waterbirds --limit {LIMIT} --workers 0 --draws 2 --heads 3.4"
    return run(tmp_path_factory.mktemp("run"), argv)


@pytest.fixture(scope="module")
def world():
    clip = load_clip(device="cpu")
    sets = [DemoBirds(split, clip.preprocess, LIMIT) for split in ("train", "test")]
    with torch.no_grad():
        images = [torch.stack([data[i][0] for i in range(LIMIT)]) for data in sets]
        return clip, *sets, *(F.normalize(clip.model.encode_image(x), dim=1) for x in images)


def texts_of(clip):
    cue = load_bank(demo.FOLDER / "text_bank.txt").of("places")
    return cue, embed_texts(clip, cue)


def group_shares(scores, test):
    right, group = scores.argmax(dim=1) == test.y, 2 * test.y + test.place
    return [float(right[group == i].double().mean()) for i in range(4)]


@torch.no_grad()
def test_the_rows_are_those_of_the_embeddings_alone(ran, world):
    clip, train, test, before, z = world
    cue, A = texts_of(clip)
    classes = classifier(clip, test.classes, templates(clip))
    joint = embed_texts(clip, [JOINT.format(name, text) for name in test.classes for text in cue])
    joint = joint.unflatten(0, (2, -1))
    true = embed_texts(clip, ["with a land background", "with a water background"])

    def of_texts(P):
        return z @ F.normalize(classes @ P.T.float(), dim=1).T

    def translated(texts, label, reference_label):
        shift = [(before[reference_label == a] @ texts[a]).mean() for a in range(len(texts))]
        shift = torch.nan_to_num(torch.stack(shift))
        return (
            torch.stack([x - shift[a] * texts[a] for x, a in zip(z, label.tolist(), strict=True)]) @ classes.T
        )

    nearer = A @ (classes[0] - classes[1])
    reject = (A[nearer.argmax()] - A[nearer.argmin()])[None]
    filled = embed_texts(clip, fill_templates(test.classes, templates(clip))).unflatten(0, (2, -1))
    wanted = {
        "cue's directions in the class texts": of_texts(orth_proj(subspace(A))),
        "Orth-Proj (all texts)": of_texts(orth_proj(A)),
        "Orth-Cal": of_texts(orth_cal(orth_proj(A), joint)),
        "PerceptionCLIP": (29.92 * torch.einsum("bd,ctd->bct", z, joint)).exp().sum(dim=2),
        "RoboShot": one_by_one(z, reject, -1) @ classes.T,
        "  + classes accepted": one_by_one(one_by_one(z, reject, -1), filled[0] - filled[1], 1) @ classes.T,
        "TIE*": translated(A, (z @ A.T).argmax(dim=1), (before @ A.T).argmax(dim=1)),
        "TIE (looks at labels)": translated(true, test.place, train.place),
    }
    rows = ran.results["rows"]
    assert set(rows) - set(wanted) >= {"base", "LEACE"}
    base = group_shares(z @ classes.T, test)
    assert list(rows["base"]["groups"].values()) == pytest.approx(base)
    for label, scores in wanted.items():
        assert list(rows[label]["groups"].values()) == pytest.approx(group_shares(scores, test)), label
        assert group_shares(scores, test) != base, label


def test_the_weighted_average_counts_the_groups_of_the_whole_training_split(ran):
    train = DemoBirds("train", None)
    counts = torch.bincount(2 * train.y + train.place, minlength=4).tolist()
    assert ran.results["trained"] == counts
    for row in ran.results["rows"].values():
        weighted = sum(n * share for n, share in zip(counts, row["groups"].values(), strict=True)) / 2000
        assert row["weighted"] == pytest.approx(weighted)
    assert any(abs(row["weighted"] - row["average"]) > FAR for row in ran.results["rows"].values())
    assert f"{' / '.join(map(str, counts))} images" in ran.out


@pytest.mark.slow
def test_published_rows_need_no_heads_and_stand_where_they_are_asked_for(tmp_path):
    argv = f"--limit {LIMIT} --workers 0 --draws 2 --remove rivals"
    cue = ("--cue", "a bird on land", "a bird on water")
    found = run(tmp_path, "--task waterbirds", argv, *cue)
    assert found.results["heads"] == []
    assert "Orth-Proj (all texts)" in found.results["rows"]
    assert "cue's directions in the class texts" not in found.results["rows"]
    asked = run(tmp_path, "--task debias", argv, *cue)
    assert list(asked.results["rows"]) == [row for row in found.results["rows"] if "labels" not in row]
    assert asked.results["rows"]["RoboShot"]["cue"] < asked.results["rows"]["base"]["cue"]
    usual = run(tmp_path, "--task debias", argv.replace("--remove rivals", "--heads 3.4"), *cue)
    assert "Orth-Cal" not in usual.results["rows"]
    assert "cue's directions in the class texts" in usual.results["rows"]


@pytest.mark.slow
def test_too_many_prompts_are_not_asked_for_and_the_settings_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.rivals.MOST", 19)  # two classes and eight kinds with two texts are 20
    argv = f"--task waterbirds --limit {LIMIT} --workers 0 --draws 2 --remove rivals --cue"
    ran = run(tmp_path, argv, "a bird on land", "a bird on water")
    assert not {"Orth-Cal", "PerceptionCLIP"} & set(ran.results["rows"])
    assert "RoboShot" in ran.results["rows"]
    assert "they need 20 prompts" in ran.results["settings"]["note"]


@pytest.mark.slow
def test_the_authors_protocol_leaves_the_published_rows(tmp_path, ran):
    """They use images at unit length, whatever the terms' convention."""
    argv = f"--task waterbirds --limit {LIMIT} --workers 0 --draws 2 --heads 3.4 --protocol authors"
    test = run(tmp_path, argv).results["rows"]
    plain = run(tmp_path, argv.replace("--protocol authors", "--reference test")).results["rows"]
    for label in (
        "Orth-Proj (all texts)",
        "PerceptionCLIP",
        "RoboShot",
        "TIE*",
        "LEACE",
        "TIE (looks at labels)",
    ):
        assert test[label] == plain[label], label
    assert test["TIE*"] != ran.results["rows"]["TIE*"]  # means over other images
