"""Images with labels: Waterbirds, and any folder of images.

Every data set yields (image tensor, index). Labels are attributes, in the order of the indices: y (the class
to tell apart) and, where it is known, place (the cue that goes along with it), both [n]. `fingerprint()` is
what tells one data set from another, for --resume. Images are read by DataLoader workers; one that cannot be
read is named.
"""

from __future__ import annotations

import contextlib
import csv
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from files import InputError, read_lines

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `read` refuses such images by name
FIRST = 8  # images of the first batch, where batches are large: progress shows sooner
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


class ImageFiles(Dataset):
    """Image files of a folder: what Waterbirds and ImageFolder share."""

    root: Path
    transform: Callable
    files: Sequence[str | Path]  # relative to `root`
    y: Tensor | None = None  # [n] labels, where they are known
    place: Tensor | None = None  # [n] likewise
    confined_to: Path | None = None  # where names come from a file, the folder that the files must lie in

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        return read(self.root / self.files[index], self.transform, self.confined_to), index

    def picture(self, index: int) -> Image.Image:
        """The image before the transform."""
        return read_picture(self.root / self.files[index], self.confined_to)

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
        root: the folder with metadata.csv (columns img_filename, y, split, place) and the images it names.
        split: "train", "val" or "test" (0, 1, 2 in the file).
        transform: from a PIL image to a tensor.
        limit: keep this many images, drawn with `seed`; None: all.

    Raises:
        InputError: no such folder or file, a missing column, a value out of range, an empty split.
    """

    classes = ("landbird", "waterbird")
    places = ("land", "water")
    splits = ("train", "val", "test")

    def __init__(
        self, root: str | Path, split: str, transform: Callable, limit: int | None = None, seed: int = 0
    ) -> None:
        self.root = self.confined_to = Path(root)
        self.transform = transform
        number = self.splits.index(split)
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
            file = row["img_filename"]
            if not file or "\0" in file:
                raise InputError(f"{path}, line {line}: img_filename must name a file, found {file!r}")
            for name, allowed in (("y", "01"), ("place", "01"), ("split", "012")):
                if row[name] not in list(allowed):
                    expected = f"{name} must be one of {', '.join(allowed)}"
                    raise InputError(f"{path}, line {line}: {expected}, found {row[name]!r}")
                row[name] = int(row[name])
        return rows

    def caption(self, index: int) -> str:
        return f"{self.files[index]}: {self.classes[self.y[index]]} on {self.places[self.place[index]]}"


class ImageFolder(ImageFiles):
    """Any folder of images. In root/CLASS/NAME.jpg the folders' names are labels; ImageNet is such a folder.

    Where the folders are named by WordNet ids, classes[i] is the name of the i-th id in sorted order, which
    is the order of ImageNet's classes. All 1,000 must be there, or the order would not tell.

    Args:
        root: the folder. Where it has subfolders train, val or test, `split` picks one; without a folder
            test, "test" means val, as ImageNet's test images have no labels.

    Raises:
        InputError: no such folder, no images, some but not all WordNet ids.
    """

    def __init__(
        self, root: str | Path, split: str, transform: Callable, limit: int | None = None, seed: int = 0
    ) -> None:
        self.root, self.transform = self._split(Path(root), split), transform
        files = images_below(self.root)
        if not files:
            raise InputError(f"no images in {self.root} ({', '.join(SUFFIXES)})")
        total, rows = len(files), subset(len(files), limit, seed)
        self.classes: tuple[str, ...] = ()
        if all(len(file.parts) > 1 for file in files):
            folders = sorted({file.parts[0] for file in files})
            self.classes = self._names(folders)
            self.y = torch.tensor([folders.index(files[i].parts[0]) for i in rows])
        self.files = [files[i] for i in rows]
        classes = f", {len(self.classes):,} classes" if self.classes else ""
        self.description = f"{self.root}, {len(rows):,} of {total:,} images{classes}"

    @staticmethod
    def _split(root: Path, split: str) -> Path:
        if not root.is_dir():
            expected = "a folder of images, or of folders of images, one for each class"
            raise InputError(f"no folder {root}: --data must be {expected}")
        there = [name for name in ("train", "val", "test") if (root / name).is_dir()]
        if not there:
            return root
        wanted = "val" if split == "test" and "test" not in there else split
        if wanted not in there:
            found = f"found {', '.join(there)} there; choose with --reference"
            raise InputError(f"no folder {root / wanted}: {found}")
        return root / wanted

    def _names(self, folders: list[str]) -> tuple[str, ...]:
        ids = [name for name in folders if len(name) == 9 and name[0] == "n" and name[1:].isdigit()]
        if not ids:
            names = tuple(name.replace("_", " ") for name in folders)
            twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
            if twice is not None:
                found = f"two folders in {self.root} name the class {twice!r}"
                raise InputError(f"{found}; each class needs one folder")
            return names
        from open_clip import IMAGENET_CLASSNAMES

        if not len(ids) == len(folders) == len(IMAGENET_CLASSNAMES):
            found = f"{self.root} holds {len(folders):,} folders, {len(ids):,} of them WordNet ids"
            ordered = (
                f"all {len(IMAGENET_CLASSNAMES):,} of ImageNet (an id's place among them names the class)"
            )
            raise InputError(f"{found}; expected {ordered}, or folders named by their class")
        return tuple(IMAGENET_CLASSNAMES)


def subset(count: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of the indices 0..count-1, drawn without replacement, in their order; None: all of them."""
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise InputError(f"--limit must be at least 1, got {limit}")
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def read(path: Path, transform: Callable, root: Path | None = None, keep_mode: bool = False) -> Any:
    """transform(image); or a line that says why not, for `batches` to raise in the main process.

    Args:
        root: a folder that the file must lie in, for paths that come out of a data set's own files.
        keep_mode: hand the image over as it is; else as RGB, and upright where the camera says which side is
            up.
    """
    try:
        if root is not None and not path.resolve().is_relative_to(root.resolve()):
            return f"{path} lies outside {root}"
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            return f"{path} is neither a file nor a folder"
        if path.is_dir():
            return f"cannot read image {path}: it is a directory; expected an image file"
        with Image.open(path) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                found = f"{image.width:,} x {image.height:,} pixels"
                return f"{path} has {found}, more than Pillow's {Image.MAX_IMAGE_PIXELS:,}: make it smaller"
            return transform(image if keep_mode else eight_bits(ImageOps.exif_transpose(image)))
    except FileNotFoundError:
        return f"no image {path}"
    except UnidentifiedImageError:
        return f"{path} is not an image that Pillow can read"
    except Exception as error:  # Pillow's readers raise nearly anything for damaged files
        return f"cannot read image {path}: {' '.join(str(error).split()) or type(error).__name__}"


def read_picture(path: Path, root: Path | None = None) -> Image.Image:
    """The image in RGB, upright.

    Raises:
        InputError: it cannot be read.
    """
    image = read(path, lambda image: image, root=root)
    if isinstance(image, str):
        raise InputError(image)
    return image


def images_below(folder: Path) -> list[Path]:
    """Paths of the images in a folder and the folders in it, relative to it, sorted."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
    return [path.relative_to(folder) for path in found if path.is_file()]


def file_sizes(root: Path, files: Sequence[str | Path]) -> list[int | None]:
    """In bytes. A file that was replaced usually has another size, while a copy elsewhere has the same."""
    paths = [root / file for file in files]
    return [path.stat().st_size if path.is_file() else None for path in paths]


def eight_bits(image: Image.Image) -> Image.Image:
    """RGB. 16-bit grey is scaled down, which Pillow would clip; transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        scale = 257 if image.mode.startswith("I") else 1
        image = image.convert("F").point(lambda value: value / scale).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def batches(
    data: Dataset, batch_size: int, workers: int, title: str, device: torch.device, done: int = 0
) -> Iterator[tuple[Any, Tensor]]:
    """(images on the device, indices) under a progress bar, every image once, in order.

    Images are a tensor, or a list of tensors where the data set gives more than the image (its mask, say).

    Args:
        done: number of images before these, for the progress bar.

    Raises:
        InputError: naming the first image that cannot be read; or workers that do not start, or die.
    """
    options = {"num_workers": workers, "worker_init_fn": _as_worker, "pin_memory": device.type == "cuda"}
    first = FIRST if batch_size > 4 * FIRST and not done else batch_size
    starts = [0, *range(first, len(data), batch_size)] if len(data) else []
    chunks = [range(start, end) for start, end in pairwise([*starts, len(data)])]
    loader = DataLoader(data, batch_sampler=chunks, collate_fn=_collate, **options)
    bar = {"desc": title, "unit": " images", "unit_scale": True, "leave": False}
    with tqdm(total=done + len(data), initial=done, **bar) as progress:
        for images, indices in _workers_alive(loader):
            if isinstance(images, str):
                raise InputError(images)
            several = isinstance(images, list)
            moved = [x.to(device, non_blocking=True) for x in (images if several else [images])]
            yield (moved if several else moved[0]), indices
            progress.update(len(indices))


def _workers_alive(loader: DataLoader) -> Iterator:
    """Its batches; or what happened to the processes that read them."""
    try:
        with _interrupt_waits():
            loaded = iter(loader)
        yield from loaded
    except OSError as error:
        what = f"cannot start {loader.num_workers} processes that read images ({error})"
        raise InputError(f"{what}; try fewer --workers") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "exited" not in str(error):
            raise
        what = "a worker process that reads images was killed, perhaps for its memory"
        raise InputError(f"{what}; try fewer --workers") from error


@contextlib.contextmanager
def _interrupt_waits() -> Iterator[None]:
    """Ctrl-C takes effect when the workers have started: Python ignores what is raised while it forks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _as_worker(_: int) -> None:
    """A terminal sends Ctrl-C to the workers, too; they end with the main process and print nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # of the thread that hands tensors over, when nobody takes them any more


def _collate(items: Sequence[tuple[Any, int]]) -> tuple[Any, Tensor]:
    broken = next((image for image, _ in items if isinstance(image, str)), None)
    images, indices = zip(*items, strict=True)
    return (broken or default_collate(images)), torch.tensor(indices)
