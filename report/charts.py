"""Charts as SVG: curves, intervals, and a histogram."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from types import MappingProxyType

from .document import Html, known, table, tag
from .drawing import LETTER, WIDTHS, Axis, chart, dashes, grid, marker, present, text, tone

Points = Sequence[tuple[float, ...]]
Series = Mapping[str, Points]
Lines = Mapping[str, float]  # names and values to compare with
NO_LINES: Lines = MappingProxyType({})


def curves(series: Series, x_label: str, y_label: str, title: str, lines: Lines = NO_LINES) -> Html:
    """Lines through (x, y), broken where one of them is missing; `lines` are values of y."""
    lines = present(lines)
    dots = [point for points in series.values() for point in points if known(*point)]
    if not dots:
        return chart(title)
    xs, ys = [x for x, _ in dots], [*(y for _, y in dots), *lines.values()]
    whole = all(isinstance(x, Integral) for x in xs)

    def draw(width: int) -> tuple[float, list[Html]]:
        bottom = 216 if width == WIDTHS[0] else 286
        y = Axis(ys, bottom, 26)
        x = Axis(xs, y.room + 8, width - 16, about=width // 66, whole=whole)
        drawn = grid(x, 26, bottom, x_label, y, y_label)
        for i, value in enumerate(lines.values()):
            drawn.append(flag(i, f"M{x.start} {y(value)}H{x.end}"))
        drawn += [curve(i, name, points, x, y) for i, (name, points) in enumerate(series.items())]
        return bottom + 42, drawn

    y = Axis(ys, 0, 1)
    legend, rows = [], []
    for i, (name, points) in enumerate(series.items()):
        line = tag("path", d="M0 6H40", stroke_dasharray=dashes(i), class_="line")
        legend.append(sample(name, line, marker(i, 20, 6), style=tone(i)))
        rows += [[name, *point] for point in points if known(*point)]
    for i, (name, value) in enumerate(lines.items()):
        legend.append(sample(f"{name} {y.tell(value, 1)}", flag(i, "M0 6H40")))
        rows.append([name, "", value])
    told = f"{y_label} against {x_label}: {', '.join(series)}. {len(dots)} points, "
    told += f"{y_label} from {y.low:.4g} to {y.high:.4g}."
    return chart(title, told, draw, table(["", x_label, y_label], rows), legend)


def sample(name: str, *drawn: Html, style: str | None = None) -> Html:
    """A line of the legend: how it is drawn, and what it is."""
    drawing = tag("svg", *drawn, viewBox="0 0 40 12", aria_hidden="true", class_="series", style=style)
    return tag("li", drawing, name)


def flag(i: int, outline: str) -> Html:
    """The line of a value to compare with: in the colour of the text, and without markers."""
    return tag("path", d=outline, stroke_dasharray=dashes(i + 1), class_="flag")


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
    return tag("g", *parts, class_="series", style=tone(i))


def intervals(groups: Mapping[str, Sequence], title: str, x_label: str) -> Html:
    """Dots with whiskers, beside their names and numbers where there is room, and below them elsewhere.

    Args:
        groups: from a name ("" for none) to rows (label, value, low, high); rows of one label look alike.
    """
    rows = [(group, *row) for group, members in groups.items() for row in members]
    values = [value for row in rows for value in row[2:] if known(value)]
    if not values:
        return chart(title)
    looks = {name: i for i, name in enumerate(dict.fromkeys(row[1] for row in rows))}
    tell = Axis(values, 0, 1, about=6).tell
    numbers = []
    for _, _, value, *ends in rows:
        between = f" [{tell(ends[0], 1)}, {tell(ends[1], 1)}]" if known(*ends) else ""
        numbers.append(f"{tell(value, 1)}{between}")
    right = LETTER * max(map(len, numbers))

    def draw(width: int) -> tuple[float, list[Html]]:
        one_line = width > WIDTHS[0]
        names = min(LETTER * max(map(len, looks)), 320) + 34 if one_line else 12
        x = Axis(values, names, width - 12 - (right + 20) * one_line, about=6)
        apart, words, mark = (22, 15, 11) if one_line else (32, 12, 22)  # down from the top of a row
        drawn, down, last = [], 8, ""
        for (group, name, value, low, high), said in zip(rows, numbers, strict=True):
            if group != last:
                drawn.append(text(0, down + 16, group, room=width, class_="strong"))
                down, last = down + 22, group
            room = names - 24 if one_line else width - 40 - LETTER * len(said)
            drawn.append(text(20, down + words, name, room=room))
            drawn.append(text(width - 12, down + words, said, "end"))
            whisker, dot = "", ""
            if known(low, high):
                outline = f"M{x(low)} {down + mark - 4}v8m0-4H{x(high)}m0-4v8"
                whisker = tag("path", d=outline, class_="whisker")
            if known(value):
                dot = marker(looks[name], x(value), down + mark, f"{group} {name}: {said}")
            drawn.append(tag("g", whisker, dot, style=tone(looks[name])))
            down += apart
        return down + 46, grid(x, 8, down + 4, x_label) + drawn

    skip = 0 if any(groups) else 1  # the column of groups without names
    data = table(["group", "", x_label, "low", "high"][skip:], [row[skip:] for row in rows])
    return chart(title, f"{x_label}: a dot with its interval for each of {len(rows)} rows.", draw, data)


def histogram(values: Iterable[float], marks: Mapping[str, float], title: str, x_label: str) -> Html:
    """How many of the values lie where; marks: from names to values, as upright lines."""
    given, marks = list(values), present(marks)
    values = [value for value in given if known(value)]
    if not values:
        return chart(title)
    edges = Axis(values, 0, 1, about=min(24, 5 + math.isqrt(len(values)))).ticks
    # An edge belongs to the bar after it.
    held = Counter(min(max(bisect_right(edges, value), 1), len(edges) - 1) for value in values)
    top, across = 26 + 16 * len(marks), [edges[0], edges[-1], *marks.values()]
    tell = Axis(across, 0, 1, about=6).tell
    rows = [
        (f"{tell(low, 1)} to {tell(high, 1)}", held[i]) for i, (low, high) in enumerate(pairwise(edges), 1)
    ]

    def draw(width: int) -> tuple[float, list[Html]]:
        y = Axis([0, max(4, *held.values())], top + (150 if width == WIDTHS[0] else 200), top, about=4)
        x, bars = Axis(across, y.room + 8, width - 16, about=6), []
        for (low, high), (name, count) in zip(pairwise(edges), rows, strict=True):
            outline = f"M{x(low)} {y.start}V{y(count)}H{x(high)}V{y.start}Z"
            bars.append(tag("path", tag("title", f"{name}: {count}"), d=outline, class_="column"))
        drawn = grid(x, top, y.start, x_label, y, "count") + bars + upright(marks, x, y.start, width)
        return y.start + 42, drawn

    told = f"{len(values)} of {len(given)} values of {x_label}, from {min(values):.4g} to {max(values):.4g}."
    marked = [(f"{name}: {tell(value, 1)}", "") for name, value in marks.items()]
    return chart(title, told, draw, table([x_label, "count"], rows + marked))


def upright(lines: Lines, x: Axis, bottom: float, width: int) -> list[Html]:
    """Upright lines; their names are stacked above the drawing, so that near ones do not collide."""
    drawn, names = [], []
    for i, (name, value) in enumerate(lines.items()):
        drawn.append(flag(i, f"M{x(value)} {4 + 16 * i}V{bottom}"))
        shift, anchor = (-5, "end") if x(value) > width / 2 else (5, "start")
        names.append(text(x(value) + shift, 14 + 16 * i, f"{name} {x.tell(value, 1)}", anchor, width / 2))
    return drawn + names
