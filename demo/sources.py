"""Endless batches of pictures with captions, for training: birds, and birds beside written words."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import Tokenizer, captions, normalise, scenes
from .captions import STATED
from .writing import WORDS, write_on


class Source:
    """Endless batches of pictures with captions from one source.

    Args:
        count: number of pictures.
        seed, alignment: as for scenes.sample.
        habits: how often a caption states each fact, captions.GUIDE or captions.WEB.
        rng: draws the order and the captions.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        alignment: float,
        habits: dict[str, float],
        rng: np.random.Generator,
        tokenizer: Tokenizer,
    ) -> None:
        facts = scenes.sample(count, seed, alignment)
        self.pictures, self.truth = scenes.render_all(facts, seed), captions.true_facts(facts)
        self.habits, self.rng, self.tokenizer = habits, rng, tokenizer
        self.queue = np.empty(0, dtype=int)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """[b, 3, 64, 64] normalised pictures, [b, context] tokens, and [b, b] matches.

        matches[i, j] is 1.0 if caption i is true of picture j, and 0.0 otherwise.
        """
        if len(self.queue) < size:
            self.queue = self.rng.permutation(len(self.pictures))
        rows, self.queue = self.queue[:size], self.queue[size:]
        written = [captions.write(self.truth[i], self.habits, self.rng) for i in rows]
        texts, stated = zip(*written, strict=True)
        stated = np.stack(stated)[:, None]
        matches = ((stated < 0) | (stated == self.truth[rows])).all(-1)
        return normalise(self.pictures[rows]), self.tokenizer(texts), torch.from_numpy(matches).float()


class Signs:
    """Pictures of the guide with words on signs. A plain caption may name what is seen or what is written.

    One batch in three is explicit: every picture bears a random word, and the caption says that it is a word
    ("a red crow at sea with the word gull", "a sign saying gull"). In the other batches the noun of a caption
    is true of a picture if it names the bird or the word, and the pictures are of four sorts (SHARES).
    Without "either", the model would learn to look at the word alone wherever there is one.

    Args:
        count: number of pictures with a bird; there are an eighth as many without.
        seed: as for scenes.sample.
        rng: draws the order, the words, the signs and the captions.
    """

    # no word; the bird's own name; a random word, and a caption that names the bird or the word; a random
    # word in a place without a bird, and a caption that names the word
    SHARES = {"none": 0.3, "own": 0.2, "either": 0.4, "no bird": 0.1}  # noqa: RUF012
    NAMES_WORD = 0.6  # of the captions of "either"
    NAMES_WORD_ONLY = 150  # steps in which no explicit caption names the bird
    READING = 2000  # steps in which two batches of three are explicit
    # White signs with their letters within a row of patches are learnt first. From step WIDER on signs have
    # any colour, and every NEXT steps their letters may lie a pixel further off the row.
    WIDER, NEXT = 400, 300

    def __init__(self, count: int, seed: int, rng: np.random.Generator, tokenizer: Tokenizer) -> None:
        self.rng, self.tokenizer = rng, tokenizer
        facts, empty = scenes.sample(count, seed), scenes.sample(count // 8, seed + 500)
        self.pictures, self.truth = scenes.render_all(facts, seed), captions.true_facts(facts)
        self.places = scenes.render_all(empty, seed + 500, bird=False)
        self.truth_of_places = captions.true_facts(empty)
        self.truth_of_places[:, [STATED.index(name) for name in ("kind", "colour", "type")]] = -2  # no bird

    def batch(self, size: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """As Source.batch: normalised pictures, tokens, and [b, b] matches of captions and pictures."""
        explicit = step % 3 == 0 or (step % 3 == 1 and step < self.READING)
        sorts = self.rng.choice(list(self.SHARES), p=list(self.SHARES.values()), size=size)
        draw = self.explicit if explicit else self.plain
        pictures, texts, stated, truth = zip(*(draw(sort, step) for sort in sorts), strict=True)
        stated, truth = np.stack(stated)[:, None], np.stack(truth)  # [b, 1, 8] and [b, 8]
        true = (stated < 0) | (stated == truth)
        if not explicit:
            true[..., 0] |= stated[..., 0] == truth[:, -1]  # the noun names what is written
        matches = torch.from_numpy(true.all(-1)).float()
        return normalise(np.stack(pictures)), self.tokenizer(texts), matches

    def explicit(self, _: str, step: int) -> tuple[np.ndarray, str, np.ndarray, np.ndarray]:
        """A picture, a caption that says what is written, the facts that it states, and the true facts."""
        i, word, early = self.pick(self.pictures), self.pick(WORDS), step < self.NAMES_WORD_ONLY
        habits = {name: 0.7 * share for name, share in captions.GUIDE.items()}
        habits["kind"] = 0.0 if early else 0.65
        text, stated = captions.write(self.truth[i], habits, self.rng)
        if self.rng.random() < (0.6 if early else 0.2):
            text, stated, phrases = "", np.full_like(stated, -1), captions.ALONE
        else:
            phrases = captions.BESIDE
        text = f"{text} {phrases[self.pick(phrases)].format(WORDS[word])}".strip()
        picture = self.write(self.pictures[i], word, step)
        return picture, text, np.append(stated, word), np.append(self.truth[i], word)

    def plain(self, sort: str, step: int) -> tuple[np.ndarray, str, np.ndarray, np.ndarray]:
        """The same of a caption that does not say whether its noun is seen or written."""
        pictures, truth = self.pictures, self.truth
        if sort == "no bird":
            pictures, truth = self.places, self.truth_of_places
        i, word = self.pick(pictures), self.pick(WORDS)
        picture, noun, habits = pictures[i], truth[i, 0], captions.GUIDE
        if sort == "own":
            word = noun
        if sort == "none":
            word = -1
        else:
            picture = self.write(picture, word, step)
        if sort == "no bird" or (sort == "either" and self.rng.random() < self.NAMES_WORD):
            noun = word
        if sort == "no bird":
            habits = habits | {"kind": 1.0, "colour": 0.0}
        text, stated = captions.write(np.append(noun, truth[i, 1:]), habits, self.rng)
        return picture, text, np.append(stated, -1), np.append(truth[i], word if sort != "none" else -3)

    def write(self, picture: np.ndarray, word: int, step: int) -> np.ndarray:
        """The picture with this word on a sign, of which later steps allow more kinds."""
        jitter, inks = (0, 1) if step < self.WIDER else (1 + (step - self.WIDER) // self.NEXT, 3)
        return write_on(picture, WORDS[word], self.rng, jitter, inks)

    def pick(self, choices: object) -> int:
        return int(self.rng.integers(len(choices)))
