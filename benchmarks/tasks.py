"""What a task's pass over images costs, over a plain encode_image pass (stock open_clip, random weights).

    $ python -m benchmarks.tasks                 # ViT-B-16, batch 16, 1,000 classes

The time per batch is that of the decomposition and of what the task adds to its sums. What is done only once
(text embeddings, TextSpan, tables) is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

import open_clip
import torch

from cue import CueVotes, subspace
from decompose import Decomposition, decompose, head_maps
from neurons import neurons
from tasks.ablation import ablations
from tasks.completeness import SIZES, along_texts
from tasks.debias import Outcomes
from tasks.neurons import Activity, whole_maps
from tasks.reference import Kept, Reference
from tasks.removal import Plan, Scores, random_heads, scorer
from tasks.waterbirds import Groups
from textspan import Moments

CLASSES, DRAWS = 1000, 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = open_clip.create_model(args.model).eval()
    images = torch.randn(args.batch_size, 3, *model.visual.image_size)
    maps = head_maps(model)
    depth, heads, width, dim = maps.shape
    classes = torch.nn.functional.normalize(torch.randn(CLASSES, dim), dim=-1)
    read = maps @ classes.T
    own, mlps, stem = torch.zeros(depth, heads, width), torch.zeros(depth, dim), torch.zeros(dim)
    reference = Reference(Moments(width, (depth, heads)), mlps, stem, own, Moments(dim), maps, 0.0, "")
    moments, kept = Moments(width, (depth, heads)), Kept(10**6, 10**6, 0, slice(depth - 4, depth))
    rows = torch.arange(args.batch_size)
    cue = torch.nn.functional.normalize(torch.randn(46, dim), dim=-1)
    chosen = [(depth - 1, 0), (depth - 1, 1), (depth - 2, 3)]
    plan = Plan(
        ("heads", "directions", "embedding"), (depth, heads), chosen, random_heads(chosen, heads, DRAWS, 0)
    )
    every, votes = torch.cat([plan.rows, plan.draws]), CueVotes(cue, maps, torch.zeros(dim))
    few, many = (scorer(reference, subspace(cue), votes, some) for some in (classes[:2], classes))
    birds = SimpleNamespace(classes=("a", "b"), y=rows % 2, place=rows // 2 % 2)
    groups, outcomes = Groups(birds), Outcomes(len(cue), rows % CLASSES, None)
    still, most = torch.zeros(CLASSES), max(SIZES)
    reads = {
        pool: (torch.randn(4, heads, width, most), torch.randn(4, heads, most, CLASSES)) for pool in "abc"
    }
    activity = Activity(depth - 1, whole_maps(neurons(model, images, -1)))
    jobs = {
        "encode_image": lambda: model.encode_image(images),
        "decompose": lambda: decompose(model, images),
        "textspan, roles (moments, kept values)": lambda: collect(decompose(model, images), moments, kept),
        "waterbirds, reference pass": lambda: collect(decompose(model, images), moments, votes),
        f"waterbirds ({DRAWS} random draws)": lambda: groups.update(
            few(images, decompose(model, images)).after(every), rows
        ),
        f"debias ({DRAWS} random draws)": lambda: debias(
            many(images, decompose(model, images)), every, outcomes
        ),
        "completeness (3 pools of texts)": lambda: along_texts(
            decompose(model, images).values[:, -4:], still, reads, list(SIZES)
        ),
        "retrieval (what one head writes)": lambda: (
            decompose(model, images).values[:, [depth - 1], [0]].flatten(1).cpu()
        ),
        "neurons, reference pass": lambda: activity.update(neurons(model, images, -1), rows),
        "ablation": lambda: [
            scores.argmax(dim=1)
            for scores in ablations(decompose(model, images), reference, classes, read).values()
        ],
    }
    with torch.no_grad():
        for job in jobs.values():
            job()
        rounds = [{name: seconds(job) for name, job in jobs.items()} for _ in range(args.rounds)]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{args.model}, batch {args.batch_size}, {CLASSES:,} classes"
    )
    for name in list(jobs)[1:]:
        ratios = sorted(r[name] / r["encode_image"] for r in rounds)
        spread = f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {args.rounds} rounds)"
        print(f"  {name:<40} x {statistics.median(ratios):.3f} {spread}")


def collect(terms: Decomposition, moments: Moments, more: Kept | CueVotes) -> None:
    moments.update(terms.values)
    if isinstance(more, Kept):
        more.update(terms, torch.arange(len(terms.values)))
    else:
        more.update(terms.embedding, terms.values)


def debias(scores: Scores, every: torch.Tensor, outcomes: Outcomes) -> None:
    outcomes.update(scores.after(every), scores.label, torch.arange(len(scores.label)))


def seconds(job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
