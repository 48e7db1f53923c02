"""Rows of a table for the published ways to take a cue out (rivals.py), from the same texts and no labels.

What they need is made of the texts of --cue and the names of the classes:

* Orth-Proj takes the cue's texts as its prompts.
* Orth-Cal and PerceptionCLIP name class and cue together: JOINT, for each class and each text.
* RoboShot rejects, for any two classes, the difference of the two texts of the cue that are nearest to the
  one and to the other. It accepts the differences between classes in each of the prompt templates.
* TIE* guesses the cue of each image as the nearest text; its shifts are means over the reference images.
* LEACE takes the pseudo-labels by which heads are found (cue.py), on the same images.

TIE itself knows the true places, of reference and test images: a row to compare with, nothing to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from cue import CueVotes
from decompose import Decomposition
from files import InputError
from rivals import extremes, leace, orth_cal, orth_proj, perception_clip, roboshot, tie
from zeroshot import embed_texts, fill_templates, templates

from .accumulators import Sums
from .job import Job

if TYPE_CHECKING:
    from .removal import Cue, Further

JOINT = "a photo of a {}, {}"
FIRST, TRUE = "Orth-Proj (all texts)", "TIE (looks at labels)"
NOTE = """Published: Orth-Proj and Orth-Cal change the class texts, RoboShot, TIE* and LEACE the images;
PerceptionCLIP asks for class and cue together. "Directions in the class texts" is Orth-Proj, too, off the
directions in which the cue's texts differ most."""
OPENAI_SCALE = 100.0  # of cosines, where a model has none of its own


class Guesses(Sums):
    """Sums of unit embeddings of the reference images, by each way to tell their cue.

    They are told by pseudo-label ("vote"), by the nearest text ("nearest") and by the true place ("place"),
    where the images have one. Unit embeddings are the same in every protocol.
    """

    def __init__(self, votes: CueVotes, place: Tensor | None) -> None:
        super().__init__()
        self.votes, self.place = votes, place

    def update(self, embedding: Tensor, indices: Tensor) -> None:
        """Add images: embedding [b, d], indices in the data set."""
        texts = self.votes.texts
        z = F.normalize(embedding.to(texts), dim=1)
        ways = {
            "vote": (self.votes.labels(embedding), len(texts)),
            "nearest": (nearest(z, texts), len(texts)),
        }
        if self.place is not None:
            ways["place"] = self.place[indices], int(self.place.max()) + 1
        z = z.cpu().double()
        self.add("square", z.T @ z)
        for name, (label, size) in ways.items():
            members = F.one_hot(label.cpu(), size).double()  # [b, t]
            self.add(f"{name} count", members.sum(dim=0))
            self.add(name, members.T @ z)

    def shift(self, name: str, texts: Tensor) -> Tensor:
        """[t] each text's mean cosine with the images that have it; 0 where none has."""
        count = self[f"{name} count"].clamp_min(1)
        return ((self[name].to(texts.device, texts.dtype) * texts).sum(dim=1) / count.to(texts)).to(texts)

    def erasure(self) -> tuple[Tensor, Tensor]:
        """([d] mean, [d, d] projection) of LEACE on the pseudo-labels."""
        count = self["vote count"]
        mean = self["vote"].sum(dim=0) / count.sum()
        covariance = self["square"] / count.sum() - torch.outer(mean, mean)
        return mean, leace(covariance, (self["vote"] - count[:, None] * mean).T / count.sum())


def with_published_last(lines: list[list[str]], before: list[list[str]]) -> list[list[str]]:
    """The lines of a table with others before the published rows, and a heading above those."""
    first = next((i for i, line in enumerate(lines) if line[0] == FIRST), len(lines))
    heading = [["published, from the same texts", *[""] * (len(lines[0]) - 1)]] if lines[first:] else []
    return [*lines[:first], *before, *heading, *lines[first:]]


def nearest(embedding: Tensor, texts: Tensor) -> Tensor:
    """[b] the text nearest to each image: the zero-shot guess of the cue, without a centre."""
    return (embedding.to(texts) @ texts.T).argmax(dim=1)


def ways_without(
    job: Job,
    cue: Cue,
    ways: Sequence[str],
    names: Sequence[str],
    classes: Tensor,
    own: int,
    data: Dataset | None = None,
) -> Further:
    """The rows "texts" and "rivals" of --remove, where they are among the ways.

    Args:
        names: of all classes that are scored, [c, d] `classes`; the first `own` are to be told apart.
        data: the test images, where true places may be looked at.
    """
    found = {}
    if "texts" in ways:
        found["cue's directions in the class texts"] = by_texts(classes, orth_proj(cue.directions))
    return found | (published(job, cue, names, classes, own, data) if "rivals" in ways else {})


def by_texts(classes: Tensor, projection: Tensor) -> Callable:
    """Scores by the class texts after a projection [d, d], at unit length."""
    changed = F.normalize(classes @ projection.T.to(classes), dim=1)
    return lambda _, terms, indices: terms.embedding.to(changed) @ changed.T


def published(
    job: Job, cue: Cue, names: Sequence[str], classes: Tensor, own: int, data: Dataset | None
) -> Further:
    """The rows of rivals.py; their scores are those of `classes`."""
    texts, guesses, scale = cue.votes.texts, cue.guesses, getattr(job.clip.model, "logit_scale", None)
    scale = OPENAI_SCALE if scale is None else float(scale.detach().exp())
    try:
        joint = [JOINT.format(name, text) for name in names for text in cue.texts]
        joint = embed_texts(job.clip, joint, "classes with the cue").unflatten(0, (len(names), -1))
    except InputError as error:
        raise InputError(
            f"{error}; --remove without rivals asks for no class together with a text"
        ) from error
    filled = embed_texts(job.clip, fill_templates(names[:own], templates(job.clip))).unflatten(0, (own, -1))
    reject, accept = extremes(texts, classes[:own]), (filled - filled.mean(dim=0)).flatten(0, 1)
    shift, (mean, oblique) = guesses.shift("nearest", texts), (x.to(texts) for x in guesses.erasure())
    P0 = orth_proj(texts)
    images = {
        "RoboShot": lambda z, _: roboshot(z, reject),
        "  + classes accepted": lambda z, _: roboshot(z, reject, accept),
        "TIE*": lambda z, _: tie(z, nearest(z, texts), texts, shift),
        "LEACE": lambda z, _: z - (z - mean) @ oblique.T,
    }
    if data is not None:
        true = embed_texts(job.clip, data.place_texts)
        true_shift = guesses.shift("place", true)
        images[TRUE] = lambda z, indices: tie(z, data.place[indices].to(z.device), true, true_shift)

    def scored(run: Callable, terms: Decomposition, indices: Tensor) -> Tensor:
        return run(F.normalize(terms.embedding.to(classes), dim=1), indices) @ classes.T

    def perceive(_: Tensor, terms: Decomposition, indices: Tensor) -> Tensor:
        z = F.normalize(terms.embedding.to(joint), dim=1)
        return perception_clip(torch.einsum("bd,ctd->bct", z, joint), scale)

    rows = {FIRST: by_texts(classes, P0), "Orth-Cal": by_texts(classes, orth_cal(P0, joint[:own]))}
    rows["PerceptionCLIP"] = perceive
    return rows | {label: lambda _, *rest, run=run: scored(run, *rest) for label, run in images.items()}
