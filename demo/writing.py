"""Words on the demo's pictures: a small sign that bears a word in capitals, 5 x 7 pixels a letter.

write_on(picture, "gull", rng)                # somewhere in the picture, in one of three colours
write_on(picture, "gull", rng, blank=True)    # the same sign from the same rng, without the letters
"""

from __future__ import annotations

import numpy as np

from .scenes import FACTORS, SIZE

WORDS = FACTORS["kind"]  # what is written: the names of the kinds of birds
HEIGHT = 7  # of a letter
PATCH = 8  # of the demo's model
# Each letter's rows from the top, in hexadecimal; the bits of a row are its five pixels.
FONT = {
    "A": "0e 11 11 1f 11 11 11", "B": "1e 11 11 1e 11 11 1e", "C": "0e 11 10 10 10 11 0e",
    "D": "1e 11 11 11 11 11 1e", "E": "1f 10 10 1e 10 10 1f", "F": "1f 10 10 1e 10 10 10",
    "G": "0e 11 10 13 11 11 0e", "H": "11 11 11 1f 11 11 11", "I": "0e 04 04 04 04 04 0e",
    "J": "07 02 02 02 02 12 0c", "K": "11 12 14 18 14 12 11", "L": "10 10 10 10 10 10 1f",
    "M": "11 1b 15 15 11 11 11", "N": "11 19 15 13 11 11 11", "O": "0e 11 11 11 11 11 0e",
    "P": "1e 11 11 1e 10 10 10", "Q": "0e 11 11 11 15 12 0d", "R": "1e 11 11 1e 14 12 11",
    "S": "0f 10 10 0e 01 01 1e", "T": "1f 04 04 04 04 04 04", "U": "11 11 11 11 11 11 0e",
    "V": "11 11 11 11 11 0a 04", "W": "11 11 11 15 15 1b 11", "X": "11 11 0a 04 0a 11 11",
    "Y": "11 11 0a 04 04 04 04", "Z": "1f 01 02 04 08 10 1f",
}  # fmt: skip
INKS = (  # (sign, letters)
    ((245, 245, 240), (15, 15, 20)),
    ((20, 20, 28), (245, 245, 240)),
    ((250, 225, 60), (15, 15, 20)),
)


def letters(word: str) -> np.ndarray:
    """[7, w] bool: the word in capitals, a column between two letters.

    Raises:
        ValueError: the font lacks a letter, or the word is wider than a picture.
    """
    unknown = [letter for letter in word.upper() if letter not in FONT]
    if unknown or not word:
        raise ValueError(f"the demo's font has the letters A to Z, and no {''.join(unknown)!r} for {word!r}")
    columns = []
    for letter in word.upper():
        rows = [int(row, 16) for row in FONT[letter].split()]
        columns += [[[row >> bit & 1 for bit in range(4, -1, -1)] for row in rows], np.zeros((HEIGHT, 1))]
    found = np.concatenate(columns[:-1], axis=1).astype(bool)
    if found.shape[1] > SIZE:
        raise ValueError(f"{word!r} is {found.shape[1]} pixels wide, and a picture {SIZE}")
    return found


def place(word: str, rng: np.random.Generator, jitter: int = PATCH) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a sign with this word.

    jitter: how many pixels its letters may lie above or below a row of patches; from half a patch on they lie
        anywhere.
    """
    height, width = HEIGHT + 2, min(SIZE, letters(word).shape[1] + 4)
    top, left = (int(rng.integers(SIZE - side + 1)) for side in (height, width))
    if jitter < PATCH // 2:
        top = top // PATCH * PATCH - 1 + int(rng.integers(-jitter, jitter + 1))
        top, left = max(0, min(top, SIZE - height)), left if jitter else left // 2 * 2
    return top, left, height, width


def write_on(
    picture: np.ndarray,
    word: str,
    rng: np.random.Generator,
    jitter: int = PATCH,
    inks: int = len(INKS),
    blank: bool = False,
) -> np.ndarray:
    """A copy of the picture [64, 64, 3] uint8 with a sign in one of the first `inks`; jitter: see `place`."""
    top, left, height, width = place(word, rng, jitter)
    sign, ink = INKS[rng.integers(inks)]
    picture = picture.copy()
    picture[top : top + height, left : left + width] = sign
    if not blank:
        shape = letters(word)
        inset = left + (width - shape.shape[1]) // 2
        picture[top + 1 : top + 1 + HEIGHT, inset : inset + shape.shape[1]][shape] = ink
    return picture
