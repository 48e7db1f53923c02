"""What a task's pass over the images costs beside a plain encode_image pass over the same images; stock open_clip, random weights.

    $ python -m benchmarks.tasks                 # ViT-B-16, batch 16, 1,000 classes

Per batch: the decomposition and what the task adds to its sums. What is done once (text embeddings, TextSpan, tables) is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

import open_clip
import torch

from decompose import decompose, head_maps, neurons
from tasks.ablation import ablations
from tasks.common import Kept, Reference
from tasks.completeness import SIZES, along_texts
from tasks.neurons import Activity, whole_maps
from textspan import Moments

CLASSES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    mean = SimpleNamespace(mean=torch.zeros(depth, heads, width))
    reference = Reference(mean, torch.zeros(depth, dim), torch.zeros(dim), torch.zeros(depth, heads, width), None, maps, 0.0, "")
    moments, kept = Moments(width, (depth, heads)), Kept(10**6, 10**6, 0, slice(depth - 4, depth))
    still, most = torch.zeros(CLASSES), max(SIZES)
    reads = {pool: (torch.randn(4, heads, width, most), torch.randn(4, heads, most, CLASSES)) for pool in "abc"}
    activity = Activity(depth - 1, whole_maps(neurons(model, images, -1)))
    jobs = {
        "encode_image": lambda: model.encode_image(images),
        "decompose": lambda: decompose(model, images),
        "textspan, roles (moments, kept values)": lambda: collect(decompose(model, images), moments, kept),
        "completeness (3 pools of texts)": lambda: along_texts(decompose(model, images).values[:, -4:], still, reads, list(SIZES)),
        "retrieval (what one head writes)": lambda: decompose(model, images).values[:, [depth - 1], [0]].flatten(1).cpu(),
        "neurons, reference pass": lambda: activity.update(neurons(model, images, -1)),
        "ablation": lambda: [scores.argmax(dim=1) for _, scores in ablations(decompose(model, images), reference, classes, read)],
    }
    with torch.no_grad():
        for job in jobs.values():
            job()
        rounds = [{name: seconds(job) for name, job in jobs.items()} for _ in range(args.rounds)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.model}, batch {args.batch_size}, {CLASSES:,} classes")
    for name in list(jobs)[1:]:
        ratios = sorted(r[name] / r["encode_image"] for r in rounds)
        print(f"  {name:<40} x {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}, {args.rounds} rounds)")


def collect(terms, moments: Moments, kept: Kept) -> None:
    moments.update(terms.values)
    kept(terms)


def seconds(job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
