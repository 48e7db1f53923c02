"""The README keeps its promises: its code prints what it says, its links lead somewhere, and it is short."""

import ast
import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """(language, content) of every fenced block, in order."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def links(page):
    """The targets of all links and pictures outside code."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose))


def anchors(page):
    """The anchors that GitHub makes of the headings."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page):
    """Links within the repository whose file or anchor does not exist."""
    broken = []
    for link in links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.slow
def test_the_first_python_block_prints_the_block_beneath_it():
    (_, code), (_, printed) = blocks(README)[:2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_import_what_exists(page):
    for language, code in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (
                node.module != "transformers" or find_spec("transformers")
            ):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title, here\n[a](page.md#a-title-here) [b](page.md#b) [c](c.md)\n```\n[d](d.md)\n```\n"
    )
    assert broken_links(page) == ["page.md#b", "c.md"]


def test_every_page_in_docs_is_listed_in_the_readme():
    listed = links(README)
    assert [page.name for page in PAGES[1:] if page.relative_to(ROOT).as_posix() not in listed] == []


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("command", ["evaluate.py --task waterbirds", "-m pytest -q"])
def test_each_of_the_two_commands_is_there_once(command):
    start = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && .venv/bin/python "
    lines = README.read_text(encoding="utf-8").splitlines()
    assert lines.count(start + command) == 1
    assert len([line for line in lines if line.startswith("python3 -m venv")]) == 2


def test_the_slow_tests_have_a_line_of_their_own():
    commands = [line.partition("  #")[0] for line in README.read_text(encoding="utf-8").splitlines()]
    assert commands.count(".venv/bin/python -m pytest -q -m slow") == 1
