# ruff: noqa: F401
"""A page of results in one file: tables, charts and pictures that need no network and no script.

    accuracy = section("Accuracy", "In percent.", table(["", "worst"], [["base", 54.8]]))
    page("Heads of ViT-L-14", {"seed": "0"}, [accuracy])

Every function returns Html. Any other string is text: it is escaped, and a paragraph of its own where markup
could stand. None, NaN and infinity are shown as a dash and never drawn. No colour stands alone: letters,
dashes, shapes or numbers go with it.
"""

from .charts import curves, histogram, intervals
from .document import MISSING, STYLE, Html, origin, page, pictures, section, table, tag, thumbnail
from .drawing import TONES, WIDTHS, Axis, dashes, marker
from .heads import Head, by_value, head_grid, letters
