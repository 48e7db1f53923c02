"""Draw the picture of maps in docs/segmentation.md: every method on the same demo images and texts.

$ python -m demo.heatmaps            # writes docs/heatmaps.png
"""

from __future__ import annotations

from pathlib import Path

from demo.images import DemoBirds
from tasks.attribution import ATTRIBUTIONS, attribute, signed
from tasks.drawing import LEGEND, Scale, Tile, in_rows, overlay, sheet
from tasks.heatmap import ACROSS
from tasks.segmentation import predict
from zeroshot import classifier, load_clip, templates

ROWS = (3, 8)  # two images of the validation split, of no particular choice
SIDE = 144  # pixels


def main() -> None:
    clip = load_clip(device="cpu")
    data = DemoBirds("val", clip.preprocess)
    classes = classifier(clip, data.kinds, templates(clip))
    rows = []
    for index in ROWS:
        image, source = data[index][0][None], data.picture(index)
        (shown,) = predict(clip, image, classes)
        text, tiles = classes[shown] - classes.mean(dim=0), []
        for method in ATTRIBUTIONS:
            (heat,) = attribute(method, clip.model, image, text[None])
            scale = Scale.of([heat], signed(method))
            tiles.append(Tile(overlay(source, heat, (0, 0, *source.size), scale), method, scale))
        heading = f"a {data.kinds[shown]}, less the mean over kinds"
        for row in in_rows(tiles, ACROSS):
            rows.append((heading, [Tile(source, "image"), *row]))
            heading = ""
    path = Path("docs/heatmaps.png")
    path.parent.mkdir(exist_ok=True)
    sheet("One text, every method", rows, SIDE, LEGEND).save(path, optimize=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
