"""What waterbirds and debias share: find the heads that look at a cue, and score images without it.

Every intervention changes the embedding by a sum of terms, and a class score is the embedding's dot product
with the class, up to a positive factor that does not change which class wins. So one pass over the test
images takes each term's dot product with each class, and every intervention, the random ones too, is a
weighted sum of those: a row of zeros and ones. Nothing is kept of an image.

Axes: k interventions, n images, c classes, L layers, H heads, t terms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product
from math import comb, prod

import torch
from torch import Tensor
from torch.utils.data import Dataset

import report
from cue import THRESHOLD, CueVotes, subspace
from decompose import Decomposition, head_maps
from files import InputError, did_you_mean
from forward import class_values, forward_without
from zeroshot import embed_texts

from .accumulators import Accumulator, Sums
from .heads import LAST_LAYERS, Head, head_name, parse_heads
from .job import Job, open_split
from .passes import one_pass
from .reference import Reference, centre, summarise
from .rivals import Guesses
from .tables import images_per_text

# Section 4 of the paper; its authors' list for ViT-L-14 has 22.12 twice, here it stands once.
PAPER_HEADS = {
    "ViT-B-16": "9.6,9.8,10.10,10.11,11.0,11.3,11.6",
    "ViT-L-14": "21.1,21.3,21.6,21.8,21.11,21.13,21.14,22.2,22.12,22.13,22.15,23.1,23.3,23.5,23.6",
    "ViT-H-14": "29.4,29.8,29.14,30.6,30.11,30.12,30.15,31.8,31.12",
}
Heads = Collection[Head]


@dataclass
class Cue:
    """A cue, the heads that look at it, and what the reference images say."""

    texts: list[str]
    name: str
    directions: Tensor  # [k, d] orthonormal
    votes: CueVotes
    guesses: Guesses
    reference: Reference
    explained: Tensor  # [L, H] share of each head's variance
    heads: list[Head]
    how: str  # the heads were chosen

    def settings(self) -> dict[str, str]:
        """Lines for the settings above a table."""
        listed = f"{', '.join(map(head_name, self.heads))} ({self.how})"
        heads = listed if self.heads else "none: the embedding as a whole"
        count = self.votes.count
        votes = images_per_text(int(count.sum()), int((count > 0).sum()), len(count))
        cue = f"{self.name}, {len(self.directions)} directions; {votes}"
        return {"heads": heads, "cue": cue, "sum": self.reference.sum_error()}

    def results(self) -> dict[str, list]:
        """For results.json."""
        return {"explained": self.explained.tolist(), "heads": [list(head) for head in self.heads]}


def look_for_cue(job: Job, test: Dataset | None = None) -> Cue:
    """The cue of --cue and the heads of --heads, in a pass over the reference images; no labels are used."""
    texts, title = find_cue(job, getattr(test, "cue", ["places"]))
    return cue_of(job, texts, title, embed_texts(job.clip, texts))


def cue_of(job: Job, texts: list[str], title: str, embeddings: Tensor, data: Dataset | None = None) -> Cue:
    """The same for texts with these embeddings [t, d]; data: reference images in place of the split's."""
    maps = head_maps(job.clip.model)
    given, how = given_heads(job, *maps.shape[:2])
    directions = subspace(embeddings)
    if not len(directions):
        raise InputError(f"the texts of the cue ({title}) do not differ for this model: give texts that do")
    data = open_split(job, job.args.reference) if data is None else data
    votes = CueVotes(embeddings, maps, centre(job, data))
    guesses = Guesses(votes, getattr(data, "place", None))

    def update(terms: Decomposition, indices: Tensor) -> None:
        votes.update(terms.embedding, terms.values)
        guesses.update(terms.embedding, indices)

    reference = summarise(job, [votes, guesses], data, update)
    explained = votes.explained(reference.values)
    needs_heads = {"heads", "directions", "forward"} & set(job.args.remove)
    heads = given or (auto_heads(explained, title) if needs_heads else [])
    return Cue(texts, title, directions, votes, guesses, reference, explained, heads, how)


def find_cue(job: Job, default: Sequence[str]) -> tuple[list[str], str]:
    """(texts, their description) of --cue, or of the data's own: a category of the bank, or texts."""
    bank, cue = job.load_bank(), job.args.cue or default
    if len(cue) == 1 and cue[0] in bank.categories:
        return bank.of(cue[0]), f"category {cue[0]!r} of {bank.name}"
    if len(cue) == 1:
        known = ", ".join(sorted(set(bank.categories)))
        hint = "and one text has nothing to be told from: give a category or at least two texts"
        near = did_you_mean(cue[0], bank.categories)
        raise InputError(f"--cue {cue[0]!r} is no category of {bank.path} ({known}), {hint}{near}")
    return list(cue), f"{cue[0]!r} and {len(cue) - 1} more"


def given_heads(job: Job, depth: int, heads: int) -> tuple[list[Head], str]:
    """(heads of --heads, where they come from, in words); no heads yet where it says auto."""
    asked, model = job.args.heads, job.clip.name
    if asked == "auto":
        rule = f"the cue explains over {THRESHOLD:.0%} of what they write on the reference images"
        return [], f"auto: {rule}; no labels used"
    if asked != "paper":
        return parse_heads(asked, depth, heads), "given by hand"
    if model not in PAPER_HEADS:
        there = f"the paper lists heads of {', '.join(PAPER_HEADS)}, not of {model}"
        raise InputError(f"--heads paper: {there}; use auto or a list")
    return parse_heads(PAPER_HEADS[model], depth, heads), "the paper's list"


def auto_heads(explained: Tensor, cue_name: str) -> list[Head]:
    """The heads that look at the cue."""
    chosen = [(layer, head) for layer, head in (explained > THRESHOLD).nonzero().tolist()]
    if not chosen:
        layer, head = divmod(int(explained.argmax()), explained.shape[1])
        most = f"it explains at most {explained.max():.0%} of a head's variance (head {layer}.{head})"
        hint = f"below {THRESHOLD:.0%}; name heads with --heads or another --cue"
        raise InputError(f"no head looks at the cue ({cue_name}): {most}, {hint}")
    return chosen


# The fields of Scores that an intervention can add, in the order of the columns of a Plan's rows.
TERMS = ("heads", "mlps", "stem", "heads_cue", "embedding_cue", "further")
# Interventions that are no sum of terms: by label, from images, their terms and indices to scores [b, c].
Further = dict[str, Callable[[Tensor, Decomposition, Tensor], Tensor]]


@dataclass
class Scores:
    """Dot products with every class: of the embedding, and of what each term would add to it."""

    embedding: Tensor  # [n, c]
    heads: Tensor  # [n, L, H, c] mean - term
    mlps: Tensor  # [n, L, c] mean - term
    stem: Tensor  # [n, c] mean - term
    heads_cue: Tensor  # [n, L, H, c] (mean - term), projected onto the cue's directions
    embedding_cue: Tensor  # [n, c] (mean - embedding), projected onto the cue's directions
    further: Tensor  # [n, m, c] what each further intervention changes
    label: Tensor  # [n] the cue's text that fits the image best

    def after(self, rows: Tensor) -> Tensor:
        """[k, n, c] class scores after each intervention, rows [k, t] of `Plan`."""
        images, classes = self.embedding.shape
        terms = torch.cat([getattr(self, term).reshape(images, -1, classes) for term in TERMS], dim=1)
        return self.embedding + torch.einsum("kt,ntc->knc", rows.to(self.embedding), terms)


def scorer(
    reference: Reference, directions: Tensor, votes: CueVotes, classes: Tensor, further: Further | None = None
) -> Callable[[Tensor, Decomposition], Scores]:
    """From a batch, its terms and indices to its Scores; directions [k, d] of the cue, orthonormal."""
    classes_cue = directions.T @ (directions @ classes.T)  # [d, c] the classes' part along the cue
    read, read_cue = reference.read(classes), reference.read(classes_cue.T)  # [L, H, e, c]
    mean, mean_embedding = reference.values.mean.to(read), reference.embedding.mean.to(read)

    def scores(images: Tensor, terms: Decomposition, indices: Tensor | None = None) -> Scores:
        embedding, away = terms.embedding.to(mean), mean - terms.values
        base = embedding @ classes.T
        changes = [run(images, terms, indices).to(base) - base for run in (further or {}).values()]
        return Scores(
            base,
            torch.einsum("bLHe,LHec->bLHc", away, read),
            (reference.mlps - terms.mlps) @ classes.T,
            (reference.stem - terms.stem) @ classes.T,
            torch.einsum("bLHe,LHec->bLHc", away, read_cue),
            (mean_embedding - embedding) @ classes_cue,
            torch.stack([base, *changes], dim=1)[:, 1:],  # [b, 0, c] where there are none
            votes.labels(embedding),
        )

    return scores


def score(
    job: Job,
    test: Dataset,
    cue: Cue,
    classes: Tensor,
    *accumulators: Accumulator,
    further: Further | None = None,
) -> Iterator[tuple[Scores, Tensor]]:
    """One pass over the test images, in batches: (scores, indices)."""
    scores = scorer(cue.reference, cue.directions, cue.votes, classes, further)
    for images, indices in one_pass(job, test, "test", *accumulators):
        yield scores(images, cue.reference.terms_of(job.clip.model, images), indices), indices


def without_heads_forward(job: Job, heads: Heads, classes: Tensor, data: Dataset | None = None) -> Further:
    """Running the model while these heads give the class token their mean over the reference images.

    The means take a pass of their own.
    """
    data, model = open_split(job, job.args.reference) if data is None else data, job.clip.model
    total = Sums()
    for images, _ in one_pass(job, data, "forward means", total):
        total.add("values", class_values(model, images).cpu().double().sum(dim=0))
    mean = total["values"] / len(data)
    run = lambda images, *_: forward_without(model, images, heads, mean).to(classes) @ classes.T  # noqa: E731
    return {"heads in the forward pass": run}


class Plan:
    """The interventions as rows of zeros and ones [k, t]: which of the TERMS each adds.

    Args:
        ways: of --remove.
        shape: (L, H).
        chosen: heads.
        draws: other sets of heads, for the random control; they are mean-ablated.
        further: labels of interventions that are no sum of terms.
        last: likewise, of rows that come last.
    """

    def __init__(
        self,
        ways: Sequence[str],
        shape: tuple[int, int],
        chosen: Heads,
        draws: Sequence[Heads] = (),
        further: Collection[str] = (),
        last: Collection[str] = (),
    ) -> None:
        depth, heads = shape
        self.shape, self.further = shape, [*further, *last]
        rows = {"base": self.row()}
        if "heads" in ways:
            whole = self.row(heads=chosen)
            rows["heads mean-ablated"] = whole
            whole = whole + self.row(mlps=True, stem=True)
            rows["  + MLPs and stem"] = whole
            if depth > LAST_LAYERS:
                early = {(layer, head) for layer in range(depth - LAST_LAYERS) for head in range(heads)}
                rows["  + earlier layers"] = whole + self.row(heads=early - set(chosen))
        if "directions" in ways:
            rows["cue's directions in the heads"] = self.row(directions=chosen)
        rows |= {label: self.row(further=label) for label in further}
        if "embedding" in ways:
            rows["cue's directions everywhere"] = self.row(everywhere=True)
        rows |= {label: self.row(further=label) for label in last}
        self.labels = list(rows)
        self.rows = torch.stack(list(rows.values()))  # [k, t] the interventions of the table
        self.chosen = self.row(heads=chosen)[None]  # [1, t] the chosen heads mean-ablated
        self.draws = torch.stack([self.row(heads=drawn) for drawn in draws]) if draws else self.rows[:0]
        others = other_sets(chosen, heads)
        drawn = f"all {others}" if len(draws) == others else f"{len(draws)} of the {others:,}"
        self.sets = f"{drawn} other sets of as many heads per layer"

    def row(
        self,
        heads: Heads = (),
        mlps: bool = False,
        stem: bool = False,
        directions: Heads = (),
        everywhere: bool = False,
        further: str = "",
    ) -> Tensor:
        """[t]: heads, MLPs and stem to mean-ablate, the cue's directions in heads or in the embedding."""
        depth, width = self.shape
        masks = {term: torch.zeros(depth, width) for term in ("heads", "heads_cue")}
        for term, members in (("heads", heads), ("heads_cue", directions)):
            for head in members:
                masks[term][head] = 1
        masks |= {"mlps": torch.full((depth,), float(mlps)), "stem": torch.tensor([float(stem)])}
        masks["embedding_cue"] = torch.tensor([float(everywhere)])
        masks["further"] = torch.tensor([float(label == further) for label in self.further])
        return torch.cat([masks[term].flatten() for term in TERMS])


def in_blocks(results: list, blocks: Sequence[Tensor]) -> list[list]:
    """The results for the rows of torch.cat(blocks), as a list for each block."""
    remaining = iter(results)
    return [list(islice(remaining, len(block))) for block in blocks]


def random_heads(chosen: list[Head], width: int, draws: int, seed: int) -> list[list[Head]]:
    """Different sets of as many heads per layer as were chosen, never the chosen set: `draws`, or all."""
    per_layer = Counter(layer for layer, _ in chosen)
    if other_sets(chosen, width) <= draws:
        picks = product(*(combinations(range(width), count) for count in per_layer.values()))
        every = [
            [(layer, i) for layer, row in zip(per_layer, pick, strict=True) for i in row] for pick in picks
        ]
        return [heads for heads in every if set(heads) != set(chosen)]
    generator = torch.Generator().manual_seed(seed)
    found: dict[frozenset[Head], list[Head]] = {}
    while len(found) < draws:
        drawn = []
        for layer, count in per_layer.items():
            drawn += [(layer, head) for head in torch.randperm(width, generator=generator)[:count].tolist()]
        if set(drawn) != set(chosen):
            found.setdefault(frozenset(drawn), drawn)
    return list(found.values())


def other_sets(chosen: Heads, width: int) -> int:
    """How many other sets of as many heads per layer there are."""
    return prod(comb(width, count) for count in Counter(layer for layer, _ in chosen).values()) - 1


def page_of_heads(results: dict) -> report.Html:
    """The heads by what the cue explains of them, from the results of a task that takes a cue out."""
    shares = {(i, j): share for i, row in enumerate(results["explained"]) for j, share in enumerate(row)}
    roles = {head: "chosen" if [*head] in results["heads"] else "not chosen" for head in shares}
    heads = [report.Head(*head, roles[head], share) for head, share in shares.items()]
    words = "Share of each head's variance between images that different texts of the cue fit best."
    return report.section("Which heads look at the cue", words, report.head_grid(heads))
