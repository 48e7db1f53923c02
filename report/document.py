"""The page as a document: its head, its sections, tables, pictures, and where its numbers come from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from .markup import Html, block, picture, tag

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
SENTENCE = 24  # letters: what is longer in a cell is words, even with a number in it
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, settings: Mapping[str, object], sections: Sequence[str]) -> Html:
    """The whole document. Its policy forbids scripts and everything from elsewhere.

    Text before the first section says what the page shows, and stands above the settings.
    """
    lead, rest = [], list(sections)
    while rest and not isinstance(rest[0], Html):
        lead.append(tag("p", rest.pop(0), class_="lead"))
    parts = [tag("div", block(part), id=f"part-{i}") for i, part in enumerate(rest, start=1)]
    names = [re.search("<h2>(.*?)</h2>", part, re.DOTALL) for part in parts]
    links = [tag("li", tag("a", Html(name[1]), href=f"#part-{i}")) for i, name in enumerate(names, 1) if name]
    known = [tag("div", tag("dt", name), tag("dd", value)) for name, value in settings.items()]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    top = [tag("h1", title), *lead, tag("dl", *known, class_="settings") if known else ""]
    nav = tag("nav", tag("ul", *links), aria_label="Contents") if len(links) > 1 else ""
    document = tag("html", head, tag("body", tag("header", *top, nav), tag("main", *parts)), lang="en")
    return Html(f"<!doctype html>\n{document}\n")


def origin(command: str, seconds: float, folder: Path) -> dict[str, object]:
    """For the settings: what was run, with what and when, and links to what it wrote beside the page."""
    # Pictures of an earlier run may lie there, too. Some file systems tell the time by two seconds.
    started = time.time() - seconds - 2
    drawn = [path.name for path in folder.glob("*.png") if path.is_file() and path.stat().st_mtime >= started]
    links = [tag("li", tag("a", name, href=quote(name))) for name in ["results.json", *sorted(drawn)]]
    when = datetime.now().astimezone().isoformat(" ", "minutes")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    took = f"{when}, {seconds:.1f} s" + f", {processes} processes" * (processes > 1)
    files = tag("ul", *links, class_="files")
    return {"command": tag("code", command), "run": f"{took}; {versions()}", "files": files}


def versions() -> str:
    """Python, the libraries, and the commit of this repository; what cannot be found out is left out."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "open_clip_torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[1]
    # Named outright: git would else look upwards, and find the repository that a copy of this one lies in.
    git = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        f"--git-dir={root / '.git'}",
        "describe",
        "--always",
        "--dirty",
    ]
    try:
        said = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        said = ""
    return ", ".join([*found, *([f"commit {said}"] if said else [])])


def section(heading: str, *parts: str, note: str | Sequence[str] = ()) -> Html:
    """A heading with what belongs to it; the notes come last, in small print."""
    notes = (note,) if isinstance(note, str) else note
    last = (tag("p", words, class_="note") for words in notes if words)
    return tag("section", tag("h2", heading), *map(block, parts), *last)


def table(header: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "") -> Html:
    """Words left, numbers right. A table that is too wide scrolls in its own box."""
    rows, lines = list(rows), []
    for row in rows:
        if len(row) != len(header):
            expected = f"a row must have {len(header)} cells like the header"
            raise ValueError(f"{expected}, got {len(row)}: {list(row)!r}")
    looks = [look_of(column) for _, *column in zip(header, *rows, strict=True)]
    for row in rows:
        first, *others = zip(row, looks, strict=True)
        cells = [tag("td", cell, class_=look) for cell, look in others]
        lines.append(tag("tr", tag("th", first[0], scope="row"), *cells))
    names = (tag("th", cell, scope="col", class_=look) for cell, look in zip(header, looks, strict=True))
    top = tag("thead", tag("tr", *names))
    body = tag("tbody", *(lines or [tag("tr", tag("td", "nothing to show", colspan=len(header)))]))
    inside = tag("table", tag("caption", caption) if caption else "", top, body)
    return tag("div", inside, class_="wide", tabindex=0, role="group", aria_label=caption or "table")


def look_of(column: Sequence[object]) -> str:
    """Does a column hold words, which are read from the left and may be broken into lines, or numbers?"""
    cells = [str(cell) for cell in column]
    numbers = any(re.search(r"\d", cell) for cell in cells) and max(map(len, cells)) <= SENTENCE
    return "numbers" if numbers else "words"


def pictures(items: Sequence[tuple[Image.Image, str]], *, size: int = 128) -> Html:
    """Pictures side by side.

    Args:
        items: (picture, caption); the caption is the alternative text, too.
        size: long side on the screen, in pixels; twice that is kept, for sharp screens.
    """
    figures = []
    for i, (image, caption) in enumerate(items, start=1):
        # Hidden from those who listen: it is read out with the picture.
        words = tag("figcaption", caption, aria_hidden="true") if caption else ""
        figures.append(tag("figure", picture(image, caption or f"picture {i}", size), words))
    return tag("div", *(figures or ["nothing to show"]), class_="pictures", style=f"--size:{size}px")
