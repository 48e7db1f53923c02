"""--task completeness: how much of what the heads write do their texts hold? (section 4 of the paper)

Each head of the last four layers is replaced by its mean plus its part along its first m texts; every other term by its mean. A
longer list begins with the shorter one, so one run of TextSpan per head and pool of texts serves every m.
"""

from __future__ import annotations

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from decompose import decompose
from zeroshot import Clip, classifier, default_bank, embed_texts, load_bank, load_clip, templates

from . import pages
from .common import (
    LAST_LAYERS,
    Reference,
    open_split,
    percent,
    print_settings,
    settings,
    summarise,
    table,
    zero_shot_problem,
)
from .parts import Sums
from .passes import one_pass
from .textspan import name_head

SIZES = (0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 30, 40, 50, 60)
MEAN_ONLY = "nothing but means"


def run(args: Namespace) -> tuple[dict, list]:
    """Accuracy against the number of texts per head, for several pools of texts."""
    clip = load_clip(args.model, args.pretrained, args.device, args.precision, args.image_size, args.out)
    test = open_split(args, clip, "test")
    names, labels = zero_shot_problem(test)
    classes = classifier(clip, names, templates(clip), title="classes")
    pools = text_pools(args, clip, names)
    reference = summarise(clip, args)
    depth, _, width, _ = reference.maps.shape
    sizes = [m for m in SIZES if m <= min(width, args.texts or width)]
    first = max(0, depth - LAST_LAYERS)
    reads = {pool: read_along(texts, reference, first, classes, sizes, pool) for pool, texts in pools.items()}

    # What stays of every image when all terms but the heads' deviations are means.
    still = reference.embedding.mean.to(classes) @ classes.T
    maps, right = reference.maps[first:], Sums()
    read_all = (maps @ classes.T).flatten(0, 2)  # [l H e, c]
    for images, indices in one_pass(clip, test, args, "test", right):
        truth = labels[indices].to(classes.device)
        terms = decompose(clip.model, images)
        away = terms.values[:, first:] - reference.values.mean[first:].to(maps)  # [b, l, H, e]
        scores = {("unchanged", None): terms.embedding.to(classes) @ classes.T}
        scores["last layers' heads, whole", None] = still + away.flatten(1) @ read_all
        for key, value in (scores | along_texts(away, still, reads, sizes)).items():
            right.add(key, int((value.argmax(dim=1) == truth).sum()))
    accuracy = {key: count / len(test) for key, count in right.sums.items()}
    where = settings(
        args,
        clip,
        test=test.description,
        means=reference.description + ("; on the images that are scored" if args.reference == "test" else ""),
        prompts=f"{len(templates(clip))} templates, {len(names):,} classes",
        heads=f"layers {first} to {depth - 1}; every other term is its mean",
        sum=reference.sum(),
        pools="; ".join(f"{pool}: {len(texts):,} texts" for pool, texts in pools.items()),
    )
    print_settings(where)
    print()
    rows = [[str(m), *(f"{100 * accuracy[pool, m]:.1f}" for pool in pools)] for m in sizes]
    print(table(["texts per head", *pools], rows))
    whole = {key: accuracy[key, None] for key in ("unchanged", "last layers' heads, whole")}
    print("\n" + "\n".join(f"{key + ':':<28}{percent(value, len(test))}" for key, value in whole.items()))
    print("The paper, ViT-L-14 on ImageNet: 72.8 with 60 texts per head, 75.3 unchanged.")
    curves = {pool: [(m, accuracy[pool, m]) for m in sizes] for pool in pools}
    results = {"settings": where, "images": len(test), "curves": curves, "whole": whole}
    return results, pages.completeness(results)


def along_texts(
    away: Tensor, still: Tensor, reads: dict[str, tuple[Tensor, Tensor]], sizes: list[int]
) -> dict[tuple[str, int], Tensor]:
    """{(pool, m): [b, c]} class scores with each head's deviation [b, l, H, e] from its mean kept along its first m texts alone."""
    scores = {}
    for pool, (coordinates, read) in reads.items():
        along = torch.einsum("blHe,lHem->blHm", away, coordinates)
        upto, done = still.expand(len(away), -1), 0
        for m in sizes:
            upto = upto + along[..., done:m].flatten(1) @ read[:, :, done:m].flatten(0, 2)
            scores[pool, m], done = upto, m
    return scores


def text_pools(args: Namespace, clip: Clip, names: list[str]) -> dict[str, Tensor]:
    """[t, d] each: the bank, the user's words, the classes' own prompts, and random vectors as many as the bank has texts."""
    bank = load_bank(args.text_bank or default_bank(clip))
    embedded = embed_texts(clip, bank.texts, "text bank")
    pools = {"descriptions": embedded}
    if args.words is not None:
        pools["words"] = embed_texts(clip, load_bank(args.words).texts, "words")
    prompts = [
        template(name) if callable(template) else template.format(name)
        for name in names
        for template in templates(clip)[:6]
    ]
    pools["class prompts"] = embed_texts(clip, list(dict.fromkeys(prompts)), "class prompts")
    pools["random vectors"] = random_texts(embedded, args.seed)
    return pools


def random_texts(texts: Tensor, seed: int) -> Tensor:
    """As many unit vectors as there are texts, with their mean and covariance: what a list of texts gains without saying anything."""
    rows = texts.double().cpu()
    mean, generator = rows.mean(dim=0), torch.Generator().manual_seed(seed)
    _, strength, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    draws = torch.randn(len(rows), len(strength), dtype=torch.float64, generator=generator)
    return F.normalize(mean + draws * strength / len(rows) ** 0.5 @ directions, dim=-1).to(texts)


def read_along(
    texts: Tensor, reference: Reference, first: int, classes: Tensor, sizes: list[int], pool: str
) -> tuple[Tensor, Tensor]:
    """From a head's values to coordinates along its texts [l, H, e, m], from those to class scores [l, H, m, c]; 0 past its texts."""
    maps, most = reference.maps[first:], max(sizes)
    coordinates = maps.new_zeros(*maps.shape[:3], most)
    read = maps.new_zeros(*maps.shape[:2], most, len(classes))
    texts = texts.cpu().double()
    for layer in tqdm(range(len(maps)), desc=f"TextSpan, {pool}", unit="layer", leave=False):
        for head in range(maps.shape[1]):
            moments = reference.values[first + layer, head].map(maps[layer, head])
            span = name_head(moments, texts, min(most, len(texts)), asked=False, head=(first + layer, head))
            if span.indices:
                Q = F.normalize(span.directions, dim=-1).to(maps)  # [m, d] orthonormal rows
                coordinates[layer, head, :, : len(Q)] = maps[layer, head] @ Q.T
                read[layer, head, : len(Q)] = Q @ classes.T
    return coordinates, read
