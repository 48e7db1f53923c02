"""The page that every task leaves: there, whole, of its own numbers, and safe."""

import contextlib
import html
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from data import Waterbirds
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
    "neurons": QUICK,
    "terms": QUICK,
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
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(["--task", task, *argv, *more, "--out", str(out)]) == 0
        (out / f"{task}.txt").write_text(printed.getvalue(), encoding="utf-8")
    return out


def words_of(page: Path) -> str:
    """What a reader of the page reads, on one line."""
    text = re.sub("<style>.*?</style>|<svg.*?</svg>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return in_one_line(html.unescape(re.sub("<[^>]*>", " ", text)))


def in_one_line(text: str) -> str:
    return " ".join(re.sub(r":? +", " ", text).split())


def notes(printed: str) -> list[str]:
    """The lines that a task prints below its settings and outside tables."""
    blocks = [block for block in printed.split("\n\n")[1:] if not block.startswith("neuron ")]
    texts = [block for block in blocks if not re.fullmatch("-+", (block.split("\n") * 2)[1])]
    return [line for block in texts for line in block.strip().split("\n") if "report.html" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_page_is_whole_and_needs_nothing_else(pages, task):
    page = visit(pages / task / "report.html")
    assert page.scripts == 0
    within = [link[1:] for link in page.links if link.startswith("#")]
    beside = [unquote(link) for link in page.links if not link.startswith("#")]
    assert set(within) <= set(page.ids)
    found = {path.name for path in (pages / task).iterdir()} - {"report.html"}
    assert set(beside) == found  # all that the task wrote, and nothing else
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


@pytest.mark.parametrize("task", TASKS)
def test_the_page_begins_with_what_it_shows_and_the_command_as_typed(pages, task):
    page = (pages / task / "report.html").read_text(encoding="utf-8")
    lead = re.search('</h1><p class="lead">(.*?)</p><dl ', page)[1]
    assert len(lead.split()) > 8
    assert lead[-1] in ".?"
    command = shlex.split(html.unescape(re.search("<code>(.*?)</code>", page)[1]))
    assert command[:4] == ["python", "evaluate.py", "--task", task]
    assert command[4 : 4 + len(TASKS[task])] == TASKS[task]
    assert command[-2:] == ["--out", str(pages)]


def test_the_pages_do_not_begin_alike(pages):
    leads = {task: words_of(pages / task / "report.html").split("command")[0] for task in TASKS}
    assert len({lead.partition("demo-vit")[2] for lead in leads.values()}) == len(TASKS)


@pytest.mark.parametrize(
    "task", ["waterbirds", "debias", "segmentation", "ablation", "completeness", "neurons"]
)
def test_every_note_that_is_printed_stands_on_the_page(pages, task):
    found = notes((pages / f"{task}.txt").read_text(encoding="utf-8"))
    page = words_of(pages / task / "report.html")
    assert found
    assert [line for line in found if in_one_line(line) not in page] == []


def test_notes_are_told_from_tables_and_settings():
    printed = "model: a\n\n%  b\n----\nc  1\n\nA note:  2.\nAnother.\n\n3 s; a page: report.html\n"
    assert notes(printed) == ["A note:  2.", "Another."]
    assert in_one_line("A note:  2.") == "A note 2."


def test_random_rows_stand_below_the_others(pages):
    page = words_of(pages / "waterbirds" / "report.html")
    control = json.loads((pages / "waterbirds" / "results.json").read_text())["random"]
    assert f"random heads, mean ± std {100 * control['worst']['mean']:.1f} ±" in page
    assert f"random heads, best {100 * control['worst']['max']:.1f} " in page


def test_a_picture_of_each_group(pages):
    page = visit(pages / "waterbirds" / "report.html")
    assert [alt.partition(":")[0] for alt in page.alts] == list(Waterbirds.groups)
    data = DemoBirds("test", lambda image: image, 160)
    for alt in page.alts:
        group, _, caption = alt.partition(": ")
        members = 2 * data.y + data.place == Waterbirds.groups.index(group)
        assert caption == data.caption(int(members.nonzero()[0]))


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
