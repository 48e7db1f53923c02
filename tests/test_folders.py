"""data.ImageFolder: what an image shows is said by its folder; and what is refused, in one line."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import assert_refused as refused

from data import ImageFolder, InputError
from demo.images import DemoBirds
from evaluate import main
from tasks.job import zero_shot_problem


def run(tmp_path: Path, *argv: str) -> tuple[int, dict]:
    """Exit code and results.json of a task, with as little work as possible."""
    code = main([*argv, "--workers", "0", "--out", str(tmp_path / "results")])
    return code, json.loads(
        (tmp_path / "results" / argv[argv.index("--task") + 1] / "results.json").read_text()
    )


def colour(image: Image.Image) -> tuple[int, int, int]:
    return image.getpixel((0, 0))


def paint(path: Path, shade: tuple[int, int, int] = (0, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), shade).save(path)


CROW, DUCK, HERON = (10, 0, 0), (0, 20, 0), (0, 0, 30)  # so that a picture tells its class
SHADES = {"crow": CROW, "duck": DUCK, "heron": HERON}


@pytest.fixture
def birds(tmp_path) -> Path:
    """Three classes. The files' names say the opposite of their folders and sort the other way round."""
    root = tmp_path / "birds"
    for folder, names in {
        "crow": ["z_duck.png", "y_heron.png"],
        "duck": ["b_crow.png", "m_crow.png"],
        "heron": ["a_crow.png"],
    }.items():
        for name in names:
            paint(root / folder / name, SHADES[folder])
    return root


def told(data: ImageFolder) -> list[tuple[str, tuple[int, int, int]]]:
    """Of every image: the class that it is said to be, and its first pixel."""
    return [(data.classes[y], data[i][0]) for i, y in enumerate(data.y.tolist())]


# Labels.


def test_an_image_shows_what_its_folder_says(birds):
    data = ImageFolder(birds, "test", colour)
    assert Counter(told(data)) == {("crow", CROW): 2, ("duck", DUCK): 2, ("heron", HERON): 1}


def test_the_names_of_the_files_say_otherwise(birds):
    data = ImageFolder(birds, "test", colour)
    assert not any(data.classes[y] in file.stem for y, file in zip(data.y.tolist(), data.files, strict=True))


def test_renaming_the_files_changes_the_order_of_images_and_no_label(birds):
    before = [shade for _, shade in told(ImageFolder(birds, "test", colour))]
    for i, path in enumerate(sorted(birds.rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"{i}.png"))
    data = ImageFolder(birds, "test", colour)
    assert Counter(told(data)) == {("crow", CROW): 2, ("duck", DUCK): 2, ("heron", HERON): 1}
    assert [shade for _, shade in told(data)] == before  # by folder first, so the folders' order is kept


def test_classes_are_the_folders_in_order_and_an_underscore_is_a_space(tmp_path):
    for name in ("red_bird", "black_crow", "duck"):
        paint(tmp_path / name / "1.png")
    assert ImageFolder(tmp_path, "test", colour).classes == ("black crow", "duck", "red bird")


def test_a_folder_inside_a_class_belongs_to_it(birds):
    paint(birds / "crow" / "heron" / "1.png", CROW)
    assert Counter(told(ImageFolder(birds, "test", colour)))["crow", CROW] == 3


def test_an_image_keeps_its_label_when_some_are_drawn(birds):
    for i in range(30):
        paint(birds / "crow" / f"{i}.png", CROW)
    for seed in range(5):
        data = ImageFolder(birds, "test", colour, limit=8, seed=seed)
        assert len(data) == len(data.y) == 8
        assert all(SHADES[name] == shade for name, shade in told(data))
        assert data.classes == ("crow", "duck", "heron")  # the classes do not depend on what is drawn


def test_the_seed_draws_the_images(birds):
    for i in range(30):
        paint(birds / "crow" / f"{i}.png", CROW)
    first, again, other = (ImageFolder(birds, "test", colour, limit=8, seed=seed).files for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 8


def test_every_image_comes_with_its_own_index(birds):
    data = ImageFolder(birds, "test", colour)
    assert [data[i][1] for i in range(len(data))] == [0, 1, 2, 3, 4]
    assert [data.caption(i) for i in range(5)] == [str(file) for file in data.files]
    assert [colour(data.picture(i)) for i in range(5)] == [data[i][0] for i in range(5)]


def test_images_are_told_by_their_suffix_in_either_case(tmp_path):
    for name in ("a.png", "b.JPG", "c.jpeg", "d.webp", "e.BMP", "f.tif", "g.tiff", "h.gif", "i.ppm"):
        paint(tmp_path / "duck" / name)
    (tmp_path / "duck" / "notes.txt").write_text("no image")
    (tmp_path / "crow").mkdir()
    data = ImageFolder(tmp_path, "test", colour)
    assert len(data) == 9
    assert data.classes == ("duck",)  # a folder without images is no class


def test_it_says_how_much_it_holds_of_how_much(birds):
    assert ImageFolder(birds, "test", colour, limit=2).description == f"{birds}, 2 of 5 images, 3 classes"


# No labels.


def test_a_flat_folder_has_no_labels(tmp_path):
    paint(tmp_path / "duck.png")
    data = ImageFolder(tmp_path, "test", colour)
    assert data.y is None
    assert data.classes == ()
    assert "classes" not in data.description


def test_one_image_beside_the_folders_takes_the_labels_from_all(birds):
    assert ImageFolder(birds, "test", colour).y is not None
    paint(birds / "stray.png")
    data = ImageFolder(birds, "test", colour)
    assert data.y is None
    assert len(data) == 6


def test_classes_are_not_told_without_labels(tmp_path):
    paint(tmp_path / "duck.png")
    with pytest.raises(InputError, match="has no labels"):
        zero_shot_problem(ImageFolder(tmp_path, "test", colour))


def test_one_class_is_nothing_to_tell(tmp_path):
    paint(tmp_path / "duck" / "1.png")
    with pytest.raises(InputError, match="two at least"):
        zero_shot_problem(ImageFolder(tmp_path, "test", colour))


def test_two_classes_are_a_problem(birds):
    names, labels = zero_shot_problem(ImageFolder(birds, "test", colour))
    assert names == ["crow", "duck", "heron"]
    assert labels.tolist() == [0, 0, 1, 1, 2]


# Splits.


@pytest.fixture
def split(tmp_path) -> Path:
    """train holds crows, val ducks, each in their own shade."""
    paint(tmp_path / "split" / "train" / "crow" / "1.png", CROW)
    paint(tmp_path / "split" / "val" / "duck" / "1.png", DUCK)
    return tmp_path / "split"


@pytest.mark.parametrize(("asked", "found"), [("train", CROW), ("val", DUCK), ("test", DUCK)])
def test_a_folder_of_splits_is_read_by_split_and_val_is_scored(split, asked, found):
    data = ImageFolder(split, asked, colour)
    assert [data[i][0] for i in range(len(data))] == [found]


def test_test_is_scored_where_there_is_one(split):
    paint(split / "test" / "heron" / "1.png", HERON)
    data = ImageFolder(split, "test", colour)
    assert told(data) == [("heron", HERON)]
    assert ImageFolder(split, "val", colour).classes == ("duck",)


@pytest.mark.parametrize("asked", ["train", "val", "test"])
def test_without_splits_every_split_is_the_whole_folder(birds, asked):
    assert len(ImageFolder(birds, asked, colour)) == 5


def test_a_split_that_is_not_there_is_refused(split):
    (split / "train").rename(split / "elsewhere")
    with pytest.raises(InputError, match=r"no folder .*train: found val there; choose with --reference"):
        ImageFolder(split, "train", colour)


# ImageNet.


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of one small image for every WordNet id, and the ids in the order of ImageNet's classes."""
    from timm.data import ImageNetInfo

    root, ids = tmp_path_factory.mktemp("imagenet"), ImageNetInfo().label_names()
    paint(root / "one.png")
    picture = (root / "one.png").read_bytes()
    (root / "one.png").unlink()
    for name in np.random.default_rng(0).permutation(ids).tolist():  # made in no order
        (root / name).mkdir()
        (root / name / "1.png").write_bytes(picture)
    return root, ids


@pytest.fixture(scope="module")
def thousand(imagenet) -> ImageFolder:
    return ImageFolder(imagenet[0], "test", colour)


def test_an_id_is_the_class_of_its_place_among_the_sorted_ids(imagenet, thousand):
    ids = imagenet[1]
    assert len(thousand) == 1000
    assert {file.parts[0]: y for file, y in zip(thousand.files, thousand.y.tolist(), strict=True)} == {
        x: i for i, x in enumerate(ids)
    }


@pytest.mark.parametrize(
    ("wordnet", "name"),
    [
        ("n01440764", "tench"),
        ("n01443537", "goldfish"),
        ("n01614925", "bald eagle"),
        ("n02124075", "Egyptian Mau"),
        ("n03445777", "golf ball"),
        ("n07753592", "banana"),
        ("n15075141", "toilet paper"),
    ],
)
def test_an_id_has_its_name_by_hand(thousand, wordnet, name):
    y = next(
        y for file, y in zip(thousand.files, thousand.y.tolist(), strict=True) if file.parts[0] == wordnet
    )
    assert thousand.classes[y] == name


def alike(a: list[str], b: list[str]) -> float:
    """Share of pairs of names that have a word in common."""
    words = [[set(re.findall("[a-z]+", name.lower())) for name in names] for names in (a, b)]
    return float(np.mean([bool(x & y) for x, y in zip(*words, strict=True)]))


def test_names_are_those_that_wordnet_has_for_the_ids(thousand):
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    wordnet = [
        info.index_to_description(i) for i in range(1000)
    ]  # open_clip's names are other words for some of them
    assert alike(thousand.classes, wordnet) > 0.9
    assert alike(thousand.classes, [*wordnet[1:], wordnet[0]]) < 0.3  # off by one


@pytest.fixture
def fewer(imagenet):
    """The 1,000 folders without one, put back afterwards."""
    root, ids = imagenet
    away = root.with_name("away")
    (root / ids[123]).rename(away)
    yield root
    away.rename(root / ids[123])


def test_999_ids_are_refused(tmp_path, capsys, fewer):
    refused(tmp_path, capsys, ["--task", "ablation", "--data", str(fewer)], str(fewer), "999", "1,000")


def test_ids_among_other_folders_are_refused(tmp_path, capsys, birds):
    paint(birds / "n01440764" / "1.png")
    refused(
        tmp_path,
        capsys,
        ["--task", "ablation", "--data", str(birds)],
        str(birds),
        "4 folders",
        "1 of them WordNet ids",
    )


def test_a_thousand_ids_and_one_other_folder_are_refused(tmp_path, capsys, imagenet):
    paint(imagenet[0] / "duck" / "1.png")
    try:
        refused(
            tmp_path,
            capsys,
            ["--task", "ablation", "--data", str(imagenet[0])],
            "1,001 folders",
            "1,000 of them",
        )
    finally:
        (imagenet[0] / "duck" / "1.png").unlink()
        (imagenet[0] / "duck").rmdir()


@pytest.mark.parametrize("name", ["n0144076", "n014407644", "m01440764", "n0144076x"])
def test_a_name_that_only_looks_like_an_id_is_a_class(tmp_path, name):
    paint(tmp_path / name / "1.png")
    assert ImageFolder(tmp_path, "test", colour).classes == (name,)


def test_a_class_that_no_drawn_image_has_is_still_named(imagenet):
    data = ImageFolder(imagenet[0], "test", colour, limit=10, seed=0)
    assert len(data.classes) == 1000
    assert [imagenet[1][y] for y in data.y.tolist()] == [file.parts[0] for file in data.files]


# Through the command line.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 pictures of the demo's birds, in folders named by their kind; the files are named by another."""
    root, data = tmp_path_factory.mktemp("pictures"), DemoBirds("val", lambda image: image, limit=120)
    for kind, other in (("duck", "crow"), ("crow", "duck"), ("pelican", "heron")):
        match = [i for i in range(len(data)) if data.kinds[int(data.facts["kind"][i])] == kind][:8]
        (root / kind).mkdir()
        for i in match:
            data[i][0].save(root / kind / f"{other}_{100 - i}.png")
    return root


def test_ablation_scores_a_folder_by_its_folders(tmp_path, pictures):
    code, results = run(tmp_path, "--task", "ablation", "--data", str(pictures))
    assert code == 0
    assert results["images"] == 24
    assert results["settings"]["test"] == f"{pictures}, 24 of 24 images, 3 classes"
    assert (
        results["accuracy"]["base"] > 0.9
    )  # the demo tells its birds; by the files' names it would be nearly 0


def test_a_flat_folder_cannot_be_ablated(tmp_path, capsys):
    paint(tmp_path / "data" / "duck.png")
    refused(
        tmp_path,
        capsys,
        ["--task", "ablation", "--data", str(tmp_path / "data")],
        str(tmp_path / "data"),
        "no labels",
    )


@pytest.mark.parametrize("task", ["ablation", "completeness"])
def test_a_folder_of_one_class_is_refused(tmp_path, capsys, task):
    paint(tmp_path / "data" / "duck" / "1.png")
    refused(tmp_path, capsys, ["--task", task, "--data", str(tmp_path / "data")], "no labels", "two at least")


@pytest.mark.parametrize("task", ["ablation", "completeness", "debias", "textspan"])
def test_a_folder_that_is_not_there(tmp_path, capsys, task):
    refused(
        tmp_path, capsys, ["--task", task, "--data", "no/such/folder"], "no folder no/such/folder", "--data"
    )


def test_a_file_in_place_of_a_folder(tmp_path, capsys):
    paint(tmp_path / "duck.png")
    refused(
        tmp_path,
        capsys,
        ["--task", "ablation", "--data", str(tmp_path / "duck.png")],
        "no folder",
        "duck.png",
    )


def test_a_folder_without_images(tmp_path, capsys):
    (tmp_path / "data" / "duck").mkdir(parents=True)
    (tmp_path / "data" / "duck" / "notes.txt").write_text("no image")
    refused(
        tmp_path,
        capsys,
        ["--task", "ablation", "--data", str(tmp_path / "data")],
        "no images in",
        str(tmp_path / "data"),
        ".png",
    )


def test_a_reference_split_that_is_not_there(tmp_path, capsys):
    for kind in ("duck", "crow"):
        paint(tmp_path / "data" / "val" / kind / "1.png")
    argv = ["--task", "ablation", "--data", str(tmp_path / "data"), "--workers", "0"]
    refused(tmp_path, capsys, argv, f"no folder {tmp_path / 'data' / 'train'}", "val", "--reference")
    code, results = run(tmp_path, *argv, "--reference", "val")
    assert code == 0
    assert str(tmp_path / "data" / "val") in results["settings"]["means"]


def test_a_class_in_words_that_the_model_does_not_know(tmp_path, capsys, birds):
    paint(birds / "flamingo" / "1.png")
    refused(tmp_path, capsys, ["--task", "ablation", "--data", str(birds)], "'flamingo'", "not one of them")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_is_none_is_named(tmp_path, capsys, birds, workers):
    (birds / "duck" / "b_crow.png").write_text("no image")
    argv = ["--task", "ablation", "--data", str(birds), "--workers", workers]
    refused(tmp_path, capsys, argv, str(birds / "duck" / "b_crow.png"), "not an image")


def test_an_image_cut_short_is_named(tmp_path, capsys, birds):
    path = birds / "duck" / "b_crow.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    refused(
        tmp_path,
        capsys,
        ["--task", "ablation", "--data", str(birds), "--workers", "0"],
        str(path),
        "cannot read",
    )


def test_pictures_that_cannot_be_read_are_refused_when_shown(tmp_path):
    (tmp_path / "duck.png").write_text("no image")
    with pytest.raises(InputError, match=r"duck\.png is not an image"):
        ImageFolder(tmp_path, "test", colour).picture(0)


def test_a_folder_named_like_an_image_is_no_image(tmp_path):
    paint(tmp_path / "duck.png" / "1.png", DUCK)
    paint(tmp_path / "crow" / "1.png", CROW)
    data = ImageFolder(tmp_path, "test", colour)
    assert [data[i][0] for i in range(len(data))] == [CROW, DUCK]
