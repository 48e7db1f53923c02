"""What each task shows on its page, results/<task>/report.html: the same numbers as on screen, drawn."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from report import Head, Html, curves, head_grid, histogram, intervals, pictures, section, table

from .common import wilson


def check(results: dict) -> list[Html]:
    rows = [
        (name, f"{error:.1e}", "ok" if error <= results["tolerance"] else "TOO LARGE")
        for name, error in results["errors"].items()
    ]
    return [section("Do the terms sum to the embedding?", table(["largest error, relative", "", ""], rows))]


def textspan(results: dict, images: dict[str, Sequence[Image.Image]]) -> list[Html]:
    """images: of each head, where it writes most along its first text."""
    heads = []
    for head in results["heads"]:
        layer, number = (int(part) for part in head["head"].split("."))
        shares = {category: share for category, (share, _) in head["categories"].items()}
        shown = dict(sorted(shares.items(), key=lambda item: -item[1])[:5])
        heads.append(
            Head(layer, number, head["role"] or "", max(shares.values(), default=None), shown, head["texts"], head["spread"],
                 head["remainder"], images.get(head["head"], ()), head["stable"])
        )  # fmt: skip
    note = (
        "Bars of categories: share of the head's variance between images that different texts of the category fit best. Beside each "
        "text, the share of variance along what it adds to those above it. Stable: share of bootstrap samples with the same role. "
        "Images: of those that roles were found on, where the head writes most along its first text."
    )
    sections = [section("What each head writes", head_grid(heads), note=note)]
    if "agreement" in results:
        counts = results["agreement"]
        clear = counts["clear heads"]
        rows = [
            (key, f"{counts[key]:.1f} of {clear}", f"{counts[key] / max(clear, 1):.0%}")
            for key in ("roles from categories", "roles from greedy texts", "roles dealt at random")
        ]
        words = f"In the demo the truth is known: one factor explains over 30% of {clear} of {counts['heads']} heads. It is the role in"
        sections.append(section("Roles and the true factors", words, table(["", "heads", ""], rows)))
    return sections


def waterbirds(results: dict, counts: dict[str, int]) -> list[Html]:
    rows, control = results["rows"], results["random"]
    kinds = "kinds" in rows["base"]
    cells = [
        [label.strip(), *(f"{100 * share:.1f}" for share in row["groups"].values()), f"{100 * row['worst']:.1f}",
         f"{100 * row['average']:.1f}", *([f"{100 * row['kinds']:.1f}"] if kinds else [])]
        for label, row in rows.items()
    ]  # fmt: skip
    header = ["accuracy, %", *counts, "worst group", "average", *(["kinds of birds"] if kinds else [])]
    groups = {
        group: [(label.strip(), *in_percent(row["groups"][group], count)) for label, row in rows.items()]
        for group, count in counts.items()
    }
    parts = [
        table(header, cells, "Groups are bird/place"),
        intervals(groups, "Each group, with 95 % intervals (Wilson)", "accuracy, %"),
    ]
    sections = [section("Accuracy with and without the cue", *parts)]
    if control is not None:
        chosen = rows.get("heads mean-ablated", {}).get("worst")
        marks = {"unchanged": 100 * rows["base"]["worst"]} | (
            {"chosen heads": 100 * chosen} if chosen is not None else {}
        )
        drawn = histogram(
            [100 * x for x in control["worst values"]],
            marks,
            "Worst group without random heads",
            "accuracy, %",
        )
        words = f"{control['draws']} draws of as many heads from each of the same layers, mean-ablated like the chosen ones."
        sections.append(section("Would any heads do?", words, drawn))
    cue = [
        Head(i, j, "chosen" if [i, j] in results["heads"] else "", share)
        for i, row in enumerate(results["explained"])
        for j, share in enumerate(row)
    ]
    words = "Share of each head's variance between images that different texts of the cue fit best."
    sections.append(section("Which heads look at the cue", words, head_grid(cue)))
    return sections


def debias(results: dict) -> list[Html]:
    rows = results["rows"]
    keys = list(rows["base"])
    cells = [[label.strip(), *(f"{100 * row[key]:.1f}" for key in keys)] for label, row in rows.items()]
    parts = [table(["%", *("follows the cue" if key == "cue" else key for key in keys)], cells)]
    if results["random"]:
        marks = {
            label.strip(): 100 * row["cue"]
            for label, row in rows.items()
            if label in ("base", "heads mean-ablated")
        }
        values = [100 * row["cue"] for row in results["random"]]
        parts.append(
            histogram(values, marks, "How far class scores follow the cue, without random heads", "%")
        )
    return [section("What taking the cue out did", *parts)]


def segmentation(results: dict, examples: dict[str, list[tuple[Image.Image, str]]]) -> list[Html]:
    """examples: titles, and pictures with captions."""
    rows = results["rows"]
    keys = ("pixel accuracy", "mIoU", "mAP")
    cells = [
        [method, row["score"], row["text"], *(f"{100 * row[key]:.1f}" for key in keys)]
        for method, row in rows.items()
    ]
    groups = {
        "mAP, ± 1.96 standard errors": [
            (
                method,
                100 * row["mAP"],
                *(100 * (row["mAP"] + sign * 1.96 * row["mAP standard error"]) for sign in (-1, 1)),
            )
            for method, row in rows.items()
        ],
        "mIoU": [(method, 100 * row["mIoU"], None, None) for method, row in rows.items()],
    }
    parts = [table(["%", "score", "text", *keys], cells), intervals(groups, "Every method", "%")]
    shown = [part for title, tiles in examples.items() for part in (title, pictures(tiles))]
    note = "Images drawn with the seed. Each map from its least (dark) to its most (bright); the decomposition from zero."
    return [section("Do the maps lie on the object?", *parts), section("Some of the maps", *shown, note=note)]


def ablation(results: dict, depth: int, heads: int, first: int) -> list[Html]:
    accuracy, count = results["accuracy"], results["images"]
    named = {"": [(label, *in_percent(accuracy[label], count)) for label in list(accuracy)[:4]]}
    layers = {
        "all up to this layer": [(i, 100 * accuracy[f"attention of layers 0 to {i}"]) for i in range(depth)],
        "this layer alone": [(i, 100 * accuracy[f"attention of layer {i}"]) for i in range(depth)],
    }
    cells = [
        [f"layer {i}", *(f"{100 * accuracy[f'head {i}.{h}']:.1f}" for h in range(heads))]
        for i in range(first, depth)
    ]
    base = {"unchanged": 100 * accuracy["base"]}
    return [
        section(
            "Whole groups of terms",
            intervals(named, "Accuracy when mean-ablated, 95 % intervals (Wilson)", "accuracy, %"),
        ),
        section(
            "Attention, by layer",
            curves(layers, "layer", "accuracy, %", "Accuracy without the attention of", lines=base),
        ),
        section("Each head alone", table(["accuracy, %", *map(str, range(heads))], cells)),
    ]


def completeness(results: dict) -> list[Html]:
    series = {
        pool: [(m, 100 * accuracy) for m, accuracy in points] for pool, points in results["curves"].items()
    }
    lines = {key: 100 * value for key, value in results["whole"].items()}
    drawn = curves(
        series,
        "texts per head",
        "accuracy, %",
        "Accuracy when heads are replaced by their texts",
        lines=lines,
    )
    return [section("How much of the heads do their texts hold?", drawn)]


def retrieval(results: dict, query: Image.Image | None, items: list[tuple[Image.Image, str]]) -> list[Html]:
    found = [
        (image, f"{i}. {text} ({row['score']:.2f})")
        for i, ((image, text), row) in enumerate(zip(items, results["found"], strict=True), 1)
    ]
    sections = [section("Query", pictures([(query, "the query")], size=160))] if query is not None else []
    return [*sections, section("Nearest", pictures(found, size=144))]


def heatmap(sheets: dict[str, dict[str, Image.Image]]) -> list[Html]:
    return [
        section(text, pictures([(tile, name) for name, tile in tiles.items()], size=200))
        for text, tiles in sheets.items()
    ]


def in_percent(accuracy: float, count: int) -> tuple[float, float, float]:
    low, high = wilson(accuracy, count)
    return 100 * accuracy, 100 * low, 100 * high
