"""The heads of a model in rows of layers: by role, with a card for each, or by a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from .document import MISSING, Html, known, picture, tag
from .drawing import tone

OPEN = 12  # cards of the heads that write most; the others are to be opened


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
    least: Sequence[Image.Image] = ()  # where it writes least
    facts: Mapping[str, str] = field(default_factory=dict)  # more to be said

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.head}"


def head_grid(heads: Sequence[Head], words: Mapping[str, str] | None = None) -> Html:
    """A cell for each head in rows of layers, coloured and lettered by role, with a bar for the role's share.

    Below follows a card for each head with all else that is known of it, the one that writes most first.
    A page holds one grid. `words` say what stands on the cards, between the grid and these.
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
        named = [tag("strong", mark, class_="mark"), f" {role or 'no role'} ", tag("small", roles[role])]
        legend += [tag("li", *named, style=style)] * bool(roles[role])
    more = any(head.categories or head.texts or head.images or known(head.spread) for head in heads)
    cells = {place: cell(head, looks, more) for place, head in there.items()}
    grid = in_layers(cells, "Heads in rows of layers", id="head-grid" if more else None)
    grid = Html(tag("ul", *legend, class_="legend") + grid)
    if not more:
        return grid
    order = sorted(heads, key=lambda head: (-head.spread if known(head.spread) else 0, head.layer, head.head))
    cards = [card(head, looks) for head in order]
    shown = tag("div", *cards[:OPEN], class_="cards")
    summary = tag("summary", f"{len(cards) - OPEN} more heads, which write less")
    rest = tag("details", summary, tag("div", *cards[OPEN:], class_="cards"))
    told = [tag("div", tag("dt", name), tag("dd", meaning)) for name, meaning in (words or {}).items()]
    said = tag("dl", *told, class_="settings key") if told else ""
    return Html(grid + said + shown + rest * (len(cards) > OPEN))


def by_value(values: Mapping[tuple[int, int], float], told: str, middle: float, name: str) -> Html:
    """A cell for each head with its value, coloured by how far it is below (orange) or above (blue) `middle`.

    values: {(layer, head): value}; told: what they are; name: of the middle, for the legend.
    """
    most = max((abs(value - middle) for value in values.values()), default=0) or 1

    def style(value: float) -> str:
        away = (value - middle) / most
        return f"{tone(0 if away > 0 else 1)};--p:{50 * abs(away):.0f}%"

    cells = {}
    for (layer, head), value in values.items():
        words = tag("b", f"{layer}.{head}"), f" {value:.1f}"
        title = f"head {layer}.{head}: {value:.1f}, {value - middle:+.1f}"
        cells[layer, head] = tag("div", *words, class_="cell valued", style=style(value), title=title)
    legend = []
    for away in (-most, -most / 2, 0, most / 2, most):
        words = f"{away:+.1f}" if away else f"{name} {middle:.1f}"
        legend.append(tag("li", words, class_="cell valued", style=style(middle + away)))
    return Html(tag("ul", *legend, class_="legend") + in_layers(cells, told))


def in_layers(cells: Mapping[tuple[int, int], Html], told: str, **attributes: str | None) -> Html:
    """The cells of heads in rows of layers, in a box that scrolls where it is too narrow."""
    rows, across = [], max((head for _, head in cells), default=0) + 1
    for layer in sorted({layer for layer, _ in cells}):
        rows.append(tag("span", layer, class_="layer", title=f"layer {layer}"))
        rows += [cells.get((layer, head), tag("span")) for head in range(across)]
    grid = tag("div", *rows, class_="heads", role="group", aria_label=told, style=f"--across:{across}")
    return tag("div", grid, class_="wide", tabindex=0, **attributes)


def cell(head: Head, looks: dict, has_card: bool) -> Html:
    """The square of one head; a link to its card where it has one."""
    style, mark = looks[head.role]
    role, share = head.role or "no role", percent(head.role_share)
    top = [tag("b", head.name), " ", tag("strong", mark, class_="mark"), " "]
    words = [*top, tag("span", role), " ", tag("small", share), bar(head.role_share)]
    link = f"#head-{head.layer}-{head.head}" if has_card else None
    title = f"head {head.name}: {role}, {share}"
    return tag("a" if has_card else "div", *words, class_="cell", style=style, href=link, title=title)


def card(head: Head, looks: dict) -> Html:
    """All that is known of one head."""
    style, mark = looks[head.role]
    role = f"{head.role or 'no role'} {percent(head.role_share)}"
    known_facts = {"spread": percent(head.spread), "unexplained": percent(head.remainder), **head.facts}
    facts = [tag("span", f"{key} ", tag("b", fact)) for key, fact in known_facts.items()]
    kinds = []
    for kind, share in head.categories.items():
        style_of_kind, _ = looks.get(kind, looks[""])
        kinds.append(tag("li", kind, " ", tag("b", percent(share)), bar(share), style=style_of_kind))
    texts = [tag("li", text, " ", tag("b", percent(share))) for text, share in head.texts]
    parts = [
        tag("h3", tag("strong", mark, class_="mark"), f" Head {head.name} ", tag("small", role)),
        tag("p", *facts, class_="facts"),
        folded(kinds, "kinds"),
        folded(texts, "texts"),
        strip(head, "most", head.images),
        strip(head, "least", head.least),
        tag("a", "↑ grid", href="#head-grid", aria_label=f"from head {head.name} to the ↑ grid"),
    ]
    return tag("article", *parts, class_="card", id=f"head-{head.layer}-{head.head}", style=style)


def strip(head: Head, how_much: str, images: Sequence[Image.Image]) -> Html:
    """Images on which the head writes most, or least, under a line that says so."""
    told = f"head {head.name} writes {how_much}: image"
    shown = [picture(image, f"{told} {i}", 96) for i, image in enumerate(images, 1)]
    words = tag("p", f"writes {how_much}", class_="over")
    return Html((words + tag("div", *shown, class_="strip")) * bool(shown))


def percent(share: float | None) -> str:
    """A whole percentage, with one decimal where it is small."""
    return f"{share:.{int(0 < abs(share) < 0.095)}%}" if known(share) else MISSING


def bar(share: float | None) -> Html:
    """A bar as long as the share."""
    return tag("span", class_="bar", style=f"--w:{100 * min(1, max(0, share)) if known(share) else 0:.1f}%")


def folded(items: list[Html], name: str, first: int = 5) -> Html:
    """A list of which all but the first are to be opened."""
    summary = tag("summary", f"{len(items) - first} more")
    rest = tag("details", summary, tag("ul", *items[first:], class_=name))
    return Html(tag("ul", *items[:first], class_=name) * bool(items) + rest * (len(items) > first))


def letters(roles: Sequence[str]) -> dict[str, str]:
    """Two letters for each role, no two alike."""
    marks: dict[str, str] = {}
    for role in roles:
        first, *rest = [letter for letter in role if letter.isalnum()] or ["?"]
        options = [(first + str(other)).capitalize() for other in [*rest, *range(1, len(roles) + 1)]]
        marks[role] = next(option for option in options if option not in marks.values())
    return marks
