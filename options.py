"""The options of evaluate.py: what each task takes, and one line for whoever gives it something else."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from files import visible

# Each task is run(job) in tasks/NAME.py. It uses these options, and refuses those that only other tasks list.
# What no task lists says how to run, how much to draw or where texts are, and every task takes it.
CUE = "data reference heads cue remove"
TASKS = {
    "check": "data",
    "textspan": "data reference texts",
    "waterbirds": f"{CUE} protocol",
    "segmentation": "data classes methods score prompt contrast protocol void",
    "faithfulness": "data reference methods score prompt contrast role",
    "heatmap": "data reference head role image text minus methods score",
    "ablation": "data reference protocol",
    "completeness": "data reference texts words",
    "debias": f"{CUE} classes",
    "retrieval": "data reference head role top image text",
    "neurons": "data reference layer neurons order",
    "typographic": "data reference heads",
    "terms": "data save",
}


def parse_args(argv: list[str] | None = None, description: str = "") -> argparse.Namespace:
    """All options of all tasks."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    list_help = "what of open_clip can be decomposed, with its pretrained tags"
    what.add_argument("--list-models", action="store_true", help=list_help)
    for add_options in (add_common_options, add_head_options, add_cue_options, add_map_options):
        add_options(parser)
    args = parser.parse_args(argv)
    refuse_unused(parser, args)
    usual = ["heads", "directions", "embedding", "texts", "rivals"]
    args.remove = args.remove or (usual if args.task == "waterbirds" else usual[:4])
    if args.protocol == "authors" and "reference" in TASKS[args.task].split():
        if args.reference == "val":
            parser.error("--protocol authors takes means over the test images; leave --reference out")
        args.reference = "test"
    return args


def refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what the task would ignore: who gives an option takes the result for one with it."""
    listed = {option for options in TASKS.values() for option in options.split()}
    for name in sorted(listed - set(TASKS.get(args.task, "").split())):
        if getattr(args, name) != parser.get_default(name):
            users = ", ".join(task for task, options in TASKS.items() if name in options.split())
            given = f"--task {args.task}" if args.task else "--list-models"
            parser.error(f"{given} does not use --{name}, which is for {users}")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What every task takes."""
    add = parser.add_argument_group("model, images, results").add_argument
    add("--model", help="open_clip's name of an architecture; without it the demo model")
    add("--pretrained", help="open_clip's tag, or a checkpoint file; none: random weights")
    size = "another than the model's own; positions are resized, as open_clip does"
    add("--image-size", type=positive, metavar="PIXELS", help=size)
    data = (
        "the folder of Waterbirds or CelebA, or any of images (CLASS/NAME.jpg gives labels); "
        "segmentation: gtsegs_ijcv.mat, or images/ and masks/ [the demo world]"
    )
    add("--data", help=data)
    splits = ("train", "val", "test")
    reference = "images that means come from [%(default)s]; test: as the authors"
    add("--reference", choices=splits, default="train", help=reference)
    add("--limit", type=positive, help="use this many images of each split, drawn with the seed")
    add("--seed", type=natural, default=0, help="of everything that is drawn at random [%(default)s]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... [%(default)s]")
    precision = "of the model; sums are always fp32 [%(default)s]"
    add("--precision", choices=("fp32", "bf16"), default="fp32", help=precision)
    add("--batch-size", type=positive, default=64, help="[%(default)s]")
    add("--workers", type=natural, help="processes that read images [4 at most]")
    add("--out", type=Path, default=Path("results"), help="folder for results [%(default)s]")
    add("--resume", action="store_true", help="go on where an earlier run of the same command was killed")
    add("--save", type=Path, metavar="FILE", help="terms: the file to write [terms.safetensors in --out]")
    save = "save what --resume needs this often [%(default)s]"
    add("--save-every", type=seconds, default=60.0, metavar="SECONDS", help=save)


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """What the tasks take that name terms or look things up by them."""
    add = parser.add_argument_group("textspan, completeness, retrieval, neurons").add_argument
    bank = "descriptions, one per line under `# category` lines [text_bank.txt; the demo has its own]"
    add("--text-bank", metavar="FILE", help=bank)
    texts = "textspan: texts per head [20, or half of a narrower head's width]; completeness: at most"
    add("--texts", type=positive, help=texts)
    words = "completeness: a second pool of texts, one per line (the commonest English words, say)"
    add("--words", metavar="FILE", help=words)
    head = "retrieval: by what these heads write together; heatmap: the map of each"
    add("--head", nargs="+", metavar="L.H", help=head)
    role = "the same of all heads of this role together; faithfulness: a row for their maps"
    add("--role", metavar="CATEGORY", help=role)
    add("--top", type=positive, default=12, help="retrieval: images to show [%(default)s]")
    add("--layer", type=int, help="neurons: which layer's MLP [the last; --order 2: the third from the end]")
    orders = "neurons: 1, what they write; 2, what they add through later heads [%(default)s]"
    add("--order", type=int, choices=(1, 2), default=1, help=orders)
    add("--neurons", type=positive, default=10, help="neurons: how many to show [%(default)s]")


def add_cue_options(parser: argparse.ArgumentParser) -> None:
    """What the tasks take that remove a cue."""
    add = parser.add_argument_group("waterbirds, debias").add_argument
    heads = "paper, auto (found with --cue), or a list like 3.7,2.1 (layer.head) [%(default)s]"
    add("--heads", default="auto", help=heads)
    cue = "a category of the bank, or texts, to take out [places; CelebA: gender]"
    add("--cue", nargs="+", metavar="TEXT", help=cue)
    ways = ("heads", "directions", "embedding", "texts", "rivals", "forward")
    rows = "rows of the table [heads directions embedding texts; waterbirds: also rivals, published methods]"
    add("--remove", nargs="+", choices=ways, help=rows)
    add("--draws", type=positive, default=100, help="random draws of heads [%(default)s]")
    classes = "debias, segmentation: what to tell apart, or (segmentation) a file [the data's]"
    add("--classes", nargs="+", metavar="NAME", help=classes)


def add_map_options(parser: argparse.ArgumentParser) -> None:
    """What the tasks take that make maps."""
    add = parser.add_argument_group("segmentation, faithfulness, heatmap").add_argument
    add("--methods", nargs="+", metavar="NAME", help="which attributions [all]")
    scores, published = ("published", "dot", "cosine", "logit"), "published: each its own [%(default)s]"
    add("--score", choices=scores, default="published", help=f"what a method explains; {published}")
    prompt = "explain the predicted class, the true one, or the one named [%(default)s]"
    add("--prompt", default="predicted", metavar="CLASS", help=prompt)
    who, paper = "who explains the class minus the mean over classes", "paper: the decomposition alone"
    contrasts = ("all", "paper", "none")
    add("--contrast", choices=contrasts, default="all", help=f"{who}; {paper} [%(default)s]")
    protocol = "authors: masks squashed, not cropped like images; waterbirds, ablation: their terms and means"
    add("--protocol", choices=("aligned", "authors"), default="aligned", help=protocol)
    add("--void", type=natural, metavar="VALUE", help="value of mask pixels to leave out")
    add("--image", metavar="FILE", help="heatmap, retrieval: the image; demo:12: a picture of the demo")
    text = "heatmap, retrieval: what to look for; heatmap takes several"
    add("--text", nargs="+", action="extend", metavar="TEXT", help=text)
    add("--minus", metavar="TEXT", help="heatmap: what to subtract from each text")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line, without the whole usage before it."""

    def error(self, message: str) -> None:
        self.exit(2, f"evaluate.py: {visible(message)}; see --help\n")


def whole(text: str, least: int, bits: int, expected: str) -> int:
    """A whole number from `least` on that fits so many bits, for argparse."""
    number = int(text) if text.isdecimal() and len(text) < 20 else -1
    if not least <= number < 2**bits:
        raise argparse.ArgumentTypeError(f"expected a whole number {expected}, got {text[:40]!r}")
    return number


positive = partial(whole, least=1, bits=31, expected="of at least 1")
natural = partial(whole, least=0, bits=32, expected="from 0")


def seconds(text: str) -> float:
    """A number from 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds from 0, got {text!r}")
    return number
