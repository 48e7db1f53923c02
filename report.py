"""A page of results in one file: tables, charts and pictures that need no network and no script.

    accuracy = section("Accuracy", "In percent.", table(["", "worst"], [["base", 54.8]]))
    page("Heads of ViT-L-14", {"seed": "0"}, [accuracy])

Every function returns Html. Any other string is text: it is escaped, and a paragraph of its own where markup
could stand. None, NaN and infinity are shown as a dash and never drawn. No colour stands alone: letters,
dashes and shapes go with it.
"""

from __future__ import annotations

import base64
import io
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate, pairwise
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from unicodedata import east_asian_width

from PIL import Image

TONES = 12  # of report.css
MISSING = "\u2013"
DASHES = ("none", "8 3", "2 2.5", "9 3 2 3", "4 3", "14 4", "1 3", "9 3 2 3 2 3")
MARKERS = (  # disc, square, triangle, diamond, triangle upside down, plus, hourglass, flat bar
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0Z",
    "M-3.3-3.3h6.6v6.6h-6.6Z",
    "M0-4.5 4.4 3.3h-8.8Z",
    "M0-5 4.2 0 0 5-4.2 0Z",
    "M0 4.5 4.4-3.3h-8.8Z",
    "M-1.4-4.6h2.8v3.2h3.2v2.8h-3.2v3.2h-2.8v-3.2h-3.2v-2.8h3.2Z",
    "M-3.6-4h7.2L-3.6 4h7.2Z",
    "M-5-2h10v4h-10Z",
)
WIDTH, LETTER = 400, 7.2  # of a drawing and a wide letter; on a phone a unit is a little less than a pixel
STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Markup made here."""


@dataclass(frozen=True)
class Head:
    """What is shown of one attention head. Shares are of its variance, 0 to 1."""

    layer: int
    head: int
    role: str = ""  # "": none
    role_share: float | None = None
    categories: Mapping[str, float] = field(default_factory=dict)  # share of each, in this order
    texts: Sequence[tuple[str, float]] = ()  # with the share that each explains
    spread: float | None = None  # its variance over the embedding's
    remainder: float | None = None  # share that no text explains
    images: Sequence[Image.Image] = ()  # where it writes most


def page(title: str, settings: Mapping[str, object], sections: Sequence[str]) -> Html:
    """The whole document. Its policy forbids scripts and everything from elsewhere."""
    parts = [tag("div", block(part), id=f"part-{i}") for i, part in enumerate(sections, start=1)]
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
    top = [tag("h1", title), tag("dl", *known, class_="settings") if known else ""]
    nav = tag("nav", tag("ul", *links), aria_label="Contents") if len(links) > 2 else ""
    document = tag("html", head, tag("body", tag("header", *top, nav), tag("main", *parts)), lang="en")
    return Html(f"<!doctype html>\n{document}\n")


def section(heading: str, *parts: str, note: str = "") -> Html:
    """A heading with what belongs to it; the note comes last, in small print."""
    last = tag("p", note, class_="note") if note else ""
    return tag("section", tag("h2", heading), *map(block, parts), last)


def table(header: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "") -> Html:
    """First column left, others right. A table that is too wide scrolls in its own box."""
    lines = []
    for row in rows:
        if len(row) != len(header):
            expected = f"a row must have {len(header)} cells like the header"
            raise ValueError(f"{expected}, got {len(row)}: {list(row)!r}")
        cells = (tag("td", cell) if i else tag("th", cell, scope="row") for i, cell in enumerate(row))
        lines.append(tag("tr", *cells))
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header)))
    body = tag("tbody", *(lines or [tag("tr", tag("td", "nothing to show", colspan=len(header)))]))
    inside = tag("table", tag("caption", caption) if caption else "", top, body)
    return tag("div", inside, class_="wide", tabindex=0, role="group", aria_label=caption or "table")


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


def head_grid(heads: Sequence[Head]) -> Html:
    """A cell for each head in rows of layers, coloured and lettered by role, with a bar for the role's share.

    Below follows a card for each head with all else that is known of it. A page holds one grid.
    """
    there = {(head.layer, head.head): head for head in heads}
    if len(there) < len(heads):
        raise ValueError(f"heads must differ ({len(there)} of {len(heads)} do)")
    roles = Counter(head.role for head in heads if head.role)
    marks = letters([role for role, _ in roles.most_common()])
    looks = {role: (tone(i), mark) for i, (role, mark) in enumerate(marks.items())}
    looks[""], roles[""] = ("--c:var(--soft)", MISSING), sum(not head.role for head in heads)
    legend = []
    for role, (style, mark) in looks.items():
        words = [tag("i", mark, class_="mark"), f" {role or 'no role'} ", tag("small", roles[role])]
        legend += [tag("li", *words, style=style)] * bool(roles[role])
    more = any(head.categories or head.texts or head.images or known(head.spread) for head in heads)
    cells, across = [], max((head.head for head in heads), default=0) + 1
    for layer in sorted({head.layer for head in heads}):
        cells.append(tag("span", layer, class_="layer", title=f"layer {layer}"))
        row = [there.get((layer, i)) for i in range(across)]
        cells += [cell(head, looks, more) if head else tag("span") for head in row]
    told = {"role": "group", "aria_label": "Heads in rows of layers"}
    grid = tag("div", *cells, class_="heads", **told, style=f"--across:{across}")
    cards = [card(head, looks) for _, head in sorted(there.items())] if more else []
    box = tag("div", grid, class_="wide", id="head-grid", tabindex=0)
    return Html(tag("ul", *legend, class_="legend") + box + tag("div", *cards, class_="cards"))


def cell(head: Head, looks: dict, has_card: bool) -> Html:
    """The square of one head; a link to its card where it has one."""
    style, mark = looks[head.role]
    name, role, share = f"{head.layer}.{head.head}", head.role or "no role", percent(head.role_share)
    top = [tag("b", name), " ", tag("i", mark, class_="mark"), " "]
    words = [*top, tag("span", role), " ", tag("small", share), bar(head.role_share)]
    link = f"#head-{head.layer}-{head.head}" if has_card else None
    title = f"head {name}: {role}, {share}"
    return tag("a" if has_card else "div", *words, class_="cell", style=style, href=link, title=title)


def card(head: Head, looks: dict) -> Html:
    """All that is known of one head."""
    style, mark = looks[head.role]
    name, role = f"{head.layer}.{head.head}", f"{head.role or 'no role'} {percent(head.role_share)}"
    known_facts = {"spread": head.spread, "unexplained": head.remainder}
    facts = [tag("span", f"{key} ", tag("b", percent(share))) for key, share in known_facts.items()]
    kinds = []
    for kind, share in head.categories.items():
        style_of_kind, _ = looks.get(kind, looks[""])
        kinds.append(tag("li", kind, " ", tag("b", percent(share)), bar(share), style=style_of_kind))
    texts = [tag("li", text, " ", tag("b", percent(share))) for text, share in head.texts]
    told = f"head {name} writes much: image"
    strip = [picture(image, f"{told} {i}", 96) for i, image in enumerate(head.images, 1)]
    parts = [
        tag("h3", tag("i", mark, class_="mark"), f" Head {name} ", tag("small", role)),
        tag("p", *facts, class_="facts"),
        folded(kinds, "kinds"),
        folded(texts, "texts"),
        tag("div", *strip, class_="strip"),
        tag("a", "↑ grid", href="#head-grid", aria_label=f"from head {name} to the ↑ grid"),
    ]
    return tag("article", *parts, class_="card", id=f"head-{head.layer}-{head.head}", style=style)


def folded(items: list[Html], name: str, first: int = 5) -> Html:
    """A list of which all but the first are to be opened."""
    summary = tag("summary", f"{len(items) - first} more")
    rest = tag("details", summary, tag("ul", *items[first:], class_=name))
    return Html(tag("ul", *items[:first], class_=name) * bool(items) + rest * (len(items) > first))


Points = Sequence[tuple[float, ...]]
Series = Mapping[str, Points]
Lines = Mapping[str, float]  # names and values to compare with
NO_LINES: Lines = MappingProxyType({})


def curves(series: Series, x_label: str, y_label: str, title: str, lines: Lines = NO_LINES) -> Html:
    """Lines through (x, y), broken where one of them is missing; `lines` are values of y."""
    lines = present(lines)
    dots = [point for points in series.values() for point in points if known(*point)]
    if not dots:
        return chart(title, "", 0, [])
    y = Axis([*(y for _, y in dots), *lines.values()], 216, 26)
    x = Axis([x for x, _ in dots], y.room + 8, WIDTH - 16, about=6)
    drawn, legend, rows = grid(x, 26, 216, x_label, y, y_label), [], []
    for i, (name, points) in enumerate(series.items()):
        drawn.append(curve(i, name, points, x, y))
        sample = [tag("path", d="M0 6H40", stroke_dasharray=dashes(i), class_="line"), marker(i, 20, 6)]
        key = tag("svg", *sample, viewBox="0 0 40 12", aria_hidden="true", style=tone(i))
        legend.append(tag("li", key, name))
        rows += [[name, *point] for point in points if known(*point)]
    floor = 24
    for name, value in sorted(lines.items(), key=lambda item: -item[1]):
        above, below = y(value) - 4, y(value) + 13
        floor = above if above >= floor + 14 else max(floor + 14, below)  # below where another one is near
        drawn.append(tag("path", d=f"M{x.start} {y(value)}H{x.end}", class_="flag"))
        drawn.append(text(x.end, floor, f"{name} {y.tell(value, 1)}", "end", x.end - x.start))
    told = f"{y_label} against {x_label}: {', '.join(series)}. {len(dots)} points, "
    told += f"{y_label} from {y.low:.4g} to {y.high:.4g}."
    data = table(["", x_label, y_label], rows)
    return chart(title, told, 258, drawn, data, tag("ul", *legend, class_="legend"))


def curve(i: int, name: str, points: Points, x: Axis, y: Axis) -> Html:
    """One series: its line, lifted where a point is missing, and markers at some of its points."""
    outline, pen = "", "M"
    for point in points:
        outline += f"{pen}{x(point[0])} {y(point[1])}" if known(*point) else ""
        pen = "L" if known(*point) else "M"
    parts = [tag("path", d=outline, stroke_dasharray=dashes(i), class_="line")]
    at = [point for point in points if known(*point)]
    for a, b in at[:: math.ceil(len(at) / 14) or 1]:
        parts.append(marker(i, x(a), y(b), f"{name}: {x.tell(a, 2)}, {y.tell(b, 2)}"))
    return tag("g", *parts, style=tone(i))


def intervals(groups: Mapping[str, Sequence], title: str, x_label: str) -> Html:
    """Dots with whiskers, a line of text over each.

    Args:
        groups: from a name ("" for none) to rows (label, value, low, high); rows of one label look alike.
    """
    rows = [(group, *row) for group, members in groups.items() for row in members]
    values = [value for row in rows for value in row[2:] if known(value)]
    if not values:
        return chart(title, "", 0, [])
    x = Axis(values, 12, WIDTH - 12, about=6)
    drawn, down, last = [], 8, ""
    looks = {name: i for i, name in enumerate(dict.fromkeys(row[1] for row in rows))}
    for group, name, value, low, high in rows:
        if group != last:
            drawn.append(text(0, down + 16, group, class_="strong"))
            down, last = down + 22, group
        numbers, whisker, dot = x.tell(value, 1), "", ""
        if known(low, high):
            numbers += f" [{x.tell(low, 1)}, {x.tell(high, 1)}]"
            whisker = tag("path", d=f"M{x(low)} {down + 18}v8m0-4H{x(high)}m0-4v8", class_="whisker")
        if known(value):
            dot = marker(looks[name], x(value), down + 22, f"{group} {name}: {numbers}")
        drawn.append(text(20, down + 12, name, room=WIDTH - 40 - LETTER * len(numbers)))
        drawn.append(text(WIDTH - 12, down + 12, numbers, "end"))
        drawn.append(tag("g", whisker, dot, style=tone(looks[name])))
        down += 32
    skip = 0 if any(groups) else 1  # the column of groups without names
    data = table(["group", "", x_label, "low", "high"][skip:], [row[skip:] for row in rows])
    told = f"{x_label}: a dot with its interval for each of {len(rows)} rows."
    return chart(title, told, down + 46, grid(x, 8, down + 4, x_label) + drawn, data)


def histogram(values: Iterable[float], marks: Mapping[str, float], title: str, x_label: str) -> Html:
    """How many of the values lie where; marks: from names to values, as upright lines."""
    given, marks = list(values), present(marks)
    values = [value for value in given if known(value)]
    if not values:
        return chart(title, "", 0, [])
    edges = Axis(values, 0, 1, about=min(24, 5 + math.isqrt(len(values)))).ticks
    # An edge belongs to the bar after it.
    held = Counter(min(max(bisect_right(edges, value), 1), len(edges) - 1) for value in values)
    top = 26 + 16 * len(marks)
    y = Axis([0, max(4, *held.values())], top + 150, top, about=4)
    x = Axis([edges[0], edges[-1], *marks.values()], y.room + 8, WIDTH - 16, about=6)
    bars, rows = [], []
    for i, (low, high) in enumerate(pairwise(edges), start=1):
        rows.append((f"{x.tell(low, 1)} to {x.tell(high, 1)}", held[i]))
        outline = f"M{x(low)} {y.start}V{y(held[i])}H{x(high)}V{y.start}Z"
        bars.append(tag("path", tag("title", f"{rows[-1][0]}: {held[i]}"), d=outline, class_="column"))
    drawn = grid(x, top, y.start, x_label, y, "count") + bars + flags(marks, x, y.start)
    told = f"{len(values)} of {len(given)} values of {x_label}, from {min(values):.4g} to {max(values):.4g}."
    rows += [(f"{name}: {x.tell(value, 1)}", "") for name, value in marks.items()]
    data = table([x_label, "count"], rows)
    return chart(title, told, y.start + 42, drawn, data)


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


def percent(share: float | None) -> str:
    """A whole percentage, with one decimal where it is small."""
    return f"{share:.{int(0 < abs(share) < 0.095)}%}" if known(share) else MISSING


def known(*values: float | None) -> bool:
    """Can they be drawn?"""
    return all(isinstance(value, Real) and abs(value) < 1e30 for value in values)


def present(lines: Lines) -> dict[str, float]:
    """The lines that can be drawn."""
    return {name: value for name, value in lines.items() if known(value)}


def bar(share: float | None) -> Html:
    """A bar as long as the share."""
    return tag("span", class_="bar", style=f"--w:{100 * min(1, max(0, share)) if known(share) else 0:.1f}%")


def letters(roles: Sequence[str]) -> dict[str, str]:
    """Two letters for each role, no two alike."""
    marks: dict[str, str] = {}
    for role in roles:
        first, *rest = [letter for letter in role if letter.isalnum()] or ["?"]
        options = [(first + str(other)).capitalize() for other in [*rest, *range(1, len(roles) + 1)]]
        marks[role] = next(option for option in options if option not in marks.values())
    return marks


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


class Axis:
    """Round ticks that cover the values, and where on paper a value lies, from `start` to `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float, about: int = 5) -> None:
        low, high = self.low, self.high = float(min(values)), float(max(values))
        if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-60):  # as good as constant
            low, high = low - (abs(low) / 2 or 1), high + (abs(low) / 2 or 1)
        power = math.floor(math.log10((high - low) / about))
        least = (high - low) / about * (1 - 1e-9)
        step = next(step for step in (1, 2, 5, 10) if step * 10.0**power >= least) * 10.0**power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        self.ticks = [round(i * step, -power) for i in range(first, last + 1)]
        self.decimals, self.start, self.end = max(0, -power), start, end
        self.room = LETTER * max(len(self.tell(tick)) for tick in self.ticks)

    def __call__(self, value: float) -> float:
        first, last = self.ticks[0], self.ticks[-1]
        return round(self.start + (float(value) - first) / (last - first) * (self.end - self.start), 2)

    def tell(self, value: float | None, more: int = 0) -> str:
        """With as many decimals as the ticks have, or some more."""
        if not known(value):
            return MISSING
        if self.decimals > 6:
            return f"{value:.5g}"
        return f"{value:,.{self.decimals + more}f}" if abs(value) < 1e7 else f"{value:.9g}"


def grid(
    x: Axis, top: float, bottom: float, x_label: str, y: Axis | None = None, y_label: str = ""
) -> list[Html]:
    """Lines at the ticks, with numbers as far as there is room, and the names of the axes."""
    every = math.ceil(len(x.ticks) * (x.room + 6) / (x.end - x.start + x.room))
    drawn = [tag("path", d=f"M{x(tick)} {top}V{bottom}", class_="grid") for tick in x.ticks]
    drawn += [text(x(tick), bottom + 15, x.tell(tick), "middle") for tick in x.ticks[::every]]
    for tick in y.ticks if y else ():
        drawn.append(tag("path", d=f"M{x.start} {y(tick)}H{x.end}", class_="grid"))
        drawn.append(text(x.start - 6, y(tick) + 4, y.tell(tick), "end"))
    return [*drawn, text(x.end, bottom + 33, x_label, "end", x.end), *([text(2, 12, y_label)] if y else [])]


def flags(lines: Mapping[str, float], x: Axis, bottom: float) -> list[Html]:
    """Upright lines; their names are stacked above the drawing, so that near ones do not collide."""
    drawn, names = [], []
    for i, (name, value) in enumerate(lines.items()):
        outline = f"M{x(value)} {4 + 16 * i}V{bottom}"
        drawn.append(tag("path", d=outline, stroke_dasharray=dashes(i + 1), class_="flag"))
        shift, anchor = (-5, "end") if x(value) > WIDTH / 2 else (5, "start")
        words = f"{name} {x.tell(value, 1)}"
        names.append(text(x(value) + shift, 14 + 16 * i, words, anchor, WIDTH / 2))
    return drawn + names


def text(
    x: float, y: float, words: str, anchor: str = "start", room: float = WIDTH, class_: str | None = None
) -> Html:
    """Words, cut with an ellipsis to `room`. Widths are guesses, on the wide side."""
    widths = accumulate(2 * LETTER if east_asian_width(letter) in "WF" else LETTER for letter in words)
    fitting = sum(width <= room for width in widths)
    words = words if fitting >= len(words) else words[: max(0, fitting - 1)] + "…"
    return tag("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def marker(i: int, x: float, y: float, told: str = "") -> Html:
    """The mark of series i at a point; `told` is its tooltip."""
    title = tag("title", told) if told else ""
    return tag("path", title, d=MARKERS[i % 8], transform=f"translate({x} {y})", class_="dot")


def dashes(i: int) -> str:
    """The dash pattern of series i: with the markers, 32 series look different."""
    return DASHES[(i + 2 * (i // 8)) % 8]


def tone(i: int) -> str:
    """The colour of series i, as a style."""
    return f"--c:var(--c{i % TONES})"


def chart(title: str, told: str, height: float, drawn: list[Html], data: str = "", legend: str = "") -> Html:
    """The drawing under its title, and its numbers to be opened."""
    head = tag("figcaption", title)
    if not drawn:
        return tag("figure", head, tag("p", "nothing to draw", class_="note"), class_="chart")
    words = [tag("title", title), tag("desc", told)]
    drawing = tag("svg", *words, *drawn, viewBox=f"0 0 {WIDTH} {height}", role="img")
    numbers = tag("details", tag("summary", "The numbers"), data)
    return tag("figure", head, legend, drawing, numbers, class_="chart")
