"""Draw the README's picture: what some heads of the demo model write, in words and in images.

$ python -m demo.picture            # writes docs/heads.png
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from decompose import decompose, head_maps
from demo.images import DemoBirds
from roles import find_roles
from textspan import Moments, textspan
from zeroshot import default_bank, embed_texts, load_bank, load_clip

HIGH, LOW, CELL, TEXT_WIDTH, GAP = 6, 2, 96, 270, 6
CATEGORIES = ("places", "animals", "colours", "light", "styles")


class Named(NamedTuple):
    """What the picture shows of a head."""

    head: str  # layer.head
    shares: dict[str, float]  # of each category: as `--task textspan` prints them
    first: str  # the first text
    explained: float  # the share of the variance that the first text explains
    images: list[int]  # highest along the first text, then lowest


def main() -> None:
    clip = load_clip(device="cpu")
    bank = load_bank(default_bank(clip))
    data = DemoBirds("train", clip.preprocess)
    images = torch.stack([data[i][0] for i in range(len(data))])
    terms = [decompose(clip.model, part) for part in images.split(200)]
    values, embedding = (
        torch.cat([getattr(part, name) for part in terms]) for name in ("values", "embedding")
    )
    maps = head_maps(clip.model)
    texts = embed_texts(clip, bank.texts)
    roles = find_roles(values, maps, embedding, texts, bank.categories)
    found = []
    for layer, head in np.ndindex(*maps.shape[:2]):
        moments = Moments(maps.shape[2]).update(values[:, layer, head]).map(maps[layer, head])
        span = textspan(moments, texts, size=8)
        shares = dict(zip(roles.categories, roles.share[:, layer, head].tolist(), strict=True))
        away = values[:, layer, head] @ maps[layer, head] - moments.mean.float()
        order = (away @ span.directions[0].float()).argsort(descending=True).tolist()
        first, explained = bank.texts[span.indices[0]], float(span.explained[0])
        found.append(Named(f"{layer}.{head}", shares, first, explained, order[:HIGH] + order[-LOW:]))
    rows = []
    for category in CATEGORIES:
        # Of the heads whose first text is of this category, show the one that the category explains most.
        heads = [named for named in found if named.first in bank.of(category)]
        if heads:
            rows.append((max(heads, key=lambda named, category=category: named.shares[category]), category))
    path = Path("docs/heads.png")
    path.parent.mkdir(exist_ok=True)
    draw_rows(rows, data).save(path, optimize=True)
    print(f"wrote {path}")


def draw_rows(rows: list[tuple[Named, str]], data: DemoBirds) -> Image.Image:
    """One row per head: its number, first text and category, and the images to show."""
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
