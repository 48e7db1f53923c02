"""How long naming heads takes: textspan() from moments, against Algorithm 1 written naively over all images.

$ python -m benchmarks.textspan      # the 384 heads of a ViT-L-14, 20 texts of 3,500, d = 768, 5,000 images
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from textspan import Moments, textspan


def naive(C: Tensor, R: Tensor, size: int) -> list[int]:
    """Algorithm 1 as printed, on all images, after projecting the texts onto the directions of the head."""
    _, strength, directions = torch.linalg.svd(C, full_matrices=False)
    directions = directions[:80][strength[:80] > 1e-6 * strength[0]]
    R = R @ directions.T @ directions
    C = C - C.mean(dim=0)
    picks = []
    for _ in range(size):
        j = int((R @ C.T).var(dim=1).argmax())
        r = R[j] / R[j].norm()
        C, R = C - torch.outer(C @ r, r), R - torch.outer(R @ r, r)
        picks.append(j)
    return picks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=384)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=3500)
    parser.add_argument("--size", type=int, default=20)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="number of heads that the naive way names too")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    texts = torch.nn.functional.normalize(draw(args.texts, args.dim), dim=1).double()
    # Heads write along a few directions much more than along others.
    spectrum = 0.9 ** torch.arange(args.head_width)
    maps = spectrum[:, None] * draw(args.heads, args.head_width, args.dim)
    values = draw(args.images, args.head_width)
    moments = Moments(args.head_width).update(values)

    ours, start = [], time.perf_counter()
    for A in maps:
        ours.append(textspan(moments.map(A), texts, args.size).indices)
    total = time.perf_counter() - start
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    job = f"{args.heads} heads x {args.size} texts out of {args.texts:,}, d = {args.dim}"
    print(f"{job}: {total:.2f} s from moments")

    ratios, same = [], 0
    for A, picks in list(zip(maps, ours, strict=True))[: args.rounds]:
        start = time.perf_counter()
        expected = naive(values.double() @ A.double(), texts, args.size)
        middle = time.perf_counter()
        textspan(moments.map(A), texts, args.size)
        ratios.append((middle - start) / (time.perf_counter() - middle))
        same += expected == picks
    print(
        f"naively over {args.images:,} images: {statistics.median(ratios):.0f} times as long "
        f"(median of {args.rounds} heads, {min(ratios):.0f} to {max(ratios):.0f}); "
        f"the same picks in {same} of {args.rounds}"
    )


if __name__ == "__main__":
    main()
