"""Which choices make the decomposition's maps segment well? The same scores, combined in other ways.

    $ python -m benchmarks.map_variants            # 512 images of the demo's validation split, half a minute

Each row names the layers, the text, and what is done with negative values; "clipped when resized" is the
paper's way. Two rows are made of the true masks: the share of bird in each patch, and where it is over half.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from decompose import token_scores
from demo.images import DemoMasks
from metrics import Segmentation
from tasks.passes import batches
from tasks.segmentation import predict
from tasks.tables import table
from zeroshot import classifier, embed_texts, load_clip, templates

LAYERS = {"all": slice(0, 4), "last two": slice(2, 4), "last": slice(3, 4)}
SIGNS = {
    "clipped when resized": lambda x: x,
    "clipped before": F.relu,
    "as it is": lambda x: x,
    "absolute": torch.abs,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=512)
    args = parser.parse_args()
    clip = load_clip(device="cpu")
    data = DemoMasks(clip.preprocess, args.limit, split="val")
    classes = classifier(clip, data.names, templates(clip))
    mean, bird = classes.mean(dim=0, keepdim=True), embed_texts(clip, ["a bird"])
    found: dict[tuple[str, str, str], Segmentation] = {}

    for (images, masks, _), _ in batches(data, 64, 0, "variants", clip.device):
        scores = token_scores(clip.model, images, torch.cat([classes, mean, bird]))  # [b, L, H, N, t]
        scores = scores[:, :, :, 1:].sum(dim=2)  # [b, L, patches, t]
        shown = predict(clip, images, classes)
        kinds, mean_, bird_ = scores[..., :-2], scores[..., -2], scores[..., -1]
        said = kinds[torch.arange(len(images)), ..., shown]
        texts = {"class - mean": said - mean_, "class": said, "a bird": bird_, "a bird - mean": bird_ - mean_}
        maps = {
            (layers, text, sign): do(x[:, part].sum(dim=1))
            for layers, part in LAYERS.items()
            for text, x in texts.items()
            for sign, do in SIGNS.items()
            if layers == "all" or text == "class - mean"
        }
        maps["all", "spread over classes", "-"] = kinds.sum(dim=1).std(dim=-1, correction=0)
        patch = clip.model.visual.patch_size
        size = tuple(pixels // side for pixels, side in zip(images.shape[-2:], patch, strict=True))
        maps = {key: value.unflatten(1, size) for key, value in maps.items()}
        share = F.avg_pool2d((masks == 1).float()[:, None], patch)[:, 0]
        maps |= {("-", "true share", "-"): share, ("-", "true share over half", "-"): (share > 0.5).float()}
        for key, value in maps.items():
            found.setdefault(key, Segmentation(clip=key[2] == "clipped when resized")).update(value, masks)

    print(f"{clip.name}, weights {clip.weights}; {data.description}; explained: the predicted class\n")
    figures = [[f"{100 * x:.1f}" for x in (s.pixel_accuracy, s.mean_iou, s.mean_ap)] for s in found.values()]
    rows = [[*key, *row] for key, row in zip(found, figures, strict=True)]
    print(table(["layers", "text", "sign", "pixel acc.", "mIoU", "mAP"], rows))


if __name__ == "__main__":
    main()
