"""What waterbirds and debias share: find the heads that look at a cue, and score every image with and without what they write.

Every intervention changes the embedding by a sum of terms, and a class score is the embedding's dot product with the class, up to
a positive factor that does not change which class wins. So one pass over the test images takes each term's dot product with each
class, and every intervention, the random ones too, is a weighted sum of those: a row of zeros and ones. Nothing is kept of an image.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cue import THRESHOLD, CueVotes, subspace
from data import InputError
from decompose import Decomposition, decompose, head_maps
from zeroshot import Clip, default_bank, embed_texts, load_bank

from .common import LAST_LAYERS, Head, Reference, centre, name, parse_heads, summarise
from .passes import one_pass

# Section 4 of the paper; its authors' list for ViT-L-14 has 22.12 twice, here it stands once.
PAPER_HEADS = {
    "ViT-B-16": "9.6,9.8,10.10,10.11,11.0,11.3,11.6",
    "ViT-L-14": "21.1,21.3,21.6,21.8,21.11,21.13,21.14,22.2,22.12,22.13,22.15,23.1,23.3,23.5,23.6",
    "ViT-H-14": "29.4,29.8,29.14,30.6,30.11,30.12,30.15,31.8,31.12",
}


@dataclass
class Cue:
    """A cue, the heads that look at it, and what the reference images say."""

    texts: list[str]
    name: str
    directions: Tensor  # [k, d] orthonormal
    votes: CueVotes
    reference: Reference
    explained: Tensor  # [L, H] share of each head's variance
    heads: list[Head]
    how: str  # the heads were chosen

    def words(self) -> dict[str, str]:
        """Lines for the settings above a table."""
        return {
            "heads": f"{', '.join(map(name, self.heads))} ({self.how})"
            if self.heads
            else "none: the embedding as a whole",
            "cue": f"{self.name}, {len(self.texts)} texts, {len(self.directions)} directions",
        }


def look_for_cue(args: Namespace, clip: Clip) -> Cue:
    """One pass over the reference images; no labels."""
    maps = head_maps(clip.model)
    given, how = given_heads(args, clip, *maps.shape[:2])
    texts, title = find_cue(args, clip)
    embeddings = embed_texts(clip, texts)
    directions = subspace(embeddings)
    if not len(directions):
        raise InputError(f"the texts of the cue ({title}) do not differ for this model: give texts that do")
    votes = CueVotes(embeddings, maps, centre(clip, args))
    reference = summarise(
        clip, args, votes, update=lambda terms, _: votes.update(terms.embedding, terms.values)
    )
    explained = votes.explained(reference.values)
    needs_heads = {"heads", "directions"} & set(args.remove)
    heads = given or (auto_heads(explained, title) if needs_heads else [])
    return Cue(texts, title, directions, votes, reference, explained, heads, how)


def find_cue(args: Namespace, clip: Clip) -> tuple[list[str], str]:
    """--cue: a category of the bank, or texts."""
    bank = load_bank(args.text_bank or default_bank(clip))
    if len(args.cue) == 1 and args.cue[0] in bank.categories:
        return bank.of(args.cue[0]), f"category {args.cue[0]!r} of {bank.path.name}"
    if len(args.cue) == 1:
        raise InputError(
            f"--cue {args.cue[0]!r} is no category of {bank.path} ({', '.join(sorted(set(bank.categories)))}), "
            "and one text has nothing to be told from: give a category or at least two texts"
        )
    return list(args.cue), f"{args.cue[0]!r} and {len(args.cue) - 1} more"


def given_heads(args: Namespace, clip: Clip, depth: int, heads: int) -> tuple[list[Head], str]:
    """What --heads says, and in words where it comes from; no heads yet where it says auto."""
    if args.heads == "auto":
        return (
            [],
            f"auto: the cue explains over {THRESHOLD:.0%} of what they write on the reference images; no labels used",
        )
    if args.heads != "paper":
        return parse_heads(args.heads, depth, heads), "given by hand"
    if clip.name not in PAPER_HEADS:
        raise InputError(
            f"--heads paper: the paper lists heads of {', '.join(PAPER_HEADS)}, not of {clip.name}; use auto or a list"
        )
    return parse_heads(PAPER_HEADS[clip.name], depth, heads), "the paper's list"


def auto_heads(explained: Tensor, cue_name: str) -> list[Head]:
    """The heads that look at the cue."""
    chosen = [(layer, head) for layer, head in (explained > THRESHOLD).nonzero().tolist()]
    if not chosen:
        layer, head = divmod(int(explained.argmax()), explained.shape[1])
        raise InputError(
            f"no head looks at the cue ({cue_name}): it explains at most {explained.max():.0%} of a head's variance (head "
            f"{layer}.{head}), below {THRESHOLD:.0%}; name heads with --heads or another --cue"
        )
    return chosen


@dataclass
class Scores:
    """Dot products with every class c, for some images: of the embedding, and of what each intervention would add to it."""

    embedding: Tensor  # [n, c]
    heads: Tensor  # [n, L, H, c] mean - term
    mlps: Tensor  # [n, L, c] mean - term
    stem: Tensor  # [n, c] mean - term
    heads_cue: Tensor  # [n, L, H, c] (mean - term), projected onto the cue's directions
    embedding_cue: Tensor  # [n, c] (mean - embedding), projected onto the cue's directions
    label: Tensor  # [n] the cue's text that fits the image best

    def after(self, rows: Tensor) -> Tensor:
        """[k, n, c] class scores after each intervention, rows [k, terms] of `Plan`."""
        terms = [
            self.heads.flatten(1, 2),
            self.mlps,
            self.stem[:, None],
            self.heads_cue.flatten(1, 2),
            self.embedding_cue[:, None],
        ]
        return self.embedding + torch.einsum("kt,ntc->knc", rows.to(self.embedding), torch.cat(terms, dim=1))


class Scorer:
    """From the terms of a batch to its Scores.

    Args:
        directions: [k, d] of the cue, orthonormal.
        classes: [c, d].
    """

    def __init__(self, reference: Reference, directions: Tensor, votes: CueVotes, classes: Tensor) -> None:
        maps = reference.maps
        self.reference, self.votes, self.classes = reference, votes, classes
        self.classes_cue = directions.T @ (directions @ classes.T)  # [d, c] the classes' part along the cue
        self.read, self.read_cue = maps @ classes.T, maps @ self.classes_cue  # [L, H, e, c]
        self.mean, self.mean_embedding = reference.values.mean.to(maps), reference.embedding.mean.to(maps)

    def __call__(self, terms: Decomposition) -> Scores:
        embedding, away = terms.embedding.to(self.mean), self.mean - terms.values
        return Scores(
            embedding @ self.classes.T,
            torch.einsum("bLHe,LHec->bLHc", away, self.read),
            (self.reference.mlps - terms.mlps) @ self.classes.T,
            (self.reference.stem - terms.stem) @ self.classes.T,
            torch.einsum("bLHe,LHec->bLHc", away, self.read_cue),
            (self.mean_embedding - embedding) @ self.classes_cue,
            self.votes.labels(embedding),
        )


def score(
    clip: Clip, args: Namespace, test: Dataset, cue: Cue, classes: Tensor, *parts: Any
) -> Iterator[tuple[Scores, Tensor]]:
    """One pass over the test images, in batches: (scores, indices)."""
    scorer = Scorer(cue.reference, cue.directions, cue.votes, classes)
    for images, indices in one_pass(clip, test, args, "test", *parts):
        yield scorer(decompose(clip.model, images)), indices


def collect(batches: Iterator[tuple[Scores, Tensor]]) -> Scores:
    """The scores of all images, to try many things on few."""
    found = [scores for scores, _ in batches]
    return Scores(
        *(torch.cat([getattr(scores, field.name).cpu() for scores in found]) for field in fields(Scores))
    )


class Plan:
    """The interventions as rows of zeros and ones: which terms each takes out.

    Args:
        ways: of --remove.
        shape: (L, H).
        chosen: heads.
        draws: other sets of heads, for the random control; they are mean-ablated.
    """

    def __init__(
        self,
        ways: Sequence[str],
        shape: tuple[int, int],
        chosen: list[Head],
        draws: Sequence[list[Head]] = (),
    ) -> None:
        depth, heads = shape
        self.shape = shape
        rows = {"base": self.row()}
        if "heads" in ways:
            rows["heads mean-ablated"] = whole = self.row(heads=chosen)
            rows["  + MLPs and stem"] = whole = whole + self.row(others=True)
            if depth > LAST_LAYERS:
                early = {(layer, head) for layer in range(depth - LAST_LAYERS) for head in range(heads)}
                rows["  + earlier layers"] = whole + self.row(heads=early - set(chosen))
        if "directions" in ways:
            rows["cue's directions in the heads"] = self.row(directions=chosen)
        if "embedding" in ways:
            rows["cue's directions everywhere"] = self.row(everywhere=True)
        self.labels = list(rows)
        self.chosen = torch.stack([self.row(heads=chosen)])  # [1, terms]
        self.rows = torch.stack(list(rows.values()))  # [k, terms]
        self.draws = torch.stack([self.row(heads=drawn) for drawn in draws]) if draws else self.rows[:0]

    def row(
        self,
        heads: Iterable[Head] = (),
        others: bool = False,
        directions: Iterable[Head] = (),
        everywhere: bool = False,
    ) -> Tensor:
        """[terms]: heads to mean-ablate, MLPs and stem, the cue's directions in heads, or in the whole embedding."""
        depth, width = self.shape
        row = [torch.zeros(depth, width), torch.full((depth + 1,), float(others)), torch.zeros(depth, width)]
        for mask, those in ((row[0], heads), (row[2], directions)):
            for layer, head in those:
                mask[layer, head] = 1
        return torch.cat([*(part.flatten() for part in row), torch.tensor([float(everywhere)])])


def pick(scores: Tensor, chosen: list[Head]) -> Tensor:
    """[n, c] the sum over the chosen heads of scores [n, L, H, c]."""
    layers, heads = zip(*chosen, strict=True) if chosen else ((), ())
    return scores[:, list(layers), list(heads)].sum(dim=1)


def random_heads(chosen: list[Head], width: int, draws: int, seed: int) -> list[list[Head]]:
    """As many heads in each layer as were chosen there, but never the chosen set itself; none where there is no other."""
    generator, per_layer = torch.Generator().manual_seed(seed), Counter(layer for layer, _ in chosen)
    if all(count == width for count in per_layer.values()):  # true of no heads, too
        return []
    found = []
    while len(found) < draws:
        drawn = [
            (layer, h)
            for layer, count in per_layer.items()
            for h in torch.randperm(width, generator=generator)[:count].tolist()
        ]
        if set(drawn) != set(chosen):
            found.append(drawn)
    return found
