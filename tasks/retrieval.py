"""--task retrieval: the images that one head, or the heads of one role, find most like a query. (section 5 of the paper)

An image is compared by what these heads write alone, less what they write on average; what they do not look at does not count. Only
that is kept of each image, in the heads' own space.
"""

from __future__ import annotations

import textwrap
from argparse import Namespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from cue import THRESHOLD
from data import DemoBirds, InputError
from decompose import decompose, head_maps
from roles import find_roles, in_own_space
from zeroshot import Clip, default_bank, embed_texts, load_bank, load_clip

from . import pages
from .common import (
    Head,
    Kept,
    name,
    open_picture,
    open_split,
    parse_heads,
    print_settings,
    save_picture,
    settings,
    summarise,
    table,
)
from .parts import Rows
from .passes import one_pass
from .textspan import ROLE_IMAGES

TILE, ACROSS, GAP = 150, 6, 8  # of the contact sheet


def run(args: Namespace) -> tuple[dict, list]:
    """The nearest images, as a table and a contact sheet."""
    if (args.head is None) == (args.role is None):
        raise InputError("--task retrieval needs either --head L.H or --role CATEGORY")
    if (args.image is None) == (not args.text) or (args.text and len(args.text) > 1):
        raise InputError("--task retrieval needs either --image FILE or one --text TEXT")
    if args.text and not args.text[0].strip():
        raise InputError("--text is empty: give a text to look for")
    query = None if args.image is None else open_picture(args.image)
    clip = load_clip(args.model, args.pretrained, args.device, args.precision, args.image_size, args.out)
    maps = head_maps(clip.model)
    heads = parse_heads(args.head, *maps.shape[:2], "--head") if args.role is None else heads_of(args, clip)
    layer, head = (list(index) for index in zip(*heads, strict=True))
    data = open_split(args, clip, "test")
    A = maps[layer, head].flatten(
        0, 1
    )  # [h e, d] from these heads' values, side by side, to the sum of their terms

    written = Rows()
    for images, _ in one_pass(clip, data, args, "images", written):
        written.add(decompose(clip.model, images).values[:, layer, head].flatten(1))
    kept = written.tensor()
    if not kept.isfinite().all():
        raise InputError(
            f"{clip.name} in {args.precision} gives embeddings that are not numbers; try --precision fp32"
        )
    mean, A = kept.mean(dim=0), A.cpu()
    if query is None:
        score = (kept - mean) @ (A @ embed_texts(clip, args.text)[0].cpu())
        measure = "dot product with the text"
    else:
        pixels = clip.preprocess(query)[None].to(clip.device, clip.dtype)
        asked = decompose(clip.model, pixels).values[:, layer, head].flatten(1).cpu()
        score = cosine(kept - mean, asked - mean, A)
        measure = "cosine with the query"
    order = score.argsort(descending=True, stable=True)[: args.top].tolist()
    where = settings(
        args,
        clip,
        images=data.description,
        heads=", ".join(map(name, heads)) + ("" if args.role is None else f" (role {args.role!r})"),
        query=repr(args.text[0]) if query is None else args.image,
        measure=f"{measure}, of what these heads write less their mean over the images",
    )
    found = [
        {"rank": rank, "score": float(score[i]), "image": data.caption(i)}
        for rank, i in enumerate(order, start=1)
    ]
    path = args.out / "retrieval" / "sheet.png"
    items = [(data.picture(i), data.caption(i)) for i in order]
    save_picture(sheet(query, items), path)
    print_settings(where)
    print()
    print(
        table(
            ["nearest", "score", "image"],
            [[str(row["rank"]), f"{row['score']:.3f}", row["image"]] for row in found],
        )
    )
    results = {"settings": where, "heads": [list(head) for head in heads], "found": found}
    if isinstance(data, DemoBirds):
        results["agree"] = agree(data, order)
        words = ", ".join(
            f"{factor} {share:.0%} (all images {chance:.0%})"
            for factor, (share, chance) in results["agree"].items()
        )
        print(f"\nPairs of these images that are the same in: {words}")
    print(f"\nContact sheet: {path}")
    return results, pages.retrieval(results, query, items)


def heads_of(args: Namespace, clip: Clip) -> list[Head]:
    """The heads of all layers whose role --role is, found on the reference images."""
    bank = load_bank(args.text_bank or default_bank(clip))
    if args.role not in bank.categories:
        raise InputError(
            f"--role {args.role!r} is no category of {bank.path}: {', '.join(dict.fromkeys(bank.categories))}"
        )
    data = open_split(args, clip, args.reference)
    kept = Kept(len(data), ROLE_IMAGES, args.seed, slice(None))
    reference = summarise(clip, args, kept, data)
    texts = embed_texts(clip, bank.texts, "text bank")
    roles = find_roles(
        kept.done().values,
        reference.maps,
        kept.embedding,
        texts,
        bank.categories,
        bootstraps=0,
        seed=args.seed,
    )
    depth, heads = reference.maps.shape[:2]
    found = [
        (layer, head)
        for layer in range(depth)
        for head in range(heads)
        if roles.name(layer, head) == args.role
    ]
    if not found:
        raise InputError(
            f"no head has the role {args.role!r}: the category explains over {THRESHOLD:.0%} of none, or no more than random texts"
        )
    return found


def cosine(kept: Tensor, asked: Tensor, A: Tensor) -> Tensor:
    """[n] of the terms that values kept [n, k] and asked [1, k] stand for under A [k, d]."""
    own = in_own_space(torch.cat([kept, asked])[:, None, None], A[None, None])[:, 0, 0]
    return F.cosine_similarity(own[:-1], own[-1:], dim=1)


def agree(data: DemoBirds, order: list[int]) -> dict[str, tuple[float, float]]:
    """{factor: share of pairs of these images that have the same value, and of all pairs}."""
    found = {}
    for factor, values in data.facts.items():
        counts = [torch.bincount(rows).double() for rows in (values[order], values)]
        found[factor] = tuple(float((n * (n - 1)).sum() / max(n.sum() * (n.sum() - 1), 1)) for n in counts)
    return found


def sheet(query: Image.Image | None, items: list[tuple[Image.Image, str]]) -> Image.Image:
    """The query, where it is an image, and what was found, in reading order."""
    tiles = [
        *([(query, "query")] if query is not None else []),
        *((image, f"{i}. {text}") for i, (image, text) in enumerate(items, 1)),
    ]
    across, font = min(ACROSS, len(tiles)), ImageFont.load_default(12)
    picture = Image.new(
        "RGB", (across * (TILE + GAP) + GAP, -(-len(tiles) // across) * (TILE + 40) + GAP), "white"
    )
    draw = ImageDraw.Draw(picture)
    for k, (image, text) in enumerate(tiles):
        left, top = GAP + k % across * (TILE + GAP), GAP + k // across * (TILE + 40)
        square = ImageOps.pad(
            image,
            (TILE, TILE),
            Image.Resampling.BICUBIC if max(image.size) > TILE else Image.Resampling.NEAREST,
        )
        picture.paste(square, (left, top))
        draw.multiline_text((left, top + TILE + 2), "\n".join(textwrap.wrap(text, 25)[:2]), "#333", font)
    return picture
