"""--task debias: take any cue out of any zero-shot classifier, and know what that did.

Needs the classes' names, texts for the cue and a folder of images. Without labels it says what can be known: which heads look at the
cue, how many predictions change, and how much of the difference between class scores follows the cue, before and after. Where folders
or metadata give labels, also the accuracies.
"""

from __future__ import annotations

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor

from cue import share_between
from data import DemoBirds, ImageFolder, InputError, Waterbirds
from zeroshot import classifier, load_clip, templates

from . import pages
from .common import logits, open_split, percent, print_settings, settings, table
from .removal import Plan, look_for_cue, random_heads, score

Images = DemoBirds | Waterbirds | ImageFolder


def run(args: Namespace) -> tuple[dict, list]:
    """Predictions with and without the cue, with or without labels."""
    clip = load_clip(args.model, args.pretrained, args.device, args.precision, args.image_size, args.out)
    test = open_split(args, clip, "test")
    names, labels = class_problem(args, test)
    cue = look_for_cue(args, clip)
    place = getattr(test, "place", None)
    group = None if labels is None or place is None else labels * (int(place.max()) + 1) + place
    shape = cue.reference.maps.shape[:2]
    plan = Plan(args.remove, shape, cue.heads, random_heads(cue.heads, shape[1], args.draws, args.seed))
    every, outcomes = torch.cat([plan.rows, plan.draws]), Outcomes(len(cue.texts), labels, group)
    for scores, indices in score(clip, args, test, cue, classifier(clip, names, templates(clip)), outcomes):
        outcomes.update(scores.after(every), scores.label, indices)
    found = outcomes.rows()
    rows, control = dict(zip(plan.labels, found, strict=False)), found[len(plan.labels) :]
    where = settings(
        args,
        clip,
        images=test.description,
        classes=f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}; {len(templates(clip))} templates; {logits(clip)}",
        labels="none given"
        if labels is None
        else "from the folders or metadata; used for the accuracies alone",
        means=cue.reference.description,
        **cue.words(),
        sum=cue.reference.sum(),
    )
    print_settings(where)
    print()
    print_rows(rows, control, len(test), len(cue.heads))
    heads = [list(head) for head in cue.heads]
    results = {
        "settings": where,
        "rows": rows,
        "random": control,
        "explained": cue.explained.tolist(),
        "heads": heads,
    }
    return results, pages.debias(results)


def class_problem(args: Namespace, test: Images) -> tuple[list[str], Tensor | None]:
    """The classes to tell, and each image's where it is known: --classes, else the data's own."""
    own, y = list(test.classes), test.y
    if args.classes is None:
        if len(own) < 2:
            raise InputError(
                "--task debias needs --classes: at least two names to tell the images by (their folders name none)"
            )
        return own, y
    names = list(args.classes)
    if not all(name.strip() for name in names):
        raise InputError("--classes holds a class without a name")
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"--classes needs at least two names, each once; found {', '.join(names)}")
    if y is None or not set(own) <= set(names):  # the folders mean something else
        return names, None
    return names, torch.tensor([names.index(name) for name in own])[y]


class Outcomes:
    """What each intervention did, counted over images; the first one changes nothing.

    Axes: k interventions, b images, c classes, t texts of the cue, g groups.
    """

    running = ("images", "changed", "by_text", "count", "square", "right", "members")

    def __init__(self, texts: int, labels: Tensor | None, group: Tensor | None) -> None:
        self.keys = {
            name: key for name, key in (("worst class", labels), ("worst group", group)) if key is not None
        }
        self.labels, self.texts = labels, texts
        self.images = self.changed = self.by_text = self.square = 0
        self.count = torch.zeros(texts, dtype=torch.float64)
        self.right = dict.fromkeys(self.keys, 0)  # [k, g]
        self.members = dict.fromkeys(self.keys, 0)  # [g]

    def update(self, scores: Tensor, label: Tensor, indices: Tensor) -> None:
        """Add images: class scores [k, b, c], the cue's text that fits each best [b], indices in the data set."""
        scores, label = scores.cpu(), label.cpu()
        predicted = scores.argmax(dim=2)  # [k, b]
        self.images += len(indices)
        self.changed = self.changed + (predicted != predicted[0]).sum(dim=1)
        relative = (scores - scores.mean(dim=2, keepdim=True)).double()
        one_hot = F.one_hot(label, self.texts).double()  # [b, t]
        self.count = self.count + one_hot.sum(dim=0)
        self.by_text = self.by_text + torch.einsum("bt,kbc->ktc", one_hot, relative)
        self.square = self.square + relative.square().sum(dim=(1, 2))  # [k]
        for name, key in self.keys.items():
            size, mine = int(key.max()) + 1, key[indices]
            right = (predicted == self.labels[indices]).long()
            self.right[name] = self.right[name] + torch.zeros(len(right), size, dtype=torch.long).index_add_(
                1, mine, right
            )
            self.members[name] = self.members[name] + torch.bincount(mine, minlength=size)

    def merge(self, other: Outcomes) -> None:
        """Add what `other` has seen."""
        for name in ("images", "changed", "by_text", "count", "square"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in self.keys:
            self.right[name] = self.right[name] + other.right[name]
            self.members[name] = self.members[name] + other.members[name]

    def cue(self) -> Tensor:
        """[k] share of the variance of class scores, less their mean over classes, between images of different cue text."""
        mean = self.by_text.sum(dim=1) / self.images  # [k, c]
        deviations = self.by_text.transpose(0, 1) - self.count[:, None, None] * mean  # [t, k, c]
        total = self.square - self.images * mean.square().sum(dim=1)
        return share_between(deviations, self.count, total, mean)

    def rows(self) -> list[dict]:
        """Of each intervention."""
        follows, found = self.cue().tolist(), []
        for i, changed in enumerate(self.changed.tolist()):
            found.append({"changed": changed / self.images, "cue": follows[i]})
            for name, right in self.right.items():
                there = self.members[name] > 0
                found[-1].setdefault("average", int(right[i].sum()) / self.images)
                found[-1][name] = float((right[i][there] / self.members[name][there]).min())
        return found


def print_rows(rows: dict[str, dict], control: list[dict], count: int, heads: int) -> None:
    accuracies = [key for key in ("average", "worst class", "worst group") if key in rows["base"]]
    header = ["%", "predictions changed", "follows the cue", *accuracies]
    lines = [
        [label, f"{100 * row['changed']:.1f}", f"{100 * row['cue']:.1f}", *(percent(row[key], count) for key in accuracies[:1]),
         *(f"{100 * row[key]:.1f}" for key in accuracies[1:])]
        for label, row in rows.items()
    ]  # fmt: skip
    if control:
        both = {
            key: torch.tensor([row[key] for row in control], dtype=torch.float64)
            for key in ("changed", "cue", *accuracies)
        }
        shown = [f"{100 * x.mean():.1f} ± {100 * x.std(correction=0):.1f}" for x in both.values()]
        lines.append([f"{heads} random heads, mean ± std", *shown])
    print(table(header, lines))
    print(
        "\nFollows the cue: share of the variance of class scores between images that different texts of the cue fit best, corrected"
    )
    print(
        "for their number. It falls where the classifier stops using the cue, but not to 0 where the cue truly goes with a class."
    )
