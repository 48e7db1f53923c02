"""Photographs with words on them: data sets of typographic attacks, and words drawn on any images.

An attacked image bears the name of another class. `seen` and `written` [n] say which class an image shows,
and which is written on it; the classes are the union of both, so that either can win. Some data sets have
further variants of each image, without a word for example.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

from data import ImageFolder, inside, subset
from files import InputError, read_lines
from pictures import file_sizes, images_below, read

# What a picture can bear; "synthetic": the attacked word again, set by a computer.
VARIANTS = ("clean", "attacked", "own", "blank", "synthetic")
SAYS = ("the word {}", "a sign saying {}", "a label saying {}", "a picture of the word {}")  # it is written


class WrittenImages(Dataset):
    """What all such data sets share: (the attacked image, index), and `load` for the other variants."""

    classes: Sequence[str]
    seen: Tensor  # [n]
    written: Tensor  # [n]
    variants: Sequence[str]
    boxes: Tensor | None = None  # [n, 4] where the word is, if known: top, left, bottom, right, from 0 to 1
    description: str

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        return self.load(index, "attacked"), index

    def load(self, index: int, variant: str) -> Tensor | str:
        """The transformed image, or in a line why it cannot be read."""
        raise NotImplementedError

    def caption(self, index: int) -> str:
        return f"{self.classes[self.seen[index]]}, written: {self.classes[self.written[index]]}"

    def fingerprint(self) -> list:
        return [list(self.classes), self.seen.tolist(), self.written.tolist()]


class Variants(Dataset):
    """Every image in all its variants: ([v, 3, rows, columns], index)."""

    def __init__(self, data: WrittenImages) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        shown = [self.data.load(index, variant) for variant in self.data.variants]
        broken = next((image for image in shown if isinstance(image, str)), None)
        return (torch.stack(shown) if broken is None else broken), index

    def fingerprint(self) -> list:
        return [self.data.fingerprint(), list(self.data.variants)]


class AttackedPhotos(WrittenImages):
    """Photographs that somebody put words on.

    Args:
        root: the folder; its description says what it holds.
        rows: of each photograph, what is seen, what is written, and {variant: path from root}.
    """

    def __init__(
        self,
        root: Path,
        rows: list[tuple[str, str, dict[str, str]]],
        transform: Callable,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        for seen, word, files in rows:
            if seen == word:
                raise InputError(
                    f"{root / files['attacked']} shows {seen!r} and bears the same word: no attack"
                )
        rows, total = [rows[i] for i in subset(len(rows), limit, seed)], len(rows)
        self.root, self.transform = root, transform
        self.files = [files for _, _, files in rows]
        self.variants = [name for name in VARIANTS if all(name in files for files in self.files)]
        self.classes = sorted({name for seen, word, _ in rows for name in (seen, word)})
        number = {name: i for i, name in enumerate(self.classes)}
        self.seen, self.written = (torch.tensor([number[row[i]] for row in rows]) for i in (0, 1))
        self.description = f"{root}, {len(rows):,} of {total:,} photographs, {len(self.classes)} classes"

    def load(self, index: int, variant: str) -> Tensor | str:
        return read(self.root / self.files[index][variant], self.transform)

    def fingerprint(self) -> list:
        sizes = file_sizes(self.root, [files["attacked"] for files in self.files])
        return [*super().fingerprint(), self.files, sizes]


class DrawnWords(WrittenImages):
    """Any folder of images, one folder for each class, with the name of another class drawn on each image.

    As in ImageNet-100-Typo: after the image is resized and cropped, anywhere, 20 to 40 pixels high if the
    image has 224 (less high where the word would not fit), in one of eight colours, outlined in another.
    """

    variants = ("clean", "attacked", "own")
    colours = ("black", "white", "red", "lime", "blue", "yellow", "cyan", "magenta")

    def __init__(self, folder: ImageFolder, size: int, seed: int = 0) -> None:
        self.folder, self.size, self.seed = folder, size, seed
        self.classes, self.seen = folder.classes, folder.y
        if self.seen is None or len(self.classes) < 2:
            expected = (
                "folders of images named by their class, two at least; or label=..._text=... in the names"
            )
            raise InputError(f"{folder.root} names no classes to write on its images: expected {expected}")
        rng = np.random.default_rng([seed, 0])
        other = torch.from_numpy(rng.integers(1, len(self.classes), len(self.seen)))
        self.written = (self.seen + other) % len(self.classes)
        _check_glyphs(self.classes)
        places = [self._place(i, self.classes[word]) for i, word in enumerate(self.written.tolist())]
        self.boxes = torch.tensor([box for box, _, _ in places]) / size
        self.description = f"{folder.description}, with words drawn on them"

    def load(self, index: int, variant: str) -> Tensor | str:
        word = {"attacked": self.written[index], "own": self.seen[index]}.get(variant)
        path = self.folder.root / self.folder.files[index]
        return read(path, partial(self._draw, index, None if word is None else self.classes[word]))

    def _draw(self, index: int, word: str | None, image: Image.Image) -> Tensor:
        image = TF.resize(image, self.size, TF.InterpolationMode.BICUBIC)
        image = TF.center_crop(image, self.size)
        if word is not None:
            (top, left, _, _), font, (fill, outline) = self._place(index, word)
            x, y, _, _ = font.getbbox(word, stroke_width=1)
            style = {"fill": fill, "stroke_fill": outline, "stroke_width": 1}
            ImageDraw.Draw(image).text((left - x, top - y), word, font=font, **style)
        return self.folder.transform(image)

    def _place(self, index: int, word: str) -> tuple[tuple[int, ...], ImageFont.FreeTypeFont, list[str]]:
        """(top, left, bottom, right) in pixels, the font and the two colours of a word on an image."""
        rng = np.random.default_rng([self.seed, 1, index])
        height, at, colours = rng.uniform(20, 40), rng.random(2), rng.choice(self.colours, 2, replace=False)
        for share in np.linspace(1, 20 / height, 6):  # as high as was drawn, or as fits
            font = ImageFont.load_default(max(6, share * height * self.size / 224))
            x, y, right, bottom = font.getbbox(word, stroke_width=1)
            rows, columns = int(bottom - y), int(right - x)
            if max(rows, columns) <= self.size:
                top, left = (int(start) for start in at * (self.size - rows + 1, self.size - columns + 1))
                return (top, left, top + rows, left + columns), font, list(colours)
        raise InputError(
            f"the word {word!r} is wider than an image of {self.size} pixels: give a shorter class name"
        )


def _check_glyphs(names: Sequence[str]) -> None:
    """Refuse names with letters that Pillow's own font lacks: it would draw a box for each."""
    font = ImageFont.load_default(30)
    lacking = bytes(font.getmask("\uffff"))
    for name in names:
        unknown = [letter for letter in name if bytes(font.getmask(letter)) == lacking]
        if unknown:
            raise InputError(
                f"Pillow's font has no {unknown[0]!r} to draw the class name {name!r}; rename its folder"
            )


def open_written(
    path: str | Path, split: str, transform: Callable, size: int, limit: int | None = None, seed: int = 0
) -> WrittenImages:
    """The data set in a folder: RTA-100, PAINT, Disentangling, SCAM; any other folder has words drawn on.

    Args:
        path: RTA-100 (Azuma, Matsui 2023) and PAINT (Ilharco et al. 2022) are flat folders of
            label=dog_text=cat.png; Disentangling (Materzynska et al. 2022) holds annotations.json; SCAM
            (Westerhoff et al. 2025) metadata.csv or metadata.jsonl with object_label and attack_word.
        split: "train", "val" or "test", of the folders of images that words are drawn on.
        size: side of the images in pixels that the model takes.

    Raises:
        InputError: no such folder; names without the pattern; annotations of images that are not there, or
            without words; a word that equals the class, or is wider than the picture.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"no folder {root}: --data must be a data set of typographic attacks, or of images")
    annotations = next((root / name for name in ANNOTATIONS if (root / name).is_file()), None)
    tables = [root / name for name in ("metadata.csv", "metadata.jsonl") if (root / name).is_file()]
    if annotations is not None:
        return AttackedPhotos(root, _disentangling(annotations), transform, limit, seed)
    if tables:
        return AttackedPhotos(root, _scam(tables[0]), transform, limit, seed)
    rows = _named(root)
    if rows:
        return AttackedPhotos(root, rows, transform, limit, seed)
    return DrawnWords(ImageFolder(root, split, transform, limit, seed), size, seed)


ANNOTATIONS = ("annotations.json", "annotation.json")
PATTERN = re.compile(r"label=(.+)_text=(.+)\.\w+")
Rows = list[tuple[str, str, dict[str, str]]]  # what is seen, what is written, {variant: file}


def _named(root: Path) -> Rows:
    """Of a flat folder of label=dog_text=cat.png; none if no name begins so."""
    files = [str(file) for file in images_below(root)[0]]
    found = {file: PATTERN.fullmatch(Path(file).name) for file in files}
    if not any(found.values()):
        return []
    odd = next((file for file, match in found.items() if match is None), None)
    if odd is not None:
        raise InputError(f"{root / odd} is not named like the others there: expected label=dog_text=cat.png")
    return [(_name(match[1]), _name(match[2]), {"attacked": file}) for file, match in found.items()]


def _disentangling(path: Path) -> Rows:
    """Of {"IMG_2934.JPG": {"true object": ..., "typographic attack label": ...}}; files beside it or in
    images/.
    """
    keys = ("true object", "typographic attack label")
    try:
        entries = json.loads("\n".join(read_lines(path, f"cannot read {path}")))
        listed = [(file, *(_name(entry[key]) for key in keys)) for file, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        expected = f'{{"NAME.JPG": {{"{keys[0]}": ..., "{keys[1]}": ...}}, ...}}'
        raise InputError(f"{path}: expected {expected}; found something else ({error})") from error
    folder = "images/" if (path.parent / "images").is_dir() else ""
    rows = [(seen, word, {"attacked": folder + file}) for file, seen, word in listed if word]
    return _there(path, rows)


def _scam(path: Path) -> Rows:
    """Of a table with a row for each photograph and variant, as Hugging Face's image folders have it."""
    lines = read_lines(path, f"cannot read {path}")
    try:
        if path.suffix == ".csv":
            table = list(csv.DictReader(lines))
        else:
            table = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise InputError(f"{path}: expected one JSON object per line ({error})") from error
    names = {"SCAM": "attacked", "NoSCAM": "clean", "SynthSCAM": "synthetic"}
    found: dict[str, tuple[str, str, dict[str, str]]] = {}
    for line, row in enumerate(table, start=1):
        row = {"image": row.get("file_name")} | row
        missing = next((key for key in SCAM_COLUMNS if not row.get(key)), None)
        if missing is not None or row["type"] not in names:
            expected = f"columns {', '.join(SCAM_COLUMNS)}, and type one of {', '.join(names)}"
            raise InputError(f"{path}, row {line}: expected {expected}; found {dict(row)}")
        key = str(row["id"])
        _, _, files = found.setdefault(key, (_name(row["object_label"]), _name(row["attack_word"]), {}))
        files[names[row["type"]]] = row["image"]
    rows = [row for row in found.values() if "attacked" in row[2]]
    return _there(path, rows)


SCAM_COLUMNS = ("id", "image", "object_label", "attack_word", "type")


def _there(path: Path, rows: Rows) -> Rows:
    """The rows, once there are some and their images exist."""
    if not rows:
        raise InputError(f"{path} lists no image with a word on it")
    files = [inside(path.parent, file, f"{path}: image") for *_, files in rows for file in files.values()]
    gone = [file for file in files if not (path.parent / file).is_file()]
    if gone:
        raise InputError(
            f"{path} lists {len(gone):,} of {len(files):,} images that are not there, first {gone[0]}"
        )
    return rows


def _name(text: str) -> str:
    """A class's name as it is written in a sentence."""
    return " ".join(text.replace("_", " ").split())
