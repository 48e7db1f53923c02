"""The page that every task leaves: there, whole, of its own numbers, and safe."""

import json
import re
from html.parser import HTMLParser

import pytest

from demo.images import DemoBirds
from evaluate import main

QUICK = ["--limit", "40", "--workers", "0"]
TASKS = {
    "check": QUICK,
    "textspan": QUICK,
    "waterbirds": [*QUICK, "--limit", "160", "--draws", "5"],
    "debias": [*QUICK, "--draws", "5"],
    "segmentation": [*QUICK, "--methods", "decomposition", "rollout"],
    "faithfulness": ["--limit", "4", "--workers", "0", "--methods", "rollout"],
    "ablation": QUICK,
    "completeness": QUICK,
    "retrieval": [*QUICK, "--head", "3.4", "--text", "a bird at night", "--top", "3"],
    "heatmap": ["--text", "a duck", "--methods", "decomposition"],
}
VOID = {"meta", "img", "link", "br", "hr", "input", "path", "line", "rect", "circle", "use"}


class Balanced(HTMLParser):
    """Collects ids, links and images, and complains about tags that do not match."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.alts, self.scripts = [], [], [], [], 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.scripts += tag == "script"
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.alts += [attributes.get("alt")] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def visit(path):
    parser = Balanced()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """All tasks run once, with an image whose name is markup."""
    out = tmp_path_factory.mktemp("run")
    picture = out / "<b>duck & 'co'.png"
    DemoBirds("val", lambda image: image).picture(3).save(picture)
    for task, argv in TASKS.items():
        more = ["--image", str(picture)] if task == "heatmap" else []
        assert main(["--task", task, *argv, *more, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_page_is_whole_and_needs_nothing_else(pages, task):
    page = visit(pages / task / "report.html")
    assert page.scripts == 0
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(set(page.ids)) == len(page.ids)
    assert all(page.alts)
    assert not re.search(
        r"https?://(?!www\.w3\.org/)", (pages / task / "report.html").read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_page_says_where_its_numbers_come_from(pages, task):
    page = (pages / task / "report.html").read_text(encoding="utf-8")
    settings = json.loads((pages / task / "results.json").read_text())["settings"]
    assert settings["model"] in page
    assert settings.keys() >= {"model", "seed"}


def test_names_from_outside_are_text_on_the_page(pages):
    page = (pages / "heatmap" / "report.html").read_text(encoding="utf-8")
    assert "<b>duck" not in page
    assert "&lt;b&gt;duck &amp; " in page


def test_the_numbers_on_the_page_are_those_of_the_table(pages):
    results = json.loads((pages / "waterbirds" / "results.json").read_text())
    page = (pages / "waterbirds" / "report.html").read_text(encoding="utf-8")
    for row in results["rows"].values():
        assert f">{100 * row['worst']:.1f}<" in page
    results = json.loads((pages / "segmentation" / "results.json").read_text())
    page = (pages / "segmentation" / "report.html").read_text(encoding="utf-8")
    for row in results["rows"].values():
        assert f">{100 * row['mIoU']:.1f}<" in page


def test_the_sum_is_checked_at_every_run(pages):
    for task in ("textspan", "waterbirds", "debias", "ablation", "completeness"):
        said = json.loads((pages / task / "results.json").read_text())["settings"]["sum"]
        assert 0 < float(re.search(r"within (\S+) ", said)[1]) < 1e-5


def test_a_page_that_cannot_be_written_leaves_the_old_one(pages, tmp_path, monkeypatch, capsys):
    import report

    old = tmp_path / "check" / "report.html"
    old.parent.mkdir()
    old.write_text("earlier page")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "page", full)
    assert main(["--task", "check", *QUICK, "--out", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert old.read_text() == "earlier page"
