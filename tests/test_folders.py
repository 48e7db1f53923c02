"""data.ImageFolder: what an image shows is said by its folder; and what is refused, in one line."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from runs import assert_refused as refused
from torchvision.datasets import ImageFolder as TorchvisionFolder

from data import ImageFolder, InputError, Waterbirds
from demo.images import DemoBirds
from evaluate import main
from pictures import read_picture
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


# Folders as others make them.


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_links_to_classes_and_to_images_are_followed_as_torchvision_does(tmp_path, birds):
    root = tmp_path / "linked"
    link(root / "crow", birds / "crow")
    for name in ("b_crow.png", "m_crow.png"):  # as a hub's cache and git-annex lay them out
        link(root / "duck" / name, birds / "duck" / name)
    paint(root / "heron" / "a_crow.png", HERON)
    data, theirs = ImageFolder(root, "test", colour), TorchvisionFolder(root)
    assert Counter(told(data)) == {("crow", CROW): 2, ("duck", DUCK): 2, ("heron", HERON): 1}
    assert [(str(root / file), int(y)) for file, y in zip(data.files, data.y, strict=True)] == theirs.samples


@pytest.mark.parametrize(
    "loop",
    [lambda root: [("crow/up", root)], lambda root: [("crow/a", root / "duck"), ("duck/b", root / "crow")]],
)
def test_links_that_lead_back_end(birds, loop):
    """Each folder is entered once on the way down."""
    for name, target in loop(birds):
        link(birds / name, target)
    data = ImageFolder(birds, "test", colour)
    assert {file.name for file in data.files} == {
        "z_duck.png",
        "y_heron.png",
        "b_crow.png",
        "m_crow.png",
        "a_crow.png",
    }
    assert len(data) < 12


def test_a_link_to_nothing_is_no_image_that_is_not_there(tmp_path, capsys, birds):
    link(birds / "duck" / "annexed.png", tmp_path / "annex" / "object")
    argv = ["--task", "ablation", "--data", str(birds), "--workers", "0"]
    refused(tmp_path, capsys, argv, str(birds / "duck" / "annexed.png"), "link to nothing")


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.JFIF"])
def test_other_endings_of_images(tmp_path, name):
    Image.new("RGB", (8, 8), DUCK).save(tmp_path / name, format="JPEG", quality=100)
    data = ImageFolder(tmp_path, "test", colour)
    assert len(data) == 1
    assert "passed over" not in data.description


def test_what_is_passed_over_is_counted_and_named(birds):
    for name in ("duck/a.heic", "crow/no-ending", "crow/notes.TXT"):
        (birds / name).write_bytes(b"")
    description = ImageFolder(birds, "test", colour).description
    assert description.endswith(
        "5 of 5 images, 3 classes; passed over: 3 (.heic, .txt, no ending; first crow/no-ending)"
    )


def test_no_image_but_other_files_is_refused_with_what_there_is(tmp_path):
    (tmp_path / "one.heic").write_bytes(b"")
    with pytest.raises(InputError, match=r"no images in .*passed over: 1 \(\.heic; first one\.heic\)"):
        ImageFolder(tmp_path, "test", colour)


def test_leftovers_of_tools_are_no_images_and_no_classes(birds):
    """What macOS' archives, Finder, Explorer, Jupyter and a NAS leave."""
    for name in (
        "__MACOSX/duck/._b_crow.png",
        "duck/._b_crow.png",
        ".ipynb_checkpoints/b.png",
        "@eaDir/b.png",
    ):
        (birds / name).parent.mkdir(parents=True, exist_ok=True)
        (birds / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    for name in (".DS_Store", "duck/Thumbs.db", "crow/desktop.ini"):
        (birds / name).write_bytes(b"")
    data = ImageFolder(birds, "test", colour)
    assert Counter(told(data)) == {("crow", CROW): 2, ("duck", DUCK): 2, ("heron", HERON): 1}
    assert "passed over" not in data.description


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_class_can_be_called_like_a_split(birds, name, split):
    (birds / "heron").rename(birds / name)
    data = ImageFolder(birds, split, colour)
    assert sorted(data.classes) == sorted(["crow", "duck", name])
    assert len(data) == 5


def test_splits_that_hold_folders_are_splits_beside_others_which_are_named(split):
    paint(split / "devkit" / "map.png")
    paint(split / "test" / "1.png")  # without labels, as ImageNet's
    (split / "readme.txt").write_text("about")
    (split / ".git").mkdir()
    data = ImageFolder(split, "train", colour)
    assert told(data) == [("crow", CROW)]
    assert data.description.endswith("; passed over beside it: 2 (devkit, readme.txt)")


def test_splits_of_images_alone_are_splits_where_there_is_nothing_else(tmp_path):
    for name, shade in (("train", CROW), ("test", DUCK)):
        paint(tmp_path / name / "1.png", shade)
    assert ImageFolder(tmp_path, "train", colour)[0][0] == CROW
    assert ImageFolder(tmp_path, "test", colour)[0][0] == DUCK


# Waterbirds as others store it.

# As pandas writes a frame with its index, whose columns became floats when it was joined with another.
PANDAS = ",img_id,img_filename,y,split,place,place_filename\r\n"
PANDAS += "0,1,001.Crow/a.png,0.0,0.0,1.0,/o/ocean/1.jpg\r\n"
PANDAS += '1,2,"002.Duck, wild/b\u2028.png",1.0,0.0,0.0,/b/bamboo/2.jpg\r\n'
NAMES, Y, PLACE = ["001.Crow/a.png", "002.Duck, wild/b\u2028.png"], [0, 1], [1, 0]


def metadata(root: Path, text: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.csv").write_bytes(text.encode())
    return root


def test_metadata_as_pandas_writes_it(tmp_path):
    data = Waterbirds(metadata(tmp_path, PANDAS), "train", colour)
    assert (data.files, data.y.tolist(), data.place.tolist()) == (NAMES, Y, PLACE)


def test_names_as_windows_writes_them(tmp_path):
    data = Waterbirds(metadata(tmp_path, PANDAS.replace("/a.png", "\\a.png")), "train", colour)
    assert data.files == NAMES
    paint(tmp_path / "001.Crow\\a.png")  # elsewhere a name can hold one
    data = Waterbirds(metadata(tmp_path, PANDAS.replace("/a.png", "\\a.png")), "train", colour)
    assert data.files[0] == "001.Crow\\a.png"


def test_images_that_are_links_out_of_the_folder(tmp_path):
    """A hub's cache: snapshots/REVISION/NAME is a link to blobs/HASH. DVC and git-annex do likewise."""
    root = metadata(tmp_path / "snapshots" / "main", PANDAS)
    for name, shade in zip(NAMES, (CROW, DUCK), strict=True):
        paint(tmp_path / "blobs" / f"{shade}.png", shade)
        link(root / name, Path("../../../blobs") / f"{shade}.png")
    data = Waterbirds(root, "train", colour)
    assert [data[i][0] for i in range(2)] == [CROW, DUCK]


@pytest.mark.parametrize(
    "name", ["../secret.png", "001.Crow/../../secret.png", "ROOT/../secret.png", "..\\secret.png"]
)
def test_a_name_does_not_lead_out_of_the_folder(tmp_path, name):
    paint(tmp_path / "secret.png")
    root = tmp_path / "data"
    metadata(root, PANDAS.replace("001.Crow/a.png", name.replace("ROOT", str(root))))
    with pytest.raises(
        InputError, match=r"metadata.csv, line 2: img_filename .*secret.png lies outside .*data"
    ):
        Waterbirds(root, "val", colour)


def test_a_name_from_the_root_may_lie_in_the_folder(tmp_path):
    paint(tmp_path / "001.Crow" / "a.png", CROW)
    data = Waterbirds(
        metadata(tmp_path, PANDAS.replace("001.Crow/a.png", f"{tmp_path}/001.Crow/x/../a.png")),
        "train",
        colour,
    )
    assert data.files == NAMES
    assert data[0][0] == CROW


# Turned and damaged by cameras and programs.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_comes_upright_as_pillow_turns_it(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert np.array_equal(read_picture(tmp_path / "a.png"), expected)
    assert (expected.size == (6, 4)) == (orientation < 5)


def png_with_exif_of_imagemagick(path: Path, image: Image.Image) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n      10\n4578696600000000\n")
    image.save(path, "PNG", pnginfo=text)


@pytest.mark.parametrize(
    "write",
    [
        png_with_exif_of_imagemagick,
        lambda path, image: image.save(path, "WEBP", lossless=True, exif=b"Exif\0\0nonsense"),
        lambda path, image: image.save(path, "PNG", exif=b"Exif\0\0nonsense"),
    ],
)
def test_pixels_are_read_whatever_the_exif_holds(tmp_path, write):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    write(tmp_path / "a.png", Image.fromarray(pixels))
    with Image.open(tmp_path / "a.png") as image, pytest.raises((ValueError, SyntaxError)):
        ImageOps.exif_transpose(image)  # what reading it upright would end in
    assert np.array_equal(read_picture(tmp_path / "a.png"), pixels)


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


@pytest.fixture
def wordnet(tmp_path, pictures) -> Path:
    """Two of ImageNet's thousand folders."""
    for name, kind in (("n01440764", "duck"), ("n01443537", "crow")):
        link(tmp_path / "imagenet" / name, pictures / kind)
    return tmp_path / "imagenet"


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        ["textspan"],
        ["check"],
        ["retrieval", "--head", "3.4", "--text", "a duck"],
        ["debias", "--classes", "duck", "crow", "--heads", "3.1", "--draws", "2"],
    ],
)
def test_some_of_the_wordnet_ids_are_images_where_no_label_is_needed(tmp_path, wordnet, argv):
    code, results = run(tmp_path, "--task", *argv, "--data", str(wordnet))
    assert code == 0
    assert results["settings"]["images"] == f"{wordnet}, 16 of 16 images"
    assert results["settings"].get("labels", "none given") == "none given"


def test_some_of_the_wordnet_ids_are_no_classes_of_their_own(tmp_path, capsys, wordnet):
    argv = ["--task", "debias", "--data", str(wordnet)]
    refused(tmp_path, capsys, argv, "needs --classes", "2 of them WordNet ids", "1,000")


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
