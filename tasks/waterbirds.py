"""--task waterbirds: take the background out of what decides between landbird and waterbird (section 4 of the paper).

Every intervention changes the embedding by a sum of terms, and a class score is the embedding's dot product with the class, up to
a positive factor that does not change which class wins. So one pass over the test images keeps each term's dot product with each
class, and every intervention, the random ones too, is a sum of those.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from cue import THRESHOLD, CueVotes, subspace
from datasets import DemoBirds, InputError, Waterbirds
from decompose import decompose, head_maps
from zeroshot import Clip, classifier, default_bank, embed_texts, load_bank, load_clip, templates

from .common import (
    LAST_LAYERS,
    Head,
    Reference,
    centre,
    name,
    open_split,
    parse_heads,
    percent,
    print_settings,
    settings,
    stream,
    summarise,
    table,
)

# Section 4 of the paper; its authors' list for ViT-L-14 has 22.12 twice, here it stands once.
PAPER_HEADS = {
    "ViT-B-16": "9.6,9.8,10.10,10.11,11.0,11.3,11.6",
    "ViT-L-14": "21.1,21.3,21.6,21.8,21.11,21.13,21.14,22.2,22.12,22.13,22.15,23.1,23.3,23.5,23.6",
    "ViT-H-14": "29.4,29.8,29.14,30.6,30.11,30.12,30.15,31.8,31.12",
}
GROUPS = ("land/land", "land/water", "water/land", "water/water")  # bird/place


@dataclass
class Scores:
    """Dot products with every class c, for every test image: of the embedding, and of what each intervention would add to it."""

    embedding: Tensor  # [n, c]
    heads: Tensor  # [n, L, H, c] mean - term
    mlps: Tensor  # [n, L, c] mean - term
    stem: Tensor  # [n, c] mean - term
    heads_cue: Tensor  # [n, L, H, c] (mean - term), projected onto the cue's directions
    embedding_cue: Tensor  # [n, c] (mean - embedding), projected onto the cue's directions


def run(args: Namespace) -> dict:
    """Accuracy by group: as it is, without the cue's heads or directions, and without random heads."""
    clip = load_clip(args.model, args.pretrained, args.device, args.precision)
    if args.data is not None:
        Waterbirds(args.data, "test", clip.preprocess)  # other folders have no groups: refused here
    test = open_split(args, clip, "test")
    seen = Counter((2 * test.y + test.place).tolist())
    if len(seen) < 4:
        missing = next(group for i, group in enumerate(GROUPS) if i not in seen)
        raise InputError(f"the test images hold none of group {missing} (bird/place), and worst-group accuracy needs all four groups")

    maps = head_maps(clip.model)
    given, how = given_heads(args, clip, *maps.shape[:2])
    cue_texts, cue_name = find_cue(args, clip)
    cue_embeddings = embed_texts(clip, cue_texts)
    directions = subspace(cue_embeddings)
    if not len(directions):
        raise InputError(f"the texts of the cue ({cue_name}) do not differ for this model: give texts that do")
    votes = CueVotes(cue_embeddings, maps, centre(clip, args))
    reference = summarise(clip, args, lambda terms: votes.update(terms.embedding, terms.values))
    explained = votes.explained(reference.values)
    needs_heads = {"heads", "directions"} & set(args.remove)
    chosen = given or (auto_heads(explained, cue_name) if needs_heads else [])
    names = [*test.classes, *(test.kinds if clip.is_demo and args.data is None else ())]
    scores = score(clip, args, test, reference, classifier(clip, names, templates(clip)), directions)
    rows = {"base": measure(scores.embedding, test)} | {
        label: measure(scores.embedding + change, test) for label, change in interventions(args, scores, chosen).items()
    }
    draws = random_control(args, scores, chosen, test)
    where = settings(
        args,
        clip,
        test=test.description,
        means=reference.description + ("; the authors' way, on the images that are scored" if args.reference == "test" else ""),
        prompts=f"{len(templates(clip))} templates, {' / '.join(test.classes)}",
        heads=f"{', '.join(map(name, chosen))} ({how})" if chosen else "none: the embedding as a whole",
        cue=f"{cue_name}, {len(cue_texts)} texts, {len(directions)} directions",
    )
    print_settings(where)
    print()
    print_rows(rows, draws, test, len(chosen))
    return {
        "settings": where,
        "rows": rows,
        "random": draws,
        "explained": explained.tolist(),
        "heads": [list(head) for head in chosen],
    }


def find_cue(args: Namespace, clip: Clip) -> tuple[list[str], str]:
    """--cue: a category of the bank, or texts."""
    bank = load_bank(args.text_bank or default_bank(clip))
    if len(args.cue) == 1 and args.cue[0] in bank.categories:
        return bank.of(args.cue[0]), f"category {args.cue[0]!r} of {bank.path.name}"
    if len(args.cue) == 1:
        raise InputError(
            f"--cue {args.cue[0]!r} is no category of {bank.path} ({', '.join(sorted(set(bank.categories)))}), "
            "and one text has nothing to be told from: give a category or at least two texts"
        )
    return list(args.cue), f"{args.cue[0]!r} and {len(args.cue) - 1} more"


def given_heads(args: Namespace, clip: Clip, depth: int, heads: int) -> tuple[list[Head], str]:
    """What --heads says, and in words where it comes from; no heads yet where it says auto."""
    if args.heads == "auto":
        return [], f"auto: the cue explains over {THRESHOLD:.0%} of what they write on the reference images; no labels used"
    if args.heads != "paper":
        return parse_heads(args.heads, depth, heads), "given by hand"
    if clip.name not in PAPER_HEADS:
        raise InputError(f"--heads paper: the paper lists heads of {', '.join(PAPER_HEADS)}, not of {clip.name}; use auto or a list")
    return parse_heads(PAPER_HEADS[clip.name], depth, heads), "the paper's list"


def auto_heads(explained: Tensor, cue_name: str) -> list[Head]:
    """The heads that look at the cue."""
    chosen = [(layer, head) for layer, head in (explained > THRESHOLD).nonzero().tolist()]
    if not chosen:
        layer, head = divmod(int(explained.argmax()), explained.shape[1])
        raise InputError(
            f"no head looks at the cue ({cue_name}): it explains at most {explained.max():.0%} of a head's variance (head "
            f"{layer}.{head}), below {THRESHOLD:.0%}; name heads with --heads or another --cue"
        )
    return chosen


def score(
    clip: Clip, args: Namespace, test: DemoBirds | Waterbirds, reference: Reference, classes: Tensor, directions: Tensor
) -> Scores:
    """One pass over the test images."""
    maps = reference.maps
    classes_cue = directions.T @ (directions @ classes.T)  # [d, c] the classes' part along the cue
    read, read_cue = maps @ classes.T, maps @ classes_cue  # [L, H, e, c]
    mean = reference.values.mean.to(maps)
    parts = []
    for images in stream(clip, test, args, "test"):
        terms = decompose(clip.model, images)
        embedding, away = terms.embedding.to(maps), mean - terms.values
        batch = (
            embedding @ classes.T,
            torch.einsum("bLHe,LHec->bLHc", away, read),
            (reference.mlps - terms.mlps) @ classes.T,
            (reference.stem - terms.stem) @ classes.T,
            torch.einsum("bLHe,LHec->bLHc", away, read_cue),
            (reference.embedding.mean.to(maps) - embedding) @ classes_cue,
        )
        parts.append([part.cpu() for part in batch])
    return Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def interventions(args: Namespace, scores: Scores, chosen: list[Head]) -> dict[str, Tensor]:
    """What each row of the table adds to the class scores, [n, c]."""
    rows, depth = {}, scores.heads.shape[1]
    if "heads" in args.remove:
        whole = pick(scores.heads, chosen)
        rows["heads mean-ablated"] = whole
        rows["  + MLPs and stem"] = whole = whole + scores.mlps.sum(dim=1) + scores.stem
        if depth > LAST_LAYERS:
            early = [(layer, head) for layer in range(depth - LAST_LAYERS) for head in range(scores.heads.shape[2])]
            rows["  + earlier layers"] = whole + pick(scores.heads, sorted(set(early) - set(chosen)))
    if "directions" in args.remove:
        rows["cue's directions in the heads"] = pick(scores.heads_cue, chosen)
    if "embedding" in args.remove:
        rows["cue's directions everywhere"] = scores.embedding_cue
    return rows


def pick(scores: Tensor, chosen: list[Head]) -> Tensor:
    """[n, c] the sum over the chosen heads of scores [n, L, H, c]."""
    layers, heads = zip(*chosen, strict=True) if chosen else ((), ())
    return scores[:, list(layers), list(heads)].sum(dim=1)


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
    generator, per_layer = torch.Generator().manual_seed(args.seed), Counter(layer for layer, _ in chosen)
    width = scores.heads.shape[2]
    if all(count == width for count in per_layer.values()):  # true of no heads, too
        return None
    found = {"worst": [], "average": []}
    while len(found["worst"]) < args.draws:
        drawn = [(layer, h) for layer, count in per_layer.items() for h in torch.randperm(width, generator=generator)[:count].tolist()]
        if set(drawn) != set(chosen):
            row = measure(scores.embedding + pick(scores.heads, drawn), test)
            for key, values in found.items():
                values.append(row[key])
    ours = measure(scores.embedding + pick(scores.heads, chosen), test)["worst"]
    control = {"draws": args.draws, "below the chosen heads": sum(worst < ours for worst in found["worst"]) / args.draws}
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
