"""Run one of the paper's experiments and print its table; everything goes to results/<task>/results.json too.

    $ python evaluate.py --task waterbirds      # the embedded demo, offline
    $ python evaluate.py --task textspan        # what each head writes, in words
    $ python evaluate.py --task check           # do the terms sum to the embedding?
    $ python evaluate.py --task waterbirds --model ViT-L-14 --pretrained laion2b_s32b_b82k --heads paper --data DIR

DIR is the folder waterbird_complete95_forest2water2, with metadata.csv in it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

TASKS = ("check", "textspan", "waterbirds", "segmentation", "heatmap", "ablation", "completeness", "debias", "retrieval", "neurons")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All options of all tasks."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, required=True)
    add("--model", help="open_clip's name of an architecture; without it the demo model")
    add("--pretrained", help="open_clip's tag, or a checkpoint file; none: random weights")
    add("--data", help="folder of Waterbirds; segmentation: gtsegs_ijcv.mat, or a folder with images/ and masks/ [the demo world]")
    add(
        "--reference",
        choices=("train", "val", "test"),
        default="train",
        help="images that means come from [%(default)s]; test: as the authors",
    )
    add(
        "--heads",
        default="auto",
        help="waterbirds: paper, auto (found with --cue), or a list like 3.7,2.1 (layer.head) [%(default)s]",
    )
    add(
        "--cue",
        nargs="+",
        default=["places"],
        metavar="TEXT",
        help="waterbirds: a category of the bank, or texts, to take out [places]",
    )
    remove = ("heads", "directions", "embedding")
    add("--remove", nargs="+", choices=remove, default=remove, help="waterbirds: rows of the table [all]")
    add("--draws", type=positive, default=100, help="waterbirds: random draws of heads [%(default)s]")
    add("--methods", nargs="+", metavar="NAME", help="segmentation, heatmap: which attributions [all]")
    add(
        "--prompt",
        default="predicted",
        metavar="CLASS",
        help="segmentation: explain the predicted class, the true one, or the one named [%(default)s]",
    )
    add(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="segmentation, debias: classes to predict among; segmentation: or a file [the data's, or ImageNet's]",
    )
    add(
        "--contrast",
        choices=("all", "paper", "none"),
        default="all",
        help="segmentation: who explains the class minus the mean over classes; paper: the decomposition alone [%(default)s]",
    )
    add(
        "--score",
        choices=("published", "dot", "cosine", "logit"),
        default="published",
        help="segmentation, heatmap: what a method explains; published: each its own [%(default)s]",
    )
    add(
        "--protocol",
        choices=("aligned", "authors"),
        default="aligned",
        help="segmentation: masks cropped like images, or squashed as the authors do [%(default)s]",
    )
    add("--void", type=natural, metavar="VALUE", help="segmentation: value of mask pixels to leave out")
    add("--image", metavar="FILE", help="heatmap, retrieval: the image")
    add("--text", action="append", metavar="TEXT", help="heatmap, retrieval: what to look for; heatmap takes several")
    add("--texts", type=positive, help="textspan: texts per head [20, or half of a narrower head's width]; completeness: at most")
    add(
        "--text-bank",
        metavar="FILE",
        help="descriptions, one per line under `# category` lines [text_bank.txt; the demo has its own]",
    )
    add("--words", metavar="FILE", help="completeness: a second pool of texts, one per line (the commonest English words, say)")
    add("--head", metavar="L.H", help="retrieval: by this head's contribution")
    add("--role", metavar="CATEGORY", help="retrieval: by all heads of this role together")
    add("--top", type=positive, default=12, help="retrieval: images to show [%(default)s]")
    add("--layer", type=int, help="neurons: which layer's MLP [the last]")
    add("--neurons", type=positive, default=10, help="neurons: how many to show [%(default)s]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... [%(default)s]")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model; sums are always fp32 [%(default)s]")
    add("--batch-size", type=positive, default=64)
    add("--workers", type=natural, help="processes that read images [4 at most]")
    add("--limit", type=positive, help="use this many images of each split, drawn with the seed")
    add("--seed", type=natural, default=0, help="of the random heads, --limit and the images that the cue is centred on [%(default)s]")
    add("--out", type=Path, default=Path("results"), help="folder for results [%(default)s]")
    return parser.parse_args(argv)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line, without the whole usage before it."""

    def error(self, message: str) -> None:
        self.exit(2, f"evaluate.py: {message}; see --help\n")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text) if text.lstrip("-").isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def natural(text: str) -> int:
    """A whole number from 0 that fits 32 bits, for argparse."""
    number = int(text) if text.isdigit() else -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return number


def main(argv: list[str] | None = None) -> int:
    """Run one task. 0: done; 2: something given cannot be used, said in one line; 130: interrupted."""
    args = parse_args(argv)
    import torch  # takes seconds: --help and typing errors need not wait

    from datasets import InputError
    from decompose import DecompositionError

    start = time.time()
    try:
        folder = writable(args.out / args.task)
        results = importlib.import_module(f"tasks.{args.task}").run(args)
        results |= {"task": args.task, "seconds": round(time.time() - start, 1)}
        write_json(folder / "results.json", results)
    except (InputError, DecompositionError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"evaluate.py: out of memory ({str(error)[:100]}); try a smaller --batch-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"\n{time.time() - start:.0f} s; everything in {folder / 'results.json'}")
    return 0


def writable(folder: Path) -> Path:
    """The folder, made if need be, and found to take a file: better now than after the work."""
    from datasets import InputError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(f"cannot write to --out {folder}: {error.strerror or error}") from error


def write_json(path: Path, results: dict) -> None:
    """All or nothing: what was there before stays until the new file is complete."""
    from datasets import InputError

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}; what stood there before still does") from error


if __name__ == "__main__":
    sys.exit(main())
