"""written.py: data sets of typographic attacks as their authors publish them, and words drawn on images."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from files import InputError
from written import DrawnWords, Variants, open_written


def transform(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def save(path, colour="green", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def opened(folder, **options):
    return open_written(folder, "test", transform, size=224, **options)


NAMES = ("label=dog_text=cat.png", "label=alarm clock_text=ice_cream.png", "label=cat_text=alarm clock.jpg")


def named(folder):
    """RTA-100 and PAINT: the labels stand in the files' names."""
    for name in NAMES:
        save(folder / name)
    return folder


def annotated(folder, images="", file="annotations.json"):
    """Disentangling: a file of annotations beside the photographs, or beside images/."""
    entries = {
        "IMG_2934.JPG": {"true object": "cup", "typographic attack label": "pizza"},
        "IMG_2935.JPG": {"true object": "plate", "typographic attack label": ""},
        "IMG_2936.JPG": {"true object": "cup", "typographic attack label": "ipad"},
    }
    for name in entries:
        save(folder / images / name)
    (folder / file).write_text(json.dumps(entries))
    return folder


def tabled(folder, suffix):
    """SCAM as an image folder of Hugging Face: one row for each photograph and kind."""
    rows = []
    for number, (label, word) in enumerate((("mug", "taxi"), ("book", "mug"))):
        for kind, colour in (("NoSCAM", "white"), ("SCAM", "red"), ("SynthSCAM", "blue")):
            name = f"{kind}_{number}.png"
            save(folder / name, colour)
            columns = {"object_label": label, "attack_word": word, "type": kind, "postit_area_pct": 4.2}
            rows.append({"file_name": name, "id": f"{number:04}"} | columns)
    with (folder / f"metadata.{suffix}").open("w", newline="") as file:
        if suffix == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def pairs(data):
    return {(data.classes[i], data.classes[j]) for i, j in zip(data.seen, data.written, strict=True)}


def test_labels_in_names_are_those_of_the_files(tmp_path):
    data = opened(named(tmp_path))
    assert data.classes == ["alarm clock", "cat", "dog", "ice cream"]  # the union of objects and words
    assert pairs(data) == {("dog", "cat"), ("alarm clock", "ice cream"), ("cat", "alarm clock")}
    assert data.variants == ["attacked"]
    image, index = data[0]
    assert (image.shape, index) == ((3, 30, 40), 0)


@pytest.mark.parametrize("images", ["", "images"])
@pytest.mark.parametrize("file", ["annotations.json", "annotation.json"])
def test_disentanglings_annotations_are_read_in_both_layouts(tmp_path, images, file):
    data = opened(annotated(tmp_path, images, file))
    assert pairs(data) == {("cup", "pizza"), ("cup", "ipad")}  # the photograph without a word is not attacked
    assert isinstance(data[1][0], torch.Tensor)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_scams_three_kinds_are_variants_of_one_photograph(tmp_path, suffix):
    data = opened(tabled(tmp_path, suffix))
    assert pairs(data) == {("mug", "taxi"), ("book", "mug")}
    assert data.variants == ["clean", "attacked", "synthetic"]
    images, index = Variants(data)[1]
    assert images[:, :, 0, 0].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 1]]
    assert index == 1


def folders(folder, names=("great grey owl", "tench"), count=3, size=(300, 260)):
    for name in names:
        for i in range(count):
            save(folder / name / f"{i}.jpg", "gray", size)
    return folder


def drawn(data, index, variant):
    """The box around the pixels that the drawing changed: top, left, bottom, right, from 0 to 1."""
    changed = (data.load(index, variant) - data.load(index, "clean")).abs().amax(dim=0) > 0.02
    rows, columns = changed.any(dim=1).nonzero()[:, 0], changed.any(dim=0).nonzero()[:, 0]
    return torch.tensor([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / changed.shape[0]


def test_words_are_drawn_inside_their_boxes_and_name_another_class(tmp_path):
    data = opened(folders(tmp_path))
    assert isinstance(data, DrawnWords)
    assert (data.seen != data.written).all()
    assert data[0][0].shape == (3, 224, 224)
    for index in range(len(data)):
        box = drawn(data, index, "attacked")
        assert (box[:2] >= data.boxes[index, :2] - 1e-6).all()
        assert (box[2:] <= data.boxes[index, 2:] + 1e-6).all()
        assert (box - data.boxes[index]).abs().max() < 0.05  # and fill them
    assert not torch.equal(data.load(0, "attacked"), data.load(0, "own"))
    assert len({tuple(box.tolist()) for box in data.boxes}) > 1


def test_words_are_as_high_as_the_published_ones_and_outlined_in_a_second_colour(tmp_path):
    data = opened(folders(tmp_path, ("tench", "magpie"), count=20))
    heights = 224 * (data.boxes[:, 2] - data.boxes[:, 0])
    assert heights.max() <= 44  # a font of 40 pixels with an outline
    assert heights.min() >= 15  # one of 20 pixels, without the room above and below its letters
    assert heights.max() - heights.min() > 8
    image, _ = data[0]
    top, left, bottom, right = (224 * data.boxes[0]).round().int().tolist()
    counts = torch.unique(
        (4 * image[:, top:bottom, left:right]).round().flatten(1).T, dim=0, return_counts=True
    )[1]
    assert (counts > 30).sum() >= 3  # the background, and two colours


def test_the_same_seed_draws_the_same_in_any_process(tmp_path):
    folder = folders(tmp_path)
    data = opened(folder)
    alone = torch.stack([data[i][0] for i in range(len(data))])
    for workers in (0, 2):
        read = torch.cat([images for images, _ in DataLoader(opened(folder), 2, num_workers=workers)])
        assert torch.equal(read, alone)
    assert not torch.equal(opened(folder, seed=1)[0][0], alone[0])


def test_long_words_are_drawn_smaller_and_longer_ones_refused(tmp_path):
    data = opened(folders(tmp_path / "fits", ("a", "a rather long name here")))
    assert (data.boxes <= 1).all()
    with pytest.raises(InputError, match="wider than an image of 224 pixels"):
        opened(folders(tmp_path / "wide", ("a", "so long a name that it does not fit on any picture")))


def test_a_limit_keeps_rows_and_says_of_how_many(tmp_path):
    data = opened(named(tmp_path / "c"), limit=2)
    assert len(data) == 2
    assert "2 of 3 photographs" in data.description
    for source in (tmp_path / "c", annotated(tmp_path / "a"), tabled(tmp_path / "b", "csv")):
        kept = [opened(source, limit=1, seed=seed).files[0] for seed in range(8)]
        assert len({str(files) for files in kept}) > 1
        assert [opened(source, limit=1, seed=seed).files[0] for seed in range(8)] == kept


def broken_names(folder):
    save(named(folder) / "dog.png")


def same_word(folder):
    save(named(folder) / "label=dog_text=dog.png")


def missing_image(folder):
    (annotated(folder) / "IMG_2936.JPG").unlink()


def not_json(folder):
    (annotated(folder) / "annotations.json").write_text("[1, 2")


def no_text(folder):
    (annotated(folder) / "annotations.json").write_bytes(b"\xff\xfe\x00")


def other_keys(folder):
    (annotated(folder) / "annotations.json").write_text(json.dumps({"a.jpg": {"label": "cup"}}))


def list_of_rows(folder):
    (annotated(folder) / "annotations.json").write_text(json.dumps([{"true object": "cup"}]))


def nothing_attacked(folder):
    entry = {"true object": "cup", "typographic attack label": ""}
    (annotated(folder) / "annotations.json").write_text(json.dumps({"IMG_2934.JPG": entry}))


def no_column(folder):
    path = tabled(folder, "csv") / "metadata.csv"
    path.write_text(path.read_text().replace("attack_word", "word"))


def other_type(folder):
    path = tabled(folder, "jsonl") / "metadata.jsonl"
    path.write_text(path.read_text().replace("NoSCAM", "Clean"))


def half_a_line(folder):
    path = tabled(folder, "jsonl") / "metadata.jsonl"
    path.write_text(path.read_text()[:-9])


def one_class(folder):
    folders(folder, ("tench",))


def no_folders(folder):
    save(folder / "a.png")


def foreign(folder):
    folders(folder, ("tench", "鳥"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_names, r"dog.png is not named like the others.*label=dog_text=cat"),
        (same_word, r"shows 'dog' and bears the same word"),
        (missing_image, r"1 of 2 images that are not there, first IMG_2936.JPG"),
        (no_text, r"annotations.json: .*decode"),
        (not_json, r"expected \{\"NAME.JPG\""),
        (other_keys, r"expected \{\"NAME.JPG\".*'true object'"),
        (list_of_rows, r"expected \{\"NAME.JPG\""),
        (nothing_attacked, r"lists no image with a word on it"),
        (no_column, r"row 1: expected columns id, image, object_label, attack_word, type"),
        (other_type, r"type one of SCAM, NoSCAM, SynthSCAM"),
        (half_a_line, r"expected one JSON object per line"),
        (one_class, r"names no classes to write.*two at least"),
        (no_folders, r"names no classes to write"),
        (foreign, r"no '鳥' to draw the class name"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(tmp_path, spoil, message):
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        opened(tmp_path)


def test_a_listed_photograph_lies_in_the_folder(tmp_path):
    annotated(tmp_path / "inner")
    save(tmp_path / "IMG_2934.JPG")
    assert len(opened(tmp_path / "inner")) == 2
    path = tmp_path / "inner" / "annotations.json"
    path.write_text(path.read_text().replace("IMG_2934", "../IMG_2934"))
    with pytest.raises(InputError, match=r"IMG_2934.JPG lies outside"):
        opened(tmp_path / "inner")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        opened(tmp_path / "nowhere")


def test_photographs_are_upright_and_in_colour_as_everywhere(tmp_path):
    """A camera's rotation is undone, and what is transparent is white."""
    camera, clear = Image.new("RGB", (40, 30), "red"), Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    exif = camera.getexif()
    exif[ExifTags.Base.Orientation] = 6
    camera.save(tmp_path / "label=dog_text=cat.jpg", exif=exif)
    clear.save(tmp_path / "label=cat_text=dog.png")
    data = opened(tmp_path)
    images = {data.classes[data.seen[i]]: data[i][0] for i in range(2)}
    assert images["dog"].shape == (3, 40, 30)
    assert (images["cat"] == 1).all()


def test_a_photograph_that_cannot_be_read_is_a_line_for_whoever_loads_it(tmp_path):
    (named(tmp_path) / NAMES[0]).write_bytes(b"no image")
    found = [opened(tmp_path)[i][0] for i in range(3)]
    assert sum(isinstance(image, str) for image in found) == 1
    assert "not an image" in next(image for image in found if isinstance(image, str))
