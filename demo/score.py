"""Zero-shot accuracy of a demo model on every factor, and on landbird or waterbird by group (bird-place).

$ python -m demo.score                      # the checkpoint on the test split
$ python -m demo.score --world written      # the one that reads: with no sign, and with several
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from written import SAYS

from . import NAME, WRITTEN, Tokenizer, load, normalise, scenes
from .captions import PHRASES, true_facts
from .writing import WORDS, write_on

STARTS = ("a photo of", "a sketch of", "a painting of", "a cartoon of", "a picture of", "")
WATCHED = 3000  # the seed of the split that is scored during training
GROUPS = ("land-land", "land-water", "water-land", "water-water")


def prompts(factor: str, phrase: str) -> list[str]:
    """Captions that state one fact and leave the rest open."""
    if factor == "style":
        return [f"{phrase} a bird"]
    things = {"kind": f"a {phrase}", "type": f"a {phrase}", "colour": f"a {phrase} bird"}
    thing = things.get(factor, f"a bird {phrase}")
    return [f"{start} {thing}".strip() for start in STARTS]


@torch.no_grad()
def classifier(model: torch.nn.Module, tokenizer: Tokenizer, factor: str) -> Tensor:
    """[values, d] one unit vector per value of the factor: the mean of its normalised prompts, normalised."""
    rows = []
    for phrases in PHRASES[factor]:
        texts = [text for phrase in phrases for text in prompts(factor, phrase)]
        embeddings = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)
        rows.append(F.normalize(embeddings.mean(0), dim=0))
    return torch.stack(rows)


@torch.no_grad()
def score(model: torch.nn.Module, tokenizer: Tokenizer, count: int, seed: int = WATCHED) -> dict[str, float]:
    """{factor or group: accuracy} on `count` pictures in which bird and place are independent."""
    facts = scenes.sample(count, seed)
    pictures, truth = scenes.render_all(facts, seed), true_facts(facts)
    parts = np.array_split(pictures, max(1, count // 256))
    embeddings = torch.cat([model.encode_image(normalise(part)) for part in parts])
    scores = {}
    for column, factor in enumerate(PHRASES):
        right = (embeddings @ classifier(model, tokenizer, factor).T).argmax(1).numpy() == truth[:, column]
        scores[factor] = float(right.mean())
        if factor == "type":
            group = 2 * truth[:, column] + (facts["place"] >= scenes.FIRST_WATER)
            scores |= {name: float(right[group == g].mean()) for g, name in enumerate(GROUPS)}
    return scores


@torch.no_grad()
def score_written(
    model: torch.nn.Module, tokenizer: Tokenizer, count: int, seed: int = WATCHED
) -> dict[str, float]:
    """Shares of `count` pictures that are right with no sign, with another kind's name, with its own name.

    attacked: named after the bird although the sign names another kind; fooled: named after the sign; read:
    what the sign says, if asked that.
    """
    facts = scenes.sample(count, seed)
    pictures, rng = scenes.render_all(facts, seed), np.random.default_rng([seed, 2])
    seen = facts["kind"]
    other = (seen + rng.integers(1, len(WORDS), count)) % len(WORDS)

    def embed(words: np.ndarray | None, blank: bool = False) -> Tensor:
        draw, shown = np.random.default_rng([seed, 3]), pictures
        if words is not None:
            pairs = zip(pictures, words, strict=True)
            shown = np.stack([write_on(picture, WORDS[word], draw, blank=blank) for picture, word in pairs])
        parts = np.array_split(shown, max(1, count // 256))
        return torch.cat([model.encode_image(normalise(part)) for part in parts])

    kinds = classifier(model, tokenizer, "kind")
    says = [
        F.normalize(model.encode_text(tokenizer([s.format(word) for s in SAYS])), dim=-1) for word in WORDS
    ]
    says = torch.stack([F.normalize(rows.mean(0), dim=0) for rows in says])
    none, own, attacked, blank = embed(None), embed(seen), embed(other), embed(other, blank=True)

    def share(embedding: Tensor, classes: Tensor, truth: np.ndarray) -> float:
        return float(((embedding @ classes.T).argmax(1).numpy() == truth).mean())

    scores = {"kind": share(none, kinds, seen), "own": share(own, kinds, seen)}
    scores |= {"attacked": share(attacked, kinds, seen), "fooled": share(attacked, kinds, other)}
    scores |= {"blank": share(blank, kinds, seen), "read": share(attacked, says, other)}
    truth = true_facts(facts)
    for factor in ("colour", "place", "light", "style"):
        column = truth[:, list(PHRASES).index(factor)]
        scores[factor] = share(none, classifier(model, tokenizer, factor), column)
    return scores


def main() -> None:
    from demo.images import DemoBirds, DemoSigns

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=("birds", "written"), default="birds")
    parser.add_argument("--weights", default="", help="a checkpoint [the one that ships]")
    args = parser.parse_args()
    data, name, measure = DemoBirds, NAME, score
    if args.world == "written":
        data, name, measure = DemoSigns, WRITTEN, score_written
    model, _, tokenizer = load(weights=args.weights, name=name)
    for label, value in measure(model, tokenizer, data.sizes["test"], data.seeds["test"]).items():
        print(f"{label:<12}{value:6.1%}")


if __name__ == "__main__":
    main()
