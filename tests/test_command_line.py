"""What people type, in the places where they type it: options, names, folders in use, other ways to start."""

import contextlib
import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

import files
import pictures
from baselines import METHODS, BaselineError
from data import ImageFolder, Waterbirds
from decompose import DecompositionError, decompose, heatmap, image_embedding
from demo.images import DemoBirds, DemoMasks
from evaluate import main
from files import InputError, locked, visible
from masks import ImageNetSegmentation, MaskFolder
from neurons import neurons
from options import TASKS, parse_args
from tasks import job, passes
from zeroshot import load_clip

ROOT = Path(__file__).parent.parent
FEW = ("--limit", "12", "--workers", "0")


def call(capsys, out, *argv):
    """(exit code, stdout, the lines that evaluate.py says on stderr)"""
    try:
        code = main([*map(str, argv), "--out", str(out)])
    except SystemExit as error:  # argparse
        code = error.code
    said = capsys.readouterr()
    lines = [line.split("\r")[-1] for line in said.err.split("\n")]
    return code, said.out, [line for line in lines if line.startswith("evaluate.py: ")]


def refused(capsys, out, *argv):
    """The one line."""
    code, _, lines = call(capsys, out, *argv)
    assert (code, len(lines)) == (2, 1), lines
    return lines[0]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Four pictures of ducks and four of gulls."""
    root, birds = tmp_path_factory.mktemp("kinds"), DemoBirds("val", lambda image: image)
    for kind in ("duck", "gull"):
        (root / kind).mkdir()
        found = (birds.facts["kind"] == birds.kinds.index(kind)).nonzero()[:4, 0].tolist()
        for i in found:
            birds.picture(i).save(root / kind / f"{i}.png")
    return root


# Options that a task does not use.

VALUES = {
    "data": ["x"],
    "reference": ["val"],
    "texts": ["3"],
    "heads": ["3.1"],
    "cue": ["a", "b"],
    "remove": ["heads"],
    "classes": ["a", "b"],
    "methods": ["rollout"],
    "score": ["dot"],
    "prompt": ["true"],
    "contrast": ["none"],
    "protocol": ["authors"],
    "void": ["3"],
    "image": ["x.png"],
    "text": ["a bird"],
    "minus": ["a bird"],
    "words": ["x"],
    "head": ["3.4"],
    "role": ["places"],
    "top": ["3"],
    "layer": ["1"],
    "neurons": ["3"],
    "order": ["2"],
    "save": ["x"],
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("option", VALUES)
def test_an_option_is_used_or_refused_by_name(capsys, task, option):
    argv = ["--task", task, f"--{option}", *VALUES[option]]
    if option in TASKS[task].split():
        assert getattr(parse_args(argv), option) is not None
        return
    with pytest.raises(SystemExit) as stopped:
        parse_args(argv)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    assert f"--task {task} does not use --{option}" in said


def test_every_option_of_the_table_is_tried_and_read():
    """By the task's own file or one that it takes its options from."""
    assert {option for options in TASKS.values() for option in options.split()} == set(VALUES)
    shared = "".join(
        (ROOT / "tasks" / f"{name}.py").read_text() for name in ("job", "attribution", "removal")
    )
    for task, options in TASKS.items():
        text = shared + (ROOT / "tasks" / f"{task}.py").read_text()
        others = ["reference"] + ["segmentation"] * (task == "faithfulness")  # which makes its maps
        text += "".join((ROOT / "tasks" / f"{name}.py").read_text() for name in others)
        assert all(re.search(rf"args\.{option}\b", text) for option in options.split()), task


def test_a_default_that_is_spelt_out_and_the_list_of_models(capsys):
    assert parse_args(["--task", "heatmap", "--top", "12", "--contrast", "all"]).top == 12
    with pytest.raises(SystemExit):
        parse_args(["--list-models", "--head", "3.4"])
    assert "--list-models does not use --head, which is for heatmap, retrieval" in capsys.readouterr().err


# Words.


def test_texts_and_methods_are_given_in_any_of_the_usual_ways(tmp_path, kinds):
    ways = [
        ["--text", "a duck", "a gull", "--methods", "decomposition,rollout"],
        ["--text", "a duck", "--text", "a gull", "--methods", "decomposition", "rollout"],
    ]
    found = []
    for i, way in enumerate(ways):
        image, out = str(next(kinds.rglob("*.png"))), tmp_path / str(i)
        assert main(["--task", "heatmap", "--image", image, *way, "--out", str(out)]) == 0
        found.append(json.loads((out / "heatmap" / "results.json").read_text()))
    assert list(found[0]["cosine"]) == ["a duck", "a gull"]
    assert len(found[0]["files"]) == 6
    assert found[0]["files"] == found[1]["files"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["waterbirds", "--cue", "place"], ["did you mean 'places'?"]),
        (["debias", "--cue", "Lights"], ["did you mean 'light'?"]),
        (["retrieval", "--role", "place", "--text", "a bird"], ["did you mean 'places'?"]),
        (["segmentation", "--methods", "rollout,lpr"], ["'lpr'", "did you mean 'lrp'?"]),
        (["heatmap", "--image", "FOLDER", "--text", "a bird"], ["is a directory; expected an image file"]),
        (["retrieval", "--image", "FOLDER", "--head", "3.4"], ["is a directory; expected an image file"]),
        (["waterbirds", "--data", "FOLDER"], ["metadata.csv", "--task debias takes", "as it is"]),
        (["waterbirds", "--limit", "1"], ["holds none|hold none", "--limit 1 drew too few"]),
        (["retrieval", "--text-bank", "BANK", "--role", "texts", "--text", "a bird"], ["one category"]),
        (["check", "--image-size", "3"], ["for images of 3 pixels: such images are smaller than a patch"]),
        (
            ["check", "--model", "ViT-B-32", "--pretrained", "none", "--image-size", "31"],
            ["--image-size 31 is smaller than a patch"],
        ),
        (
            ["check", "--model", "ViT-B-16-SigLIP", "--pretrained", "none", "--image-size", "9"],
            ["images of 9 pixels: such images are smaller than a patch"],
        ),
    ],
)
def test_one_clear_line(tmp_path, capsys, kinds, argv, words):
    (tmp_path / "bank.txt").write_text("a red bird\na duck\n")
    given = {"FOLDER": kinds, "BANK": tmp_path / "bank.txt"}
    line = refused(capsys, tmp_path, "--task", *[given.get(word, word) for word in argv])
    for word in words:
        assert re.search("|".join(map(re.escape, word.split("|"))), line), line


def test_what_is_far_from_all_words_gets_no_suggestion(tmp_path, capsys):
    assert "did you mean" not in refused(capsys, tmp_path, "--task", "waterbirds", "--cue", "xyzzy")


def test_an_image_of_one_patch_is_large_enough(tmp_path, capsys):
    assert call(capsys, tmp_path, "--task", "check", "--image-size", "8", *FEW)[0] == 0


@pytest.mark.slow
def test_a_bank_of_one_category_gives_no_role_and_says_why(tmp_path, capsys):
    (tmp_path / "bank.txt").write_text("a red bird\na duck\non the ocean\n")
    argv = ["--task", "textspan", "--text-bank", tmp_path / "bank.txt", "--texts", "2", *FEW]
    code, shown, _ = call(capsys, tmp_path, *argv)
    assert code == 0
    assert re.search(r"^roles: .*none: .*bank.txt holds one category", shown, re.MULTILINE)


# What can fail is tried before the pass over images.


@pytest.mark.parametrize(
    "argv",
    [
        ["textspan", "--text-bank", "ZEBRA"],
        ["waterbirds", "--cue", "a zebra", "a duck"],
        ["debias", "--classes", "duck", "zebra"],
        ["segmentation", "--classes", "duck", "zebra"],
        ["completeness", "--words", "ZEBRA"],
        ["retrieval", "--role", "places", "--text", "a zebra"],
        ["retrieval", "--head", "3.4", "--text", "a zebra"],
        ["neurons", "--text-bank", "ZEBRA"],
        ["heatmap", "--image", "IMAGE", "--text", "a zebra"],
    ],
)
def test_a_text_is_refused_before_any_image_is_read(tmp_path, capsys, monkeypatch, kinds, argv):
    def begun(*_):
        raise AssertionError("the pass began")

    monkeypatch.setattr(passes, "batches", begun)
    (tmp_path / "zebra.txt").write_text("a duck\na zebra\n")
    given = {"ZEBRA": tmp_path / "zebra.txt", "IMAGE": next(kinds.rglob("*.png"))}
    assert "'zebra'" in refused(capsys, tmp_path, "--task", *[given.get(word, word) for word in argv])
    if argv[0] == "retrieval":  # the control: without the zebra a pass begins
        with pytest.raises(AssertionError, match="the pass began"):
            main(["--task", *[word.replace("zebra", "duck") for word in argv], "--out", str(tmp_path)])


# Workers that are not forked, as on macOS and Windows.


def data_sets(root):
    """One of each kind."""
    transform = load_clip(device="cpu").preprocess
    for part, mode in (
        ("images", "RGB"),
        ("masks", "L"),
        ("masked/images/duck", "RGB"),
        ("masked/masks/duck", "L"),
    ):
        (root / part).mkdir(parents=True)
        for i in range(2):
            picture = Image.new(mode, (64, 64))
            picture.putpixel((i, 1), 1 if mode == "L" else (200, 100, 0))
            picture.save(root / part / f"{i}.png")
    rows = [f"images/{i}.png,0,2,1" for i in range(2)]
    (root / "metadata.csv").write_text("\n".join(["img_filename,y,split,place", *rows]))
    birds = DemoBirds("test", transform, 3)
    found = [birds, Subset(birds, [1]), DemoMasks(transform, 2), Waterbirds(root, "test", transform)]
    found += [ImageFolder(root / "images", "test", transform), MaskFolder(root / "masked", transform)]
    try:
        import h5py
    except ImportError:
        return found
    with h5py.File(root / "gtsegs_ijcv.mat", "w") as file:
        for name, array in (("img", np.zeros((3, 64, 64), np.uint8)), ("gt", np.eye(64, dtype=np.uint8))):
            file[f"of/{name}"] = array
            references = np.array([[file[f"of/{name}"].ref]], dtype=h5py.ref_dtype)
            file.create_dataset(f"value/{name}", data=references)
    opened = ImageNetSegmentation(root / "gtsegs_ijcv.mat", transform)
    opened.pair(0)  # the file is open now in this process
    return [*found, ImageNetSegmentation(root / "gtsegs_ijcv.mat", transform), opened]


class Closure(Dataset):
    def __init__(self):
        self.transform = lambda image: image


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_data_set_is_read_by_workers_that_are_not_forked(tmp_path, method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):  # the control
        ForkingPickler.dumps(Closure())
    every = ConcatDataset(data_sets(tmp_path))
    options = {"collate_fn": passes._collate, "worker_init_fn": passes._as_worker, "num_workers": 1}
    read = list(DataLoader(every, 1, multiprocessing_context=method, **options))
    assert len(read) == len(every)
    assert not [image for image, _ in read if isinstance(image, str)]


def test_the_first_of_large_batches_is_small_and_the_rest_are_full():
    class Numbers(Dataset):
        def __len__(self):
            return 150

        def __getitem__(self, i):
            return torch.zeros(1), i

    def sizes(some, size, done=0):
        found = [indices for _, indices in passes.batches(some, size, 0, "x", torch.device("cpu"), done)]
        assert [i for indices in found for i in indices.tolist()] == list(range(len(some)))
        return [len(indices) for indices in found]

    numbers = Numbers()
    assert sizes(numbers, 64) == [8, 64, 64, 14]
    assert sizes(numbers, 32) == [32, 32, 32, 32, 22]
    assert sizes(numbers, 64, done=72) == [64, 64, 22]  # a resumed run goes on with the batches of the first
    assert sizes(Subset(numbers, range(8)), 64) == [8]
    assert sizes(Subset(numbers, range(9)), 64) == [8, 1]
    assert sizes(Subset(numbers, []), 64) == []


def test_heatmap_shows_how_far_it_is(tmp_path, capsys, kinds):
    image = next(kinds.rglob("*.png"))
    argv = ["--task", "heatmap", "--image", image, "--text", "a duck", "--methods", "rollout"]
    assert main([*map(str, argv), "--out", str(tmp_path)]) == 0
    assert "maps: " in capsys.readouterr().err


# Memory.


@pytest.mark.slow
@pytest.mark.parametrize("task", ["textspan", "neurons", "retrieval"])
def test_pictures_for_the_page_are_small_at_once(tmp_path, monkeypatch, task):
    """The page keeps twice the pixels that it shows."""
    for i in range(8):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (50, 70, 3), np.uint8)
        Image.fromarray(noise).resize((700, 500), Image.Resampling.NEAREST).save(path)
    held, module = [], importlib.import_module(f"tasks.{task}")
    monkeypatch.setattr(module, "page", lambda *args: held.extend(pictures_in(args)) or [])
    more = ["--head", "3.4", "--text", "a duck"] if task == "retrieval" else []
    if task != "retrieval":
        (tmp_path / "bank.txt").write_text("a duck\na red bird\nin a forest\n")
        more = ["--text-bank", str(tmp_path / "bank.txt")]
    classes = {"classifier": lambda *args, **more: torch.eye(2, 96)}
    argv = ["--task", task, "--data", str(tmp_path / "data"), *FEW, *more, "--out", str(tmp_path)]
    monkeypatch.setattr(job, "classifier", classes["classifier"])  # the demo knows no class called a
    assert main(argv) == 0
    assert held
    expected = {"textspan": 192, "neurons": 256, "retrieval": 320}
    assert {max(picture.size) for picture in held} == {expected[task]}


def pictures_in(x):
    """All pictures in dictionaries, lists and tuples."""
    if isinstance(x, Image.Image):
        return [x]
    inside = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return [picture for y in inside for picture in pictures_in(y)]


def test_a_picture_of_more_pixels_than_can_be_meant_is_refused_by_name(tmp_path, capsys, monkeypatch):
    Image.new("1", (9_500, 9_500)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 50_000
    argv = ["--task", "heatmap", "--image", tmp_path / "bomb.png", "--text", "a duck"]
    assert "bomb.png has 9,500 x 9,500 pixels" in refused(capsys, tmp_path, *argv)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side, small in ((10, True), (11, False)):
        Image.new("RGB", (side, side)).save(tmp_path / "x.png")
        assert isinstance(pictures.read(tmp_path / "x.png", lambda image: image.copy()), Image.Image) == small


def test_a_mask_that_a_worker_has_no_memory_for(tmp_path, capsys, monkeypatch):
    if sys.platform != "linux":
        pytest.skip("the patch below reaches workers that are forked")
    monkeypatch.setattr(DemoMasks, "pair", lambda self, i: np.zeros((10**7, 10**7)))
    argv = ["--task", "segmentation", "--methods", "random", "--limit", "4", "--workers", "1"]
    context = torch.multiprocessing.get_start_method(allow_none=True)
    assert context in (None, "fork")
    line = refused(capsys, tmp_path, *argv)
    assert "out of memory" in line
    assert "Unable to allocate" in line
    assert "--workers" in line


# Names that a terminal would obey.


def test_control_characters_are_shown_as_escapes(tmp_path, capsys, kinds):
    root = shutil.copytree(kinds, tmp_path / "data")
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        path.rename(path.with_name(f"{i}\x1b[31m\r\n\x9b\u202e é.png"))
    argv = ["--task", "retrieval", "--data", root, "--head", "3.4", "--text", "a duck", *FEW]
    code, shown, _ = call(capsys, tmp_path / "out\x1b", *argv)  # the last line names this folder
    assert code == 0
    assert not [c for c in shown if c != "\n" and not c.isprintable()]
    rows = [line for line in shown.split("\n") if re.match(r"\d+ +-?\d", line)]
    assert len(rows) == 2 * 8  # by the head, and by the whole embedding
    assert all(row.endswith(r"\x1b[31m\r\n\x9b\u202e é.png") for row in rows)
    next(root.rglob("*.png")).write_text("no image")
    line = refused(capsys, tmp_path, *argv)
    assert r"\x1b[31m" in line
    assert "\x1b" not in line


def test_what_prints_well_stays():
    for text in ("ä ± 鳥 \u3000 \U0001f986 \u200d", "a\nb"):
        assert visible(text, keep="\n") == text
    assert visible("a\nb\u2028") == r"a\nb\u2028"


# Two runs in one folder.

HOLD = """
import pathlib, sys, files
with files.locked(pathlib.Path(sys.argv[1])):
    print("in", flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder out/check."""
    folder = tmp_path / "out" / "check"
    argv = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"in\n"
        yield process
        process.kill()


def test_a_second_run_in_the_same_folder_is_refused_and_touches_nothing(tmp_path, capsys, holder):
    state = tmp_path / "out" / "check" / ".state"
    state.mkdir()
    (state / "check.0.pt").write_bytes(b"of the other run")
    line = refused(capsys, tmp_path / "out", "--task", "check", *FEW, "--save-every", "0")
    assert re.fullmatch(
        r"evaluate.py: another run writes to \S+check: wait for its end .* another --out", line
    )
    assert (state / "check.0.pt").read_bytes() == b"of the other run"
    assert call(capsys, tmp_path / "other", "--task", "check", *FEW)[0] == 0  # in another --out all is well


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_a_run_that_is_over_blocks_nobody(tmp_path, capsys, holder, end):
    holder.kill() if end == "killed" else holder.communicate(b"\n")
    holder.wait()
    assert (tmp_path / "out" / "check" / ".lock").exists() == (end == "killed")
    assert call(capsys, tmp_path / "out", "--task", "check", *FEW)[0] == 0
    assert not (tmp_path / "out" / "check" / ".lock").exists()


def test_a_run_that_fails_gives_the_folder_back(tmp_path, capsys):
    refused(capsys, tmp_path, "--task", "retrieval", "--head", "9.9", "--text", "a duck")
    assert not any((tmp_path / "retrieval").iterdir())


@pytest.mark.parametrize(
    ("error", "allowed"), [(errno.ENOLCK, True), (errno.EAGAIN, False), (errno.EACCES, False)]
)
def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, error, allowed):
    def refuse(file):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(files, "_lock", refuse)
    with (
        contextlib.nullcontext() if allowed else pytest.raises(InputError, match="another run"),
        locked(tmp_path),
    ):
        assert allowed
    assert (tmp_path / ".lock").exists() != allowed


def test_a_lock_that_its_holder_has_just_removed_is_no_lock(tmp_path, monkeypatch):
    take = files._lock
    monkeypatch.setattr(files, "_lock", lambda file: (take(file), (tmp_path / ".lock").unlink()))
    with pytest.raises(InputError, match="another run"), locked(tmp_path):
        pass


# Models that hooks do not see, or that are not what their weights say.

VISION = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 8, "mlp_ratio": 2.0}
TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def vit(**vision):
    torch.manual_seed(0)
    return CLIP(16, VISION | vision, TEXT).eval()


def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


WRAPPED = {
    "the whole model": (
        lambda model: nn.DataParallel(model),
        "it is a wrapper; give the model inside, its .module",
    ),
    "the tower": (
        lambda model: put(model, "visual", nn.DataParallel),
        "visual is a wrapper, DataParallel; .*its .module",
    ),
    "the blocks": (
        lambda model: put(model, "visual.transformer", nn.DataParallel),
        "visual.transformer is a wrapper",
    ),
    "compiled tower": (lambda model: put(model, "visual", torch.compile), "visual is compiled"),
    "compiled in place": (
        lambda model: model.visual.transformer.compile() or model,
        "visual.transformer is compiled",
    ),
    "compiled block": (
        lambda model: put(model, "visual.transformer.resblocks.1", torch.compile),
        "resblocks.1 is compiled",
    ),
}


def put(model, name, wrap):
    place, _, last = name.rpartition(".")
    parent = model.get_submodule(place)
    setattr(parent, last, wrap(getattr(parent, last)))
    return model


@pytest.mark.parametrize("pool", ["tok", "avg"])
@pytest.mark.parametrize("case", WRAPPED)
def test_what_hooks_do_not_see_is_named(case, pool):
    wrap, words = WRAPPED[case]
    model = wrap(vit(pool_type=pool))
    for run in (decompose, lambda *args: neurons(*args, 0), lambda *args: heatmap(*args, torch.randn(1, 16))):
        with pytest.raises(DecompositionError, match=words):
            run(model, images())
    with pytest.raises(BaselineError, match=r"\.module|compiled"):
        METHODS["rollout"](model, images(), torch.randn(2, 16))
    assert decompose(vit(pool_type=pool), images()).error() < 1e-5


def test_a_compiled_model_around_a_stock_tower_is_decomposed():
    assert decompose(torch.compile(vit()), images()).error() < 1e-5


def need_weights(attn):
    attn.register_forward_pre_hook(
        lambda _, args, given: (args, given | {"need_weights": True}), with_kwargs=True
    )


def replace_forward(attn):
    forward = attn.forward
    attn.forward = lambda *args, **given: forward(*args, **given | {"need_weights": True})


@pytest.mark.parametrize(("change", "words"), [(need_weights, "a hook"), (replace_forward, "was replaced")])
def test_an_attention_that_is_called_otherwise_is_named_and_timm_is_not_blamed(change, words):
    model = vit(pool_type="avg")
    change(model.visual.transformer.resblocks[1].attn)
    with pytest.raises(DecompositionError, match=f"block 1 .*{words}") as refusal:
        decompose(model, images())
    assert "TIMM" not in str(refusal.value)


class Adapted(nn.Module):
    """An attention whose weight is another one while it runs, as with adapters that merge around the call."""

    bias_k, add_zero_attn = None, False

    def __init__(self, base, name):
        super().__init__()
        self.base, self.changed = base, name

    def __getattr__(self, name):
        own = name in ("base", "_modules")
        return super().__getattr__(name) if own else getattr(super().__getattr__("base"), name)

    def forward(self, *args, **kwargs):
        weight = self.base.get_parameter(self.changed)
        kept = weight.data.clone()
        weight.data *= torch.arange(weight.numel()).view_as(weight) % 3
        try:
            return self.base(*args, **kwargs)
        finally:
            weight.data.copy_(kept)


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_a_weight_that_changes_while_the_model_runs_is_named(pool):
    model = vit(pool_type=pool)
    blocks = model.visual.transformer.resblocks
    blocks[1].attn = Adapted(blocks[1].attn, "out_proj.weight")
    with pytest.raises(DecompositionError, match=r"block 1.*attn\.base\.out_proj\.weight holds other"):
        decompose(model, images())


def test_no_weight_is_named_where_none_changes():
    model = vit()
    attn = model.visual.transformer.resblocks[1].attn
    attn.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    with pytest.raises(DecompositionError, match="block 1") as refusal:
        decompose(model, images())
    assert "other numbers" not in str(refusal.value)


@pytest.mark.parametrize("task", ["segmentation", "heatmap"])
def test_a_tower_that_gives_an_embedding_for_each_query_is_refused(tmp_path, capsys, kinds, task):
    """Two poolings, which no configuration of open_clip uses."""
    tower = VISION | {"image_size": 32, "attentional_pool": "parallel", "attn_pooler_heads": 2}
    text = TEXT | {"context_length": 77, "vocab_size": 49408}
    (tmp_path / "pools.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "pools.json")
    more = {
        "segmentation": ["--limit", "2", "--workers", "0"],
        "heatmap": ["--image", next(kinds.rglob("*.png")), "--text", "a bird"],
    }
    line = refused(capsys, tmp_path, "--task", task, "--model", "pools", "--pretrained", "none", *more[task])
    assert "it pools by two attentions" in line  # from the configuration, before the model is built
    model = open_clip.create_model("pools").eval()
    with pytest.raises(DecompositionError, match=r"encode_image must give \[b, d\], and gives \[2, 1"):
        image_embedding(model, torch.randn(2, 3, 32, 32))
