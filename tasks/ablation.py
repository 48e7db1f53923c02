"""--task ablation: which terms does zero-shot accuracy need? (section 3 of the paper)

A term is ablated by replacing it by its mean over the reference images; nothing is run again. One pass over
the test images scores every ablation, so nothing is kept of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

import report
from decompose import Decomposition, decompose

from .accumulators import Sums
from .heads import LAST_LAYERS, head_name
from .job import Job, open_zero_shot
from .passes import one_pass
from .reference import Reference, authors_terms, summarise
from .tables import in_percent, in_tenths, percent, print_settings, say, table, zero_shot_settings

PAPER = "ViT-B-16 70.2 to 67.0, ViT-L-14 75.3 to 74.1, ViT-H-14 78.0 to 76.3"


def run(job: Job) -> tuple[dict, list]:
    """Accuracy without the MLPs, the class token's attention to itself, each layer, and each head."""
    test, names, labels, classes = open_zero_shot(job)
    reference = summarise(job, terms_of=authors_terms if job.args.protocol == "authors" else decompose)
    read = reference.read(classes)  # [L, H, e, c] from values to class scores
    right = Sums()
    for images, indices in one_pass(job, test, "test", right):
        truth = labels[indices].to(classes.device)
        found = ablations(reference.terms_of(job.clip.model, images), reference, classes, read)
        for label, scores in found.items():
            right.add(label, int((scores.argmax(dim=1) == truth).sum()))
    accuracy = {label: count / len(test) for label, count in right.sums.items()}
    common = zero_shot_settings(job, test, reference.description, len(names))
    where = print_settings(job, **common, sum=reference.sum_error())
    depth, heads = read.shape[:2]
    notes = print_tables(accuracy, len(test), depth, heads)
    results = {"settings": where, "images": len(test), "accuracy": accuracy}
    return results, page(accuracy, len(test), depth, heads, notes)


def ablations(terms: Decomposition, reference: Reference, classes: Tensor, read: Tensor) -> dict[str, Tensor]:
    """{name: class scores [b, c]} of the embedding as it is, and after each ablation; read [L, H, e, c]."""
    depth, heads = read.shape[:2]
    base = terms.embedding.to(read) @ classes.T
    away = reference.values.mean.to(read) - terms.values  # [b, L, H, e]
    by_layer = torch.stack([away[:, i].flatten(1) @ read[i].flatten(0, 1) for i in range(depth)], dim=1)
    all_mlps = base + ((reference.mlps - terms.mlps) @ classes.T).sum(dim=1)
    stem = (reference.stem - terms.stem) @ classes.T
    found = {"base": base, "all MLPs": all_mlps, "all MLPs and stem": all_mlps + stem}
    if terms.own is not None:
        own = (reference.own - terms.own).flatten(1) @ read.flatten(0, 2)
        found["class token's attention to itself"] = base + own
    if terms.pool is not None:
        found["the pooling's own MLP"] = base + (reference.pool - terms.pool) @ classes.T
    up_to = by_layer.cumsum(dim=1)
    found |= {f"attention of layers 0 to {i}": base + up_to[:, i] for i in range(depth)}
    found |= {f"attention of layer {i}": base + by_layer[:, i] for i in range(depth)}
    for layer in last_layers(depth):
        each = torch.einsum("bHe,Hec->bHc", away[:, layer], read[layer])
        found |= {f"head {head_name((layer, head))}": base + each[:, head] for head in range(heads)}
    return found


def last_layers(depth: int) -> range:
    return range(max(0, depth - LAST_LAYERS), depth)


def head_rows(accuracy: dict[str, float], depth: int, heads: int) -> list[list[str]]:
    """The accuracy without each head of the last layers, a row for each layer."""
    names = {i: [f"head {head_name((i, head))}" for head in range(heads)] for i in last_layers(depth)}
    return [[f"layer {i}", *in_tenths(accuracy[name] for name in row)] for i, row in names.items()]


def whole_groups(accuracy: dict[str, float]) -> list[str]:
    return [label for label in accuracy if not label.startswith(("attention of layer", "head "))]


def print_tables(accuracy: dict[str, float], count: int, depth: int, heads: int) -> tuple[str, ...]:
    """All accuracies; returns the notes below them."""
    rows = [[label, percent(accuracy[label], count)] for label in whole_groups(accuracy)]
    print("\n" + table(["mean-ablated", "accuracy, %"], rows))
    layers = []
    for i in range(depth):
        both = accuracy[f"attention of layers 0 to {i}"], accuracy[f"attention of layer {i}"]
        layers.append([str(i), *in_tenths(both)])
    print("\n" + table(["attention of layer", "all up to it", "it alone"], layers))
    header = ["each head alone", *map(str, range(heads))]
    print("\n" + table(header, head_rows(accuracy, depth, heads)))
    return say(f"[..]: 95 % interval (Wilson). The paper, ImageNet, all MLPs ablated: {PAPER}.")


def page(accuracy: dict[str, float], count: int, depth: int, heads: int, notes: tuple) -> list[str]:
    """The same for report.html, drawn."""
    groups = {"": [(label, *in_percent(accuracy[label], count)) for label in whole_groups(accuracy)]}
    by_group = report.intervals(groups, "Accuracy when mean-ablated, 95 % intervals (Wilson)", "accuracy, %")
    starts = {"all up to this layer": "attention of layers 0 to", "this layer alone": "attention of layer"}
    layers = {k: [(i, 100 * accuracy[f"{start} {i}"]) for i in range(depth)] for k, start in starts.items()}
    title, base = "Accuracy without the attention of", {"unchanged": 100 * accuracy["base"]}
    by_layer = report.curves(layers, "layer", "accuracy, %", title, lines=base)
    each = [(i, head) for i in last_layers(depth) for head in range(heads)]
    shares = {head: 100 * accuracy[f"head {head_name(head)}"] for head in each}
    by_head = report.by_value(shares, "Accuracy without each head, %", 100 * accuracy["base"], "unchanged")
    words = "Accuracy in percent without this head; the colour is its difference from the unchanged model."
    return [
        "Accuracy when terms are replaced by their means; what the model needs is where it falls.",
        report.section("Groups of terms, and layers", by_group, by_layer, note=notes),
        report.section("Each head alone", words, by_head),
    ]
