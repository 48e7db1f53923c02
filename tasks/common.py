"""What the tasks share: one pass over the reference images, names of heads, tables, intervals."""

from __future__ import annotations

import contextlib
import math
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data import DemoBirds, ImageFolder, InputError, Waterbirds, read, subset
from decompose import Decomposition, decompose, head_maps
from textspan import Moments
from zeroshot import Clip

from .parts import Sums
from .passes import one_pass, world

Head = tuple[int, int]  # (layer, head), both from 0
LAST_LAYERS = 4  # the paper reads the heads of the last four layers


@dataclass
class Reference:
    """What the reference images say of every term."""

    values: Moments  # of every head's values, [L, H, e]
    mlps: Tensor  # [L, d] mean
    stem: Tensor  # [d] mean
    own: (
        Tensor | None
    )  # [L, H, e] mean of what of the values comes from the class token itself, where that is read out
    embedding: Moments  # [d]
    maps: Tensor  # [L, H, e, d] from values to terms, on the model's device
    error: float  # largest relative error of the sum of terms
    description: str
    pool: Tensor | None = None  # [d] mean of what attention pooling's own MLP adds, where there is one
    running = ("values", "embedding", "mlps", "stem", "own", "pool", "error")  # what a pass changes

    def merge(self, other: Reference) -> None:
        """Add what `other` has seen; before the sums are divided by the number of images."""
        self.values.merge(other.values)
        self.embedding.merge(other.embedding)
        self.add({term: getattr(other, term) for term in MEANS})
        self.error = max(self.error, other.error)

    def add(self, sums: dict[str, Tensor | None]) -> None:
        for term, fresh in sums.items():
            so_far = getattr(self, term)
            if fresh is not None:
                setattr(self, term, fresh if so_far is None else so_far + fresh)

    def heads(self) -> Tensor:
        """[L, H, d] every head's mean term."""
        return torch.einsum("LHe,LHed->LHd", self.values.mean.to(self.maps), self.maps)

    def sum(self) -> str:
        """For the settings above a table."""
        return f"the terms sum to the embedding within {self.error:.0e} of its largest entry"


def open_split(args: Namespace, clip: Clip, split: str) -> DemoBirds | Waterbirds | ImageFolder:
    """--data: Waterbirds where it holds metadata.csv, else any folder of images; the demo where it is not given."""
    if args.data is None:
        return DemoBirds(split, clip.preprocess, args.limit, args.seed)
    kind = Waterbirds if (Path(args.data) / "metadata.csv").exists() else ImageFolder
    return kind(args.data, split, clip.preprocess, args.limit, args.seed)


def zero_shot_problem(data: DemoBirds | Waterbirds | ImageFolder) -> tuple[list[str], Tensor]:
    """The classes to tell, and each image's: kinds of birds in the demo."""
    if isinstance(data, DemoBirds):
        return list(data.kinds), data.facts["kind"]
    if data.y is None or len(data.classes) < 2:
        raise InputError(
            f"{data.root} has no labels: expected folders of images named by their class, two at least"
        )
    return list(data.classes), data.y


class Kept:
    """The values and embeddings of some images of a pass, chosen with the seed: memory does not grow with their number.

    A part that `summarise` fills. Values are kept in the heads' own space, of the layers wanted.
    """

    running = ("values", "embedding")

    def __init__(self, count: int, limit: int, seed: int, layers: slice) -> None:
        self.rows = subset(count, limit, seed)
        self.values: Tensor | list[Tensor] = []  # [n, l, H, e]
        self.embedding: Tensor | list[Tensor] = []  # [n, d]
        self._layers, self._wanted = layers, torch.zeros(count, dtype=torch.bool)
        self._wanted[self.rows] = True

    def update(self, terms: Decomposition, indices: Tensor) -> None:
        """Add images, by their indices in the data set."""
        mine = self._wanted[indices].to(terms.values.device)
        self.values.append(terms.values[mine][:, self._layers].cpu())
        self.embedding.append(terms.embedding[mine].float().cpu())

    def merge(self, other: Kept) -> None:
        """Add what `other` has seen, of images that come later."""
        self.values, self.embedding = [*self.values, *other.values], [*self.embedding, *other.embedding]

    def done(self) -> Kept:
        """As tensors."""
        self.values, self.embedding = torch.cat(self.values), torch.cat(self.embedding)
        return self


def summarise(
    clip: Clip,
    args: Namespace,
    part: Any = None,
    data: Dataset | None = None,
    update: Callable[[Decomposition, Tensor], None] | None = None,
) -> Reference:
    """One pass over the --reference split, or `data` in its place. A further part of the pass is updated with every batch's terms
    and indices, by its own `update`, or the one given."""
    data = open_split(args, clip, args.reference) if data is None else data
    maps = head_maps(clip.model)
    depth, heads, width, dim = maps.shape
    reference = Reference(
        Moments(width, (depth, heads)), None, None, None, Moments(dim), maps, 0.0, data.description
    )
    update = getattr(part, "update", None) if update is None else update
    for images, indices in one_pass(
        clip, data, args, f"reference ({args.reference})", reference, *([] if part is None else [part])
    ):
        terms = decompose(clip.model, images)
        if not terms.embedding.isfinite().all():
            raise InputError(
                f"{clip.name} in {args.precision} gives embeddings that are not numbers; try --precision fp32"
            )
        reference.error = max(reference.error, terms.error())
        reference.values.update(terms.values)
        reference.embedding.update(terms.embedding.float())
        found = {term: getattr(terms, term) for term in MEANS}
        reference.add(
            {
                term: None if x is None else x.sum(dim=0, dtype=torch.float64).cpu()
                for term, x in found.items()
            }
        )
        if update is not None:
            update(terms, indices)
    for term in MEANS:
        if getattr(reference, term) is not None:
            setattr(reference, term, (getattr(reference, term) / len(data)).to(maps))
    return reference


MEANS = ("mlps", "stem", "own", "pool")  # terms that nothing but the mean is needed of


CENTRE_IMAGES = 512


def centre(clip: Clip, args: Namespace) -> Tensor:
    """[d] the mean embedding of some reference images, drawn at random: data sets come sorted by class."""
    data = open_split(args, clip, args.reference)
    few, total = Subset(data, subset(len(data), CENTRE_IMAGES, args.seed)), Sums()
    for images, _ in one_pass(clip, few, args, "centre", total):
        total.add("embedding", decompose(clip.model, images).embedding.double().sum(dim=0))
    return (total["embedding"] / len(few)).float().to(clip.device)


def parse_heads(text: str, depth: int, heads: int, option: str = "--heads") -> list[Head]:
    """ "3.7,2.1" -> [(2, 1), (3, 7)], sorted, each once."""
    chosen = set()
    for part in text.split(","):
        try:
            layer, head = (int(number) for number in part.split("."))
        except ValueError:
            choices = "paper, auto, or a list" if option == "--heads" else "one or a list"
            raise InputError(
                f"{option} takes {choices} like 3.7,2.1 (layer.head, both from 0); found {part!r}"
            ) from None
        if not (0 <= layer < depth and 0 <= head < heads):
            raise InputError(
                f"no head {part}: the model has layers 0 to {depth - 1} with heads 0 to {heads - 1}"
            )
        chosen.add((layer, head))
    return sorted(chosen)


def name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"


def wilson(right: float, count: int) -> tuple[float, float]:
    """95 % interval of an accuracy (Wilson 1927), which stays inside 0..1 and holds for few images."""
    z = 1.959964
    middle = (right + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(right * (1 - right) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what they hold; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def settings(args: Namespace, clip: Clip, **more: str) -> dict[str, str]:
    """What every table says of where its numbers come from."""
    if "prompts" in more:
        more["prompts"] += f"; {logits(clip)}"
    size = f", images of {args.image_size} pixels" if args.image_size else ""
    return {
        "model": f"{clip.name}, weights {clip.weights}, {str(clip.dtype).removeprefix('torch.')} on {clip.device}{size}",
        **more,
        "seed": str(args.seed),
    }


def logits(clip: Clip) -> str:
    """What the model makes of a cosine: CLIP's softmax or SigLIP's sigmoid. Neither changes which class wins."""
    scale, bias = (getattr(clip.model, name, None) for name in ("logit_scale", "logit_bias"))
    if scale is None:
        return "cosines"
    scale = float(scale.detach().exp())
    return (
        f"softmax of {scale:.1f} cosine"
        if bias is None
        else f"sigmoid of {scale:.1f} cosine {float(bias.detach()):+.1f}"
    )


def print_settings(lines: dict[str, str]) -> None:
    width = max(map(len, lines)) + 2
    for key, value in lines.items():
        print(f"{key + ':':<{width}}{value}")


def percent(accuracy: float, count: int) -> str:
    """With its 95 % interval."""
    low, high = wilson(accuracy, count)
    return f"{100 * accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def open_picture(path: str) -> Image.Image:
    """An image that the user names: RGB, upright."""
    image = read(Path(path), lambda image: image)
    if isinstance(image, str):
        raise InputError(image)
    return image


def save_picture(picture: Image.Image, path: Path) -> None:
    """As PNG, by the first process, under another name first: what stood there stays until the new picture is complete."""
    if world()[0] > 0:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        picture.save(partial, format="PNG")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
