"""The demo world: 64 x 64 pictures of one bird in one place, with every fact about them known.

    facts = sample(100, seed=7, alignment=0.95)   # {factor: [100] integers}; 95 % of the birds at home
    picture, mask = render(facts, 3, seed=7)      # [64, 64, 3] and [64, 64] uint8; the mask is the bird

Given its facts, picture i depends on (seed, i) alone. Any order, any subset and any number of workers give
the same pixels.
"""

from __future__ import annotations

import math
from multiprocessing import Pool

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from .birds import PALETTE, SHAPES

FACTORS: dict[str, tuple[str, ...]] = {
    "kind": ("sparrow", "cardinal", "crow", "woodpecker", "duck", "gull", "heron", "pelican"),
    "colour": ("red", "blue", "green", "yellow", "white", "black", "brown", "pink"),
    "place": ("forest", "field", "desert", "mountain", "sea", "lake", "river", "beach"),
    "light": ("day", "night", "sunset", "fog"),
    "style": ("photo", "sketch", "painting", "cartoon"),
}
FIRST_WATER = 4  # kinds and places from this index on are water birds and water places
SIZE = 64
CANVAS = 2 * SIZE  # everything is drawn twice as large and then averaged, for smooth edges

BODY_COLOURS = [
    (204, 30, 25),
    (38, 77, 217),
    (38, 153, 51),
    (242, 217, 38),
    (242, 242, 237),
    (25, 25, 31),
    (122, 77, 38),
    (247, 140, 184),
]


def sample(count: int, seed: int, alignment: float = 0.5) -> dict[str, np.ndarray]:
    """Facts of `count` pictures. Every factor is uniform and independent, except the place.

    Args:
        count: number of pictures.
        seed: the seed of this set of pictures; give the same one to `render`.
        alignment: share of pictures whose place suits the bird (water birds on water, land birds on land).
            With 0.5, place and kind are independent, and the four groups are equally likely.

    Returns:
        {factor: [count] int64}, indices into FACTORS[factor].
    """
    rng = np.random.default_rng([seed, 0])
    facts = {name: rng.integers(len(values), size=count) for name, values in FACTORS.items()}
    waterbird = facts["kind"] >= FIRST_WATER
    on_water = np.where(rng.random(count) < alignment, waterbird, ~waterbird)
    facts["place"] = facts["place"] % FIRST_WATER + FIRST_WATER * on_water
    return facts


def render(
    facts: dict[str, np.ndarray], index: int, seed: int, bird: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Picture `index` of `facts`, [64, 64, 3] uint8, and the mask of its bird, [64, 64] uint8.

    The mask is 0 outside the bird and 255 inside, with a soft edge. Without `bird` the place is empty.
    """
    rng = np.random.default_rng([seed, 1, index])
    fact = {name: FACTORS[name][values[index]] for name, values in facts.items()}
    scene = shine(paint_place(fact["place"], rng), fact["light"], rng)
    body, mask = paint_bird(fact["kind"], BODY_COLOURS[facts["colour"][index]], rng)
    body += mask * 0.06 * tile(SOFT, rng)
    body = body * BIRD_LIGHT[fact["light"]]
    if fact["light"] == "fog":
        body = 0.75 * body + 0.25 * FOG
    mask = mask * bird
    picture = restyle(scene * (1 - mask) + body * mask, mask[..., 0], fact["style"], rng)
    return (picture.clip(0, 1) * 255).astype(np.uint8), (mask[..., 0] * 255).astype(np.uint8)


def render_all(facts: dict[str, np.ndarray], seed: int, bird: bool = True) -> np.ndarray:
    """[count, 64, 64, 3] uint8, every picture of `facts`, on all cores."""
    count = len(facts["kind"])
    jobs = [(facts, range(start, min(start + 500, count)), seed, bird) for start in range(0, count, 500)]
    with Pool() as pool:
        parts = pool.imap(_render_some, jobs)
        parts = tqdm(parts, total=len(jobs), desc="rendering", unit="x500", leave=False)
        return np.concatenate(list(parts))


def _render_some(job: tuple[dict[str, np.ndarray], range, int, bool]) -> np.ndarray:
    facts, rows, seed, bird = job
    return np.stack([render(facts, i, seed, bird)[0] for i in rows])


# Tiles of noise are drawn once. New noise for each picture would take longer than everything else together.


def _tiles(rows: int, columns: int, count: int = 64) -> np.ndarray:
    """[count, 64, 64, 1] smooth noise, interpolated from `rows` x `columns` nodes of unit variance."""
    noise = np.random.default_rng([rows, columns]).normal(size=(count, rows, columns)).astype(np.float32)
    tiles = [Image.fromarray(nodes).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for nodes in noise]
    return np.stack([np.asarray(tile) for tile in tiles])[..., None]


FINE, SOFT, WAVES = _tiles(SIZE, SIZE), _tiles(16, 16), _tiles(26, 5)
# [64, 1, 1] each row's distance from the top, 0 to 1
ROW = (np.arange(SIZE, dtype=np.float32)[:, None, None] + 0.5) / SIZE


def tile(bank: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return bank[rng.integers(len(bank))]


# Places. Each painter draws on the canvas and returns the height of the horizon, and the tiles of noise and
# the strength that give the ground its texture.


def paint_place(place: str, rng: np.random.Generator) -> np.ndarray:
    """[64, 64, 3] float32 in 0..1."""
    canvas = Image.new("RGB", (CANVAS, CANVAS))
    horizon, bank, strength = PLACES[place](ImageDraw.Draw(canvas), rng)
    scene = np.asarray(canvas.reduce(2), dtype=np.float32) / 255
    return scene + np.where(horizon < ROW, strength * tile(bank, rng), 0.02 * tile(SOFT, rng))


def tint(rng: np.random.Generator, *rgb: int) -> tuple[int, int, int]:
    """The colour, varied a little in brightness and in each channel."""
    shift = rng.uniform(-12, 12) + rng.uniform(-12, 12, 3)
    return tuple(int(min(255, max(0, c + s))) for c, s in zip(rgb, shift, strict=True))


def area(draw: ImageDraw.ImageDraw, top: float, bottom: float, colour: tuple[int, int, int]) -> None:
    draw.rectangle((0, int(top * CANVAS), CANVAS, int(bottom * CANVAS)), fill=colour)


def shape(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    draw.polygon([(x * CANVAS, y * CANVAS) for x, y in points], fill=colour)


def wavy(rng: np.random.Generator, y: float, height: float, waves: float) -> list[tuple[float, float]]:
    """Points of a wavy line from the left to the right edge around height y."""
    phase = rng.uniform(0, 6)
    return [(x / 16, y + height * math.sin(waves * x / 16 + phase)) for x in range(17)]


def forest(draw, rng):
    horizon = rng.uniform(0.45, 0.6)
    area(draw, 0, horizon, tint(rng, 140, 178, 184))
    area(draw, horizon, 1, tint(rng, 51, 77, 31))
    for _ in range(6):
        x, top, foot = rng.uniform(0, 1), rng.uniform(-0.1, 0.25), horizon + rng.uniform(0, 0.15)
        width = rng.uniform(0.1, 0.17)
        shape(
            draw,
            [(x - 0.02, foot), (x - 0.02, top), (x + 0.02, top), (x + 0.02, foot)],
            tint(rng, 77, 51, 28),
        )
        shape(draw, [(x, top), (x - width, foot - 0.1), (x + width, foot - 0.1)], tint(rng, 26, 90, 36))
    return horizon, SOFT, 0.05


def field(draw, rng):
    horizon, vanishing = rng.uniform(0.35, 0.5), rng.uniform(0.2, 0.8)
    area(draw, 0, horizon, tint(rng, 140, 190, 242))
    area(draw, horizon, 1, tint(rng, 133, 168, 56))
    furrow = tint(rng, 110, 145, 45)
    for x in np.arange(-2, 3, rng.uniform(0.25, 0.4)):
        shape(draw, [(vanishing, horizon), (x, 1), (x + 0.12, 1)], furrow)
    for _ in range(25):
        x, y = rng.uniform(0, CANVAS), rng.uniform(horizon + 0.05, 1) * CANVAS
        draw.rectangle((x, y, x + 2, y + 2), fill=tint(rng, 242, 191, 90))
    return horizon, FINE, 0.03


def desert(draw, rng):
    horizon = rng.uniform(0.4, 0.55)
    area(draw, 0, 1, tint(rng, 217, 204, 173))
    shape(draw, [*wavy(rng, horizon, 0.04, rng.uniform(4, 9)), (1, 1), (0, 1)], tint(rng, 224, 173, 102))
    shape(draw, [*wavy(rng, horizon + 0.2, 0.04, rng.uniform(4, 9)), (1, 1), (0, 1)], tint(rng, 212, 158, 90))
    for _ in range(2):
        x, top, foot = rng.uniform(0.05, 0.95), rng.uniform(0.2, 0.4), rng.uniform(0.5, 0.75)
        green = tint(rng, 56, 115, 51)
        stem, arms = (-0.03, 0.03, top, foot), (-0.11, 0.11, top + 0.12, top + 0.16)
        tips = (-0.11, -0.075, top + 0.03, top + 0.16), (0.075, 0.11, top + 0.03, top + 0.16)
        for left, right, up, down in (stem, arms, *tips):
            shape(draw, [(x + left, up), (x + right, up), (x + right, down), (x + left, down)], green)
    return horizon + 0.05, WAVES, 0.025


def mountain(draw, rng):
    horizon = rng.uniform(0.55, 0.7)
    area(draw, 0, horizon, tint(rng, 158, 194, 235))
    for _ in range(3):
        x, top, slope = rng.uniform(0, 1), rng.uniform(0.02, 0.3), rng.uniform(0.5, 1.1)
        foot, snow = slope * (horizon - top), slope * 0.13
        shape(draw, [(x, top), (x - foot, horizon), (x + foot, horizon)], tint(rng, 118, 112, 120))
        shape(draw, [(x, top), (x, horizon), (x + foot, horizon)], tint(rng, 96, 90, 98))
        shape(
            draw, [(x, top), (x - snow, top + 0.13), (x, top + 0.09), (x + snow, top + 0.13)], (242, 245, 250)
        )
    area(draw, horizon, 1, tint(rng, 107, 107, 97))
    return horizon, SOFT, 0.08


def sea(draw, rng):
    horizon = rng.uniform(0.25, 0.4)
    area(draw, 0, horizon, tint(rng, 158, 199, 237))
    area(draw, horizon, 1, tint(rng, 20, 64, 128))
    for _ in range(16):
        x, y, width = rng.uniform(-0.1, 1), rng.uniform(horizon + 0.04, 1), rng.uniform(0.05, 0.16)
        shape(
            draw,
            [(x, y), (x + width / 2, y - 0.015), (x + width, y), (x + width / 2, y + 0.01)],
            (215, 228, 238),
        )
    return horizon, WAVES, 0.06


def lake(draw, rng):
    horizon = rng.uniform(0.32, 0.45)
    area(draw, 0, horizon, tint(rng, 168, 204, 237))
    area(draw, horizon, 1, tint(rng, 115, 168, 194))
    hills = wavy(rng, 0.1, 0.06, rng.uniform(5, 10))
    shape(draw, [*((x, horizon - y) for x, y in hills), (1, horizon), (0, horizon)], tint(rng, 56, 107, 66))
    shape(
        draw,
        [*((x, horizon + 0.7 * y) for x, y in hills), (1, horizon), (0, horizon)],
        tint(rng, 92, 142, 132),
    )
    for _ in range(6):
        x, top = rng.uniform(0, 1), rng.uniform(0.55, 0.8)
        shape(draw, [(x, 1), (x + 0.02, 1), (x + 0.07, top)], tint(rng, 77, 102, 31))
    return horizon, WAVES, 0.025


def river(draw, rng):
    horizon = rng.uniform(0.3, 0.42)
    area(draw, 0, horizon, tint(rng, 153, 199, 237))
    area(draw, horizon, 1, tint(rng, 92, 140, 51))
    middle, bend, phase, widening = (
        rng.uniform(0.35, 0.65),
        rng.uniform(8, 12),
        rng.uniform(0, 6),
        rng.uniform(0.45, 0.7),
    )
    depths = [k / 16 * (1 - horizon) for k in range(17)]
    course = [
        (middle + 0.28 * math.sin(d * bend + phase) * (0.3 + d), horizon + d, 0.04 + widening * d)
        for d in depths
    ]
    for extra, colour in ((0.03, tint(rng, 140, 120, 77)), (0.0, tint(rng, 56, 122, 184))):
        left = [(x - w - extra, y) for x, y, w in course]
        shape(draw, left + [(x + w + extra, y) for x, y, w in reversed(course)], colour)
    return horizon, WAVES, 0.03


def beach(draw, rng):
    horizon, shore = rng.uniform(0.22, 0.34), rng.uniform(0.5, 0.68)
    area(draw, 0, horizon, tint(rng, 158, 214, 247))
    area(draw, horizon, 1, tint(rng, 51, 178, 189))
    edge = wavy(rng, shore, 0.05, rng.uniform(4, 9))
    shape(draw, [*((x, y - 0.03) for x, y in edge), (1, 1), (0, 1)], (247, 250, 250))
    shape(draw, [*((x, y + 0.03) for x, y in edge), (1, 1), (0, 1)], tint(rng, 237, 214, 158))
    return horizon, FINE, 0.025


PLACES = dict(zip(FACTORS["place"], (forest, field, desert, mountain, sea, lake, river, beach), strict=True))


# The bird.


def paint_bird(
    kind: str, colour: tuple[int, int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The bird alone [64, 64, 3] in 0..1 and its mask [64, 64, 1].

    It stands anywhere but at the top, and faces left or right.
    """
    body = np.array(tint(rng, *colour), dtype=np.float32)
    paint = {part: np.array(tint(rng, *rgb), dtype=np.float32) for part, rgb in PALETTE[kind].items()}
    paint |= {
        "body": body,
        "belly": 0.6 * body + 0.4 * np.float32([230, 224, 204]),
        "eye": np.float32([8, 8, 8]),
    }
    paint["wing"] = 0.75 * paint["wing"] + 0.25 * body
    size, turn, facing = rng.uniform(0.29, 0.40), rng.uniform(-0.15, 0.15), rng.choice([-1, 1])
    x, y = rng.uniform(0.85 * size, 1 - 0.85 * size), min(rng.uniform(0.35, 1), 1 - 0.95 * size)
    c, s = size * CANVAS * math.cos(turn), size * CANVAS * math.sin(turn)
    picture, mask = Image.new("RGB", (CANVAS, CANVAS)), Image.new("L", (CANVAS, CANVAS))
    draw, draw_mask = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    for part, points in SHAPES[kind]:
        outline = [(x * CANVAS + facing * (c * u - s * v), y * CANVAS + s * u + c * v) for u, v in points]
        draw.polygon(outline, fill=tuple(int(p) for p in paint[part]))
        draw_mask.polygon(outline, fill=255)
    alpha = np.asarray(mask.reduce(2), dtype=np.float32)[..., None] / 255
    # The picture is black outside the bird, so averaging darkened its edge. Dividing by the mask undoes that.
    return np.asarray(picture.reduce(2), dtype=np.float32) / 255 / np.maximum(alpha, 0.25), alpha


# Light and style.

FOG = np.float32([0.78, 0.80, 0.82])
BIRD_LIGHT = {
    "day": np.float32([1, 1, 1]),
    "night": np.float32([0.62, 0.64, 0.76]),
    "sunset": np.float32([1, 0.86, 0.78]),
    "fog": np.float32([1, 1, 1]),
}


def shine(scene: np.ndarray, light: str, rng: np.random.Generator) -> np.ndarray:
    """The place in that light: darkened with stars at night, reddened from above at sunset, faded in fog."""
    if light == "night":
        stars = (tile(FINE, rng) > 2.2) & (ROW < 0.35)
        return np.where(stars, np.float32([0.9, 0.9, 0.8]), scene * np.float32([0.28, 0.32, 0.55]))
    if light == "sunset":
        glow = 0.65 * (1 - ROW)
        return scene * np.float32([1, 0.78, 0.66]) * (1 - glow) + glow * np.float32([1, 0.5, 0.22])
    if light == "fog":
        density = rng.uniform(0.5, 0.65)
        return scene * (1 - density) + density * FOG
    return scene


def restyle(picture: np.ndarray, mask: np.ndarray, style: str, rng: np.random.Generator) -> np.ndarray:
    """The same picture in another style.

    A photo gets grain, a sketch is edges on paper, a painting has few tones, and a cartoon has vivid colours
    and an outlined bird.
    """
    if style == "photo":
        return picture + 0.02 * tile(FINE, rng)
    if style == "sketch":
        edges = np.zeros(mask.shape, dtype=np.float32)
        edges[:-1] += np.abs(np.diff(picture, axis=0)).sum(-1)
        edges[:, :-1] += np.abs(np.diff(picture, axis=1)).sum(-1)
        paper = 0.6 * np.float32([0.97, 0.95, 0.9]) + 0.4 * picture
        return paper * (1.05 - edges).clip(0.1, 1)[..., None]
    if style == "painting":
        strokes = tile(WAVES, rng).swapaxes(0, 1) * np.float32([0.05, 0.04, 0.03])
        return np.round((picture + strokes) * 6) / 6
    grey = picture.mean(-1, keepdims=True)
    vivid = (grey + 1.7 * (picture - grey) + 0.05).clip(0, 1)
    grown = np.pad(mask, 1)
    grown = np.maximum.reduce([grown[2:, 1:-1], grown[:-2, 1:-1], grown[1:-1, 2:], grown[1:-1, :-2]])
    return vivid * (1 - (grown - mask).clip(0, 1))[..., None]
