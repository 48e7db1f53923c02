"""A page of results in one file: tables, charts and pictures that need no network and no script.

    accuracy = section("Accuracy", "In percent.", table(["", "worst"], [["base", 54.8]]))
    page("Heads of ViT-L-14", {"seed": "0"}, [accuracy])

Every function returns Html. Any other string is text: it is escaped, and a paragraph of its own where markup
could stand. None, NaN and infinity are shown as a dash and never drawn. No colour stands alone: letters,
dashes, shapes or numbers go with it.

markup.py writes elements, document.py makes a page of them, charts.py draws (with the axes and marks of
drawing.py), and heads.py shows the heads of a model.
"""

from .charts import curves, histogram, intervals
from .document import STYLE, origin, page, pictures, section, table
from .drawing import WIDTHS, Axis, dashes, marker
from .heads import Head, by_value, head_grid, letters
from .markup import MISSING, TONES, Html, tag, thumbnail, tone

__all__ = [
    "MISSING",
    "STYLE",
    "TONES",
    "WIDTHS",
    "Axis",
    "Head",
    "Html",
    "by_value",
    "curves",
    "dashes",
    "head_grid",
    "histogram",
    "intervals",
    "letters",
    "marker",
    "origin",
    "page",
    "pictures",
    "section",
    "table",
    "tag",
    "thumbnail",
    "tone",
]
