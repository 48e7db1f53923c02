"""--task textspan: what does each head of the last four layers write?"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter

import torch
from torch import Tensor
from tqdm import tqdm

from datasets import InputError
from decompose import head_maps
from textspan import Moments, TextSpan, textspan
from zeroshot import default_bank, embed_texts, load_bank, load_clip

from .common import LAST_LAYERS, Head, name, print_settings, settings, summarise

SHOWN = 4  # texts per head on screen; all are in results.json


def run(args: Namespace) -> dict:
    """Each head's texts with the share of its variance that they explain, what is left, and its role by category."""
    clip = load_clip(args.model, args.pretrained, args.device, args.precision)
    bank = load_bank(args.text_bank or default_bank(clip))
    depth, heads, width, _ = head_maps(clip.model).shape
    size = choose_size(args.texts, width, len(bank.texts))
    texts = embed_texts(clip, bank.texts, "text bank").cpu()
    reference = summarise(clip, args)
    total = float(reference.embedding.covariance.trace())
    if not total > 0:
        raise InputError(f"the reference images ({reference.description}) all have the same embedding; raise --limit")
    found = []
    for layer in tqdm(range(max(0, depth - LAST_LAYERS), depth), desc="TextSpan", unit="layer", leave=False):
        for head in range(heads):
            moments = reference.values[layer, head].map(reference.maps[layer, head])
            span = name_head(moments, texts, size, asked=args.texts is not None, head=(layer, head))
            found.append(describe((layer, head), span, bank, float(moments.covariance.trace()) / total))
    where = settings(
        args,
        clip,
        images=reference.description,
        bank=f"{bank.path.name}, {len(bank.texts):,} texts in {len(set(bank.categories))} categories",
        texts=f"{size} per head",
    )
    print_settings(where)
    for head in found:
        print(f"\n{head['head']:<6} {head['role']:<48} spread {head['spread']:6.1%} of the embedding's")
        for text, share in head["texts"][:SHOWN]:
            print(f"       {share:6.1%}  {text}")
        more = sum(share for _, share in head["texts"][SHOWN:])
        print(f"       {more:6.1%}  {max(0, len(head['texts']) - SHOWN)} more texts;  {head['remainder']:.1%} is left")
    return {"settings": where, "heads": found}


def name_head(moments: Moments, texts: Tensor, size: int, asked: bool, head: Head) -> TextSpan:
    """The head's texts; as many as it has directions where no number was asked for, none where it writes the same to every image."""
    held = int(torch.linalg.matrix_rank(moments.covariance, hermitian=True, rtol=1e-10))
    if not held:
        return TextSpan([], moments.mean.new_zeros(0, len(moments.mean)), moments.mean.new_zeros(0))
    try:
        return textspan(moments, texts, size if asked else min(size, held))
    except ValueError as error:
        raise InputError(f"head {name(head)}: {error}; ask for fewer --texts, or give a bank whose texts differ more") from error


def choose_size(asked: int | None, width: int, bank: int) -> int:
    """--texts, or the authors' 20, but at most half of the directions that a head of this width has: all of them explain anything."""
    if asked is None:
        return min(20, width // 2, bank)
    if not 1 <= asked <= min(width, bank):
        raise InputError(
            f"--texts {asked}: a head of this model holds {width} independent texts, the bank {bank}; ask for 1 to {min(width, bank)}"
        )
    return asked


def describe(head: Head, span: TextSpan, bank, spread: float) -> dict:
    """What is printed of a head. spread: its variance over the embedding's; heads can cancel, so these need not sum to 1."""
    shares = Counter()
    for index, share in zip(span.indices, span.explained.tolist(), strict=True):
        shares[bank.categories[index]] += share
    role = ", ".join(f"{category} {share:.0%}" for category, share in shares.most_common(3) if share >= 0.05)
    return {
        "head": name(head),
        "role": role or ("no category explains 5 %" if span.indices else "writes the same to every image"),
        "spread": spread,
        "texts": [(bank.texts[i], share) for i, share in zip(span.indices, span.explained.tolist(), strict=True)],
        "categories": dict(shares),
        "remainder": max(0.0, 1 - float(span.explained.sum())),
    }
