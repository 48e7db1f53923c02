"""Bad input is met with one clear line: what was expected, what was found, what to do. Nothing is lost by it.

Most cases are rows of tables: how to make the arguments, and the words that the line must hold. Where a row
fails, the program should be changed, not the row. The last part is about what must work although it looks
odd, and about runs that are cut short.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import pickle
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import BinaryIO

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import evaluate
import report
import tasks.ablation
import tasks.check
import tasks.heatmap
import tasks.job
import tasks.models
from demo.images import DemoBirds
from tasks import passes

ROOT = Path(__file__).parent.parent
# open_clip's list of configurations is one for all tests: a name that no other file uses.
MODEL = "tiny-bad-input"
QUICK = ("--workers", "0", "--limit", "8", "--draws", "2")
EARLIER = {"results.json": b'{"earlier": "results"}\n', "report.html": b"<!doctype html>earlier page\n"}


# What one clear line is, and the negative control: what is not.


def shown(stderr: str) -> list[str]:
    """The lines that stay on a terminal: of a progress bar, what came after its last carriage return."""
    lines = [line.split("\r")[-1] for line in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", stderr).split("\n")]
    return [line for line in lines if line.strip()]


def one_clear_line(stderr: str, *words: str) -> str:
    """The line, if it is one, says something and holds the words; of words with a bar between, one."""
    lines = shown(stderr)
    assert len(lines) == 1, f"expected one line, found {len(lines)}: {lines}"
    line = lines[0]
    assert "Traceback" not in stderr
    assert line.startswith("evaluate.py: "), line
    assert len(line.removeprefix("evaluate.py: ").split()) > 2, f"says nothing: {line!r}"
    for word in words:
        assert any(choice in line for choice in word.split("|")), f"{word!r} is not in {line!r}"
    return line


@pytest.mark.parametrize(
    "stderr",
    [
        pytest.param("", id="nothing"),
        pytest.param("evaluate.py: \n", id="an empty message"),
        pytest.param("evaluate.py: 118; see --help\n", id="a bare number"),
        pytest.param("evaluate.py: no folder a\nb: give a folder\n", id="two lines"),
        pytest.param("evaluate.py: no folder a: give one\nevaluate.py: no folder a: give one\n", id="twice"),
        pytest.param("no folder a: --data must be a folder of images\n", id="no prefix"),
        pytest.param(
            "test:  50%|#####| 4/8 [00:00<00:00]evaluate.py: no folder a: give a folder\n",
            id="a bar that was left",
        ),
        pytest.param(
            "UserWarning: old device\nevaluate.py: no folder a: give a folder\n", id="a warning before it"
        ),
        pytest.param(
            "Traceback (most recent call last):\n  File x\nValueError: no folder a\n", id="a traceback"
        ),
        pytest.param(
            "evaluate.py: no folder a, Traceback (most recent call last)\n", id="a traceback in the line"
        ),
        pytest.param("evaluate.py: no folder b: give a folder\n", id="other words"),
    ],
)
def test_the_judge_rejects(stderr: str) -> None:
    with pytest.raises(AssertionError):
        one_clear_line(stderr, "no folder a", "give")


def test_the_judge_accepts_a_line_after_a_bar_that_was_cleared() -> None:
    bar = "\rtest:  50%|#####     | 4/8 [00:00<00:00]\r" + " " * 40 + "\r"
    assert one_clear_line(f"{bar}evaluate.py: no folder a: give a folder\n", "no folder a", "give|leave out")


# Running the command line in this process.


@dataclass(frozen=True)
class Ran:
    """What a run left behind."""

    code: int
    stdout: str
    stderr: str


def call(argv: list[object], capsys: pytest.CaptureFixture) -> Ran:
    """evaluate.main. Warnings count as lines on stderr, where they would be outside of pytest."""
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for quiet in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", quiet)
        try:
            code = evaluate.main([str(arg) for arg in argv])
        except SystemExit as error:  # argparse
            code = error.code
        except (Exception, KeyboardInterrupt):  # the latter would end pytest
            code = traceback.format_exc(limit=-2)
    if not isinstance(
        code, int
    ):  # said here, where the exception is gone, and with it the workers that it held alive
        pytest.fail(f"a traceback: {code}", pytrace=False)
    said = capsys.readouterr()
    return Ran(
        code, said.out, said.err + "".join(f"{note.category.__name__}: {note.message}\n" for note in warned)
    )


def task_of(argv: list[object]) -> str:
    """The folder below --out that a run writes to."""
    words = [str(arg) for arg in argv]
    return words[words.index("--task") + 1] if "--task" in words[:-1] else "check"


def with_earlier_results(out: Path, task: str) -> dict[Path, bytes]:
    """What stands in the folder when the run begins."""
    folder = out / task
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in EARLIER.items():
        (folder / name).write_bytes(content)
    return contents(out)


def contents(folder: Path) -> dict[Path, bytes]:
    """Of every file below the folder, hidden ones too."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(argv: list[object], tmp_path: Path, capsys: pytest.CaptureFixture, *words: str) -> str:
    """Code 2, one clear line, no table, and the earlier results as they were with nothing beside them."""
    out = tmp_path / "results"
    before = with_earlier_results(out, task_of(argv))
    ran = call([*argv, "--out", out], capsys)
    line = one_clear_line(
        ran.stderr.replace(f"{tmp_path}/", ""), *words
    )  # its name holds the test's, and so some of the words
    assert ran.code == 2
    assert ran.stdout == ""
    assert contents(out) == before
    return line


def strict_json(path: Path) -> dict:
    """JSON as it is defined: Python alone writes and reads NaN."""
    return json.loads(
        path.read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(f"{word} in {path}")
    )


def works(argv: list[object], tmp_path: Path, capsys: pytest.CaptureFixture) -> tuple[dict, str, Ran]:
    """Code 0 and whole files: what they hold."""
    out = tmp_path / "results"
    ran = call([*argv, "--out", out], capsys)
    assert ran.code == 0, ran.stderr
    page = (out / task_of(argv) / "report.html").read_text(encoding="utf-8")
    assert page.endswith("</html>\n")
    return strict_json(out / task_of(argv) / "results.json"), page, ran


# One small setup for all cases. Cases damage copies of it.


@dataclass(frozen=True)
class World:
    """Where the good input lies."""

    waterbirds: Path  # metadata.csv and 24 images
    kinds: Path  # CLASS/NAME.png, two classes
    masked: Path  # images/CLASS/NAME.png, masks/CLASS/NAME.png
    weights: Path  # of MODEL


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("good")
    birds = DemoBirds("val", lambda image: image, limit=200)
    made = World(root / "waterbirds", root / "kinds", root / "masked", root / "tiny.safetensors")
    make_waterbirds(made.waterbirds, birds)
    make_kinds(made.kinds, birds)
    make_masked(made.masked, birds)
    make_model(root, made.weights)
    return made


def make_waterbirds(root: Path, birds: DemoBirds) -> None:
    """Two images of each group in each split."""
    root.mkdir()
    rows, by_group = [], {group: [] for group in range(4)}
    for i in range(len(birds)):
        by_group[int(2 * birds.y[i] + birds.place[i])].append(i)
    for split in range(3):
        for members in by_group.values():
            for i in members[2 * split : 2 * split + 2]:
                birds.picture(i).save(root / f"bird{i}.png")
                row = {
                    "img_filename": f"bird{i}.png",
                    "y": int(birds.y[i]),
                    "split": split,
                    "place": int(birds.place[i]),
                }
                rows.append({"img_id": i} | row)
    write_metadata(root, rows)


def make_kinds(root: Path, birds: DemoBirds) -> None:
    for kind in ("crow", "duck"):
        (root / kind).mkdir(parents=True)
        for i in of_kind(birds, kind):
            birds.picture(i).save(root / kind / f"{i}.png")


def make_masked(root: Path, birds: DemoBirds) -> None:
    for kind in ("crow", "duck"):
        (root / "images" / kind).mkdir(parents=True)
        (root / "masks" / kind).mkdir(parents=True)
        for number, i in enumerate(of_kind(birds, kind)):
            picture, mask = birds.render(i)
            Image.fromarray(picture).save(root / "images" / kind / f"{number}.png")
            Image.fromarray(np.where(mask > 127, 255, 0).astype(np.uint8)).save(
                root / "masks" / kind / f"{number}.png"
            )


def of_kind(birds: DemoBirds, kind: str) -> list[int]:
    return [i for i in range(len(birds)) if birds.kinds[int(birds.facts["kind"][i])] == kind][:3]


def make_model(root: Path, weights: Path) -> None:
    """A model with the tokenizer of real ones, for texts that the demo does not know."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (root / f"{MODEL}.json").write_text(json.dumps(config))
    open_clip.add_model_config(root / f"{MODEL}.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model(MODEL).state_dict(), weights)


def write_metadata(root: Path, rows: list[dict]) -> None:
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_metadata(root: Path) -> list[dict]:
    with (root / "metadata.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


Builder = Callable[[World, Path], list]  # arguments out of the good input and a folder of this test's own


def case(name: str, build: Builder, *words: str) -> object:
    """A row of a table."""
    return pytest.param(build, words, id=name)


def plain(*argv: object) -> Builder:
    """Arguments that need no files."""
    return lambda world, tmp: list(argv)


def waterbirds(damage: Callable[[Path], object], *argv: object) -> Builder:
    """--task waterbirds on a copy of the folder, damaged."""

    def build(world: World, tmp: Path) -> list:
        data = shutil.copytree(world.waterbirds, tmp / "data")
        damage(data)
        return ["--task", "waterbirds", "--data", data, "--heads", "3.1", *QUICK, "--limit", "99", *argv]

    return build


def kinds(damage: Callable[[Path], object], *argv: object, task: str = "ablation") -> Builder:
    """A task on a copy of the folder of classes, damaged."""

    def build(world: World, tmp: Path) -> list:
        data = shutil.copytree(world.kinds, tmp / "data")
        damage(data)
        return ["--task", task, "--data", data, *QUICK, *argv]

    return build


def masked(damage: Callable[[Path], object], *argv: object) -> Builder:
    """--task segmentation on a copy of the images and masks, damaged."""

    def build(world: World, tmp: Path) -> list:
        data = shutil.copytree(world.masked, tmp / "data")
        damage(data)
        return ["--task", "segmentation", "--data", data, "--methods", "decomposition", *QUICK, *argv]

    return build


def bank(content: bytes, *argv: object, task: str = "textspan", option: str = "--text-bank") -> Builder:
    """A task with a file of texts."""

    def build(world: World, tmp: Path) -> list:
        (tmp / "bank.txt").write_bytes(content)
        return ["--task", task, option, tmp / "bank.txt", *QUICK, *argv]

    return build


def weights(name: str, write: Callable[[Path, dict], object], *argv: object, task: str = "check") -> Builder:
    """A task with a checkpoint, which is written from the good one's tensors."""

    def build(world: World, tmp: Path) -> list:
        write(tmp / name, load_file(world.weights))
        return ["--task", task, "--model", MODEL, "--pretrained", tmp / name, *QUICK, *argv]

    return build


# Arguments.

CHECK, WATERBIRDS, SEGMENT = (
    ("--task", "check"),
    ("--task", "waterbirds", *QUICK),
    ("--task", "segmentation", *QUICK),
)
BY_TEXT = ("--task", "retrieval", *QUICK, "--text", "a bird")

ARGUMENTS = [
    case("no task", plain(), "--task", "required", "--help"),
    case("an unknown task", plain("--task", "explain"), "--task", "'explain'", "waterbirds"),
    case("two tasks in one", plain(*CHECK, "--list-models"), "--list-models", "not allowed with", "--task"),
    case("an unknown option", plain(*CHECK, "--verbose"), "--verbose", "--help"),
    case("an option cut too short", plain(*CHECK, "--te", "x"), "--te", "--text-bank"),
    case("a stray word with a line break", plain(*CHECK, "a\nb"), "unrecognized", "--help"),
    case("a value left out", plain(*CHECK, "--limit"), "--limit", "expected one argument"),
    case("a list left empty", plain("--task", "waterbirds", "--cue"), "--cue", "at least one"),
    case("a negative number of images", plain(*CHECK, "--limit", "-3"), "--limit", "at least 1", "'-3'"),
    case("no number of images", plain(*CHECK, "--limit", "many"), "--limit", "at least 1", "'many'"),
    case("half an image", plain(*CHECK, "--limit", "2.5"), "--limit", "whole number", "'2.5'"),
    case("a digit that is none", plain(*CHECK, "--limit", "²"), "--limit", "'²'"),
    case("batches of none", plain(*CHECK, "--batch-size", "0"), "--batch-size", "at least 1", "'0'"),
    case("fewer than no workers", plain(*CHECK, "--workers", "-1"), "--workers", "from 0", "'-1'"),
    case("a seed too large", plain(*CHECK, "--seed", 2**32), "--seed", str(2**32)),
    case("no random draws", plain("--task", "waterbirds", "--draws", "0"), "--draws", "at least 1"),
    case("an unknown split", plain(*CHECK, "--reference", "all"), "--reference", "'all'", "train"),
    case("an unknown precision", plain(*CHECK, "--precision", "fp8"), "--precision", "'fp8'", "bf16"),
    case(
        "weights without a model",
        plain(*CHECK, "--pretrained", "openai"),
        "--pretrained needs --model",
        "demo-vit",
    ),
    case(
        "a model without weights",
        plain(*CHECK, "--model", "ViT-B-16"),
        "--pretrained",
        "none",
        "laion2b_s34b_b88k",
    ),
    case("an unknown model", plain(*CHECK, "--model", "ViT-B-61"), "'ViT-B-61'", "ViT-B-16"),
    case("a model without a name", plain(*CHECK, "--model", ""), "no model ''"),
    case("all models for a task of one", plain("--task", "textspan", "--model", "all"), "no model 'all'"),
    case(
        "an unknown tag",
        plain(*CHECK, "--model", "ViT-B-16", "--pretrained", "laion9b"),
        "'laion9b'",
        "openai",
        "laion2b_s34b_b88k",
    ),
    case(
        "a folder as weights",
        plain(*CHECK, "--model", "ViT-B-16", "--pretrained", ROOT),
        str(ROOT),
        "neither a file",
        "openai",
    ),
    case(
        "two sources of weights",
        plain(*CHECK, "--model", "local-dir:x", "--pretrained", "y"),
        "local-dir:x",
        "brings its own weights",
        "leave out --pretrained",
    ),
    case(
        "a model folder that is not there", plain(*CHECK, "--model", "local-dir:nowhere"), "local-dir:nowhere"
    ),
    case(
        "a GPU that is not there", plain(*CHECK, "--device", "cuda:99"), "--device cuda:99", "try auto or cpu"
    ),
    case(
        "a device that does not exist",
        plain(*CHECK, "--device", "toaster"),
        "--device toaster",
        "try auto or cpu",
    ),
    case("a device of another build", plain(*CHECK, "--device", "hpu"), "--device hpu", "try auto or cpu"),
    case("a device without a name", plain(*CHECK, "--device", ""), "--device", "empty", "try auto or cpu"),
    case(
        "a head beyond the last layer",
        plain("--task", "waterbirds", "--heads", "4.0"),
        "4.0",
        "layers 0 to 3",
        "heads 0 to 7",
    ),
    case(
        "a head beyond the last head",
        plain("--task", "waterbirds", "--heads", "3.1,3.8"),
        "3.8",
        "heads 0 to 7",
    ),
    case("a head below zero", plain("--task", "waterbirds", "--heads=-1.0"), "-1.0", "layers 0 to 3"),
    case(
        "heads in other words",
        plain("--task", "waterbirds", "--heads", "3,7"),
        "--heads",
        "'3'",
        "layer.head",
    ),
    case(
        "no head in a list", plain("--task", "waterbirds", "--heads", "3.7,"), "--heads", "''", "layer.head"
    ),
    case(
        "the paper's heads of another model",
        plain("--task", "waterbirds", "--heads", "paper"),
        "ViT-L-14",
        "demo-vit",
        "auto or a list",
    ),
    case(
        "a cue that is no category",
        plain("--task", "waterbirds", "--cue", "weather"),
        "'weather'",
        "places",
        "two texts",
    ),
    case(
        "a cue of empty texts",
        plain("--task", "waterbirds", "--cue", "", ""),
        "do not differ",
        "give texts that do",
    ),
    case(
        "an unknown way to remove",
        plain("--task", "waterbirds", "--remove", "all"),
        "--remove",
        "'all'",
        "directions",
    ),
    case("an empty group", plain(*WATERBIRDS), "land/land", "all four groups"),
    case("a layer beyond the last", plain("--task", "neurons", "--layer", "4"), "--layer 4", "0 to 3"),
    case("a layer that is no number", plain("--task", "neurons", "--layer", "last"), "--layer", "'last'"),
    case(
        "more texts than a head has directions",
        plain("--task", "textspan", "--texts", "17"),
        "--texts 17",
        "1 to 16",
    ),
    case(
        "one image has no variance",
        plain("--task", "textspan", "--limit", "1", "--workers", "0"),
        "same embedding",
        "raise --limit",
    ),
    case("retrieval by nothing", plain(*BY_TEXT), "--head L.H", "--role CATEGORY"),
    case(
        "retrieval by head and role",
        plain(*BY_TEXT, "--head", "3.4", "--role", "places"),
        "either",
        "--head",
        "--role",
    ),
    case("retrieval by an unknown role", plain(*BY_TEXT, "--role", "weather"), "--role 'weather'", "places"),
    case("retrieval by an unknown head", plain(*BY_TEXT, "--head", "3.9"), "3.9", "heads 0 to 7"),
    case("retrieval by no head", plain(*BY_TEXT, "--head", "auto"), "--head", "'auto'", "layer.head"),
    case(
        "retrieval of an image and a text",
        plain(*BY_TEXT, "--head", "3.4", "--image", "x.png"),
        "either",
        "--image",
        "--text",
    ),
    case(
        "retrieval of an empty text",
        plain("--task", "retrieval", *QUICK, "--head", "3.4", "--text", " "),
        "--text",
        "empty",
    ),
    case("a heatmap of nothing", plain("--task", "heatmap", "--text", "a bird"), "--image FILE"),
    case("a heatmap for no text", plain("--task", "heatmap", "--image", "x.png"), "--text TEXT"),
    case(
        "a heatmap for an empty text",
        plain("--task", "heatmap", "--image", "x.png", "--text", " "),
        "--text is empty",
    ),
    case(
        "an unknown method",
        plain(*SEGMENT, "--methods", "gradcam", "gradcan"),
        "--methods",
        "'gradcan'",
        "gradcam",
    ),
    case(
        "a prompt that is no class",
        plain(*SEGMENT, "--prompt", "ducc"),
        "--prompt",
        "'ducc'",
        "near it: duck",
    ),
    case("void that means background", plain(*SEGMENT, "--void", "0"), "--void 0", "background"),
    case(
        "true classes that are not asked for",
        plain(*SEGMENT, "--prompt", "true", "--classes", "duck", "a bird"),
        "'sparrow'",
        "--classes",
    ),
    case("one class", plain("--task", "debias", "--classes", "duck"), "--classes", "two names", "duck"),
    case("a class twice", plain("--task", "debias", "--classes", "duck", "duck"), "--classes", "each once"),
    case(
        "a class without a name",
        plain(*SEGMENT, "--classes", "", "duck"),
        "--classes",
        "empty|two names|without a name",
    ),
    case(
        "classes out of a file that is not there",
        plain(*SEGMENT, "--classes", "no.txt"),
        "no.txt",
        "one on each line",
    ),
    case("classes out of an empty file", plain(*SEGMENT, "--classes", os.devnull), "--classes", "two names"),
]


@pytest.mark.parametrize(("build", "words"), ARGUMENTS)
def test_arguments(
    build: Builder, words: tuple[str, ...], world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(build(world, tmp_path), tmp_path, capsys, *words)


def test_batches_beyond_any_memory_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    refused([*CHECK, *QUICK, "--batch-size", 10**30], tmp_path, capsys, "--batch-size")


# Files.


def edit(column: str, value: str | None, row: int = 0) -> Callable[[Path], None]:
    """Another value in metadata.csv; None: no such column."""

    def damage(data: Path) -> None:
        rows = read_metadata(data)
        if value is None:
            rows = [{key: cell for key, cell in row.items() if key != column} for row in rows]
        else:
            rows[row][column] = value
        write_metadata(data, rows)

    return damage


def everywhere(column: str, value: str) -> Callable[[Path], None]:
    return lambda data: write_metadata(data, [row | {column: value} for row in read_metadata(data)])


def metadata(content: bytes) -> Callable[[Path], object]:
    return lambda data: (data / "metadata.csv").write_bytes(content)


def points_to_itself(data: Path) -> None:
    (data / "loop.png").symlink_to("loop.png")
    edit("img_filename", "loop.png")(data)


def wordnet(data: Path) -> None:
    for kind, name in (("crow", "n01440764"), ("duck", "n01443537")):
        (data / kind).rename(data / name)


def same_class_twice(data: Path) -> None:
    (data / "crow").rename(data / "a_duck")
    (data / "duck").rename(data / "a duck")


def only_a_train_split(data: Path) -> None:
    (data.parent / "inside").mkdir()
    for kind in ("crow", "duck"):
        (data / kind).rename(data.parent / "inside" / kind)
    (data.parent / "inside").rename(data / "train")


def write_outside(data: Path) -> None:
    Image.new("RGB", (8, 8)).save(data.parent / "outside.png")
    edit("img_filename", "../outside.png")(data)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def flatten(data: Path) -> None:
    for path in list(data.rglob("*.png")):
        path.rename(data / path.name)


def semicolons(data: Path) -> None:
    path = data / "metadata.csv"
    path.write_text(path.read_text().replace(",", ";"))


def in_an_image(argv: list) -> Builder:
    """--data is one of the images."""
    return lambda world, tmp: [*argv, "--data", next(world.kinds.rglob("*.png")), *QUICK]


def nothing(data: Path) -> None:
    """The folder as it is."""


LATIN = "img_id,img_filename,y,split,place\n1,m\xf6we.png,1,2,1\n".encode("latin-1")
HEADER = b"img_id,img_filename,y,split,place\n"

FILES = [
    case(
        "no folder",
        plain("--task", "ablation", "--data", "no/such/folder"),
        "no/such/folder",
        "--data must be a folder",
    ),
    case(
        "a name with a line break",
        plain("--task", "ablation", "--data", "no\nfolder"),
        "no folder",
        "--data must be",
    ),
    case(
        "a file in place of a folder", in_an_image(["--task", "ablation"]), ".png", "--data must be a folder"
    ),
    case(
        "a file in place of Waterbirds",
        in_an_image(["--task", "waterbirds"]),
        "metadata.csv",
        "--data must be the folder",
    ),
    case(
        "a folder without metadata",
        waterbirds(lambda data: (data / "metadata.csv").unlink()),
        "no ",
        "metadata.csv",
        "--data must be",
    ),
    case(
        "a folder in place of metadata",
        waterbirds(lambda data: replace_by_folder(data / "metadata.csv")),
        "metadata.csv",
        "--data",
    ),
    case("an empty folder", kinds(empty), "no images in", "data", ".png"),
    case("one class only", kinds(lambda data: shutil.rmtree(data / "crow")), "data", "two at least"),
    case(
        "images beside folders",
        kinds(lambda data: (data / "duck").rename(data / "crow" / "duck")),
        "data",
        "two at least",
    ),
    case("no labels at all", kinds(flatten), "no labels", "named by their class"),
    case("two folders of one class", kinds(same_class_twice), "a duck", "twice|same|once|two folders"),
    case(
        "two of a thousand WordNet ids",
        kinds(wordnet),
        "2 of them WordNet ids",
        "1,000",
        "named by their class",
    ),
    case("another split than there is", kinds(only_a_train_split), "val", "found train"),
    case(
        "a class that the demo has no word for",
        kinds(lambda data: (data / "crow").rename(data / "flamingo")),
        "'flamingo'",
        "101 words",
    ),
    case("a missing column", waterbirds(edit("place", None)), "metadata.csv", "'place'", "found img_id"),
    case("semicolons", waterbirds(semicolons), "metadata.csv", "no column", "img_filename;y"),
    case("a label that is none", waterbirds(edit("y", "2")), "line 2", "y must be one of 0, 1", "'2'"),
    case("half a label", waterbirds(edit("y", "0.5", row=3)), "line 5", "y must be", "'0.5'"),
    case(
        "a split in words",
        waterbirds(edit("split", "test", row=1)),
        "line 3",
        "split must be one of 0, 1, 2",
        "'test'",
    ),
    case("a place left empty", waterbirds(edit("place", "", row=2)), "line 4", "place must be", "''"),
    case(
        "a row without a file",
        waterbirds(edit("img_filename", "")),
        "line 2",
        "img_filename must name a file",
    ),
    case("a row cut short", waterbirds(metadata(HEADER + b"1,bird.png\n")), "line 2", "must be one of"),
    case(
        "a row beyond all bounds",
        waterbirds(edit("img_filename", "x" * 200_000)),
        "metadata.csv|cannot read image",
        "line |name too long",
    ),
    case("a file outside of the folder", waterbirds(write_outside), "outside.png", "lies outside"),
    case(
        "a file named from the root",
        waterbirds(edit("img_filename", "/etc/hostname")),
        "/etc/hostname",
        "lies outside",
    ),
    case("a file that is not there", waterbirds(edit("img_filename", "gone.png")), "no image", "gone.png"),
    case(
        "a folder in place of an image",
        waterbirds(edit("img_filename", ".")),
        "cannot read image",
        "directory",
    ),
    case("a link that leads to itself", waterbirds(points_to_itself), "loop.png"),
    case("a name with a line break in it", waterbirds(edit("img_filename", '"')), "no image"),
    case("an empty csv", waterbirds(metadata(b"")), "metadata.csv", "no column", "found nothing"),
    case("a csv of a header alone", waterbirds(metadata(HEADER)), "metadata.csv", "no row with split 2"),
    case("a csv in another encoding", waterbirds(metadata(LATIN)), "metadata.csv", "expected UTF-8"),
    case(
        "a csv in UTF-16",
        waterbirds(metadata(HEADER.decode().encode("utf-16"))),
        "metadata.csv",
        "expected UTF-8",
    ),
    case("no image of one group", waterbirds(everywhere("place", "0")), "land/water", "all four groups"),
    case("no reference images", waterbirds(everywhere("split", "2")), "metadata.csv", "split 0 (train)"),
    case(
        "an image to show that is not there",
        plain("--task", "heatmap", "--image", "no.png", "--text", "a bird"),
        "no image",
        "no.png",
    ),
    case(
        "a folder to show",
        plain("--task", "heatmap", "--image", ROOT, "--text", "a bird"),
        str(ROOT),
        "directory",
    ),
]


@pytest.mark.parametrize(("build", "words"), FILES)
def test_files(
    build: Builder, words: tuple[str, ...], world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(build(world, tmp_path), tmp_path, capsys, *words)


# Images that cannot be read. "bad.png" must be named.


def noise(size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def broken_exif() -> bytes:
    """A JPEG to be turned upright, with a text where a number belongs: Pillow cannot write its EXIF again."""
    length = (
        (0x0101).to_bytes(2, "big")
        + (2).to_bytes(2, "big")
        + (5).to_bytes(4, "big")
        + (38).to_bytes(4, "big")
    )
    turned = (0x0112).to_bytes(2, "big") + (3).to_bytes(2, "big") + (1).to_bytes(4, "big") + b"\0\6\0\0"
    return encoded(
        noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + length + turned + b"\0\0\0\0abcd\0"
    )


def unknown_texture() -> bytes:
    """A game's texture under another name, of a kind that Pillow knows but cannot read."""
    content = bytearray(encoded(noise(), "DDS"))
    content[80:84] = bytes(4)
    return bytes(content)


def bomb() -> bytes:
    """A small file that says it is 100,000 x 100,000 pixels."""
    content = bytearray(encoded(noise(), "PNG"))
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


UNREADABLE = {
    "zero bytes": (lambda: b"", "not an image"),
    "a text": (lambda: b"not an image", "not an image"),
    "a PNG cut short": (lambda: encoded(noise(), "PNG")[:3000], "truncated"),
    "a JPEG cut short": (lambda: encoded(noise(), "JPEG")[:900], "truncated"),
    "a PNG's first bytes": (lambda: encoded(noise(), "PNG")[:20], "cannot read|not an image"),
    "ten billion pixels": (bomb, "pixels"),
    "a kind that Pillow cannot read": (unknown_texture, "cannot read|not an image"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_image_that_cannot_be_read(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make, words = UNREADABLE[name]
    refused(
        kinds(lambda data: (data / "duck" / "bad.png").write_bytes(make()))(world, tmp_path),
        tmp_path,
        capsys,
        "bad.png",
        words,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_with_broken_exif_is_named_or_read(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture, workers: int
) -> None:
    """Either will do: its pixels are whole."""
    argv = kinds(lambda data: (data / "duck" / "bad.jpg").write_bytes(broken_exif()), "--workers", workers)(
        world, tmp_path
    )
    ran = call([*argv, "--out", tmp_path / "results"], capsys)
    if ran.code:
        one_clear_line(ran.stderr, "bad.jpg")
        assert not (tmp_path / "results" / "ablation" / "results.json").exists()
    else:
        assert strict_json(tmp_path / "results" / "ablation" / "results.json")["images"] == 7


def a_pipe(data: Path) -> None:
    name = read_metadata(data)[0]["img_filename"]
    (data / name).unlink()
    os.mkfifo(data / name)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends what would wait forever."""

    def late(*args: object) -> None:
        pytest.fail(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_pipe_in_place_of_an_image_is_not_waited_for(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Nobody will ever write to it."""
    argv = waterbirds(a_pipe)(world, tmp_path)
    with at_most(3):
        refused(argv, tmp_path, capsys, read_metadata(tmp_path / "data")[0]["img_filename"])


def test_a_worker_names_the_image_too(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = kinds(lambda data: (data / "duck" / "bad.png").write_bytes(b""), "--workers", "2")(world, tmp_path)
    refused(argv, tmp_path, capsys, "bad.png", "not an image")


def frames() -> dict:
    return {"save_all": True, "append_images": [noise().rotate(90)]}


def deep(dtype: type) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (64, 64)).astype(dtype))


READABLE = {
    "one pixel": lambda: encoded(noise((1, 1)), "PNG"),
    "a line of pixels": lambda: encoded(noise((1, 300)), "PNG"),
    "an animated GIF": lambda: encoded(noise(), "GIF", **frames()),
    "an animated WebP": lambda: encoded(noise(), "WEBP", **frames()),
    "an animated PNG": lambda: encoded(noise(), "PNG", **frames()),
    "CMYK": lambda: encoded(noise().convert("CMYK"), "JPEG"),
    "16 bits": lambda: encoded(deep(np.uint16), "PNG"),
    "32 bits": lambda: encoded(deep(np.int32), "TIFF"),
    "floats": lambda: encoded(deep(np.float32), "TIFF"),
    "black and white": lambda: encoded(noise().convert("1"), "PNG"),
    "a palette with a hole": lambda: encoded(noise().convert("P"), "PNG", transparency=0),
    "grey and transparent": lambda: encoded(noise().convert("LA"), "PNG"),
    "a wrong name": lambda: encoded(noise(), "JPEG"),
}


@pytest.mark.parametrize("name", READABLE)
def test_an_image_that_looks_odd_is_read(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = kinds(lambda data: (data / "duck" / "odd.png").write_bytes(READABLE[name]()))(world, tmp_path)
    results, _, _ = works(argv, tmp_path, capsys)
    assert results["images"] == 7


# Checkpoints.


def cut(size: int) -> Callable[[Path, dict], None]:
    def write(path: Path, tensors: dict) -> None:
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:size])

    return write


def changed(change: Callable[[str, torch.Tensor], object]) -> Callable[[Path, dict], None]:
    return lambda path, tensors: torch.save({key: change(key, value) for key, value in tensors.items()}, path)


def raw(content: bytes) -> Callable[[Path, dict], object]:
    return lambda path, tensors: path.write_bytes(content)


def spoilt(value: float) -> Callable[[Path, dict], None]:
    return changed(lambda key, x: x * value if key == "visual.proj" else x)


def renamed(path: Path, tensors: dict) -> None:
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in tensors.items()}}, path)


def narrower(path: Path, tensors: dict) -> None:
    tensors["visual.proj"] = tensors["visual.proj"][:, :16].clone()
    save_file(tensors, path)


def overflows(key: str, x: torch.Tensor) -> torch.Tensor:
    """Every weight a number, and yet the embeddings are none."""
    return x * 1e30 if x.is_floating_point() else x


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
CLEAR = "checkpoint|tensors|expected"  # more than the name of an exception
NO_NUMBER = "not numbers|not a number|NaN|infinity"
BY_HEAD = ("--head", "0.0", "--text", "a bird")

CHECKPOINTS = [
    case(
        "safetensors cut in the middle",
        weights("cut.safetensors", cut(-1000)),
        "cut.safetensors",
        "incomplete",
    ),
    case("safetensors cut at the start", weights("cut.safetensors", cut(100)), "cut.safetensors", "header"),
    case("empty safetensors", weights("no.safetensors", raw(b"")), "no.safetensors", "header"),
    case("an empty file", weights("no.pt", raw(b"")), "no.pt", CLEAR),
    case("a pointer of git lfs", weights("lfs.pt", raw(POINTER)), "lfs.pt", CLEAR),
    case("a text", weights("text.pt", raw(b"hello\n")), "text.pt", CLEAR),
    case(
        "a tensor alone", weights("one.pt", lambda path, _: torch.save(torch.zeros(3), path)), "one.pt", CLEAR
    ),
    case("no tensors", weights("none.pt", lambda path, _: torch.save({}, path)), "none.pt", CLEAR),
    case("numbers in place of tensors", weights("ints.pt", changed(lambda key, x: 1)), "ints.pt", CLEAR),
    case(
        "tensors of other names", weights("other.pt", renamed), "other.pt", "lacks ", "has besides backbone."
    ),
    case(
        "tensors of other shapes",
        weights("narrow.safetensors", narrower),
        "visual.proj",
        "[32, 16]",
        "[32, 32]",
    ),
    case(
        "sparse tensors",
        weights("s.pt", changed(lambda key, x: x.to_sparse() if x.ndim == 2 else x)),
        "s.pt",
        "sparse|lacks|expected",
    ),
    case("a NaN", weights("nan.pt", spoilt(float("nan"))), "nan.pt", "NaN", "visual.proj"),
    case("an infinity", weights("inf.pt", spoilt(float("inf"))), "inf.pt", "infinity", "visual.proj"),
    case("weights that overflow", weights("big.pt", changed(overflows)), "do not sum", "not a number"),
    case("overflow, ablation", weights("big.pt", changed(overflows), task="ablation"), NO_NUMBER),
    case(
        "overflow, debias", weights("big.pt", changed(overflows), "--heads", "0.0", task="debias"), NO_NUMBER
    ),
    case("overflow, retrieval", weights("big.pt", changed(overflows), *BY_HEAD, task="retrieval"), NO_NUMBER),
    case(
        "the demo with weights that are not there",
        plain(*CHECK, "--model", "demo-vit", "--pretrained", "no.pt"),
        "demo-vit",
        "'no.pt'",
    ),
]


@pytest.mark.parametrize(("build", "words"), CHECKPOINTS)
def test_checkpoints(
    build: Builder, words: tuple[str, ...], world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(build(world, tmp_path), tmp_path, capsys, *words)


class Code:
    """Pickled, it opens a file for writing when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def pickles(path: Path, ran: Path) -> None:
    """Whatever reads such a file reads a pickle: torch.save's own, a plain one, numpy's."""
    if path.suffix == ".npy":
        np.save(path, np.array([Code(ran)], dtype=object))
    elif path.suffix == ".pt":
        torch.save({"state_dict": Code(ran)}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Code(ran)}))


@pytest.mark.parametrize("model", [MODEL, "demo-vit"])
@pytest.mark.parametrize("name", ["code.pt", "code.bin", "code.npy"])
def test_code_in_a_pickle_does_not_run(
    name: str, model: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pickles(tmp_path / name, tmp_path / "ran")
    refused(
        [*CHECK, "--model", model, "--pretrained", tmp_path / name],
        tmp_path,
        capsys,
        name,
        "unpickling|allow_pickle",
    )
    assert not (tmp_path / "ran").exists()


def test_the_pickle_would_run_where_it_is_trusted(tmp_path: Path) -> None:
    """Else the test above would pass for a file that does nothing."""
    pickles(tmp_path / "code.pt", tmp_path / "ran")
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "code.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_random_weights_of_the_demo_as_the_help_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    works([*CHECK, "--model", "demo-vit", "--pretrained", "none", *QUICK], tmp_path, capsys)


# Banks of descriptions.

PLACES = b"# places\nat sea\n# kinds\na duck\n"
LONG = " ".join(["a"] * 90).encode()
REAL = ("--model", MODEL, "--pretrained", "none", "--texts", "1")  # a model with the tokenizer of real ones

BANKS = [
    case("no bank", plain("--task", "textspan", "--text-bank", "no.txt"), "text bank no.txt", "No such file"),
    case("a folder", plain("--task", "textspan", "--text-bank", ROOT), "text bank", "directory"),
    case("an empty bank", bank(b""), "bank.txt", "no descriptions", "one per line"),
    case("categories alone", bank(b"# kinds\n\n# places\n"), "bank.txt", "no descriptions", "one per line"),
    case(
        "texts that are one for the model",
        bank(b"a duck\nA duck\na crow\n"),
        "head 0.0",
        "fewer --texts",
        "differ more",
    ),
    case("a text of more words than the demo reads", bank(b"a crow\n" + LONG), "22 words at most", "got 90"),
    case(
        "a text of more tokens than a model reads",
        bank(b"a crow\n" + LONG, *REAL),
        "75 tokens at most",
        "'a a a",
    ),
    case(
        "a word that the demo does not know", bank(b"a duck\na zebra\n"), "'zebra'", "'a zebra'", "101 words"
    ),
    case("binary garbage", bank(bytes(range(256))), "bank.txt", "UTF-8|utf-8"),
    case("UTF-16", bank("a duck\na crow\n".encode("utf-16")), "bank.txt", "UTF-8|utf-8"),
    case("a zero byte", bank(b"a duck\0\na crow\n"), "x00", "a duck"),
    case("one text for neurons", bank(b"a duck\n", task="neurons"), "bank.txt", "one text", "two"),
    case(
        "one text for a cue",
        bank(PLACES, "--heads", "3.1", task="debias"),
        "'places'",
        "do not differ",
        "give texts that do",
    ),
    case(
        "a role that no head has",
        bank(PLACES, "--role", "kinds", "--text", "a duck", task="retrieval"),
        "no head",
        "'kinds'",
    ),
    case(
        "no second pool of words",
        plain("--task", "completeness", *QUICK, "--words", "no.txt"),
        "no.txt",
        "No such file",
    ),
    case(
        "an empty pool of words",
        bank(b"\n", task="completeness", option="--words"),
        "bank.txt",
        "no descriptions",
    ),
    case(
        "a cue in unknown words",
        plain("--task", "waterbirds", "--cue", "a zebra", "a duck"),
        "'zebra'",
        "101 words",
    ),
    case(
        "a class in unknown words",
        plain("--task", "debias", *QUICK, "--classes", "zebra", "duck"),
        "'zebra'",
        "101 words",
    ),
]


@pytest.mark.parametrize(("build", "words"), BANKS)
def test_banks(
    build: Builder, words: tuple[str, ...], world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(build(world, tmp_path), tmp_path, capsys, *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "task", "said"),
    [
        ("--text-bank", "textspan", "text bank FILE: 3 repeated texts are taken once"),
        ("--text-bank", "neurons", "text bank FILE: 3 repeated texts are taken once"),
        ("--words", "completeness", "--words FILE: 3 repeated texts are taken once"),
    ],
)
def test_a_text_that_stands_in_a_file_again_is_taken_once(
    option: str, task: str, said: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = b"# kinds\na duck\na crow\na duck\n# birds\na gull\na duck\n\n a crow\n"
    results, page, ran = works(bank(content, task=task, option=option)(world, tmp_path), tmp_path, capsys)
    assert results["settings"]["note"] == said.replace("FILE", str(tmp_path / "bank.txt"))
    assert "3 repeated texts" in ran.stdout
    assert "3 repeated texts" in page
    assert "3 texts" in results["settings"]["pools" if task == "completeness" else "bank"]


@pytest.mark.parametrize(
    "content",
    [b"# kinds\na duck\na crow\na gull\n", b"a duck\na crow\na gull\n"],
    ids=["one category", "none"],
)
def test_a_bank_of_one_category_works(
    content: bytes, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results, _, _ = works(bank(content, task="neurons")(world, tmp_path), tmp_path, capsys)
    assert "3 texts" in results["settings"]["bank"]


# Images with masks.


def paint(name: str, value: np.ndarray | int, size: tuple[int, int] = (64, 64)) -> Callable[[Path], None]:
    """Another mask of duck/1.png, of one value or of an array's."""
    mask = np.full(size[::-1], value, np.uint8) if isinstance(value, int) else value
    return lambda data: Image.fromarray(mask).save(data / "masks" / "duck" / name)


def without(*names: str) -> Callable[[Path], None]:
    def damage(data: Path) -> None:
        for name in names:
            shutil.rmtree(data / name) if (data / name).is_dir() else (data / name).unlink()

    return damage


def mat(content: bytes) -> Builder:
    def build(world: World, tmp: Path) -> list:
        (tmp / "some.mat").write_bytes(content)
        return [*SEGMENT, "--data", tmp / "some.mat"]

    return build


def needs_h5py(build: Builder) -> Builder:
    def checked(world: World, tmp: Path) -> list:
        pytest.importorskip("h5py")
        return build(world, tmp)

    return checked


RAINBOW = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8)
MANY = (np.arange(64 * 64) % 9).reshape(64, 64).astype(np.uint8)

MASKS = [
    case("no masks folder", masked(without("masks")), "masks", "images/ and masks/"),
    case("no images folder", masked(without("images")), "images", "images/ and masks/"),
    case("no images in it", masked(without("images/crow", "images/duck")), "no images in", ".png"),
    case(
        "no mask for an image",
        masked(without("masks/duck/1.png")),
        "no mask for",
        "images/duck/1.png",
        "expected",
    ),
    case(
        "a mask of another size",
        masked(paint("1.png", 255, (32, 64))),
        "duck/1.png",
        "32 x 64",
        "64 x 64",
        "must agree",
    ),
    case(
        "a mask without a label", masked(paint("1.png", 9), "--void", "9"), "duck/1.png", "no labelled pixel"
    ),
    case(
        "a mask of many values",
        masked(paint("1.png", MANY)),
        "duck/1.png",
        "9 values",
        "0 for background",
        "--void",
    ),
    case("two values for foreground", masked(paint("1.png", 7)), "duck/1.png", "255", "7", "--void"),
    case("a mask in colours", masked(paint("1.png", RAINBOW)), "duck/1.png", "one channel"),
    case(
        "a mask of zero bytes",
        masked(lambda data: (data / "masks/duck/1.png").write_bytes(b"")),
        "masks/duck/1.png",
        "not an image",
    ),
    case(
        "an image of zero bytes",
        masked(lambda data: (data / "images/duck/1.png").write_bytes(b"")),
        "images/duck/1.png",
        "not an image",
    ),
    case("one class of images", masked(without("images/crow")), "'duck'", "give --classes"),
    case("no data", plain(*SEGMENT, "--data", "no.mat"), "no.mat", "gtsegs_ijcv.mat", "images/ and masks/"),
    case("a text named .mat", needs_h5py(mat(b"no matrix")), "some.mat", "HDF5"),
    case("MATLAB's older format", needs_h5py(mat(b"MATLAB 5.0 MAT-file".ljust(200))), "some.mat", "HDF5"),
    case("an empty .mat", needs_h5py(mat(b"")), "some.mat", "HDF5"),
]


@pytest.mark.parametrize(("build", "words"), MASKS)
def test_masks(
    build: Builder, words: tuple[str, ...], world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(build(world, tmp_path), tmp_path, capsys, *words)


@pytest.mark.parametrize("value", [0, 255])
def test_masks_of_one_value_give_no_nan(
    value: int, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def all_alike(data: Path) -> None:
        for path in (data / "masks").rglob("*.png"):
            Image.new("L", (64, 64), value).save(path)

    works(masked(all_alike)(world, tmp_path), tmp_path, capsys)


# Output.

LITTLE = (*CHECK, *QUICK)


def in_the_way(tmp: Path) -> Path:
    (tmp / "file").write_text("in the way")
    return tmp / "file" / "results"


def read_only(tmp: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere: see the other cases")
    (tmp / "locked").mkdir(mode=0o500)
    return tmp / "locked"


def dangling(tmp: Path) -> Path:
    (tmp / "results").mkdir()
    (tmp / "results" / "check").symlink_to(tmp / "nowhere" / "check")
    return tmp / "results"


def of_the_kernel(tmp: Path) -> Path:
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here, where not even root may write")
    return Path("/proc/results")


@pytest.mark.parametrize("where", [in_the_way, read_only, dangling, of_the_kernel])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    where: Callable[[Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks.check, "run", lambda job: pytest.fail("worked before it looked"))
    out = where(tmp_path)
    ran = call([*LITTLE, "--out", out], capsys)
    one_clear_line(ran.stderr, "cannot write to --out", str(out))
    assert (ran.code, ran.stdout) == (2, "")


def full(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when half of this file is written."""
    write = Path.write_text

    def write_half(path: Path, text: str, *args: object, **options: object) -> int:
        if name not in path.name:
            return write(path, text, *args, **options)
        write(path, text[: len(text) // 2], *args, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_half)


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_a_full_disk_leaves_the_earlier_results_whole(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files: a new table beside an old page would be worse than either."""
    before = with_earlier_results(tmp_path, "check")
    full(name, monkeypatch)
    ran = call([*LITTLE, "--out", tmp_path], capsys)
    assert ran.code == 2
    one_clear_line(ran.stderr, "cannot write", name, "No space left", "what stood there before still does")
    assert contents(tmp_path) == before


def test_a_full_disk_while_a_picture_is_saved(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = with_earlier_results(tmp_path, "retrieval")

    def save(picture: Image.Image, file: BinaryIO, **options: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", save)
    ran = call(
        ["--task", "retrieval", "--head", "3.4", "--text", "a bird", *QUICK, "--out", tmp_path], capsys
    )
    assert ran.code == 2
    one_clear_line(ran.stderr, "cannot write", "sheet.png", "No space left")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_a_folder_in_place_of_a_result(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "check" / name).mkdir(parents=True)
    ran = call([*LITTLE, "--out", tmp_path], capsys)
    assert ran.code == 2
    one_clear_line(ran.stderr, "cannot write", name)
    assert not [path for path in (tmp_path / "check").iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str], Path]]:
    """Code, lines on stderr and folder of runs that cannot print their table, both at the same time."""
    outs = {name: tmp_path_factory.mktemp(name) for name in ("full", "left")}
    reader, left = os.pipe()
    os.close(reader)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, left)
        full_disk = stack.enter_context(open("/dev/full" if Path("/dev/full").exists() else os.devnull, "w"))
        stdouts = {"full": full_disk, "left": left}
        runs = {
            name: stack.enter_context(running(*LITTLE, "--out", outs[name], stdout=stdouts[name]))
            for name in outs
        }
        said = {name: process.communicate(timeout=100)[1].decode() for name, process in runs.items()}
    return {name: (runs[name].returncode, shown(said[name]), outs[name]) for name in outs}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.slow
def test_a_table_that_cannot_be_printed_for_want_of_space(printed: dict) -> None:
    """evaluate.py > FILE on a full disk."""
    code, lines, _ = printed["full"]
    assert code == 2
    one_clear_line("\n".join(lines), "No space left")


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(printed: dict) -> None:
    """evaluate.py | head -1"""
    _, lines, out = printed["left"]
    assert lines == []
    assert strict_json(out / "check" / "results.json")["task"] == "check"  # the work is not lost


def test_a_reader_of_the_list_of_models_that_leaves_early_is_no_error(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """evaluate.py --list-models | head -1"""

    def left() -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(tasks.models, "print_list", left)
    with (tmp_path / "stdout").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        ran = call(["--list-models"], capsys)
        monkeypatch.undo()
    assert (ran.code, shown(ran.stderr)) == (0, [])


def test_a_terminal_without_a_plus_minus(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONIOENCODING=ascii: a sign that cannot be shown is no reason to lose a run."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    argv = [*SEGMENT, "--methods", "random", "--out", tmp_path]
    ran = call(argv, capsys)
    monkeypatch.undo()
    assert ran.code == 0
    assert strict_json(tmp_path / "segmentation" / "results.json")["rows"]


def rename_to_bytes(data: Path) -> None:
    path = next((data / "duck").iterdir())
    try:
        os.rename(path, os.path.join(os.fsencode(data), b"duck", b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes no such names")


def test_a_file_name_that_is_no_unicode(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Any bytes may name a file; such a name must not cost the run, or must be refused."""
    argv = kinds(rename_to_bytes, "--head", "3.4", "--text", "a bird", task="retrieval")(world, tmp_path)
    before = with_earlier_results(tmp_path / "results", "retrieval")
    ran = call([*argv, "--out", tmp_path / "results"], capsys)
    if ran.code:
        one_clear_line(ran.stderr, "data", "name")
        assert contents(tmp_path / "results") == before
    else:
        strict_json(tmp_path / "results" / "retrieval" / "results.json")


def test_a_text_that_is_no_unicode(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Bytes of the command line that are no UTF-8 reach Python as lone surrogates; tokenizers refuse them."""
    text = os.fsdecode(b"caf\xe9")
    argv = [
        "--task",
        "retrieval",
        "--head",
        "0.0",
        "--text",
        text,
        "--model",
        MODEL,
        "--pretrained",
        world.weights,
        *QUICK,
    ]
    refused(argv, tmp_path, capsys, "caf")


# Memory and workers.


def test_no_memory_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises a RuntimeError there, in these words; making it do so takes seconds."""
    words = (
        "[enforce fail at alloc_cpu.cpp:127] err == 0. "
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4611686"
    )

    def allocate(*args: object, **options: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(tasks.ablation, "decompose", allocate)
    refused(["--task", "ablation", *QUICK], tmp_path, capsys, "out of memory", "--batch-size")


def out_of_memory(*args: object, **options: object) -> None:
    raise MemoryError


def killed(*args: object, **options: object) -> None:
    os._exit(1)  # as a worker ends that the kernel kills for its memory


# Workers that fail are waited for, five seconds each.
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_no_memory_for_an_image(
    workers: int, world: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker sends its traceback along."""
    monkeypatch.setattr(data, "read", out_of_memory)
    refused(
        kinds(nothing, "--workers", workers)(world, tmp_path),
        tmp_path,
        capsys,
        "out of memory",
        "--batch-size",
    )


@pytest.mark.slow
def test_a_worker_that_dies(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "read", killed)
    refused(kinds(nothing, "--workers", "2")(world, tmp_path), tmp_path, capsys, "worker", "--workers")


@pytest.mark.slow
def test_no_more_processes(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many --workers for this machine."""

    def start(process: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", start)
    refused(kinds(nothing, "--workers", "2")(world, tmp_path), tmp_path, capsys, "--workers")


# Interrupted: at any moment of a run, code 130, one line, and nothing new in the folder.


NOTHING_NEW = "nothing was written|no results were written"


def interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


class Interrupts:
    """A module, still being loaded when Ctrl-C is pressed."""

    def __getattr__(self, name: str) -> None:
        raise KeyboardInterrupt


MOMENTS = {
    "while torch and this project are loaded": lambda patch: patch.setitem(
        sys.modules, "baselines", Interrupts()
    ),
    "while the model is loaded": lambda patch: patch.setattr(tasks.job, "load_clip", interrupt),
    "while results.json is put in place": lambda patch: patch.setattr(evaluate.os, "replace", interrupt),
    "while report.html is written": lambda patch: patch.setattr(report, "page", interrupt),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted(
    moment: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = with_earlier_results(tmp_path, "check")
    MOMENTS[moment](monkeypatch)
    ran = call([*LITTLE, "--out", tmp_path], capsys)
    monkeypatch.undo()
    assert ran.code == 130
    one_clear_line(ran.stderr, "interrupted", NOTHING_NEW)
    assert contents(tmp_path) == before


def test_a_list_of_models_interrupted(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.models, "print_list", interrupt)
    ran = call(["--list-models"], capsys)
    assert ran.code == 130
    one_clear_line(ran.stderr, "interrupted")


def start(*argv: object, stdout: object = subprocess.PIPE) -> subprocess.Popen:
    """evaluate.py in a process group of its own, as a shell starts it."""
    command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, argv)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {
        "OMP_NUM_THREADS": "1"
    }
    return subprocess.Popen(
        command,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """A shell lets what it runs in the background ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def running(*argv: object, stdout: object = subprocess.PIPE) -> Iterator[subprocess.Popen]:
    """No process is left behind, whatever the test finds."""
    process = start(*argv, stdout=stdout)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def until(process: subprocess.Popen, pattern: bytes, seconds: float = 60) -> bytes:
    """What it writes to stderr until the pattern is in it."""
    said, end = b"", time.monotonic() + seconds
    while not re.search(pattern, said) and time.monotonic() < end and process.poll() is None:
        if select.select([process.stderr], [], [], 0.1)[0]:
            said += os.read(process.stderr.fileno(), 65536)
    assert re.search(pattern, said), said
    return said


@pytest.mark.slow
def test_ctrl_c_in_mid_run(tmp_path: Path) -> None:
    """With workers and without, at the same time. A terminal sends it to the workers, too."""
    with contextlib.ExitStack() as stack:
        before, runs = {}, {}
        for workers in (0, 2):
            before[workers] = with_earlier_results(tmp_path / str(workers), "check")
            argv = [
                *CHECK,
                "--limit",
                "4000",
                "--batch-size",
                "2",
                "--workers",
                workers,
                "--out",
                tmp_path / str(workers),
            ]
            runs[workers] = stack.enter_context(running(*argv))
        for workers, process in runs.items():
            said = until(process, rb"check: +[1-9]\d*%")
            for _ in range(3):  # an impatient finger
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.05)
            out, rest = process.communicate(timeout=60)
            assert process.returncode == 130
            one_clear_line((said + rest).decode(), "interrupted", NOTHING_NEW)
            assert out == b""
            assert contents(tmp_path / str(workers)) == before[workers]


def swallowed() -> None:
    """Ctrl-C, where Python calls what it must at a fork: what is raised there is only printed."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start_workers, inherited = passes.DataLoader.__iter__, signal.getsignal(signal.SIGINT)
    heed_interrupts()
    monkeypatch.setattr(passes.DataLoader, "__iter__", lambda self: [swallowed(), start_workers(self)][1])
    batches = passes.batches(
        torch.utils.data.TensorDataset(torch.zeros(4), torch.arange(4)), 2, 0, "", torch.device("cpu")
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.slow
def test_a_worker_does_not_speak_of_ctrl_c() -> None:
    """Nor does its thread that hands tensors over."""
    code = (
        "import signal, threading; from tasks import passes; passes._as_worker(0);"
        "signal.raise_signal(signal.SIGINT);"
        "threading.Thread(target=lambda: __import__('sys').excepthook(*[None] * 3)).start(); print('on')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("on\n", "", 0)


# Two runs into one folder.


@pytest.mark.slow
def test_two_runs_at_the_same_time(tmp_path: Path) -> None:
    """The first works; the other is told so in a line, or comes when the first has ended."""
    argv = [*LITTLE, "--out", tmp_path]
    with running(*argv, "--seed", "1") as one, running(*argv, "--seed", "2") as other:
        ends = [(process.communicate(timeout=100)[1], process.returncode) for process in (one, other)]
    assert sorted(code for _, code in ends) in ([0, 0], [0, 2]), ends
    for said, code in ends:
        assert code == 0 or one_clear_line(said.decode(), "another run writes to", "another --out")
    assert strict_json(tmp_path / "check" / "results.json")["settings"]["seed"] in ("1", "2")
    page = (tmp_path / "check" / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>\n")
    assert sorted(path.name for path in (tmp_path / "check").iterdir()) == ["report.html", "results.json"]


def test_a_picture_that_another_run_saves_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run, a process of its own, comes between this one's writing and its renaming."""
    save = Image.Image.save

    def save_and_let_another_in(picture: Image.Image, *args: object, **options: object) -> None:
        save(picture, *args, **options)
        monkeypatch.setattr(Image.Image, "save", save)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            tasks.heatmap.save_picture(Image.new("RGB", (8, 8), "red"), tmp_path / "sheet.png")

    monkeypatch.setattr(Image.Image, "save", save_and_let_another_in)
    tasks.heatmap.save_picture(Image.new("RGB", (8, 8), "blue"), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.getpixel((0, 0)) == (0, 0, 255)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


# Text that must be escaped on the page.

SCRIPT = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def harmless(document: str) -> Page:
    """No element and no attribute that a text of the user's could have made."""
    page = Page(document)
    assert not {"script", "iframe", "i"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert all(
        attributes["src"].startswith("data:image/") for tag, attributes in page.elements if tag == "img"
    )
    return page


def in_a_script_folder(data: Path) -> None:
    """A slash cannot be part of a folder's name, but of a path: <script>alert(1)<, and in it script>."""
    (data / SCRIPT).mkdir(parents=True)
    for path in list((data / "duck").iterdir()):
        path.rename(data / SCRIPT / path.name)


def test_a_class_folder_that_is_a_script(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = kinds(in_a_script_folder, "--head", "3.4", "--text", "a bird", task="retrieval")(world, tmp_path)
    _, page, _ = works(argv, tmp_path, capsys)
    assert SCRIPT in harmless(page).text  # in the captions
    assert SCRIPT not in page


def test_class_names_that_are_markup(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["<iframe src=x>", '" onload="alert(1)', "R&D &lt;"]
    argv = kinds(nothing, "--model", MODEL, "--pretrained", world.weights, "--heads", "0.0", task="debias")(
        world, tmp_path
    )
    argv += ["--cue", "at <i>sea</i>", "in a forest", "--classes", *names]
    _, page, _ = works(argv, tmp_path, capsys)
    assert ", ".join(names) in harmless(page).text


def test_bank_texts_that_are_markup(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = ['"a" & <iframe>', "it's 1 < 2 &amp; 3", '" onmouseover="alert(1)']
    argv = bank("\n".join(["# <script>", *texts]).encode(), *REAL[:4], task="neurons")(world, tmp_path)
    results, page, _ = works([*argv, "--neurons", "2"], tmp_path, capsys)
    text = harmless(page).text
    assert all(words in text for words in texts)
    assert {words for words, _ in results["neurons"][0]["towards"]} == set(texts)


def test_a_text_to_look_for_that_is_markup(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    asked = '<img src=x onerror="alert(1)">'
    image = next(world.kinds.rglob("*.png"))
    argv = ["--task", "heatmap", *REAL[:4], "--image", image, "--text", asked, "--methods", "decomposition"]
    _, page, _ = works(argv, tmp_path, capsys)
    assert asked in harmless(page).text


# No network.


def test_the_demo_asks_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **options: object) -> None:
        pytest.fail(f"asked the network: {args[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    works(list(LITTLE), tmp_path / "demo", capsys)
    works(
        [*CHECK, "--model", "ViT-S-32-alt", "--pretrained", "none", "--limit", "1", "--workers", "0"],
        tmp_path / "stock",
        capsys,
    )
