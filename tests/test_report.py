"""The page: well formed, escaped, complete in itself; and charts that draw what the numbers say."""

import base64
import io
import math
import os
import platform
import re
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import report
from report import (
    Axis,
    Head,
    Html,
    by_value,
    curves,
    document,
    head_grid,
    histogram,
    intervals,
    page,
    pictures,
    section,
    table,
)

NASTY = "<script>alert('1')</script> \"quoted\" & <b>bold</b> </title> ]]> \x00 \ud800"
VOID = {"meta", "img"}
numbers = st.floats(-1e12, 1e12) | st.integers(-1000, 1000).map(float)


class Reader(HTMLParser):
    """Elements as (name, attributes, text); refuses tags that are not closed in order."""

    def __init__(self, document):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(document)
        self.close()
        assert not self.open, f"never closed: {[name for name, _, _ in self.open]}"

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"{name} has an attribute twice"
        self.elements.append((name, dict(attributes), []))
        if name not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, name):
        assert self.open[-1][0] == name, f"</{name}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def all(self, name, **attributes):
        """(attributes, text) of elements of this name with these attributes."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [
            (have, "".join(text))
            for found, have, text in self.elements
            if found == name and wanted.items() <= have.items()
        ]


def image(width=8, height=8, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def heads(text="places", layers=2, across=3):
    kinds = {text: 0.5, "light": 0.2, "none": float("nan")}
    return [
        Head(
            i,
            j,
            text if j else "",
            0.5,
            kinds,
            [(f"{text} {k}", 0.1) for k in range(8)],
            0.01,
            None,
            [image()] * 2,
        )
        for i in range(layers)
        for j in range(across)
    ]


def everything(text="a plain word"):
    """A page with all there is, the text in every place that takes one."""
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 4.0)]
    return page(
        text,
        {text: text, "seed": 0},
        [
            section(text, text, table([text, text], [[text, 1.5], [text, None]], text), note=text),
            section(
                "Charts",
                curves({text: points, "b": [(0, 3)]}, text, text, text, lines={text: 2}),
                intervals({text: [(text, 0.5, 0.4, 0.6), (text, None, None, None)]}, text, text),
                histogram([1, 2, 2, 3], {text: 2.5}, text, text),
            ),
            section("Heads", head_grid(heads(text))),
            section("Pictures", pictures([(image(), text), (image(300, 200), "")])),
        ],
    )


def drawings(chart):
    """Both: for a phone, and for a desk."""
    return [ET.fromstring(svg) for svg in re.findall(r"<svg [^>]*role=.*?</svg>", chart, re.DOTALL)]


def drawing(chart):
    return drawings(chart)[0]


def positions(chart, which=0):
    """(x, y) of the markers of a chart, in order."""
    moved = [
        re.fullmatch(r"translate\((\S+) (\S+)\)", path.get("transform"))
        for path in drawings(chart)[which].iter("path")
        if path.get("transform")
    ]
    return [(float(match[1]), float(match[2])) for match in moved]


# The page as a document


@pytest.mark.parametrize("text", ["a plain word", NASTY])
def test_a_page_is_well_formed(text):
    read = Reader(everything(text))
    assert read.all("html")[0][0]["lang"] == "en"
    assert [name for name, _, _ in read.elements if name in ("html", "head", "body", "main", "h1")] == [
        "html",
        "head",
        "body",
        "h1",
        "main",
    ]


def test_the_reader_sees_what_is_not_closed():
    for broken in ("<p><b>x</p></b>", "<div>", '<p a="1" a="2"></p>'):
        with pytest.raises(AssertionError):
            Reader(broken)


@pytest.mark.parametrize("text", ["a plain word", NASTY])
def test_drawings_are_well_formed_xml(text):
    found = re.findall(r"<svg .*?</svg>", everything(text), re.DOTALL)
    assert len(found) == 3 * 2 + 3  # three charts, drawn twice, and the samples of a legend
    for svg in found:
        ET.fromstring(svg)


def test_text_is_escaped_wherever_it_stands():
    plain, nasty = everything(), everything(NASTY)
    shapes = [
        [(name, sorted(have)) for name, have, _ in Reader(document).elements] for document in (plain, nasty)
    ]
    assert shapes[0] == shapes[1]  # not one element or attribute more
    assert nasty.count("&lt;script&gt;") > 30
    assert "<script" not in nasty
    nasty.encode("utf-8")


def test_the_check_sees_text_that_is_not_escaped():
    shapes = [
        [
            (name, sorted(have))
            for name, have, _ in Reader(page("t", {}, [section("h", Html(f"<p>{text}</p>"))])).elements
        ]
        for text in ("plain", "<b>bold</b>")
    ]
    assert shapes[0] != shapes[1]


def test_text_comes_back_as_it_was_given():
    read = Reader(page("a < b & c", {"key": '"x"'}, [section("É & co", "1 < 2", note="it's")]))
    assert read.all("h1") == [({}, "a < b & c")] and read.all("title")[0][1] == "a < b & c"  # noqa: PT018
    assert [text for _, text in read.all("p")] == ["1 < 2", "it's"]
    assert read.all("dd")[0][1] == '"x"'


def test_sums_of_markup_are_text_again_and_so_escaped():
    assert "&lt;p&gt;" in section("h", report.tag("p", "x") + "y")


def test_a_page_asks_for_nothing_from_elsewhere():
    document = everything()
    assert not re.findall(
        r"https?:|url\(|@import|//[a-z]|\bsrcset|<link|<script|<iframe| on[a-z]+=", document
    )
    for name, have, _ in Reader(document).elements:
        assert not (name == "img" and not have["src"].startswith("data:image/"))
        assert have.get("href", "#").startswith("#")
    assert "default-src 'none'" in "".join(
        have.get("content", "") for have, _ in Reader(document).all("meta")
    )


def test_every_picture_has_a_text_and_every_drawing_a_title():
    read = Reader(everything())
    assert len(read.all("img")) == 2 + 2 * 6
    assert all(have["alt"].strip() for have, _ in read.all("img"))
    for svg in re.findall(r"<svg [^>]*role=.*?</svg>", everything(), re.DOTALL):
        assert [child.tag for child in ET.fromstring(svg)][:2] == ["title", "desc"]


def test_headings_go_down_one_step_at_a_time():
    levels = [int(name[1]) for name, _, _ in Reader(everything()).elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert max(levels) == 3
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_links_lead_to_an_element_and_ids_differ():
    read = Reader(page("t", {}, [section(str(i), "none" if i else head_grid(heads())) for i in range(3)]))
    ids = [have["id"] for _, have, _ in read.elements if "id" in have]
    links = [have["href"][1:] for have, _ in read.all("a")]
    assert len(set(ids)) == len(ids)
    assert len(links) == 3 + 2 * 6
    assert set(links) <= set(ids)


def test_what_a_page_shows_stands_above_its_settings():
    read = Reader(page("t", {"seed": 0}, ["What is < seen.", section("h", "more")]))
    order = [(name, "".join(text)) for name, _, text in read.elements if name in ("h1", "p", "dl", "h2")]
    assert order == [("h1", "t"), ("p", "What is < seen."), ("dl", "seed0"), ("h2", "h"), ("p", "more")]


def test_every_note_is_a_paragraph():
    for note, expected in (("a", ["a"]), (["a", "b < c"], ["a", "b < c"]), ((), []), ("", [])):
        assert [text for _, text in Reader(section("h", note=note)).all("p", class_="note")] == expected


def test_a_page_says_what_was_run_with_what_and_links_what_it_wrote(tmp_path):
    (tmp_path / "a b.png").touch()
    (tmp_path / "earlier.png").touch()
    os.utime(tmp_path / "earlier.png", (0, 0))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    read = Reader(page("t", report.origin("python evaluate.py --text 'a < b'", 12.34, tmp_path), []))
    assert read.all("code")[0][1] == "python evaluate.py --text 'a < b'"
    links = [(have["href"], text) for have, text in read.all("a")]
    assert links == [("results.json", "results.json"), ("a%20b.png", "a b.png")]
    run = read.all("dd")[1][1]
    assert re.match(rf"20\d\d-\d\d-\d\d \d\d:\d\d\S+, 12.3 s, Python {platform.python_version()}", run)
    import torch  # as evaluate.py has by then

    assert f", torch {torch.__version__}" in report.origin("", 1, tmp_path)["run"]


def test_the_commit_is_that_of_this_repository_or_none(tmp_path, monkeypatch):
    copy = tmp_path / "outer" / "copy" / "report"
    copy.mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path / "outer")]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "an empty one"], check=True)
    commit = subprocess.run(
        [*git, "describe", "--always"], capture_output=True, text=True, check=True
    ).stdout.strip()
    monkeypatch.setattr(document, "__file__", str(copy / "document.py"))
    assert document.commit() == ""  # the one that the copy lies in is another's
    monkeypatch.setattr(document, "__file__", str(copy.parent / "document.py"))
    assert document.commit() == f"commit {commit}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert document.commit() == ""


def test_an_empty_page_is_a_page():
    assert [text for _, text in Reader(page("only a title", {}, [])).all("h1")] == ["only a title"]


# Colours


def luminance(tone):
    channels = [int(tone[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def mixed(a, b, share):
    parts = [round(share * int(a[i : i + 2], 16) + (1 - share) * int(b[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{part:02x}" for part in parts)


def full(tone):
    return tone if len(tone) == 7 else "#" + "".join(2 * letter for letter in tone[1:])


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme):
    css = {
        key: full(value)
        for key, value in re.findall(r"--(\w+):(#\w+)", report.STYLE.split(":root")[1 + scheme])
    }
    tones = [css[f"c{i}"] for i in range(report.TONES)]
    assert f"c{report.TONES}" not in css
    for ground in ("page", "card"):
        assert min(contrast(css[ink], css[ground]) for ink in ("ink", "soft", "link")) >= 4.5
    for tone in tones:
        assert contrast(tone, css["page"]) >= 4.5  # letters on a mark, and lines
        cell = mixed(tone, css["page"], 0.18)
        assert min(contrast(css[ink], cell) for ink in ("ink", "soft")) >= 4.5
    deepest = by_value({(0, 0): 1.0, (0, 1): -1.0}, "t", 0, "none")
    for tone, share in re.findall(r"--c:var\(--(c\d)\);--p:(\d+)%", deepest):
        assert contrast(css["ink"], mixed(css[tone], css["page"], int(share) / 100)) >= 4.5


def test_black_on_white_has_the_largest_contrast():  # the check of the check
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") < 4.5


def test_the_first_series_differ_in_colour_dash_and_shape():
    read = Reader(
        curves({f"s{i}": [(0, i), (1, i)] for i in range(8)}, "x", "y", "t").split('<svg viewBox="0 0 400')[0]
        + "</figure>"
    )
    looks = (
        [have for have, _ in read.all("path", class_="line")],
        [have for have, _ in read.all("path", class_="dot")],
    )
    assert len({have["stroke-dasharray"] for have in looks[0]}) == 8 == len({have["d"] for have in looks[1]})
    assert len({have["style"] for have, _ in read.all("svg")}) == 8


def test_no_two_of_thirty_series_look_alike_even_without_colour():
    assert len({(report.dashes(i), report.marker(i, 0, 0)) for i in range(30)}) == 30


@given(st.lists(st.text(min_size=1, max_size=12), max_size=30, unique=True))
def test_roles_have_letters_of_their_own(roles):
    marks = report.letters(roles)
    assert list(marks) == roles
    assert len(set(marks.values())) == len(roles)


# Charts


@given(numbers, numbers, st.integers(1, 24))
@example(0.3, 0.9, 3)
@example(5, 5, 5)
@example(1e-30, 2e-30, 5)
@example(1e12, 1e12 + 1, 5)
def test_ticks_are_round_and_cover_the_values(a, b, about):
    axis = Axis([a, b], 0, 100, about)
    steps = np.diff(axis.ticks)
    slack = 1e-6 * steps.max()  # rounding
    assert axis.ticks[0] <= min(a, b) + slack
    assert axis.ticks[-1] >= max(a, b) - slack
    assert 2 <= len(axis.ticks) <= 2 * about + 4
    assert np.allclose(steps, steps[0], rtol=1e-3)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
    assert min(abs(mantissa - step) for step in (1, 2, 5, 10)) < 1e-3


def test_ticks_are_the_numbers_one_would_write():
    assert Axis([0, 100], 0, 1).ticks == [0, 20, 40, 60, 80, 100]
    assert Axis([0.12, 0.48], 0, 1).ticks == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [Axis([-1, 1], 0, 1).tell(tick) for tick in Axis([-1, 1], 0, 1).ticks] == [
        "-1.0",
        "-0.5",
        "0.0",
        "0.5",
        "1.0",
    ]


@settings(max_examples=30)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_a_value_twice_as_far_is_drawn_twice_as_far(x, step, y, rise):
    (a, b, c) = positions(
        curves({"s": [(x, y), (x + step, y + rise), (x + 2 * step, y + 2 * rise)]}, "x", "y", "t")
    )
    assert c[0] - a[0] == pytest.approx(2 * (b[0] - a[0]), abs=0.03)  # positions have two decimals
    assert c[1] - a[1] == pytest.approx(2 * (b[1] - a[1]), abs=0.03)


def test_larger_is_right_and_up():
    low, high = positions(curves({"s": [(0, 0), (1, 1)]}, "x", "y", "t"))
    assert high[0] > low[0]
    assert high[1] < low[1]


def test_a_point_on_a_tick_lies_on_its_line():
    chart = curves({"s": [(0, 0), (4, 20), (10, 100)]}, "x", "y", "t")
    lines = [path.get("d") for path in drawing(chart).iter("path") if path.get("class") == "grid"]
    _, (x, y), _ = positions(chart)
    assert any(line.startswith(f"M{x} ") for line in lines)
    assert any(f" {y}H" in line for line in lines)


def test_a_line_is_broken_where_a_value_is_missing():
    for missing in (None, float("nan"), float("inf")):
        chart = curves({"s": [(0, 1), (1, 2), (2, missing), (3, 3), (4, 4)]}, "x", "y", "t")
        line = next(path.get("d") for path in drawing(chart).iter("path") if path.get("class") == "line")
        assert re.sub(r"[\d. -]+", "", line) == "MLML"
        assert "nan" not in chart.lower() and "inf" not in chart.lower()  # noqa: PT018


def test_everything_drawn_lies_on_the_paper():
    series = {"s": [(0, -1e6), (1e6, 2.5e6)], "t": [(5e5, 0)]}
    for chart in (
        curves(series, "x", "y", "t", lines={"far above": 9e6, "far below": -9e6}),
        intervals({"g": [("a", 0, -5, 5)]}, "t", "x"),
        histogram([1, 2], {"left": -30, "right": 30}, "t", "x"),
    ):
        for which, (svg, wide) in enumerate(zip(drawings(chart), report.WIDTHS, strict=True)):
            width, height = map(float, svg.get("viewBox").split()[2:])
            assert width == wide
            spots = [(float(text.get("x")), float(text.get("y"))) for text in svg.iter("text")]
            spots += positions(chart, which)
            assert all(0 <= x <= width and 0 <= y <= height for x, y in spots)


def test_both_drawings_of_a_chart_say_the_same():
    for chart in (
        curves({"s": [(0, -1), (3, 2.5)], "t": [(1, 0)]}, "x", "y", "t", lines={"a": 1}),
        intervals({"g": [("a", 0, -5, 5), ("b", 3, 1, 4)]}, "t", "x"),
    ):
        narrow, broad = (np.array(positions(chart, which)) for which in (0, 1))
        assert len(narrow) == len(broad) > 1
        fit = np.polyfit(narrow[:, 0], broad[:, 0], 1)  # the same values on another scale
        assert np.allclose(np.polyval(fit, narrow[:, 0]), broad[:, 0], atol=0.05)
        told = [[title.text for title in svg.iter("title")] for svg in drawings(chart)]
        assert told[0] == told[1]
    counts = [
        [path[0].text for path in svg.iter("path") if path.get("class") == "column"]
        for svg in drawings(histogram([1, 2, 2, 3], {"m": 2.5}, "t", "x"))
    ]
    assert counts[0] == counts[1] != []


def test_where_there_is_room_an_interval_takes_one_line():
    chart = intervals({"": [(name, 1, 0, 2) for name in "abc"]}, "t", "x")
    for svg, apart in zip(drawings(chart), (8, 0), strict=True):
        names = [float(text.get("y")) for text in svg.iter("text") if text.text in "abc"]
        dots = [y for _, y in positions(chart, 1 if apart == 0 else 0)]
        assert all((dot > name) == bool(apart) for dot, name in zip(dots, names, strict=True))


def test_lines_to_compare_with_are_named_in_the_legend_where_nothing_crosses_them():
    values = {"a": 50, "b": 50.1, "c": 49.9, "d": 99}
    chart = curves({"s": [(0, 0), (1, 100)]}, "x", "y", "t", lines=values)
    assert [text for _, text in Reader(chart).all("tr")][3:] == [f"{a}{b:.4g}" for a, b in values.items()]
    named = [text for _, text in Reader(chart).all("li")]
    assert named == ["s", *(f"{name} {value:.1f}" for name, value in values.items())]
    for svg in drawings(chart):
        assert not [text for text in svg.iter("text") if re.match("[abcd] ", text.text)]
        looks = [path.get("stroke-dasharray") for path in svg.iter("path") if path.get("class") == "flag"]
        assert len(set(looks)) == 4


def test_layers_have_no_ticks_between_them():
    for points, expected in (
        ([(0, 1.0), (3, 2.0)], ["0", "1", "2", "3"]),
        ([(0, 1.0), (3.0, 2.0)], ["0.0", "0.5", "1.0", "1.5", "2.0", "2.5", "3.0"]),
        ([(0, 1.0), (40, 2.0)], ["0", "10", "20", "30", "40"]),
        ([(2, 1.0)], ["1", "2", "3"]),
    ):
        svg = drawing(curves({"s": points}, "layer", "y", "t"))
        low = max(float(text.get("y")) for text in svg.iter("text") if text.text != "layer")
        assert [text.text for text in svg.iter("text") if float(text.get("y")) == low] == expected


def test_intervals_are_in_order_and_around_their_dots():
    rows = [("a", 0.5, 0.4, 0.7), ("b", 0.9, 0.8, 0.95), ("c", -0.1, -0.4, 0.0)]
    chart = intervals({"": rows}, "t", "x")
    ends = [
        re.match(r"M(\S+) .*H([\d.-]+?)m", path.get("d"))
        for path in drawing(chart).iter("path")
        if path.get("class") == "whisker"
    ]
    dots = [x for x, _ in positions(chart)]
    assert [float(end[1]) < dot < float(end[2]) for end, dot in zip(ends, dots, strict=True)] == [True] * 3
    assert dots[2] < dots[0] < dots[1]
    assert [y for _, y in positions(chart)] == sorted(y for _, y in positions(chart))


def test_a_label_looks_alike_in_every_group():
    chart = intervals({g: [("base", 1, 0, 2), ("after", 2, 1, 3)] for g in ("land", "water")}, "t", "x")
    looks = [(group.get("style"), group[1].get("d")) for group in drawing(chart).iter("g")]
    assert looks[:2] == looks[2:]
    assert all(one != other for one, other in zip(looks[0], looks[1], strict=True))


def test_an_interval_without_ends_is_a_dot_and_one_without_value_a_dash():
    chart = intervals({"": [("a", 1, None, None), ("b", float("nan"), None, None)]}, "t", "x")
    assert len(positions(chart)) == 1
    assert "whisker" not in chart
    assert [text.text for text in drawing(chart).iter("text")].count(report.MISSING) == 1


@settings(max_examples=50)
@given(st.lists(numbers | st.sampled_from([0.1, 0.2, 0.3, 0.6]), min_size=1, max_size=60))
def test_the_counts_of_a_histogram_sum_to_the_number_of_values(values):
    shown = histogram([*values, None, float("nan")], {}, "t", "x")
    columns = [path for path in drawing(shown).iter("path") if path.get("class") == "column"]
    assert sum(int(path[0].text.split(": ")[1]) for path in columns) == len(values)
    assert f"{len(values)} of {len(values) + 2} values" in shown


@pytest.mark.parametrize(
    "values",
    [np.random.default_rng(0).normal(size=200).tolist(), [0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 7, 8, 8]],
    ids=["anywhere", "on the edges of bars"],
)
def test_a_histogram_counts_as_numpy_does(values):
    paths = drawing(histogram(values, {}, "t", "x")).iter("path")
    columns = [path for path in paths if path.get("class") == "column"]
    edges = Axis(values, 0, 1, about=min(24, 5 + math.isqrt(len(values)))).ticks
    assert [int(path[0].text.split(": ")[1]) for path in columns] == np.histogram(values, edges)[0].tolist()


def test_a_column_twice_as_high_counts_twice_as_many():
    chart = histogram([0.5] * 4 + [1.5] * 8, {"mark": 1.5}, "t", "x")
    columns = [
        path.get("d")
        for path in drawing(chart).iter("path")
        if path.get("class") == "column" and ": 0" not in path[0].text
    ]
    ends = [re.match(r"M(\S+) (\S+?)V(\S+?)H(\S+?)V", column) for column in columns]
    low, high = (float(end[2]) - float(end[3]) for end in ends)
    assert high == pytest.approx(2 * low, abs=0.02)
    mark = next(path.get("d") for path in drawing(chart).iter("path") if path.get("class") == "flag")
    assert float(ends[1][1]) <= float(re.match(r"M(\S+) ", mark)[1]) <= float(ends[1][4])


@pytest.mark.parametrize(
    "chart",
    [
        curves({}, "x", "y", "t"),
        curves({"s": []}, "x", "y", "t"),
        curves({"s": [(0, None)]}, "x", "y", "t", lines={"a": 1}),
        intervals({}, "t", "x"),
        intervals({"g": [("a", None, None, None)]}, "t", "x"),
        histogram([], {"a": 1}, "t", "x"),
        histogram([float("nan")], {}, "t", "x"),
    ],
)
def test_a_chart_of_nothing_says_so(chart):
    assert "nothing to draw" in chart
    assert "<svg" not in chart
    Reader(chart)


@pytest.mark.parametrize(
    "values",
    [
        [0],
        [5.0],
        [-3, -3],
        [1e300],
        [2, 2, 2, 1e-12],
        [1e-9, 2e-9],
        [-1e12, 1e12],
        [np.float32(0.5), np.int64(2)],
    ],
)
def test_odd_values_are_drawn_or_left_out(values):
    for chart in (
        curves({"s": list(enumerate(values))}, "x", "y", "t"),
        intervals({"": [("a", value, value, value) for value in values]}, "t", "x"),
        histogram(values, {}, "t", "x"),
    ):
        Reader(chart)
        assert "nan" not in chart.replace("nothing", "")
        if "<svg" in chart:
            assert all(0 <= x <= report.WIDTHS[0] for x, _ in positions(chart))


def test_long_labels_are_cut_and_stand_whole_in_the_table():
    long, wide = "a label that goes on and on " * 10, "宽" * 60
    chart = intervals({"": [(long, 1, 0, 2), (wide, 1, 0, 2)]}, "t", "x")
    shown = [text.text for text in drawing(chart).iter("text") if "…" in text.text]
    assert len(shown) == 2
    assert len(shown[1]) * 2 < len(shown[0]) + 3  # wide letters take two places
    cells = [text for _, text in Reader(chart).all("th", scope="row")]
    assert cells == [long, wide]


def test_the_numbers_of_a_chart_are_in_its_table():
    read = Reader(curves({"s": [(0, 1.25), (1, None), (2, 3)], "t": [(0, -7)]}, "x", "y", "t"))
    assert [text for _, text in read.all("tr")] == ["xy", "s01.25", "s23", "t0-7"]


# Tables, heads, pictures


def test_cells_are_written_as_numbers_or_a_dash():
    read = Reader(
        table(
            ["a", "b"],
            [
                ["x", value]
                for value in (None, float("nan"), 1234567, 0.123456, 12345.6, "as it is", np.float32(0.5))
            ],
        )
    )
    dash = report.MISSING
    assert [text for _, text in read.all("td")] == [
        dash,
        dash,
        "1,234,567",
        "0.1235",
        "12,346",
        "as it is",
        "0.5",
    ]
    with pytest.raises(ValueError, match="2 cells like the header, got 3"):
        table(["a", "b"], [["x", 1, 2]])
    assert "nothing to show" in table(["a", "b"], [])


def test_columns_of_words_are_told_from_columns_of_numbers():
    rows = [
        ["a", "1.5", "dot (2)", "3 sentences that go on for 30 letters", ""],
        ["b", "-", "cosine", "c", 2],
    ]
    read = Reader(table(["", "x", "score", "why", "n"], rows))
    looks = [have.get("class") for have, _ in read.all("td")]
    assert looks == 2 * ["numbers", "words", "words", "numbers"]
    assert [have.get("class") for have, _ in read.all("th", scope="col")][1:] == looks[:4]


def test_a_cell_for_every_head_in_its_row_and_column():
    some = [head for head in heads(layers=3, across=4) if (head.layer, head.head) != (1, 2)]
    read = Reader(head_grid(some))
    assert [have["href"] for have, _ in read.all("a", class_="cell")] == [
        f"#head-{head.layer}-{head.head}" for head in some
    ]
    assert len(read.all("article", class_="card")) == len(some)
    inside = head_grid(some).split('class="heads"')[1].split('class="cards"')[0]
    assert inside.count('class="layer"') == 3
    assert inside.count("<span></span>") == 1  # the one that is not there


def test_roles_are_told_apart_without_colour():
    roles = [f"{a}{b}" for a in ("colour", "count", "place", "plant", "animal") for b in ("s", "ish", "able")]
    grid = Reader(head_grid([Head(0, i, role, 0.5) for i, role in enumerate(roles)]))
    marks = [text for have, text in grid.all("strong", class_="mark")]
    assert len(set(marks)) == len(roles) == 15  # more than there are colours
    assert "no role" not in head_grid([Head(0, 0, "a", 0.5)])


def test_heads_of_which_no_more_is_known_have_no_cards():
    grid = head_grid([Head(0, 0, "chosen", 0.5), Head(0, 1, "", 0.1)])
    assert "<article" not in grid
    assert "href" not in grid
    assert "<article" in head_grid([Head(0, 0, "chosen", 0.5, spread=0.1), Head(0, 1)])


def test_the_heads_that_write_most_come_first_and_the_others_are_to_be_opened():
    spreads = [0.01 * ((7 * i) % 16) for i in range(16)]
    grid = head_grid(
        [Head(0, i, "", 0.5, spread=spread) for i, spread in enumerate(spreads)], {"spread": "it is"}
    )
    cards = re.findall('<article[^>]*id="head-0-(\\d+)"', grid)
    assert [spreads[int(i)] for i in cards] == sorted(spreads, reverse=True)
    shown, rest = grid.split("<details>")
    assert shown.count("<article") == 12
    assert rest.startswith("<summary>4 more heads")
    assert "<dt>spread</dt><dd>it is</dd>" in shown.split("<article")[0]
    assert "<details" not in head_grid([Head(0, i, spread=0.1) for i in range(12)])


def test_images_where_a_head_writes_least_stand_below_those_where_it_writes_most():
    read = Reader(head_grid([Head(0, 3, images=[image()] * 2, least=[image()])]))
    alts = [have["alt"] for have, _ in read.all("img")]
    assert alts == [f"head 0.3 writes {end}" for end in ("most: image 1", "most: image 2", "least: image 1")]
    assert [text for _, text in read.all("p", class_="over")] == ["writes most", "writes least"]


def test_all_that_is_known_of_a_head_stands_on_its_card():
    read = Reader(head_grid([Head(0, 3, spread=0.5, remainder=0.25, facts={"by chance": "42%", "x": "<y>"})]))
    (facts,) = [text for _, text in read.all("p", class_="facts")]
    assert facts == "spread 50%unexplained 25%by chance 42%x <y>"


def test_a_value_twice_as_far_from_the_middle_is_coloured_twice_as_deep():
    grid = by_value({(0, 0): 97.0, (0, 1): 98.0, (2, 1): 99.5}, "accuracy", 98.5, "unchanged")
    cells = re.findall(
        '<div class="cell valued" style="--c:var\\(--(c\\d)\\);--p:(\\d+)%"[^>]*><b>(.*?)</b> (.*?)<', grid
    )
    assert cells == [("c1", "50", "0.0", "97.0"), ("c1", "17", "0.1", "98.0"), ("c0", "33", "2.1", "99.5")]
    assert [text for _, text in Reader(grid).all("li")] == ["-1.5", "-0.8", "unchanged 98.5", "+0.8", "+1.5"]
    assert grid.count("<span></span>") == 1
    Reader(by_value({}, "t", 0, "none"))
    assert "nan" not in by_value({(0, 0): 1.0}, "t", 1.0, "none").replace("none", "")


def test_bars_are_as_long_as_shares():
    shares = {"half": 0.5, "all": 1.0, "too much": 1.5, "negative": -1, "missing": None}
    card = head_grid([Head(0, 0, categories=shares)]).split("<article")[1]
    lengths = re.findall(r"<li [^>]*>(\S+?)(?: much)? <b>.*?--w:([\d.]+)%", card)
    assert dict(lengths) == {
        "half": "50.0",
        "all": "100.0",
        "too": "100.0",
        "negative": "0.0",
        "missing": "0.0",
    }


def test_odd_sets_of_heads():
    Reader(head_grid([]))
    with pytest.raises(ValueError, match=r"heads must differ \(1 of 2 do\)"):
        head_grid([Head(0, 0), Head(0, 0)])


def decoded(html):
    return [
        Image.open(io.BytesIO(base64.b64decode(have["src"].split(",")[1])))
        for have, _ in Reader(html).all("img")
    ]


def test_small_pictures_keep_every_pixel_and_large_ones_become_small():
    small, large = image(64, 48), image(1000, 500)
    shown = pictures([(small, "s"), (large, "l")], size=128)
    first, second = decoded(shown)
    assert np.array_equal(np.asarray(first), np.asarray(small))
    assert second.size == (256, 128)
    sizes = [(have["width"], have["height"], have.get("class")) for have, _ in Reader(shown).all("img")]
    assert sizes == [("128", "96", "pixels"), ("128", "64", None)]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_kind_of_picture_is_shown(mode):
    picture = image(mode=mode)
    before = picture.tobytes()
    (shown,) = decoded(pictures([(picture, "p")]))
    assert shown.mode == "RGB"
    assert np.asarray(shown).std() > 0
    assert picture.tobytes() == before


def test_no_pictures_are_said_to_be_none():
    assert "nothing to show" in pictures([])
    assert "nothing to show" not in pictures([(image(), "a")])


def test_an_interval_in_a_cell_is_small_print_behind_its_value():
    cells = ["54.8 [51.8, 58.6]", "66.3 ± 14.8", "a ± b", "-0.5", "2 of 3 [x]"]
    shown = table(["", *"abcde"], [["", *cells]])
    assert re.findall("<td[^>]*>(.*?)</td>", shown) == [
        "54.8<small> [51.8, 58.6]</small>",
        "66.3<small> ± 14.8</small>",
        *cells[2:],
    ]
