"""Which removal of a cue is the one to use? Measured at three strengths of the bias.

    $ python -m benchmarks.cue_study --train --seeds 2 3 4    # half an hour per seed on two cores
    $ python -m benchmarks.cue_study --seeds 2 3 4            # prints the tables, writes cue_study.json
    $ python -m benchmarks.cue_study --show                   # prints the tables from that file
    $ python -m benchmarks.cue_study --prompts                # how Orth-Proj and Orth-Cal depend on prompts

Each seed is trained once in a shared stage, and then continued once for each strength of the bias
(--alignment of demo.train, the share of the birds with web captions that are shown where such birds live).
Means, cue and heads come from the training split, as in --task waterbirds, and the figures from --split.
Labels are used for the accuracies only.

The rows are those of --task waterbirds, and these attempts to do better:
    everywhere, heads whole   as "directions everywhere", and the chosen heads are mean-ablated as well
    auto + MLPs       removes the cue's directions from the chosen heads, all MLPs and the stem
    all heads         removes the cue's directions from every head
    one direction     removes only the class texts' difference within the cue's space, from the chosen heads
    80 %, 99 %        removes directions that hold this much of the cue texts' variance (the rule: 95 %)
    > 0.2, > 0.5      removes directions from the heads above another threshold (the rule: 0.3)
    gap               the same, with the threshold in the widest gap between the sorted shares

and the published methods of rivals.py, from the same texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import demo
from cue import subspace
from demo.images import DemoBirds
from options import parse_args
from rivals import orth_cal, orth_proj
from tasks.heads import Head
from tasks.job import Job
from tasks.removal import Cue, Scores, look_for_cue, random_heads, score
from tasks.rivals import JOINT, ways_without
from tasks.tables import table
from tasks.waterbirds import Groups
from zeroshot import Clip, classifier, embed_texts, templates

ALIGNMENTS = (0.97, 0.985, 0.995)
SHARED, BRANCH = 1200, 800  # training steps of the shared stage, and of each strength after it
DRAWS = 20
# The prompts of Orth-Proj's published code (land background, forest, mountain, wood, water background, ocean,
# beach, port), in the demo's words, which know no port.
EIGHT = ["with a land background", "in a forest", "on a mountain", "in the woods"]
EIGHT += ["with a water background", "on the ocean", "at the beach", "on the shore"]
FIGURES = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="train the models that do not exist yet")
    parser.add_argument("--show", action="store_true", help="print the stored figures")
    parser.add_argument("--prompts", action="store_true", help="take Orth-Cal apart, on the demo's own model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--models", type=Path, default=Path("results/cue_study"))
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--out", type=Path, default=FIGURES)
    args = parser.parse_args()
    if args.train:
        for seed in args.seeds:
            train(args.models, seed)
        return
    if args.prompts:
        compare_prompts()
        return
    if not args.show:
        figures = {
            str(alignment): {
                str(seed): study(args.models / f"seed{seed}-{alignment}.safetensors", args.split)
                for seed in args.seeds
            }
            for alignment in ALIGNMENTS
        }
        args.out.write_text(json.dumps({"split": args.split, "figures": figures}, indent=1) + "\n")
    show(json.loads(args.out.read_text()))


def train(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shared = folder / f"seed{seed}.safetensors"
    stage(shared, seed, SHARED, 0.985)
    for alignment in ALIGNMENTS:
        stage(folder / f"seed{seed}-{alignment}.safetensors", seed, BRANCH, alignment, "--init", str(shared))


def stage(out: Path, seed: int, steps: int, alignment: float, *more: str) -> None:
    """One run of demo.train, skipped if its weights exist."""
    if out.exists():
        return
    options = {"--seed": seed, "--steps": steps, "--alignment": alignment, "--out": out}
    command = [
        sys.executable,
        "-m",
        "demo.train",
        *(str(word) for pair in options.items() for word in pair),
        *more,
    ]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)


def study(weights: Path, split: str) -> dict[str, dict[str, float]]:
    """{row: {worst, average, kinds, heads}} of one model: three accuracies, number of chosen heads."""
    job = Job(parse_args(["--task", "waterbirds"]))
    model, preprocess, tokenizer = demo.load(weights=weights)
    clip = Clip(
        model, preprocess, lambda: tokenizer, demo.NAME, str(weights), torch.device("cpu"), is_demo=True
    )
    job.clip = clip
    test = DemoBirds(split, clip.preprocess)
    names = [*test.classes, *test.kinds]
    classes = classifier(clip, names, templates(clip))
    cue = look_for_cue(job)
    texts = embed_texts(clip, cue.texts)
    further = ways_without(job, cue, ("texts", "rivals"), names, classes, len(test.classes), test)
    scores = collect(score(job, test, cue, classes, further=further))
    base, inside = scores.embedding, scores.heads_cue
    every = [(layer, head) for layer in range(inside.shape[1]) for head in range(inside.shape[2])]
    rest = scores.embedding_cue - pick(inside, every)  # the part of the MLPs and the stem
    changes = {
        "base": 0,
        "heads (the paper's way)": pick(scores.heads, cue.heads),
        "directions in the heads": pick(inside, cue.heads),
        "directions everywhere": scores.embedding_cue,
        "everywhere, heads whole": scores.embedding_cue + pick(scores.heads - inside, cue.heads),
        "auto + MLPs": pick(inside, cue.heads) + rest,
        "all heads": pick(inside, every),
        "> 0.2": pick(inside, above(cue, 0.2)),
        "> 0.5": pick(inside, above(cue, 0.5)),
        "gap": pick(inside, above(cue, widest_gap(cue.explained))),
    }
    for name, directions in {
        "one direction": class_direction(texts, classes[: len(test.classes)])[None],
        "80 %": subspace(texts, 0.8),
        "99 %": subspace(texts, 0.99),
    }.items():
        other = collect(score(job, test, dataclasses.replace(cue, directions=directions), classes))
        changes[name] = pick(other.heads_cue, cue.heads)
        changes[f"everywhere, {name}"] = other.embedding_cue
    changes |= dict(zip(further, scores.further.unbind(dim=1), strict=True))
    rows = {name: measure(base + change, test) for name, change in changes.items()}
    draws = [
        measure(base + pick(scores.heads, drawn), test)
        for drawn in random_heads(cue.heads, inside.shape[2], DRAWS, 0)
    ]
    keys = ("worst", "average", "kinds")
    rows["random heads, mean"] = {key: statistics.mean(row[key] for row in draws) for key in keys}
    rows["random heads, best"] = {key: max(row[key] for row in draws) for key in keys}
    return {name: {key: row[key] for key in keys} | {"heads": len(cue.heads)} for name, row in rows.items()}


@torch.no_grad()
def compare_prompts() -> None:
    """Print what each factor of Orth-Cal does, for all texts of the cue and for eight like theirs."""
    job = Job(parse_args(["--task", "waterbirds"]))
    clip, test, eye = job.clip, DemoBirds("test", job.clip.preprocess), torch.eye(96).double()
    batches = torch.arange(len(test)).split(256)
    images = [clip.model.encode_image(torch.stack([test[int(i)][0] for i in rows])) for rows in batches]
    images, names = torch.cat(images), [*test.classes, *test.kinds]
    classes = classifier(clip, names, templates(clip))
    header, columns = ["worst group / average / kinds / left of the classes, %"], []
    difference = (classes[1] - classes[0]).double()
    for title, cue in (("46 texts of places", job.load_bank().of("places")), ("eight texts", EIGHT)):
        texts = embed_texts(clip, cue)
        joint = [JOINT.format(name, text) for name in test.classes for text in cue]
        joint = embed_texts(clip, joint).unflatten(0, (2, -1))
        all_texts, directions = orth_proj(texts), orth_proj(subspace(texts))
        projections = {
            "base": eye,
            "P0 off all texts: Orth-Proj": all_texts,
            "P0 off the directions": directions,
            "calibration alone": orth_cal(eye, joint),
            "P0 off all texts, calibrated: Orth-Cal": orth_cal(all_texts, joint),
            "  the factors the other way round": orth_cal(all_texts, joint).T,
            "P0 off the directions, calibrated": orth_cal(directions, joint),
        }
        header.append(title)
        columns.append([])
        for P in projections.values():
            row = measure(images @ F.normalize(classes @ P.T.float(), dim=1).T, test)
            left = float((P @ difference).square().sum() / difference.square().sum())
            shares = [*(row[key] for key in ("worst", "average", "kinds")), left]
            columns[-1].append(" / ".join(f"{100 * share:.1f}" for share in shares))
    print(table(header, list(zip(projections, *columns, strict=True))))
    print("\nLeft: of the squared length of the difference between the texts of the two classes.")


def collect(batches: Iterable[tuple[Scores, Tensor]]) -> Scores:
    """The scores of all images in one, to try many interventions on few images."""
    found = [scores for scores, _ in batches]
    names = [field.name for field in dataclasses.fields(Scores)]
    return Scores(*(torch.cat([getattr(scores, name).cpu() for scores in found]) for name in names))


def pick(scores: Tensor, chosen: list[Head]) -> Tensor:
    """[n, c] the sum over the chosen heads of scores [n, L, H, c]."""
    layers, heads = zip(*chosen, strict=True) if chosen else ((), ())
    return scores[:, list(layers), list(heads)].sum(dim=1)


def measure(scores: Tensor, test: DemoBirds) -> dict:
    """Accuracies from class scores [n, c] of all images."""
    groups = Groups(test)
    groups.update(scores[None], torch.arange(len(test)))
    return groups.rows()[0]


def above(cue: Cue, threshold: float) -> list[Head]:
    return [(layer, head) for layer, head in (cue.explained > threshold).nonzero().tolist()]


def widest_gap(explained: Tensor) -> float:
    """The middle of the widest gap between the sorted shares of all heads, as a threshold."""
    shares = explained.flatten().sort().values
    i = int(shares.diff().argmax())
    return float(shares[i : i + 2].mean())


def class_direction(texts: Tensor, classes: Tensor) -> Tensor:
    """[d] the classes' difference, within the space in which the cue's texts differ."""
    directions = subspace(texts, 1.0)
    return torch.nn.functional.normalize((classes[1] - classes[0]) @ directions.T @ directions, dim=0)


def show(kept: dict) -> None:
    figures = kept["figures"]
    seeds = list(next(iter(figures.values())))
    names = list(next(iter(next(iter(figures.values())).values())))
    print(
        f"{kept['split']} split, 4,096 images; "
        f"mean ± std over {len(seeds)} models of each alignment (seeds {', '.join(seeds)})"
    )
    titles = {"worst": "worst group, %", "average": "average, %", "kinds": "kinds of birds, %"}
    for measured, title in titles.items():
        rows = []
        for name in names:
            measures = ([row[name][measured] for row in models.values()] for models in figures.values())
            rows.append([name, *map(spread, measures)])
        print("\n" + table([title, *(f"alignment {alignment}" for alignment in figures)], rows))


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


if __name__ == "__main__":
    main()
