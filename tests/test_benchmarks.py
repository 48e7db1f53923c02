"""Every benchmark runs on small inputs, so the figures in the docs can be made again."""

import importlib
import json
import sys

import pytest
from runs import words

import demo
from benchmarks import cue_study, decompose, scale
from demo.images import DemoBirds

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def little(monkeypatch):
    for split in DemoBirds.sizes:
        monkeypatch.setitem(DemoBirds.sizes, split, 200)


def run(name, monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *words(*argv)])
    importlib.import_module(f"benchmarks.{name}").main()
    return capsys.readouterr().out


def test_textspan(monkeypatch, capsys):
    small = "--heads 2 --images 60 --texts 40 --size 3 --dim 16 --head-width 8 --rounds 1"
    assert "the same picks in 1 of 1" in run("textspan", monkeypatch, capsys, small)


def test_tasks(monkeypatch, capsys):
    out = run("tasks", monkeypatch, capsys, "--model ViT-S-32-alt --batch-size 2 --rounds 1")
    assert all(
        f"  {task}" in out
        for task in ("textspan", "waterbirds", "debias", "completeness", "retrieval", "neurons", "ablation")
    )


def test_decompose(monkeypatch, capsys):
    monkeypatch.setattr(
        decompose, "JOBS", {job: decompose.JOBS[job] for job in ("encode_image", "decompose")}
    )
    out = run("decompose", monkeypatch, capsys, "--models ViT-S-32-alt --batch-size 1 --rounds 1")
    assert "  decompose     time x" in out
    assert "peak memory x" in out


def test_baselines(monkeypatch, capsys):
    out = run("baselines", monkeypatch, capsys, "--models ViT-S-32-alt --batch-size 1 --rounds 1")
    assert "grad-eclip" in out


def test_cue_rules(monkeypatch, capsys):
    """The table in docs/cue.md is of the whole splits."""
    out = run("cue_rules", monkeypatch, capsys)
    assert all(
        f"\n{rule}" in out
        for rule in ("base", "pseudo-labels explain > 0.3 (auto)", "the truth (looks at labels)")
    )


def test_cue_study(monkeypatch, capsys):
    """One model is measured, and the figures that were kept are the tables of docs/cue.md."""
    rows = cue_study.study(demo.FOLDER / f"{demo.NAME}.safetensors", "val")
    kept = json.loads(cue_study.FIGURES.read_text())["figures"]
    assert all(set(model) == set(rows) for models in kept.values() for model in models.values())
    assert rows["directions everywhere"]["worst"] > rows["base"]["worst"]
    out = run("cue_study", monkeypatch, capsys, "--show")
    page = (cue_study.FIGURES.parent.parent / "docs" / "cue.md").read_text()
    assert next(line for line in out.splitlines() if line.startswith("directions everywhere")) in page
    assert out.strip() in page


def test_map_variants(monkeypatch, capsys):
    assert "true share over half" in run("map_variants", monkeypatch, capsys, "--limit 40")


def test_scale():
    assert scale.measure("check", "bare", 20)["images"] == 20
