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
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from cue import CueVotes
from rivals import extremes, leace, orth_cal, orth_proj, perception_clip, roboshot, tie
from zeroshot import embed_texts, fill_templates, templates

from .accumulators import Sums
from .job import Job

if TYPE_CHECKING:
    from .removal import Cue, Further

JOINT = "a photo of a {}, {}"
FIRST = "Orth-Proj (all texts)"
MOST = 20_000  # prompts of class and cue, above which the rows that need them are left out
NOTE = "Published: see docs/cue.md. Directions in the class texts are Orth-Proj, too, with few directions."


class Guesses(Sums):
    """Sums of unit embeddings of the reference images, which every protocol shares, by how their cue is told.

    It is told by pseudo-label ("vote"), by the nearest text ("nearest"), and by the true "place" if known.
    """

    def __init__(self, votes: CueVotes, place: Tensor | None) -> None:
        super().__init__()
        self.votes, self.place = votes, place

    def update(self, embedding: Tensor, indices: Tensor) -> None:
        """Add images: embedding [b, d], indices in the data set."""
        texts = self.votes.texts
        z = F.normalize(embedding.to(texts), dim=1)
        labels = {"vote": self.votes.labels(embedding), "nearest": (z @ texts.T).argmax(dim=1)}
        labels |= {} if self.place is None else {"place": self.place[indices]}
        z = z.cpu().double()
        self.add("square", z.T @ z)
        for name, label in labels.items():
            members = F.one_hot(label.cpu(), len(texts)).double()  # [b, t]; two places, two texts at least
            self.add(f"{name} count", members.sum(dim=0))
            self.add(name, members.T @ z)

    def shift(self, name: str, texts: Tensor) -> Tensor:
        """[t] each text's mean cosine with the images that have it; 0 where none has."""
        means = self[name] / self[f"{name} count"].clamp_min(1)[:, None]
        return (means[: len(texts)].to(texts) * texts).sum(dim=1)

    def erasure(self) -> tuple[Tensor, Tensor]:
        """([d] mean, [d, d] projection) of LEACE on the pseudo-labels."""
        count, images = self["vote count"], self["vote count"].sum()
        mean = self["vote"].sum(dim=0) / images
        covariance = self["square"] / images - torch.outer(mean, mean)
        return mean, leace(covariance, (self["vote"] - count[:, None] * mean).T / images)


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
    if "rivals" in ways:
        P0 = orth_proj(cue.votes.texts)
        found[FIRST] = by_texts(classes, P0)
        joint = [JOINT.format(name, text) for name in names for text in cue.texts]
        if len(joint) > MOST:
            job.notes[f"no Orth-Cal, no PerceptionCLIP: they need {len(joint):,} prompts"] = None
        else:
            joint = embed_texts(job.clip, joint, "classes with the cue").unflatten(0, (len(names), -1))
            found["Orth-Cal"] = by_texts(classes, orth_cal(P0, joint[:own]))
            found["PerceptionCLIP"] = by_images(classes, partial(perceive, job, joint))
        for label, run in of_images(job, cue, names[:own], classes[:own], data).items():
            found[label] = by_images(classes, lambda z, i, run=run: run(z, i) @ classes.T)
    return found


def by_texts(classes: Tensor, projection: Tensor) -> Callable:
    """Scores by the class texts after a projection [d, d], at unit length."""
    changed = F.normalize(classes @ projection.T.to(classes), dim=1)
    return lambda _, terms, indices: terms.embedding.to(changed) @ changed.T


def by_images(classes: Tensor, run: Callable) -> Callable:
    """Scores that `run` makes of images at unit length and their indices."""
    return lambda _, terms, indices: run(F.normalize(terms.embedding.to(classes), dim=1), indices)


def perceive(job: Job, joint: Tensor, z: Tensor, _: Tensor) -> Tensor:
    """[b, c] PerceptionCLIP's scores, prompts [c, t, d]."""
    scale = getattr(job.clip.model, "logit_scale", torch.tensor(100.0).log())
    return perception_clip(torch.einsum("bd,ctd->bct", z, joint), float(scale.detach().exp()))


def of_images(job: Job, cue: Cue, names: Sequence[str], classes: Tensor, data: Dataset | None) -> dict:
    """{label: a function from images at unit length and their indices to changed images}."""
    texts, prompts = cue.votes.texts, fill_templates(names, templates(job.clip))
    filled = embed_texts(job.clip, prompts).unflatten(0, (len(names), -1))  # [c, templates, d]
    reject, accept = extremes(texts, classes), (filled - filled.mean(dim=0)).flatten(0, 1)
    shift = cue.guesses.shift("nearest", texts)
    mean, oblique = (x.to(texts) for x in cue.guesses.erasure())
    rows = {
        "RoboShot": lambda z, _: roboshot(z, reject),
        "  + classes accepted": lambda z, _: roboshot(z, reject, accept),
        "TIE*": lambda z, _: tie(z, (z @ texts.T).argmax(dim=1), texts, shift),
        "LEACE": lambda z, _: z - (z - mean) @ oblique.T,
    }
    if data is not None:
        true = embed_texts(job.clip, data.place_texts)
        moved = cue.guesses.shift("place", true)
        rows["TIE (looks at labels)"] = lambda z, i: tie(z, data.place[i].to(z.device), true, moved)
    return rows


def with_published_last(lines: list[list[str]], before: list[list[str]]) -> list[list[str]]:
    """The lines of a table with others before the published rows, and a heading above those."""
    first = next((i for i, line in enumerate(lines) if line[0] == FIRST), len(lines))
    heading = [["published, from the same texts", *[""] * (len(lines[0]) - 1)]] if lines[first:] else []
    return [*lines[:first], *before, *heading, *lines[first:]]
