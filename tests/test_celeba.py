"""CelebA as published and as on Kaggle: small files of its formats, read by torchvision's reader, too."""

import csv

import pytest
import torch
from PIL import Image
from runs import run
from torchvision.datasets import CelebA as Torchvision

from data import CelebA
from files import InputError

NAMES = ["5_o_Clock_Shadow", "Arched_Eyebrows", "Blond_Hair", "Eyeglasses", "Male", "Smiling", "Young"]
PER_GROUP = 3  # images of each group in each split


def faces():
    """[(image, attributes, split)]: every group in every split, the other attributes at random."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for split in range(3):
        for blond, male in [(blond, male) for blond in (-1, 1) for male in (-1, 1)] * PER_GROUP:
            values = (2 * torch.randint(2, (len(NAMES),), generator=draw) - 1).tolist()
            values[NAMES.index("Blond_Hair")], values[NAMES.index("Male")] = blond, male
            rows.append((f"{len(rows) + 1:06d}.jpg", values, split))
    return rows


def published(root, images="img_align_celeba"):
    """The .txt files: the count, the names, rows of aligned numbers; the partition without a header."""
    rows = faces()
    (root / images).mkdir(parents=True)
    for name, values, _ in rows:
        shade = 40 + 10 * values[2] + 5 * values[4]
        Image.new("RGB", (178, 218), (shade, 90, 200)).save(root / images / name)
    lines = [str(len(rows)), " ".join(NAMES) + " "]
    lines += [f"{name} {' '.join(f'{value:2d}' for value in values)}" for name, values, _ in rows]
    (root / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    lines = [f"{name} {split}" for name, _, split in rows]
    (root / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return root


def kaggle(root):
    """The .csv files, with headers, and the images one folder deeper."""
    published(root, "img_align_celeba/img_align_celeba")
    headers = {"list_attr_celeba": ["image_id", *NAMES], "list_eval_partition": ["image_id", "partition"]}
    for name, header in headers.items():
        path = root / f"{name}.txt"
        rows = [line.split() for line in path.read_text().splitlines()][2 if "attr" in name else 0 :]
        with (root / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        path.unlink()
    return root


class Reader(Torchvision):
    """torchvision's, without its check of the real files' sums."""

    def _check_integrity(self):
        return True


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_images_and_labels_are_those_of_torchvisions_reader(tmp_path, split):
    root = published(tmp_path / "celeba")
    rows = faces()
    (root / "identity_CelebA.txt").write_text("".join(f"{name} 7\n" for name, _, _ in rows))
    for name, columns in (
        ("list_bbox_celeba", "x_1 y_1 width height"),
        ("list_landmarks_align_celeba", "a b"),
    ):
        body = "".join(f"{row[0]} {' '.join('1' for _ in columns.split())}\n" for row in rows)
        (root / f"{name}.txt").write_text(f"{len(rows)}\n{columns}\n{body}")
    theirs = Reader(tmp_path, {"val": "valid"}.get(split, split), "attr")
    ours = CelebA(tmp_path, split, lambda image: image)  # as torchvision has it, in a folder celeba
    assert [file.split("/")[-1] for file in ours.files] == theirs.filename
    for i in range(len(ours)):
        picture, attributes = theirs[i]
        assert ours[i][0].tobytes() == picture.tobytes()
        assert int(ours.y[i]) == int(attributes[NAMES.index("Blond_Hair")])
        assert int(ours.place[i]) == int(attributes[NAMES.index("Male")])
    assert len(ours) == 4 * PER_GROUP
    assert not torch.equal(ours.y, ours.place)


def test_kaggles_files_hold_the_same(tmp_path):
    a, b = (
        CelebA(make(tmp_path / make.__name__), "val", lambda image: image) for make in (published, kaggle)
    )
    assert [file.split("/")[-1] for file in a.files] == [file.split("/")[-1] for file in b.files]
    assert torch.equal(a.y, b.y)
    assert torch.equal(a.place, b.place)
    assert a[5][0].tobytes() == b[5][0].tobytes()
    assert a.caption(1) == "img_align_celeba/000014.jpg: dark/man"


def edit(file, old, new):
    def change(root):
        path = root / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
BROKEN = {
    "no partition": (lambda root: (root / PARTITION).unlink(), "no list_eval_partition.txt"),
    "no column": (edit(ATTRIBUTES, "Blond_Hair", "Fair_Hair"), "has no column 'Blond_Hair'; found image_id"),
    "a value": (
        lambda root: (root / ATTRIBUTES).write_text("1\nBlond_Hair Male\n000001.jpg 0 1\n"),
        r"list_attr_celeba.txt, line 3: Blond_Hair must be -1 or 1, found '0'",
    ),
    "a short line": (edit(ATTRIBUTES, "000002.jpg", ""), "line 4: expected 8 columns, found 7"),
    "a long line": (edit(PARTITION, "000003.jpg 0", "000003.jpg 0 0"), "line 3: expected 2 columns, found 3"),
    "a split": (edit(PARTITION, "000003.jpg 0", "000003.jpg 5"), "line 3: partition must be 0 or 1 or 2"),
    "an image without a split": (
        edit(PARTITION, "000003.jpg 0\n", ""),
        "list_eval_partition .*lacks 000003.jpg",
    ),
    "an image without attributes": (
        edit(PARTITION, "000003.jpg 0\n", "000003.jpg 0\n9.jpg 0\n"),
        "list_attr_celeba .*lacks 9.jpg",
    ),
    "an empty file": (lambda root: (root / ATTRIBUTES).write_text(""), "has no column 'Blond_Hair'"),
    "a count alone": (lambda root: (root / ATTRIBUTES).write_text("36"), "has no column 'Blond_Hair'"),
    "a file cut short": (edit(ATTRIBUTES, "36\n", "37\n"), "says that it lists 37 images, and lists 36"),
    "a name that leads out": (
        lambda root: [edit(file, "000001.jpg", "../../x.jpg")(root) for file in (ATTRIBUTES, PARTITION)],
        "lies outside",
    ),
    "no images of the split": (
        lambda root: (root / PARTITION).write_text("".join(f"{name} 1\n" for name, _, _ in faces())),
        r"puts no image into split 0 \(train\)",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_is_said_in_one_line(tmp_path, what):
    damage, said = BROKEN[what]
    root = published(tmp_path / "faces")
    CelebA(root, "train", lambda image: image)
    damage(root)
    with pytest.raises(InputError, match=said):
        CelebA(root, "train", lambda image: image)


def test_a_missing_image_is_named(tmp_path, refused, monkeypatch):
    root = published(tmp_path / "faces")
    monkeypatch.setattr(CelebA, "classes", ("crow", "gull"))  # the demo's words
    (root / "img_align_celeba" / "000025.jpg").unlink()  # the first of the test split
    argv = ["--task waterbirds --workers 0 --remove embedding --cue", "on land", "on water", "--data", root]
    refused(argv, "000025.jpg")


def test_the_table_is_by_hair_and_gender(tmp_path, monkeypatch):
    """With a cue in the demo's words, which knows neither hair nor persons."""
    root = published(tmp_path / "faces")
    monkeypatch.setattr(CelebA, "classes", ("sparrow", "gull"))
    monkeypatch.setattr(CelebA, "cue", ("a bird on land", "a bird on water"))
    monkeypatch.setattr(CelebA, "place_texts", CelebA.cue)
    ran = run(tmp_path, "--task waterbirds --workers 0 --draws 2 --heads 3.4 --data", root)
    assert list(ran.results["rows"]["base"]["groups"]) == [
        "dark/woman",
        "dark/man",
        "blond/woman",
        "blond/man",
    ]
    assert ran.results["trained"] == [PER_GROUP] * 4
    assert "'a bird on land' and 1 more" in ran.results["settings"]["cue"]
    assert "Groups are hair/gender" in ran.out
    assert "TIE (looks at labels)" in ran.results["rows"]
    few = run(tmp_path, "--task waterbirds --workers 0 --draws 2 --heads 3.4 --limit 11 --data", root)
    assert few.results["trained"] == [PER_GROUP] * 4  # of the whole split


def test_debias_takes_the_folder_with_its_labels(tmp_path, monkeypatch):
    root = published(tmp_path / "faces")
    monkeypatch.setattr(CelebA, "cue", ("a bird on land", "a bird on water"))
    argv = "--task debias --workers 0 --draws 2 --heads 3.4 --classes"
    ran = run(tmp_path, argv, "a crow", "a gull", "--data", root)
    assert ran.code == 0
    assert "CelebA" in ran.results["settings"]["images"]
