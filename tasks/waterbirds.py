"""--task waterbirds: tell landbirds from waterbirds without their background (section 4 of the paper).

Or, where --data is CelebA, dark hair from blond without the person's gender.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

import report
from data import CelebA, Waterbirds
from demo.images import DemoBirds
from files import InputError
from zeroshot import classifier, templates

from .accumulators import Sums
from .job import Job, open_split
from .reference import authors_terms, summarise
from .removal import Plan, in_blocks, look_for_cue, page_of_heads, random_heads, score, without_heads_forward
from .rivals import NOTE, ways_without, with_published_last
from .tables import (
    SCORED,
    Shown,
    in_percent,
    in_tenths,
    percent,
    print_settings,
    print_table,
    say,
    spread,
    wilson,
    zero_shot_settings,
)

LEAD = (
    "Right answers of the model as it is, and without what it writes about the cue (the background): where "
    "the cue misleads, as with a waterbird on land, it should then be right as often as elsewhere."
)
Birds = DemoBirds | Waterbirds | CelebA


def run(job: Job) -> tuple[dict, list]:
    """Accuracy by group: as it is, without the cue's heads or directions, and without random heads."""
    clip, args = job.clip, job.args
    if args.data is not None and not CelebA.folder(args.data):
        Waterbirds(args.data, "test", clip.preprocess)  # refuses other folders, which have no groups
    test = open_split(job, "test")
    counts, trained = count_groups(test, args.limit), count_trained(job, test)
    kinds = test.kinds if clip.is_demo and args.data is None else ()
    classes = classifier(clip, [*test.classes, *kinds], templates(clip))
    cue = look_for_cue(job, test)
    shape = cue.explained.shape
    if args.protocol == "authors":  # the heads stay those that the cue found
        cue.reference = summarise(job, terms_of=authors_terms)
    further = without_heads_forward(job, cue.heads, classes) if "forward" in args.remove else {}
    last = ways_without(job, cue, args.remove, [*test.classes, *kinds], classes, len(test.classes), test)
    draws = random_heads(cue.heads, shape[1], args.draws, args.seed)
    plan = Plan(args.remove, shape, cue.heads, draws, further, last)
    interventions = [plan.rows, plan.chosen, plan.draws]
    every, groups = torch.cat(interventions), Groups(test, trained)
    for scores, indices in score(job, test, cue, classes, groups, further=further | last):
        groups.update(scores.after(every), indices)
    found, (ours,), drawn = in_blocks(groups.rows(), interventions)
    rows = dict(zip(plan.labels, found, strict=True))
    control = {"sets": plan.sets, **random_control(ours, drawn)} if drawn else None
    note = f"the authors' way, {SCORED}"
    common = zero_shot_settings(job, test, cue.reference.description, test.classes, note)
    where = print_settings(job, **common, **cue.settings())
    notes = []
    if trained is not None:
        sizes = " / ".join(map(str, trained))
        notes.append(f"Weighted: the average with the training split's groups: {sizes} images.")
    notes += [NOTE] * ("rivals" in args.remove)
    shown = print_rows(rows, control, counts, len(cue.heads), test.named, notes)
    results = {"settings": where, "groups": test.named, "trained": trained}
    results |= {"rows": rows, "random": control, **cue.results()}
    first = [int((groups.group == i).nonzero()[0]) for i in range(4)]  # image of each group
    examples = [
        (test.picture(i), f"{name}: {test.caption(i)}") for name, i in zip(counts, first, strict=True)
    ]
    seen = report.section("One image of each group", report.pictures(examples, size=200))
    return results, [LEAD, *page(results, counts, shown), seen]


def count_groups(test: Birds, limit: int | None) -> dict[str, int]:
    """{group: number of its images}; refused where a group has none."""
    found = Counter((2 * test.y + test.place).tolist())
    counts = {group: found[i] for i, group in enumerate(test.groups)}
    missing = next((group for group, count in counts.items() if not count), None)
    if missing is not None:
        why = "and worst-group accuracy needs all four groups"
        why += f": --limit {limit} drew too few, or there are none" if limit else ""
        raise InputError(f"the test images hold none of group {missing} ({test.named}), {why}")
    return counts


def count_trained(job: Job, test: Birds) -> list[int] | None:
    """Images of each group in the whole training split, whatever --limit says; None if there is none."""
    where = [] if job.args.data is None else [job.args.data]
    try:
        train = type(test)(*where, "train", job.clip.preprocess)
    except InputError:
        return None
    return torch.bincount(2 * train.y + train.place, minlength=4).tolist()


class Groups(Sums):
    """Right answers by group, counted over images, for several interventions at once.

    Args:
        trained: images of each group in the training split, to weigh the average by.
    """

    def __init__(self, test: Birds, trained: Sequence[int] | None = None) -> None:
        super().__init__()
        self.test, self.trained, self.group = test, trained, 2 * test.y + test.place

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Add images: scores [k, b, c] of the two classes, then of the demo's kinds of birds; indices [b]."""
        scores, group = scores.cpu(), self.group[indices]
        of_classes, of_kinds = scores.tensor_split([len(self.test.classes)], dim=2)
        right = of_classes.argmax(dim=2) == self.test.y[indices]  # [k, b]
        self.add("right", torch.stack([right[:, group == i].sum(dim=1) for i in range(4)], dim=1))  # [k, 4]
        self.add("images", torch.bincount(group, minlength=4))
        if of_kinds.shape[2]:
            right_kind = of_kinds.argmax(dim=2) == self.test.facts["kind"][indices]
            self.add("right kinds", right_kind.sum(dim=1))  # [k]

    def rows(self) -> list[dict]:
        """Accuracies of each intervention."""
        total, found = int(self["images"].sum()), []
        for right in self["right"]:
            by_group = (right / self["images"]).tolist()
            groups = dict(zip(self.test.groups, by_group, strict=True))
            found.append({"groups": groups, "worst": min(by_group), "average": float(right.sum()) / total})
            if self.trained is not None:
                weighted = sum(n * share for n, share in zip(self.trained, by_group, strict=True))
                found[-1]["weighted"] = weighted / sum(self.trained)
        if "right kinds" in self.sums:
            for row, right in zip(found, self["right kinds"].tolist(), strict=True):
                row["kinds"] = right / total
        return found


def wilson_of_smallest(rights: Collection[float], counts: Collection[int]) -> tuple[float, float]:
    """95 % interval of the smallest of several groups' true accuracies; Wilson's own is too low for it.

    The smallest lower end can be too high only where that of the truly worst group is. The smallest upper
    end is too low as soon as that of any group is, so they share the error of 2.5 % (Sidak 1967).
    """
    z, groups = NormalDist().inv_cdf(0.975 ** (1 / len(counts))), list(zip(rights, counts, strict=True))
    return min(wilson(*group)[0] for group in groups), min(wilson(*group, z)[1] for group in groups)


def random_control(ours: dict, drawn: list[dict]) -> dict:
    """What mean-ablating random heads does, beside `ours`, the chosen ones."""
    worst = [row["worst"] for row in drawn]
    below = sum(value < ours["worst"] for value in worst) / len(drawn)
    control = {"draws": len(drawn), "worst values": worst, "below the chosen heads": below}
    return control | {key: spread(row[key] for row in drawn) for key in ("worst", "average")}


def print_rows(
    rows: dict[str, dict],
    control: dict | None,
    counts: dict[str, int],
    chosen: int,
    named: str,
    notes: list[str],
) -> Shown:
    """The table, with the random control under the rows that it is the control of, and the notes."""
    total, base = sum(counts.values()), rows["base"]
    more = {"weighted": "weighted", "kinds": "kinds of birds"}
    more = {key: title for key, title in more.items() if key in base}
    header = ["accuracy, %", *counts, "worst group", "average", *more.values()]
    counted = [*counts.values(), "", total, *("" if key == "weighted" else total for key in more)]
    lines = [["n", *(f"{count:,}" if count else "" for count in counted)]]
    for label, row in rows.items():
        low, high = in_tenths(wilson_of_smallest(row["groups"].values(), counts.values()))
        summary = [f"{100 * row['worst']:.1f} [{low}, {high}]", percent(row["average"], total)]
        cells = [*in_tenths(row["groups"].values()), *summary, *in_tenths(row[key] for key in more)]
        lines.append([label, *cells])
    words, random = "none: no other set of as many heads from the same layers is left", []
    if control is not None:
        both = [control["worst"], control["average"]]
        means = [f"{100 * drawn['mean']:.1f} ± {100 * drawn['std']:.1f}" for drawn in both]
        most = in_tenths(drawn["max"] for drawn in both)
        for label, cells in (("mean ± std", means), ("best", most)):
            blank = [""] * len(counts), [""] * len(more)
            random.append([f"{chosen} random heads, {label}", *blank[0], *cells, *blank[1]])
        below = round(control["below the chosen heads"] * control["draws"])
        words = f"{control['sets']}, mean-ablated; the chosen heads' worst group is above {below} of them."
    shown = print_table(header, with_published_last(lines, random))
    what = f"Groups are {named}. [..]: 95 % interval (Wilson; worst group: of the smallest accuracy)."
    return shown, say(what, f"Random: {words}", *notes)


def page(results: dict, counts: dict[str, int], shown: Shown) -> list[report.Html]:
    """The same for report.html, drawn."""
    rows, groups, (numbers, notes) = results["rows"], {}, shown
    for group, count in counts.items():
        shares = [(label, row["groups"][group]) for label, row in rows.items()]
        groups[group] = [(label.strip(), *in_percent(share, count)) for label, share in shares]
    drawn = report.intervals(groups, "Each group, with 95 % intervals (Wilson)", "accuracy, %")
    sections = [report.section("Accuracy with and without the cue", numbers, drawn, note=notes)]
    if results["random"] is not None:
        sections.append(page_of_control(rows, results["random"]))
    return [*sections, page_of_heads(results)]


def page_of_control(rows: dict[str, dict], control: dict) -> report.Html:
    marks = {"unchanged": 100 * rows["base"]["worst"]}
    if "heads mean-ablated" in rows:
        marks["chosen heads"] = 100 * rows["heads mean-ablated"]["worst"]
    values = [100 * share for share in control["worst values"]]
    drawn = report.histogram(values, marks, "Worst group without random heads", "accuracy, %")
    words = f"{control['sets'].capitalize()}, mean-ablated like the chosen ones."
    return report.section("Would any heads do?", words, drawn)
