"""--task retrieval: the images that one head, or the heads of a role, find most like a query. (section 5)

An image is compared by what these heads write alone, less what they write on average; what they do not look
at does not count. Only that is kept of each image, in the heads' own space.
"""

from __future__ import annotations

import textwrap
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

import report
from cue import THRESHOLD
from data import read_picture
from decompose import decompose, head_maps
from demo.images import DemoBirds
from demo.truth import same_factors, same_factors_in_words
from files import InputError, did_you_mean
from roles import find_roles, in_own_space
from zeroshot import embed_texts

from .accumulators import Rows
from .heads import Head, head_name, parse_heads
from .heatmap import save_picture
from .job import Images, Job, open_split
from .passes import one_pass
from .reference import Kept, summarise
from .tables import print_settings, table
from .textspan import ROLE_IMAGES, one_category

TILE, ACROSS, GAP = 150, 6, 8  # of the contact sheet
SIZE = 144  # of pictures on the page


def run(job: Job) -> tuple[dict, list]:
    """The nearest images, as a table and a contact sheet."""
    args = job.args
    check_options(args)
    query = None if args.image is None else read_picture(Path(args.image))
    maps, data = head_maps(job.clip.model), open_split(job, "test")
    asked = ask(job, query)  # what can fail goes before the passes over images
    heads = parse_heads(args.head, *maps.shape[:2], "--head") if args.role is None else heads_of(job)
    score, measure = score_images(job, data, maps, heads, asked, by_text=query is None)
    order = score.argsort(descending=True, stable=True)[: args.top].tolist()
    pictures = [report.thumbnail(data.picture(i), SIZE) for i in order]
    path = args.out / "retrieval" / "sheet.png"
    save_picture(sheet(query, list(zip(pictures, map(data.caption, order), strict=True))), path)
    where = print_settings(
        job,
        images=data.description,
        heads=", ".join(map(head_name, heads)) + ("" if args.role is None else f" (role {args.role!r})"),
        query=repr(args.text[0]) if query is None else args.image,
        measure=f"{measure}, of what these heads write less their mean over the images",
    )
    ranked = enumerate(order, start=1)
    found = [{"rank": rank, "score": float(score[i]), "image": data.caption(i)} for rank, i in ranked]
    rows = [[str(row["rank"]), f"{row['score']:.3f}", row["image"]] for row in found]
    print("\n" + table(["nearest", "score", "image"], rows))
    results = {"settings": where, "heads": [list(head) for head in heads], "found": found}
    if isinstance(data, DemoBirds):
        results["agree"] = same_factors(data, order)
        print("\n" + same_factors_in_words(results["agree"]))
    print(f"\nContact sheet: {path}")
    return results, page(query, pictures, found)


def check_options(args: Namespace) -> None:
    """Refuse options that do not name one query, and one head or role."""
    if (args.head is None) == (args.role is None):
        raise InputError("--task retrieval needs either --head L.H or --role CATEGORY")
    if (args.image is None) == (not args.text) or (args.text and len(args.text) > 1):
        raise InputError("--task retrieval needs either --image FILE or one --text TEXT")
    if args.text and not args.text[0].strip():
        raise InputError("--text is empty: give a text to look for")


def ask(job: Job, query: Image.Image | None) -> Tensor:
    """The embedding [d] of --text; or where the query is an image, its values [1, L, H, e]."""
    clip = job.clip
    if query is None:
        return embed_texts(clip, job.args.text)[0].cpu()
    pixels = clip.preprocess(query)[None].to(clip.device, clip.dtype)
    return decompose(clip.model, pixels).values.cpu()


def score_images(
    job: Job, data: Images, maps: Tensor, heads: list[Head], asked: Tensor, by_text: bool
) -> tuple[Tensor, str]:
    """(how near each image is to what `ask` returned [n], the measure in words)."""
    layer, head = (list(index) for index in zip(*heads, strict=True))
    written = Rows()
    for images, _ in one_pass(job, data, "images", written):
        written.add(decompose(job.clip.model, images).values[:, layer, head].flatten(1))
    kept = written.tensor()  # [n, h e]
    job.check_finite(kept)
    # From these heads' values, side by side, to the sum of their terms: [h e, d]
    A = maps[layer, head].flatten(0, 1).cpu()
    mean = kept.mean(dim=0)
    if by_text:
        return (kept - mean) @ (A @ asked), "dot product with the text"
    return cosine(kept - mean, asked[:, layer, head].flatten(1) - mean, A), "cosine with the query"


def heads_of(job: Job) -> list[Head]:
    """The heads of all layers whose role --role is, found on the reference images."""
    args, bank = job.args, job.load_bank()
    if args.role not in bank.categories:
        choices = ", ".join(dict.fromkeys(bank.categories)) + did_you_mean(args.role, bank.categories)
        raise InputError(f"--role {args.role!r} is no category of {bank.path}: {choices}")
    if len(set(bank.categories)) < 2:
        raise InputError(f"--role {args.role!r}: {one_category(bank)}")
    data = open_split(job, args.reference)
    kept = Kept(len(data), ROLE_IMAGES, args.seed, slice(None))
    maps = summarise(job, kept, data).maps
    texts = embed_texts(job.clip, bank.texts, "text bank")
    values, embedding = kept.values.tensor(), kept.embedding.tensor()
    roles = find_roles(values, maps, embedding, texts, bank.categories, seed=args.seed)
    depth, heads = maps.shape[:2]
    every = [(layer, head) for layer in range(depth) for head in range(heads)]
    found = [head for head in every if roles.name(*head) == args.role]
    if not found:
        why = f"the category explains over {THRESHOLD:.0%} of none, or no more than texts dealt at random"
        raise InputError(f"no head has the role {args.role!r}: {why}")
    return found


def cosine(kept: Tensor, asked: Tensor, A: Tensor) -> Tensor:
    """[n] of the terms that values kept [n, k] and asked [1, k] stand for under A [k, d]."""
    own = in_own_space(torch.cat([kept, asked])[:, None, None], A[None, None])[:, 0, 0]
    return F.cosine_similarity(own[:-1], own[-1:], dim=1)


def sheet(query: Image.Image | None, items: list[tuple[Image.Image, str]]) -> Image.Image:
    """The query, where it is an image, and what was found, in reading order."""
    tiles = [(image, f"{i}. {text}") for i, (image, text) in enumerate(items, start=1)]
    if query is not None:
        tiles = [(query, "query"), *tiles]
    across, font = min(ACROSS, len(tiles)), ImageFont.load_default(12)
    size = (across * (TILE + GAP) + GAP, -(-len(tiles) // across) * (TILE + 40) + GAP)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for k, (image, text) in enumerate(tiles):
        left, top = GAP + k % across * (TILE + GAP), GAP + k // across * (TILE + 40)
        method = Image.Resampling.BICUBIC if max(image.size) > TILE else Image.Resampling.NEAREST
        picture.paste(ImageOps.pad(image, (TILE, TILE), method), (left, top))
        draw.multiline_text((left, top + TILE + 2), "\n".join(textwrap.wrap(text, 25)[:2]), "#333", font)
    return picture


def page(query: Image.Image | None, pictures: list[Image.Image], found: list[dict]) -> list[report.Html]:
    """The query and what was found, for report.html."""
    captions = [f"{row['rank']}. {row['image']} ({row['score']:.2f})" for row in found]
    nearest = list(zip(pictures, captions, strict=True))
    sections = [report.section("Nearest", report.pictures(nearest, size=SIZE))]
    if query is not None:
        sections.insert(0, report.section("Query", report.pictures([(query, "the query")], size=160)))
    return sections
