"""--task heatmap: where in an image does each method see a text? With --head or --role: where do these heads?

Writes a picture of every map, a sheet of all maps of each text, and the maps as numbers (maps.npz).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import report
from baselines import BaselineError
from decompose import head_maps, image_embedding
from files import InputError, atomic_write
from masks import seen
from zeroshot import embed_texts

from .attribution import attribute, choose_methods, score_of, signed
from .drawing import LEGEND, LONG_SIDE, Scale, Tile, in_rows, overlay, save_picture, sheet, slug
from .heads import Head, head_name, parse_heads
from .job import Job, read_image
from .processes import process_rank
from .reading import map_of_heads
from .retrieval import heads_of
from .tables import print_settings, table

ACROSS = 6  # maps in a row of the sheet, beside the image
SCALES = "All texts share the scale of a map; its ends are the numbers at the bar."
Explainer = Callable[[Tensor], Tensor]  # from a text [1, d] to its map [1, rows, columns]
Maps = dict[str, list[Tensor]]  # {whose: the map [rows, columns] of every text}


def run(job: Job) -> tuple[dict, list]:
    """Every map of every text, drawn over the image."""
    args, folder = job.args, job.args.out / "heatmap"
    check_options(args)
    image, clip = read_image(job), job.clip
    asked = embed_texts(clip, args.text if args.minus is None else [*args.text, args.minus])
    texts, heads = directions(args, asked), chosen_heads(job)
    pixels = clip.preprocess(image)[None].to(clip.device, clip.dtype)
    cosine = similarity(job, pixels, asked)
    explainers = explainers_of(job, heads, pixels)
    maps, refused = find_maps(explainers, texts, every=args.methods is not None)
    scales = {name: Scale.of(found, bool(heads) or signed(name)) for name, found in maps.items()}
    box = seen(clip.preprocess, image.size, pixels.shape[:1:-1])
    part = "all of it" if covers(box, image.size) else "what the model's cropping leaves; the rest is pale"
    names, titles = [f"{i}-{slug(text)}" for i, text in enumerate(args.text, 1)], titles_of(args, cosine)
    drawn = [  # for each text
        [Tile(overlay(image, maps[name][i], box, scale), name, scale) for name, scale in scales.items()]
        for i in range(len(names))
    ]
    files = save_pictures(folder, image, names, titles, drawn)
    save_maps(folder / "maps.npz", names, maps, box, image.size)
    size = f"{args.image}, {image.width} x {image.height}"
    explained = explained_in_words(args, list(explainers), heads, cosine)
    where = print_settings(job, image=size, **explained, seed=str(args.seed), seen=part)
    paths = [str(folder / f"{name}-all.png") for name in names]
    rows = [[text, f"{share:.3f}", path] for text, share, path in zip(args.text, cosine, paths, strict=False)]
    print("\n" + table(["text", "cosine", "all maps in one picture"], rows))
    notes = [f"{len(files)} pictures in {folder}. The maps as numbers: {folder / 'maps.npz'}"]
    notes += [f"{LEGEND} {SCALES}", *refused_in_words(refused)]
    print("\n" + "\n".join(notes))
    results = {
        "settings": where,
        "cosine": dict(zip(args.text, cosine, strict=False)),
        "scores": {name: "dot" if heads else score_of(name, args.score) for name in explainers},
        "scales": {name: [scale.low, scale.high] for name, scale in scales.items()},
        "files": files,
    }
    return results, page(image, names, titles, drawn, notes)


def check_options(args: Namespace) -> None:
    """Refuse options that do not go together, before anything is loaded."""
    by_heads = args.head is not None or args.role is not None
    if args.image is None or not args.text:
        raise InputError(f"--task heatmap needs {'--image FILE' if args.image is None else '--text TEXT'}")
    for option, texts in (("text", args.text), ("minus", [args.minus] if args.minus is not None else [])):
        if any(not text.strip() for text in texts):
            raise InputError(f"--{option} is empty: give a text to look for")
    if by_heads and (args.methods or args.score != "published"):
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


def chosen_heads(job: Job) -> dict[str, list[Head]]:
    """Each head of --head, and all heads of --role together, by name; {} where neither is given."""
    args, chosen = job.args, {}
    if args.head is not None:
        shape = head_maps(job.clip.model).shape[:2]
        chosen = {
            f"head {head_name(head)}": [head] for head in parse_heads(",".join(args.head), *shape, "--head")
        }
    return chosen if args.role is None else chosen | {f"role {args.role}": heads_of(job)}


def explainers_of(job: Job, heads: dict[str, list[Head]], pixels: Tensor) -> dict[str, Explainer]:
    """{name: what makes its maps}: of these heads where there are any, else of the methods."""
    args, model = job.args, job.clip.model
    if heads:
        return {name: partial(map_of_heads, model, pixels, of) for name, of in heads.items()}
    return {name: partial(attribute, name, model, pixels, score=args.score) for name in choose_methods(args)}


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


def titles_of(args: Namespace, cosine: list[float]) -> list[str]:
    """What stands above the maps of each text."""
    if args.minus is None:
        return [f'"{text}", cosine {share:.3f}' for text, share in zip(args.text, cosine, strict=True)]
    less = f'minus "{args.minus}" ({cosine[-1]:.3f})'
    return [f'"{text}" ({share:.3f}) {less}' for text, share in zip(args.text, cosine[:-1], strict=True)]


def explained_in_words(
    args: Namespace, names: list[str], heads: dict[str, list[Head]], cosine: list[float]
) -> dict:
    """What is explained, and by what, for the settings."""
    found = {"methods": ", ".join(names)}
    if heads:
        parts = [f"{name}: {', '.join(map(head_name, of))}" for name, of in heads.items() if len(of) > 1]
        found = {"heads": "; ".join([", ".join(names), *parts])}
    if args.minus is not None:
        less = (
            f'the embedding of "{args.minus}" (cosine {cosine[-1]:.3f}) is subtracted from that of each text'
        )
        found["minus"] = f"{less}; methods other than the decomposition take the direction of the difference"
    return found


def save_pictures(
    folder: Path, image: Image.Image, names: list[str], titles: list[str], drawn: list[list[Tile]]
) -> list[str]:
    """The names of the files: every map beside the image, and all maps of each text in one sheet."""
    files, original = [], Tile(image, "image")
    for name, title, tiles in zip(names, titles, drawn, strict=True):
        pictures = {
            slug(tile.caption): sheet(title, [("", [original, tile])], LONG_SIDE, LEGEND) for tile in tiles
        }
        rows = [("", [original, *row]) for row in in_rows(tiles, ACROSS)]
        pictures["all"] = sheet(title, rows, note=f"{LEGEND} {SCALES}")
        for whose, picture in pictures.items():
            files.append(f"{name}-{whose}.png")
            save_picture(picture, folder / files[-1])
    return files


def save_maps(
    path: Path, names: list[str], maps: Maps, box: tuple[float, ...], size: tuple[int, int]
) -> None:
    """All maps as they are, by the names of their pictures; `box` (see `overlay`) is what they cover."""
    arrays = {
        f"{name}-{slug(whose)}": found[i] for i, name in enumerate(names) for whose, found in maps.items()
    }
    arrays = {name: heat.float().cpu().numpy() for name, heat in arrays.items()}
    if process_rank() > 0:
        return
    try:
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, box=np.array(box), image_size=np.array(size), **arrays)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def page(
    image: Image.Image, names: list[str], titles: list[str], drawn: list[list[Tile]], notes: list[str]
) -> list[report.Html]:
    """The same for report.html, with links to the files beside it."""
    seen = "Where in this image each text is seen: the stronger a colour, the more a patch adds to the score."
    links = [(f"{name}-all.png", title) for name, title in zip(names, titles, strict=True)]
    links += [("maps.npz", "the maps as numbers"), ("results.json", "the rest as numbers")]
    listed = [part for file, words in links for part in (report.tag("a", words, href=file), " \u00b7 ")]
    original, linked = (
        report.pictures([(image, "the image")], size=240),
        report.tag("p", "Files: ", *listed[:-1]),
    )
    sections = [report.section("What is seen", seen, original, linked, *notes)]
    for title, tiles in zip(titles, drawn, strict=True):
        pictures = [(tile.with_bar(), f"{tile.caption}: {tile.scale}") for tile in tiles]
        sections.append(report.section(title, report.pictures(pictures, size=160)))
    return sections


def refused_in_words(refused: dict[str, str]) -> list[str]:
    """A line for each reason why methods do not support the model."""
    return [
        f"Without {', '.join(method for method in refused if refused[method] == reason)}: {reason}"
        for reason in dict.fromkeys(refused.values())
    ]


def print_refused(refused: dict[str, str]) -> None:
    """Print these lines."""
    print("".join(f"{line}\n" for line in refused_in_words(refused)), end="")


def covers(box: tuple[float, ...], size: tuple[int, int]) -> bool:
    """Does the model see the whole image, but for less than a pixel?"""
    return box[0] <= 0.5 and box[1] <= 0.5 and box[2] >= size[0] - 0.5 and box[3] >= size[1] - 0.5
