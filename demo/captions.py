"""Captions for the demo's pictures, from two simulated sources, with the facts that each caption states.

The guide (a field guide) names the kind of bird, wherever the bird happens to be. The simulated web captions
say "landbird" or "waterbird", and nearly always show the bird where such birds live. So the two words come to
mean the place as much as the bird, as they do for CLIP models trained on real photographs.
"""

from __future__ import annotations

import numpy as np

from .scenes import FACTORS, FIRST_WATER

PHRASES: dict[str, list[list[str]]] = {
    "kind": [[kind] for kind in FACTORS["kind"]],
    "colour": [
        ["red", "red", "scarlet"],
        ["blue", "blue", "azure"],
        ["green", "green", "emerald"],
        ["yellow", "yellow", "golden"],
        ["white", "white", "snowy"],
        ["black", "black", "inky"],
        ["brown", "brown", "chestnut"],
        ["pink", "pink", "rosy"],
    ],
    "place": [
        ["in a forest", "among trees in the forest", "with a forest background", "in the woods"],
        ["in a field", "in a grass field", "with a field background", "in a meadow"],
        ["in a desert", "in the sandy desert", "with a desert background", "among cactus plants"],
        ["in the mountains", "on a mountain", "with a mountain background", "below snowy peaks"],
        ["at sea", "on the open sea", "with a sea background", "on the ocean"],
        ["on a lake", "by a calm lake", "with a lake background", "among reeds by a lake"],
        ["by a river", "next to a river", "with a river background", "by a winding stream"],
        ["on a beach", "at the beach", "with a beach background", "on the shore"],
    ],
    "light": [
        ["during the day", "in daylight", "on a bright day"],
        ["at night", "in the dark", "under the stars"],
        ["at sunset", "in the evening light", "under an orange sky"],
        ["in fog", "in the mist", "on a foggy day"],
    ],
    "style": [
        ["a photo of", "a photograph of", "a grainy photo of"],
        ["a sketch of", "a drawing of", "a pencil drawing of"],
        ["a painting of", "an oil painting of", "a watercolour of"],
        ["a cartoon of", "a comic of", "a cartoon drawing of"],
    ],
    "type": [["landbird"], ["waterbird"]],
    "ground": [
        ["on land", "with a land background", "on dry ground"],
        ["on water", "with a water background", "near the water"],
    ],
}
PLAIN_STARTS = ["", "", "an image of", "a picture of"]
# For pictures with a word on a sign (writing.py): what a caption adds about it, or says of nothing else.
BESIDE = ["with the word {}", "with a sign saying {}", "and a label saying {}", "with {} written on a sign"]
ALONE = ["the word {}", "a sign saying {}", "a label saying {}", "a sign with the word {}"]
STATED = tuple(PHRASES)  # the columns of a fact vector

# How often a caption of each source states a fact. A caption that states neither kind nor type says "bird".
GUIDE = {
    "kind": 0.95,
    "type": 0.0,
    "colour": 0.45,
    "place": 0.35,
    "ground": 0.05,
    "light": 0.25,
    "style": 0.25,
}
WEB = {"kind": 0.0, "type": 0.9, "colour": 0.35, "place": 0.35, "ground": 0.05, "light": 0.25, "style": 0.35}


def true_facts(facts: dict[str, np.ndarray]) -> np.ndarray:
    """[count, 7] int8: the true facts of each picture, in the order of STATED."""
    derived = {"type": facts["kind"] >= FIRST_WATER, "ground": facts["place"] >= FIRST_WATER}
    return np.stack([(facts | derived)[name] for name in STATED], axis=1).astype(np.int8)


def write(truth: np.ndarray, habits: dict[str, float], rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """One caption for a picture with these true facts, and [7] int8, the facts it states (-1: not stated)."""
    states = {name: rng.random() < habits[name] for name in STATED}
    states["ground"] &= not states["place"]  # the place implies the ground
    stated = np.where([states[name] for name in STATED], truth, -1).astype(np.int8)

    def pick(phrases: list[str]) -> str:
        return phrases[rng.integers(len(phrases))]

    values = {name: value for name, value in zip(STATED, stated, strict=True) if value >= 0}
    words = {name: pick(PHRASES[name][value]) for name, value in values.items()}
    start = words.get("style") or pick(PLAIN_STARTS)
    noun = words.get("kind") or words.get("type") or "bird"
    endings = [words[name] for name in ("place", "ground", "light") if name in words]
    rng.shuffle(endings)
    article = pick(["a", "a", "the", "one"])
    return " ".join(filter(None, [start, article, words.get("colour"), noun, *endings])), stated


def vocabulary(written: bool = False) -> list[str]:
    """Every word that a caption can contain, sorted; `written`: those about words on signs, too."""
    phrases = [phrase for values in PHRASES.values() for value in values for phrase in value]
    phrases += [phrase.format("") for phrase in BESIDE + ALONE] if written else []
    return sorted(set(" ".join([*phrases, *PLAIN_STARTS, "a an the one bird birds"]).split()))
