"""--task textspan: what does each head of the last four layers write, and which role has it?"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter

import torch
from torch import Tensor
from tqdm import tqdm

from cue import THRESHOLD
from data import DemoBirds, InputError
from decompose import decompose, head_maps
from roles import Roles, explained, find_roles, in_own_space
from textspan import Moments, TextSpan, textspan
from zeroshot import Bank, Clip, default_bank, embed_texts, load_bank, load_clip

from . import pages
from .common import LAST_LAYERS, Head, Kept, name, open_split, print_settings, settings, summarise
from .parts import Rows
from .passes import one_pass

PICTURES = 6  # per head on the page
SHOWN = 4  # texts per head on screen; all are in results.json
ROLE_IMAGES = 4000  # that roles are found on; they are kept, in the heads' own space
FACTORS = {
    "animals": "kind",
    "colours": "colour",
    "places": "place",
    "light": "light",
    "styles": "style",
}  # of the demo, by category


def run(args: Namespace) -> tuple[dict, list]:
    """Each head's texts with the share of its variance that they explain, what is left, and its role by category."""
    clip = load_clip(args.model, args.pretrained, args.device, args.precision, args.image_size, args.out)
    bank = load_bank(args.text_bank or default_bank(clip))
    depth, heads, width, _ = head_maps(clip.model).shape
    size = choose_size(args.texts, width, len(bank.texts))
    texts = embed_texts(clip, bank.texts, "text bank").cpu().double()
    data = open_split(args, clip, args.reference)
    layers = range(max(0, depth - LAST_LAYERS), depth)
    kept = Kept(len(data), ROLE_IMAGES, args.seed, slice(layers.start, depth))
    reference = summarise(clip, args, kept, data)
    total = float(reference.embedding.covariance.trace())
    if not total > 0:
        raise InputError(
            f"the reference images ({reference.description}) all have the same embedding; raise --limit"
        )
    roles = find_roles(
        kept.done().values,
        reference.maps[layers.start :],
        kept.embedding,
        texts,
        bank.categories,
        seed=args.seed,
    )
    found, images = [], {}
    for layer in tqdm(layers, desc="TextSpan", unit="layer", leave=False):
        for head in range(heads):
            moments = reference.values[layer, head].map(reference.maps[layer, head])
            span = name_head(moments, texts, size, asked=args.texts is not None, head=(layer, head))
            spread = float(moments.covariance.trace()) / total
            found.append(describe((layer, head), span, bank, spread, roles, layer - layers.start))
            if span.indices:
                most = strongest(
                    kept.values[:, layer - layers.start, head], reference.maps[layer, head], span
                )
                images[name((layer, head))] = [data.picture(kept.rows[i]) for i in most]
    where = settings(
        args,
        clip,
        images=reference.description,
        bank=f"{bank.path.name}, {len(bank.texts):,} texts in {len(set(bank.categories))} categories",
        texts=f"{size} per head",
        sum=reference.sum(),
        roles=f"from {len(kept.rows):,} images; a category that explains over {THRESHOLD:.0%} of a head, and more than random texts do",
    )
    truth = (
        true_factors(clip, args, layers.start)
        if clip.is_demo and set(FACTORS) <= set(bank.categories)
        else None
    )
    print_settings(where)
    for head in found:
        print(f"\n{head['head']:<6} {in_words(head):<70} spread {head['spread']:6.1%} of the embedding's")
        for text, share in head["texts"][:SHOWN]:
            print(f"       {share:6.1%}  {text}")
        more = sum(share for _, share in head["texts"][SHOWN:])
        print(
            f"       {more:6.1%}  {max(0, len(head['texts']) - SHOWN)} more texts;  {head['remainder']:.1%} is left"
        )
    results = {"settings": where, "heads": found}
    if truth is not None:
        results["agreement"] = agreement(truth, found)
        print_agreement(results["agreement"])
    return results, pages.textspan(results, images)


def strongest(values: Tensor, A: Tensor, span: TextSpan) -> list[int]:
    """The images, of values [n, e], whose term under the map A [e, d] goes farthest along the head's first text."""
    return (
        (values @ (A.cpu().double() @ span.directions[0]).float())
        .argsort(descending=True)[:PICTURES]
        .tolist()
    )


def name_head(moments: Moments, texts: Tensor, size: int, asked: bool, head: Head) -> TextSpan:
    """The head's texts; as many as it has directions where no number was asked for, none where it writes the same to every image."""
    held = len(moments.factor())
    if not held:
        return TextSpan([], moments.mean.new_zeros(0, len(moments.mean)), moments.mean.new_zeros(0))
    try:
        return textspan(moments, texts, size if asked else min(size, held))
    except ValueError as error:
        raise InputError(
            f"head {name(head)}: {error}; ask for fewer --texts, or give a bank whose texts differ more"
        ) from error


def choose_size(asked: int | None, width: int, bank: int) -> int:
    """--texts, or the authors' 20, but at most half of the directions that a head of this width has: all of them explain anything."""
    if asked is None:
        return min(20, width // 2, bank)
    if not 1 <= asked <= min(width, bank):
        raise InputError(
            f"--texts {asked}: a head of this model holds {width} independent texts, the bank {bank}; ask for 1 to {min(width, bank)}"
        )
    return asked


def describe(head: Head, span: TextSpan, bank: Bank, spread: float, roles: Roles, row: int) -> dict:
    """What is printed of a head. spread: its variance over the embedding's; heads can cancel, so these need not sum to 1."""
    shares = Counter()
    for index, share in zip(span.indices, span.explained.tolist(), strict=True):
        shares[bank.categories[index]] += share
    share, chance = roles.share[:, row, head[1]], roles.chance[:, row, head[1]]
    return {
        "head": name(head),
        "role": roles.name(row, head[1]),
        "stable": float(roles.stable[row, head[1]]),
        "categories": {
            category: (float(share[c]), float(chance[c])) for c, category in enumerate(roles.categories)
        },
        "spread": spread,
        "texts": [
            (bank.texts[i], share) for i, share in zip(span.indices, span.explained.tolist(), strict=True)
        ],
        "texts by category": dict(shares),
        "remainder": max(0.0, 1 - float(span.explained.sum())),
    }


def in_words(head: dict) -> str:
    """A head's role, what its category explains, and what random texts do."""
    if not head["texts"]:
        return "writes the same to every image"
    best = max(head["categories"], key=lambda category: head["categories"][category][0])
    share, chance = head["categories"][best]
    shown = f"{best} {share:.0%}, random texts {chance:.0%}; same in {head['stable']:.0%} of samples"
    return shown if head["role"] else f"no role ({shown})"


def true_factors(clip: Clip, args: Namespace, first: int) -> dict[str, Tensor]:
    """{factor: [L, H]} share of each head's variance that a factor of the demo explains, on the balanced validation split."""
    data = DemoBirds("val", clip.preprocess)
    values = Rows()
    for images, _ in one_pass(clip, data, args, "truth (val)", values):
        values.add(decompose(clip.model, images).values[:, first:])
    written = in_own_space(values.tensor(), head_maps(clip.model)[first:])
    return {factor: explained(written, data.facts[factor]) for factor in FACTORS.values()}


def agreement(truth: dict[str, Tensor], found: list[dict]) -> dict:
    """How often a head's role is the factor that explains most of it, among heads that a factor explains over THRESHOLD of."""
    shares = torch.stack(list(truth.values())).flatten(1)  # [factors, heads]
    clear = [i for i in range(shares.shape[1]) if shares[:, i].max() > THRESHOLD]
    true = [list(truth)[int(shares[:, i].argmax())] for i in clear]
    by_category = [FACTORS.get(found[i]["role"]) for i in clear]
    by_texts = [
        FACTORS.get(max(found[i]["texts by category"], key=found[i]["texts by category"].get, default=None))
        for i in clear
    ]
    dealt = sum(by_category.count(factor) * true.count(factor) for factor in truth) / max(
        len(clear), 1
    )  # expected, roles shuffled
    return {
        "heads": shares.shape[1],
        "clear heads": len(clear),
        "roles from categories": sum(map(str.__eq__, map(str, by_category), true)),
        "roles from greedy texts": sum(map(str.__eq__, map(str, by_texts), true)),
        "roles dealt at random": dealt,
        "other heads without a role": sum(
            head["role"] is None for i, head in enumerate(found) if i not in clear
        ),
    }


def print_agreement(counts: dict) -> None:
    clear = counts["clear heads"]
    print(
        f"\nA true factor explains over {THRESHOLD:.0%} of {clear} of {counts['heads']} heads (validation split). It is the role in"
    )
    for key in ("roles from categories", "roles from greedy texts", "roles dealt at random"):
        print(f"  {key:<24} {counts[key]:4.1f} of {clear}  ({counts[key] / max(clear, 1):.0%})")
    rest = counts["heads"] - clear
    print(f"Of the other {rest} heads, {counts['other heads without a role']} are given no role.")
