"""Run one of the experiments and print its table; results/<task>/ gets a page to look at and everything as JSON.

    $ python evaluate.py --task waterbirds      # the embedded demo, offline: take the background out of what decides
    $ python evaluate.py --list-models          # which of open_clip's models can be decomposed?
    $ python evaluate.py --task check           # do the terms sum to the embedding? (--model all: of every architecture)
    $ python evaluate.py --task textspan        # what each head writes, in words, and its role
    $ python evaluate.py --task segmentation    # do maps lie on the object? the decomposition and ten other attributions
    $ python evaluate.py --task heatmap --image FILE --text "a bird"
    $ python evaluate.py --task ablation        # which terms does accuracy need?
    $ python evaluate.py --task completeness    # how much of the heads do their texts hold?
    $ python evaluate.py --task retrieval --head 3.4 --image FILE
    $ python evaluate.py --task debias --classes NAME NAME --cue TEXT TEXT --data FOLDER
    $ python evaluate.py --task neurons         # what single neurons of an MLP write
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
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    what.add_argument("--list-models", action="store_true", help="what of open_clip can be decomposed, with its pretrained tags")
    for add_options in (of_models, of_heads, of_cues, of_maps):
        add_options(parser)
    return parser.parse_args(argv)


def of_models(parser: argparse.ArgumentParser) -> None:
    """What every task takes."""
    add = parser.add_argument_group("model, images, results").add_argument
    add("--model", help="open_clip's name of an architecture; without it the demo model")
    add("--pretrained", help="open_clip's tag, or a checkpoint file; none: random weights")
    add("--image-size", type=positive, metavar="PIXELS", help="another than the model's own; positions are resized, as open_clip does")
    data = "Waterbirds' folder, or any of images (CLASS/NAME.jpg gives labels); segmentation: gtsegs_ijcv.mat, or images/ and masks/"
    add("--data", help=f"{data} [the demo world]")
    splits = ("train", "val", "test")
    add("--reference", choices=splits, default="train", help="images that means come from [%(default)s]; test: as the authors")
    add("--limit", type=positive, help="use this many images of each split, drawn with the seed")
    add("--seed", type=natural, default=0, help="of everything that is drawn at random [%(default)s]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... [%(default)s]")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model; sums are always fp32 [%(default)s]")
    add("--batch-size", type=positive, default=64, help="[%(default)s]")
    add("--workers", type=natural, help="processes that read images [4 at most]")
    add("--out", type=Path, default=Path("results"), help="folder for results [%(default)s]")


def of_heads(parser: argparse.ArgumentParser) -> None:
    """What the tasks take that name terms or look things up by them."""
    add = parser.add_argument_group("textspan, completeness, retrieval, neurons").add_argument
    add("--text-bank", metavar="FILE", help="descriptions, one per line under `# category` lines [text_bank.txt; the demo has its own]")
    add("--texts", type=positive, help="textspan: texts per head [20, or half of a narrower head's width]; completeness: at most")
    add("--words", metavar="FILE", help="completeness: a second pool of texts, one per line (the commonest English words, say)")
    add("--head", metavar="L.H", help="retrieval: by what this head writes")
    add("--role", metavar="CATEGORY", help="retrieval: by what all heads of this role write")
    add("--top", type=positive, default=12, help="retrieval: images to show [%(default)s]")
    add("--layer", type=int, help="neurons: which layer's MLP [the last]")
    add("--neurons", type=positive, default=10, help="neurons: how many to show [%(default)s]")


def of_cues(parser: argparse.ArgumentParser) -> None:
    """What the tasks take that remove a cue."""
    add = parser.add_argument_group("waterbirds, debias").add_argument
    add("--heads", default="auto", help="paper, auto (found with --cue), or a list like 3.7,2.1 (layer.head) [%(default)s]")
    add("--cue", nargs="+", default=["places"], metavar="TEXT", help="a category of the bank, or texts, to take out [places]")
    ways = ("heads", "directions", "embedding")
    add("--remove", nargs="+", choices=ways, default=ways, help="rows of the table [all]")
    add("--draws", type=positive, default=100, help="random draws of heads [%(default)s]")
    add("--classes", nargs="+", metavar="NAME", help="debias, segmentation: what to tell apart, or (segmentation) a file [the data's]")


def of_maps(parser: argparse.ArgumentParser) -> None:
    """What the tasks take that make maps."""
    add = parser.add_argument_group("segmentation, heatmap").add_argument
    add("--methods", nargs="+", metavar="NAME", help="which attributions [all]")
    published = "what a method explains; published: each its own [%(default)s]"
    add("--score", choices=("published", "dot", "cosine", "logit"), default="published", help=published)
    add(
        "--prompt",
        default="predicted",
        metavar="CLASS",
        help="explain the predicted class, the true one, or the one named [%(default)s]",
    )
    contrast = "who explains the class minus the mean over classes; paper: the decomposition alone [%(default)s]"
    add("--contrast", choices=("all", "paper", "none"), default="all", help=contrast)
    protocol = "masks cropped like images, or squashed as the authors do [%(default)s]"
    add("--protocol", choices=("aligned", "authors"), default="aligned", help=protocol)
    add("--void", type=natural, metavar="VALUE", help="value of mask pixels to leave out")
    add("--image", metavar="FILE", help="heatmap, retrieval: the image")
    add("--text", action="append", metavar="TEXT", help="heatmap, retrieval: what to look for; heatmap takes several")


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

    from baselines import BaselineError
    from datasets import InputError
    from decompose import DecompositionError

    start, code, message = time.time(), 2, ""
    if args.list_models:
        from tasks.models import print_list

        print_list()
        return 0
    try:
        folder = writable(args.out / args.task)
        results, sections = importlib.import_module(f"tasks.{args.task}").run(args)
        results |= {"task": args.task, "seconds": round(time.time() - start, 1)}
        write_json(folder / "results.json", results)
        write_page(folder / "report.html", results, sections)
    except (InputError, DecompositionError, BaselineError) as error:
        message = str(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        message = f"out of memory ({str(error)[:100]}); try a smaller --batch-size"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; nothing was written"
    if message:  # said here, where the exception is gone, and with it the progress bars that it held open
        print(f"evaluate.py: {message}", file=sys.stderr)
        return code
    print(f"\n{time.time() - start:.0f} s; a page to look at: {folder / 'report.html'}; everything: {folder / 'results.json'}")
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


def write_page(path: Path, results: dict, sections: list[str]) -> None:
    """One HTML file that needs nothing else."""
    import report
    from datasets import InputError

    title = f"{results['task']}: {results['settings']['model'].split(',')[0]}"
    try:
        report.write(path, report.page(title, results["settings"], sections))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; what stood there before still does") from error


if __name__ == "__main__":
    sys.exit(main())
