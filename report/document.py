"""A page as a document: elements that cannot break, sections, tables, pictures, and where it comes from."""

from __future__ import annotations

import base64
import io
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from numbers import Integral, Real
from pathlib import Path
from urllib.parse import quote

from PIL import Image

MISSING = "\u2013"
MANY = 8  # links to files; what is more is to be opened
KEPT = (".png", ".npz", ".safetensors")  # endings of the files beside a page that it links to
SENTENCE = 24  # letters: what is longer in a cell is words, even with a number in it
STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Markup made here."""


def page(title: str, settings: Mapping[str, object], sections: Sequence[str]) -> Html:
    """The whole document. Its policy forbids scripts and everything from elsewhere.

    What is no section, but text, says what the page shows, and stands above the settings.
    """
    lead = [tag("p", part, class_="lead") for part in sections if not isinstance(part, Html)]
    sections = [part for part in sections if isinstance(part, Html)]
    parts = [tag("div", part, id=f"part-{i}") for i, part in enumerate(sections, start=1)]
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
        cells = [tag("td", *in_two(cell), class_=look) for cell, look in others]
        lines.append(tag("tr", tag("th", tag("span", first[0]), scope="row"), *cells))
    names = (tag("th", cell, scope="col", class_=look) for cell, look in zip(header, looks, strict=True))
    top = tag("thead", tag("tr", *names))
    body = tag("tbody", *(lines or [tag("tr", tag("td", "nothing to show", colspan=len(header)))]))
    inside = tag("table", tag("caption", caption) if caption else "", top, body)
    return tag("div", inside, class_="wide", tabindex=0, role="group", aria_label=caption or "table")


def in_two(cell: object) -> tuple[object, ...]:
    """A value and, in small print, its interval or spread, as in 54.8 [51.8, 58.6]; or the cell as it is."""
    found = re.fullmatch(r"(-?[\d.]+)( (\[|±).*)", cell) if isinstance(cell, str) else None
    return (found[1], tag("small", found[2])) if found else (cell,)


def look_of(column: Sequence[object]) -> str:
    """Does a column hold words, which are read from the left and may be broken into lines, or numbers?"""
    cells = [str(cell) for cell in column]
    numbers = any(re.match(r"[-+±]?[\d.]", cell) for cell in cells) and max(map(len, cells)) <= SENTENCE
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


def origin(command: str, seconds: float, folder: Path) -> dict[str, object]:
    """For the settings: what was run, with what and when, and links to what it wrote beside the page."""
    # Pictures of an earlier run may lie there, too. Some file systems tell the time by two seconds.
    started = time.time() - seconds - 2
    kept = [path for path in folder.glob("*") if path.suffix in KEPT and path.is_file()]
    made = sorted(path.name for path in kept if path.stat().st_mtime >= started)
    links = [tag("li", tag("a", name, href=quote(name))) for name in ["results.json", *made]]
    loaded = [name for name in ("torch", "open_clip") if name in sys.modules]
    versions = [f"{name} {getattr(sys.modules[name], '__version__', '')}" for name in loaded]
    run = [datetime.now().astimezone().isoformat(" ", "minutes"), f"{seconds:.1f} s"]
    run += [f"Python {platform.python_version()}", *versions, commit()]
    shown, rest = tag("ul", *links[:MANY], class_="files"), tag("ul", *links[MANY:], class_="files")
    more = tag("details", tag("summary", f"{len(links) - MANY} more"), rest) if links[MANY:] else ""
    files = Html(shown + more)
    return {"command": tag("code", command), "run": ", ".join(filter(None, run)), "files": files}


def commit() -> str:
    """The commit of this repository; "" where it is none, or has no git."""
    root = Path(__file__).resolve().parents[1]
    # Named outright: git would else look upwards, and find a repository that this one was copied into.
    git = ["git", "--no-optional-locks", "--git-dir=.git", "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(git, cwd=root, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        said = ""
    return said and f"commit {said}"


def tag(name: str, /, *inside: object, **attributes: object) -> Html:
    """An element; what is not Html is escaped. class_ stands for class, stroke_width for stroke-width."""
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    marks = "".join(f' {key}="{clean(value)}"' for key, value in named.items() if value is not None)
    words = "".join(item if isinstance(item, Html) else shown(item) for item in inside)
    return Html(f"<{name}{marks}>{words}" + f"</{name}>" * (name not in ("meta", "img")))


def block(part: str) -> str:
    """Html as it is; text as a paragraph."""
    return part if isinstance(part, Html) or not part else tag("p", part)


def clean(value: object) -> str:
    """Escaped, and without the characters that no document may hold."""
    return escape(re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value)))


def shown(value: object) -> str:
    """Numbers with up to four digits, a dash for one that is missing; text, escaped."""
    if value is None or (isinstance(value, Real) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return clean(value)


def known(*values: float | None) -> bool:
    """Can they be drawn?"""
    return all(isinstance(value, Real) and abs(value) < 1e30 for value in values)


def thumbnail(image: Image.Image, size: int = 128) -> Image.Image:
    """The image, made as small as `pictures` keeps it: for whoever holds many."""
    image.thumbnail((2 * size, 2 * size))
    return image


def picture(image: Image.Image, alt: str, size: int) -> Html:
    """The picture, kept no larger than needed; as PNG where it is small and every pixel counts."""
    flat = thumbnail(image.convert("RGB"), size)
    long, kind, data = max(flat.size), "PNG" if max(flat.size) <= 96 else "JPEG", io.BytesIO()
    flat.save(data, kind, quality=82, optimize=True)
    scale = size / long if long > size else 2 * size // long / 2  # in halves: pixels stay square
    width, height = (max(1, round(side * scale)) for side in flat.size)
    link = f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
    return tag("img", src=link, alt=alt, width=width, height=height, class_="pixels" if scale > 1 else None)
