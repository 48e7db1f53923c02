"""Files that can be copied alone: each is imported and run where nothing of this repository is known, in a
folder that holds nothing else.

To add a file: a line of FILES with what has to lie beside it, and a program of the same name in PROGRAMS.
"""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# Each file, and the files that it needs beside it.
FILES = {
    "decompose.py": set(),
    "attention.py": set(),
    "blocks.py": {"decompose.py"},
    "readouts.py": {"decompose.py", "attention.py", "blocks.py"},
    "towers.py": {"decompose.py", "attention.py", "blocks.py", "readouts.py"},
    "families.py": {"decompose.py", "attention.py", "blocks.py", "readouts.py", "towers.py"},
    "huggingface.py": {
        "families.py",
        "decompose.py",
        "attention.py",
        "blocks.py",
        "readouts.py",
        "towers.py",
    },
    "neurons.py": {"decompose.py"},
    "diagnose.py": {"decompose.py"},
    "forward.py": {"decompose.py", "attention.py"},
    "rivals.py": set(),
    "textspan.py": set(),
    "cue.py": set(),
    "roles.py": {"cue.py"},
    "metrics.py": set(),
    "faithfulness.py": set(),
    "baselines.py": set(),
    "saved.py": {"decompose.py", "files.py"},
}
BESIDES_TORCH = {"saved.py": {"safetensors"}}
FLAT = {"roles.py", "saved.py"}  # what it needs beside it, it does not look for in its own package

# A small computation with a known result; `m` is the file, imported.
PROGRAMS = {
    "decompose.py": """
        import releases
        model = releases.CLIP("open_clip 2.26").double()
        images, texts = torch.randn(2, 3, 8, 12).double(), torch.randn(5, 24).double()
        terms = m.decompose(model, images)
        assert torch.allclose(terms.total(), model.encode_image(images))
        assert torch.allclose(m.token_scores(model, images, texts).sum(dim=3), terms.heads @ texts.T)
        assert m.heatmap(model, images, texts).shape == (2, 5, 2, 3)
    """,
    "attention.py": """
        layer, x = torch.nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(3, 5, 16)
        stock = torch.nn.functional.scaled_dot_product_attention
        with m.attention_calls() as calls:
            layer(x, x, x, need_weights=False)
        assert torch.nn.functional.scaled_dot_product_attention is stock
        assert torch.allclose(calls[0].attention().mean(dim=1), layer(x, x, x)[1], atol=1e-6)
    """,
    "forward.py": """
        import releases
        model, images = releases.CLIP("open_clip 2.26").double(), torch.randn(2, 3, 8, 12).double()
        values = m.class_values(model, images)
        same = m.forward_without(model, images, [(1, 0), (2, 3)], values[0])
        stock = model.encode_image(images)
        assert torch.allclose(same[0], stock[0])  # a head that is given what it gives anyway
        assert not torch.allclose(same[1], stock[1])
    """,
    "rivals.py": """
        z = torch.nn.functional.one_hot(torch.arange(60) % 3, 3).double()
        x = torch.randn(60, 5).double() + z @ torch.randn(3, 5).double()
        centred, z = x - x.mean(dim=0), z - z.mean(dim=0)
        erased = centred - centred @ m.leace(centred.T @ centred / 60, centred.T @ z / 60).T
        assert (erased.T @ z).abs().max() < 1e-10 < (centred.T @ z).abs().max()
    """,
    "blocks.py": """
        linear, inner = torch.nn.Linear(6, 4), torch.nn.LayerNorm(6)
        h = torch.randn(2, 3, 6)
        scale, bias = m.WayOut(linear, inner).scale_and_bias(h, None)
        written = h @ m.WayOut(linear, inner).maps() * scale[..., None] + bias
        assert torch.allclose(written, linear(inner(h)), atol=1e-6)
    """,
    "readouts.py": """
        norm, P, x = torch.nn.LayerNorm(8), torch.randn(8, 4), torch.randn(2, 5, 8)
        readout = m.TokenReadOut("mean of tokens", slice(None), norm, True, [(P, None)], norm.weight)
        virtual = readout.virtual_token(x)
        read = virtual.out.read(virtual.mix(x)[:, 0]) + virtual.out.shift
        assert torch.allclose(read, norm(x).mean(dim=1) @ P, atol=1e-5)
    """,
    "towers.py": """
        import importlib, releases
        blocks, readouts = (
            importlib.import_module(m.__name__.replace("towers", name)) for name in ("blocks", "readouts")
        )
        model, images = releases.CLIP("open_clip 2.26").double(), torch.randn(2, 3, 8, 12).double()
        norm, maps = model.visual.ln_post, [(model.visual.proj, None)]
        readout = readouts.TokenReadOut("class token", slice(0, 1), norm, True, maps, norm.weight)
        parts = [blocks.native_block(block) for block in model.visual.transformer.resblocks]
        family = m.family_of(model, parts, readout, 1)
        assert type(family) is m.Family
        assert torch.allclose(family.terms(images, "term").total(), model.encode_image(images))
    """,
    "families.py": """
        import releases
        model = releases.CLIP("open_clip 2.26", pool="avg").double()
        images, texts = torch.randn(2, 3, 8, 12).double(), torch.randn(5, 24).double()
        terms = m.core.decompose(model, images)
        assert terms.own is None  # not the class token, whose own part is kept
        assert torch.allclose(terms.total(), model.encode_image(images))
        assert torch.allclose(m.core.token_scores(model, images, texts).sum(dim=3), terms.heads @ texts.T)
    """,
    "huggingface.py": """
        import importlib, releases
        core = importlib.import_module(m.__name__.replace("huggingface", "decompose"))
        for siglip in (False, True):
            model, images = releases.HuggingFace(siglip).double(), torch.randn(2, 3, 8, 12).double()
            terms, texts = core.decompose(model, images), torch.randn(5, 32 if siglip else 24).double()
            assert torch.allclose(terms.total(), model.get_image_features(images))
            assert torch.allclose(core.token_scores(model, images, texts).sum(dim=3), terms.heads @ texts.T)
            assert core.heatmap(model, images, texts).shape == (2, 5, 2, 3)
    """,
    "neurons.py": """
        import releases
        model, images = releases.CLIP("open_clip 2.26").double(), torch.randn(2, 3, 8, 12).double()
        split = m.neurons(model, images, 1)
        assert torch.allclose(split.total(), m.core.decompose(model, images).mlps[:, 1])
        assert split.terms().shape == (2, 64, 24)
        assert m.second_order(model, images, 1).error() < 1e-10
        assert m.writers(model, images, -1, 2).error() < 1e-10
    """,
    "diagnose.py": """
        import importlib
        core = importlib.import_module(m.__name__.replace("diagnose", "decompose"))
        import releases
        model = releases.CLIP("open_clip 2.26")
        model.visual.transformer.resblocks[1].attn.register_forward_hook(lambda *x: (2 * x[2][0], None))
        try:
            core.decompose(model, torch.randn(2, 3, 8, 12))
        except core.DecompositionError as error:
            assert "largest gap in block 1: its heads differ from what its attention" in str(error), error
        else:
            raise AssertionError("a wrong sum was returned")
    """,
    "textspan.py": """
        rows = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]])
        span = m.textspan(m.Moments(3).update(rows), torch.eye(3), size=2)
        assert span.indices == [0, 1]
        assert torch.allclose(span.explained, torch.tensor([0.9, 0.1]).double())
        assert torch.allclose(m.reconstruct(rows, span, rows.mean(dim=0)), rows)
    """,
    "cue.py": """
        class moments:
            mean = torch.zeros(1, 2, 1).double()
            scatter = torch.full((1, 2, 1, 1), 4.0).double()
        texts = torch.eye(2)
        votes = m.CueVotes(texts, torch.ones(1, 2, 1, 2), torch.zeros(2))
        values = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])  # one head follows, one does not
        votes.update(texts[[0, 0, 1, 1]], values[:, None, :, None])
        assert torch.allclose(votes.explained(moments), torch.tensor([[1.0, 0.0]]).double())
        assert m.subspace(texts).shape == (1, 2)
    """,
    "roles.py": """
        embedding = torch.eye(12).repeat(25, 1)
        values = (embedding[:, 1:6] @ torch.tensor([1.0, -1, 2, -2, 3])).view(300, 1, 1, 1)
        values = torch.cat([values, torch.randn(300, 1, 1, 1)], dim=2)
        found = m.find_roles(values, torch.ones(1, 2, 1, 12), embedding, torch.eye(12), [*"aaaaaabbbbbb"])
        assert found.name(0, 0) == "a"
        assert found.name(0, 1) is None
    """,
    "metrics.py": """
        mask = torch.tensor([[[1, 1, 0, 0]]])
        found = m.Segmentation().update(mask.float(), mask)
        assert (found.pixel_accuracy, found.mean_iou, found.mean_ap) == (1, 1, 1)
    """,
    "faithfulness.py": """
        images, weights = torch.ones(1, 1, 10, 10), torch.arange(100.0).view(1, 1, 10, 10)
        classify = lambda x: torch.stack([(x * weights).flatten(1).sum(1), torch.full((len(x),), 2450)], 1)
        first, none = torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, 10, 10)
        found = m.curves(classify, images, weights[0], first, first, none[0], none, classify(images))
        assert found["positive"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 0]]  # without 70..99 2415 are left
        assert found["negative"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 0, 0]]  # 80..99 are 1790
        assert found["insertion"][0, :2].tolist() == [945, 1790]
    """,
    "baselines.py": """
        import releases
        model = releases.CLIP("openai").eval()
        for method in m.METHODS.values():
            maps = method(model, torch.randn(2, 3, 8, 12), torch.randn(2, 24))
            assert maps.shape == (2, 2, 3)
            assert maps.isfinite().all()
    """,
    "saved.py": """
        import releases
        model, images = releases.CLIP("open_clip 2.26"), torch.randn(5, 3, 8, 12)
        m.save_terms("terms", model, images.split(2), "abcde")
        saved = m.open_terms("terms")
        assert saved.names == [*"abcde"]
        assert torch.allclose(saved[1:4].heads, m.decompose(model, images[1:4]).heads, atol=1e-6)
        assert saved[4].error() < 1e-5
    """,
}


# One process for all, since the import of torch takes longer than all programs. It forgets what it imported
# from a folder before it goes to the next.
RUNNER = """
import contextlib, io, json, os, sys, traceback
import torch
path = list(sys.path)
for line in sys.stdin:
    folder, program = json.loads(line)
    sys.path[:] = [folder, *path]
    os.chdir(folder)
    torch.manual_seed(0)
    out, error = io.StringIO(), ""
    with contextlib.redirect_stdout(out):
        try:
            exec(program, {"__name__": "__main__", "torch": torch})
        except Exception:
            error = traceback.format_exc()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(folder):
            del sys.modules[name]
    print(json.dumps([out.getvalue(), error]), flush=True)
"""


@pytest.fixture(scope="module")
def python():
    command = [sys.executable, "-I", "-c", RUNNER]  # -I: neither the current folder nor PYTHONPATH
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(python, tmp_path):
    """Runs the program of a file, or another, in a folder that holds it, what it needs, and nothing else."""

    def run(file, package=False, beside=(), program=None):
        home = tmp_path / "vendored" if package else tmp_path
        home.mkdir(exist_ok=True)
        if package:
            (home / "__init__.py").touch()
        for name in (file, *beside):
            shutil.copy(ROOT / name, home)
        shutil.copy(ROOT / "tests" / "releases.py", tmp_path)
        lines = [
            f"import {'vendored.' * package}{Path(file).stem} as m",
            *(line[8:] for line in (program or PROGRAMS[file]).splitlines()),
            "import os, sys",
            "files = [str(getattr(module, '__file__', '')) for module in sys.modules.values()]",
            # Nothing of the repository itself; a virtual environment may well lie in it.
            f"assert not {{{str(ROOT)!r}, {str(ROOT / 'tests')!r}}} & {{*map(os.path.dirname, files)}}",
            "assert 'open_clip' not in sys.modules",
            "print('ran')",
        ]
        python.stdin.write(json.dumps([str(tmp_path), "\n".join(lines)]) + "\n")
        python.stdin.flush()
        return Ran(*json.loads(python.stdout.readline()))

    return run


class Ran(NamedTuple):
    stdout: str
    error: str  # the traceback


def ran(result):
    assert result.error == "", result.error
    return result.stdout == "ran\n"


@pytest.mark.slow
@pytest.mark.parametrize("file", PROGRAMS)
def test_a_copied_file_runs(run, file):
    assert ran(run(file, beside=FILES[file]))


@pytest.mark.parametrize("file", [file for file in PROGRAMS if file not in FLAT])
def test_a_copied_file_runs_inside_a_package(run, file):
    assert ran(run(file, package=True, beside=FILES[file]))


in_a_package_or_not = pytest.mark.parametrize("package", [False, True])


@in_a_package_or_not
def test_a_file_without_the_sibling_that_it_imports_would_be_noticed(run, package):
    result = run("roles.py", package=package, beside=FILES["roles.py"] if package else ())
    assert "ModuleNotFoundError: No module named 'cue'" in result.error


def test_a_wrong_result_would_be_noticed(run, monkeypatch):
    monkeypatch.setitem(PROGRAMS, "metrics.py", PROGRAMS["metrics.py"].replace("(1, 1, 1)", "(1, 1, 0)"))
    assert "AssertionError" in run("metrics.py").error


# What decompose.py does without the files that may lie beside it.

AVERAGED = """
        import releases
        model, images = releases.CLIP("open_clip 2.26", pool="avg"), torch.randn(2, 3, 8, 12)
        for call in (m.decompose, m.check, lambda *x: m.heatmap(*x, torch.randn(5, 24))):
            try:
                call(model, images)
            except m.DecompositionError as error:
                print(error)
            else:
                raise AssertionError("it was taken for a class token")
"""


@in_a_package_or_not
def test_without_families_another_read_out_is_refused_and_told_which_file_to_add(run, package):
    result = run("decompose.py", package, program=AVERAGED)
    assert result.error == "", result.error
    *refusals, last = result.stdout.splitlines()
    assert len(refusals) == 3
    for line in refusals:
        assert line.startswith("cannot decompose CLIP: its `visual` is not CLIP's class-token ViT")
        assert "families.py" in line
        assert "beside decompose.py" in line
    assert last == "ran"


@in_a_package_or_not
def test_families_without_attention_is_told_which_file_to_add(run, package):
    result = run("decompose.py", package, beside=["families.py"], program=AVERAGED)
    assert "attention.py" in result.stdout + result.error


@in_a_package_or_not
def test_with_families_the_same_model_is_taken(run, package):
    result = run("decompose.py", package, FILES["families.py"] | {"families.py"}, program=AVERAGED)
    assert "AssertionError: it was taken" in result.error


ALTERED = """
        import releases
        model = releases.CLIP("open_clip 2.26")
        model.visual.transformer.resblocks[1].attn.register_forward_hook(lambda *x: (2 * x[2][0], None))
        try:
            m.decompose(model, torch.randn(2, 3, 8, 12))
        except m.DecompositionError as error:
            print(error)
"""


@in_a_package_or_not
@pytest.mark.parametrize("beside", [["diagnose.py"], []])
def test_a_wrong_sum_is_told_with_the_block_or_without(run, package, beside):
    lines = run("decompose.py", package, beside, program=ALTERED).stdout.splitlines()
    assert lines[1:] == ["ran"]
    assert lines[0].startswith("the terms do not sum to the embedding: relative error")
    assert lines[0].endswith("see diagnose.py") == (not beside)
    assert ("block 1" in lines[0]) == bool(beside)


# What they import.


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(("file", "beside"), FILES.items())
def test_the_core_imports_torch_alone(file, beside):
    known = {"torch", *(Path(name).stem for name in beside), *BESIDES_TORCH.get(file, ())}
    assert set(imported(ROOT / file)) - set(sys.stdlib_module_names) <= known


def test_the_check_sees_other_imports():
    assert "open_clip" in set(imported(ROOT / "zeroshot.py"))


@pytest.mark.parametrize("file", PROGRAMS)
def test_a_file_to_copy_names_its_licence_and_whose_it_is(file):
    licence, _, holder = (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()[:3]
    head, _, code = (ROOT / file).read_text(encoding="utf-8").partition("\nfrom __future__")
    assert code
    assert f"{licence.split()[0]} licence, " in head  # MIT
    assert holder.removeprefix("Copyright (c) ") in head
