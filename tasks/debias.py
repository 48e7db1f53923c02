"""--task debias: take any cue out of any zero-shot classifier, and know what that did.

Needs the classes' names, texts for the cue and a folder of images. Without labels it says what can be known: which heads look at the
cue, how many predictions change, and how much of the difference between class scores follows the cue, before and after. Where folders
or metadata give labels, also the accuracies.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor

from datasets import DemoBirds, ImageFolder, InputError, Waterbirds
from roles import explained
from zeroshot import classifier, load_clip, templates

from . import pages
from .common import open_split, percent, print_settings, settings, table
from .removal import Scores, interventions, look_for_cue, pick, random_heads, score

Images = DemoBirds | Waterbirds | ImageFolder


def run(args: Namespace) -> tuple[dict, list]:
    """Predictions with and without the cue, with or without labels."""
    clip = load_clip(args.model, args.pretrained, args.device, args.precision, args.image_size)
    test = open_split(args, clip, "test")
    names, labels = class_problem(args, test)
    cue = look_for_cue(args, clip)
    scores = score(clip, args, test, cue, classifier(clip, names, templates(clip)))
    changes = {"base": torch.zeros_like(scores.embedding)} | interventions(args, scores, cue.heads)
    place = getattr(test, "place", None)
    group = None if labels is None or place is None else labels * (int(place.max()) + 1) + place
    rows = {label: measure(scores, change, labels, group) for label, change in changes.items()}
    draws = random_heads(cue.heads, scores.heads.shape[2], args.draws, args.seed)
    control = [measure(scores, pick(scores.heads, drawn), labels, group) for drawn in draws]
    where = settings(
        args,
        clip,
        images=test.description,
        classes=f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}; {len(templates(clip))} templates",
        labels="none given" if labels is None else "from the folders or metadata; used for the accuracies alone",
        means=cue.reference.description,
        **cue.words(),
        sum=cue.reference.sum(),
    )
    print_settings(where)
    print()
    print_rows(rows, control, len(test), len(cue.heads))
    heads = [list(head) for head in cue.heads]
    results = {"settings": where, "rows": rows, "random": control, "explained": cue.explained.tolist(), "heads": heads}
    return results, pages.debias(results)


def class_problem(args: Namespace, test: Images) -> tuple[list[str], Tensor | None]:
    """The classes to tell, and each image's where it is known: --classes, else the data's own."""
    own, y = list(test.classes), test.y
    if args.classes is None:
        if len(own) < 2:
            raise InputError("--task debias needs --classes: at least two names to tell the images by (their folders name none)")
        return own, y
    names = list(args.classes)
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"--classes needs at least two names, each once; found {', '.join(names)}")
    if y is None or not set(own) <= set(names):  # the folders mean something else
        return names, None
    return names, torch.tensor([names.index(name) for name in own])[y]


def measure(scores: Scores, change: Tensor, labels: Tensor | None, group: Tensor | None) -> dict:
    """What one intervention did. cue: share of the variance of class scores, less their mean, between images of different cue text."""
    now = scores.embedding + change
    predicted = now.argmax(dim=1)
    relative = now - now.mean(dim=1, keepdim=True)
    row = {
        "changed": float((predicted != scores.embedding.argmax(dim=1)).double().mean()),
        "cue": float(explained(relative[:, None, None], scores.label)),
    }
    if labels is not None:
        right = (predicted == labels).double()
        row["average"] = float(right.mean())
        row["worst class"] = min(float(right[labels == c].mean()) for c in labels.unique())
    if group is not None:
        row["worst group"] = min(float(right[group == g].mean()) for g in group.unique())
    return row


def print_rows(rows: dict[str, dict], control: list[dict], count: int, heads: int) -> None:
    accuracies = [key for key in ("average", "worst class", "worst group") if key in rows["base"]]
    header = ["%", "predictions changed", "follows the cue", *accuracies]
    lines = [
        [label, f"{100 * row['changed']:.1f}", f"{100 * row['cue']:.1f}", *(percent(row[key], count) for key in accuracies[:1]),
         *(f"{100 * row[key]:.1f}" for key in accuracies[1:])]
        for label, row in rows.items()
    ]  # fmt: skip
    if control:
        both = {key: torch.tensor([row[key] for row in control], dtype=torch.float64) for key in ("changed", "cue", *accuracies)}
        shown = [f"{100 * x.mean():.1f} ± {100 * x.std(correction=0):.1f}" for x in both.values()]
        lines.append([f"{heads} random heads, mean ± std", *shown])
    print(table(header, lines))
    print("\nFollows the cue: share of the variance of class scores between images that different texts of the cue fit best, corrected")
    print("for their number. It falls where the classifier stops using the cue, but not to 0 where the cue truly goes with a class.")
