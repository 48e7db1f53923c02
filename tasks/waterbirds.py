"""--task waterbirds: take the background out of what decides between landbird and waterbird (section 4 of the paper)."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter

import torch
from torch import Tensor

from datasets import DemoBirds, InputError, Waterbirds
from zeroshot import classifier, load_clip, templates

from . import pages
from .common import Head, open_split, percent, print_settings, settings, table
from .removal import Scores, interventions, look_for_cue, pick, random_heads, score

GROUPS = ("land/land", "land/water", "water/land", "water/water")  # bird/place


def run(args: Namespace) -> tuple[dict, list]:
    """Accuracy by group: as it is, without the cue's heads or directions, and without random heads."""
    clip = load_clip(args.model, args.pretrained, args.device, args.precision, args.image_size)
    if args.data is not None:
        Waterbirds(args.data, "test", clip.preprocess)  # other folders have no groups: refused here
    test = open_split(args, clip, "test")
    seen = Counter((2 * test.y + test.place).tolist())
    if len(seen) < 4:
        missing = next(group for i, group in enumerate(GROUPS) if i not in seen)
        raise InputError(f"the test images hold none of group {missing} (bird/place), and worst-group accuracy needs all four groups")

    cue = look_for_cue(args, clip)
    names = [*test.classes, *(test.kinds if clip.is_demo and args.data is None else ())]
    scores = score(clip, args, test, cue, classifier(clip, names, templates(clip)))
    rows = {"base": measure(scores.embedding, test)} | {
        label: measure(scores.embedding + change, test) for label, change in interventions(args, scores, cue.heads).items()
    }
    draws = random_control(args, scores, cue.heads, test)
    where = settings(
        args,
        clip,
        test=test.description,
        means=cue.reference.description + ("; the authors' way, on the images that are scored" if args.reference == "test" else ""),
        prompts=f"{len(templates(clip))} templates, {' / '.join(test.classes)}",
        **cue.words(),
        sum=cue.reference.sum(),
    )
    print_settings(where)
    print()
    print_rows(rows, draws, test, len(cue.heads))
    results = {
        "settings": where,
        "rows": rows,
        "random": draws,
        "explained": cue.explained.tolist(),
        "heads": [list(head) for head in cue.heads],
    }
    return results, pages.waterbirds(results, {group: seen[i] for i, group in enumerate(GROUPS)})


def measure(scores: Tensor, test: DemoBirds | Waterbirds) -> dict:
    """Accuracies from class scores [n, c]: the two classes first, the demo's kinds of birds after them."""
    right = scores[:, : len(test.classes)].argmax(dim=1) == test.y
    groups = {group: right[2 * test.y + test.place == i].double().mean().item() for i, group in enumerate(GROUPS)}
    row = {"groups": groups, "worst": min(groups.values()), "average": right.double().mean().item()}
    if scores.shape[1] > len(test.classes):
        row["kinds"] = (scores[:, len(test.classes) :].argmax(dim=1) == test.facts["kind"]).double().mean().item()
    return row


def random_control(args: Namespace, scores: Scores, chosen: list[Head], test: DemoBirds | Waterbirds) -> dict | None:
    """Mean-ablate random heads instead: as many in each layer as were chosen there, but never the chosen set itself.

    None where no other set can be drawn, because the chosen heads are all that their layers have.
    """
    draws = random_heads(chosen, scores.heads.shape[2], args.draws, args.seed)
    if not draws:
        return None
    found = {"worst": [], "average": []}
    for drawn in draws:
        row = measure(scores.embedding + pick(scores.heads, drawn), test)
        for key, values in found.items():
            values.append(row[key])
    ours = measure(scores.embedding + pick(scores.heads, chosen), test)["worst"]
    control = {
        "draws": args.draws,
        "worst values": found["worst"],
        "below the chosen heads": sum(worst < ours for worst in found["worst"]) / args.draws,
    }
    for key, values in found.items():
        values = torch.tensor(values, dtype=torch.float64)
        control[key] = {"mean": values.mean().item(), "std": values.std(correction=0).item(), "max": values.max().item()}
    return control


def print_rows(rows: dict[str, dict], draws: dict | None, test: DemoBirds | Waterbirds, chosen: int) -> None:
    """The table, groups as bird/place, and the random control under it."""
    counts = Counter((2 * test.y + test.place).tolist())
    kinds = "kinds" in rows["base"]
    header = ["accuracy, %", *GROUPS, "worst group", "average", *(["kinds of birds"] if kinds else [])]
    lines = [["n", *(f"{counts[i]:,}" for i in range(4)), "", f"{len(test):,}", *([f"{len(test):,}"] if kinds else [])]]
    for label, row in rows.items():
        worst = min(range(4), key=lambda i: row["groups"][GROUPS[i]])
        lines.append([
            label,
            *(f"{100 * row['groups'][group]:.1f}" for group in GROUPS),
            percent(row["worst"], counts[worst]),
            percent(row["average"], len(test)),
            *([f"{100 * row['kinds']:.1f}"] if kinds else []),
        ])  # fmt: skip
    control = "none: no other set of as many heads from the same layers is left"
    if draws is not None:
        both = [f"{100 * draws[key]['mean']:.1f} ± {100 * draws[key]['std']:.1f}" for key in ("worst", "average")]
        most = [f"{100 * draws[key]['max']:.1f}" for key in ("worst", "average")]
        lines.append([f"{chosen} random heads, mean ± std", *[""] * 4, *both, *([""] if kinds else [])])
        lines.append([f"{chosen} random heads, best", *[""] * 4, *most, *([""] if kinds else [])])
        control = (
            f"{draws['draws']} draws of as many heads from each of the same layers (never the chosen set),\n"
            f"mean-ablated; the chosen heads' worst group is above {round(draws['below the chosen heads'] * draws['draws'])} of them."
        )
    print(table(header, lines))
    print(f"\nGroups are bird/place. [..]: 95 % interval (Wilson). Random: {control}")
