"""Does a task scale? Memory at 1,000 and 100,000 images, pace beside a bare loop, two processes.

    $ python -m benchmarks.scale                       # --task waterbirds; 15 minutes on two cores
    $ python -m benchmarks.scale --sizes 1000 10000    # a shorter run

The demo world renders as many pictures as it is asked for: half of --sizes for the means and half to score.
Each process has one thread. Memory is the peak of the whole process, and most of it is torch. The bare loop
runs encode_image over the same pictures from the same loader. Of the task, only the passes over images are
timed, and every image that they read is counted (512 are read twice, for the centre). The demo's model is so
small that the work around it counts most; for models of usual size see benchmarks.tasks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch

import evaluate
from demo.images import DemoBirds
from tasks import passes
from zeroshot import load_clip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--task", default="waterbirds")
    parser.add_argument("--rounds", type=int, default=3, help="number of timed rounds")
    parser.add_argument("--timed", type=int, default=8000, help="images in each timed run")
    # Used by the processes that measure themselves.
    parser.add_argument("--job", nargs=2, metavar=("NAME", "IMAGES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(args.task, args.job[0], int(args.job[1]))))
        return
    print(f"torch {torch.__version__}, one thread per process; --task {args.task}, demo world")
    peaks = []
    for size in args.sizes:
        found = run(args, "task", size)
        peaks.append(found["peak"])
        pace = f"{found['seconds']:.1f} s in passes, {found['images'] / found['seconds']:.0f} images/s"
        print(f"{size:>9,} images: peak {found['peak'] / 1e6:,.0f} MB, {pace}", flush=True)
    print(f"peak memory, largest over smallest: {peaks[-1] / peaks[0]:.3f}", flush=True)
    bare, halves = [], []
    for _ in range(args.rounds):
        loop = run(args, "bare", args.timed)
        one = run(args, "task", args.timed)
        two = run(args, "task", args.timed, 2)
        bare.append(one["images"] / one["seconds"] * loop["seconds"] / loop["images"])
        halves.append(two["seconds"] / one["seconds"])
    print(f"{args.timed:,} images, {args.rounds} rounds, median (smallest to largest):")
    for title, ratios in (
        ("pace of the task over a bare loop", sorted(bare)),
        ("time of two processes over one", sorted(halves)),
    ):
        print(f"  {title:<36} {ratios[len(ratios) // 2]:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def run(args: argparse.Namespace, job: str, size: int, processes: int = 1) -> dict:
    """Run the job in one or several new processes, and return what it has measured."""
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = ["--task", args.task, "--job", job, str(size)]
    command = [sys.executable, *launch, "-m", "benchmarks.scale", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[0])


def measure(task: str, job: str, size: int) -> dict:
    """Run the job here: seconds spent in passes over images, images read, and the peak of memory in bytes."""
    for split in ("train", "test"):
        DemoBirds.sizes[split] = size // 2
    seconds, counts = [0.0], [0]
    if job == "bare":
        clip = load_clip(device="cpu")
        with torch.no_grad():
            for split in ("train", "test"):
                start = time.perf_counter()
                data = DemoBirds(split, clip.preprocess)
                for images, indices in passes.batches(data, 64, 0, split, clip.device):
                    clip.model.encode_image(images)
                    counts.append(len(indices))
                seconds.append(time.perf_counter() - start)
    else:
        # This comes before the task imports the function.
        passes.one_pass = timing(passes.one_pass, seconds, counts)
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            code = evaluate.main(["--task", task, "--workers", "0", "--save-every", "1e9", "--out", out])
        if code:
            sys.exit(code)
    return {
        "seconds": sum(seconds),
        "images": sum(counts),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def timing(
    one_pass: Callable[..., Iterator], seconds: list[float], counts: list[int]
) -> Callable[..., Iterator]:
    """The same pass, which also records its images, and its seconds with all that is done in them."""

    def timed(*args: object) -> Iterator:
        start = time.perf_counter()
        for images, indices in one_pass(*args):
            yield images, indices
            counts.append(len(indices))
        seconds.append(time.perf_counter() - start)

    return timed


if __name__ == "__main__":
    main()
