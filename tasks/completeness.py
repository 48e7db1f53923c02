"""--task completeness: how much of what the heads write do their texts hold? (section 4 of the paper)

Each head of the last four layers is replaced by its mean plus its part along its first m texts; every other
term by its mean. A longer list begins with the shorter one, so one run of TextSpan per head and pool of texts
serves every m.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import report
from decompose import decompose
from zeroshot import embed_texts, fill_templates, templates

from .accumulators import Sums
from .heads import LAST_LAYERS
from .job import Job, open_zero_shot
from .passes import one_pass
from .reference import Reference, summarise
from .tables import Shown, in_tenths, percent, print_settings, print_table, say, zero_shot_settings
from .textspan import name_head

SIZES = (0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 30, 40, 50, 60)
WHOLE = "last layers' heads, whole"


def run(job: Job) -> tuple[dict, list]:
    """Accuracy against the number of texts per head, for several pools of texts."""
    test, names, labels, classes = open_zero_shot(job)
    pools = text_pools(job, names)
    reference = summarise(job)
    depth, _, width, _ = reference.maps.shape
    sizes = [m for m in SIZES if m <= min(width, job.args.texts or width)]
    first = max(0, depth - LAST_LAYERS)
    reads = {pool: read_along(texts, reference, first, classes, sizes, pool) for pool, texts in pools.items()}

    # The class scores of an image when all terms but the heads' deviations are means.
    still = reference.embedding.mean.to(classes) @ classes.T
    maps, right = reference.maps[first:], Sums()
    read_all = (maps @ classes.T).flatten(0, 2)  # [l H e, c]
    for images, indices in one_pass(job, test, "test", right):
        truth = labels[indices].to(classes.device)
        terms = decompose(job.clip.model, images)
        away = terms.values[:, first:] - reference.values.mean[first:].to(maps)  # [b, l, H, e]
        scores = along_texts(away, still, reads, sizes)
        scores["unchanged", None] = terms.embedding.to(classes) @ classes.T
        scores[WHOLE, None] = still + away.flatten(1) @ read_all
        for key, value in scores.items():
            right.add(key, int((value.argmax(dim=1) == truth).sum()))

    accuracy = {key: count / len(test) for key, count in right.sums.items()}
    where = print_settings(
        job,
        **zero_shot_settings(job, test, reference.description, len(names)),
        heads=f"layers {first} to {depth - 1}; every other term is its mean",
        sum=reference.sum_error(),
        pools="; ".join(f"{pool}: {len(texts):,} texts" for pool, texts in pools.items()),
    )
    results = {
        "settings": where,
        "images": len(test),
        "curves": {pool: [(m, accuracy[pool, m]) for m in sizes] for pool in pools},
        "whole": {key: accuracy[key, None] for key in ("unchanged", WHOLE)},
    }
    return results, page(results, print_results(results))


def along_texts(
    away: Tensor, still: Tensor, reads: dict[str, tuple[Tensor, Tensor]], sizes: list[int]
) -> dict[tuple[str, int], Tensor]:
    """{(pool, m): class scores [b, c]} with each head's deviation from its mean kept along its m texts alone.

    Args:
        away: [b, l, H, e] the deviations.
        still: [c] class scores of the mean embedding.
        reads: of each pool, what `read_along` returns.
    """
    scores = {}
    for pool, (coordinates, read) in reads.items():
        along = torch.einsum("blHe,lHem->blHm", away, coordinates)
        up_to, done = still.expand(len(away), -1), 0
        for m in sizes:
            up_to = up_to + along[..., done:m].flatten(1) @ read[:, :, done:m].flatten(0, 2)
            scores[pool, m] = up_to
            done = m
    return scores


def text_pools(job: Job, names: list[str]) -> dict[str, Tensor]:
    """[t, d] each: the bank, the user's words, prompts of the classes, and random vectors."""
    clip = job.clip
    embedded = embed_texts(clip, job.load_bank().texts, "text bank")
    pools = {"descriptions": embedded}
    if job.args.words is not None:
        pools["words"] = embed_texts(clip, job.load_bank(job.args.words, "--words").texts, "words")
    prompts = dict.fromkeys(fill_templates(names, templates(clip)[:6]))
    pools["class prompts"] = embed_texts(clip, list(prompts), "class prompts")
    pools["random vectors"] = random_texts(embedded, job.args.seed)
    return pools


def random_texts(texts: Tensor, seed: int) -> Tensor:
    """As many unit vectors as there are texts, with their mean and covariance: texts that say nothing."""
    rows = texts.cpu().double()
    mean, generator = rows.mean(dim=0), torch.Generator().manual_seed(seed)
    _, strength, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    draws = torch.randn(len(rows), len(strength), dtype=torch.float64, generator=generator)
    return F.normalize(mean + draws * strength / len(rows) ** 0.5 @ directions, dim=-1).to(texts)


def read_along(
    texts: Tensor, reference: Reference, first: int, classes: Tensor, sizes: list[int], pool: str
) -> tuple[Tensor, Tensor]:
    """The texts of every head from layer `first` on, as two maps, which are 0 past the head's texts.

    Returns:
        From a head's values to coordinates along its texts [l, H, e, m]; from those to class scores
        [l, H, m, c].
    """
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


def print_results(results: dict) -> Shown:
    """A table of pools of texts by number of texts, and what these compare with: for the page, too."""
    curves = results["curves"]
    header = ["texts per head", *curves]
    columns = zip(*curves.values(), strict=True)
    rows = [[str(points[0][0]), *in_tenths(accuracy for _, accuracy in points)] for points in columns]
    shown, count = print_table(header, rows), results["images"]
    whole = [f"{key + ':':<28}{percent(accuracy, count)}" for key, accuracy in results["whole"].items()]
    return shown, say(*whole, "The paper, ViT-L-14 on ImageNet: 72.8 with 60 texts per head, 75.3 unchanged.")


def page(results: dict, shown: Shown) -> list[str]:
    """The same for report.html, drawn."""
    curves = results["curves"].items()
    series = {pool: [(m, 100 * accuracy) for m, accuracy in points] for pool, points in curves}
    lines = {key: 100 * value for key, value in results["whole"].items()}
    title = "Accuracy when heads are replaced by their texts"
    drawn = report.curves(series, "texts per head", "accuracy, %", title, lines=lines)
    lead = "Accuracy when each head keeps only what lies along its first texts: the sooner a curve reaches "
    lead += "the line of the whole heads, the more its texts hold."
    title = "How much of the heads do their texts hold?"
    return [lead, report.section(title, drawn, shown[0], note=shown[1])]
