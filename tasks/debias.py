"""--task debias: take any cue out of any zero-shot classifier, and see what that changes.

Needs the classes' names, texts for the cue and a folder of images. Without labels it says what can be known:
which heads look at the cue, how many predictions change, and how much of the difference between class scores
follows the cue, before and after. Where folders or metadata give labels, also the accuracies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import report
from cue import share_between
from files import InputError
from zeroshot import classifier, templates

from .accumulators import Sums
from .job import Images, Job, check_class_names, open_split
from .removal import Plan, in_blocks, look_for_cue, page_of_heads, random_heads, score, without_heads_forward
from .rivals import ways_without, with_published_last
from .tables import Shown, in_tenths, logits, mean_and_std, percent, print_settings, print_table, say


def run(job: Job) -> tuple[dict, list]:
    """Predictions with and without the cue, with or without labels."""
    clip, args = job.clip, job.args
    test = open_split(job, "test")
    names, labels = class_problem(args.classes, test)
    classes = classifier(clip, names, templates(clip))
    cue = look_for_cue(job, test)
    place = getattr(test, "place", None)
    group = None if labels is None or place is None else labels * (int(place.max()) + 1) + place
    shape = cue.reference.maps.shape[:2]
    further = without_heads_forward(job, cue.heads, classes) if "forward" in args.remove else {}
    last = ways_without(job, cue, args.remove, names, classes, len(names))
    draws = random_heads(cue.heads, shape[1], args.draws, args.seed)
    plan = Plan(args.remove, shape, cue.heads, draws, further, last)
    interventions = [plan.rows, plan.draws]
    every, outcomes = torch.cat(interventions), Outcomes(len(cue.texts), labels, group)
    for scores, indices in score(job, test, cue, classes, outcomes, further=further | last):
        outcomes.update(scores.after(every), scores.label, indices)
    found, control = in_blocks(outcomes.rows(), interventions)
    rows = dict(zip(plan.labels, found, strict=True))
    some_names = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    used = "from the folders or metadata; used for the accuracies alone"
    where = print_settings(
        job,
        images=test.description,
        classes=f"{some_names}; {len(templates(clip))} templates; {logits(clip)}",
        labels="none given" if labels is None else used,
        means=cue.reference.description,
        **cue.settings(),
    )
    shown = print_rows(rows, control, len(test), len(cue.heads), plan.sets)
    results = {"settings": where, "rows": rows, "random": control, **cue.results()}
    lead = "What changes when the classifier cannot use the cue: predictions, how far class scores follow "
    lead += "the cue and, where labels are known, accuracies."
    return results, [lead, page(rows, control, shown), page_of_heads(results)]


def class_problem(asked: list[str] | None, test: Images) -> tuple[list[str], Tensor | None]:
    """(names of the classes, the class of each image where it is known): --classes, else the data's own."""
    own, y = list(test.classes), test.y
    if asked is None:
        if len(own) < 2:
            expected = "at least two names to tell the images by (their folders name none)"
            raise InputError(f"--task debias needs --classes: {test.unlabelled or expected}")
        return own, y
    names = list(asked)
    check_class_names(names)
    if y is None or not set(own) <= set(names):  # the folders mean something else
        return names, None
    return names, torch.tensor([names.index(name) for name in own])[y]


class Outcomes(Sums):
    """What each intervention did, summed over images; the first intervention changes nothing.

    Axes: k interventions, b images, c classes, t texts of the cue, g groups.

    Args:
        texts: number of texts of the cue.
        labels: [images] the class of each image, or None.
        group: [images] the group of each image, or None.
    """

    def __init__(self, texts: int, labels: Tensor | None, group: Tensor | None) -> None:
        super().__init__()
        self.texts, self.labels = texts, labels
        keys = {"worst class": labels, "worst group": group}
        self.keys = {name: key for name, key in keys.items() if key is not None}

    def update(self, scores: Tensor, label: Tensor, indices: Tensor) -> None:
        """Add images: class scores [k, b, c], the cue's text that fits best [b], indices in the data set."""
        scores, label = scores.cpu(), label.cpu()
        predicted = scores.argmax(dim=2)  # [k, b]
        relative = (scores - scores.mean(dim=2, keepdim=True)).double()
        one_hot = F.one_hot(label, self.texts).double()  # [b, t]
        self.add("images", len(indices))
        self.add("changed", (predicted != predicted[0]).sum(dim=1))  # [k]
        self.add("count", one_hot.sum(dim=0))
        self.add("by text", torch.einsum("bt,kbc->ktc", one_hot, relative))
        self.add("square", relative.square().sum(dim=(1, 2)))  # [k]
        for name, key in self.keys.items():
            size, mine = int(key.max()) + 1, key[indices]
            right = (predicted == self.labels[indices]).long()
            self.add(f"right, {name}", right.new_zeros(len(right), size).index_add_(1, mine, right))  # [k, g]
            self.add(f"members, {name}", torch.bincount(mine, minlength=size))

    def cue(self) -> Tensor:
        """[k] how far class scores follow the cue.

        That is the share of the variance of class scores, less their mean over classes, that lies between
        images of different cue texts, corrected for the number of texts.
        """
        n, count, by_text, square = (self[name] for name in ("images", "count", "by text", "square"))
        mean = by_text.sum(dim=1) / n  # [k, c]
        deviations = by_text.transpose(0, 1) - count[:, None, None] * mean  # [t, k, c]
        return share_between(deviations, count, square - n * mean.square().sum(dim=1), mean)

    def rows(self) -> list[dict]:
        """What is known of each intervention, as shares."""
        found, images = [], self["images"]
        for i, (changed, cue) in enumerate(zip(self["changed"].tolist(), self.cue().tolist(), strict=True)):
            row = {"changed": changed / images, "cue": cue}
            for name in self.keys:
                right, members = self[f"right, {name}"][i], self[f"members, {name}"]
                present = members > 0
                row["average"] = float(right.sum()) / images
                row[name] = float((right[present].float() / members[present].float()).min())
            found.append(row)
        return found


def print_rows(rows: dict[str, dict], control: list[dict], count: int, heads: int, sets: str) -> Shown:
    """The table with the random control under it, and notes: for the page, too."""
    accuracies = [key for key in ("average", "worst class", "worst group") if key in rows["base"]]
    keys = ("changed", "cue", *accuracies)
    header = ["%", "predictions changed", "follows the cue", *accuracies]
    lines = []
    for label, row in rows.items():
        cells = in_tenths(row[key] for key in keys)
        if accuracies:
            cells[2] = percent(row["average"], count)
        lines.append([label, *cells])
    draws = [[row[key] for row in control] for key in keys]
    random = [[f"{heads} random heads, mean ± std", *map(mean_and_std, draws)]] if control else []
    shown = print_table(header, with_published_last(lines, random))
    share = "share of the variance of class scores between images that different texts of the cue fit best"
    falls = "It falls where the classifier stops using the cue, but not to 0 where the cue truly goes with a"
    notes = [f"Follows the cue: {share}, corrected\nfor their number. {falls} class."]
    return shown, say(*notes, *([f"Random: {sets}, mean-ablated."] if control else []))


def page(rows: dict[str, dict], control: list[dict], shown: Shown) -> report.Html:
    """The same for report.html, with a histogram of the random control."""
    (numbers, notes), parts = shown, []
    if control:
        marked = [label for label in ("base", "heads mean-ablated") if label in rows]
        marks = {label: 100 * rows[label]["cue"] for label in marked}
        values = [100 * row["cue"] for row in control]
        title = "How far class scores follow the cue, without random heads"
        parts.append(report.histogram(values, marks, title, "%"))
    return report.section("What taking the cue out did", numbers, *parts, note=notes)
