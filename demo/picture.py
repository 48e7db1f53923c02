"""Draw the README's picture: what heads of the demo model write, in words and in the images where they write most of it.

$ python -m demo.picture            # writes docs/heads.png
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from datasets import DemoBirds
from decompose import decompose, head_maps
from textspan import Moments, textspan
from zeroshot import default_bank, embed_texts, load_bank, load_clip

SHOWN, CELL, TEXT_WIDTH, GAP = 8, 96, 330, 6
CATEGORIES = ("places", "animals", "colours", "light", "styles")


def main() -> None:
    clip = load_clip(device="cpu")
    bank = load_bank(default_bank(clip))
    data = DemoBirds("val", clip.preprocess)
    images = torch.stack([data[i][0] for i in range(len(data))])
    values = torch.cat([decompose(clip.model, part).values for part in images.split(200)])
    maps = head_maps(clip.model)
    texts = embed_texts(clip, bank.texts)
    rows = []
    for layer, head in np.ndindex(*maps.shape[:2]):
        moments = Moments(maps.shape[2]).update(values[:, layer, head]).map(maps[layer, head])
        span = textspan(moments, texts, size=8)
        share = {
            c: sum(e for i, e in zip(span.indices, span.explained.tolist(), strict=True) if bank.categories[i] == c) for c in CATEGORIES
        }
        terms = values[:, layer, head] @ maps[layer, head]
        along = (terms - moments.mean.float()) @ span.directions[0].float()
        first = bank.texts[span.indices[0]], float(span.explained[0])
        rows.append(
            (f"{layer}.{head}", share, first, along.topk(SHOWN).indices.tolist(), along.topk(SHOWN, largest=False).indices.tolist())
        )
    chosen = [
        max((row for row in rows if bank.categories[bank.texts.index(row[2][0])] == c), key=lambda row: row[1][c], default=None)
        for c in CATEGORIES
    ]
    path = Path("docs/heads.png")
    path.parent.mkdir(exist_ok=True)
    draw_rows([(row, c) for row, c in zip(chosen, CATEGORIES, strict=True) if row], data).save(path, optimize=True)
    print(f"wrote {path}")


def draw_rows(rows: list, data: DemoBirds) -> Image.Image:
    """One row per head: its number, its category, its first text; the images highest along that text, and the lowest two."""
    low = 2
    picture = Image.new("RGB", (TEXT_WIDTH + (SHOWN - low) * CELL + low * CELL + 4 * GAP, len(rows) * (CELL + GAP) + 28), "white")
    draw, font, small = ImageDraw.Draw(picture), ImageFont.load_default(19), ImageFont.load_default(14)
    draw.text((TEXT_WIDTH, 4), "images where the head writes most along its first text", "#555", small)
    draw.text((TEXT_WIDTH + (SHOWN - low) * CELL + 3 * GAP, 4), "and least", "#555", small)
    for r, ((head, share, (text, explained), high, least), category) in enumerate(rows):
        top = 28 + r * (CELL + GAP)
        draw.text((GAP, top + 10), f"head {head}", "black", font)
        draw.text((GAP, top + 36), f'"{text}"  {explained:.0%}', "black", small)
        draw.text((GAP, top + 58), f"{category}: {share[category]:.0%} of its variance", "#555", small)
        for k, index in enumerate(high[: SHOWN - low] + least[:low]):
            shot = Image.fromarray(data._render(data.all_facts, data.rows[index], data.seed)[0]).resize(
                (CELL, CELL), Image.Resampling.NEAREST
            )
            picture.paste(shot, (TEXT_WIDTH + k * CELL + (3 * GAP if k >= SHOWN - low else 0), top))
    return picture


if __name__ == "__main__":
    main()
