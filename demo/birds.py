"""Eight birds as lists of coloured polygons, drawn once in their own coordinates.

A bird faces right inside the square [-1, 1] x [-1, 1], with v pointing down. Its parts are painted in the
order listed. The kinds differ in shape (bill, neck, legs, crest, tail) and in the colours of wing, bill, legs
and mark. The colour of the body is a separate factor.
"""

from __future__ import annotations

import math

Points = list[tuple[float, float]]


def ellipse(u: float, v: float, a: float, b: float, turn: float = 0.0) -> Points:
    """Outline of an ellipse around (u, v) with half-axes a and b.

    It is turned by `turn` radians; a negative turn lifts the front.
    """
    c, s = math.cos(turn), math.sin(turn)
    ring = [(a * math.cos(t), b * math.sin(t)) for t in (2 * math.pi * k / 20 for k in range(20))]
    return [(u + c * x - s * y, v + s * x + c * y) for x, y in ring]


def stroke(u0: float, v0: float, u1: float, v1: float, half_width: float) -> Points:
    """A straight bar from (u0, v0) to (u1, v1)."""
    length = math.hypot(u1 - u0, v1 - v0)
    du, dv = half_width * (v1 - v0) / length, half_width * (u0 - u1) / length
    return [(u0 + du, v0 + dv), (u1 + du, v1 + dv), (u1 - du, v1 - dv), (u0 - du, v0 - dv)]


def legs(
    u0: float, u1: float, top: float, bottom: float, half_width: float, foot: float = 0.0
) -> list[tuple[str, Points]]:
    """Two legs, with webbed feet of length `foot` if that is not zero."""
    parts = [("legs", stroke(u, top, u, bottom, half_width)) for u in (u0, u1)]
    if foot:
        parts += [("legs", stroke(u, bottom, u + foot, bottom + 0.02, 0.05)) for u in (u0, u1)]
    return parts


SHAPES: dict[str, list[tuple[str, Points]]] = {
    "sparrow": [
        *legs(-0.10, 0.14, 0.2, 0.78, 0.04),
        ("wing", stroke(-0.28, 0.14, -0.78, 0.30, 0.07)),
        ("body", ellipse(0.0, 0.05, 0.46, 0.34, -0.25)),
        ("belly", ellipse(0.08, 0.18, 0.30, 0.18, -0.25)),
        ("wing", ellipse(-0.12, 0.04, 0.32, 0.18, -0.10)),
        ("body", ellipse(0.45, -0.30, 0.24, 0.23)),
        ("bill", [(0.60, -0.38), (0.60, -0.18), (0.84, -0.26)]),
        ("mark", ellipse(0.42, -0.45, 0.18, 0.09)),
        ("eye", ellipse(0.52, -0.33, 0.05, 0.05)),
    ],
    "cardinal": [
        *legs(-0.10, 0.12, 0.2, 0.78, 0.04),
        ("wing", stroke(-0.25, 0.18, -0.88, 0.58, 0.09)),
        ("body", ellipse(0.0, 0.05, 0.46, 0.33, -0.45)),
        ("belly", ellipse(0.08, 0.18, 0.30, 0.17, -0.45)),
        ("wing", ellipse(-0.12, 0.06, 0.32, 0.17, -0.30)),
        ("body", ellipse(0.40, -0.38, 0.23, 0.22)),
        ("body", [(0.16, -0.36), (0.56, -0.50), (0.12, -0.98)]),
        ("mark", ellipse(0.52, -0.31, 0.12, 0.15)),
        ("bill", [(0.54, -0.46), (0.54, -0.22), (0.80, -0.32)]),
        ("eye", ellipse(0.45, -0.43, 0.05, 0.05)),
    ],
    "crow": [
        *legs(-0.10, 0.12, 0.2, 0.80, 0.04),
        ("wing", stroke(-0.30, 0.10, -0.92, 0.22, 0.17)),
        ("body", ellipse(0.0, 0.05, 0.50, 0.34, -0.15)),
        ("wing", ellipse(-0.14, 0.02, 0.42, 0.24, -0.05)),
        ("body", ellipse(0.46, -0.24, 0.24, 0.22)),
        ("bill", [(0.58, -0.38), (0.58, -0.10), (1.00, -0.14)]),
        ("eye", ellipse(0.53, -0.29, 0.05, 0.05)),
    ],
    "woodpecker": [
        *legs(0.10, 0.24, 0.2, 0.62, 0.04),
        ("wing", stroke(-0.18, 0.32, -0.40, 0.92, 0.08)),
        ("body", ellipse(0.0, 0.05, 0.50, 0.28, -1.0)),
        ("belly", ellipse(0.12, 0.10, 0.34, 0.13, -1.0)),
        ("wing", ellipse(-0.12, 0.10, 0.36, 0.15, -0.95)),
        ("body", ellipse(0.27, -0.46, 0.22, 0.20)),
        ("bill", [(0.40, -0.53), (0.40, -0.37), (1.00, -0.42)]),
        ("mark", [(0.42, -0.64), (0.00, -0.44), (0.00, -0.92)]),
        ("eye", ellipse(0.35, -0.49, 0.05, 0.05)),
    ],
    "duck": [
        *legs(-0.08, 0.14, 0.40, 0.64, 0.045, foot=0.16),
        ("wing", [(-0.45, 0.08), (-0.48, 0.32), (-0.90, -0.10)]),
        ("body", ellipse(-0.05, 0.20, 0.60, 0.28)),
        ("wing", ellipse(-0.15, 0.14, 0.38, 0.16)),
        ("body", stroke(0.36, 0.16, 0.46, -0.18, 0.14)),
        ("mark", stroke(0.28, -0.01, 0.58, 0.01, 0.06)),
        ("body", ellipse(0.48, -0.26, 0.22, 0.20)),
        ("bill", ellipse(0.78, -0.18, 0.21, 0.08)),
        ("eye", ellipse(0.53, -0.31, 0.05, 0.05)),
    ],
    "gull": [
        *legs(-0.06, 0.10, 0.30, 0.66, 0.04, foot=0.14),
        ("body", ellipse(0.0, 0.15, 0.52, 0.23, -0.12)),
        ("wing", [(0.24, -0.06), (-0.05, 0.30), (-1.00, 0.20)]),
        ("mark", [(-0.58, 0.11), (-0.58, 0.26), (-1.00, 0.20)]),
        ("body", ellipse(0.50, -0.06, 0.20, 0.18)),
        ("bill", stroke(0.64, -0.02, 0.92, 0.0, 0.05)),
        ("bill", stroke(0.88, 0.0, 0.90, 0.11, 0.05)),
        ("eye", ellipse(0.54, -0.10, 0.05, 0.05)),
    ],
    "heron": [
        *legs(-0.16, 0.04, 0.15, 0.98, 0.04),
        ("body", ellipse(-0.10, 0.08, 0.44, 0.20, -0.3)),
        ("wing", ellipse(-0.20, 0.10, 0.36, 0.14, -0.3)),
        ("body", stroke(0.18, -0.02, 0.40, -0.30, 0.085)),
        ("body", stroke(0.40, -0.26, 0.24, -0.54, 0.075)),
        ("body", stroke(0.23, -0.50, 0.38, -0.74, 0.075)),
        ("mark", stroke(0.40, -0.82, -0.02, -0.74, 0.05)),
        ("body", ellipse(0.42, -0.76, 0.16, 0.12)),
        ("bill", [(0.52, -0.83), (0.52, -0.69), (1.00, -0.70)]),
        ("eye", ellipse(0.46, -0.79, 0.045, 0.045)),
    ],
    "pelican": [
        *legs(-0.14, 0.06, 0.35, 0.64, 0.055, foot=0.16),
        ("body", ellipse(-0.15, 0.15, 0.54, 0.31, -0.15)),
        ("wing", ellipse(-0.25, 0.12, 0.42, 0.20, -0.1)),
        ("body", stroke(0.20, 0.08, 0.37, -0.22, 0.11)),
        ("body", stroke(0.37, -0.16, 0.26, -0.47, 0.10)),
        ("bill", ellipse(0.66, -0.22, 0.31, 0.14, 0.75)),
        ("bill", stroke(0.44, -0.50, 0.98, -0.12, 0.06)),
        ("body", ellipse(0.34, -0.52, 0.19, 0.16)),
        ("eye", ellipse(0.39, -0.56, 0.05, 0.05)),
    ],
}  # fmt: skip

# RGB in 0..255. A quarter of a wing's colour is the body's, so the wings of one kind differ between birds.
PALETTE: dict[str, dict[str, tuple[int, int, int]]] = {
    "sparrow": {"wing": (140, 85, 38), "bill": (100, 97, 92), "legs": (204, 140, 115), "mark": (128, 56, 20)},
    "cardinal": {"wing": (190, 25, 25), "bill": (242, 77, 25), "legs": (140, 77, 51), "mark": (13, 13, 13)},
    "crow": {"wing": (20, 20, 25), "bill": (20, 20, 20), "legs": (25, 25, 25), "mark": (20, 20, 20)},
    "woodpecker": {
        "wing": (242, 242, 235),
        "bill": (190, 190, 178),
        "legs": (115, 115, 115),
        "mark": (235, 13, 13),
    },
    "duck": {"wing": (38, 140, 90), "bill": (250, 224, 31), "legs": (250, 140, 25), "mark": (250, 250, 250)},
    "gull": {"wing": (158, 166, 178), "bill": (250, 190, 25), "legs": (242, 153, 153), "mark": (13, 13, 13)},
    "heron": {"wing": (64, 82, 140), "bill": (217, 178, 64), "legs": (90, 90, 64), "mark": (13, 13, 20)},
    "pelican": {
        "wing": (247, 204, 140),
        "bill": (250, 128, 25),
        "legs": (250, 178, 38),
        "mark": (230, 230, 230),
    },
}
