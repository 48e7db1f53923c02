"""--task segmentation: do a method's maps lie on the object? (section 5 of the paper)

Every method explains the same class of an image, from the same model, and is judged by the same measures.
"""

from __future__ import annotations

import difflib
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from baselines import BaselineError
from data import InputError, subset
from decompose import DecompositionError
from masks import DemoMasks, ImageNetSegmentation, Masked, MaskFolder, seen
from metrics import Segmentation
from zeroshot import Clip, classifier, load_clip, templates

from . import pages
from .attribution import ATTRIBUTIONS, DECOMPOSITIONS, attribute, choose_methods, clipped, score_of
from .common import print_settings, settings, table
from .heatmap import overlay
from .passes import one_pass

BLOB, RANDOM = "centred blob", "random"  # what a method must beat
EXAMPLES, SIDE = 3, 256  # images on the page, pixels of their long side


def run(args: Namespace) -> tuple[dict, list]:
    """Pixel accuracy, mean IoU and mean AP of every method."""
    clip = load_clip(args.model, args.pretrained, args.device, args.precision, args.image_size, args.out)
    data = open_masks(args, clip)
    methods = choose_methods(args, extra=(BLOB, RANDOM))
    names = class_names(args, data)
    prompt, labels = choose_prompt(args, data, names)
    classes = classifier(clip, names, templates(clip), title="classes")
    found = Found({method: Segmentation(clip=clipped(method)) for method in methods}, data)
    for (images, masks, foreground), indices in one_pass(clip, data, args, "segmentation", found):
        found.see(foreground.tolist(), indices.tolist())
        shown = labels[indices].to(clip.device) if labels is not None else predict(clip, images, classes)
        for method in [method for method in methods if method not in found.refused]:
            try:
                maps = maps_of(method, clip, args, images, indices, classes, shown)
            except (BaselineError, DecompositionError) as error:
                found.refused[method] = str(error)
                if args.methods or all(name in (*found.refused, BLOB, RANDOM) for name in methods):
                    raise InputError(str(error)) from error
                continue
            try:
                found.totals[method].update(maps, masks)
            except ValueError as error:
                raise InputError(
                    f"{method} on images {int(indices[0])} to {int(indices[-1])}: {error}"
                ) from error
    refused = found.refused
    where = settings(
        args,
        clip,
        images=data.description,
        explained=prompt,
        prompts=f"{len(templates(clip))} templates, {len(names):,} classes",
        protocol={
            "aligned": "masks resized and cropped as images",
            "authors": "masks squashed onto the crop",
        }[args.protocol],
    )
    rows = {
        method: measures(method, total, args)
        for method, total in found.totals.items()
        if method not in refused
    }
    print_settings(where)
    print()
    print_rows(rows)
    for reason in dict.fromkeys(refused.values()):
        print(f"Without {', '.join(method for method in refused if refused[method] == reason)}: {reason}")
    results = {"settings": where, "rows": rows, "refused": refused}
    return results, pages.segmentation(
        results, examples(clip, args, data, list(rows), names, classes, labels)
    )


def maps_of(
    method: str, clip: Clip, args: Namespace, images: Tensor, indices: Tensor, classes: Tensor, shown: Tensor
) -> Tensor:
    """[b, rows, cols] what a method says of the classes shown [b]."""
    maps = sanity(method, images, clip, indices, args.seed)
    if maps is not None:
        return maps
    texts = classes[shown] - classes.mean(dim=0) if contrasted(method, args.contrast) else classes[shown]
    return attribute(method, clip.model, images, texts, args.score)


def examples(
    clip: Clip,
    args: Namespace,
    data: Masked,
    methods: list[str],
    names: list[str],
    classes: Tensor,
    labels: Tensor | None,
) -> dict[str, list[tuple[Image.Image, str]]]:
    """For some images, drawn with the seed: the image, its mask, and every method's map laid over it."""
    found = {}
    for i in subset(len(data), EXAMPLES, args.seed):
        image, values = data.pair(i)
        pixels = clip.preprocess(image)[None].to(clip.device, clip.dtype)
        shown = labels[[i]].to(clip.device) if labels is not None else predict(clip, pixels, classes)
        box = seen(clip.preprocess, image.size, pixels.shape[:1:-1])
        mask = Image.fromarray(
            np.where(values == 0, 0, np.where(values == args.void, 128, 255)).astype(np.uint8)
        )
        tiles = [(image, "image"), (mask, "mask")]
        for method in methods:
            heat = maps_of(method, clip, args, pixels, torch.tensor([i]), classes, shown)
            tiles.append((overlay(image, heat, box, clipped(method), SIDE), method))
        found[f"{data.name(i)}: {names[int(shown[0])]}"] = tiles
    return found


class Found:
    """What the pass finds: running totals of each method, the masks' value for foreground, and who refused the model."""

    running = ("totals", "foregrounds", "refused")

    def __init__(self, totals: dict[str, Segmentation], data: Masked) -> None:
        self.totals, self.data = totals, data
        self.foregrounds: dict[int, int] = {}  # value: the first image that has it
        self.refused: dict[str, str] = {}  # methods that do not support this model

    def see(self, values: Iterable[int], indices: Iterable[int]) -> None:
        """Notes which value means foreground, and refuses a second one."""
        for value, index in zip(values, indices, strict=True):
            if value:
                self.foregrounds.setdefault(value, index)
        if len(self.foregrounds) > 1:
            (one, first), (other, second) = list(self.foregrounds.items())[:2]
            raise InputError(
                f"the mask of {self.data.name(first)} marks foreground with {one}, that of {self.data.name(second)} with {other}; "
                "if one of them marks pixels to leave out, give it as --void"
            )

    def merge(self, other: Found) -> None:
        for method, total in other.totals.items():
            self.totals[method].merge(total)
        self.refused = self.refused | other.refused
        self.see(other.foregrounds.keys(), other.foregrounds.values())


def open_masks(args: Namespace, clip: Clip) -> Masked:
    """--data: a .mat file, a folder of images and masks, or the demo."""
    options = {"limit": args.limit, "seed": args.seed, "protocol": args.protocol, "void": args.void}
    if args.data is None:
        return DemoMasks(clip.preprocess, **options)
    return (MaskFolder if Path(args.data).is_dir() else ImageNetSegmentation)(
        args.data, clip.preprocess, **options
    )


def class_names(args: Namespace, data: Masked) -> list[str]:
    """The classes that an image is told from: --classes, else what the data set says, else ImageNet's 1,000."""
    if args.classes is None:
        from open_clip import IMAGENET_CLASSNAMES

        if data.names is not None and len(data.names) < 2:
            raise InputError(
                f"the images' folders name one class, {data.names[0]!r}, and at least two are needed: give --classes"
            )
        return data.names or list(IMAGENET_CLASSNAMES)
    names = args.classes
    if len(names) == 1:
        try:
            names = [
                line.strip()
                for line in Path(names[0]).read_text(encoding="utf-8-sig").splitlines()
                if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--classes takes at least two names, or a file with one on each line; cannot read {names[0]}: "
                f"{getattr(error, 'strerror', None) or error}"
            ) from error
    if not all(name.strip() for name in names):
        raise InputError("--classes holds a class without a name")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if len(names) < 2 or twice is not None:
        raise InputError(
            "--classes needs at least two names" if twice is None else f"--classes holds {twice!r} twice"
        )
    return list(names)


def choose_prompt(args: Namespace, data: Masked, names: list[str]) -> tuple[str, Tensor | None]:
    """--prompt in words, and the class of each image that it means; None: the predicted one, not known yet."""
    if args.prompt == "predicted":
        return "the predicted class", None
    if args.prompt == "true":
        if data.labels is None:
            raise InputError(
                "--prompt true: these images have no labels; put each class's into a folder of its own, images/CLASS/"
            )
        unknown = next((name for name in data.names if name not in names), None)
        if unknown is not None:
            raise InputError(
                f"--prompt true: the images show {unknown!r}, which is none of the {len(names):,} --classes"
            )
        return "the true class", torch.tensor([names.index(name) for name in data.names])[data.labels]
    if args.prompt not in names:
        near = difflib.get_close_matches(args.prompt, names, n=3)
        raise InputError(
            f"--prompt takes predicted, true, or one of the {len(names):,} classes; {args.prompt!r} is none"
            + (f"; near it: {', '.join(near)}" if near else f" ({', '.join(names[:5])}, ...)")
        )
    return f"{args.prompt!r}, whatever the image shows", torch.full((len(data),), names.index(args.prompt))


@torch.no_grad()
def predict(clip: Clip, images: Tensor, classes: Tensor) -> Tensor:
    """[b] the class whose prompt the image is nearest to."""
    embedding = clip.model.encode_image(images)
    embedding = embedding[0] if isinstance(embedding, tuple) else embedding
    return (embedding.to(classes) @ classes.T).argmax(dim=1)


def contrasted(method: str, contrast: str) -> bool:
    """Does the method explain the class minus the mean over classes?"""
    return ATTRIBUTIONS[method].reads_text and (
        contrast == "all" or (contrast == "paper" and method in DECOMPOSITIONS)
    )


def sanity(method: str, images: Tensor, clip: Clip, indices: Tensor, seed: int) -> Tensor | None:
    """[b, rows, cols] of the two rows that look at nothing; None for a method."""
    if method not in (BLOB, RANDOM):
        return None
    patch_size = getattr(clip.model.visual, "patch_size", None)
    if patch_size is None:
        raise BaselineError(f"no map for {type(clip.model.visual).__name__}: it has no patches")
    rows, cols = (pixels // patch for pixels, patch in zip(images.shape[-2:], patch_size, strict=True))
    if method == BLOB:
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, cols), indexing="ij")
        return (
            torch.exp(-2 * (x**2 + y**2)).expand(len(images), -1, -1).to(clip.device)
        )  # standard deviation: a quarter of the side
    # The generator takes 32 bits of a seed.
    seeds = [(seed * 1_000_003 + i) % 2**32 for i in indices.tolist()]
    draws = [torch.rand(rows, cols, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(draws).to(clip.device)  # each image's own: the batch size changes nothing


def measures(method: str, total: Segmentation, args: Namespace) -> dict:
    told = (
        "-"
        if method in (BLOB, RANDOM) or not ATTRIBUTIONS[method].reads_text
        else "class - mean"
        if contrasted(method, args.contrast)
        else "class"
    )
    return {
        "score": "-" if method in (BLOB, RANDOM) else score_of(method, args.score),
        "text": told,
        "pixel accuracy": total.pixel_accuracy,
        "mIoU": total.mean_iou,
        "mAP": total.mean_ap,
        "mAP standard error": total.mean_ap_error,
    }


def print_rows(rows: dict[str, dict]) -> None:
    lines = [
        [method, row["score"], row["text"], *(f"{100 * row[key]:.1f}" for key in ("pixel accuracy", "mIoU")),
         f"{100 * row['mAP']:.1f} ± {100 * row['mAP standard error']:.1f}"]
        for method, row in rows.items()
    ]  # fmt: skip
    print(table(["%", "score", "text", "pixel accuracy", "mIoU", "mAP"], lines))
    print(
        "\nA map is resized to its mask; above its mean is foreground. mIoU: background and foreground, summed over all images."
    )
    print(
        "mAP: ± standard error over images; random is about 50. The decomposition is clipped at zero, as in the paper."
    )
