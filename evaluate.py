"""Run one of the experiments and print its table; results/<task>/ gets a page and everything as JSON.

    $ python evaluate.py --task waterbirds      # the embedded demo, offline: decide without the background
    $ python evaluate.py --list-models          # which of open_clip's models can be decomposed?
    $ python evaluate.py --task check           # do the terms sum to the embedding? (--model all: of all)
    $ python evaluate.py --task textspan        # what each head writes, in words, and its role
    $ python evaluate.py --task segmentation    # do maps lie on the object? beside ten other attributions
    $ python evaluate.py --task faithfulness    # do maps show what the model uses?
    $ python evaluate.py --task heatmap --image demo:12 --text "a gull" "at sea"
    $ python evaluate.py --task ablation        # which terms does accuracy need?
    $ python evaluate.py --task completeness    # how much of the heads do their texts hold?
    $ python evaluate.py --task retrieval --head 3.4 --image demo:12
    $ python evaluate.py --task debias --classes NAME NAME --cue TEXT TEXT --data FOLDER
    $ python evaluate.py --task neurons         # what single neurons of an MLP write
    $ python evaluate.py --task typographic     # see the bird although another's name is written beside it
    $ python evaluate.py --task terms           # keep every image's terms in a file, for analyses of your own
    $ python evaluate.py --task waterbirds --model ViT-L-14 --pretrained laion2b_s32b_b82k --heads paper \\
        --data DIR

DIR is the folder waterbird_complete95_forest2water2, with metadata.csv in it, or that of CelebA, with
list_attr_celeba.txt, img_align_celeba/ and list_eval_partition.txt in it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from files import InputError, atomic_write, locked, visible
from options import parse_args

if TYPE_CHECKING:
    from tasks.job import Job


def main(argv: list[str] | None = None) -> int:
    """Run one task. 0: done; 2: something given cannot be used, said in one line; 130: interrupted.

    Under torchrun every process runs this; the first one alone prints and writes.
    """
    args = parse_args(argv, __doc__)
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"
    code, message, speaks = 130, "interrupted; no results were written", True
    # The message is printed when the exception is gone, and with it the progress bars that it kept open.
    with contextlib.suppress(KeyboardInterrupt):
        code, message, speaks = run_or_refuse(args, sys.argv[1:] if argv is None else argv)
    if message and args.task and "--resume" not in message:
        state = args.out / args.task / ".state"
        message += f" (--resume goes on from what {state} holds)" if state.exists() else ""
    if message and speaks:
        print("evaluate.py: " + visible(" ".join(message.split("\n"))), file=sys.stderr)
    elif message:
        time.sleep(3)  # torchrun ends all processes with the first that ends: the one that speaks be first
    return code


def run_or_refuse(args: argparse.Namespace, typed: list[str]) -> tuple[int, str, bool]:
    """(exit code, what was wrong, whether this process is the one to say it)."""
    import torch  # takes seconds: --help and typing errors need not wait

    from baselines import BaselineError
    from decompose import DecompositionError
    from tasks import models, processes
    from tasks.job import Job

    if args.list_models:
        with printable():
            models.print_list()
            sys.stdout.flush()
        return 0, "", True
    job = Job(args)
    first = processes.process_rank() == 0
    try:
        with locked(args.out / args.task) if first else contextlib.nullcontext():
            run(job, first, shlex.join(["python", "evaluate.py", *typed]))
    except processes.OtherProcessError as error:
        time.sleep(3)  # the other one knows more, and torchrun ends this one when it has spoken
        return 2, str(error), first
    except (InputError, DecompositionError, BaselineError) as error:
        return 2, str(error), first or job.in_pass
    except (MemoryError, RuntimeError) as error:
        if "Kernel size can't be greater" in str(error):  # of the convolution that cuts patches
            return 2, f"--image-size {args.image_size} is smaller than a patch of this model", True
        lines = str(error).splitlines()
        told = [line for line in lines if "allocate memory" in line or "Unable to allocate" in line]
        if not (told or isinstance(error, (MemoryError, torch.OutOfMemoryError))):
            raise
        why = f" ({(told or lines)[0][:100]})" if lines else ""
        return 2, f"out of memory{why}; try a smaller --batch-size or fewer --workers", True
    return 0, "", True


def run(job: Job, first: bool, command: str) -> None:
    """The task and its files. What it prints comes last: if nobody can take it, nothing else is lost."""
    from tasks import checkpoint

    task, folder, printed = job.args.task, job.args.out / job.args.task, io.StringIO()
    if first:
        checkpoint.print_resume_hint(job)
    try:
        with contextlib.redirect_stdout(printed):
            results, sections = importlib.import_module(f"tasks.{task}").run(job)
        if first:
            elapsed = time.monotonic() - job.started
            write(folder, results | {"task": task, "seconds": round(elapsed, 1)}, sections, command)
            shutil.rmtree(job.checkpoint_folder, ignore_errors=True)
            paths = f"a page to look at: {folder / 'report.html'}; everything: {folder / 'results.json'}"
            printed.write(f"\n{time.monotonic() - job.started:.0f} s; {paths}\n")
    finally:
        if first:
            with printable():
                print(visible(printed.getvalue(), keep="\n"), end="", flush=True)


@contextlib.contextmanager
def printable() -> Iterator[None]:
    """Print characters that the terminal cannot show as their codes; a reader that left is no error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again when it ends
        if not isinstance(error, BrokenPipeError):
            why = error.strerror or error
            raise InputError(f"cannot print: {why}; what was to be said is in --out, too") from error


def write(folder: Path, results: dict, sections: list[str], command: str) -> None:
    """results.json and the page; the earlier ones are replaced when both are complete."""
    import report

    if not sections or isinstance(sections[0], report.Html):  # it does not say what it shows
        first, *_ = importlib.import_module(f"tasks.{results['task']}").__doc__.split("\n")
        asks = first.partition(": ")[2].partition(" (section")[0]
        sections = [asks[:1].upper() + asks[1:], *sections]
    settings = report.origin(command, results["seconds"], folder) | results["settings"]
    title = f"{results['task']}: {results['settings']['model'].split(',')[0]}"
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    table, page = folder / "results.json", folder / "report.html"
    path = table  # the one that is being written, for the message
    try:
        with atomic_write(page) as new_page, atomic_write(table) as new_table:
            new_table.write_text(text, encoding="utf-8", errors="backslashreplace")
            path = page
            document = report.page(title, settings, sections)
            new_page.write_text(document, encoding="utf-8", newline="\n", errors="backslashreplace")
            for path in (table, page):
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"cannot write {path}: {why}; what stood there before still does") from error


def interrupt(*_: object) -> None:
    """Ctrl-C, the first time: a second one while the program ends would only print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    # A shell makes what it runs in the background ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    sys.exit(main())
