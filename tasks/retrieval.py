"""--task retrieval: the images that one head, or the heads of a role, find most like a query. (section 5)

An image is compared by what these heads write alone, less what they write on average; what they do not look
at does not count. That is kept of each image, in the heads' own space, and its embedding: what the whole
model finds is shown below, to compare with.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import report
from decompose import Decomposition, decompose, head_maps
from demo.images import DemoBirds
from demo.truth import same_factors, same_factors_in_words
from files import InputError
from roles import in_own_space
from zeroshot import embed_texts

from .accumulators import Rows
from .drawing import Tile, in_rows, save_picture, sheet
from .heads import Head, head_name, parse_heads
from .job import Images, Job, open_split, read_image
from .passes import one_pass
from .tables import print_settings, print_table, say
from .textspan import heads_of

ACROSS = 6  # images in a row of the contact sheet
SIZE = 160  # of pictures on the page


class Nearest(NamedTuple):
    """The images with the highest scores, from the highest on."""

    order: list[int]
    rows: list[dict]  # rank, score and caption of each
    tiles: list[Tile]
    itself: int | None  # the query, where it is one of the images: it is left out


def run(job: Job) -> tuple[dict, list]:
    """The nearest images by these heads and by the whole embedding, as tables and a contact sheet."""
    args = job.args
    check_options(args)
    query = None if args.image is None else read_image(job)
    maps, data = head_maps(job.clip.model), open_split(job, "test")
    asked = ask(job, query)  # what can fail goes before the passes over images
    listed = ",".join(args.head or ())
    heads = parse_heads(listed, *maps.shape[:2], "--head") if args.role is None else heads_of(job)
    scores = score_images(job, data, maps, heads, asked)
    ours, whole = (nearest(data, score, args.top, query) for score in scores)
    measure = "dot product with the text" if query is None else "cosine with the query"
    itself = {} if ours.itself is None else {"left out": f"the query itself, {data.caption(ours.itself)}"}
    where = print_settings(
        job,
        images=data.description,
        heads=", ".join(map(head_name, heads)) + ("" if args.role is None else f" (role {args.role!r})"),
        query=repr(args.text[0]) if query is None else args.image,
        measure=f"{measure}, of what these heads write less their mean over the images",
        **itself,
    )
    results = {"settings": where, "heads": [list(head) for head in heads], "found": ours.rows}
    results["whole embedding"] = whole.rows
    common = len({*ours.order} & {*whole.order})
    notes = [f"{common} of the {len(ours.order)} nearest are also the nearest by the whole embedding."]
    if isinstance(data, DemoBirds):
        agree, others = (same_factors(data, found.order) for found in (ours, whole))
        results |= {"agree": agree, "agree, whole embedding": others}
        shares = same_factors_in_words(others).partition(": ")[2]
        notes += [same_factors_in_words(agree), f"Of those nearest by the whole embedding: {shares}"]
    for name, found in (("nearest", ours), ("by the whole embedding", whole)):
        rows = [[str(row["rank"]), f"{row['score']:.3f}", row["image"]] for row in found.rows]
        print_table([name, "score", "image"], rows)
    path = args.out / "retrieval" / "sheet.png"
    notes = say(*notes, f"Contact sheet: {path}")
    shown = {f"By these heads: {measure}": ours.tiles, "By the whole embedding: cosine": whole.tiles}
    title = f"Nearest to {where['query']} by head{'s' * (len(heads) > 1)} {where['heads']}"
    save_picture(contact_sheet(title, query, shown), path)
    return results, page(title, query, shown, notes)


def check_options(args: Namespace) -> None:
    """Refuse options that do not name one query, and one head or role."""
    if (args.head is None) == (args.role is None):
        raise InputError("--task retrieval needs either --head L.H or --role CATEGORY")
    if (args.image is None) == (not args.text) or (args.text and len(args.text) > 1):
        raise InputError("--task retrieval needs either --image FILE or one --text TEXT")
    if args.text and not args.text[0].strip():
        raise InputError("--text is empty: give a text to look for")


def ask(job: Job, query: Image.Image | None) -> Tensor | Decomposition:
    """The embedding [d] of --text; or where the query is an image, its terms."""
    clip = job.clip
    if query is None:
        return embed_texts(clip, job.args.text)[0].cpu()
    return decompose(clip.model, clip.preprocess(query)[None].to(clip.device, clip.dtype))


def score_images(
    job: Job, data: Images, maps: Tensor, heads: list[Head], asked: Tensor | Decomposition
) -> tuple[Tensor, Tensor]:
    """How near each image is to what `ask` returned, by these heads [n] and by the whole embedding [n]."""
    layer, head = (list(index) for index in zip(*heads, strict=True))
    written, embeddings = Rows(), Rows()
    for images, _ in one_pass(job, data, "images", written, embeddings):
        terms = decompose(job.clip.model, images)
        written.add(terms.values[:, layer, head].flatten(1))
        embeddings.add(terms.embedding.float())
    kept, whole = written.tensor(), embeddings.tensor()  # [n, h e], [n, d]
    job.check_finite(kept)
    job.check_finite(whole)
    # From these heads' values, side by side, to the sum of their terms: [h e, d]
    A = maps[layer, head].flatten(0, 1).cpu()
    mean = kept.mean(dim=0)
    if isinstance(asked, Tensor):
        return (kept - mean) @ (A @ asked), F.cosine_similarity(whole, asked[None])
    own = asked.values[:, layer, head].flatten(1).cpu()
    return cosine(kept - mean, own - mean, A), F.cosine_similarity(whole, asked.embedding.float().cpu())


def nearest(data: Images, score: Tensor, top: int, query: Image.Image | None) -> Nearest:
    """The `top` images with the highest scores [n], without one that is the query, pixel by pixel."""
    found = Nearest([], [], [], None)
    for i in score.argsort(descending=True, stable=True).tolist():
        picture = data.picture(i)
        if query is not None and (picture.size, picture.tobytes()) == (query.size, query.tobytes()):
            found = found._replace(itself=i)
            continue
        found.order.append(i)
        row = {"rank": len(found.order), "score": float(score[i]), "image": data.caption(i)}
        found.rows.append(row)
        caption = f"{row['rank']}. ({row['score']:.3f}) {row['image']}"
        found.tiles.append(Tile(report.thumbnail(picture, SIZE), caption))
        if len(found.order) == top:
            break
    return found


def cosine(kept: Tensor, asked: Tensor, A: Tensor) -> Tensor:
    """[n] of the terms that values kept [n, k] and asked [1, k] stand for under A [k, d]."""
    own = in_own_space(torch.cat([kept, asked])[:, None, None], A[None, None])[:, 0, 0]
    return F.cosine_similarity(own[:-1], own[-1:], dim=1)


def contact_sheet(title: str, query: Image.Image | None, shown: dict[str, list[Tile]]) -> Image.Image:
    """The query, where it is an image, and what was found, in reading order under each heading."""
    rows = [] if query is None else [("", [Tile(query, "the query")])]
    for heading, tiles in shown.items():
        first, *others = in_rows(tiles, ACROSS)
        rows += [(heading, first), *(("", row) for row in others)]
    return sheet(title, rows)


def page(
    title: str, query: Image.Image | None, shown: dict[str, list[Tile]], notes: Sequence[str]
) -> list[str]:
    """The query and what was found, for report.html."""
    sections = [f"{title}: each image with its rank and (score); below, the nearest by the whole embedding."]
    if query is not None:
        sections.append(report.section("Query", report.pictures([(query, "the query")], size=SIZE)))
    for i, (heading, tiles) in enumerate(shown.items(), start=1):
        pictures = report.pictures([tile[:2] for tile in tiles], size=SIZE)
        sections.append(report.section(heading, pictures, note=notes if i == len(shown) else ""))
    return sections
