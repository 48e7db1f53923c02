"""How well are a cue's heads found without labels? Rules side by side on the demo, where the truth is known.

    $ python -m benchmarks.cue_rules                                # the demo's model
    $ python -m benchmarks.cue_rules --weights FILE                 # another one that demo.train has made

The truth: heads over 30 % of whose variance on the reference images the true place (8 values) explains. The accuracies are those of
--task waterbirds on the test split, with the rule's heads mean-ablated and with only the cue's directions removed from them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import demo
from cue import THRESHOLD, CueVotes, subspace
from datasets import DemoBirds
from decompose import head_maps
from evaluate import parse_args
from tasks.common import centre, summarise, table
from tasks.waterbirds import measure, pick, score
from textspan import textspan
from zeroshot import Clip, classifier, default_bank, embed_texts, load_bank, templates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=demo.FOLDER / f"{demo.NAME}.safetensors")
    weights = parser.parse_args().weights
    args = parse_args(["--task", "waterbirds"])
    model, preprocess, tokenizer = demo.load(weights=weights)
    clip = Clip(model, preprocess, tokenizer, demo.NAME, str(weights), torch.device("cpu"), is_demo=True)
    bank = load_bank(default_bank(clip))
    cue = embed_texts(clip, bank.of("places"))
    maps = head_maps(clip.model)
    depth, heads, _, _ = maps.shape
    data = DemoBirds("train", clip.preprocess)
    everything = [(layer, head) for layer in range(depth) for head in range(heads)]

    votes, labels = CueVotes(cue, maps, centre(clip, args)), []
    nearest = CueVotes(cue, maps, torch.zeros(maps.shape[3]))
    truth = CueVotes(torch.eye(8, maps.shape[3]), maps, torch.zeros(maps.shape[3]))  # votes of the true place, by one-hot "embeddings"
    seen = 0

    def watch(terms) -> None:
        nonlocal seen
        place = data.facts["place"][seen : seen + len(terms.embedding)]
        seen += len(place)
        votes.update(terms.embedding, terms.values)
        nearest.update(terms.embedding, terms.values)
        truth.update(F.one_hot(place, maps.shape[3]).float(), terms.values)
        labels.append(votes.labels(terms.embedding))

    reference = summarise(clip, args, watch)
    explained, true_share = votes.explained(reference.values), truth.explained(reference.values)
    truth_heads = {head for head in everything if true_share[head] > THRESHOLD}

    texts = embed_texts(clip, bank.texts)
    roles = {}
    for layer, head in everything:
        moments = reference.values[layer, head].map(maps[layer, head])
        span = textspan(moments, texts, size=8)
        shares = Counter()
        for i, share in zip(span.indices, span.explained.tolist(), strict=True):
            shares[bank.categories[i]] += share
        roles[layer, head] = shares
    spread = {head: float((maps[head] @ maps[head].T * reference.values.covariance[head].float()).sum()) for head in everything}

    rules = {
        f"pseudo-labels explain > {THRESHOLD} (auto)": [h for h in everything if explained[h] > THRESHOLD],
        "pseudo-labels explain > 0.2": [h for h in everything if explained[h] > 0.2],
        "pseudo-labels explain > 0.5": [h for h in everything if explained[h] > 0.5],
        "TextSpan: more of the cue than of another": [h for h in everything if is_most(roles[h], "places")],
        "TextSpan: cue's texts explain > 0.3": [h for h in everything if roles[h]["places"] > 0.3],
        "the truth (looks at labels)": sorted(truth_heads),
    }
    by_nearest = nearest.explained(reference.values)
    rules[f"nearest text, not centred: > {THRESHOLD}"] = [h for h in everything if by_nearest[h] > THRESHOLD]
    n = len(rules[f"pseudo-labels explain > {THRESHOLD} (auto)"]) or 1
    rules[f"the {n} heads that write most"] = sorted(everything, key=lambda h: -spread[h])[:n]

    test = DemoBirds("test", clip.preprocess)
    names = [*test.classes, *test.kinds]
    scores = score(clip, args, test, reference, classifier(clip, names, templates(clip)), subspace(cue))
    base = measure(scores.embedding, test)
    lines = [["base", "", "", "", percent(base["worst"]), percent(base["average"]), percent(base["kinds"]), "", ""]]
    for label, chosen in rules.items():
        hit = len(truth_heads & set(chosen))
        whole = measure(scores.embedding + pick(scores.heads, chosen), test)
        part = measure(scores.embedding + pick(scores.heads_cue, chosen), test)
        cells = [str(len(chosen)), f"{hit}/{len(chosen)}", f"{hit}/{len(truth_heads)}"]
        lines.append(
            [
                label,
                *cells,
                *(percent(whole[k]) for k in ("worst", "average", "kinds")),
                *(percent(part[k]) for k in ("worst", "kinds")),
            ]
        )
    print(table(["rule", "heads", "right", "found", "worst", "average", "kinds", "dir.: worst", "dir.: kinds"], lines))
    used = F.one_hot(torch.cat(labels), len(cue)).double()
    purity = (used.T @ F.one_hot(data.facts["place"]).double()).max(dim=1).values.sum() / len(data)
    print(
        f"\nPseudo-labels: {int((used.sum(dim=0) > 0).sum())} of {len(cue)} cue texts used; "
        f"{purity:.1%} of the images are of the true place that is commonest under their label."
    )


def is_most(shares: Counter, category: str) -> bool:
    return bool(shares) and shares.most_common(1)[0][0] == category


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
