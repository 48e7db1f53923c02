"""Pictures of maps: a map over its image, the bar that says which colour is which number, sheets of pictures.

    scale = Scale.of([heat], signed=True)
    tile = Tile(overlay(image, heat, box, scale), "decomposition", scale)
    save_picture(sheet("a gull", [("", [Tile(image, "image"), tile])]), Path("gull.png"))

A map's colours lie over the image in grey, and are the less opaque the nearer a value is to zero: where a map
says nothing the image is as it was, and every colour is the map's. Red and blue can be told apart by those
who cannot tell red from green.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from files import InputError, atomic_write, visible

from .processes import process_rank

LONG_SIDE = 512  # pixels of a map that is drawn alone
TILE, GAP = 192, 8  # pixels: the side of a picture in a sheet, and what is between two of them
OPAQUE = 0.9  # the largest value
OUTSIDE = 0.3  # of the image where the model does not see it; the rest is white
LEGEND = "Red speaks for the text and blue against it; maps without a sign go from clear (nothing) to yellow."
# From the lowest value to the highest. Signed: dark blue, blue, light blue, light orange, red, dark red. Else
# matplotlib's inferno without its black end: more is brighter, also without colour.
SIGNED = np.float32([*bytes.fromhex("0b2a8c2166d478b4f0fdb070e0401ca00020")]).reshape(-1, 3)
UNSIGNED = np.float32([*bytes.fromhex("65156e9f2a63d44842f57d15fac127fcffa4")]).reshape(-1, 3)


class Scale(NamedTuple):
    """The values between which the colours of a map go; of a signed map as far below zero as above it."""

    low: float
    high: float
    signed: bool

    @classmethod
    def of(cls, maps: Sequence[Tensor], signed: bool) -> Scale:
        """One scale for all these maps, which holds zero, too."""
        low = min(0.0, *(float(heat.min()) for heat in maps))
        high = max(0.0, *(float(heat.max()) for heat in maps))
        return cls(-max(high, -low), max(high, -low), True) if signed else cls(low, high, False)

    def paint(self, ground: np.ndarray, values: np.ndarray) -> np.ndarray:
        """[..., 3] in 0..255: the colours of values [...] over the ground [..., 3]."""
        start, least, stops = (0, -1, SIGNED) if self.signed else (self.low, 0, UNSIGNED)
        share = np.clip((values - start) / ((self.high - start) or 1), least, 1)
        steps = np.linspace(least, 1, len(stops))
        colours = np.stack([np.interp(share, steps, channel) for channel in stops.T], axis=-1)
        opacity = OPAQUE * np.abs(share)[..., None] ** 0.7
        return ground * (1 - opacity) + colours * opacity

    def bar(self, width: int) -> Image.Image:
        """Its colours on white, from the lowest value to the highest."""
        values = np.tile(np.linspace(self.low, self.high, width), (max(1, width // 20), 1))
        return image_of(self.paint(np.full((*values.shape, 3), 255.0), values))

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}"


class Tile(NamedTuple):
    """A picture in a sheet; the scale is that of the map drawn on it."""

    picture: Image.Image
    caption: str = ""
    scale: Scale | None = None

    def with_bar(self) -> Image.Image:
        """The picture, and its bar below."""
        bars = [self.scale.bar(self.picture.width)] if self.scale else []
        return stack([self.picture, *bars], gap=2)


def overlay(
    image: Image.Image, heat: Tensor, box: tuple[float, ...], scale: Scale, side: int = LONG_SIDE
) -> Image.Image:
    """The image in grey, with the map [rows, columns] on `box` of it; what lies outside is pale.

    Args:
        box: (left, top, right, bottom) in the image's pixels; it may reach beyond the image.
        side: the long side of the result, in pixels.
    """
    canvas = resized(image, side)
    factors = [canvas.width / image.width, canvas.height / image.height] * 2
    left, top, right, bottom = (round(edge * factor) for edge, factor in zip(box, factors, strict=True))
    size = max(1, bottom - top), max(1, right - left)
    values = F.interpolate(heat.cpu().double()[None, None], size, mode="bilinear")[0, 0].numpy()
    grey = np.asarray(canvas.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=2)
    drawn = OUTSIDE * grey + (1 - OUTSIDE) * 255
    rows, cols = slice(max(0, top), min(canvas.height, bottom)), slice(max(0, left), min(canvas.width, right))
    values = values[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
    drawn[rows, cols] = scale.paint(grey[rows, cols], values)
    return image_of(drawn)


def image_of(colours: np.ndarray) -> Image.Image:
    """[rows, columns, 3] in 0..255, rounded."""
    return Image.fromarray(colours.round().clip(0, 255).astype(np.uint8))


def resized(image: Image.Image, side: int = LONG_SIDE) -> Image.Image:
    """With a long side of so many pixels. Where each becomes three or more, they stay square."""
    factor = side / max(image.size)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    return image.resize(size, Image.Resampling.BICUBIC if factor < 3 else Image.Resampling.NEAREST)


def sheet(
    title: str, rows: Sequence[tuple[str, Sequence[Tile]]], side: int = TILE, note: str = ""
) -> Image.Image:
    """Rows of pictures, each row under its heading (none: ""), between the title and the note.

    Args:
        side: the long side of each picture, in pixels.
    """
    tiles = [tile for _, row in rows for tile in row]
    height = max(resized(tile.picture, side).height for tile in tiles)
    width = max(len(row) for _, row in rows) * (side + GAP) - GAP
    parts = [words(title, width, 17, "black")]
    for heading, row in rows:
        parts += [words(heading, width, 15, "black")] if heading else []
        parts.append(stack([cell(tile, side, height) for tile in row], gap=GAP, across=True))
    parts += [words(note, width, 12)] if note else []
    return ImageOps.expand(stack(parts, gap=GAP), GAP, "white")


def in_rows(items: Sequence, most: int) -> list[Sequence]:
    """Split into rows of at most so many, as evenly as they can be filled."""
    count = -(-len(items) // most)
    ends = [-(-len(items) * i // count) for i in range(count + 1)]
    return [items[start:end] for start, end in pairwise(ends)]


def cell(tile: Tile, side: int, height: int) -> Image.Image:
    """The picture in the middle of `side` x `height` pixels, its caption, its bar with numbers."""
    picture = resized(tile.picture, side)
    whole = Image.new("RGB", (side, height), "white")
    whole.paste(picture, ((side - picture.width) // 2, (height - picture.height) // 2))
    parts = [whole, *([words(tile.caption, side, 14)] if tile.caption else [])]
    if tile.scale:
        numbers = words(f"{tile.scale.low:.3g}", side, 12)
        end = ImageDraw.Draw(numbers).text
        font = ImageFont.load_default(12)
        end((side, 0), f"{tile.scale.high:.3g}", "#333", font, anchor="ra")
        if tile.scale.signed and side >= TILE:
            end((side / 2, 0), "0", "#333", font, anchor="ma")
        parts += [tile.scale.bar(side), numbers]
    return stack(parts, gap=3)


def words(text: str, width: int, size: int, colour: str = "#333") -> Image.Image:
    """The text on white, in at most three lines."""
    font, letters, text = ImageFont.load_default(size), width, visible(text)
    lines = [text]
    while max(map(font.getlength, lines)) > width and letters > 1:
        letters = int(0.9 * letters)
        lines = textwrap.wrap(text, letters, max_lines=3, placeholder=" ...")
    height = round(1.3 * size)
    picture = Image.new("RGB", (width, height * len(lines)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, i * height), line, colour, font)
    return picture


def stack(pictures: Sequence[Image.Image], gap: int, across: bool = False) -> Image.Image:
    """The pictures below each other, or beside each other, on white."""
    along, other = (0, 1) if across else (1, 0)
    size = [0, 0]
    size[along] = sum(picture.size[along] for picture in pictures) + gap * (len(pictures) - 1)
    size[other] = max(picture.size[other] for picture in pictures)
    whole, at = Image.new("RGB", tuple(size), "white"), [0, 0]
    for picture in pictures:
        whole.paste(picture, tuple(at))
        at[along] += picture.size[along] + gap
    return whole


def save_picture(picture: Image.Image, path: Path) -> None:
    """Save as PNG."""
    save(path, partial(picture.save, format="PNG"))


def save(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file, in the first process alone; an earlier one stays until the new one is complete."""
    if process_rank() > 0:
        return
    try:
        with atomic_write(path) as unfinished, unfinished.open("wb") as file:
            write(file)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def slug(text: str) -> str:
    """The text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "text"
