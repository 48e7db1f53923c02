"""Draw the picture of maps in docs/segmentation.md: every method on the same demo images and texts.

$ python -m demo.heatmaps            # writes docs/heatmaps.png
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from baselines import METHODS
from demo.images import DemoBirds
from tasks.attribution import OURS, OURS_ABS, attribute, clipped
from tasks.heatmap import overlay
from tasks.segmentation import predict
from zeroshot import classifier, load_clip, templates

CELL, GAP = 92, 4  # pixels
ROWS = (3, 5, 8, 11)  # four images of the validation split, of no particular choice


def main() -> None:
    clip = load_clip(device="cpu")
    data = DemoBirds("val", clip.preprocess)
    classes = classifier(clip, data.kinds, templates(clip))
    images = torch.stack([data[i][0] for i in ROWS])
    shown = predict(clip, images, classes)
    texts = classes[shown] - classes.mean(dim=0)
    columns = [OURS, OURS_ABS, *METHODS]
    width = (len(columns) + 1) * (CELL + GAP) + GAP
    picture = Image.new("RGB", (width, len(ROWS) * (CELL + 20) + 44), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for k, method in enumerate(["image", *columns]):
        words = method.replace("decomposition", "decompo-\nsition")
        words = words.replace("-attention", "-\nattention").replace("-conserving", "-\nconserving")
        draw.multiline_text((GAP + k * (CELL + GAP), 6), words, "black", font)
    for r, index in enumerate(ROWS):
        top, source = 40 + r * (CELL + 20), data.picture(index)
        picture.paste(source.resize((CELL, CELL), Image.Resampling.NEAREST), (GAP, top))
        draw.text((GAP, top + CELL + 2), f"a {data.kinds[shown[r]]}", "#333", font)
        for k, method in enumerate(columns, start=1):
            heat = attribute(method, clip.model, images[r : r + 1], texts[r : r + 1])
            tile = overlay(source, heat, (0, 0, *source.size), clipped(method))
            tile = tile.resize((CELL, CELL), Image.Resampling.LANCZOS)
            picture.paste(tile, (GAP + k * (CELL + GAP), top))
    path = Path("docs/heatmaps.png")
    path.parent.mkdir(exist_ok=True)
    picture.save(path, optimize=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
