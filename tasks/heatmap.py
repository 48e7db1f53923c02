"""--task heatmap: where in an image does each method see a text? With --head or --role: where do these heads?

Writes a picture of every map, a sheet of all maps of each text, and the maps as numbers (maps.npz).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import report
from baselines import BaselineError
from decompose import head_maps, image_embedding
from files import InputError
from masks import seen
from zeroshot import embed_texts

from .attribution import attribute, choose_methods, map_of_heads, print_refused, score_of, signed
from .drawing import LEGEND, LONG_SIDE, Scale, Tile, in_rows, overlay, save, save_picture, sheet, slug
from .heads import head_name, parse_heads
from .job import Job, read_image
from .tables import print_settings, print_table, say
from .textspan import heads_of

ACROSS = 6  # maps in a row of the sheet, beside the image
SCALES = "All texts share the scale of a map; its ends are the numbers at the bar."
Explainer = Callable[[Tensor], Tensor]  # from a text [1, d] to its map [1, rows, columns]
Maps = dict[str, list[Tensor]]  # {whose: the map [rows, columns] of every text}


class Drawn(NamedTuple):
    """What is drawn of one text."""

    name: str  # how its files begin
    title: str
    tiles: list[Tile]  # one for each map


def run(job: Job) -> tuple[dict, list]:
    """Every map of every text, drawn over the image."""
    args, folder = job.args, job.args.out / "heatmap"
    check_options(args)
    image, clip = read_image(job), job.clip
    asked = embed_texts(clip, args.text if args.minus is None else [*args.text, args.minus])
    texts = directions(args, asked)
    pixels = clip.preprocess(image)[None].to(clip.device, clip.dtype)
    cosine = similarity(job, pixels, asked)
    explainers = explainers_of(job, pixels)
    maps, refused = find_maps(explainers, texts, every=args.methods is not None)
    scales = {name: Scale.of(found, by_heads(args) or signed(name)) for name, found in maps.items()}
    box = seen(clip.preprocess, image.size, pixels.shape[:1:-1])
    part = "all of it" if covers(box, image.size) else "what the model's cropping leaves; the rest is pale"
    size, less, what = f"{args.image}, {image.width} x {image.height}", "", {}
    if args.minus is not None:
        less = f'"{args.minus}", cosine {cosine.pop():.3f}'
        what["minus"] = f"{less}: subtracted from each text; methods of unit vectors take the direction left"
        less = f", minus {less}"
    listed = ", ".join(explainers)
    where = print_settings(job, image=size, methods=listed, **what, seed=str(args.seed), seen=part)
    drawn, arrays = [], {"box": box, "image_size": image.size}
    for i, (text, share) in enumerate(zip(args.text, cosine, strict=True)):
        tiles = [Tile(overlay(image, maps[of][i], box, scale), of, scale) for of, scale in scales.items()]
        drawn.append(Drawn(f"{i + 1}-{slug(text)}", f'"{text}", cosine {share:.3f}{less}', tiles))
        arrays |= {f"{drawn[i].name}-{slug(of)}": maps[of][i].float().cpu().numpy() for of in maps}
    files = [file for text in drawn for file in save_pictures(folder, image, text)]
    save(folder / "maps.npz", partial(np.savez_compressed, **arrays))
    sheets = [str(folder / f"{text.name}-all.png") for text in drawn]
    rows = [[text, f"{share:.3f}", path] for text, share, path in zip(args.text, cosine, sheets, strict=True)]
    print_table(["text", "cosine", "all maps in one picture"], rows)
    wrote = f"{len(files)} pictures in {folder}. The maps as numbers: {folder / 'maps.npz'}"
    notes = (*say(wrote, f"{LEGEND} {SCALES}"), *print_refused(refused))
    results = {
        "settings": where,
        "cosine": dict(zip(args.text, cosine, strict=True)),
        "scores": {name: "dot" if by_heads(args) else score_of(name, args.score) for name in explainers},
        "scales": {name: [scale.low, scale.high] for name, scale in scales.items()},
        "files": files,
    }
    return results, page(image, drawn, notes)


def by_heads(args: Namespace) -> bool:
    """Are parts of the decomposition asked for, and not methods?"""
    return args.head is not None or args.role is not None


def check_options(args: Namespace) -> None:
    """Refuse options that do not go together, before anything is loaded."""
    if args.image is None or not args.text:
        raise InputError(f"--task heatmap needs {'--image FILE' if args.image is None else '--text TEXT'}")
    for option, texts in (("text", args.text), ("minus", [args.minus] if args.minus is not None else [])):
        if any(not text.strip() for text in texts):
            raise InputError(f"--{option} is empty: give a text to look for")
    if by_heads(args) and (args.methods or args.score != "published"):
        raise InputError("--head and --role show parts of the decomposition; leave out --methods and --score")
    if args.role is None and (args.data or args.reference != "train"):
        raise InputError("--data and --reference name the images that --role is found on; give --role, too")


def directions(args: Namespace, asked: Tensor) -> Tensor:
    """[t, d] what to explain: each text's embedding, less that of --minus, which is the last of `asked`."""
    if args.minus is None:
        return asked
    texts = asked[:-1] - asked[-1]
    same = [text for text, rest in zip(args.text, texts, strict=True) if not rest.norm() > 1e-6]
    if same:
        raise InputError(f"--text {same[0]!r} is the same as --minus {args.minus!r}: nothing is left of it")
    return texts


def explainers_of(job: Job, pixels: Tensor) -> dict[str, Explainer]:
    """{name: what makes its maps}: all methods; or each of --head, and the heads of --role together."""
    args, model = job.args, job.clip.model
    if not by_heads(args):
        return {
            name: partial(attribute, name, model, pixels, score=args.score) for name in choose_methods(args)
        }
    shape, chosen = head_maps(model).shape[:2], {}
    for head in parse_heads(",".join(args.head), *shape, "--head") if args.head else []:
        chosen[f"head {head_name(head)}"] = [head]
    if args.role is not None:
        heads = chosen[f"role {args.role}"] = heads_of(job)
        job.notes[f"role {args.role}: heads {', '.join(map(head_name, heads))}"] = None
    return {name: partial(map_of_heads, model, pixels, heads) for name, heads in chosen.items()}


def find_maps(explainers: dict[str, Explainer], texts: Tensor, every: bool) -> tuple[Maps, dict[str, str]]:
    """(maps by name, {name: why it gives none}).

    Raises:
        BaselineError: the first reason, where `every` one must give maps, or none does.
    """
    maps, refused = {}, {}
    for name, explain in tqdm(explainers.items(), desc="maps", unit="method", leave=False):
        try:
            found = [explain(text[None])[0] for text in texts]
            if not all(heat.isfinite().all() for heat in found):
                raise BaselineError(f"{name} gives a map that is not finite; try --precision fp32")
            maps[name] = found
        except BaselineError as error:  # the decomposition supports more models than they do
            refused[name] = str(error)
            if every or len(refused) == len(explainers):
                raise
    return maps, refused


@torch.no_grad()
def similarity(job: Job, pixels: Tensor, texts: Tensor) -> list[float]:
    """Cosine of the image with each text."""
    embedding = image_embedding(job.clip.model, pixels)
    job.check_finite(embedding)
    return (F.normalize(embedding.to(texts), dim=-1) @ texts.T)[0].tolist()


def save_pictures(folder: Path, image: Image.Image, text: Drawn) -> list[str]:
    """The names of the files: every map beside the image, and all maps in one sheet."""
    original = Tile(image, "image")
    pictures = {
        tile.caption: sheet(text.title, [("", [original, tile])], LONG_SIDE, LEGEND) for tile in text.tiles
    }
    rows = [("", [original, *row]) for row in in_rows(text.tiles, ACROSS)]
    pictures["all"] = sheet(text.title, rows, note=f"{LEGEND} {SCALES}")
    files = {f"{text.name}-{slug(name)}.png": picture for name, picture in pictures.items()}
    for file, picture in files.items():
        save_picture(picture, folder / file)
    return list(files)


def page(image: Image.Image, drawn: list[Drawn], notes: Sequence[str]) -> list[str]:
    """The same for report.html."""
    lead = "Where in this image each text is seen: the stronger a colour, the more a patch adds to the score."
    original = report.pictures([(image, "the image")], size=240)
    sections = [lead, report.section("The image", original, note=notes)]
    for text in drawn:
        pictures = [(tile.with_bar(), f"{tile.caption}: {tile.scale}") for tile in text.tiles]
        sections.append(report.section(text.title, report.pictures(pictures, size=160)))
    return sections


def covers(box: tuple[float, ...], size: tuple[int, int]) -> bool:
    """Does the model see the whole image, but for less than a pixel?"""
    return box[0] <= 0.5 and box[1] <= 0.5 and box[2] >= size[0] - 0.5 and box[3] >= size[1] - 0.5
