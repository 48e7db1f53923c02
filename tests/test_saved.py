"""saved.py and --task terms: what is read equals what decompose gives; a broken file is told in one line."""

import re
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import run
from safetensors.torch import load_file, save_file
from small import EXACT, FAR, HALF, SINGLE, build, far, pictures
from test_families import PROJECTED, SIGLIP

import saved as module
from decompose import decompose, head_maps
from demo.images import DemoBirds
from files import InputError
from saved import open_terms, save_terms
from zeroshot import load_clip

ROOT = Path(__file__).parent.parent
NAMES = [f"picture {i}" for i in range(5)]
MODELS = {
    "CLIP": lambda: build().float(),
    "SigLIP": lambda: SIGLIP().float(),
    "attention pooling behind a linear map": lambda: PROJECTED().float(),
    "mean of patches": lambda: build(pool_type="avg").float(),
}


def images_for(model, batch=5):
    sizes = getattr(model.visual, "image_size", None)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *sizes, generator=generator)


def save(path, model, images, names=NAMES):
    return save_terms(path, model, images.split(2), names)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "terms.safetensors"


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_is_what_decompose_gives(path, name):
    model = MODELS[name]()
    images = images_for(model)
    error = save(path, model, images)
    assert error == max(decompose(model, part).error() for part in images.split(2))
    saved, whole = open_terms(path), decompose(model, images)
    assert len(saved) == 5
    assert saved.names == NAMES
    for rows in (slice(0, 5), slice(3, None), slice(-2, None), slice(1, 2)):
        terms = saved[rows]
        assert terms.own is None
        for field, x in vars(whole).items():
            y = getattr(terms, field)
            if field != "own":
                assert (x is None) == (y is None), field
                assert x is None or far(y, x[rows]) < SINGLE, field
        assert 0 < terms.error() <= error + SINGLE
    assert far(saved[1].heads, whole.heads[1:2]) < SINGLE
    assert far(saved[2].heads, whole.heads[1:2]) > FAR  # the comparison would see another row
    assert far(saved[-1].embedding, whole.embedding[4:]) < SINGLE
    assert [terms.embedding.shape[0] for terms in saved] == [1] * 5
    pooled = "attention pooling" in name or name == "SigLIP"
    assert ("maps" in saved.shapes) != pooled
    assert ("pool" in saved.shapes) == pooled


def test_any_reader_of_safetensors_reads_it(path):
    model = build().float()
    images = images_for(model)
    save(path, model, images)
    found, terms = load_file(path), decompose(model, images)
    assert set(found) == {"embedding", "stem", "mlps", "constant", "values", "maps"}
    assert {x.dtype for x in found.values()} == {torch.float32}
    heads = torch.einsum("nlhe,lhed->nlhd", found["values"], found["maps"])
    assert far(heads, terms.heads) < SINGLE
    assert far(found["maps"], head_maps(model)) == 0


def test_models_of_other_precisions_are_saved_in_float32(path):
    for model, bound in ((build(), EXACT), (build().bfloat16(), HALF)):
        images = pictures(model, batch=5)
        save(path, model, images)
        terms = decompose(model, images)
        assert open_terms(path)[0:5].heads.dtype == torch.float32
        assert far(open_terms(path)[0:5].heads.double(), terms.heads.double()) < max(bound, SINGLE)


def test_names_are_kept_as_they_are_and_what_is_said_of_them(path):
    names = ["a/b c.jpg", 'quote " \\ ', "tab\tline\n", "Möwe 鷗 \udcff", "x" * 5000]
    about = {"model": "ViT", "seed": 3}
    save_terms(path, build().float(), images_for(build()).split(2), names, about)
    saved = open_terms(path)
    assert saved.names == names
    assert saved.about == {"convention": "term", "model": "ViT", "seed": "3"}


def test_numbers_begin_at_multiples_of_eight_bytes(path):
    for length in range(3):
        save(path, build().float(), images_for(build()), ["x" * length] * 5)
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


def test_what_cannot_be_read_by_row_is_refused(path):
    save(path, build().float(), images_for(build()))
    saved = open_terms(path)
    with pytest.raises(IndexError):
        saved[5]
    with pytest.raises(ValueError, match="slices of step 1"):
        saved[::2]
    assert len(saved[5:].embedding) == 0


# Files that are none.


def broken(path, how):
    save(path, build().float(), images_for(build()))
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-1])
    elif how == "longer":
        path.write_bytes(data + b"\0")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("values, maps, stem")
    elif how == "another":
        save_file({"weight": torch.zeros(3)}, path)
    elif how == "half":
        save_file({name: x for name, x in load_file(path).items() if name != "mlps"}, path)
    elif how == "nameless":
        save_file(load_file(path), path)
    elif how == "gone":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()


BROKEN = {
    "cut": "is no whole file of safetensors",
    "longer": "is no whole file of safetensors",
    "empty": "is no whole file of safetensors",
    "text": "is no whole file of safetensors",
    "another": "holds no terms as save_terms writes them: no constant; found weight",
    "half": "holds no terms as save_terms writes them: no mlps; found constant, embedding",
    "nameless": "holds no terms as save_terms writes them: no names; found",
    "gone": "cannot read",
    "folder": "cannot read",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_or_foreign_file_is_told_in_one_line(path, how):
    broken(path, how)
    with pytest.raises(InputError, match=BROKEN[how]) as told:
        open_terms(path)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


# What cannot be written.


@pytest.mark.parametrize(
    ("count", "message"), [(4, "more images than the 4 names"), (6, "6 names, and 5 images")]
)
def test_names_and_images_must_be_as_many(path, count, message):
    path.write_text("earlier")
    with pytest.raises(ValueError, match=message):
        save(path, build().float(), images_for(build()), ["x"] * count)
    assert path.read_text() == "earlier"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_no_images_are_refused(path):
    with pytest.raises(ValueError, match="0 names, and 0 images"):
        save_terms(path, build().float(), [], [])


def test_a_folder_that_is_not_there_and_one_in_the_place_of_the_file(path, tmp_path):
    images = images_for(build())
    with pytest.raises(InputError, match=r"cannot write .*no such/x: No such file or directory"):
        save(tmp_path / "no such" / "x", build().float(), images)
    with pytest.raises(InputError, match="it is a folder; expected the name of a file"):
        save(tmp_path, build().float(), images)


def test_a_disk_that_is_full_from_the_start_or_on_the_way(path, monkeypatch):
    """The limit is the system's, as a full disk is."""
    path.write_text("earlier")
    model, images = build().float(), images_for(build(), 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*terms.safetensors: File too large"):
            save(path, model, images, ["x"] * 400)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    usage = shutil.disk_usage(path.parent)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match=r"no room for the terms: they take 0.0 GB, and 0.0 are free"):
        save(path, model, images, ["x"] * 400)
    assert path.read_text() == "earlier"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_more_names_than_a_header_can_hold(path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 10_000)
    save(path, build().float(), images_for(build()), ["x" * 1000] * 5)
    with pytest.raises(InputError, match=r"the names take over .* save the images in several files"):
        save(path, build().float(), images_for(build()), ["x" * 2000] * 5)


def test_the_limit_of_a_header_is_that_of_safetensors(path):
    for size, message in ((module.LONGEST, "invalid header length"), (module.LONGEST + 1, "too large")):
        path.write_bytes(struct.pack("<Q", size) + b"{}")
        with pytest.raises(InputError, match=message):
            open_terms(path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of memory there")
def test_memory_does_not_grow_with_the_number_of_images_that_are_written(tmp_path):
    """In a process of its own, whose terms are made up: 20 kB an image."""
    program = r"""
import re, sys, torch
import saved
from decompose import Decomposition
def decompose(model, images):
    b, kept = len(images), torch.randn(len(images), 4, 8, 128)
    if sys.argv[2] == "keep":
        model.append(kept)
    zeros = torch.zeros(b, 128)
    return Decomposition(torch.ones(b, 128), zeros, kept + 1, torch.zeros(b, 4, 128), zeros, kept)
saved.decompose, saved.head_maps = decompose, lambda model: torch.zeros(4, 8, 128, 128)
count = int(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")  # the imports' peak does not count
saved.save_terms("terms", [], [torch.zeros(50, 1)] * (count // 50), ["x"] * count)
print(int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) // 1024)
"""

    def peak(count, how=""):
        command = [sys.executable, "-c", program, str(count), how]
        options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
        done = subprocess.run(command, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        return int(done.stdout), (tmp_path / "terms").stat().st_size / 2**20

    (small, size), (large, larger), (kept, _) = peak(100), peak(10_000), peak(10_000, "keep")
    assert larger - size > 180
    assert large - small < 20
    assert kept - small > 120  # it would be seen


# The task.


def test_the_task_writes_the_terms_of_the_test_images(tmp_path):
    ran = run(tmp_path, "--task terms --limit 20 --workers 0 --batch-size 8")
    assert ran.code == 0
    path = tmp_path / "results" / "terms" / "terms.safetensors"
    saved, clip = open_terms(path), load_clip(device="cpu")
    data = DemoBirds("test", clip.preprocess, 20)
    terms = decompose(clip.model, torch.stack([data[i][0] for i in range(20)]))
    assert far(saved[:].heads, terms.heads) < SINGLE
    assert far(saved[:].embedding, terms.embedding) < SINGLE
    assert saved.names == [data.caption(i) for i in range(20)]
    assert saved.about["model"] == "demo-vit"
    assert saved.about["weights"] == "demo/demo-vit.safetensors"
    assert saved.about["images"] == data.description == ran.results["settings"]["images"]
    assert ran.results["shapes"] == {name: list(shape) for name, shape in saved.shapes.items()}
    assert re.search(r"^values +20 x 4 x 8 x 16 +0\.0$", ran.out, re.MULTILINE)
    assert "What is in the file" in (tmp_path / "results" / "terms" / "report.html").read_text()
    assert not (tmp_path / "results" / "terms" / ".state").exists()


def test_all_images_of_a_folder_without_labels_go_to_the_file_that_is_named(tmp_path):
    clip, folder = load_clip(device="cpu"), tmp_path / "photos"
    data = DemoBirds("test", clip.preprocess, 3)
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("b.png", "more/c.png", "a.png")):
        data.picture(i).save(folder / name)
    ran = run(tmp_path, "--task terms --workers 0 --data", folder, "--save", tmp_path / "mine.safetensors")
    assert ran.code == 0
    saved = open_terms(tmp_path / "mine.safetensors")
    assert saved.names == ["a.png", "b.png", "more/c.png"]
    terms = decompose(clip.model, torch.stack([data[i][0] for i in (2, 0, 1)]))
    assert far(saved[0:3].heads, terms.heads) < SINGLE


def test_the_names_of_waterbirds_are_those_of_the_files_of_the_test_split(tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    rows = ["img_filename,y,split,place", "a.png,0,0,0", "b.png,1,2,0"]
    (folder / "metadata.csv").write_text("\n".join(rows))
    for name in ("a.png", "b.png"):
        DemoBirds("test", lambda image: image, 1).picture(0).save(folder / name)
    assert run(tmp_path, "--task terms --workers 0 --data", folder).code == 0
    assert open_terms(tmp_path / "results" / "terms" / "terms.safetensors").names == ["b.png"]


def test_an_image_that_cannot_be_read_leaves_the_earlier_file(tmp_path, refused):
    folder, path = tmp_path / "photos", tmp_path / "mine.safetensors"
    folder.mkdir()
    DemoBirds("test", lambda image: image, 1).picture(0).save(folder / "a.png")
    (folder / "b.png").write_text("no image")
    path.write_text("earlier")
    often = "--save-every 0 --batch-size 1"  # no state is left either, which --resume could not use
    refused(["--task terms --workers 0", often, "--data", folder, "--save", path], "b.png is not an image")
    assert path.read_text() == "earlier"
    assert not list(tmp_path.glob(".mine*"))


def test_where_it_cannot_be_saved_is_told_in_one_line(tmp_path, refused):
    refused(
        ["--task terms --limit 2 --workers 0 --save", tmp_path / "no" / "x"], "cannot write", "No such file"
    )
    refused(["--task terms --limit 2 --workers 0 --save", tmp_path], "it is a folder")


def test_resume_and_several_processes_are_refused(tmp_path, refused, monkeypatch):
    expected = "--task terms writes its file in one go: leave out --resume, and start one process"
    refused(["--task terms --limit 2 --workers 0 --resume"], expected)
    monkeypatch.setattr("tasks.terms.process_count", lambda: 2)
    refused(["--task terms --limit 2 --workers 0"], expected)
