"""--task segmentation: do a method's maps lie on the object? (section 5 of the paper)

Every method explains the same class of an image, from the same model, and is judged by the same measures.
"""

from __future__ import annotations

import difflib
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

import report
from baselines import BaselineError
from data import subset
from decompose import DecompositionError, image_embedding, open_tower, upcast
from demo.images import DemoMasks
from files import InputError, read_lines
from masks import ImageNetSegmentation, Masked, MaskFolder, seen
from metrics import Segmentation
from neurons import second_order
from zeroshot import Clip, classifier, templates

from .attribution import (
    BLOB,
    RANDOM,
    choose_methods,
    clipped,
    maps_of,
    print_refused,
    signed,
    what_it_explains,
)
from .drawing import LEGEND, Scale, overlay
from .heads import LAST_LAYERS
from .job import Job, check_class_names
from .neurons import Activity, whole_maps
from .passes import one_pass
from .reference import CENTRE_IMAGES
from .tables import Shown, in_tenths, print_settings, print_table, prompts_of, say

NEURONS = "neurons"  # here alone: it takes a pass over the images before its first map
MEASURES = ("pixel accuracy", "mIoU", "mAP", "pointing", "energy")
NOTE = (
    "A map is resized to its mask; above its mean is foreground. mIoU: background and foreground, summed "
    "over all images.\nmAP: ± standard error over images; random is about 50. The decomposition is clipped "
    "at zero, as in the paper.\npointing: is the maximum in the mask? energy: share of the map's positive "
    "values that lies in it."
)
Pictures = dict[str, list[tuple[Image.Image, str]]]  # {title: pictures with their captions}
EXAMPLES, SIDE = 3, 256  # images on the page, pixels of their long side
PROTOCOLS = {"aligned": "masks resized and cropped as images", "authors": "masks squashed onto the crop"}


def run(job: Job) -> tuple[dict, list]:
    """Five measures of every method."""
    args, clip = job.args, job.clip
    data = open_masks(job)
    methods = choose_methods(args, extra=(NEURONS, BLOB, RANDOM))
    names = class_names(args.classes, data)
    prompt, labels = choose_prompt(args.prompt, data, names)
    classes = classifier(clip, names, templates(clip), title="classes")
    found = Found({method: Segmentation(clip=clipped(method)) for method in methods}, data)
    if NEURONS in methods:
        try:
            job.more_maps[NEURONS] = neuron_maps(job, data)
        except DecompositionError as error:
            if args.methods:
                raise
            found.refused[NEURONS] = str(error)
    for (images, masks, foreground), indices in one_pass(job, data, "segmentation", found):
        found.see(foreground.tolist(), indices.tolist())
        shown = labels[indices].to(clip.device) if labels is not None else predict(clip, images, classes)
        for method in [method for method in methods if method not in found.refused]:
            try:
                maps = maps_of(method, job, images, indices, classes, shown)
            except (BaselineError, DecompositionError) as error:
                found.refused[method] = str(error)
                if args.methods or all(name in (*found.refused, BLOB, RANDOM) for name in methods):
                    raise InputError(str(error)) from error
                continue
            try:
                found.totals[method].update(maps, masks)
            except ValueError as error:
                batch = f"images {int(indices[0])} to {int(indices[-1])}"
                raise InputError(f"{method} on {batch}: {error}") from error
    prompts, protocol = prompts_of(clip, len(names)), PROTOCOLS[args.protocol]
    explained = {"explained": prompt, "prompts": prompts, "protocol": protocol}
    where = print_settings(job, images=data.description, **explained)
    totals = {method: total for method, total in found.totals.items() if method not in found.refused}
    rows = {method: measures(method, total, args) for method, total in totals.items()}
    numbers, notes = print_rows(rows)
    notes = (*notes, *print_refused(found.refused))
    results = {"settings": where, "rows": rows, "refused": found.refused}
    return results, page(rows, examples(job, data, list(rows), names, classes, labels), (numbers, notes))


def examples(
    job: Job, data: Masked, methods: list[str], names: list[str], classes: Tensor, labels: Tensor | None
) -> Pictures:
    """{title: (picture, caption)} of some images: the image, its mask, and every method's map over it."""
    found, clip = {}, job.clip
    for i in subset(len(data), EXAMPLES, job.args.seed):
        image, values = data.pair(i)
        pixels = clip.preprocess(image)[None].to(clip.device, clip.dtype)
        shown = labels[[i]].to(clip.device) if labels is not None else predict(clip, pixels, classes)
        box = seen(clip.preprocess, image.size, pixels.shape[:1:-1])
        mask = np.where(values == 0, 0, np.where(values == job.args.void, 128, 255)).astype(np.uint8)
        small = [report.thumbnail(picture) for picture in (image.copy(), Image.fromarray(mask))]
        tiles = [*zip(small, ("image", "mask"), strict=True)]
        for method in methods:
            (heat,) = maps_of(method, job, pixels, torch.tensor([i]), classes, shown)
            tiles.append((overlay(image, heat, box, Scale.of([heat], signed(method)), SIDE), method))
        found[f"{data.name(i)}: {names[int(shown[0])]}"] = tiles
    return found


class Found:
    """What the pass finds: totals of each method, the value of foreground, methods that are refused."""

    state_names = ("totals", "foregrounds", "refused")

    def __init__(self, totals: dict[str, Segmentation], data: Masked) -> None:
        self.totals, self.data = totals, data
        self.foregrounds: dict[int, int] = {}  # value: the first image that has it
        self.refused: dict[str, str] = {}  # methods that do not support this model

    def see(self, values: Iterable[int], indices: Iterable[int]) -> None:
        """Note which value means foreground in the masks of these images, and refuse a second one."""
        for value, index in zip(values, indices, strict=True):
            if value:
                self.foregrounds.setdefault(value, index)
        if len(self.foregrounds) > 1:
            (one, first), (other, second) = list(self.foregrounds.items())[:2]
            marks = f"the mask of {self.data.name(first)} marks foreground with {one}"
            others = f"that of {self.data.name(second)} with {other}"
            hint = "if one of them marks pixels to leave out, give it as --void"
            raise InputError(f"{marks}, {others}; {hint}")

    def merge(self, other: Found) -> None:
        for method, total in other.totals.items():
            self.totals[method].merge(total)
        self.refused = self.refused | other.refused
        self.see(other.foregrounds.keys(), other.foregrounds.values())


def open_masks(job: Job) -> Masked:
    """--data: a .mat file, a folder of images and masks, or the demo."""
    args, preprocess = job.args, job.clip.preprocess
    options = {"limit": args.limit, "seed": args.seed, "protocol": args.protocol, "void": args.void}
    if args.data is None:
        return DemoMasks(preprocess, **options)
    kind = MaskFolder if Path(args.data).is_dir() else ImageNetSegmentation
    return kind(args.data, preprocess, **options)


def class_names(asked: list[str] | None, data: Masked) -> list[str]:
    """The classes to choose from: --classes, else those of the data set, else ImageNet's 1,000."""
    if asked is None:
        from open_clip import IMAGENET_CLASSNAMES

        if data.names is not None and len(data.names) < 2:
            found = f"the images' folders name one class, {data.names[0]!r}"
            raise InputError(f"{found}, and at least two are needed: give --classes")
        return data.names or list(IMAGENET_CLASSNAMES)
    names = asked
    if len(asked) == 1:
        expected = "--classes takes at least two names, or a file with one on each line"
        lines = read_lines(Path(asked[0]), f"{expected}; cannot read {asked[0]}")
        names = [line.strip() for line in lines if line.strip()]
    check_class_names(names)
    return list(names)


def choose_prompt(prompt: str, data: Masked, names: list[str]) -> tuple[str, Tensor | None]:
    """(--prompt in words, the class of each image; None for the predicted class, not known yet)."""
    if prompt == "predicted":
        return "the predicted class", None
    if prompt == "true":
        if data.labels is None:
            hint = "put each class's into a folder of its own, images/CLASS/"
            raise InputError(f"--prompt true: {data.unlabelled or 'these images have no labels'}; {hint}")
        unknown = next((name for name in data.names if name not in names), None)
        if unknown is not None:
            known = f"the {len(names):,} --classes"
            raise InputError(f"--prompt true: the images show {unknown!r}, which is none of {known}")
        return "the true class", torch.tensor([names.index(name) for name in data.names])[data.labels]
    if prompt not in names:
        near = difflib.get_close_matches(prompt, names, n=3)
        hint = f"; near it: {', '.join(near)}" if near else f" ({', '.join(names[:5])}, ...)"
        expected = f"predicted, true, or one of the {len(names):,} classes"
        raise InputError(f"--prompt takes {expected}; {prompt!r} is none{hint}")
    return f"{prompt!r}, whatever the image shows", torch.full((len(data),), names.index(prompt))


@torch.no_grad()
def predict(clip: Clip, images: Tensor, classes: Tensor) -> Tensor:
    """[b] the class whose prompt the image is nearest to."""
    return (image_embedding(clip.model, images).to(classes) @ classes.T).argmax(dim=1)


def neuron_maps(job: Job, data: Masked) -> Callable[[Tensor, Tensor], Tensor]:
    """The maps of Gandelsman et al., https://arxiv.org/abs/2406.04341: function(images, texts [b, d]).

    A map is the mean activation of the neurons whose main directions (see second_order.py) have the largest
    dot products with the text, of either sign. The authors take 200 of the 9,216 in layers 8 to 10 of 12, and
    here it is as large a share. The directions come from some of the images; masks and labels are not used.
    """
    model, tower = job.clip.model, open_tower(job.clip.model)
    layers = range(max(0, len(tower.blocks) - LAST_LAYERS), len(tower.blocks) - 1)
    if not layers:
        raise DecompositionError("a model of one layer has no heads after an MLP")
    first = job.clip.preprocess(data.pair(0)[0])[None].to(job.clip.device, job.clip.dtype)
    activities = [Activity(layer, whole_maps(second_order(model, first, layer))) for layer in layers]
    few = Subset(data, subset(len(data), CENTRE_IMAGES, job.args.seed))
    for (images, *_), indices in one_pass(job, few, NEURONS, *activities):
        for activity in activities:
            split = second_order(model, images, activity.layer)
            job.check_finite(split.embedding)
            activity.update(split, indices)
    directions = torch.cat([activity.directions() for activity in activities]).to(first.device)  # [n, d]

    def maps(images: Tensor, texts: Tensor) -> Tensor:
        kept = []
        projections = [tower.blocks[layer].mlp.c_proj for layer in layers]
        keep = lambda _, args: kept.append(upcast(args[0]))  # noqa: E731
        image_embedding(model, images, [(x.register_forward_pre_hook, keep) for x in projections])
        a = torch.cat([x if tower.batch_first else x.transpose(0, 1) for x in kept], dim=2)  # [b, N, n]
        fit = (texts.to(directions) @ directions.T).abs()
        best = fit.topk(math.ceil(len(directions) * 200 / 9216)).indices
        best = best[:, None].expand(-1, a.shape[1], -1)  # [b, N, neurons taken]
        return a.gather(2, best)[:, 1:].mean(dim=2).unflatten(1, tower.grid(images))

    return maps


def measures(method: str, total: Segmentation, args: Namespace) -> dict:
    """A row of the table."""
    row = what_it_explains(method, args) | {"pixel accuracy": total.pixel_accuracy, "mIoU": total.mean_iou}
    row |= {"mAP": total.mean_ap, "mAP standard error": total.mean_ap_error}
    return row | {"pointing": total.pointing, "energy": total.energy}


def print_rows(rows: dict[str, dict]) -> Shown:
    """The table, and what its columns mean."""
    lines = []
    for method, row in rows.items():
        mean_ap = f"{100 * row['mAP']:.1f} ± {100 * row['mAP standard error']:.1f}"
        before, after = (in_tenths(row[key] for key in keys) for keys in (MEASURES[:2], MEASURES[3:]))
        lines.append([method, row["score"], row["text"], *before, mean_ap, *after])
    return print_table(["%", "score", "text", *MEASURES], lines), say(NOTE)


def page(rows: dict[str, dict], pictures: Pictures, shown: Shown) -> list[str]:
    """The same for report.html, drawn, with some of the maps."""
    numbers, notes = shown
    precision = []
    for method, row in rows.items():
        half = 1.96 * row["mAP standard error"]
        precision.append((method, *(100 * (row["mAP"] + away) for away in (0, -half, half))))
    overlap = [(method, 100 * row["mIoU"], None, None) for method, row in rows.items()]
    first = report.intervals({"": precision}, "mAP, ± 1.96 standard errors", "%")
    second = report.intervals({"": overlap}, "mIoU", "%")
    measured = report.section("Do the maps lie on the object?", numbers, first, second, note=notes)
    tiles = []
    for title, row in pictures.items():
        tiles += [report.tag("h3", title), report.pictures(row)]
    maps = report.section("Some of the maps", *tiles, note=f"Images drawn with the seed. {LEGEND}")
    lead = "How well each method's map of where the model sees a class agrees with the object's mask."
    return [lead, measured, maps]
