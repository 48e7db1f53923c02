"""Draw the README's picture: what heads of the demo model write, in words and in the images where they write most of it.

$ python -m demo.picture            # writes docs/heads.png
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import DemoBirds
from decompose import decompose, head_maps
from textspan import Moments, textspan
from zeroshot import default_bank, embed_texts, load_bank, load_clip

HIGH, LOW, CELL, TEXT_WIDTH, GAP = 6, 2, 96, 270, 6
CATEGORIES = ("places", "animals", "colours", "light", "styles")


class Named(NamedTuple):
    """A head: its categories' shares of its variance, its first text with its share, the images to show."""

    head: str
    shares: Counter
    first: str
    explained: float
    images: list[int]


def main() -> None:
    clip = load_clip(device="cpu")
    bank = load_bank(default_bank(clip))
    data = DemoBirds("val", clip.preprocess)
    images = torch.stack([data[i][0] for i in range(len(data))])
    values = torch.cat([decompose(clip.model, part).values for part in images.split(200)])
    maps = head_maps(clip.model)
    texts = embed_texts(clip, bank.texts)
    found = []
    for layer, head in np.ndindex(*maps.shape[:2]):
        moments = Moments(maps.shape[2]).update(values[:, layer, head]).map(maps[layer, head])
        span = textspan(moments, texts, size=8)
        shares = Counter()
        for i, share in zip(span.indices, span.explained.tolist(), strict=True):
            shares[bank.categories[i]] += share
        along = (values[:, layer, head] @ maps[layer, head] - moments.mean.float()) @ span.directions[
            0
        ].float()
        order = along.argsort(descending=True).tolist()
        found.append(
            Named(
                f"{layer}.{head}",
                shares,
                bank.texts[span.indices[0]],
                float(span.explained[0]),
                order[:HIGH] + order[-LOW:],
            )
        )
    rows = []
    for category in CATEGORIES:  # the head that is most of it, among those whose first text is of it
        heads = [named for named in found if named.first in bank.of(category)]
        if heads:
            rows.append((max(heads, key=lambda named, category=category: named.shares[category]), category))
    path = Path("docs/heads.png")
    path.parent.mkdir(exist_ok=True)
    draw_rows(rows, data).save(path, optimize=True)
    print(f"wrote {path}")


def draw_rows(rows: list[tuple[Named, str]], data: DemoBirds) -> Image.Image:
    """One row per head: its number, its first text, its category; the images highest along that text, and the lowest."""
    apart = TEXT_WIDTH + HIGH * CELL + 3 * GAP
    picture = Image.new("RGB", (apart + LOW * CELL + GAP, len(rows) * (CELL + GAP) + 28), "white")
    draw, font, small = ImageDraw.Draw(picture), ImageFont.load_default(19), ImageFont.load_default(14)
    draw.text((TEXT_WIDTH, 5), "where the head writes most along its first text", "#555", small)
    draw.text((apart, 5), "and least", "#555", small)
    for r, (named, category) in enumerate(rows):
        top = 28 + r * (CELL + GAP)
        draw.text((GAP, top + 10), f"head {named.head}", "black", font)
        draw.text((GAP, top + 38), f'"{named.first}"  {named.explained:.0%}', "black", small)
        draw.text((GAP, top + 60), f"{category}: {named.shares[category]:.0%} of its variance", "#555", small)
        for k, index in enumerate(named.images):
            left = TEXT_WIDTH + k * CELL if k < HIGH else apart + (k - HIGH) * CELL
            picture.paste(data.picture(index).resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))
    return picture


if __name__ == "__main__":
    main()
