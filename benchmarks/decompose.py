"""What the decomposition costs: time and peak memory over encode_image (stock open_clip, random weights).

    $ python -m benchmarks.decompose                      # a class token, attention pooling twice; batch 8
    $ python -m benchmarks.decompose --models ViT-H-14 --device cuda --precision bf16

Time: each round runs encode_image, decompose, heatmap (one text), token_scores (10 texts), neurons (the last
layer), second_order (the effects of one MLP through the last four layers) and writers (of a head of the last
layer) one after the other; the last two in models that they take. Printed are the median, the smallest and
the largest ratio to the encode_image of the same round.

Memory: each job runs in a process of its own. Printed is its peak, counted from when the model has been
built, over the peak of a process that runs encode_image; in brackets, the same ratio without the memory that
the model takes. On a GPU, the memory is what torch has allocated.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch

from decompose import DecompositionError, decompose, heatmap, token_scores
from neurons import neurons, second_order, writers

JOBS = {
    "encode_image": lambda model, images, texts: model.encode_image(images),
    "decompose": lambda model, images, texts: decompose(model, images),
    "heatmap": lambda model, images, texts: heatmap(model, images, texts[:1]),
    "token_scores": token_scores,
    "neurons": lambda model, images, texts: neurons(model, images, -1),
    "second_order": lambda model, images, texts: second_order(model, images, -5),
    "writers": lambda model, images, texts: writers(model, images, -1, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["ViT-B-16", "ViT-B-16-SigLIP", "coca_ViT-B-32"])
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS)[1:], default=list(JOBS)[1:])
    cpu_time = "measure the time that the processor spends, on a machine that does other things, too"
    parser.add_argument("--cpu-time", action="store_true", help=cpu_time)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    # Used by the processes that measure their own memory.
    parser.add_argument("--peak-of", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(*peak_memory(args, args.models[0], args.peak_of))
        return
    versions = f"torch {torch.__version__}, open_clip {open_clip.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, {args.device}, {args.precision}")
    for name in args.models:
        report(args, name)


def build(args: argparse.Namespace, name: str) -> tuple:
    """The model, a batch of random images and 10 random texts."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, device=args.device, precision=args.precision).eval()
    dtype = next(model.parameters()).dtype
    images = torch.randn(args.batch_size, 3, *model.visual.image_size, device=args.device, dtype=dtype)
    return model, images, torch.randn(10, open_clip.get_model_config(name)["embed_dim"], device=args.device)


@torch.no_grad()
def seconds(job: str, inputs: tuple, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronise()
    start = clock()
    JOBS[job](*inputs)
    synchronise()
    return clock() - start


def report(args: argparse.Namespace, name: str) -> None:
    inputs = build(args, name)
    jobs = []
    for job in ("encode_image", *args.jobs):
        with contextlib.suppress(DecompositionError):
            seconds(job, inputs, args.device)  # warm up
            jobs.append(job)
    clock = time.process_time if args.cpu_time else time.perf_counter
    rounds = [{job: seconds(job, inputs, args.device, clock) for job in jobs} for _ in range(args.rounds)]
    plain = statistics.median(r["encode_image"] for r in rounds)
    peaks = {job: measure_peak(args, name, job) for job in jobs}
    peak, before = peaks["encode_image"]
    print(
        f"\n{name}, batch {args.batch_size}: encode_image {plain:.3f} s, "
        f"peak {peak / 1e9:.2f} GB, of it {before / 1e9:.2f} GB before"
    )
    for job in jobs[1:]:
        ratios = sorted(r[job] / r["encode_image"] for r in rounds)
        extra = (peaks[job][0] - peaks[job][1]) / (peak - before)
        print(
            f"  {job:<13} time x {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {args.rounds} rounds)"
            f"   peak memory x {peaks[job][0] / peak:.3f} ({extra:.2f})"
        )


def measure_peak(args: argparse.Namespace, name: str, job: str) -> tuple[int, int]:
    """Bytes at the peak and before the job, measured in a new process."""
    options = ["--batch-size", str(args.batch_size), "--device", args.device, "--precision", args.precision]
    command = [sys.executable, "-m", "benchmarks.decompose", "--models", name, "--peak-of", job, *options]
    return tuple(map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))


def peak_memory(args: argparse.Namespace, name: str, job: str) -> tuple[int, int]:
    inputs = build(args, name)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        Path("/proc/self/clear_refs").write_text("5")  # on Linux, this resets the peak
        before, peak = resident("VmRSS"), lambda: resident("VmHWM")
    seconds(job, inputs, args.device)
    return peak(), before


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
