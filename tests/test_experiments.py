"""The experiments, run in-process and worked out again by hand: all terms of all images, summed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import Ran, run
from safetensors.torch import save_file
from small import EXACT, FAR
from test_decompose import OPTIONS, build, by_hand, far, sentences
from test_decompose import pictures as noise
from test_roles import epsilon_squared
from torch import Tensor

import tasks.textspan
from benchmarks.cue_study import pick
from data import ImageFolder, subset
from decompose import Decomposition, decompose, head_maps, token_scores
from demo import scenes
from demo.images import DemoBirds
from demo.truth import agreement, same_factors
from options import parse_args
from roles import explained, find_roles, in_own_space
from tasks.ablation import ablations
from tasks.completeness import random_texts
from tasks.drawing import GAP, TILE, Tile
from tasks.job import Job
from tasks.reference import Kept, Reference
from tasks.removal import Plan, Scores, auto_heads, random_heads
from tasks.retrieval import contact_sheet, cosine
from tasks.tables import FEW, percent
from tasks.textspan import heads_of
from tasks.waterbirds import random_control
from textspan import Moments, reconstruct, textspan
from zeroshot import classifier, default_bank, embed_texts, load_bank, load_clip, templates

LIMIT = 96
QUICK = ["--limit", str(LIMIT), "--batch-size 48 --workers 0"]
# Class scores are of float32, which rounds at 6e-8, and sums of some hundred terms of norm near 1; a wrong
# term shows at 1e-2.
SCORES = {"rtol": 0, "atol": 1e-4}


def retrieve(tmp_path: Path, folder: Path, *more: str) -> Ran:
    """A retrieval among the images of a folder."""
    return run(tmp_path, "--task retrieval", "--data", str(folder), "--workers 0", *more)


# The same by hand.


def stack(clip, data) -> Decomposition:
    """The terms of all images of a data set at once."""
    return decompose(clip.model, torch.stack([data[i][0] for i in range(len(data))]))


def right(embedding: Tensor, classes: Tensor, labels: Tensor) -> float:
    """Zero-shot accuracy."""
    return float(((F.normalize(embedding, dim=-1) @ classes.T).argmax(dim=1) == labels).double().mean())


def means(terms: Decomposition, images: int) -> Decomposition:
    """The mean of every term, once for each of so many images."""
    fields = {
        name: value.mean(dim=0).expand(images, *value.shape[1:])
        for name, value in vars(terms).items()
        if value is not None
    }
    return Decomposition(**fields)


def ablated(test: Decomposition, train: Decomposition, maps: Tensor, last: int = 4) -> dict[str, Tensor]:
    """{what is replaced by its mean: [n, d] the sum of all terms then}."""
    mean = means(train, len(test.stem))
    depth, heads = test.heads.shape[1:3]

    def without(*which: tuple[int, int]) -> Tensor:
        new = test.heads.clone()
        for layer, head in which:
            new[:, layer, head] = mean.heads[:, layer, head]
        return replace(test, heads=new).total()

    first = lambda layers: [(i, h) for i in range(layers) for h in range(heads)]  # noqa: E731
    own = [torch.einsum("bLHe,LHed->bd", terms.own, maps) for terms in (mean, test)]
    found = {
        "base": test.embedding,
        "all MLPs": replace(test, mlps=mean.mlps).total(),
        "all MLPs and stem": replace(test, mlps=mean.mlps, stem=mean.stem).total(),
        "class token's attention to itself": test.total() + own[0] - own[1],
    }
    found |= {f"attention of layers 0 to {i}": without(*first(i + 1)) for i in range(depth)}
    found |= {f"attention of layer {i}": without(*[(i, h) for h in range(heads)]) for i in range(depth)}
    return found | {
        f"head {i}.{h}": without((i, h)) for i in range(max(0, depth - last), depth) for h in range(heads)
    }


def told_by_texts(test: Decomposition, train: Decomposition, texts: Tensor, m: int, last: int = 4) -> Tensor:
    """[n, d] the heads of the last layers as their first m texts tell them, on means of everything else."""
    mean = means(train, len(test.stem))
    heads = mean.heads.clone()
    for layer in range(max(0, heads.shape[1] - last), heads.shape[1]):
        for head in range(heads.shape[2]):
            C = train.heads[:, layer, head]
            size = min(m, len(texts), int(torch.linalg.matrix_rank((C - C.mean(dim=0)).double(), rtol=1e-5)))
            if size:
                heads[:, layer, head] = reconstruct(
                    test.heads[:, layer, head], textspan(C, texts, size), C.double().mean(dim=0)
                )
    return replace(mean, heads=heads).total()


# ---- the class token's attention to itself -----------------------------------------------------------------

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def working_bmm(monkeypatch):
    """open_clip 3.3 multiplies four axes with torch.bmm under scaled_cosine_attn, which takes three."""
    monkeypatch.setattr(torch, "bmm", torch.matmul)


@every_option
@pytest.mark.usefixtures("working_bmm")
def test_own_is_the_first_source_of_the_long_way_and_of_token_scores(options):
    model = build(**options)
    images, texts = noise(model), sentences(model)
    terms, scores = decompose(model, images), token_scores(model, images, texts)
    said = lambda values: torch.einsum("bLHe,LHed,td->bLHt", values, head_maps(model), texts)  # noqa: E731
    assert far(said(terms.own), scores[:, :, :, 0]) < EXACT
    assert far(said(terms.values), scores[:, :, :, 0]) > FAR
    assert far(said(terms.values - terms.own), scores[:, :, :, 1:].sum(dim=3)) < EXACT
    images = noise(model)
    own = torch.einsum("bLHe,LHed->bLHd", decompose(model, images).own, head_maps(model))
    sources = by_hand(model, images).sources
    assert far(own, sources[:, :, :, 0]) < EXACT
    assert far(own, sources[:, :, :, 1]) > FAR


def test_own_does_not_depend_on_the_convention():
    model = build()
    images = noise(model)
    assert torch.equal(decompose(model, images, convention="paper").own, decompose(model, images).own)


# ---- the demo, a folder of its pictures, and a small model of six layers -----------------------------------


@pytest.fixture(scope="module", autouse=True)
def pictures_drawn_once():
    """The runs below see the same pictures again; a picture depends on its set and number alone."""
    render, drawn = scenes.render, {}

    def render_once(facts, index, seed):
        if (seed, index) not in drawn:
            drawn[seed, index] = render(facts, index, seed)
        return drawn[seed, index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "render", render_once)
        yield


@pytest.fixture(scope="module")
def clip():
    return load_clip(device="cpu")


@pytest.fixture(scope="module")
def demo(clip):
    """Train and test images of the demo, their terms, maps, and the classifier of its kinds of birds."""
    data = {split: DemoBirds(split, clip.preprocess, LIMIT, seed=0) for split in ("train", "test")}
    kinds = classifier(clip, list(data["test"].kinds), templates(clip))
    labels = data["test"].facts["kind"]
    return SimpleNamespace(
        data=data["test"], train=stack(clip, data["train"]), test=stack(clip, data["test"]),
        maps=head_maps(clip.model), classes=kinds, labels=labels,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of the demo in train/PLACE and val/PLACE, 40 each: classes that need single heads."""
    root = tmp_path_factory.mktemp("places")
    for split, source in (("train", "val"), ("val", "test")):
        data = DemoBirds(source, lambda image: image, limit=40, seed=3)
        for i in range(40):
            path = root / split / data.caption(i).split(", ")[1] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            data[i][0].save(path)
    return root


@pytest.fixture(scope="module")
def flat(folder, tmp_path_factory) -> Path:
    """The pictures of val, without folders."""
    root = tmp_path_factory.mktemp("flat")
    for path in (folder / "val").rglob("*.png"):
        (root / path.name).write_bytes(path.read_bytes())
    return root


def in_folder(clip, folder: Path) -> SimpleNamespace:
    """As `demo`, of the folder of places."""
    data = {split: ImageFolder(folder, split, clip.preprocess) for split in ("train", "val")}
    return SimpleNamespace(
        data=data["val"], train=stack(clip, data["train"]), test=stack(clip, data["val"]),
        maps=head_maps(clip.model), classes=classifier(clip, data["val"].classes, templates(clip)),
        labels=data["val"].y,
    )  # fmt: skip


@pytest.fixture(scope="module")
def places(clip, folder):
    return in_folder(clip, folder)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> SimpleNamespace:
    """A random model of six layers with four heads of width 8, its arguments, and a small bank of texts.

    One head writes nothing, and one writes in two directions.
    """
    root = tmp_path_factory.mktemp("deep")
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 6, "width": 32, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (root / "deep-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(root / "deep-vit.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("deep-vit")
        with torch.no_grad():
            for name, p in model.visual.named_parameters():
                p.add_((1.0 if "in_proj_weight" in name else 0.2) * torch.randn_like(p))
            blocks = model.visual.transformer.resblocks
            blocks[4].attn.out_proj.weight[:, 8:16] = 0  # head 4.1
            blocks[5].attn.in_proj_weight[64 + 18 : 64 + 24] = 0  # head 5.2 keeps two of its eight directions
            blocks[5].attn.in_proj_bias[64 + 18 : 64 + 24] = 0
    save_file(model.state_dict(), root / "deep.safetensors")
    words = (
        "red",
        "blue",
        "green",
        "round",
        "sharp",
        "old",
        "tall",
        "wet",
        "soft",
        "loud",
        "at sea",
        "in a wood",
        "at night",
        "by day",
    )
    lines = [f"{a} {b}" for b in ("bird", "house") for a in words]
    (root / "bank.txt").write_text(
        "# birds\n" + "\n".join(lines[: len(words)]) + "\n# houses\n" + "\n".join(lines[len(words) :])
    )
    argv = [
        "--model deep-vit",
        "--pretrained",
        str(root / "deep.safetensors"),
        "--text-bank",
        str(root / "bank.txt"),
    ]
    return SimpleNamespace(
        argv=argv,
        clip=load_clip("deep-vit", str(root / "deep.safetensors"), "cpu"),
        bank=load_bank(root / "bank.txt"),
    )


@pytest.fixture(scope="module")
def deep_places(deep, folder):
    return in_folder(deep.clip, folder)


# ---- ablation ----------------------------------------------------------------------------------------------


def expected(world: SimpleNamespace) -> dict[str, float]:
    return {
        name: right(e, world.classes, world.labels)
        for name, e in ablated(world.test, world.train, world.maps).items()
    }


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), "--task ablation", *QUICK)


def test_accuracy_is_that_of_embeddings_with_the_terms_at_their_mean(ablation, demo):
    assert ablation.code == 0
    assert ablation.results["images"] == LIMIT
    assert ablation.results["accuracy"] == pytest.approx(expected(demo))


@pytest.mark.slow
def test_accuracy_is_so_on_a_folder_of_other_classes(tmp_path, folder, places):
    found = run(tmp_path, "--task ablation", "--data", str(folder), "--workers 0").results["accuracy"]
    assert found == pytest.approx(expected(places))
    assert len(set(found.values())) > 4  # the ablations differ


@pytest.mark.slow
def test_accuracy_is_so_for_a_model_of_more_than_four_layers(tmp_path, folder, deep, deep_places):
    found = run(tmp_path, "--task ablation", "--data", str(folder), "--workers 0", *deep.argv).results[
        "accuracy"
    ]
    assert found == pytest.approx(expected(deep_places))
    heads = [label for label in found if label.startswith("head ")]
    # Of the last four layers.
    assert heads == [f"head {layer}.{head}" for layer in range(2, 6) for head in range(4)]
    assert found["head 4.1"] == found["base"]  # it writes nothing
    assert [label for label in found if label.startswith("attention of layer ")] == [
        f"attention of layer {i}" for i in range(6)
    ]


def reference(world: SimpleNamespace) -> Reference:
    train, moments = world.train, Moments(world.maps.shape[2], tuple(world.maps.shape[:2]))
    own, embedding = train.own.mean(dim=0), Moments(world.maps.shape[3]).update(train.embedding)
    return Reference(
        moments.update(train.values),
        train.mlps.mean(dim=0),
        train.stem.mean(dim=0),
        own,
        embedding,
        world.maps,
        0.0,
        "by hand",
    )


@pytest.mark.parametrize("which", ["demo", "deep_places"])
def test_every_ablation_changes_class_scores_by_what_the_terms_lose_and_no_two_alike(which, request):
    world = request.getfixturevalue(which)
    found = ablations(world.test, reference(world), world.classes, world.maps @ world.classes.T)
    by_hand = ablated(world.test, world.train, world.maps)
    assert list(found) == list(by_hand)
    for label, scores in found.items():
        torch.testing.assert_close(scores, by_hand[label] @ world.classes.T, **SCORES)
    nothing = (
        {("base", "head 4.1")}
        if which == "deep_places"
        else {("attention of layers 0 to 0", "attention of layer 0")}
    )
    nothing.add(("attention of layers 0 to 0", "attention of layer 0"))
    same = {(a, b) for (a, x), (b, y) in combinations(found.items(), 2) if (x - y).abs().max() < 1e-3}
    assert same == nothing


CHANGE = ["--batch-size 33 --workers 2"]


def test_means_come_from_the_reference_split(tmp_path, ablation, demo):
    found = run(tmp_path, "--task ablation", *QUICK, "--reference test").results
    world = SimpleNamespace(**{**vars(demo), "train": demo.test})
    assert found["accuracy"] == pytest.approx(expected(world))
    assert found["accuracy"] != ablation.results["accuracy"]
    assert "on the images that are scored" in found["settings"]["means"]
    assert "scored" not in ablation.results["settings"]["means"]


def rows(out: str, first: str) -> list[list[str]]:
    """The cells of the printed table whose header begins so."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first)) + 2
    body = []
    for line in lines[start:]:
        if not line.strip():
            break
        body.append([cell for cell in line.split("  ") if cell.strip()])
    return [[cell.strip() for cell in row] for row in body]


def test_the_tables_show_the_accuracies(ablation):
    found = {label: f"{100 * value:.1f}" for label, value in ablation.results["accuracy"].items()}
    groups = rows(ablation.out, "mean-ablated")
    assert [label for label, _ in groups] == list(found)[:4]
    assert [cell.split(" ")[0] for _, cell in groups] == list(found.values())[:4]
    layers = [
        [str(i), found[f"attention of layers 0 to {i}"], found[f"attention of layer {i}"]] for i in range(4)
    ]
    assert rows(ablation.out, "attention of layer") == layers
    heads = [[f"layer {i}", *(found[f"head {i}.{h}"] for h in range(8))] for i in range(4)]
    assert rows(ablation.out, "each head alone") == heads


# ---- completeness ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("forest\nsea\nnight\n")
    return path


@pytest.fixture(scope="module")
def completeness(tmp_path_factory, words):
    return run(tmp_path_factory.mktemp("run"), "--task completeness", *QUICK, "--words", str(words))


@pytest.fixture(scope="module")
def curves(completeness):
    return {pool: dict(map(tuple, points)) for pool, points in completeness.results["curves"].items()}


@pytest.fixture(scope="module")
def pools(clip, demo, words):
    """The texts of each pool."""
    bank = embed_texts(clip, load_bank(default_bank(clip)).texts)
    prompts = [template.format(kind) for kind in demo.data.kinds for template in templates(clip)]
    return {
        "descriptions": bank,
        "words": embed_texts(clip, words.read_text().split()),
        "class prompts": embed_texts(clip, prompts),
        "random vectors": random_texts(bank, 0),
    }


def test_there_is_a_curve_for_every_pool_up_to_the_width_of_a_head(completeness, curves, pools):
    assert completeness.code == 0
    assert list(curves) == list(pools)
    assert all(list(curve) == [0, 1, 2, 4, 6, 8, 10, 12, 16] for curve in curves.values())


@pytest.mark.parametrize("pool", ["descriptions", "words", "class prompts", "random vectors"])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_accuracy_is_that_of_heads_reconstructed_from_their_first_texts(curves, demo, pools, pool, m):
    assert curves[pool][m] == pytest.approx(
        right(told_by_texts(demo.test, demo.train, pools[pool], m), demo.classes, demo.labels)
    )


def test_accuracy_depends_on_the_number_of_texts_and_on_the_pool(curves):
    assert len(set(curves["descriptions"].values())) > 3
    assert curves["descriptions"] != curves["class prompts"] != curves["random vectors"]
    assert {curves["words"][m] for m in (4, 6, 8, 10, 12, 16)} == {curves["words"][4]}
    assert curves["words"][2] != curves["words"][4]  # the third text


def test_without_texts_every_image_is_the_mean(curves, demo):
    constant = (demo.train.embedding.mean(dim=0) @ demo.classes.T).argmax()
    for curve in curves.values():
        assert curve[0] == pytest.approx(float((demo.labels == constant).double().mean()))


def test_as_many_texts_as_a_head_is_wide_hold_the_whole_head(curves, completeness):
    whole = completeness.results["whole"]["last layers' heads, whole"]
    for pool in ("descriptions", "class prompts", "random vectors"):
        # One image: texts are cleared of the mean's direction too.
        assert abs(curves[pool][16] - whole) <= 1 / LIMIT + 1e-9
    assert curves["words"][16] < whole - 0.05  # three texts do not


def test_whole_heads_are_the_embedding_with_all_else_at_its_mean(completeness, demo):
    mean = means(demo.train, LIMIT)
    assert completeness.results["whole"] == pytest.approx(
        {
            "unchanged": right(demo.test.embedding, demo.classes, demo.labels),
            "last layers' heads, whole": right(
                replace(mean, heads=demo.test.heads).total(), demo.classes, demo.labels
            ),
        }
    )


def test_the_table_shows_the_curves(completeness, curves):
    found = rows(completeness.out, "texts per head")
    assert found == [
        [str(m), *(f"{100 * curve[m]:.1f}" for curve in curves.values())] for m in curves["words"]
    ]
    for key, value in completeness.results["whole"].items():
        assert f"{key}: {100 * value:.1f} [" in " ".join(completeness.out.split())


@pytest.mark.slow
def test_batch_size_and_workers_change_no_curve(tmp_path, curves, words):
    again = run(tmp_path, "--task completeness", *QUICK, "--words", str(words), *CHANGE).results["curves"]
    for pool, points in again.items():
        # Rounding may tip one image.
        assert dict(map(tuple, points)) == pytest.approx(curves[pool], abs=1 / LIMIT + 1e-9)


@pytest.mark.slow
def test_texts_caps_the_texts_and_words_are_not_needed(tmp_path, curves):
    found = run(tmp_path, "--task completeness", *QUICK, "--texts 5").results["curves"]
    assert list(found) == ["descriptions", "class prompts", "random vectors"]
    assert [m for m, _ in found["descriptions"]] == [0, 1, 2, 4]
    for pool, points in found.items():
        assert dict(map(tuple, points)) == pytest.approx({m: curves[pool][m] for m in (0, 1, 2, 4)})


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Of five reference images, on which a head has four directions."""
    return run(tmp_path_factory.mktemp("run"), "--task completeness --limit 5 --workers 0 --reference train")


def test_a_head_has_no_more_texts_than_directions(few, clip, pools):
    assert few.code == 0
    data = {split: DemoBirds(split, clip.preprocess, 5, seed=0) for split in ("train", "test")}
    train, test = stack(clip, data["train"]), stack(clip, data["test"])
    labels, classes = data["test"].facts["kind"], classifier(clip, list(data["test"].kinds), templates(clip))
    curve = dict(map(tuple, few.results["curves"]["descriptions"]))
    for m in (2, 4, 16):
        assert curve[m] == pytest.approx(
            right(told_by_texts(test, train, pools["descriptions"], m), classes, labels)
        )
    assert curve[4] == curve[16]


def test_one_reference_image_leaves_nothing_but_its_own_terms(tmp_path, folder):
    found = run(tmp_path, "--task completeness --limit 1 --workers 0", "--data", str(folder))
    assert found.code == 0
    assert all(len({accuracy for _, accuracy in points}) == 1 for points in found.results["curves"].values())


@pytest.fixture(scope="module")
def deep_curves(tmp_path_factory, folder, deep):
    argv = ["--task completeness", "--data", str(folder), "--workers 0", *deep.argv]
    return run(tmp_path_factory.mktemp("run"), *argv)


@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_a_model_of_more_than_four_layers_keeps_the_heads_of_the_last_four(deep_curves, deep, deep_places, m):
    """Among them one that writes nothing, and one of two directions."""
    assert deep_curves.code == 0
    texts, world = embed_texts(deep.clip, deep.bank.texts), deep_places
    curve = dict(map(tuple, deep_curves.results["curves"]["descriptions"]))
    assert list(curve) == [0, 1, 2, 4, 6, 8]
    assert curve[m] == pytest.approx(
        right(told_by_texts(world.test, world.train, texts, m), world.classes, world.labels)
    )


def test_the_earlier_layers_of_a_deep_model_are_means(deep_curves, deep_places):
    world = deep_places
    mean = means(world.train, len(world.labels))
    heads = torch.cat([mean.heads[:, :2], world.test.heads[:, 2:]], dim=1)
    whole = right(replace(mean, heads=heads).total(), world.classes, world.labels)
    assert deep_curves.results["whole"]["last layers' heads, whole"] == pytest.approx(whole)
    assert "layers 2 to 5" in deep_curves.results["settings"]["heads"]


def test_class_prompts_of_another_model_are_open_clips_first_six(deep_curves, deep):
    assert "class prompts: 48 texts" in deep_curves.results["settings"]["pools"]
    assert f"random vectors: {len(deep.bank.texts)} texts" in deep_curves.results["settings"]["pools"]


# Random vectors.


def cloud(n: int = 4000) -> Tensor:
    """Unit vectors near one direction, that differ most along a few others: as texts do."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.0, 0.2, 0.1, 0.05, 0.02, 0.01], dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))
    rows = torch.randn(n, 6, dtype=torch.float64, generator=generator) * spread
    return F.normalize(rows @ turn + turn[0], dim=1)


def test_random_vectors_are_unit_vectors_as_many_as_the_texts():
    found = random_texts(cloud(50).float(), seed=0)
    assert found.shape == (50, 6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(50))


def test_random_vectors_have_the_mean_and_the_covariance_of_the_texts_and_even_ones_neither():
    texts = cloud()
    found = random_texts(texts, seed=1)
    # Of 4000 rows of spread 0.2, the mean is off by 0.003 and the variance by sqrt(2 / 4000) = 2 % of itself;
    # bringing rows to unit length moves both further, by the order of the variance, 0.04.
    assert (found.mean(dim=0) - texts.mean(dim=0)).norm() < 0.03
    assert (torch.cov(found.T) - torch.cov(texts.T)).norm() < 0.1 * torch.cov(texts.T).norm()
    even = F.normalize(
        torch.randn(texts.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1
    )
    assert (even.mean(dim=0) - texts.mean(dim=0)).norm() > 0.8
    assert (torch.cov(even.T) - torch.cov(texts.T)).norm() > 2 * torch.cov(texts.T).norm()


def test_random_vectors_lie_where_the_texts_lie_and_are_none_of_them():
    texts = torch.cat([cloud(40), torch.zeros(40, 3, dtype=torch.float64)], dim=1)
    assert random_texts(texts, seed=0)[:, 6:].abs().max() < 1e-12
    texts = cloud(200)
    assert (random_texts(texts, seed=0) @ texts.T).max() < 1 - 1e-6


def test_random_vectors_are_fixed_by_the_seed():
    texts = cloud(50)
    assert torch.equal(random_texts(texts, seed=3), random_texts(texts, seed=3))
    assert not torch.allclose(random_texts(texts, seed=3), random_texts(texts, seed=4), atol=1e-3)


def test_the_seed_of_the_run_draws_the_random_vectors(clip, pools):
    job = Job(parse_args(["--task", "completeness", "--seed", "5"]))
    job.clip = clip
    found = tasks.completeness.text_pools(job, ["duck", "crow"])
    torch.testing.assert_close(found["random vectors"], random_texts(pools["descriptions"], 5))
    assert list(found) == ["descriptions", "class prompts", "random vectors"]


def test_completeness_refuses_words_that_the_model_does_not_know_or_that_are_not_there(refused, tmp_path):
    refused(
        ["--task completeness", *QUICK, "--words", str(tmp_path / "words.txt")], "words.txt", "cannot read"
    )
    (tmp_path / "words.txt").write_text("zebra\n")
    refused(["--task completeness", *QUICK, "--words", str(tmp_path / "words.txt")], "'zebra'")


# ---- retrieval ---------------------------------------------------------------------------------------------


def scored(world: SimpleNamespace, heads: list[tuple[int, int]], query: Tensor, by: str) -> Tensor:
    """[n] how near each image is to the query, by what these heads write less their mean.

    Args:
        query: [1, L, H, d] the heads' terms of an image, or [d] a text.
    """
    pick_heads = lambda terms: sum(terms[:, layer, head] for layer, head in heads).double()  # noqa: E731
    images = pick_heads(world.test.heads)
    mean = images.mean(dim=0)
    if by == "text":
        return (images - mean) @ query.double()
    return F.cosine_similarity(images - mean, pick_heads(query) - mean, dim=1)


def check_ranking(found: dict, world: SimpleNamespace, score: Tensor, top: int = 12) -> None:
    order = score.argsort(descending=True)[:top].tolist()
    assert [row["image"] for row in found["found"]] == [world.data.caption(i) for i in order]
    assert [row["rank"] for row in found["found"]] == list(range(1, top + 1))
    # float32, and lengths near 1
    assert [row["score"] for row in found["found"]] == pytest.approx(score[order].tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def photo(tmp_path_factory, clip) -> tuple[Path, Tensor]:
    """A picture that is in no data set, and its heads' terms."""
    path = tmp_path_factory.mktemp("query") / "query.png"
    data = DemoBirds("val", lambda image: image, limit=3)
    data[1][0].save(path)
    return path, decompose(clip.model, clip.preprocess(data[1][0])[None]).heads


HEADS = {"3.4": [(3, 4)], "3.0,3.1": [(3, 0), (3, 1)], "3.1,0.2,2.5": [(0, 2), (2, 5), (3, 1)]}
by_heads = pytest.mark.parametrize("asked", HEADS)


@by_heads
def test_images_are_ranked_by_the_cosine_of_what_the_heads_write(tmp_path, demo, photo, asked):
    found = run(tmp_path, "--task retrieval", *QUICK, "--head", asked, "--image", str(photo[0]))
    assert found.code == 0
    assert found.results["heads"] == [list(head) for head in HEADS[asked]]
    check_ranking(found.results, demo, scored(demo, HEADS[asked], photo[1], "image"))


@by_heads
def test_images_are_ranked_by_what_the_heads_write_along_the_text(tmp_path, clip, demo, asked):
    found = run(tmp_path, "--task retrieval", *QUICK, "--head", asked, "--text", "at the beach")
    check_ranking(
        found.results, demo, scored(demo, HEADS[asked], embed_texts(clip, ["at the beach"])[0], "text")
    )


def test_heads_and_queries_rank_differently(demo, photo, clip):
    text = embed_texts(clip, ["at the beach"])[0]
    ranks = [scored(demo, heads, photo[1], "image").argsort().tolist() for heads in HEADS.values()]
    ranks += [scored(demo, heads, text, "text").argsort().tolist() for heads in HEADS.values()]
    assert len(set(map(tuple, ranks))) == 6


def test_two_heads_are_compared_by_their_sum_and_not_head_by_head(demo, photo):
    together = scored(demo, HEADS["3.0,3.1"], photo[1], "image")
    apart = sum(scored(demo, [head], photo[1], "image") for head in HEADS["3.0,3.1"])
    assert together.argsort().tolist() != apart.argsort().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("query", ["image", "text"])
def test_a_role_is_all_heads_that_have_it(tmp_path, clip, demo, photo, query):
    asked = ["--image", str(photo[0])] if query == "image" else ["--text", "at the beach"]
    found = run(tmp_path, "--task retrieval", *QUICK, "--role places", *asked)
    bank = load_bank(default_bank(clip))
    texts = embed_texts(clip, bank.texts)
    roles = find_roles(demo.train.values, demo.maps, demo.train.embedding, texts, bank.categories)
    heads = [(i, j) for i in range(4) for j in range(8) if roles.name(i, j) == "places"]
    assert len(heads) > 3
    assert {i for i, _ in heads} != {3}  # of all layers
    assert found.results["heads"] == [list(head) for head in heads]
    wanted = photo[1] if query == "image" else embed_texts(clip, ["at the beach"])[0]
    check_ranking(found.results, demo, scored(demo, heads, wanted, query))
    assert "'places'" in found.results["settings"]["heads"]


def test_heads_of_a_role_are_explained_by_its_texts(clip, demo):
    """By the plainest route: of the true places, which the images of the demo have."""
    options = f"--task retrieval --role places --limit {LIMIT} --batch-size 80 --workers 0"
    job = Job(parse_args(options.split()))
    job.clip = clip
    place = DemoBirds("train", clip.preprocess, LIMIT).facts["place"].numpy()
    share = {
        (i, j): epsilon_squared(demo.train.heads[:, i, j].numpy(), place)[1]
        for i in range(4)
        for j in range(8)
    }
    found = heads_of(job)
    others = set(share) - set(found)
    assert np.mean([share[head] for head in found]) > 0.4 > 0.2 > np.mean([share[head] for head in others])


def test_as_many_are_printed_as_top_says(tmp_path, demo, photo):
    found = run(tmp_path, "--task retrieval", *QUICK, "--head 3.4", "--image", str(photo[0]), "--top 5")
    check_ranking(found.results, demo, scored(demo, [(3, 4)], photo[1], "image"), top=5)
    wanted = [[str(row["rank"]), f"{row['score']:.3f}", row["image"]] for row in found.results["found"]]
    assert rows(found.out, "nearest") == wanted


@pytest.mark.slow
def test_there_are_no_more_images_than_there_are(tmp_path, folder):
    found = retrieve(tmp_path, folder, "--head 3.4", "--text", "a duck", "--top 99").results["found"]
    assert len(found) == 40


def test_batch_size_and_workers_change_no_ranking(tmp_path, demo, photo):
    found = run(tmp_path, "--task retrieval", *QUICK, *CHANGE, "--head 3.4", "--image", str(photo[0]))
    check_ranking(found.results, demo, scored(demo, [(3, 4)], photo[1], "image"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "head"), [("3", "3.4"), ("17", "3.0,3.1"), ("3", "0.0")])
def test_the_query_itself_is_left_out_and_named(tmp_path, folder, head, number):
    path = next((folder / "val").rglob(f"{number}.png"))
    found = retrieve(tmp_path, folder, "--head", head, "--image", str(path), "--top 99").results
    name = f"{path.parent.name}/{path.name}"
    assert name in found["settings"]["left out"]
    for rows in (found["found"], found["whole embedding"]):
        assert len(rows) == 39
        assert name not in [row["image"] for row in rows]
        assert rows[0]["score"] < 0.9999


@pytest.mark.slow
def test_a_query_that_is_none_of_the_images_leaves_none_out(tmp_path, folder, photo):
    found = retrieve(tmp_path, folder, "--head 3.4", "--image", str(photo[0]), "--top 99").results
    assert "left out" not in found["settings"]
    assert len(found["found"]) == len(found["whole embedding"]) == 40


def test_a_photo_that_lies_on_its_side_is_known_among_the_images(tmp_path, folder):
    """Cameras write which side is up beside the pixels. The query and the images must be read alike."""
    data = tmp_path / "photos"
    data.mkdir()
    for i, path in enumerate(sorted((folder / "val").rglob("*.png"))[:20]):
        image, exif = Image.open(path), Image.Exif()
        exif[0x0112] = 6 if i == 7 else 1  # turned by a quarter, or upright
        image.save(data / f"{i}.png", exif=exif)
    found = retrieve(tmp_path, data, "--head 3.4", "--image", str(data / "7.png"), "--top 99").results
    assert found["settings"]["left out"] == "the query itself, 7.png"
    assert len(found["found"]) == 19


def test_a_picture_of_the_demo_is_a_query(tmp_path, demo):
    """The demo's test split under --limit may lack it, and here it does not."""
    row = demo.data.rows[5]
    found = run(
        tmp_path, "--task retrieval", *QUICK, "--head 3.4", "--image", f"demo:{row}", "--top 3"
    ).results
    assert found["settings"]["left out"] == f"the query itself, {demo.data.caption(5)}"
    score = scored(demo, [(3, 4)], demo.test.heads[5:6], "image")
    score[5] = -2
    check_ranking(found, demo, score, top=3)


@pytest.mark.slow
@pytest.mark.parametrize("query", ["image", "text"])
def test_the_whole_embedding_ranks_by_its_cosine(tmp_path, clip, demo, photo, query):
    asked = ["--image", str(photo[0])] if query == "image" else ["--text", "at the beach"]
    found = run(tmp_path, "--task retrieval", *QUICK, "--head 3.4", *asked).results
    wanted = embed_texts(clip, ["at the beach"])
    with torch.no_grad():
        images = torch.cat([clip.model.encode_image(demo.data[i][0][None]) for i in range(len(demo.data))])
        if query == "image":
            wanted = clip.model.encode_image(clip.preprocess(Image.open(photo[0]))[None])
    score = F.cosine_similarity(images, wanted)
    check_ranking({"found": found["whole embedding"]}, demo, score)
    assert found["whole embedding"] != found["found"]


def test_a_deep_model_and_its_heads(tmp_path, folder, deep, deep_places):
    path = folder / "val" / deep_places.data.files[4]
    found = retrieve(tmp_path, folder, *deep.argv, "--head 5.0,1.3", "--image", str(path)).results
    score = scored(deep_places, [(1, 3), (5, 0)], deep_places.test.heads[4:5], "image")
    score[4] = -2  # the query itself is left out
    check_ranking(found, deep_places, score)
    assert "agree" not in found  # nothing is known of these images


def tile(picture: np.ndarray, top: int, k: int) -> np.ndarray:
    left = GAP + k * (TILE + GAP)
    return picture[top : top + TILE, left : left + TILE]


def test_the_sheet_is_written_and_shows_what_was_found(tmp_path, folder):
    path = next((folder / "val").rglob("3.png"))
    found = retrieve(tmp_path, folder, "--head 3.4", "--image", str(path), "--top 8")
    saved = tmp_path / "results" / "retrieval" / "sheet.png"
    assert str(saved) in found.out
    picture = np.asarray(Image.open(saved).convert("RGB"), dtype=int)
    assert picture.shape[1] == 4 * (TILE + GAP) + GAP  # eight images in two rows of four

    def large(path: Path) -> np.ndarray:
        image = Image.open(path).convert("RGB")
        return np.asarray(image.resize((TILE, TILE), Image.Resampling.NEAREST), dtype=int)

    root = next(parent for parent in path.parents if parent.name == "val")
    assert np.array_equal(tile(picture, 38, 0), large(path))
    first, second = (large(root / row["image"]) for row in found.results["found"][:2])
    found_at = [
        top
        for top in range(38 + TILE, len(picture) - TILE)
        if np.array_equal(tile(picture, top, 0), first) and np.array_equal(tile(picture, top, 1), second)
    ]
    assert len(found_at) >= 1  # again where the whole embedding finds the same two first


def test_a_sheet_of_a_text_query_holds_the_images_alone():
    tiles = [
        Tile(Image.new("RGB", (20, 20), shade), "a long caption that goes on and on")
        for shade in ("red", "lime", "blue")
    ]
    picture = np.asarray(contact_sheet("title", None, {"heading": tiles}))
    assert picture.shape[1] == 3 * (TILE + GAP) + GAP
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    top = 38 + round(1.3 * 15) + GAP
    assert [tuple(tile(picture, top, k)[75, 75]) for k in range(3)] == colours
    assert all((tile(picture, top, k) == colour).all() for k, colour in enumerate(colours))


def test_a_sheet_keeps_the_shape_of_an_image_and_pads_with_white():
    wide, tall = (Tile(Image.new("RGB", size, "red")) for size in ((300, 100), (100, 300)))
    picture = np.asarray(contact_sheet("title", None, {"": [wide, tall]}))
    for k, axis in ((0, 0), (1, 1)):
        part = tile(picture, 38, k)
        red = (part == (255, 0, 0)).all(axis=2)
        assert (red.sum(axis=axis) == TILE // 3).all()
        assert (part[~red] == 255).all()


def test_pairs_that_agree_are_counted_by_hand(demo):
    order = [3, 17, 40, 41, 77]
    found = same_factors(demo.data, order)
    assert list(found) == ["kind", "colour", "place", "light", "style"]
    for factor, values in demo.data.facts.items():
        for share, images in zip(found[factor], (order, range(LIMIT)), strict=True):
            pairs = [bool(values[i] == values[j]) for i, j in combinations(images, 2)]
            assert share == pytest.approx(sum(pairs) / len(pairs))


def test_one_image_makes_no_pair(demo):
    assert all(share == 0 for share, _ in same_factors(demo.data, [3]).values())


def test_the_cosine_is_of_the_terms_that_the_values_stand_for():
    generator = torch.Generator().manual_seed(0)
    kept, asked, A = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (1, 4), (4, 7)))
    torch.testing.assert_close(cosine(kept, asked, A), F.cosine_similarity(kept @ A, asked @ A), **SCORES)
    assert (cosine(kept, asked, A) - F.cosine_similarity(kept, asked)).abs().max() > 0.05


QUERY = ["--text", "a duck"]


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--head 3.4"], ["either --image", "--text"]),
        (["--head 3.4", *QUERY, *QUERY], ["one --text"]),
        (["--head 4.0", *QUERY], ["no head 4.0", "layers 0 to 3", "heads 0 to 7"]),
        (["--head -1.0", *QUERY], []),
        (["--head 3", *QUERY], ["--head takes", "'3'"]),
        (["--role birds", *QUERY, *QUICK], ["no head has the role 'birds'", "30%"]),
        (["--head 3.4 --image no/such.png"], ["no image no/such.png"]),
        (["--head 3.4", "--text", "a zebra", *QUICK], ["'zebra'"]),
        (["--head 3.4 --data no/such/folder", *QUERY], ["no/such/folder"]),
        (["--head 3.4 --top 0", *QUERY], ["--top"]),
    ],
)
def test_retrieval_refuses(refused, argv, fragments):
    refused(["--task retrieval", *argv], *fragments)


def test_retrieval_refuses_a_query_that_is_no_image_or_a_folder(refused, tmp_path):
    (tmp_path / "query.png").write_text("no image")
    refused(
        ["--task retrieval --head 3.4", "--image", str(tmp_path / "query.png")], "query.png", "not an image"
    )
    refused(["--task retrieval --head 3.4", "--image", str(tmp_path)], str(tmp_path))


# ---- debias ------------------------------------------------------------------------------------------------

DRAWS = ["--draws 4"]


@pytest.fixture(scope="module")
def debias(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), "--task debias", *QUICK, *DRAWS)


@pytest.fixture(scope="module")
def birds(clip, demo):
    """The two classes of the demo, and what the table says by hand of class scores."""
    classes = classifier(clip, list(demo.data.classes), templates(clip))
    texts = embed_texts(clip, load_bank(default_bank(clip)).of("places"))
    cue = ((demo.test.embedding - demo.train.embedding.mean(dim=0)) @ texts.T).argmax(dim=1)
    return SimpleNamespace(classes=classes, cue=cue, texts=texts, **vars_without(demo, "classes"))


def vars_without(world: SimpleNamespace, *names: str) -> dict:
    return {key: value for key, value in vars(world).items() if key not in names}


def measured(embedding: Tensor, world: SimpleNamespace) -> dict[str, float]:
    """What the table says of embeddings; labels and groups of the demo."""
    scores = embedding @ world.classes.T
    predicted, before = scores.argmax(dim=1), (world.test.embedding @ world.classes.T).argmax(dim=1)
    centred = (scores - scores.mean(dim=1, keepdim=True)).numpy()
    found = {
        "changed": float((predicted != before).double().mean()),
        "cue": epsilon_squared(centred, world.cue.numpy())[1],
    }
    correct, y, place = (predicted == world.data.y).tolist(), world.data.y.tolist(), world.data.place.tolist()
    share = lambda rows: sum(correct[i] for i in rows) / len(rows)  # noqa: E731
    classes = [[i for i in range(len(y)) if y[i] == c] for c in range(2)]
    groups = [
        [i for i in range(len(y)) if (y[i], place[i]) == group] for group in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    return found | {
        "average": share(range(len(y))), "worst class": min(map(share, classes)),
        "worst group": min(map(share, groups)),
    }  # fmt: skip


def close(found: dict, wanted: dict) -> None:
    assert list(found) == list(wanted)
    # The share is of float32 sums; counts of images are whole.
    assert found == pytest.approx(wanted, abs=1e-4)


def replaced(world: SimpleNamespace, heads: list, project: Tensor | None = None) -> Tensor:
    """The test images with these heads at their mean, or only their part along the rows of `project`."""
    away = sum(world.train.heads[:, i, j].mean(dim=0) - world.test.heads[:, i, j] for i, j in heads)
    return world.test.embedding + (away if project is None else away @ project.T @ project)


def test_the_base_is_unchanged_and_measured_by_hand(debias, birds):
    assert debias.code == 0
    assert debias.results["rows"]["base"]["changed"] == 0
    close(debias.results["rows"]["base"], measured(birds.test.embedding, birds))


def test_heads_without_the_cue_are_measured_by_hand(debias, birds):
    found = debias.results["rows"]
    embedding = replaced(birds, debias.results["heads"])
    close(found["heads mean-ablated"], measured(embedding, birds))
    train, test = birds.train, birds.test
    embedding = (
        embedding + (train.mlps.mean(dim=0) - test.mlps).sum(dim=1) + train.stem.mean(dim=0) - test.stem
    )
    close(found["  + MLPs and stem"], measured(embedding, birds))


def test_directions_without_the_cue_are_measured_by_hand(debias, birds):
    found = debias.results["rows"]
    # The directions by another route: eigenvectors of the texts' covariance that hold 95 % of it.
    values, vectors = torch.linalg.eigh(torch.cov(birds.texts.double().T))
    held = values.flip(0).cumsum(0) / values.sum()
    Q = vectors.flip(1)[:, : int((held < 0.95).sum()) + 1].T.float()
    close(
        found["cue's directions in the heads"], measured(replaced(birds, debias.results["heads"], Q), birds)
    )
    away = birds.train.embedding.mean(dim=0) - birds.test.embedding
    close(found["cue's directions everywhere"], measured(birds.test.embedding + away @ Q.T @ Q, birds))


def test_taking_the_cue_out_changes_predictions_and_lets_go_of_the_cue(debias):
    base, *others = debias.results["rows"].values()
    assert all(row["changed"] > 0 for row in others)
    assert all(row["cue"] < base["cue"] - 0.1 for row in others)


def test_the_chosen_heads_are_those_that_the_cue_explains(debias, birds):
    train, label = (
        birds.train,
        ((birds.train.embedding - birds.train.embedding.mean(dim=0)) @ birds.texts.T).argmax(dim=1),
    )
    share = [
        [epsilon_squared(train.heads[:, i, j].numpy(), label.numpy())[1] for j in range(8)] for i in range(4)
    ]
    assert debias.results["explained"] == pytest.approx(np.array(share), abs=1e-4)
    assert debias.results["heads"] == [[i, j] for i in range(4) for j in range(8) if share[i][j] > 0.3]


def test_random_heads_are_measured_by_hand_as_often_as_asked(debias, birds):
    drawn = random_heads([tuple(head) for head in debias.results["heads"]], 8, 4, seed=0)
    assert len(debias.results["random"]) == 4
    for found, heads in zip(debias.results["random"], drawn, strict=True):
        close(found, measured(replaced(birds, heads), birds))


def test_debias_agrees_with_waterbirds_on_the_same_images(tmp_path, debias):
    ways = (
        "--remove heads directions embedding texts"  # debias shows the published ones if it is asked for them
    )
    other = run(tmp_path, "--task waterbirds", ways, *QUICK, *DRAWS).results
    assert debias.results["heads"] == other["heads"]
    assert list(debias.results["rows"]) == list(other["rows"])
    for label, row in debias.results["rows"].items():
        assert row["average"] == pytest.approx(other["rows"][label]["average"])
        assert row["worst group"] == pytest.approx(other["rows"][label]["worst"])
    for ours, theirs in (("average", "average"), ("worst group", "worst")):
        values = [row[ours] for row in debias.results["random"]]
        assert np.mean(values) == pytest.approx(other["random"][theirs]["mean"])
        assert max(values) == pytest.approx(other["random"][theirs]["max"])


def test_the_table_shows_the_rows(debias):
    found = rows(debias.out, "%  ")
    for cells, (label, row) in zip(found, debias.results["rows"].items(), strict=False):
        values = [f"{100 * value:.1f}" for value in row.values()]
        assert cells[0] == label.strip()
        assert [cell.split(" ")[0] for cell in cells[1:]] == values
    random = debias.results["random"]
    assert found[-1][0] == f"{len(debias.results['heads'])} random heads, mean ± std"
    for cell, key in zip(found[-1][1:], random[0], strict=True):
        values = [100 * row[key] for row in random]
        assert [float(x) for x in cell.split(" ± ")] == pytest.approx(
            [np.mean(values), np.std(values)], abs=0.051
        )  # one decimal


@pytest.mark.slow
def test_batch_size_and_workers_change_nothing_of_debias(tmp_path, debias):
    again = run(tmp_path, "--task debias", *QUICK, *DRAWS, *CHANGE).results
    assert again["heads"] == debias.results["heads"]
    for label, row in debias.results["rows"].items():
        close(again["rows"][label], row)


@pytest.mark.slow
def test_the_order_of_the_classes_changes_no_figure(tmp_path, debias):
    again = run(tmp_path, "--task debias", *QUICK, *DRAWS, "--classes waterbird landbird").results
    for label, row in debias.results["rows"].items():
        close(again["rows"][label], row)


@pytest.mark.slow
def test_more_classes_than_the_labels_have_are_still_scored(tmp_path, clip, birds):
    names = ["crow", "waterbird", "landbird"]
    found = run(tmp_path, "--task debias", *QUICK, *DRAWS, "--classes", *names).results["rows"]["base"]
    world = SimpleNamespace(**{**vars(birds), "classes": classifier(clip, names, templates(clip))})
    predicted = (world.test.embedding @ world.classes.T).argmax(dim=1)
    assert found["average"] == pytest.approx(float((predicted == 2 - world.data.y).double().mean()))
    assert (predicted == 0).any()  # some are taken for crows
    assert found["cue"] == pytest.approx(measured(world.test.embedding, world)["cue"], abs=1e-4)


FOLDER = ["--workers 0", *DRAWS, "--heads 3.0,3.1"]


def test_a_folder_of_classes_has_accuracies_but_no_groups(tmp_path, folder, places):
    found = run(tmp_path, "--task debias", "--data", str(folder), *FOLDER, "--cue light").results["rows"]
    assert list(found["base"]) == ["changed", "cue", "average", "worst class"]
    for label, embedding in (
        ("base", places.test.embedding),
        ("heads mean-ablated", replaced(places, [(3, 0), (3, 1)])),
    ):
        predicted = (embedding @ places.classes.T).argmax(dim=1)
        correct = (predicted == places.labels).double()
        assert found[label]["average"] == pytest.approx(float(correct.mean()))
        by_class = [float(correct[places.labels == c].mean()) for c in range(8) if (places.labels == c).any()]
        assert found[label]["worst class"] == pytest.approx(min(by_class))
    assert found["heads mean-ablated"]["changed"] > 0


@pytest.mark.parametrize("which", ["folder", "flat"])
def test_classes_that_the_folders_do_not_name_have_no_accuracies(tmp_path, clip, request, places, which):
    root = request.getfixturevalue(which)
    argv = ["--task debias", "--data", str(root), *FOLDER, "--classes landbird waterbird"]
    found = run(tmp_path, *argv, *(["--reference val"] if which == "folder" else []))
    assert found.code == 0
    assert all(
        list(row) == ["changed", "cue"] for row in [*found.results["rows"].values(), *found.results["random"]]
    )
    assert found.results["settings"]["labels"] == "none given"
    assert "average" not in found.out
    # The same pictures, which are the reference too: "changed" by hand.
    classes = classifier(clip, ["landbird", "waterbird"], templates(clip))
    world = SimpleNamespace(**{**vars(places), "train": places.test})
    before, after = (
        (e @ classes.T).argmax(dim=1) for e in (world.test.embedding, replaced(world, [(3, 0), (3, 1)]))
    )
    assert found.results["rows"]["heads mean-ablated"]["changed"] == pytest.approx(
        float((before != after).double().mean())
    )


def test_some_of_the_folders_names_are_not_labels(tmp_path, folder):
    argv = ["--task debias", "--data", str(folder), *FOLDER, "--classes lake forest"]
    assert "average" not in run(tmp_path, *argv).results["rows"]["base"]


def test_all_heads_of_their_layers_leave_no_random_control(tmp_path, folder):
    argv = [
        "--task debias",
        "--data",
        str(folder),
        "--workers 0",
        "--heads",
        ",".join(f"3.{h}" for h in range(8)),
    ]
    found = run(tmp_path, *argv)
    assert found.results["random"] == []
    assert "random heads" not in found.out


def test_a_deep_model_without_its_earlier_layers(tmp_path, folder, deep, deep_places):
    argv = [
        "--task debias",
        "--data",
        str(folder),
        "--workers 0",
        *deep.argv,
        "--heads 1.2,5.0 --cue birds",
        *DRAWS,
    ]
    found = run(tmp_path, *argv).results["rows"]
    world, train, test = deep_places, deep_places.train, deep_places.test
    early = [(i, h) for i in range(2) for h in range(4)]
    chosen = {(1, 2), (5, 0)}
    rest = (train.mlps.mean(dim=0) - test.mlps).sum(dim=1) + train.stem.mean(dim=0) - test.stem
    for label, embedding in (
        ("heads mean-ablated", replaced(world, sorted(chosen))),
        ("  + MLPs and stem", replaced(world, sorted(chosen)) + rest),
        ("  + earlier layers", replaced(world, sorted(chosen | set(early))) + rest),
    ):
        assert found[label]["average"] == pytest.approx(right(embedding, world.classes, world.labels))


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--classes duck crow duck"], ["each once", "duck, crow, duck"]),
        (["--cue", "in fog"], ["'in fog'", "places"]),
        (["--cue", "in fog", "in fog", *QUICK], ["do not differ"]),
    ],
)
def test_debias_refuses(refused, argv, fragments):
    refused(["--task debias", *argv], *fragments)


def test_debias_refuses_a_folder_without_two_classes(refused, flat, folder):
    refused(["--task debias", "--data", str(flat)], "--classes", "two names")
    refused(["--task debias", "--data", str(folder / "val" / "lake")], "--classes")


# What debias shares with waterbirds.


@pytest.mark.parametrize(
    "chosen", [[(3, 1), (3, 4), (1, 0)], [(2, 0)], [(0, h) for h in range(8)] + [(3, 3), (3, 4)]]
)
def test_random_heads_are_as_many_from_each_layer_and_never_the_chosen(chosen):
    found = random_heads(chosen, 8, 200, seed=0)
    assert len(found) == (7 if len(chosen) == 1 else 27 if len(chosen) > 3 else 200)  # 8 - 1, 28 - 1
    assert len({frozenset(drawn) for drawn in found}) == len(found)
    for drawn in found:
        assert len(set(drawn)) == len(drawn)
        assert sorted(layer for layer, _ in drawn) == sorted(layer for layer, _ in chosen)
        assert all(0 <= head < 8 for _, head in drawn)
        assert set(drawn) != set(chosen)
    heads = {head for drawn in found for head in drawn}
    assert heads == {(layer, h) for layer, _ in chosen for h in range(8)} - (
        set(chosen) if len(chosen) == 1 else set()
    )


def test_the_chosen_heads_are_above_those_draws_whose_worst_group_is_lower():
    drawn = [{"worst": worst, "average": 0.9} for worst in (0.4, 0.5, 0.6, 0.7)]
    found = random_control({"worst": 0.6}, drawn)
    assert found["below the chosen heads"] == 2 / 4  # not the one that is equal
    assert found["worst"] == pytest.approx({"mean": 0.55, "std": np.std([4, 5, 6, 7]) / 10, "max": 0.7})


def test_random_heads_are_fixed_by_the_seed():
    chosen = [(3, 1), (3, 4)]
    assert (
        random_heads(chosen, 8, 9, seed=0)
        == random_heads(chosen, 8, 9, seed=0)
        != random_heads(chosen, 8, 9, seed=1)
    )


@pytest.mark.parametrize(
    "chosen", [[], [(2, h) for h in range(8)], [(layer, h) for layer in (0, 3) for h in range(8)]]
)
def test_where_there_is_no_other_set_of_heads_none_is_drawn(chosen):
    assert random_heads(chosen, 8, 5, seed=0) == []


def test_the_chosen_heads_are_summed():
    scores = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert torch.equal(pick(scores, [(2, 1), (0, 3)]), scores[:, 2, 1] + scores[:, 0, 3])
    assert torch.equal(pick(scores, []), torch.zeros(2, 5, dtype=torch.long))


def test_heads_above_the_threshold_are_chosen():
    assert auto_heads(torch.tensor([[0.31, 0.29], [0.0, 0.9]]), "a cue") == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("remove", "labels"),
    [
        (["heads"], ["heads mean-ablated", "  + MLPs and stem", "  + earlier layers"]),
        (["directions"], ["cue's directions in the heads"]),
        (["embedding"], ["cue's directions everywhere"]),
    ],
)
def test_only_the_rows_asked_for_are_made(remove, labels):
    assert Plan(remove, (6, 4), [(5, 1)]).labels == ["base", *labels]
    assert Plan(remove, (6, 4), [(5, 1)], further=["a"], last=["b"]).labels[-1] == "b"


def test_a_row_of_the_plan_takes_out_the_terms_that_it_names():
    """Against sums written out, term by term."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embedding": (),
        "heads": (6, 4),
        "mlps": (6,),
        "stem": (),
        "heads_cue": (6, 4),
        "embedding_cue": (),
        "further": (2,),
    }
    scores = Scores(
        *(torch.randn(2, *shape, 3, generator=generator) for shape in shapes.values()), label=torch.zeros(2)
    )
    chosen, drawn = [(0, 1), (5, 1), (5, 2)], [(0, 3), (5, 0), (5, 2)]
    plan = Plan(("heads", "directions", "embedding"), (6, 4), chosen, [drawn], ["a", "b"])
    heads = sum(scores.heads[:, layer, head] for layer, head in chosen)
    others = scores.mlps.sum(dim=1) + scores.stem
    early = sum(
        scores.heads[:, layer, head] for layer in (0, 1) for head in range(4) if (layer, head) != (0, 1)
    )
    directions = sum(scores.heads_cue[:, layer, head] for layer, head in chosen)
    expected = [0 * heads, heads, heads + others, heads + others + early, directions]
    expected += [*scores.further.unbind(dim=1), scores.embedding_cue]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(scores.after(plan.rows), scores.embedding + torch.stack(expected), **close)
    torch.testing.assert_close(scores.after(plan.chosen)[0], scores.embedding + heads, **close)
    torch.testing.assert_close(
        scores.after(plan.draws)[0], scores.embedding + pick(scores.heads, drawn), **close
    )
    assert not torch.allclose(scores.after(plan.draws), scores.after(plan.chosen))


@pytest.mark.parametrize("batch", [1, 7, 30])
def test_the_images_kept_are_those_drawn_in_any_batches(batch):
    generator = torch.Generator().manual_seed(0)
    values, embedding = torch.randn(30, 5, 2, 3, generator=generator), torch.randn(30, 4, generator=generator)
    kept = Kept(30, 11, 7, slice(2, 5))
    for i in range(0, 30, batch):
        rows = torch.arange(i, min(i + batch, 30))
        kept.update(SimpleNamespace(values=values[rows], embedding=embedding[rows]), rows)
    wanted = subset(30, 11, 7)
    assert kept.rows == wanted
    assert torch.equal(kept.values.tensor(), values[wanted][:, 2:5])
    assert torch.equal(kept.embedding.tensor(), embedding[wanted])


# ---- textspan: roles, and how often they are the demo's true factors ---------------------------------------

FACTORS = {"animals": "kind", "colours": "colour", "places": "place", "light": "light", "styles": "style"}
ROLES, TRUTH = 250, 300  # reference images, and images of the validation split


@pytest.fixture(scope="module")
def spans(tmp_path_factory):
    """A run on the demo, and the truth that it found."""
    truths, compute = [], tasks.textspan.true_factors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tasks.textspan, "DemoBirds", lambda split, transform: DemoBirds(split, transform, limit=TRUTH)
        )
        patch.setattr(
            tasks.textspan, "true_factors", lambda *given: truths.append(compute(*given)) or truths[-1]
        )
        found = run(
            tmp_path_factory.mktemp("run"),
            "--task textspan",
            "--limit",
            str(ROLES),
            "--batch-size 100 --workers 0",
        )
    return SimpleNamespace(**found._asdict(), truth=truths[0])


def test_roles_agree_with_the_true_factor_in_most_clear_heads_and_those_dealt_at_random_do_not(spans):
    counts = spans.results["agreement"]
    assert counts["heads"] == 32
    assert counts["clear heads"] >= 16
    assert counts["roles from categories"] >= 0.8 * counts["clear heads"]
    assert counts["roles dealt at random"] < 0.5 * counts["roles from categories"]
    assert counts["roles dealt at random"] < counts["roles from greedy texts"]


def matches(found: list, true: list) -> int:
    return sum(a == b for a, b in zip(found, true, strict=True))


def counted(truth: dict[str, Tensor], heads: list[dict]) -> dict:
    """`agreement` by hand."""
    factors = list(truth)
    shares = {head["head"]: [float(truth[f].flatten()[i]) for f in factors] for i, head in enumerate(heads)}
    clear = [head for head in heads if max(shares[head["head"]]) > 0.3]
    true = [factors[int(np.argmax(shares[head["head"]]))] for head in clear]
    roles = [FACTORS.get(head["role"]) for head in clear]
    texts = []
    for head in clear:
        ranked = sorted(head["texts by category"].items(), key=lambda item: -item[1])
        texts.append(FACTORS.get(ranked[0][0]) if ranked else None)
    # Dealt at random: the mean over all rotations, each of which gives every head every other head's role
    # once.
    dealt = [matches(roles[k:] + roles[:k], true) for k in range(len(clear))]
    return {
        "heads": len(heads),
        "clear heads": len(clear),
        "heads with a role": len([head for head in heads if head["role"]]),
        "roles from categories": matches(roles, true),
        "roles from greedy texts": matches(texts, true),
        "roles dealt at random": float(np.mean(dealt)) if clear else 0,
        "other heads without a role": sum(head["role"] is None for head in heads if head not in clear),
    }


def test_agreement_is_counted_by_hand(spans):
    assert spans.results["agreement"] == pytest.approx(counted(spans.truth, spans.results["heads"]))


def test_agreement_of_made_up_heads_is_counted_by_hand():
    generator = torch.Generator().manual_seed(0)
    categories = [*FACTORS, "birds", None]
    for _ in range(20):
        truth = {factor: 0.6 * torch.rand(3, 4, generator=generator) ** 2 for factor in FACTORS.values()}
        dealt = [categories[i] for i in torch.randint(7, (12,), generator=generator).tolist()]
        texts = torch.rand(12, 3, generator=generator).tolist()
        heads = [
            {
                "head": str(i),
                "role": role,
                "texts by category": dict(zip(("birds", "light", "places"), share, strict=True)) if i else {},
            }
            for i, (role, share) in enumerate(zip(dealt, texts, strict=True))
        ]
        heads[0]["texts by category"] = {}  # a head without texts
        assert agreement(truth, heads) == pytest.approx(counted(truth, heads))


def test_agreement_without_clear_heads_is_of_none():
    truth = {factor: torch.full((1, 2), 0.29) for factor in FACTORS.values()}
    heads = [
        {"head": str(i), "role": role, "texts by category": {}} for i, role in enumerate(("places", None))
    ]
    found = agreement(truth, heads)
    assert found["clear heads"] == found["roles from categories"] == found["roles dealt at random"] == 0
    assert found["other heads without a role"] == 1


@pytest.mark.slow
def test_the_truth_is_the_share_of_the_terms_between_values_of_the_factor(spans, clip):
    data = DemoBirds("val", clip.preprocess, limit=TRUTH)
    heads = stack(clip, data).heads.numpy()
    for factor, share in spans.truth.items():
        wanted = [
            [epsilon_squared(heads[:, i, j], data.facts[factor].numpy())[1] for j in range(8)]
            for i in range(4)
        ]
        torch.testing.assert_close(
            share.double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-4
        )
    assert list(spans.truth) == list(FACTORS.values())


def check_shares(
    heads: list[dict], terms: Decomposition, texts: Tensor, categories: list[str], first: int
) -> None:
    """The heads' categories are by hand what the terms say; the role is the best one above the threshold."""
    fit = ((terms.embedding - terms.embedding.mean(dim=0)) @ texts.T).numpy()
    for head in heads:
        layer, number = map(int, head["head"].split("."))
        assert layer >= first
        rows = terms.heads[:, layer, number].numpy()
        for category, share in head["categories"].items():
            members = [i for i, name in enumerate(categories) if name == category]
            label = fit[:, members].argmax(axis=1)
            wanted = epsilon_squared(rows, label)[1] if np.abs(rows - rows.mean(axis=0)).max() > 0 else 0.0
            assert share == pytest.approx(wanted, abs=1e-3)  # float32
        best = max(head["categories"], key=head["categories"].get)
        share, halves = head["categories"][best], head["halves"]
        same = all(category == best and part > 0.3 for category, part in halves)
        assert head["role"] == (best if same and share > 0.3 and share > head["chance"] else None)
        assert share == pytest.approx(sum(part for _, part in halves) / 2, abs=0.2)


def test_every_head_has_the_role_that_explains_most_of_it(spans, clip):
    bank = load_bank(default_bank(clip))
    data = DemoBirds("train", clip.preprocess, ROLES)
    check_shares(spans.results["heads"], stack(clip, data), embed_texts(clip, bank.texts), bank.categories, 0)
    assert len({head["role"] for head in spans.results["heads"]}) > 4


@pytest.mark.slow
def test_every_head_of_a_deep_model_has_its_own_shares(tmp_path, folder, deep, deep_places):
    found = run(tmp_path, "--task textspan", "--data", str(folder), "--workers 0", *deep.argv, "--texts 2")
    heads = found.results["heads"]
    assert [head["head"] for head in heads] == [
        f"{layer}.{number}" for layer in range(2, 6) for number in range(4)
    ]
    texts = embed_texts(deep.clip, deep.bank.texts)
    check_shares(heads, deep_places.train, texts, deep.bank.categories, 2)
    assert "agreement" not in found.results  # the truth is known of the demo alone
    silent = next(head for head in heads if head["head"] == "4.1")
    assert silent["texts"] == []
    assert silent["role"] is None
    assert "writes the same to every image" in found.out


def test_the_role_of_every_head_is_printed(spans):
    for head in spans.results["heads"]:
        line = next(line for line in spans.out.splitlines() if line.startswith(head["head"] + " "))
        share = max(head["categories"].values())
        assert f"{share:.0%}, chance {head['chance']:.0%}; halves: {head['halves'][0][0]} " in line
        assert ("no role (" in line) == (head["role"] is None)
        assert (head["role"] or "") in line
    counts = spans.results["agreement"]
    assert f"explains over 30% of {counts['clear heads']} of 32 heads" in spans.out
    line = next(line for line in spans.out.splitlines() if "roles from categories" in line)
    assert f"{counts['roles from categories']:.1f} of {counts['clear heads']}" in line
    right, given = counts["roles from categories"], counts["heads with a role"]
    assert f"Of all {given} roles, {right} are the true factor" in spans.out
    assert percent(right / given, given) in spans.out


def test_of_shuffled_banks_hardly_a_head_gets_a_role_and_that_is_printed(spans):
    shuffled = spans.results["shuffled"]
    assert len(shuffled) == 10
    assert sum(shuffled) <= 10  # of 320 heads
    assert f"shuffled over texts, {', '.join(map(str, shuffled))} of 32 heads" in spans.out


@pytest.mark.slow
def test_few_images_choose_wrong_heads_and_ten_per_text_hardly_any(clip):
    """Where --task waterbirds and its like begin to warn, on the demo's places."""
    data = DemoBirds("train", clip.preprocess, 500, seed=0)
    found, generator = stack(clip, data), torch.Generator().manual_seed(0)
    written, embedding = in_own_space(found.values, head_maps(clip.model)), found.embedding
    texts = embed_texts(clip, load_bank(default_bank(clip)).of("places"))
    true = explained(written, data.facts["place"]) > 0.3
    wrong, per_text = {}, {}
    for images in (30, 300):
        rows = [torch.randperm(500, generator=generator)[:images] for _ in range(10)]
        labels = [((embedding[row] - embedding[row].mean(dim=0)) @ texts.T).argmax(dim=1) for row in rows]
        chosen = [explained(written[row], label) > 0.3 for row, label in zip(rows, labels, strict=True)]
        wrong[images] = np.mean([int((heads & ~true).sum()) for heads in chosen])
        per_text[images] = np.mean([images / len(label.unique()) for label in labels])
    assert per_text[30] < 3
    assert wrong[30] > 2
    assert per_text[300] > FEW
    assert wrong[300] < 0.3


@pytest.mark.slow
def test_the_true_factors_of_the_demo_are_not_those_of_a_folder(tmp_path, folder):
    found = run(tmp_path, "--task textspan --workers 0 --texts 2 --data", str(folder))
    assert "agreement" not in found.results
    assert "A true factor" not in found.out


def test_where_there_are_few_other_sets_of_heads_all_are_taken_and_named():
    every = random_heads([(3, 4)], 8, 100, seed=0)
    assert every == [[(3, head)] for head in (0, 1, 2, 3, 5, 6, 7)]
    assert Plan(("heads",), (4, 8), [(3, 4)], every).sets.startswith("all 7 other sets")
    chosen = [(3, 4), (3, 5), (1, 0)]  # 28 * 8 - 1
    draws = random_heads(chosen, 8, 100, seed=0)
    assert Plan(("heads",), (4, 8), chosen, draws).sets.startswith("100 of the 223 other sets")
    assert len({frozenset(heads) for heads in random_heads(chosen, 8, 222, seed=0)}) == 222


@pytest.mark.slow
def test_a_bank_of_other_categories_has_no_agreement(tmp_path):
    (tmp_path / "bank.txt").write_text(
        "# places\nat the beach\nin the forest\non the open sea\n# light\nat night\nat sunset\nin fog\n"
    )
    argv = ["--task textspan --limit 40 --workers 0", "--text-bank", str(tmp_path / "bank.txt"), "--texts 2"]
    assert "agreement" not in run(tmp_path, *argv).results
