"""--task ablation: which terms does zero-shot accuracy need? (section 3 of the paper)

A term is ablated by replacing it by its mean over the reference images; nothing is run again. One pass over the test images scores
every ablation on the way, so that nothing is kept of an image.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor

from decompose import Decomposition, decompose
from zeroshot import classifier, load_clip, templates

from . import pages
from .common import (
    LAST_LAYERS,
    Reference,
    name,
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

PAPER = "The paper, ImageNet, all MLPs ablated: ViT-B-16 70.2 to 67.0, ViT-L-14 75.3 to 74.1, ViT-H-14 78.0 to 76.3."


def run(args: Namespace) -> tuple[dict, list]:
    """Accuracy without the MLPs, without the class token's attention to itself, and without layers and heads."""
    clip = load_clip(args.model, args.pretrained, args.device, args.precision, args.image_size, args.out)
    test = open_split(args, clip, "test")
    names, labels = zero_shot_problem(test)
    classes = classifier(clip, names, templates(clip), title="classes")
    reference = summarise(clip, args)
    read = reference.maps @ classes.T  # [L, H, e, c] from values to class scores
    right = Sums()
    for images, indices in one_pass(clip, test, args, "test", right):
        truth = labels[indices].to(classes.device)
        for label, scores in ablations(decompose(clip.model, images), reference, classes, read):
            right.add(label, int((scores.argmax(dim=1) == truth).sum()))
    accuracy = {label: count / len(test) for label, count in right.sums.items()}
    where = settings(
        args,
        clip,
        test=f"{test.description}",
        means=reference.description + ("; on the images that are scored" if args.reference == "test" else ""),
        prompts=f"{len(templates(clip))} templates, {len(names):,} classes",
        sum=reference.sum(),
    )
    depth, heads = reference.maps.shape[:2]
    print_settings(where)
    print()
    print_tables(accuracy, len(test), depth, heads)
    results = {"settings": where, "images": len(test), "accuracy": accuracy}
    return results, pages.ablation(results, depth, heads, max(0, depth - LAST_LAYERS))


def ablations(
    terms: Decomposition, reference: Reference, classes: Tensor, read: Tensor
) -> list[tuple[str, Tensor]]:
    """(name, class scores [b, c]) of the embedding as it is, and after each ablation."""
    depth, heads = read.shape[:2]
    base = terms.embedding.to(read) @ classes.T
    away = reference.values.mean.to(read) - terms.values  # [b, L, H, e]
    by_layer = torch.stack(
        [away[:, i].flatten(1) @ read[i].flatten(0, 1) for i in range(depth)], dim=1
    )  # [b, L, c]
    mlps = (reference.mlps - terms.mlps) @ classes.T  # [b, L, c]
    stem = (reference.stem - terms.stem) @ classes.T
    found = [
        ("base", base),
        ("all MLPs", base + mlps.sum(dim=1)),
        ("all MLPs and stem", base + mlps.sum(dim=1) + stem),
    ]
    if terms.own is not None:
        own = (reference.own - terms.own).flatten(1) @ read.flatten(0, 2)
        found.append(("class token's attention to itself", base + own))
    if terms.pool is not None:
        found.append(("the pooling's own MLP", base + (reference.pool - terms.pool) @ classes.T))
    upto = by_layer.cumsum(dim=1)
    found += [(f"attention of layers 0 to {i}", base + upto[:, i]) for i in range(depth)]
    found += [(f"attention of layer {i}", base + by_layer[:, i]) for i in range(depth)]
    for layer in range(max(0, depth - LAST_LAYERS), depth):
        each = torch.einsum("bHe,Hec->bHc", away[:, layer], read[layer])
        found += [(f"head {name((layer, head))}", base + each[:, head]) for head in range(heads)]
    return found


def print_tables(accuracy: dict[str, float], count: int, depth: int, heads: int) -> None:
    rows = [
        [label, percent(accuracy[label], count)]
        for label in accuracy
        if not label.startswith(("attention of layer", "head "))
    ]
    print(table(["mean-ablated", "accuracy, %"], rows))
    print()
    layers = [
        [
            str(i),
            f"{100 * accuracy[f'attention of layers 0 to {i}']:.1f}",
            f"{100 * accuracy[f'attention of layer {i}']:.1f}",
        ]
        for i in range(depth)
    ]
    print(table(["attention of layer", "all up to it", "it alone"], layers))
    print()
    last = range(max(0, depth - LAST_LAYERS), depth)
    rows = [
        [f"layer {i}", *(f"{100 * accuracy[f'head {name((i, h))}']:.1f}" for h in range(heads))] for i in last
    ]
    print(table(["each head alone", *map(str, range(heads))], rows))
    print(f"\n[..]: 95 % interval (Wilson). {PAPER}")
