"""What charts are drawn with: axes, words, marks, and the figure that holds a drawing and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from unicodedata import east_asian_width

from .document import MISSING, Html, known, tag

TONES = 16  # of report.css
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
# Every chart is drawn for a phone, or half of a desk, and for the whole of a desk; report.css shows one.
WIDTHS = (400, 840)
LETTER = 7.2  # of a wide letter; a unit is about a pixel


class Axis:
    """Round ticks that cover the values, and where on paper a value lies, from `start` to `end`.

    about: half to twice as many ticks; whole: none between whole numbers.
    """

    def __init__(
        self, values: Sequence[float], start: float, end: float, about: int = 5, whole: bool = False
    ) -> None:
        low, high = self.low, self.high = float(min(values)), float(max(values))
        if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-60):  # as good as constant
            low, high = low - (abs(low) / 2 or 1), high + (abs(low) / 2 or 1)
        power = math.floor(math.log10((high - low) / about))
        least = (high - low) / about * (1 - 1e-9)
        if whole and least < 1:
            power, least = 0, 1
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


def text(
    x: float, y: float, words: str, anchor: str = "start", room: float = WIDTHS[0], class_: str | None = None
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


def present(lines: Mapping[str, float]) -> dict[str, float]:
    """The lines that can be drawn."""
    return {name: value for name, value in lines.items() if known(value)}


def chart(
    title: str, told: str = "", draw: Callable | None = None, data: str = "", legend: Sequence[Html] = ()
) -> Html:
    """The drawing under its title, and its numbers to be opened.

    told: for those who do not see it; draw: from one of WIDTHS to (height, what is drawn), or None.
    """
    head = tag("figcaption", title)
    if draw is None:
        return tag("figure", head, tag("p", "nothing to draw", class_="note"), class_="chart")
    drawings = []
    for width, name in zip(WIDTHS, ("narrow", "broad"), strict=True):
        height, drawn = draw(width)
        words = [tag("title", title), tag("desc", told)]
        paper = {"viewBox": f"0 0 {width} {height}", "role": "img", "class_": name}
        drawings.append(tag("svg", *words, *drawn, **paper))
    key = tag("ul", *legend, class_="legend") if legend else ""
    numbers = tag("details", tag("summary", "The numbers"), data)
    return tag("figure", head, key, *drawings, numbers, class_="chart")
