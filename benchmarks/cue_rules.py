"""How well are a cue's heads found without labels? Rules side by side on the demo, where the truth is known.

    $ python -m benchmarks.cue_rules                                # the demo's model
    $ python -m benchmarks.cue_rules --weights FILE                 # another one that demo.train has made

A head truly looks at the cue if the true place (8 values) explains over 30 % of its variance on the reference
images. The accuracies are those of --task waterbirds on the test split: with the rule's heads mean-ablated,
and with only the cue's directions removed from them ("dir.").
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import demo
from benchmarks.cue_study import collect, measure, pick
from cue import THRESHOLD, CueVotes, subspace
from decompose import Decomposition, head_maps
from demo.images import DemoBirds
from options import parse_args
from tasks.heads import Head
from tasks.job import Job
from tasks.reference import Reference, centre, summarise
from tasks.removal import score
from tasks.tables import table
from textspan import textspan
from zeroshot import Bank, Clip, classifier, default_bank, embed_texts, load_bank, templates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=demo.FOLDER / f"{demo.NAME}.safetensors")
    weights = parser.parse_args().weights
    job = Job(parse_args(["--task", "waterbirds"]))
    model, preprocess, tokenizer = demo.load(weights=weights)
    clip = Clip(
        model, preprocess, lambda: tokenizer, demo.NAME, str(weights), torch.device("cpu"), is_demo=True
    )
    job.clip = clip
    bank = load_bank(default_bank(clip))
    cue = embed_texts(clip, bank.of("places"))
    reference, shares, labels, votes = explain(job, cue)
    rules = choose(reference, shares, find_roles(reference, bank, embed_texts(clip, bank.texts)))

    test = DemoBirds("test", clip.preprocess)
    parts = SimpleNamespace(reference=reference, directions=subspace(cue), votes=votes)
    scores = collect(score(job, test, parts, classifier(clip, [*test.classes, *test.kinds], templates(clip))))
    base, truth = measure(scores.embedding, test), set(rules["the truth (looks at labels)"])
    lines = [["base", "", "", "", *percent(base, "worst", "average", "kinds"), "", ""]]
    for label, chosen in rules.items():
        hit = len(truth & set(chosen))
        whole = measure(scores.embedding + pick(scores.heads, chosen), test)
        part = measure(scores.embedding + pick(scores.heads_cue, chosen), test)
        counts = [str(len(chosen)), f"{hit}/{len(chosen)}", f"{hit}/{len(truth)}"]
        lines.append(
            [label, *counts, *percent(whole, "worst", "average", "kinds"), *percent(part, "worst", "kinds")]
        )
    print(
        table(
            ["rule", "heads", "right", "found", "worst", "average", "kinds", "dir.: worst", "dir.: kinds"],
            lines,
        )
    )

    used = F.one_hot(labels, len(cue)).double()
    place = F.one_hot(DemoBirds("train", clip.preprocess).facts["place"]).double()
    purity = (used.T @ place).max(dim=1).values.sum() / len(place)
    print(
        f"\nPseudo-labels: {int((used.sum(dim=0) > 0).sum())} of {len(cue)} cue texts used; "
        f"{purity:.1%} of the images are of the true place that is commonest under their label."
    )


def explain(job: Job, cue: Tensor) -> tuple[Reference, dict[str, Tensor], Tensor, CueVotes]:
    """Run over the reference images once.

    Returns:
        the reference; the share of each head's variance [L, H] that three kinds of labels explain; the rule's
        pseudo-labels [n]; and the votes that they gave.
    """
    maps = head_maps(job.clip.model)
    zero, place = torch.zeros(maps.shape[3]), DemoBirds("train", job.clip.preprocess).facts["place"]
    votes = {
        "auto": CueVotes(cue, maps, centre(job, DemoBirds("train", job.clip.preprocess))),
        "nearest": CueVotes(cue, maps, zero),
        # One-hot vectors in place of embeddings make the true place the label.
        "truth": CueVotes(torch.eye(8, maps.shape[3]), maps, zero),
    }
    labels: list[Tensor] = []

    def watch(terms: Decomposition) -> None:
        true = F.one_hot(place[sum(map(len, labels)) :][: len(terms.values)], maps.shape[3]).float()
        labels.append(votes["auto"].labels(terms.embedding))
        for name, vote in votes.items():
            vote.update(true if name == "truth" else terms.embedding, terms.values)

    reference = summarise(job, update=lambda terms, _: watch(terms))
    return (
        reference,
        {name: vote.explained(reference.values) for name, vote in votes.items()},
        torch.cat(labels),
        votes["auto"],
    )


def find_roles(reference: Reference, bank: Bank, texts: Tensor) -> dict[Head, Counter]:
    """The share of each head's variance that the texts of each category explain, by TextSpan."""
    roles = {}
    for head in every(reference):
        span = textspan(reference.values[head].map(reference.maps[head]), texts, size=8)
        roles[head] = Counter()
        for i, share in zip(span.indices, span.explained.tolist(), strict=True):
            roles[head][bank.categories[i]] += share
    return roles


def choose(
    reference: Reference, shares: dict[str, Tensor], roles: dict[Head, Counter]
) -> dict[str, list[Head]]:
    """The heads that each rule finds."""
    heads = every(reference)
    maps = reference.maps.double()
    spread = torch.einsum("LHed,LHef,LHfd->LH", maps, reference.values.covariance, maps)

    def above(labels: str, threshold: float) -> list[Head]:
        return [head for head in heads if shares[labels][head] > threshold]

    auto = above("auto", THRESHOLD)
    return {
        f"pseudo-labels explain > {THRESHOLD} (auto)": auto,
        "pseudo-labels explain > 0.2": above("auto", 0.2),
        "pseudo-labels explain > 0.5": above("auto", 0.5),
        "TextSpan: more of the cue than of another": [
            head for head in heads if roles[head].most_common(1)[0][0] == "places"
        ],
        "TextSpan: cue's texts explain > 0.3": [head for head in heads if roles[head]["places"] > 0.3],
        "the truth (looks at labels)": above("truth", THRESHOLD),
        f"nearest text, not centred: > {THRESHOLD}": above("nearest", THRESHOLD),
        f"the {len(auto)} heads that write most": sorted(heads, key=lambda head: -spread[head])[: len(auto)],
    }


def every(reference: Reference) -> list[Head]:
    depth, heads = reference.maps.shape[:2]
    return [(layer, head) for layer in range(depth) for head in range(heads)]


def percent(row: dict, *columns: str) -> list[str]:
    return [f"{100 * row[column]:.1f}" for column in columns]


if __name__ == "__main__":
    main()
