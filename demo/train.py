"""Train the demo's CLIP models, on pictures and captions that are made here.

    $ python -m demo.train                    # 19 minutes on two cores; writes demo/demo-vit.safetensors
    $ python -m demo.train --world written    # 25 minutes more, from there; demo/demo-vit-written.safetensors

Training is contrastive as in CLIP, with two differences that a world of few words needs. The targets are
soft: a picture matches every caption whose stated facts are all true of it, not only its own caption. And the
batches come from several sources (sources.py). In the world of birds, two are from a field guide for each one
from the web. The guide shows each kind of bird in any place. The web captions say landbird or waterbird, and
--alignment is the share of these birds that are shown where such birds live. This share determines how
strongly the two words come to mean the place. In the world with written words, captions may name the bird
that is seen or the word that is written, so the name of a kind comes to mean both.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from . import ALIGNMENT, FOLDER, NAME, WRITTEN, Tokenizer, captions, load
from .score import score, score_written
from .sources import Signs, Source

# By default glibc returns large blocks to the system at once. Fetching them again at every step takes longer
# than the arithmetic.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


# The defaults of each world.
WORLDS = {
    "birds": {
        "steps": 3000,
        "batch_size": 128,
        "lr": 1.2e-3,
        "patch_dropout": 0.25,
        "pictures": 60_000,
        "seed": 0,
        "init": None,
        "out": FOLDER / f"{NAME}.safetensors",
    },
    "written": {
        "steps": 5000,
        "batch_size": 64,
        "lr": 1e-3,
        "patch_dropout": 0.0,
        "pictures": 16_000,
        "seed": 1,
        "init": FOLDER / f"{NAME}.safetensors",
        "out": FOLDER / f"{WRITTEN}.safetensors",
    },
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=WORLDS, default="birds")
    parser.add_argument("--steps", type=int, help=f"batches {defaults('steps')}")
    parser.add_argument("--batch-size", type=int, help=f"{defaults('batch_size')}")
    rate = f"highest learning rate; cosine decay to zero {defaults('lr')}"
    parser.add_argument("--lr", type=float, help=rate)
    parser.add_argument(
        "--alignment",
        type=float,
        default=ALIGNMENT,
        help="share of the web's birds shown where such birds live [%(default)s]",
    )
    parser.add_argument("--patch-dropout", type=float, help=f"{defaults('patch_dropout')}")
    pictures = f"of the guide; the web has half as many {defaults('pictures')}"
    parser.add_argument("--pictures", type=int, help=pictures)
    parser.add_argument("--seed", type=int, help=f"of the order and the captions {defaults('seed')}")
    parser.add_argument("--init", type=Path, help=f"start from this checkpoint {defaults('init')}")
    parser.add_argument("--out", type=Path, help=f"{defaults('out')}")
    args = parser.parse_args(argv)
    for name, value in WORLDS[args.world].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def defaults(option: str) -> str:
    """For the help: the option's default in each world."""
    return f"[{'; '.join(f'{world}: {values[option]}' for world, values in WORLDS.items())}]"


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
    if args.world == "birds":
        model, _, tokenizer = load(weights=args.init, force_patch_dropout=args.patch_dropout)
        guide = Source(args.pictures, 1000 + args.seed, 0.5, captions.GUIDE, rng, tokenizer)
        web = Source(args.pictures // 2, 2000 + args.seed, args.alignment, captions.WEB, rng, tokenizer)
        batch = lambda step: (web if step % 3 == 0 else guide).batch(args.batch_size)  # noqa: E731
        watch = score
    else:
        model, tokenizer = load_reader(args.init, args.patch_dropout)
        signs = Signs(args.pictures, 4000 + args.seed, rng, tokenizer)
        batch = partial(signs.batch, args.batch_size)
        watch = score_written
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
        images, tokens, matches = batch(step)
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
            tqdm.write(f"after {step + 1} steps: {describe(watch(model.eval(), tokenizer, count=1024))}")
            save(model, draft)
    save(model, args.out)
    draft.unlink(missing_ok=True)
    return watch(model.eval(), tokenizer, count=4096)


def load_reader(init: Path, patch_dropout: float) -> tuple[torch.nn.Module, Tokenizer]:
    """The model of the written world from a checkpoint of either world; its new words start at random."""
    model, _, tokenizer = load(weights=None, name=WRITTEN, force_patch_dropout=patch_dropout)
    state, old = load_file(init), load(weights=None)[2]
    if len(state["token_embedding.weight"]) == old.end + 1:
        rows = model.token_embedding.weight.detach().clone()
        numbers = old.number | {None: 0, "start": old.start, "end": old.end}
        new = tokenizer.number | {None: 0, "start": tokenizer.start, "end": tokenizer.end}
        for word, number in numbers.items():
            rows[new[word]] = state["token_embedding.weight"][number]
        state["token_embedding.weight"] = rows
    model.load_state_dict(state)
    return model, tokenizer


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
