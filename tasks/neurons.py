"""--task neurons: which single neurons of one layer's MLP write most to the embedding, and what?

A neuron adds its activation times a fixed vector, its map. So var(activation) |map|^2 is the spread of its
direct effect over images, the texts nearest to the map say what it writes, and ablating it changes a class
score by one product. --order 2 measures what a neuron adds through the heads of later layers instead
(neurons.second_order), each of which reads it through another map; second_order.py names its direction.

Attention pooling reads a neuron once for each of its r rows, each time through another map. There the
activation that is shown is the length of what the neuron adds, and the texts are nearest to the direction in
which that varies most.

Axes as in decompose.py; k images kept of each neuron, m neurons shown, c classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import report
from decompose import head_maps
from demo.images import DemoBirds
from demo.truth import add_factors, name_agreement, name_agreement_in_words
from files import InputError
from neurons import Neurons, neurons, second_order
from textspan import Moments
from zeroshot import Bank, embed_texts

from .accumulators import Rows, Sums
from .heads import head_name
from .job import Job, open_split, open_zero_shot
from .passes import one_pass
from .reference import check_varies
from .removal import random_heads
from .second_order import DIRECTION, MainAxes
from .tables import Shown, mean_and_std, percent, print_settings, print_table, say, zero_shot_settings

KEPT = 6  # images of each neuron, for the page
SHOWN = 3  # texts and images of each neuron on screen
DRAWS = 20  # of random neurons
ENDS = ("towards", "away from", "direction")  # where a neuron has texts
TOWARDS = (
    "Towards, away from: texts by their cosine with what it adds when it fires more. Activations are divided "
    "by the LayerNorms'\nstandard deviations, as they reach the embedding."
)


def run(job: Job) -> tuple[dict, list]:
    """The neurons whose direct effect varies most: what they write, what fires them, accuracy without."""
    args, clip = job.args, job.clip
    depth = len(head_maps(clip.model))
    layer = choose_layer(args.layer, depth, args.order)
    bank = job.load_bank()
    if len(bank.texts) < 2:
        raise InputError(f"text bank {bank.path} holds one text, and it takes two to say which is nearer")
    texts = embed_texts(clip, bank.texts, "text bank").cpu()
    test, names, labels, classes = open_zero_shot(job)
    data = open_split(job, args.reference)
    activity = watch(job, data, layer)
    chosen = activity.spread().argsort(descending=True, stable=True)[: args.neurons].tolist()
    draws = random_heads([(layer, j) for j in chosen], len(activity.maps), DRAWS, args.seed)
    drawn = [[j for _, j in draw] for draw in draws]
    axes = MainAxes(activity, texts, bank) if args.order == 2 else None
    sets = [[], *([j] for j in chosen), chosen, *drawn]
    sets += [list(range(len(activity.maps)))] if axes else []
    # Activations are kept in the demo alone, whose images' factors are known; elsewhere memory does not grow.
    keep = axes.along if axes else lambda found: activity.strength(found)[:, chosen]
    keep = keep if isinstance(test, DemoBirds) else None
    accuracy, fired = ablate(job, test, labels, classes, activity, sets, keep)
    whole = {"without all neurons of the layer": accuracy.pop()} if axes else {}
    base, *single = accuracy[: len(chosen) + 1]
    together, *random = accuracy[len(chosen) + 1 :]
    found = [describe(j, activity, texts, bank, data, axes) for j in chosen]
    for row, share in zip(found, single, strict=True):
        row["accuracy without it"] = share
    if fired is not None:
        add_factors(found, fired[:, chosen] if axes else fired, test.facts)
    texts_used = f"{bank.name}, {len(bank.texts):,} texts, less their mean"
    total = "what the MLP adds through later heads" if axes else "the MLP's term"
    where = print_settings(
        job,
        **zero_shot_settings(job, test, data.description, len(names)),
        bank=f"{texts_used}: else texts that are near everything would win",
        layer=f"{layer} of 0 to {depth - 1}, {len(activity.maps):,} neurons",
        sum=f"neurons and biases sum to {total} within {activity.error:.0e} of its largest entry",
    )
    results = {
        "settings": where,
        "layer": layer,
        "images": len(test),
        "accuracy": {"base": base, "without the neurons shown": together} | whole,
        "random": random,
        "neurons": found,
    }
    if axes and fired is not None:
        results["truth"] = name_agreement(axes.categories(), fired, test.facts)
    shown = print_results(results)
    pictures = {}
    for row in found:
        pictures[row["neuron"]] = [report.thumbnail(data.picture(i)) for i, _, _ in row["images"]]
    return results, page(results, pictures, shown)


def choose_layer(asked: int | None, depth: int, order: int = 1) -> int:
    """--layer, counted from 0, or from the end where negative; without it the last, or the third last."""
    if order == 2 and (depth == 1 or asked in (depth - 1, -1)):
        raise InputError(f"--order 2 takes no MLP of the last layer, {depth - 1}: no head comes after it")
    if order == 2 and asked is None:
        return max(depth - 3, 0)
    if asked is not None and not -depth <= asked < depth:
        there = f"layers 0 to {depth - 1}, or -{depth} to -1 from the end"
        raise InputError(f"--layer {asked}: the model has {there}")
    return (depth - 1 if asked is None else asked) % depth


class Activity:
    """What the reference images say of every neuron; memory does not grow with the number of images.

    Args:
        layer: whose neurons they are.
        maps: [n, d], or under attention pooling [n, r, d], from neurons to their terms.
        kept: number of images to keep of each neuron, those that fire it most.
    """

    state_names = ("rows", "activations", "embedding", "top", "images", "error")

    def __init__(self, layer: int, maps: Tensor, kept: int = KEPT) -> None:
        self.layer, self.kept = layer, kept
        self.maps = maps if maps.ndim == 3 else maps[:, None]
        n, r, d = self.maps.shape
        self.gram = (self.maps @ self.maps.mT).cpu().double()  # [n, r, r] lengths of terms, from activations
        self.rows, self.activations, self.embedding = Moments(r, (n,)), Moments(1, (n,)), Moments(1, (d,))
        self.top = torch.zeros(n, 0, dtype=maps.dtype)  # [n, k] activations, the largest first
        self.images = torch.zeros(n, 0, dtype=torch.long)  # [n, k] where they were found
        self.error = 0.0  # largest relative error of the sum of neurons

    def strength(self, found: Neurons) -> Tensor:
        """[b, n] the activation; under attention pooling the length of the term."""
        a = found.activations
        if a.ndim == 2:
            return a
        return torch.einsum("brn,nrs,bsn->bn", a, self.gram.to(a), a).clamp_min(0).sqrt()

    def update(self, found: Neurons, indices: Tensor) -> None:
        """Add images, by their indices in the data set."""
        fresh = self.strength(found).T.cpu()  # [n, b]
        self._rank(fresh, indices.expand_as(fresh))
        self.activations.update(fresh.T[..., None])
        self.rows.update(by_row(found).transpose(1, 2))
        self.embedding.update(found.embedding.float()[..., None])
        self.error = max(self.error, found.error())

    def merge(self, other: Activity) -> None:
        """Add what `other` has seen, of images that come later."""
        self._rank(other.top, other.images)
        for moments in ("activations", "rows", "embedding"):
            getattr(self, moments).merge(getattr(other, moments))
        self.error = max(self.error, other.error)

    def _rank(self, top: Tensor, images: Tensor) -> None:
        top, images = torch.cat([self.top, top], dim=1), torch.cat([self.images, images], dim=1)
        # The sort is stable: of equal activations, the earlier image is kept.
        order = top.argsort(dim=1, descending=True, stable=True)[:, : self.kept]
        self.top, self.images = top.gather(1, order), images.gather(1, order)

    def spread(self) -> Tensor:
        """[n] variance of each neuron's term over the embedding's; these need not sum to 1."""
        return (self.rows.covariance * self.gram).sum(dim=(1, 2)) / self.embedding.covariance.sum()

    def direction(self, j: int) -> Tensor:
        """[d] the map of neuron j; under attention pooling, the direction in which its term varies most.

        That direction has the sign of the term's mean.
        """
        maps = self.maps[j].cpu()
        if len(maps) == 1:
            return maps[0]
        variance, axes = torch.linalg.eigh(self.rows.covariance[j])
        root = variance.clamp_min(0).sqrt()[:, None] * axes.T @ maps.double()
        found = torch.linalg.svd(root, full_matrices=False).Vh[0]  # root' root is the term's covariance
        return (found * torch.sign(self.rows.mean[j] @ maps.double() @ found)).to(maps)

    def directions(self) -> Tensor:
        """[n, d] of unit length, of all neurons."""
        return F.normalize(torch.stack([self.direction(j) for j in range(len(self.maps))]), dim=1)


def by_row(found: Neurons) -> Tensor:
    """[b, r, n] activations, whatever the read-out."""
    return found.activations if found.activations.ndim == 3 else found.activations[:, None]


def whole_maps(found: Neurons) -> Tensor:
    """[n, d], or [n, r, d] out of two factors."""
    return found.maps if found.up is None else (found.maps @ found.up).transpose(0, 1)


def split(job: Job, images: Tensor, layer: int) -> Neurons:
    """The effects of --order by neuron."""
    return (second_order if job.args.order == 2 else neurons)(job.clip.model, images, layer)


def watch(job: Job, data: Dataset, layer: int) -> Activity:
    """One pass over the reference images."""
    clip = job.clip
    first = clip.preprocess(data.picture(0))[None].to(clip.device, clip.dtype)
    activity = Activity(layer, whole_maps(split(job, first, layer)))
    for images, indices in one_pass(job, data, f"reference ({job.args.reference})", activity):
        found = split(job, images, layer)
        job.check_finite(found.embedding)
        activity.update(found, indices)
    check_varies(float(activity.embedding.scatter.sum()), data.description)
    return activity


def ablate(
    job: Job,
    test: Dataset,
    labels: Tensor,
    classes: Tensor,
    activity: Activity,
    sets: Sequence[Sequence[int]],
    keep: Callable[[Neurons], Tensor] | None = None,
) -> tuple[list[float], Tensor | None]:
    """Accuracy on the test images for each set of neurons, mean-ablated together, in one pass.

    Args:
        labels: [images] the true class.
        classes: [c, d].
        keep: what of every image [b, ...] is returned, too.
    """
    mean = activity.rows.mean.T.to(activity.maps)  # [r, n]
    members = [torch.tensor(chosen, dtype=torch.long, device=classes.device) for chosen in sets]
    reads = [activity.maps[chosen] @ classes.T for chosen in members]  # [m, r, c]
    total, fired = Sums(), Rows()
    for images, indices in one_pass(job, test, "test", total, fired):
        found, truth = split(job, images, activity.layer), labels[indices].to(classes.device)
        # Class scores up to the embedding's norm, which does not change which class wins.
        base, away = found.embedding.to(classes) @ classes.T, mean - by_row(found)
        right = []
        for chosen, read in zip(members, reads, strict=True):
            scores = base + torch.einsum("brm,mrc->bc", away[:, :, chosen], read)
            right.append((scores.argmax(dim=1) == truth).sum())
        total.add("right", torch.stack(right))
        if keep:
            fired.add(keep(found))
    return [count / len(test) for count in total["right"].tolist()], fired.tensor() if keep else None


def describe(
    j: int, activity: Activity, texts: Tensor, bank: Bank, data: Dataset, axes: MainAxes | None = None
) -> dict:
    """What neuron j does and writes."""
    images = zip(activity.images[j].tolist(), activity.top[j].tolist(), strict=True)
    row = {
        "neuron": head_name((activity.layer, j)),
        "spread": float(activity.spread()[j]),
        "mean": float(activity.activations.mean[j, 0]),
        "variance": float(activity.activations.covariance[j, 0, 0]),
        "images": [(i, data.caption(i), activation) for i, activation in images],
    }
    if axes:
        return row | axes.describe(j, SHOWN)
    fit = likeness(activity.direction(j), texts)
    order = fit.argsort(descending=True, stable=True).tolist()
    ends = zip(ENDS, (order[:SHOWN], order[: -SHOWN - 1 : -1]), strict=False)
    return row | {end: [(bank.texts[i], float(fit[i])) for i in picked] for end, picked in ends}


def likeness(direction: Tensor, texts: Tensor) -> Tensor:
    """[t] cosine of a direction [d] with each text [t, d] less the texts' mean, which they all share."""
    return F.cosine_similarity(texts - texts.mean(dim=0), direction[None], dim=1)


def print_results(results: dict) -> Shown:
    """A paragraph for each neuron, accuracies, notes; the last two are returned for the page."""
    for row in results["neurons"]:
        print(f"\nneuron {row['neuron']:<7} {in_words(row, results['accuracy']['base'])}")
        for sign in [end for end in ENDS if end in row]:
            print(f"  {sign:<10} " + "; ".join(f"{text} {fit:+.2f}" for text, fit in row[sign]))
        shown = "; ".join(f"{i}: {caption}" for i, caption, _ in row["images"][:SHOWN])
        print(f"  {'fired by':<10} {shown}")
    accuracy = print_table(["mean-ablated", "accuracy, %"], accuracies(results))
    spread = "variance of what the neuron itself adds, over the embedding's; neurons can cancel"
    first = results["neurons"][0]
    notes = [f"Spread: {spread}: shares need not sum to 100 %."]
    notes.append(f"{DIRECTION if 'direction' in first else TOWARDS} [..]: 95 % interval (Wilson).")
    if "factors" in first:
        its = "effect along its direction" if "direction" in first else "activation"
        most = f"explains most of the variance of its {its} on the test images"
        notes.append(f"Factor: the demo's that {most}, where all are independent.")
    if "truth" in results:
        notes.append(name_agreement_in_words(results["truth"]))
    return accuracy, say(*notes)


def in_words(row: dict, base: float) -> str:
    """A neuron's numbers, in one line."""
    accuracy = row["accuracy without it"]
    change = round(100 * (accuracy - base), 1) + 0.0  # no -0.0
    activation = f"{row['mean']:.3f} ± {row['variance'] ** 0.5:.3f}"
    direction = f"   direction {row['share']:.0%}" if "share" in row else ""
    kind = "effect" if direction else "activation"
    line = f"spread {row['spread']:6.2%}   {kind} {activation}{direction}"
    line += f"   accuracy without it {100 * accuracy:.1f} ({change:+.1f})"
    if "factors" in row:
        factor = max(row["factors"], key=row["factors"].get)
        line += f"   factor {factor} {row['factors'][factor]:.0%}"
    return line


def accuracies(results: dict) -> list[list[str]]:
    """Rows of the table."""
    shown = len(results["neurons"])
    labels = ("base", f"the {shown} neurons above", "all neurons of the layer")
    both = zip(labels, results["accuracy"].values(), strict=False)  # the last one with --order 2 alone
    rows = [[label, percent(accuracy, results["images"])] for label, accuracy in both]
    if results["random"]:  # none where all neurons of the layer are shown
        label, draws = f"{shown} random neurons of the layer", results["random"]
        rows.append([f"{label}, mean ± std of {len(draws)} draws", mean_and_std(draws)])
        rows.append([f"{label}, worst draw", f"{100 * min(draws):.1f}"])
    return rows


def page(results: dict, images: dict[str, list[Image.Image]], shown: Shown) -> list[str]:
    """The same for report.html, with pictures."""
    parts = []
    for row in results["neurons"]:
        heading = report.tag("h3", f"Neuron {row['neuron']}")
        parts += [heading, in_words(row, results["accuracy"]["base"])]
        ends = [end for end in ENDS if end in row]
        lines = zip(*(row[end] for end in ends), strict=True)
        cells = [[f"{text} ({x:+.2f})" for text, x in line] for line in lines]
        parts.append(report.table(ends, cells))
        captions = [f"{caption} ({activation:.2f})" for _, caption, activation in row["images"]]
        parts.append(report.pictures(list(zip(images[row["neuron"]], captions, strict=True))))
    what = "add through later heads" if "direction" in row else "write"
    written = report.section(f"What single neurons {what}", *parts, note=shown[1])
    lead = "The neurons of one MLP whose effect varies most: what each adds, in texts, and what fires it."
    return [lead, written, report.section("Accuracy without them", shown[0])]
