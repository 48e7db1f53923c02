"""--task waterbirds: take the background out of what decides between landbird and waterbird (section 4 of the paper)."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter

import torch
from torch import Tensor

from data import DemoBirds, InputError, Waterbirds
from zeroshot import classifier, load_clip, templates

from . import pages
from .common import open_split, percent, print_settings, settings, table
from .removal import Plan, look_for_cue, random_heads, score

GROUPS = ("land/land", "land/water", "water/land", "water/water")  # bird/place


def run(args: Namespace) -> tuple[dict, list]:
    """Accuracy by group: as it is, without the cue's heads or directions, and without random heads."""
    clip = load_clip(args.model, args.pretrained, args.device, args.precision, args.image_size, args.out)
    if args.data is not None:
        Waterbirds(args.data, "test", clip.preprocess)  # other folders have no groups: refused here
    test = open_split(args, clip, "test")
    seen = Counter((2 * test.y + test.place).tolist())
    if len(seen) < 4:
        missing = next(group for i, group in enumerate(GROUPS) if i not in seen)
        raise InputError(
            f"the test images hold none of group {missing} (bird/place), and worst-group accuracy needs all four groups"
        )

    cue = look_for_cue(args, clip)
    names = [*test.classes, *(test.kinds if clip.is_demo and args.data is None else ())]
    shape = cue.reference.maps.shape[:2]
    plan = Plan(args.remove, shape, cue.heads, random_heads(cue.heads, shape[1], args.draws, args.seed))
    every = torch.cat([plan.rows, plan.chosen, plan.draws])
    groups = Groups(test)
    for scores, indices in score(clip, args, test, cue, classifier(clip, names, templates(clip)), groups):
        groups.update(scores.after(every), indices)
    found = groups.rows()
    rows = dict(zip(plan.labels, found, strict=False))
    ours, drawn = found[len(rows)], found[len(rows) + 1 :]
    draws = random_control(ours, drawn) if drawn else None
    where = settings(
        args,
        clip,
        test=test.description,
        means=cue.reference.description
        + ("; the authors' way, on the images that are scored" if args.reference == "test" else ""),
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


class Groups:
    """Right answers by group, counted over images, for several interventions at once.

    class scores [k, b, c]: the two classes first, the demo's kinds of birds after them.
    """

    running = ("right", "kinds", "images")

    def __init__(self, test: DemoBirds | Waterbirds) -> None:
        self.test, self.group = test, 2 * test.y + test.place
        self.right, self.kinds, self.images = 0, 0, torch.zeros(4, dtype=torch.long)

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Add images, by their indices in the data set."""
        scores, group, kind_of = scores.cpu(), self.group[indices], len(self.test.classes)
        right = scores[..., :kind_of].argmax(dim=2) == self.test.y[indices]  # [k, b]
        self.right = self.right + torch.stack(
            [right[:, group == i].sum(dim=1) for i in range(4)], dim=1
        )  # [k, 4]
        if scores.shape[2] > kind_of:
            self.kinds = self.kinds + (
                scores[..., kind_of:].argmax(dim=2) == self.test.facts["kind"][indices]
            ).sum(dim=1)
        self.images = self.images + torch.bincount(group, minlength=4)

    def merge(self, other: Groups) -> None:
        """Add what `other` has seen."""
        self.right, self.kinds, self.images = (
            self.right + other.right,
            self.kinds + other.kinds,
            self.images + other.images,
        )

    def rows(self) -> list[dict]:
        """Accuracies of each intervention."""
        total, found = int(self.images.sum()), []
        for i, right in enumerate(self.right.double()):
            by_group = (right / self.images).tolist()
            found.append(
                {
                    "groups": dict(zip(GROUPS, by_group, strict=True)),
                    "worst": min(by_group),
                    "average": float(right.sum()) / total,
                }
            )
            if isinstance(self.kinds, Tensor):
                found[-1]["kinds"] = int(self.kinds[i]) / total
        return found


def measure(scores: Tensor, test: DemoBirds | Waterbirds) -> dict:
    """Accuracies from class scores [n, c] of all images."""
    groups = Groups(test)
    groups.update(scores[None], torch.arange(len(test)))
    return groups.rows()[0]


def random_control(ours: dict, drawn: list[dict]) -> dict:
    """What mean-ablating random heads does: as many in each layer as were chosen there, but never the chosen set itself."""
    control = {
        "draws": len(drawn),
        "worst values": [row["worst"] for row in drawn],
        "below the chosen heads": sum(row["worst"] < ours["worst"] for row in drawn) / len(drawn),
    }
    for key in ("worst", "average"):
        values = torch.tensor([row[key] for row in drawn], dtype=torch.float64)
        control[key] = {
            "mean": values.mean().item(),
            "std": values.std(correction=0).item(),
            "max": values.max().item(),
        }
    return control


def print_rows(rows: dict[str, dict], draws: dict | None, test: DemoBirds | Waterbirds, chosen: int) -> None:
    """The table, groups as bird/place, and the random control under it."""
    counts = Counter((2 * test.y + test.place).tolist())
    kinds = "kinds" in rows["base"]
    header = ["accuracy, %", *GROUPS, "worst group", "average", *(["kinds of birds"] if kinds else [])]
    lines = [
        [
            "n",
            *(f"{counts[i]:,}" for i in range(4)),
            "",
            f"{len(test):,}",
            *([f"{len(test):,}"] if kinds else []),
        ]
    ]
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
        both = [
            f"{100 * draws[key]['mean']:.1f} ± {100 * draws[key]['std']:.1f}" for key in ("worst", "average")
        ]
        most = [f"{100 * draws[key]['max']:.1f}" for key in ("worst", "average")]
        lines.append([f"{chosen} random heads, mean ± std", *[""] * 4, *both, *([""] if kinds else [])])
        lines.append([f"{chosen} random heads, best", *[""] * 4, *most, *([""] if kinds else [])])
        control = (
            f"{draws['draws']} draws of as many heads from each of the same layers (never the chosen set),\n"
            f"mean-ablated; the chosen heads' worst group is above {round(draws['below the chosen heads'] * draws['draws'])} of them."
        )
    print(table(header, lines))
    print(f"\nGroups are bird/place. [..]: 95 % interval (Wilson). Random: {control}")
