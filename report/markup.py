"""Elements of a page: markup that cannot break, numbers and pictures as they are shown."""

from __future__ import annotations

import base64
import io
import math
import re
from html import escape
from numbers import Integral, Real

from PIL import Image

TONES = 16  # of report.css
MISSING = "\u2013"


class Html(str):
    """Markup made here."""


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


def bar(share: float | None) -> Html:
    """A bar as long as the share."""
    return tag("span", class_="bar", style=f"--w:{100 * min(1, max(0, share)) if known(share) else 0:.1f}%")


def tone(i: int) -> str:
    """The colour of series i, as a style."""
    return f"--c:var(--c{i % TONES})"


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
