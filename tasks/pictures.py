"""Pictures that the user names, and pictures that a task saves."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from data import read
from files import InputError, atomic_write

from .processes import process_rank


def open_picture(path: str) -> Image.Image:
    """An image that the user names, in RGB and upright."""
    image = read(Path(path), lambda image: image)
    if isinstance(image, str):
        raise InputError(image)
    return image


def save_picture(picture: Image.Image, path: Path) -> None:
    """Save as PNG, in the first process alone; an earlier file stays until the new one is complete."""
    if process_rank() > 0:
        return
    try:
        with atomic_write(path) as partial:
            picture.save(partial, format="PNG")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
