"""Image files: which a folder holds, and reading one as others do, upright and in eight bits a channel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from files import InputError

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `read` refuses such images by name
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
SUFFIXES += (".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
LEFTOVERS = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")  # of systems and archivers: nobody's data
# What turns an image upright, by the Orientation of its EXIF.
TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
TURNS |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}


def read(path: Path, transform: Callable, keep_mode: bool = False) -> Any:
    """transform(image); or a line that says why not, for the main process to raise.

    Args:
        keep_mode: hand the image over as it is; else as RGB, and upright where the camera says which side is
            up.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            return f"{path} is neither a file nor a folder"
        if path.is_dir():
            return f"cannot read image {path}: it is a directory; expected an image file"
        with Image.open(path) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                found = f"{image.width:,} x {image.height:,} pixels"
                return f"{path} has {found}, more than Pillow's {Image.MAX_IMAGE_PIXELS:,}: make it smaller"
            return transform(image if keep_mode else eight_bits(upright(image)))
    except FileNotFoundError:
        return f"{path} is a link to nothing" if path.is_symlink() else f"no image {path}"
    except UnidentifiedImageError:
        return f"{path} is not an image that Pillow can read"
    except Exception as error:  # Pillow's readers raise nearly anything for damaged files
        return f"cannot read image {path}: {' '.join(str(error).split()) or type(error).__name__}"


def read_picture(path: Path) -> Image.Image:
    """The image in RGB, upright.

    Raises:
        InputError: it cannot be read.
    """
    image = read(path, lambda image: image)
    if isinstance(image, str):
        raise InputError(image)
    return image


def images_below(folder: Path) -> tuple[list[Path], str]:
    """(the images in a folder and the folders in it, relative to it, sorted; what is passed over, in words).

    Links to files and folders are followed. A link that leads nowhere counts as the image that it names, so
    that reading it says so.

    Raises:
        InputError: no images, or a folder that cannot be read.
    """
    files, others, passed_over = [], [], ""
    for path in _files_below(folder):
        (files if path.suffix.lower() in SUFFIXES else others).append(path.relative_to(folder))
    if others:
        endings = some(sorted({path.suffix.lower() or "no ending" for path in others}))
        passed_over = f"; passed over: {len(others):,} ({endings}; first {others[0]})"
    if not files:
        raise InputError(f"no images in {folder} ({', '.join(SUFFIXES)}){passed_over}")
    return files, passed_over


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All that is no folder, but for leftovers; a link to a folder that it lies in is not followed."""
    here = folder.resolve()
    if here in above:
        return
    for path in entries(folder):
        if path.is_dir():
            yield from _files_below(path, (*above, here))
        else:
            yield path


def some(names: Sequence[str]) -> str:
    """The first of them."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden files (AppleDouble's are hidden) and LEFTOVERS."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read folder {folder}: {error.strerror or error}") from error
    return [path for path in found if not path.name.startswith(".") and path.name.lower() not in LEFTOVERS]


def file_sizes(root: Path, files: Sequence[str | Path]) -> list[int | None]:
    """In bytes. A file that was replaced usually has another size, while a copy elsewhere has the same."""
    paths = [root / file for file in files]
    return [path.stat().st_size if path.is_file() else None for path in paths]


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is where the EXIF is broken, which says nothing of the pixels."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow's readers raise nearly anything for damaged files
        turn = None
    return image if turn is None else image.transpose(turn)


def eight_bits(image: Image.Image) -> Image.Image:
    """RGB. 16-bit grey is scaled down, which Pillow would clip; transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        scale = 257 if image.mode.startswith("I") else 1
        image = image.convert("F").point(lambda value: value / scale).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
