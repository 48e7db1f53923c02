"""Images with labels: Waterbirds, CelebA, and any folder of images.

Every data set yields (image tensor, index). Labels are attributes, in the order of the indices: y (the class
to tell apart) and, where it is known, place (the cue that goes along with it), both [n]. `fingerprint()` is
what tells one data set from another, for --resume. In place of an image that cannot be read they yield a line
that says why.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from files import InputError, read_lines
from pictures import entries, file_sizes, images_below, read, read_picture, some

SPLITS = ("train", "val", "test")


class ImageFiles(Dataset):
    """Image files of a folder: what Waterbirds and ImageFolder share."""

    root: Path
    transform: Callable
    files: Sequence[str | Path]  # relative to `root`
    y: Tensor | None = None  # [n] labels, where they are known
    place: Tensor | None = None  # [n] likewise
    unlabelled: str = ""  # why folders give no labels, where they look as if they did

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        return read(self.root / self.files[index], self.transform), index

    def picture(self, index: int) -> Image.Image:
        """The image before the transform."""
        return read_picture(self.root / self.files[index])

    def caption(self, index: int) -> str:
        """What to write under an image."""
        return str(self.files[index])

    def fingerprint(self) -> list:
        """What tells this data set from another: file names, sizes of the files, labels."""
        labels = [None if values is None else values.tolist() for values in (self.y, self.place)]
        return [[*map(str, self.files)], file_sizes(self.root, self.files), labels]


class Waterbirds(ImageFiles):
    """One split of Sagawa et al. 2020: photos of landbirds and waterbirds, pasted onto land and water.

    Args:
        root: the folder with metadata.csv (columns img_filename, y, split, place) and the images it names, or
            links to them.
        split: "train", "val" or "test" (0, 1, 2 in the file).
        transform: from a PIL image to a tensor.
        limit: keep this many images, drawn with `seed`; None: all.

    Raises:
        InputError: no such folder or file, a missing column, a value out of range, a name that leads out of
            the folder, an empty split.
    """

    classes = ("landbird", "waterbird")
    places = ("land", "water")
    groups, named = ("land/land", "land/water", "water/land", "water/water"), "bird/place"
    place_texts = ("a photo with a land background", "a photo with a water background")

    def __init__(
        self, root: str | Path, split: str, transform: Callable, limit: int | None = None, seed: int = 0
    ) -> None:
        self.root = Path(root)
        self.transform = transform
        number = SPLITS.index(split)
        rows = [row for row in self._metadata() if row["split"] == number]
        if not rows:
            raise InputError(f"{self.root / 'metadata.csv'} has no row with split {number} ({split})")
        rows = [rows[i] for i in subset(len(rows), limit, seed)]
        self.files = [row["img_filename"] for row in rows]
        self.y, self.place = (torch.tensor([row[name] for row in rows]) for name in ("y", "place"))
        self.description = f"Waterbirds in {self.root}, {split} split, {len(rows):,} images"

    def _metadata(self) -> list[dict]:
        path = self.root / "metadata.csv"
        if not path.is_file():
            expected = "the folder of waterbird_complete95_forest2water2, with metadata.csv in it"
            expected += " (or CelebA's, with list_attr_celeba.txt)"
            other = f"; --task debias takes {self.root} as it is" if self.root.is_dir() else ""
            raise InputError(f"no {path}: --data must be {expected}{other}")
        reader = csv.DictReader(read_lines(path, f"cannot read {path}", "; expected UTF-8 text"))
        missing = {"img_filename", "y", "split", "place"} - set(reader.fieldnames or ())
        if missing:
            found = ", ".join(reader.fieldnames or ["nothing"])
            raise InputError(f"{path} has no column {sorted(missing)[0]!r}; found {found}")
        try:
            rows = list(reader)
        except csv.Error as error:
            expected = ", ".join(reader.fieldnames or ())
            raise InputError(f"{path}, line {reader.line_num}: {error}; expected {expected}") from error
        for line, row in enumerate(rows, start=2):
            where = f"{path}, line {line}"
            row["img_filename"] = inside(self.root, row["img_filename"], f"{where}: img_filename")
            for name, allowed in (("y", "01"), ("place", "01"), ("split", "012")):
                found = row[name]
                row[name] = number = (found or "").removesuffix(".0")  # as pandas writes a column with gaps
                if number not in list(allowed):
                    expected = f"{name} must be one of {', '.join(allowed)}"
                    raise InputError(f"{where}: {expected}, found {found!r}")
                row[name] = int(number)
        return rows

    def caption(self, index: int) -> str:
        return f"{self.files[index]}: {self.classes[self.y[index]]} on {self.places[self.place[index]]}"


class CelebA(ImageFiles):
    """One split of Liu et al. 2015: faces with hair that is blond or not; the cue that goes along is gender.

    Args:
        root: the folder with list_attr_celeba.txt, list_eval_partition.txt and img_align_celeba/, or one with
            such a folder celeba/ in it; or Kaggle's, with .csv files and the images one folder deeper.
        split, transform, limit, seed: as for Waterbirds.

    Raises:
        InputError: a missing file or column, a line of another length, a value out of range, an image that
            only one of the files names, a file cut short, an empty split.
    """

    classes = ("person with dark hair", "person with blond hair")
    groups, named = ("dark/woman", "dark/man", "blond/woman", "blond/man"), "hair/gender"
    cue = place_texts = ("a photo of a woman", "a photo of a man")

    def __init__(
        self, root: str | Path, split: str, transform: Callable, limit: int | None = None, seed: int = 0
    ) -> None:
        self.root, self.transform = self.folder(root), transform
        faces = self._rows("list_attr_celeba", {"Blond_Hair": ("-1", "1"), "Male": ("-1", "1")})
        splits = self._rows("list_eval_partition", {"partition": ("0", "1", "2")})
        odd = min(faces.keys() ^ splits.keys(), default=None)
        if odd is not None:
            lacks = "list_eval_partition" if odd in faces else "list_attr_celeba"
            raise InputError(f"{lacks} in {self.root} lacks {odd}: both files must list the same images")
        number = SPLITS.index(split)
        names = [name for name, found in splits.items() if found == [number]]
        if not names:
            raise InputError(
                f"list_eval_partition in {self.root} puts no image into split {number} ({split})"
            )
        names = [names[i] for i in subset(len(names), limit, seed)]
        images = Path("img_align_celeba")
        images = images / images if (self.root / images / images).is_dir() else images
        where = f"list_attr_celeba in {self.root}:"
        self.files = [inside(self.root, str(images / name), where) for name in names]
        self.y, self.place = (
            torch.tensor([faces[name] for name in names]).add(1).floor_divide(2).unbind(dim=1)
        )
        self.description = f"CelebA in {self.root}, {split} split, {len(names):,} images"

    @staticmethod
    def folder(root: str | Path) -> Path | None:
        """Where the attributes are listed: root/celeba or root; None if in neither."""
        folders = (Path(root) / "celeba", Path(root))
        return next((folder for folder in folders if either(folder / "list_attr_celeba")), None)

    def _rows(self, name: str, columns: dict[str, tuple[str, ...]]) -> dict[str, list[int]]:
        """{image: its values in these columns, each one of those allowed} of NAME.txt or NAME.csv."""
        path = either(self.root / name)
        if path is None:
            raise InputError(
                f"no {name}.txt (or .csv) in {self.root}: CelebA needs it beside img_align_celeba/"
            )
        rows = [line.replace(",", " ").split() for line in read_lines(path, f"cannot read {path}")]
        header, first, count = ["image_id", "partition"], 0, None
        if rows[0][:1] == ["image_id"]:  # Kaggle's
            header, first = rows[0], 1
        elif len(rows[0]) == 1 < len(rows):  # the number of images, then the names of the columns
            header, first, count = ["image_id", *rows[1]], 2, rows[0][0]
        missing = next((column for column in columns if column not in header), None)
        if missing is not None:
            raise InputError(f"{path} has no column {missing!r}; found {some(header)}")
        found = {}
        for line, row in enumerate(rows[first:], start=first + 1):
            if row and len(row) != len(header):
                raise InputError(f"{path}, line {line}: expected {len(header)} columns, found {len(row)}")
            values = dict(zip(header, row, strict=False))
            for column, allowed in columns.items() if row else ():
                if values[column] not in allowed:
                    expected = f"{column} must be {' or '.join(allowed)}"
                    raise InputError(f"{path}, line {line}: {expected}, found {values[column]!r}")
                found.setdefault(row[0], []).append(int(values[column]))
        if count not in (None, str(len(found))):
            raise InputError(
                f"{path} says that it lists {count} images, and lists {len(found)}: is it cut short?"
            )
        return found

    def caption(self, index: int) -> str:
        return f"{self.files[index]}: {self.groups[2 * self.y[index] + self.place[index]]}"


def either(path: Path) -> Path | None:
    """path.txt, as CelebA's lists are published, or path.csv, as on Kaggle; None if there is neither."""
    return next(
        (file for file in (path.with_suffix(end) for end in (".txt", ".csv")) if file.is_file()), None
    )


class ImageFolder(ImageFiles):
    """Any folder of images. In root/CLASS/NAME.jpg the folders' names are labels; ImageNet is such a folder.

    Links are followed. What is passed over is counted in the description.

    Args:
        root: the folder. Where all its folders are called train, val or test, or some are and hold folders,
            `split` picks one. Without a folder test, "test" means val: ImageNet's test images have no labels.

    Raises:
        InputError: no such folder, no images, two folders of one class.
    """

    def __init__(
        self, root: str | Path, split: str, transform: Callable, limit: int | None = None, seed: int = 0
    ) -> None:
        self.root, beside = self._split(Path(root), split)
        self.transform = transform
        files, passed_over = images_below(self.root)
        total, rows = len(files), subset(len(files), limit, seed)
        names, classes, self.unlabelled = label(self.root, files)
        self.classes: tuple[str, ...] = tuple(names)
        self.y = torch.tensor(classes)[rows] if names else None
        self.files = [files[i] for i in rows]
        said = f", {len(names):,} classes" if names else ""
        beside = f"; passed over beside it: {len(beside):,} ({some(beside)})" if beside else ""
        self.description = f"{self.root}, {len(rows):,} of {total:,} images{said}{passed_over}{beside}"

    @staticmethod
    def _split(root: Path, split: str) -> tuple[Path, list[str]]:
        """(the folder of the split, what else stands in `root`); (root, []) where there are no splits."""
        if not root.is_dir():
            expected = "a folder of images, or of folders of images, one for each class"
            raise InputError(f"no folder {root}: --data must be {expected}")
        inside = entries(root)
        folders = [path.name for path in inside if path.is_dir()]
        there = [name for name in SPLITS if name in folders]
        deep = any(path.is_dir() for name in there for path in entries(root / name))
        if not there or (len(there) < len(folders) and not deep):
            return root, []  # a class can be called train
        wanted = "val" if split == "test" and "test" not in there else split
        if wanted not in there:
            found = f"found {', '.join(there)} there; choose with --reference"
            raise InputError(f"no folder {root / wanted}: {found}")
        return root / wanted, [path.name for path in inside if path.name not in there]


def inside(root: Path, file: str | None, where: str) -> str:
    """The name of an image that a file lists, which must lie in the folder; a link may lead anywhere.

    Raises:
        InputError: it does not; `where` says where the name stands.
    """
    if not isinstance(file, str) or not file or "\0" in file:
        raise InputError(f"{where} must name a file, found {file!r}")
    if "\\" in file and not os.path.lexists(root / file):
        file = file.replace("\\", "/")  # written on Windows
    name = os.path.relpath(root / file, root)
    if name.split(os.sep)[0] == os.pardir:
        raise InputError(f"{where} {file} lies outside {root}")
    return name


def label(root: Path, files: Sequence[Path]) -> tuple[list[str], list[int], str]:
    """What folders say of images: (names of the classes, the class of each image, or why there are none).

    Where the folders are named by WordNet ids, the i-th id in sorted order is the i-th of ImageNet's classes.
    Without all 1,000 the order does not tell, and there are no classes; nor are there where images lie in
    `root` itself.

    Raises:
        InputError: two folders name one class.
    """
    if any(len(file.parts) == 1 for file in files):
        return [], [], ""
    folders = sorted({file.parts[0] for file in files})
    names = [name.replace("_", " ") for name in folders]
    ids = [name for name in folders if re.fullmatch(r"n\d{8}", name)]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"two folders in {root} name the class {twice!r}; each class needs one folder")
    if ids:
        from open_clip import IMAGENET_CLASSNAMES

        names = list(IMAGENET_CLASSNAMES)
        if not len(ids) == len(folders) == len(names):
            found = f"{root} holds {len(folders):,} folders, {len(ids):,} of them WordNet ids"
            ordered = f"all {len(names):,} of ImageNet (an id's place among them names the class)"
            return [], [], f"{found}; expected {ordered}, or folders named by their class"
    number = {folder: i for i, folder in enumerate(folders)}
    return names, [number[file.parts[0]] for file in files], ""


def subset(count: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of the indices 0..count-1, drawn without replacement, in their order; None: all of them."""
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise InputError(f"--limit must be at least 1, got {limit}")
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].tolist())
