"""What a task found beside the truth: every factor of the demo's pictures is known."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import report
from cue import THRESHOLD
from roles import explained, find_roles
from tasks.tables import percent

from .images import DemoBirds

# The factor that each category of the demo's text bank names.
FACTOR_OF = {"animals": "kind", "colours": "colour", "places": "place", "light": "light", "styles": "style"}
AGREEMENTS = ("roles from categories", "roles from greedy texts", "roles dealt at random")
SHUFFLES = 10


def agreement(truth: dict[str, Tensor], found: list[dict]) -> dict:
    """How often a head's role is its true factor, among heads that one factor explains over THRESHOLD of."""
    shares = torch.stack(list(truth.values())).flatten(1)  # [factors, heads]
    clear = [i for i in range(shares.shape[1]) if shares[:, i].max() > THRESHOLD]
    true = [list(truth)[int(shares[:, i].argmax())] for i in clear]
    by_role = [FACTOR_OF.get(found[i]["role"]) for i in clear]
    most = [found[i]["texts by category"] for i in clear]
    by_texts = [FACTOR_OF.get(max(counts, key=counts.get, default=None)) for counts in most]
    # Expected when the roles are shuffled over the heads.
    dealt = sum(by_role.count(factor) * true.count(factor) for factor in truth) / max(len(clear), 1)
    others = [head for i, head in enumerate(found) if i not in clear]
    right = [sum(a == b for a, b in zip(named, true, strict=True)) for named in (by_role, by_texts)]
    return {
        "heads": shares.shape[1],
        "clear heads": len(clear),
        "heads with a role": sum(head["role"] is not None for head in found),
        **dict(zip(AGREEMENTS, [*right, dealt], strict=True)),
        "other heads without a role": sum(head["role"] is None for head in others),
    }


def roles_of_shuffled(
    values: Tensor, maps: Tensor, embedding: Tensor, texts: Tensor, categories: list[str], seed: int
) -> list[int]:
    """How many heads get a role when the categories are shuffled over the texts: there is nothing to find."""
    generator, found = torch.Generator().manual_seed(seed), []
    for i in range(SHUFFLES):
        order = torch.randperm(len(categories), generator=generator).tolist()
        shuffled = [categories[j] for j in order]
        roles = find_roles(values, maps, embedding, texts, shuffled, seed=seed + 1 + i)
        heads = [roles.name(layer, head) for layer, head in np.ndindex(*roles.bar.shape)]
        found.append(len(heads) - heads.count(None))
    return found


def agreement_in_words(counts: dict, shuffled: list[int]) -> str:
    """What `agreement` and `roles_of_shuffled` found, in lines to print."""
    clear, total = counts["clear heads"], counts["heads"]
    clear_heads = f"{THRESHOLD:.0%} of {clear} of {total} heads"
    lines = [f"A true factor explains over {clear_heads} (validation split). It is the role in"]
    for key in AGREEMENTS:
        lines.append(f"  {key:<24} {counts[key]:4.1f} of {clear}, {share_in_words(counts[key], clear)}")
    none, given = counts["other heads without a role"], counts["heads with a role"]
    right = share_in_words(counts[AGREEMENTS[0]], given)
    return "\n".join(
        [
            *lines,
            f"Of the other {total - clear} heads, {none} are given no role.",
            f"Of all {given} roles, {counts[AGREEMENTS[0]]} are the true factor of such a head, {right}.",
            f"With categories shuffled over texts, {', '.join(map(str, shuffled))} of {total} heads get one.",
        ]
    )


def share_in_words(count: float, total: int) -> str:
    """In percent with a 95 % interval (Wilson), as if heads were drawn independently."""
    return f"{percent(count / total, total)} %" if total else "of none"


def page_of_agreement(counts: dict, shuffled: list[int]) -> report.Html:
    """The same for report.html."""
    clear = counts["clear heads"]
    rows = [(key, f"{counts[key]:.1f} of {clear}", share_in_words(counts[key], clear)) for key in AGREEMENTS]
    words, *_, other, right, dealt = agreement_in_words(counts, shuffled).splitlines()
    rest = f"{other} {right} {dealt}"
    return report.section("Roles and the true factors", words, report.table(["", "heads", ""], rows), rest)


def same_factors(data: DemoBirds, order: list[int]) -> dict[str, tuple[float, float]]:
    """{factor: share of pairs of these images that have the same value, and of all pairs}."""
    found = {}
    for factor, values in data.facts.items():
        counts = [torch.bincount(rows).double() for rows in (values[order], values)]
        found[factor] = tuple(float((n * (n - 1)).sum() / max(n.sum() * (n.sum() - 1), 1)) for n in counts)
    return found


def same_factors_in_words(shares: dict[str, tuple[float, float]]) -> str:
    """What `same_factors` found, in a line to print."""
    words = [f"{factor} {share:.0%} (all images {chance:.0%})" for factor, (share, chance) in shares.items()]
    return f"Pairs of these images that are the same in: {', '.join(words)}"


def add_factors(found: list[dict], fired: Tensor, facts: dict[str, Tensor]) -> None:
    """Add to each neuron the share of its activation's variance that each factor of the demo explains."""
    shares = {factor: explained(fired[:, None, :, None], values)[0] for factor, values in facts.items()}
    for i, row in enumerate(found):
        row["factors"] = {factor: float(share[i]) for factor, share in shares.items()}


def name_agreement(named: list[str], fired: Tensor, facts: dict[str, Tensor]) -> dict:
    """How often the first text of a neuron names the factor that explains most of its effect.

    Args:
        named: the category of each neuron's first text.
        fired: [images, n] how far the effects go along the neurons' directions, of images that had no part
            in finding these.
    """
    shares = {factor: explained(fired[:, None, :, None], values)[0] for factor, values in facts.items()}
    counts = agreement(shares, [{"role": name, "texts by category": {name: 1}} for name in named])
    right, _, dealt = (counts[key] for key in AGREEMENTS)
    return {"neurons": len(named), "clear": counts["clear heads"], "right": right, "dealt": dealt}


def name_agreement_in_words(counts: dict) -> str:
    """What `name_agreement` found."""
    clear, right, dealt = (counts[key] for key in ("clear", "right", "dealt"))
    share, chance = (f"{n / max(clear, 1):.0%}" for n in (right, dealt))
    effect = f"the effect of {clear} of {counts['neurons']} neurons (test images)"
    by = f"It is the one that the first text names in {right} ({share}), with texts dealt at random"
    return f"A true factor explains over {THRESHOLD:.0%} of {effect}.\n{by} in {dealt:.1f} ({chance})."
