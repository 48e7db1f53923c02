"""A pass that is split over processes, killed, continued: the same numbers as one that runs through."""

import copy
import functools
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import words
from torch.utils.data import Subset

import demo
from cue import CueVotes
from data import ImageFolder, Waterbirds
from demo.images import DemoBirds, DemoMasks
from evaluate import main
from files import InputError
from masks import MaskFolder
from metrics import Segmentation
from options import parse_args
from tasks import checkpoint, passes, processes
from tasks.accumulators import Largest, Rows, Sums, load_state_dict, state_dict
from tasks.checkpoint import Checkpoint
from tasks.debias import Outcomes
from tasks.job import Job
from tasks.neurons import Activity
from tasks.reference import Kept
from tasks.waterbirds import Groups
from textspan import Moments
from zeroshot import load_clip, weights_hash

ROOT = Path(__file__).parent.parent
FAST = ["--limit 67 --batch-size 16 --workers 0"]


# Accumulators. Each is made, and filled with the images [start, stop) of one stream.

generator = torch.Generator().manual_seed(0)
X = torch.randn(40, 2, 3, 4, generator=generator)  # values [n, L, H, e]
X[39, 0, 0, 0] = 9  # the largest comes last
LABELS, GROUP, TEXT = (torch.randint(0, k, (40,), generator=generator) for k in (2, 4, 3))
SCORES = torch.randn(5, 40, 2, generator=generator)


class Birds:
    """As much of a data set as Groups needs."""

    classes, y, place, facts = ("a", "b"), LABELS, GROUP % 2, {"kind": TEXT}


def sums(accumulator, rows):
    accumulator.add("x", X[rows].double().sum(dim=0))
    accumulator.add("count", len(rows))


def votes(accumulator, rows):
    accumulator.update(X[rows].flatten(1), X[rows])


def segmentation(accumulator, rows):
    accumulator.update(X[rows, 0], (X[rows, 1] > 0).long())


class Terms:
    def __init__(self, rows):
        self.values, self.embedding = X[rows], X[rows].flatten(1)


class Firing:
    def __init__(self, rows):
        self.activations, self.embedding, self.error = (
            X[rows, 0, :, 0],
            X[rows, 1, 0],
            lambda: float(X[rows, 0, 0, 0].max()),
        )


ACCUMULATORS = {
    "Sums": (Sums, sums),
    "Rows": (Rows, lambda accumulator, rows: accumulator.add(X[rows])),
    "Largest": (Largest, lambda accumulator, rows: accumulator.add("x", float(X[rows].max()))),
    "Moments": (lambda: Moments(4, (2, 3)), lambda accumulator, rows: accumulator.update(X[rows])),
    "CueVotes": (lambda: CueVotes(torch.eye(24)[:7], torch.ones(2, 3, 4, 24), torch.zeros(24)), votes),
    "Segmentation": (lambda: Segmentation(clip=True), segmentation),
    "Kept": (
        lambda: Kept(40, 9, 0, slice(1, 2)),
        lambda accumulator, rows: accumulator.update(Terms(rows), rows),
    ),
    "Activity": (
        lambda: Activity(0, torch.eye(3, 4), kept=9),
        lambda accumulator, rows: accumulator.update(Firing(rows), rows),
    ),
    "Groups": (lambda: Groups(Birds), lambda accumulator, rows: accumulator.update(SCORES[:, rows], rows)),
    "Outcomes": (
        lambda: Outcomes(3, LABELS, GROUP),
        lambda accumulator, rows: accumulator.update(SCORES[:, rows], TEXT[rows], rows),
    ),
}


def flat(state):
    """The tensors and numbers of a state, one after the other."""
    if isinstance(state, dict):
        return [x for key in sorted(state, key=str) for x in flat(state[key])]
    if isinstance(state, list):
        return (
            [torch.cat(state)]
            if state and isinstance(state[0], torch.Tensor)
            else [x for one in state for x in flat(one)]
        )
    return [] if state is None or isinstance(state, str) else [torch.as_tensor(state)]


def same(one, other, exactly=False):
    one, other = flat(state_dict(one)), flat(state_dict(other))
    assert len(one) == len(other) > 0
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-9, "atol": 1e-9}
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("kind", ACCUMULATORS)
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=4, unique=True).map(sorted))
def test_accumulators_merge_to_what_one_that_saw_all_holds(kind, cuts):
    make, fill = ACCUMULATORS[kind]
    whole, merged = make(), make()
    fill(whole, torch.arange(40))
    for start, stop in zip([0, *cuts], [*cuts, 40], strict=True):
        accumulator = make()
        fill(accumulator, torch.arange(start, stop))
        merged.merge(accumulator)
    same(whole, merged)


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_an_accumulator_loaded_from_a_file_is_the_same_and_goes_on_alike(tmp_path, kind):
    make, fill = ACCUMULATORS[kind]
    accumulator, other = make(), make()
    fill(accumulator, torch.arange(25))
    torch.save(state_dict(accumulator), tmp_path / "state.pt")
    seen = state_dict(accumulator)
    fill(accumulator, torch.arange(25, 40))
    load_state_dict(other, torch.load(tmp_path / "state.pt", weights_only=True))
    with pytest.raises(AssertionError):  # the control: a state that lacks 15 images is told apart
        same(accumulator, other, exactly=True)
    fill(other, torch.arange(25, 40))
    same(accumulator, other, exactly=True)
    load_state_dict(other, seen)  # a state is a copy: what came later is not in it
    with pytest.raises(AssertionError):
        same(accumulator, other, exactly=True)


@pytest.mark.parametrize("kind", ACCUMULATORS)
def test_a_fresh_copy_does_not_change_the_original(kind):
    make, fill = ACCUMULATORS[kind]
    accumulator = make()
    fill(accumulator, torch.arange(25))
    before = copy.deepcopy(state_dict(accumulator))
    copied = copy.deepcopy(accumulator)
    load_state_dict(copied, state_dict(make()))
    fill(copied, torch.arange(25, 40))
    for a, b in zip(flat(before), flat(state_dict(accumulator)), strict=True):
        assert torch.equal(a, b)


def test_a_nan_is_the_largest():
    one, other = Largest(), Largest()
    one.add("x", 1.0)
    other.add("x", float("nan"))
    one.merge(other)
    one.add("x", 2.0)
    assert one.largest["x"] != one.largest["x"]


# Runs.


def results(out, task):
    found = json.loads((Path(out) / task / "results.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


def close(a, b, tolerance, path=""):
    """Equal but for numbers, and those to a tolerance."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            close(a[key], b[key], tolerance, f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, tolerance, f"{path}/{i}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=tolerance, rel=tolerance), path
    elif "/settings/sum" not in path:  # an error in words
        assert a == b, path


def test_the_comparison_of_results_sees_a_difference():
    close({"a": [1.0, "x"]}, {"a": [1.0 + 1e-8, "x"]}, 1e-6)
    for other in ({"a": [1.0 + 1e-5, "x"]}, {"a": [1.0, "y"]}, {"a": [1.0]}, {"b": [1.0, "x"]}):
        with pytest.raises(AssertionError):
            close({"a": [1.0, "x"]}, other, 1e-6)


JOBS = {
    "waterbirds": [*FAST, "--draws 10"],
    "debias": [*FAST, "--draws 10 --cue places"],
    "textspan": FAST,
    "ablation": FAST,
    "completeness": FAST,
    "neurons": FAST,
    "retrieval": [*FAST, "--role places", "--text", "a bird"],
    "segmentation": ["--limit 31 --batch-size 16 --workers 0 --methods decomposition rollout random"],
    "faithfulness": ["--limit 11 --batch-size 4 --workers 0 --methods decomposition rollout"],
    "check": ["--limit 1"],  # one of the processes has no images
}


def evaluate(*argv):
    return main(words(*argv))


def run_waterbirds(folder, *more):
    return evaluate("--task waterbirds", *JOBS["waterbirds"], "--out", folder, *more)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a task gives in one process."""
    out = tmp_path_factory.mktemp("alone")

    @functools.cache
    def given(task):
        assert evaluate("--task", task, *JOBS[task], "--out", out) == 0
        return results(out, task)

    return given


SEVERAL = """
import json, sys
import pytest
from conftest import small_demo
from evaluate import main
small_demo(pytest.MonkeyPatch())
sys.exit(max(main(argv) for argv in json.loads(sys.argv[1])))
"""


DIES = """
import os
from tasks.checkpoint import Checkpoint
save, written = Checkpoint.save, []
def dying(checkpoint, path, accumulators, done):
    save(checkpoint, path, accumulators, done)
    written.append(path)
    if len(written) == 4 and os.environ["RANK"] == "1":
        os._exit(1)
Checkpoint.save = dying
"""


def several(tmp_path, processes, jobs, before=""):
    """The jobs, one after the other, in so many processes together."""
    script = tmp_path / "several.py"
    script.write_text(before + SEVERAL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(script), json.dumps([words(*job) for job in jobs])]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path, alone):
    """67 images are no multiple of 2."""
    jobs = [["--task", task, *options, "--out", str(tmp_path / "out")] for task, options in JOBS.items()]
    done = several(tmp_path, 2, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    for task in JOBS:
        close(alone(task), results(tmp_path / "out", task), 1e-6 if task != "check" else 1e-3)
    assert done.stdout.count("a page to look at") == len(JOBS)  # one process speaks


@pytest.mark.slow
def test_one_process_shows_how_far_it_is(tmp_path):
    """This is not the first; tqdm asks when it is imported."""
    command = [sys.executable, "evaluate.py", *words("--task check --limit 2 --workers 0", "--out", tmp_path)]
    options = {"env": os.environ | {"RANK": "1"}, "cwd": ROOT, "timeout": 100}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_processes_that_were_stopped_go_on_together(tmp_path, alone):
    """The second process has 3 batches of each pass, and dies after the first of the reference."""
    jobs = [["--task waterbirds", *JOBS["waterbirds"], "--save-every 0 --resume", "--out", tmp_path / "out"]]
    died = several(tmp_path, 2, jobs, DIES)
    assert died.returncode != 0
    assert {"centre.pt", "reference-train.1.pt"} <= {
        path.name for path in (tmp_path / "out" / "waterbirds" / ".state").iterdir()
    }
    other = several(tmp_path, 2, [[*jobs[0], "--heads 3.4"]])
    assert other.returncode != 0
    assert other.stderr.count("--heads differs: 'auto' then, '3.4' now") == 1
    done = several(tmp_path, 2, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    close(alone("waterbirds"), results(tmp_path / "out", "waterbirds"), 1e-6)


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tmp_path, waterbirds):
    """After a pass all processes find the same; in the second job one process alone finds it."""
    broken = sorted(row["img_filename"] for row in waterbirds.rows if row["split"] == 2)[-1]
    (waterbirds.root / broken).write_bytes(b"no image")
    out = ["--workers 0", "--out", tmp_path / "out"]
    jobs = [
        ["--task textspan --limit 1", *out],
        ["--task waterbirds --heads 3.4", "--data", waterbirds.root, *out],
    ]
    done = several(tmp_path, 2, jobs)
    assert done.returncode != 0
    assert done.stderr.count("same embedding") == 1
    assert done.stderr.count(f"{broken} is not an image") == 1
    assert "another process" not in done.stderr
    assert not (tmp_path / "out" / "waterbirds" / "results.json").exists()


@pytest.fixture
def waterbirds(tmp_path):
    from types import SimpleNamespace

    from test_evaluate import write_metadata

    data, rows = DemoBirds("val", lambda image: image, limit=60), []
    for i in range(60):
        name = f"bird_{i:02d}.png"
        (tmp_path / "birds").mkdir(exist_ok=True)
        data.picture(i).save(tmp_path / "birds" / name)
        rows.append(
            {"img_filename": name, "y": int(data.y[i]), "split": (0, 2)[i % 2], "place": int(data.place[i])}
        )
    write_metadata(tmp_path / "birds", rows)
    return SimpleNamespace(root=tmp_path / "birds", rows=rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize(
    ("task", "options"),
    [(task, ["--batch-size 7"]) for task in ("waterbirds", "textspan", "neurons", "ablation")]
    + [("waterbirds", ["--batch-size 200"]), ("waterbirds", ["--workers 2"])],
)
def test_batch_size_and_workers_change_nothing(tmp_path, alone, task, options):
    assert evaluate("--task", task, *JOBS[task], *options, "--out", tmp_path) == 0
    close(alone(task), results(tmp_path, task), 1e-6)


KILLED = """
import json, os, random, signal, sys, threading, time
from evaluate import main
import torch, tasks.waterbirds
torch.set_num_threads(1)

def run(seconds, argv):  # in a fork: what is imported above is imported once
    child = os.fork()
    if not child:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        os._exit(main(argv))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

through, killed, *argv = sys.argv[1:]
start, dice = time.time(), random.Random(0)
codes = [run(300, [*argv, "--out", through])]
whole = time.time() - start
codes += [run(dice.uniform(0.2, 0.8) * whole, [*argv, "--out", killed, "--resume"]) for _ in range(3)]
codes += [run(300, [*argv, "--out", killed, "--resume"])]
print(json.dumps(codes))
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    argv = words("--task waterbirds --limit 200 --batch-size 8 --workers 0 --save-every 0.1")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "through"), str(tmp_path / "killed"), *argv]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "cwd": ROOT}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes[0] == codes[-1] == 0
    assert codes[1] == -signal.SIGKILL  # or nothing was tested
    assert results(tmp_path / "killed", "waterbirds") == results(tmp_path / "through", "waterbirds")
    assert not (tmp_path / "killed" / "waterbirds" / ".state").exists()


class Stop(Exception):
    pass


def save_always(folder, *more):
    """The exit code of a run of waterbirds that saves its state after every batch."""
    return run_waterbirds(folder, "--save-every 0", *more)


def stopped(tmp_path, monkeypatch, after=5, *more):
    """A run that ends in mid-pass, and leaves its state."""
    save, count = Checkpoint.save, []

    def counted(checkpoint, path, accumulators, done):
        save(checkpoint, path, accumulators, done)
        count.append(path)
        if len(count) == after:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", counted)
        with pytest.raises(Stop):
            save_always(tmp_path, *more)
    return tmp_path / "waterbirds" / ".state"


@pytest.mark.slow
def test_what_is_saved_is_not_done_again(tmp_path, monkeypatch, alone, capsys):
    """8 writes: 5 batches of the centre, its end, 2 of 5 batches of the reference."""
    assert sorted(path.name for path in stopped(tmp_path, monkeypatch, 8).iterdir()) == [
        "centre.0.pt",
        "centre.pt",
        "reference-train.0.pt",
    ]
    seen, batches = [], passes.batches
    monkeypatch.setattr(
        passes, "batches", lambda data, *more: seen.append((len(data), more[-1])) or batches(data, *more)
    )
    assert save_always(tmp_path, "--resume") == 0
    assert seen == [(67 - 2 * 16, 2 * 16), (67, 0)]  # to do, done
    assert results(tmp_path, "waterbirds") == alone("waterbirds")


OTHERS = {
    "seed": (["--seed 1"], "--seed differs: '0' then, '1' now"),
    "batch": (["--batch-size 8"], "--batch-size differs: '16' then, '8' now"),
    "images": (["--limit 66"], "differs"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_another_run_is_refused_and_left(tmp_path, monkeypatch, capsys, other):
    folder = stopped(tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    more, words = OTHERS[other]
    capsys.readouterr()
    assert save_always(tmp_path, "--resume", *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert "start anew without --resume" in error
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def a_job(clip, *options):
    """As evaluate.py makes it, with a model that is there."""
    job = Job(parse_args(words(*options)))
    job.clip = clip
    return job


def test_other_labels_or_another_model_are_another_run(waterbirds):
    """The model's name says what has no weights: how images are prepared."""
    from test_evaluate import write_metadata

    clip, found = load_clip(device="cpu"), []
    for change, more in ((False, []), (False, []), (True, []), (False, ["--model another"])):
        rows = [
            row | {"place": 1 - row["place"]} if change and not i else row
            for i, row in enumerate(waterbirds.rows)
        ]
        write_metadata(waterbirds.root, rows)
        job = a_job(clip, "--task waterbirds", "--data", str(waterbirds.root), *more)
        data = Waterbirds(waterbirds.root, "train", clip.preprocess)
        found.append(checkpoint.fingerprint(job, data, "test"))
    differ = [{key for key in found[0] if found[0][key] != other[key]} for other in found[1:]]
    assert differ == [set(), {"images"}, {"--model"}]


def with_labels(data, **labels):
    """The same images with other labels."""
    vars(data).update(labels)
    return data


def pictures(folder, preprocess):
    """Data sets that differ from each other in one thing: images, files, labels, masks, or those taken."""
    for name in ("a", "b"):
        for file in (
            f"{name}/images/1.png",
            f"{name}/masks/1.png",
            f"files/{name}/1.png",
            f"flat/{name}.png",
        ):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 255).save(folder / file)
    (folder / "b" / "images" / "1.png").rename(folder / "b" / "images" / "2.png")
    (folder / "b" / "masks" / "1.png").rename(folder / "b" / "masks" / "2.png")

    def birds(limit=3, seed=0, **labels):
        return with_labels(DemoBirds("val", preprocess, limit, seed), **labels)

    def files(name, **labels):
        return with_labels(ImageFolder(folder / name, "test", preprocess), **labels)

    return [
        birds(),
        birds(4),
        birds(seed=1),
        birds(y=1 - birds().y),
        birds(place=1 - birds().place),
        files("flat"),
        files("files"),
        files("files/a"),
        files("files", y=torch.tensor([1, 0])),
        files("files", place=torch.tensor([1, 0])),
        MaskFolder(folder / "a", preprocess),
        MaskFolder(folder / "b", preprocess),
        with_labels(MaskFolder(folder / "a", preprocess), labels=torch.tensor([0])),
        DemoMasks(preprocess, 3, split="val"),
        DemoMasks(preprocess, 3, 1, split="val"),
        with_labels(DemoMasks(preprocess, 3, split="val"), labels=torch.tensor([0, 0, 0])),
        Subset(birds(), [0, 1]),
        Subset(birds(), [0, 2]),
        Subset(birds(4), [0, 1]),
    ]


def test_what_tells_one_run_from_another(tmp_path, monkeypatch):
    clip = load_clip(device="cpu")
    first_data, *others = pictures(tmp_path / "pictures", clip.preprocess)

    def mark(data=first_data, title="test", options=()):
        return checkpoint.fingerprint(a_job(clip, "--task check", *options), data, title)

    def differ(*given, **other):
        return {key for key, value in mark(*given, **other).items() if value != first[key]}

    first = mark()
    assert differ(DemoBirds("val", clip.preprocess, 3)) == set()
    assert [differ(data) for data in others] == [{"images"}] * len(others)
    assert len({str(mark(data)["images"]) for data in (first_data, *others)}) == 1 + len(others)
    assert differ(title="train") == {"pass"}
    assert differ(options=["--batch-size 3"]) == {"--batch-size"}
    assert differ(options=["--workers 3 --out elsewhere --resume --save-every 1"]) == set()
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert differ() == {"torch"}
    monkeypatch.undo()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "core.py").touch()
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "tasks" / "checkpoint.py"))
    assert differ() == {"program"}
    monkeypatch.undo()
    other = tmp_path / "bank.txt"
    other.write_text("a bird\n")
    monkeypatch.setattr(checkpoint, "default_bank", lambda clip: other)
    assert differ() == {"default bank"}


def test_a_picture_that_was_replaced_is_another_run(tmp_path):
    files = [tmp_path / "images" / "a.png", tmp_path / "masks" / "a.png"]
    for file in files:
        file.parent.mkdir()
        file.touch()
    preprocess = load_clip(device="cpu").preprocess
    plain = ImageFolder(tmp_path / "images", "test", preprocess)
    masked = MaskFolder(tmp_path, preprocess)
    seen = []
    for change in (None, *files):
        for file in files:
            file.write_bytes(b"other" if file == change else b"one")
        seen.append((str(plain.fingerprint()), str(masked.fingerprint())))
    before, *after = seen
    assert [(plain != before[0], masked != before[1]) for plain, masked in after] == [
        (True, True),
        (False, True),
    ]


def test_other_weights_are_another_run(tmp_path):
    one, other = load_clip(device="cpu"), load_clip(device="cpu")
    with torch.no_grad():
        next(other.model.parameters()).flatten()[0] += 1e-3
    data, prints = DemoBirds("train", one.preprocess), []
    for clip in (one, load_clip(device="cpu"), other):
        prints.append(checkpoint.fingerprint(a_job(clip, "--task waterbirds"), data, "test"))
    assert prints[0] == prints[1]
    assert {key for key in prints[0] if prints[0][key] != prints[2][key]} == {"weights"}


def test_another_bank_of_the_same_name_is_another_run(tmp_path):
    clip, bank = load_clip(device="cpu"), tmp_path / "bank.txt"
    job = a_job(clip, "--task waterbirds", "--text-bank", str(bank))
    data = DemoBirds("train", clip.preprocess)
    found = []
    for text in ("a bird\na dog\n", "a bird\na dog\n", "a bird\na cat\n"):
        bank.write_text(text)
        found.append(checkpoint.fingerprint(job, data, "test"))
    assert found[0] == found[1]
    assert {key for key in found[0] if found[0][key] != found[2][key]} == {"file of --text_bank"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: torch.save(
            {"run": {}, "accumulators": pytest.raises}, path
        ),  # would have to be unpickled
    ],
    ids=["cut short", "a pickle"],
)
def test_a_broken_state_is_refused(tmp_path, monkeypatch, capsys, damage):
    for path in stopped(tmp_path, monkeypatch).iterdir():
        damage(path)
    assert run_waterbirds(tmp_path, "--resume") == 2
    assert "cannot read the state" in capsys.readouterr().err


OTHERWISE = {
    "a list": lambda state: [1, 2],
    "a tensor": lambda state: torch.ones(3),
    "a number for the run": lambda state: state | {"run": 3},
    "no accumulators": lambda state: {name: state[name] for name in ("run", "done")},
    "one accumulator fewer": lambda state: state | {"accumulators": state["accumulators"][1:]},
    "other accumulators": lambda state: (
        state | {"accumulators": [{"mean": 1.0} for _ in state["accumulators"]]}
    ),
    "words in place of a number": lambda state: state | {"done": "all"},
    "nothing done": lambda state: {name: state[name] for name in ("run", "accumulators")},
}


@pytest.mark.parametrize("kind", OTHERWISE)
def test_a_state_that_holds_something_else_is_refused(tmp_path, monkeypatch, capsys, kind):
    run = a_checkpoint(tmp_path, monkeypatch, 0, 1, "--resume")
    total = Sums()
    total.add("right", 3)
    run.save(run.path, [total], 2)
    assert run.load_unfinished([Sums()]) == 2  # the control
    torch.save(OTHERWISE[kind](torch.load(run.path, weights_only=True)), run.path)
    with pytest.raises(InputError, match=r"cannot read the state .* without --resume"):
        run.load_unfinished([Sums()])


@pytest.mark.slow
def test_a_run_that_does_not_resume_starts_anew_and_says_so(tmp_path, monkeypatch, capsys, alone):
    folder = stopped(tmp_path, monkeypatch)
    capsys.readouterr()
    assert run_waterbirds(tmp_path) == 0
    assert f"note: {folder} is of a run that stopped" in capsys.readouterr().err
    assert results(tmp_path, "waterbirds") == alone("waterbirds")
    assert not folder.exists()


@pytest.mark.slow
def test_a_run_stopped_twice_keeps_nothing_of_the_first(tmp_path, monkeypatch, alone):
    """The first gets farther, with another seed; the second does not resume it."""
    assert "reference-train.0.pt" in {
        path.name for path in stopped(tmp_path, monkeypatch, 8, "--seed 1").iterdir()
    }
    assert [path.name for path in stopped(tmp_path, monkeypatch, 2).iterdir()] == ["centre.0.pt"]
    assert run_waterbirds(tmp_path, "--resume") == 0
    assert results(tmp_path, "waterbirds") == alone("waterbirds")


def test_resuming_nothing_says_so(tmp_path, capsys):
    assert evaluate("--task check --limit 4 --resume", "--out", tmp_path) == 0
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_full_disk_stops_the_run_and_leaves_what_was_saved(tmp_path, monkeypatch, capsys, error):
    folder = stopped(tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(_, partial):
        partial.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    assert save_always(tmp_path, "--resume") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot save the state" in line
    assert "--resume" in line
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def a_checkpoint(tmp_path, monkeypatch, rank=0, size=2, *more):
    monkeypatch.setattr(processes, "process_rank", lambda: rank)
    monkeypatch.setattr(processes, "process_count", lambda: size)
    monkeypatch.setattr(processes, "broadcast", lambda x, source=0: x)
    clip = load_clip(device="cpu")
    job = a_job(clip, "--task check", "--out", str(tmp_path), *more)
    return Checkpoint(job, DemoBirds("val", clip.preprocess), "a pass")


@pytest.mark.parametrize(("rank", "left"), [(0, {"x.1.pt", "x.2.pt"}), (1, {"x.pt", "x.0.pt", "x.2.pt"})])
def test_a_process_clears_what_is_its_own(tmp_path, monkeypatch, rank, left):
    """The first also what is of all."""
    found = a_checkpoint(tmp_path, monkeypatch, rank)
    found.folder.mkdir(parents=True)
    for name in ("x.pt", "x.0.pt", "x.1.pt", "x.2.pt"):
        (found.folder / name).touch()
    found.save(found.path, (Sums(),), 0)
    assert {path.name for path in found.folder.iterdir()} == left | {f"a-pass.{rank}.pt"}


def test_a_state_is_of_so_many_processes(tmp_path, monkeypatch):
    found = a_checkpoint(tmp_path, monkeypatch)
    found.save(found.path, (Sums(),), 3)
    assert a_checkpoint(tmp_path, monkeypatch, 0, 2, "--resume").load_unfinished((Sums(),)) == 3
    with pytest.raises(InputError, match="processes differs: 2 then, 3 now"):
        a_checkpoint(tmp_path, monkeypatch, 0, 3, "--resume").load_unfinished((Sums(),))


def test_a_state_is_saved_when_its_time_has_come(tmp_path, monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    found = a_checkpoint(tmp_path, monkeypatch, 0, 1, "--save-every 10")
    monkeypatch.setattr(found, "save", lambda *_: saved.append(clock[0]))
    for clock[0] in range(0, 40, 4):
        found.save_if_due((), 0)
    assert saved == [12, 24, 36]


def test_a_file_where_the_state_should_be(tmp_path, capsys):
    (tmp_path / "check").mkdir()
    (tmp_path / "check" / ".state").touch()
    assert evaluate("--task check --limit 4 --save-every 0 --workers 0", "--out", tmp_path) == 2
    assert "cannot save the state" in capsys.readouterr().err


def test_a_short_run_leaves_no_state(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "save", lambda *_: pytest.fail("saved"))
    assert evaluate("--task check --limit 4", "--out", tmp_path) == 0


def test_the_demos_weights_hash_does_not_depend_on_who_loaded_them():
    hashes = {
        weights_hash(clip.model) for clip in (load_clip(device="cpu"), load_clip(demo.NAME, device="cpu"))
    }
    assert len(hashes) == 1


def test_states_hold_tensors_and_numbers_alone(tmp_path, monkeypatch):
    """What comes back from a file is never unpickled."""
    folder = stopped(tmp_path, monkeypatch)
    for path in folder.iterdir():
        assert torch.load(path, weights_only=True)["run"]["processes"] == 1


@given(st.integers(0, 10**6), st.integers(1, 64))
def test_images_are_shared_out_whole(count, size):
    """None twice, none left out, and no process has more than one more than another."""
    shares = [passes.share(count, rank, size) for rank in range(size)]
    assert shares[0].start == 0
    assert shares[-1].stop == count
    assert all(one.stop == other.start for one, other in pairwise(shares))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_one_process_finds_wrong_all_say(monkeypatch):
    told = {0: None, 1: "its state is broken", 2: None}
    monkeypatch.setattr(processes, "process_count", lambda: 3)
    monkeypatch.setattr(processes, "broadcast", lambda mine, source: told[source])
    with pytest.raises(InputError, match="its state is broken"):
        processes.raise_everywhere(None)
    told[1] = None
    processes.raise_everywhere(None)


def test_an_error_elsewhere_ends_a_process_that_waits(monkeypatch):
    def dead(*_, **__):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(processes, "process_count", lambda: 2)
    monkeypatch.setattr(processes.dist, "broadcast_object_list", dead)
    with pytest.raises(processes.OtherProcessError, match="another process stopped"):
        processes.broadcast(None)
