"""Maps judged by what the model does: cases worked by hand, a loop over pixels, and the task on the demo."""

import functools
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import run
from small import noise as normal
from test_segmentation import KINDS, birds, tiny, unsupported  # noqa: F401 two of them are fixtures

import tasks.faithfulness
import tasks.job
import zeroshot
from baselines import METHODS, Attribution
from decompose import heatmap
from demo.images import DemoBirds
from faithfulness import CURVES, PASSES, area, curves, ranks
from masks import MaskFolder
from tasks.attribution import ATTRIBUTIONS, draw, map_of_heads
from zeroshot import classifier, templates

BLACK = torch.zeros(1, 1, 1, dtype=torch.float64)
load_once = functools.cache(zeroshot.load_clip)


@pytest.fixture(autouse=True)
def one_model(monkeypatch):
    monkeypatch.setattr(tasks.job, "load_clip", load_once)


# The order of pixels.


def test_ranks_by_hand():
    maps = torch.tensor([[[3.0, 1], [2, 0]], [[-3, -1], [-2, 0]]])
    assert ranks(maps, torch.zeros(2, 2, 2)).tolist() == [[[0, 2], [1, 3]], [[3, 1], [2, 0]]]


def test_equal_values_go_in_the_order_of_the_other_numbers():
    ties = torch.tensor([[[0.3, 0.9], [0.1, 0.2]]])
    assert ranks(torch.tensor([[[5.0, 5], [5, 5]]]), ties).tolist() == [[[2, 3], [0, 1]]]
    assert ranks(torch.tensor([[[5.0, 5], [5, 7]]]), ties).tolist() == [[[2, 3], [1, 0]]]


@pytest.mark.parametrize("value", [0.1, -1e-12, 0.0, 1e30])
def test_a_constant_map_leaves_the_whole_order_to_the_other_numbers(value):
    """Resizing repeats a value but for its last digits, and these do not decide."""
    ties = torch.rand(1, 7, 9, generator=torch.Generator().manual_seed(0))
    order = ranks(torch.full((1, 3, 2), value).double(), ties).flatten().argsort()
    assert order.tolist() == ties.flatten().argsort().tolist()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_the_order_does_not_see_the_scale_of_a_map(seed, factor):
    # In double precision: rounding of a product in float32 can change which of two close pixels is higher.
    maps, ties = normal(3, 2, 3, seed=seed).double(), normal(3, 5, 7, seed=seed + 1)
    assert torch.equal(ranks(factor * maps, ties), ranks(maps, ties))
    assert not torch.equal(ranks(-maps, ties), ranks(maps, ties))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_is_refused(value):
    maps = torch.zeros(2, 2, 2)
    maps[1, 0, 1] = value
    with pytest.raises(ValueError, match="NaN"):
        ranks(maps, torch.zeros(2, 4, 4))


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3, 3), (3, 3, 3)])
def test_maps_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected maps \[2, rows, cols\]"):
        ranks(torch.zeros(shape), torch.zeros(2, 4, 4))


# Areas.


@pytest.mark.parametrize(
    ("heights", "percent", "expected"),
    [
        ([1, 1, 0], (0, 25, 50), 0.75),  # 25 + 25 / 2 of 50
        ([1, 0, 0], (0, 25, 50), 0.25),
        ([0.2, 0.6], (0, 50), 0.4),
        ([1, 0, 0, 0, 0, 0, 0, 0, 0], CURVES["positive"], 1 / 16),
        ([1, 1, 1, 1, 1, 1, 1, 1, 0], CURVES["negative"], 15 / 16),
        ([0.3] * 5, CURVES["insertion"], 0.3),
        ([0, 1, 1], (0, 10, 100), 0.95),  # steps of different width
    ],
)
def test_areas_by_hand(heights, percent, expected):
    assert area(torch.tensor([heights]), percent).tolist() == pytest.approx([expected])


# The curves, by a loop over single pixels.


def network(seed, size, classes=3):
    """Scores that depend on pixels together, so that which ones are replaced matters."""
    first, second = normal(math.prod(size), 8, seed=seed), normal(8, classes, seed=seed + 1)
    return lambda images: (images.flatten(1).tanh() @ first).tanh().mm(second).softmax(dim=1)


def resized(grid, size):
    return F.interpolate(grid[None, None].double(), size, mode="bilinear")[0, 0].numpy()


def one_by_one(classify, image, grid, true, shown, black, noise):
    """The four curves of one image, its pixels sorted in a list."""
    height, width = image.shape[1:]
    values = resized(grid, (height, width))
    values = np.round(values / (abs(values).max() or 1), 9)
    places = [(y, x) for y in range(height) for x in range(width)]
    places.sort(key=lambda at: (-values[at], float(noise[0][at])))  # the highest first

    def replace(which, filling, start=image):
        changed, (rows, cols) = start.clone(), np.array(which, dtype=int).reshape(-1, 2).T
        changed[:, rows, cols] = filling[:, rows, cols]
        return classify(changed[None])[0].tolist()

    def right(scores):
        return float(scores.index(max(scores)) == true)

    count, dark = len(places), black.expand_as(image)
    first = {k: math.floor(count * k / 100 + 1e-9) for k in range(0, 100, 5)}
    return {
        "positive": [right(replace(places[: first[k]], dark)) for k in range(10, 100, 10)],
        "negative": [right(replace(places[count - first[k] :], dark)) for k in range(10, 100, 10)],
        "deletion": [replace(places[: first[k]], noise)[shown] for k in (0, 25, 50)],
        # As many as the lowest 90, ..., 50 % leave.
        "insertion": [replace(places[: count - first[90 - k]], image, dark)[shown] for k in range(0, 50, 10)],
    }


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(3, 1, 1), (3, 1, 2), (1, 2, 3), (3, 3, 5), (2, 6, 4)]))
def test_the_curves_are_those_of_one_image_and_one_pixel_at_a_time(seed, size):
    images, noise, black = (
        normal(4, *size, seed=seed),
        normal(4, *size, seed=seed + 1),
        normal(1, 1, 1, seed=3),
    )
    maps = normal(4, 2, 2, seed=seed + 2)
    maps[0], maps[1] = 0.1, maps[1].clamp_min(0)  # constant, and with ties
    true, shown = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 2, 1])
    classify = network(seed, size)
    found = curves(classify, images, maps, true, shown, black, noise, classify(images))
    assert list(found) == list(CURVES)
    for i in range(4):
        slow = one_by_one(classify, images[i], maps[i], int(true[i]), int(shown[i]), black, noise[i])
        for name, heights in slow.items():
            assert len(heights) == len(CURVES[name])
            assert found[name][i].tolist() == pytest.approx(heights, abs=1e-6), name


def test_nothing_of_an_image_of_one_pixel_is_replaced():
    """A step takes whole pixels, rounded down: 90 % of one pixel is none."""
    classify, images = network(0, (3, 1, 1)), normal(2, 3, 1, 1, seed=0)
    unchanged = classify(images)
    found = curves(
        classify,
        images,
        torch.ones(2, 1, 1),
        unchanged.argmax(dim=1),
        torch.zeros(2, dtype=torch.long),
        BLACK,
        normal(2, 3, 1, 1, seed=1),
        unchanged,
    )
    assert found["positive"].min() == found["negative"].min() == 1
    for name in ("deletion", "insertion"):
        expected = unchanged[:, :1].float().expand(-1, len(CURVES[name]))
        assert torch.allclose(found[name], expected, atol=1e-7)


def test_deletion_starts_from_the_unchanged_prediction_and_half_the_pixels_are_another_one():
    classify, images = network(1, (1, 4, 4)), normal(3, 1, 4, 4, seed=2)
    shown = torch.tensor([0, 1, 2])
    more = (shown, shown, BLACK, normal(3, 1, 4, 4, seed=4), classify(images))
    found = curves(classify, images, normal(3, 2, 2, seed=3), *more)["deletion"]
    assert torch.allclose(found[:, 0].double(), classify(images).gather(1, shown[:, None])[:, 0], atol=1e-7)
    assert (found[:, 2] - found[:, 0]).abs().min() > 1e-3


def test_each_map_takes_twenty_forward_passes():
    sizes, classify = [], network(1, (1, 4, 4))

    def counting(images):
        sizes.append(len(images))
        return classify(images)

    images, shown = normal(3, 1, 4, 4, seed=2), torch.tensor([0, 1, 2])
    more = (shown, shown, BLACK, normal(3, 1, 4, 4, seed=4), classify(images))
    curves(counting, images, normal(3, 2, 2, seed=3), *more)
    assert sizes == [3] * 20
    assert PASSES == 20


# A model of which the right map is known: its score is the sum of pixels times weights.


def linear(weights):
    """Class 1 where the sum exceeds half of its value for white images; scores grow with the sum."""
    half = weights.clamp_min(0).sum() / 4

    def classify(images):
        excess = (images[:, 0] * weights).sum(dim=(1, 2)) - half
        return torch.stack([-excess, excess], dim=1).sigmoid()

    return classify


def linear_curves(seed, maps):
    """The curves of maps [b, 6, 6] of one image, with `noise` that is black, too."""
    weights, b = normal(6, 6, seed=seed) + 0.7, len(maps)
    image, ones = (
        torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(seed)).double(),
        torch.ones(b),
    )
    images, classify = image.expand(b, -1, -1, -1), linear(weights)
    black = torch.zeros_like(images)
    found = curves(classify, images, maps, ones.long(), ones.long(), BLACK, black, classify(images))
    return found, weights * image[0, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_what_each_pixel_adds_is_the_best_map_at_every_point_and_its_negative_the_worst(seed):
    _, exact = linear_curves(seed, torch.zeros(1, 6, 6))
    found, _ = linear_curves(seed, torch.stack([exact, *normal(8, 6, 6, seed=seed + 1), -exact]))
    for name, high_is_good in [("positive", -1), ("negative", 1), ("deletion", -1), ("insertion", 1)]:
        heights = high_is_good * found[name]
        assert (heights[:1] >= heights - 1e-7).all(), name
        assert (heights[-1:] <= heights + 1e-7).all(), name


def test_random_maps_lie_between_the_best_and_the_worst():
    _, exact = linear_curves(3, torch.zeros(1, 6, 6))
    found, _ = linear_curves(3, torch.stack([exact, *normal(200, 6, 6, seed=4), -exact]))
    for name, percent in CURVES.items():
        areas = area(found[name], percent)
        low, high = sorted([float(areas[0]), float(areas[-1])])
        assert 0.05 < (float(areas[1:-1].mean()) - low) / (high - low) < 0.95, name


# The heads of a role.


def test_the_maps_of_all_heads_are_the_sum_of_those_of_some_and_of_the_others():
    clip = load_once(None, None, "auto", "fp32")
    images = torch.stack([DemoBirds("val", clip.preprocess)[i][0] for i in range(3)])
    texts = classifier(clip, KINDS, templates(clip))[[1, 4, 1]]
    every = [(layer, head) for layer in range(4) for head in range(8)]
    some, others = every[::3], [head for head in every if head not in every[::3]]
    maps = [map_of_heads(clip.model, images, heads, texts) for heads in (some, others)]
    whole = torch.stack([heatmap(clip.model, images[i : i + 1], texts[i : i + 1])[0, 0] for i in range(3)])
    assert torch.allclose(sum(maps), whole, atol=1e-6)
    assert (maps[0] - whole).abs().max() > 1e-2


# The task on the demo.

ROWS = ["decomposition", "gradcam", "centred blob", "random"]
QUICK = "--workers 0 --task faithfulness"


def faithful(tmp_path, *argv):
    """What a run that went well found and printed."""
    found = run(tmp_path, QUICK, *argv)
    assert found.code == 0, found.out
    return found.results, found.out


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.job, "load_clip", load_once)
        return faithful(tmp_path_factory.mktemp("demo"), "--limit 8 --methods gradcam random decomposition")


def test_the_table_shows_what_results_json_holds_with_both_rows_that_look_at_nothing(demo_run):
    results, printed = demo_run
    assert list(results["rows"]) == ["gradcam", "decomposition", "centred blob", "random"]
    for method, row in results["rows"].items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{method}  ")]
        areas = [row[name]["area"] for name in CURVES]
        cells = [f"{100 * mean:.1f} ± {100 * error:.1f}" for mean, error in areas]
        assert re.split(r"  +", line) == [method, row["score"], row["text"], *cells]
    for key, value in results["settings"].items():
        assert re.search(rf"^{re.escape(key)}: +{re.escape(value)}$", printed, re.MULTILINE)
    where = results["settings"]
    assert where["images"] == "demo world, test split, 8 images"
    assert where["explained"].startswith("the predicted class; answers are compared with the true class")
    assert f"{100 * results['unchanged']:.1f} % right" in where["passes"]


def test_the_lines_below_the_table_name_what_is_no_better_than_random(demo_run):
    results, printed = demo_run
    for name, sign in [("positive", -1), ("negative", 1), ("deletion", -1), ("insertion", 1)]:
        (line,) = re.findall(rf"^  {name}: +(.*)$", printed, re.MULTILINE)
        level = []
        for method, row in results["rows"].items():
            difference, error = row[name]["above random"]
            level += [method] * (method != "random" and sign * difference <= 2 * error)
        assert line == (", ".join(level) or "none")
        assert ("decomposition" in level) == (name in ("negative", "deletion"))  # eight images tell little
        assert results["rows"]["random"][name]["above random"] == [0, 0]


def test_every_figure_is_that_of_the_images_one_by_one(demo_run):
    """The model, the maps, black and the order of pixels by another route."""
    clip = load_once(None, None, "auto", "fp32")
    data = DemoBirds("test", clip.preprocess, limit=8)
    classes = classifier(clip, KINDS, templates(clip))
    images = torch.stack([data[i][0] for i in range(8)])

    @torch.no_grad()
    def classify(batch):
        logits = F.normalize(clip.model.encode_image(batch), dim=1) @ classes.T
        return (clip.model.logit_scale.exp() * logits).softmax(dim=1)

    grey, std = (
        torch.tensor(x)[:, None, None] for x in (clip.model.visual.image_mean, clip.model.visual.image_std)
    )
    shown = classify(images).argmax(dim=1)
    maps = METHODS["gradcam"](clip.model, images, classes[shown] - classes.mean(dim=0))
    noise = (draw((3, 64, 64), torch.arange(8), 1) - grey) / std
    each = {name: [] for name in CURVES}
    for i in range(8):
        true = int(data.facts["kind"][i])
        slow = one_by_one(classify, images[i], maps[i], true, int(shown[i]), -grey / std, noise[i])
        for name, heights in slow.items():
            widths = np.diff(CURVES[name])
            middles = [(a + b) / 2 for a, b in pairwise(heights)]
            each[name].append(sum(middles * widths) / sum(widths))
    for name, areas in each.items():
        row = demo_run[0]["rows"]["gradcam"][name]
        # Maps of one image and of many differ in their last digits: a pixel may go one step earlier.
        mean, error = row["area"]
        assert mean == pytest.approx(np.mean(areas), abs=2e-3), name
        assert error == pytest.approx(np.std(areas, ddof=1) / 8**0.5, abs=1e-3), name


def test_the_task_runs_the_model_twenty_times_for_each_map_and_once_more(tmp_path, monkeypatch):
    sizes, embed = [], tasks.faithfulness.image_embedding

    def counting(model, images):
        sizes.append(len(images))
        return embed(model, images)

    monkeypatch.setattr(tasks.faithfulness, "image_embedding", counting)
    faithful(tmp_path, "--limit 5 --batch-size 3 --methods rollout")
    assert sizes == [3] * (1 + 3 * 20) + [2] * (1 + 3 * 20)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures_whatever_the_batch_size(tmp_path):
    argv = ["--limit 4 --methods rollout"]
    first, again, other = (
        faithful(tmp_path, *argv, more)[0] for more in ("--seed 0", "--batch-size 3", "--seed 1")
    )
    for method, row in first["rows"].items():
        for name in CURVES:
            assert row[name]["points"] == pytest.approx(again["rows"][method][name]["points"], abs=2e-3)
    assert first["rows"]["random"] != other["rows"]["random"]


def test_the_true_class_may_be_explained_instead(tmp_path, tiny, birds, monkeypatch):  # noqa: F811
    """A random model, wrong nearly everywhere. Attention alone knows no class, so the same pixels go."""
    explained, make = [], tasks.faithfulness.maps_of

    def noting(method, job, images, indices, classes, shown):
        explained.append(shown.tolist())
        return make(method, job, images, indices, classes, shown)

    monkeypatch.setattr(tasks.faithfulness, "maps_of", noting)
    argv = [*tiny, "--data", birds / "images", "--methods raw-attention decomposition --contrast none"]
    torch.manual_seed(0)  # of the model's weights: that the areas differ, too, holds of most, not of all
    predicted, true = (faithful(tmp_path, *argv, "--prompt", prompt)[0] for prompt in ("predicted", "true"))
    assert predicted["unchanged"] == true["unchanged"] < 0.6
    assert true["settings"]["explained"].startswith("the true class")
    assert true["rows"]["decomposition"]["text"] == "class"
    blind = [found["rows"]["raw-attention"] for found in (predicted, true)]
    for name in ("positive", "negative"):
        assert blind[0][name] == blind[1][name]
    assert blind[0]["deletion"]["points"][0] > blind[1]["deletion"]["points"][0]  # unchanged, of any model
    for name in ("deletion", "insertion"):
        assert blind[0][name]["area"][0] > blind[1][name]["area"][0]
    labels = MaskFolder(birds, load_once(None, None, "auto", "fp32").preprocess).labels.tolist()
    seen = [classes for classes in explained if len(classes) == 8]  # four rows of each run
    assert seen[4:] == [labels] * 4
    assert labels not in seen[:4]


def test_the_heads_of_a_role_have_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.faithfulness, "heads_of", lambda job: [(3, 1), (2, 0)])
    results, _ = faithful(tmp_path, "--limit 3 --methods decomposition --contrast paper --role animals")
    assert list(results["rows"]) == ["decomposition: animals", "decomposition", "centred blob", "random"]
    assert results["settings"]["heads"] == "3.1, 2.0 (role 'animals')"
    role, every = (results["rows"][row] for row in ("decomposition: animals", "decomposition"))
    assert (role["score"], role["text"]) == (every["score"], every["text"]) == ("dot", "class - mean")
    assert role["insertion"] != every["insertion"]
    monkeypatch.setattr(
        tasks.faithfulness, "heads_of", lambda job: [(layer, head) for layer in range(4) for head in range(8)]
    )
    results, _ = faithful(tmp_path, "--limit 3 --methods decomposition --role animals")
    role, every = (results["rows"][row] for row in ("decomposition: animals", "decomposition"))
    assert role["insertion"]["points"] == pytest.approx(every["insertion"]["points"], abs=2e-3)


@pytest.mark.slow
def test_every_method_has_its_row_unless_it_does_not_support_the_model(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(ATTRIBUTIONS, "gradcam", Attribution(unsupported, "dot"))
    results, printed = faithful(tmp_path / "without", "--limit 1")
    methods = [method for method in METHODS if method != "gradcam"]
    for name in CURVES:  # one image tells nothing
        assert re.search(rf"^  {name}: +decomposition, .*, centred blob$", printed, re.MULTILINE)
    assert list(results["rows"]) == ["decomposition", "decomposition-abs", *methods, "centred blob", "random"]
    assert "Without gradcam: this method does not read such a model" in printed
    refused([QUICK, "--limit 1 --methods gradcam rollout"], "this method does not read such a model")


def broken(model, images, texts, **options):
    return torch.full((len(images), 8, 8), float("nan"))


def test_a_map_with_a_nan_ends_the_run_with_its_method_and_images(monkeypatch, refused):
    monkeypatch.setitem(ATTRIBUTIONS, "gradcam", Attribution(broken, "dot"))
    refused([QUICK, "--limit 3 --methods gradcam"], "gradcam on images 0 to 2: a map holds a NaN")


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--prompt duck"], "--prompt takes predicted or true; found 'duck'"),
        (["--methods magic"], "'magic'"),
        (["--role zebra"], "--role 'zebra' is no category"),
    ],
)
def test_options_that_cannot_be_used_are_refused(refused, argv, fragment):
    refused([QUICK, "--limit 2", *argv], fragment)


def test_images_without_labels_and_broken_images_are_refused(tmp_path, refused):
    picture = DemoBirds("val", lambda image: image).picture(0)
    for folder in ("flat", "kinds/duck", "kinds/gull"):
        (tmp_path / folder).mkdir(parents=True)
        picture.save(tmp_path / folder / "1.png")
    refused([QUICK, "--data", tmp_path / "flat"], "has no labels")
    (tmp_path / "kinds" / "duck" / "1.png").write_bytes(b"no image")
    refused([QUICK, "--data", tmp_path / "kinds"], "1.png")
