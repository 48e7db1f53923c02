"""--task textspan: what does each head of the last four layers write, and which role has it?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from tqdm import tqdm

import report
from cue import THRESHOLD
from decompose import decompose, head_maps
from demo import truth
from demo.images import DemoBirds
from files import InputError, did_you_mean
from roles import DRAWS, Roles, explained, find_roles, in_own_space
from textspan import Moments, TextSpan, textspan
from zeroshot import Bank, embed_texts

from .accumulators import Rows
from .heads import LAST_LAYERS, Head, head_name
from .job import Job, open_split
from .passes import one_pass
from .reference import Kept, check_varies, summarise
from .tables import images_per_text, print_settings

MOST, LEAST = 6, 3  # images per head on the page
SHOWN = 4  # texts per head on screen; all are in results.json
ROLE_IMAGES = 4000  # that roles are found on; they are kept, in the heads' own space
KEY = {
    "spread": "variance of what the head writes over the embedding's; the largest first; heads can cancel",
    "unexplained": "share of the head's variance that its texts leave",
    "by chance": "the most that any category explains with texts dealt at random; a role explains more",
    "halves": "the best category in either half of the images; a role is the best in both",
    "bars": "share of the head's variance between images that different texts of the category fit best",
    "texts": "in the order that they were found, with the share of variance along what each adds",
    "images": "of those that roles were found on, by what the head writes along its first text",
}


def run(job: Job) -> tuple[dict, list]:
    """Each head's texts with the share of its variance that they explain, what is left, and its role."""
    args, bank = job.args, job.load_bank()
    depth, heads, width, _ = head_maps(job.clip.model).shape
    size = choose_size(args.texts, width, len(bank.texts))
    texts = embed_texts(job.clip, bank.texts, "text bank").cpu().double()
    data = open_split(job, args.reference)
    first = max(0, depth - LAST_LAYERS)
    kept = Kept(len(data), ROLE_IMAGES, args.seed, slice(first, depth))
    reference = summarise(job, kept, data)
    total = float(reference.embedding.covariance.trace())
    check_varies(total, reference.description)
    values, embedding = kept.values.tensor(), kept.embedding.tensor()
    roles = find_roles(values, reference.maps[first:], embedding, texts, bank.categories, seed=args.seed)
    found, images = [], {}
    for layer in tqdm(range(first, depth), desc="TextSpan", unit="layer", leave=False):
        for head in range(heads):
            maps = reference.maps[layer, head]
            moments = reference.values[layer, head].map(maps)
            span = name_head(moments, texts, size, asked=args.texts is not None, head=(layer, head))
            spread = float(moments.covariance.trace()) / total
            found.append(describe((layer, head), span, bank, spread, roles, layer - first))
            if span.indices:
                along = values[:, layer - first, head] @ (maps.cpu().double() @ span.directions[0]).float()
                order = along.argsort(descending=True).tolist()
                few = (data.picture(kept.rows[i]) for i in order[:MOST] + order[MOST:][: -LEAST - 1 : -1])
                images[head_name((layer, head))] = [report.thumbnail(image, 96) for image in few]
    used, largest = max(zip(roles.used, roles.categories, strict=True))
    votes = images_per_text(len(kept.rows), used, bank.categories.count(largest))
    rule = f"a category that explains over {THRESHOLD:.0%} of a head, in each half of the images, too"
    found_on = f"{rule}, and more than any does in {DRAWS} deals of the texts at random"
    where = print_settings(
        job,
        images=reference.description,
        bank=f"{bank.name}, {len(bank.texts):,} texts in {len(set(bank.categories))} categories",
        texts=f"{size} per head",
        sum=reference.sum_error(),
        votes=f"{votes} (category {largest!r}, which uses the most)",
        roles=found_on if len(set(bank.categories)) > 1 else f"none: {one_category(bank)}",
    )
    results = {"settings": where, "heads": found}
    if job.clip.is_demo and args.data is None and set(truth.FACTOR_OF) <= set(bank.categories):
        results["agreement"] = truth.agreement(true_factors(job, first), found)
        given = values, reference.maps[first:], embedding, texts, bank.categories
        results["shuffled"] = truth.roles_of_shuffled(*given, args.seed)
    print_results(results)
    return results, page(results, images)


def heads_of(job: Job) -> list[Head]:
    """The heads of all layers whose role --role is, found on the reference images."""
    args, bank = job.args, job.load_bank()
    if args.role not in bank.categories:
        choices = ", ".join(dict.fromkeys(bank.categories)) + did_you_mean(args.role, bank.categories)
        raise InputError(f"--role {args.role!r} is no category of {bank.path}: {choices}")
    if len(set(bank.categories)) < 2:
        raise InputError(f"--role {args.role!r}: {one_category(bank)}")
    data = open_split(job, args.reference)
    kept = Kept(len(data), ROLE_IMAGES, args.seed, slice(None))
    maps = summarise(job, kept, data).maps
    texts = embed_texts(job.clip, bank.texts, "text bank")
    values, embedding = kept.values.tensor(), kept.embedding.tensor()
    roles = find_roles(values, maps, embedding, texts, bank.categories, seed=args.seed)
    depth, heads = maps.shape[:2]
    every = [(layer, head) for layer in range(depth) for head in range(heads)]
    found = [head for head in every if roles.name(*head) == args.role]
    if not found:
        why = f"the category explains over {THRESHOLD:.0%} of none, or no more than texts dealt at random"
        raise InputError(f"no head has the role {args.role!r}: {why}")
    return found


def one_category(bank: Bank) -> str:
    """Why a bank of one category gives no roles."""
    why = "a role is a category that explains more than random texts of the bank do"
    return f"{why}, and {bank.name} holds one category; give it at least two `# category` lines"


def name_head(moments: Moments, texts: Tensor, size: int, asked: bool, head: Head) -> TextSpan:
    """The head's texts: none if it writes the same to every image.

    Where no number was asked for, there are at most as many as the head has directions.
    """
    held = len(moments.factor())
    if not held:
        return TextSpan([], moments.mean.new_zeros(0, len(moments.mean)), moments.mean.new_zeros(0))
    try:
        return textspan(moments, texts, size if asked else min(size, held))
    except ValueError as error:
        hint = "ask for fewer --texts, or give a bank whose texts differ more"
        raise InputError(f"head {head_name(head)}: {error}; {hint}") from error


def choose_size(asked: int | None, width: int, bank: int) -> int:
    """--texts; else the authors' 20, but at most half of a head's width: as many as that explain any head."""
    if asked is None:
        return min(20, width // 2, bank)
    if not 1 <= asked <= min(width, bank):
        held = f"a head of this model holds {width} independent texts, the bank {bank}"
        raise InputError(f"--texts {asked}: {held}; ask for 1 to {min(width, bank)}")
    return asked


def describe(head: Head, span: TextSpan, bank: Bank, spread: float, roles: Roles, row: int) -> dict:
    """What is printed of a head, whose layer is `row` in `roles`.

    The spread is the head's variance over the embedding's. Heads can cancel, so these need not sum to 1.
    """
    shares, by_category = span.explained.tolist(), Counter()
    for index, share in zip(span.indices, shares, strict=True):
        by_category[bank.categories[index]] += share
    mine = roles.halves[:, :, row, head[1]]
    return {
        "head": head_name(head),
        "role": roles.name(row, head[1]),
        "categories": dict(zip(roles.categories, roles.share[:, row, head[1]].tolist(), strict=True)),
        "chance": float(roles.bar[row, head[1]]),
        "halves": [(roles.categories[int(half.argmax())], float(half.max())) for half in mine],
        "spread": spread,
        "texts": [(bank.texts[i], share) for i, share in zip(span.indices, shares, strict=True)],
        "texts by category": dict(by_category),
        "remainder": max(0.0, 1 - float(span.explained.sum())),
    }


def in_words(head: dict) -> str:
    """A head's role, what its category explains, what any does by chance, and what does in either half."""
    if not head["texts"]:
        return "writes the same to every image"
    best, share = max(head["categories"].items(), key=lambda item: item[1])
    halves = ", ".join(f"{category} {part:.0%}" for category, part in head["halves"])
    shown = f"{best} {share:.0%}, chance {head['chance']:.0%}; halves: {halves}"
    return shown if head["role"] else f"no role ({shown})"


def true_factors(job: Job, first: int) -> dict[str, Tensor]:
    """{factor: [L, H] share of each head's variance that it explains}, on the demo's validation split."""
    data = DemoBirds("val", job.clip.preprocess)
    values = Rows()
    for images, _ in one_pass(job, data, "truth (val)", values):
        values.add(decompose(job.clip.model, images).values[:, first:])
    written = in_own_space(values.tensor(), head_maps(job.clip.model)[first:])
    return {factor: explained(written, data.facts[factor]) for factor in truth.FACTOR_OF.values()}


def print_results(results: dict) -> None:
    """A paragraph for each head, and in the demo how its roles agree with the truth."""
    for head in results["heads"]:
        print(f"\n{head['head']:<6} {in_words(head):<70} spread {head['spread']:6.1%} of the embedding's")
        for text, share in head["texts"][:SHOWN]:
            print(f"       {share:6.1%}  {text}")
        rest = [share for _, share in head["texts"][SHOWN:]]
        print(f"       {sum(rest):6.1%}  {len(rest)} more texts;  {head['remainder']:.1%} is left")
    if "agreement" in results:
        print("\n" + truth.agreement_in_words(results["agreement"], results["shuffled"]))


def page(results: dict, images: dict[str, Sequence[Image.Image]]) -> list[report.Html]:
    """The same for report.html; images of each head: where its first text says most of it, then least."""
    heads = []
    for head in results["heads"]:
        layer, number = (int(part) for part in head["head"].split("."))
        shares = head["categories"]
        shown = dict(sorted(shares.items(), key=lambda item: -item[1])[:5])
        largest = max(shares.values(), default=None)
        own = images.get(head["head"], ())
        texts = (head["texts"], head["spread"], head["remainder"], own[:MOST], own[MOST:])
        halves = ", ".join(f"{category} {share:.0%}" for category, share in head["halves"])
        facts = {"by chance": f"{head['chance']:.0%}", "halves": halves}
        heads.append(report.Head(layer, number, head["role"] or "", largest, shown, *texts, facts))
    lead = "Each cell is an attention head, coloured by its role: the kind of text that explains most of it."
    sections = [lead, report.section("What each head writes", report.head_grid(heads, KEY))]
    if "agreement" in results:
        sections.append(truth.page_of_agreement(results["agreement"], results["shuffled"]))
    return sections
