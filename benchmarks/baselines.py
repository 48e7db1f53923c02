"""What the comparison attributions cost, over the model's own passes (stock open_clip, random weights).

    $ python -m benchmarks.baselines                      # ViT-B-16, batch 8
    $ python -m benchmarks.baselines --models ViT-L-14 --device cuda

Each round runs a forward pass (encode_image without gradients), a forward and backward pass (of a sum of dot
products, with the gradients of all weights, as in a training step) and then every method. The table shows
each method's time over the forward pass, and over the forward and backward pass, of the same round: medians
over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import open_clip
import torch

from baselines import METHODS
from tasks.attribution import decomposition

# The most that a method may cost: over a forward pass, over a forward and backward pass. None: no limit.
LIMITS = {
    "raw-attention": (1.3, None),
    "rollout": (1.3, None),
    "lrp": (None, 5.0),
    "lrp-conserving": (None, 5.0),
}
OTHERS = (None, 2.5)  # the limits of all other methods


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["ViT-B-16"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, open_clip {open_clip.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, {args.device}, fp32")
    for name in args.models:
        report(args, name)


def report(args: argparse.Namespace, name: str) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model(name, device=args.device).eval()
    images = torch.randn(args.batch_size, 3, *model.visual.image_size, device=args.device)
    texts = torch.randn(args.batch_size, model.visual.output_dim, device=args.device)

    @torch.no_grad()
    def forward() -> None:
        model.encode_image(images)

    def both() -> None:
        (model.encode_image(images) * texts).sum().backward()
        model.zero_grad()

    jobs = {
        "forward": forward,
        "forward + backward": both,
        "decomposition": lambda: decomposition(model, images, texts),
    }
    jobs |= {key: lambda method=method: method(model, images, texts) for key, method in METHODS.items()}
    for job in jobs.values():
        seconds(job, args.device)  # warm up
    rounds = [{key: seconds(job, args.device) for key, job in jobs.items()} for _ in range(args.rounds)]
    plain, training = (statistics.median(r[key] for r in rounds) for key in ("forward", "forward + backward"))
    print(
        f"\n{name}, batch {args.batch_size}, {args.rounds} rounds: "
        f"forward {plain:.3f} s, forward + backward {training:.3f} s"
    )
    print(f"{'time over':<20}{'forward':>9}{'forward + backward':>21}   limit")
    for key in list(jobs)[2:]:
        ratios = [
            statistics.median(r[key] / r[over] for r in rounds) for over in ("forward", "forward + backward")
        ]
        limits = LIMITS.get(key, OTHERS) if key in METHODS else (None, None)
        verdicts = [
            f"{limit} x {over}: {'kept' if ratio <= limit else 'BROKEN'}"
            for ratio, limit, over in zip(ratios, limits, ("forward", "both"), strict=True)
            if limit
        ]
        print(f"{key:<20}{ratios[0]:>9.2f}{ratios[1]:>21.2f}   {', '.join(verdicts)}")


def seconds(job, device: str) -> float:
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronise()
    start = time.perf_counter()
    job()
    synchronise()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
