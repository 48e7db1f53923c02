"""--task waterbirds: take the background out of what decides between landbird and waterbird (section 4 of the paper)."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

import report
from data import DemoBirds, Waterbirds
from files import InputError
from zeroshot import classifier, templates

from .job import Job
from .removal import Plan, in_blocks, look_for_cue, random_heads, score
from .splits import open_split
from .tables import in_percent, means_of, percent, print_settings, prompts_of, settings, table

GROUPS = ("land/land", "land/water", "water/land", "water/water")  # bird/place


def run(job: Job) -> tuple[dict, list]:
    """Accuracy by group: as it is, without the cue's heads or directions, and without random heads."""
    clip, args = job.clip, job.args
    test = open_test(job)
    counts = count_groups(test)
    cue = look_for_cue(job)
    kinds = test.kinds if clip.is_demo and args.data is None else ()
    shape = cue.reference.maps.shape[:2]
    plan = Plan(args.remove, shape, cue.heads, random_heads(cue.heads, shape[1], args.draws, args.seed))
    interventions = [plan.rows, plan.chosen, plan.draws]
    every, groups = torch.cat(interventions), Groups(test)
    classes = classifier(clip, [*test.classes, *kinds], templates(clip))
    for scores, indices in score(job, test, cue, classes, groups):
        groups.update(scores.after(every), indices)
    found, (ours,), drawn = in_blocks(groups.rows(), interventions)
    rows = dict(zip(plan.labels, found, strict=True))
    control = random_control(ours, drawn) if drawn else None
    note = "the authors' way, on the images that are scored"
    where = settings(
        job,
        test=test.description,
        means=means_of(job, cue.reference.description, note),
        prompts=prompts_of(clip, test.classes),
        **cue.words(),
        sum=cue.reference.sum_error(),
    )
    print_settings(where)
    print_rows(rows, control, counts, len(cue.heads))
    results = {
        "settings": where,
        "rows": rows,
        "random": control,
        "explained": cue.explained.tolist(),
        "heads": [list(head) for head in cue.heads],
    }
    return results, page(results, counts)


def open_test(job: Job) -> DemoBirds | Waterbirds:
    """The test split; other folders than Waterbirds have no groups and are refused."""
    if job.args.data is not None:
        Waterbirds(job.args.data, "test", job.clip.preprocess)
    return open_split(job, "test")


def count_groups(test: DemoBirds | Waterbirds) -> dict[str, int]:
    """{group: number of its images}; refused where a group has none."""
    found = Counter((2 * test.y + test.place).tolist())
    counts = {group: found[i] for i, group in enumerate(GROUPS)}
    missing = next((group for group, count in counts.items() if not count), None)
    if missing is not None:
        raise InputError(
            f"the test images hold none of group {missing} (bird/place), "
            "and worst-group accuracy needs all four groups"
        )
    return counts


class Groups:
    """Right answers by group, counted over images, for several interventions at once."""

    state_names = ("right", "kinds", "images")

    def __init__(self, test: DemoBirds | Waterbirds) -> None:
        self.test, self.group = test, 2 * test.y + test.place
        self.right: int | Tensor = 0  # [k, 4]
        self.kinds: int | Tensor = 0  # [k]
        self.images = torch.zeros(4, dtype=torch.long)

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Add images.

        Args:
            scores: [k, b, c] of the two classes, and after them of the demo's kinds of birds.
            indices: [b] in the data set.
        """
        scores, group = scores.cpu(), self.group[indices]
        of_classes, of_kinds = scores.tensor_split([len(self.test.classes)], dim=2)
        right = of_classes.argmax(dim=2) == self.test.y[indices]  # [k, b]
        by_group = torch.stack([right[:, group == i].sum(dim=1) for i in range(4)], dim=1)
        self.right = self.right + by_group
        if of_kinds.shape[2]:
            right_kind = of_kinds.argmax(dim=2) == self.test.facts["kind"][indices]
            self.kinds = self.kinds + right_kind.sum(dim=1)
        self.images = self.images + torch.bincount(group, minlength=4)

    def merge(self, other: Groups) -> None:
        """Add what `other` has seen."""
        for name in self.state_names:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def rows(self) -> list[dict]:
        """Accuracies of each intervention."""
        total, found = int(self.images.sum()), []
        for i, right in enumerate(self.right.double()):
            by_group = (right / self.images).tolist()
            row = {
                "groups": dict(zip(GROUPS, by_group, strict=True)),
                "worst": min(by_group),
                "average": float(right.sum()) / total,
            }
            if isinstance(self.kinds, Tensor):
                row["kinds"] = int(self.kinds[i]) / total
            found.append(row)
        return found


def measure(scores: Tensor, test: DemoBirds | Waterbirds) -> dict:
    """Accuracies from class scores [n, c] of all images."""
    groups = Groups(test)
    groups.update(scores[None], torch.arange(len(test)))
    return groups.rows()[0]


def random_control(ours: dict, drawn: list[dict]) -> dict:
    """What mean-ablating random heads does, beside `ours`, the chosen ones."""
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


def print_rows(rows: dict[str, dict], control: dict | None, counts: dict[str, int], chosen: int) -> None:
    """The table, groups as bird/place, and the random control under it."""
    kinds, total = "kinds" in rows["base"], sum(counts.values())
    header = ["accuracy, %", *GROUPS, "worst group", "average", *(["kinds of birds"] if kinds else [])]
    sizes = [f"{count:,}" for count in counts.values()]
    lines = [["n", *sizes, "", f"{total:,}", *([f"{total:,}"] if kinds else [])]]
    for label, row in rows.items():
        worst = min(GROUPS, key=row["groups"].get)
        lines.append(
            [
                label,
                *(f"{100 * row['groups'][group]:.1f}" for group in GROUPS),
                percent(row["worst"], counts[worst]),
                percent(row["average"], total),
                *([f"{100 * row['kinds']:.1f}"] if kinds else []),
            ]
        )
    words = "none: no other set of as many heads from the same layers is left"
    if control is not None:
        both = [control["worst"], control["average"]]
        means = [f"{100 * drawn['mean']:.1f} ± {100 * drawn['std']:.1f}" for drawn in both]
        most = [f"{100 * drawn['max']:.1f}" for drawn in both]
        last = [""] if kinds else []
        lines.append([f"{chosen} random heads, mean ± std", *[""] * 4, *means, *last])
        lines.append([f"{chosen} random heads, best", *[""] * 4, *most, *last])
        below = round(control["below the chosen heads"] * control["draws"])
        words = (
            f"{control['draws']} draws of as many heads from each of the same layers (never the chosen set),\n"
            f"mean-ablated; the chosen heads' worst group is above {below} of them."
        )
    print("\n" + table(header, lines))
    print(f"\nGroups are bird/place. [..]: 95 % interval (Wilson). Random: {words}")


def page(results: dict, counts: dict[str, int]) -> list[report.Html]:
    """The same for report.html, drawn."""
    sections = [page_of_accuracies(results["rows"], counts)]
    if results["random"] is not None:
        sections.append(page_of_control(results["rows"], results["random"]))
    heads = [
        report.Head(i, j, "chosen" if [i, j] in results["heads"] else "", share)
        for i, row in enumerate(results["explained"])
        for j, share in enumerate(row)
    ]
    words = "Share of each head's variance between images that different texts of the cue fit best."
    return [*sections, report.section("Which heads look at the cue", words, report.head_grid(heads))]


def page_of_accuracies(rows: dict[str, dict], counts: dict[str, int]) -> report.Html:
    kinds = "kinds" in rows["base"]
    header = ["accuracy, %", *counts, "worst group", "average", *(["kinds of birds"] if kinds else [])]
    cells = []
    for label, row in rows.items():
        shares = [*row["groups"].values(), row["worst"], row["average"], *([row["kinds"]] if kinds else [])]
        cells.append([label.strip(), *(f"{100 * share:.1f}" for share in shares)])
    groups = {
        group: [(label.strip(), *in_percent(row["groups"][group], count)) for label, row in rows.items()]
        for group, count in counts.items()
    }
    return report.section(
        "Accuracy with and without the cue",
        report.table(header, cells, "Groups are bird/place"),
        report.intervals(groups, "Each group, with 95 % intervals (Wilson)", "accuracy, %"),
    )


def page_of_control(rows: dict[str, dict], control: dict) -> report.Html:
    marks = {"unchanged": 100 * rows["base"]["worst"]}
    if "heads mean-ablated" in rows:
        marks["chosen heads"] = 100 * rows["heads mean-ablated"]["worst"]
    values = [100 * share for share in control["worst values"]]
    drawn = report.histogram(values, marks, "Worst group without random heads", "accuracy, %")
    return report.section(
        "Would any heads do?",
        f"{control['draws']} draws of as many heads from each of the same layers, "
        "mean-ablated like the chosen ones.",
        drawn,
    )
