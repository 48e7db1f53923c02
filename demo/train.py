"""Train the demo's CLIP model from scratch, on pictures and captions that are made here.

    $ python -m demo.train            # 19 minutes on two cores; writes demo/demo-vit.safetensors

Training is contrastive as in CLIP, with two differences that a world of few words needs. The targets are
soft: a picture matches every caption whose stated facts are all true of it, not only its own caption. And the
batches come from two sources (captions.py), two from the guide for each one from the web. The guide shows
each kind of bird in any place. The web captions say landbird or waterbird, and --alignment is the share of
these birds that are shown where such birds live. This share determines how strongly the two words come to
mean the place.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from . import ALIGNMENT, FOLDER, NAME, Tokenizer, captions, load, normalise, scenes
from .score import score

# By default glibc returns large blocks to the system at once. Fetching them again at every step takes longer
# than the arithmetic.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000, help="batches [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--lr", type=float, default=1.2e-3, help="highest learning rate; cosine decay to zero [%(default)s]"
    )
    parser.add_argument(
        "--alignment",
        type=float,
        default=ALIGNMENT,
        help="share of the web's birds shown where such birds live [%(default)s]",
    )
    parser.add_argument("--patch-dropout", type=float, default=0.25)
    parser.add_argument(
        "--pictures", type=int, default=60_000, help="of the guide; the web has half as many [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the captions")
    parser.add_argument("--init", type=Path, help="start from this checkpoint instead of from nothing")
    parser.add_argument("--out", type=Path, default=FOLDER / f"{NAME}.safetensors")
    return parser.parse_args(argv)


class Source:
    """Endless batches of pictures with captions from one source.

    Args:
        count: number of pictures.
        seed, alignment: as for scenes.sample.
        habits: how often a caption states each fact, captions.GUIDE or captions.WEB.
        rng: draws the order and the captions.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        alignment: float,
        habits: dict[str, float],
        rng: np.random.Generator,
        tokenizer: Tokenizer,
    ) -> None:
        facts = scenes.sample(count, seed, alignment)
        self.pictures, self.truth = scenes.render_all(facts, seed), captions.true_facts(facts)
        self.habits, self.rng, self.tokenizer = habits, rng, tokenizer
        self.queue = np.empty(0, dtype=int)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """[b, 3, 64, 64] normalised pictures, [b, context] tokens, and [b, b] matches.

        matches[i, j] is 1.0 if caption i is true of picture j, and 0.0 otherwise.
        """
        if len(self.queue) < size:
            self.queue = self.rng.permutation(len(self.pictures))
        rows, self.queue = self.queue[:size], self.queue[size:]
        written = [captions.write(self.truth[i], self.habits, self.rng) for i in rows]
        texts, stated = zip(*written, strict=True)
        stated = np.stack(stated)[:, None]
        matches = ((stated < 0) | (stated == self.truth[rows])).all(-1)
        return normalise(self.pictures[rows]), self.tokenizer(texts), torch.from_numpy(matches).float()


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, matches: Tensor) -> Tensor:
    """KL divergence from the soft targets, in both directions.

    It is zero if each caption's probability is spread evenly over the pictures that it fits, and vice versa.
    """
    logits = scale * F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T
    loss = 0.0
    for scores, target in ((logits, matches), (logits.T, matches.T)):
        target = target / target.sum(dim=1, keepdim=True)
        loss = loss + F.kl_div(scores.log_softmax(dim=1), target, reduction="batchmean") / 2
    return loss


def train(args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model, _, tokenizer = load(weights=args.init, force_patch_dropout=args.patch_dropout)
    guide = Source(args.pictures, 1000 + args.seed, 0.5, captions.GUIDE, rng, tokenizer)
    web = Source(args.pictures // 2, 2000 + args.seed, args.alignment, captions.WEB, rng, tokenizer)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    progress = tqdm(range(args.steps), desc="training", unit="batch", mininterval=10)
    average = None
    draft = args.out.with_suffix(".draft")  # remains if the run is stopped; --out is only replaced at the end
    for step in progress:
        for group in optimizer.param_groups:
            decay = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
            group["lr"] = args.lr * min(1, (step + 1) / 100) * decay
        images, tokens, matches = (web if step % 3 == 0 else guide).batch(args.batch_size)
        model.train()
        embeddings = model.encode_image(images), model.encode_text(tokens)
        loss = contrastive_loss(*embeddings, model.logit_scale.exp(), matches)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(50))
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.3f}", refresh=False)
        if (step + 1) % 500 == 0:
            tqdm.write(f"after {step + 1} steps: {describe(score(model.eval(), tokenizer, count=1024))}")
            save(model, draft)
    save(model, args.out)
    draft.unlink(missing_ok=True)
    return score(model.eval(), tokenizer, count=4096)


def save(model: torch.nn.Module, path: Path) -> None:
    """Write the checkpoint under another name first, so that an interrupted run never leaves half a file."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
    os.replace(partial, path)


def describe(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def main(argv: list[str] | None = None) -> None:
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()) and argv is None:
        command = [sys.executable, "-m", "demo.train", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | KEEP_MEMORY)
    args = parse_args(argv)
    start = time.time()
    torch.set_flush_denormal(True)  # for the whole process: arithmetic with denormal numbers is slow
    try:
        scores = train(args)
    finally:
        torch.set_flush_denormal(False)
    print(f"{describe(scores)}  ({(time.time() - start) / 60:.0f} minutes)")
    print(f"wrote {args.out}; the scores are on the split that was watched, not on the test split")


if __name__ == "__main__":
    main()
