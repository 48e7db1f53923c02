"""--task typographic: see what a picture shows although something else is written on it.

The name of another class, written on a picture, pulls the model to that class. In the embedding it shares
directions with the class itself, so that taking them out costs some of the class, too. What tells them apart
is where in the model they come from: some heads read. They are found as --task debias finds the heads of a
cue, from texts that say that a word is written, and without labels.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

import report
from cue import subspace
from data import subset
from decompose import Decomposition, DecompositionError, decompose, image_embedding
from demo.images import DemoSigns
from forward import forward_without
from rivals import leace
from written import SAYS, Variants, WrittenImages, open_written
from zeroshot import classifier, templates

from .accumulators import Sums
from .attribution import map_of_heads
from .heads import Head
from .heatmap import save_picture
from .job import Job
from .passes import one_pass
from .reading import COVERED, contact_sheet, cover, measure_rules, name_heads, picks
from .removal import (
    Cue,
    Further,
    Plan,
    cue_of,
    in_blocks,
    page_of_heads,
    random_heads,
    scorer,
    without_heads_forward,
)
from .rivals import ways_without, with_published_last
from .tables import Shown, in_tenths, logits, mean_and_std, percent, print_settings, print_table, say, spread

LEAD = (
    "How often a picture is still called by what it shows when another class's name is written on it, with "
    "and without what reads, and what each way costs on pictures without a word."
)
TITLES = {"clean": "no word", "attacked": "attacked", "own": "own word", "blank": "blank sign"}
TITLES |= {"synthetic": "synthetic", "read": "called by the word"}
SHOWN = 16  # pictures of the contact sheet
SOME = 64  # reference pictures whose maps say how hot a patch with a word is


def run(job: Job) -> tuple[dict, list]:
    """Accuracy on every variant of the pictures, with and without what reads."""
    clip, args = job.clip, job.args
    test, reference = open_data(job, "test"), open_data(job, args.reference)
    classes = classifier(clip, test.classes, templates(clip), "classes")
    says = classifier(clip, test.classes, SAYS)
    cue = cue_of(job, [SAYS[0].format(name) for name in test.classes], "written names", says, reference)
    shape = cue.reference.maps.shape[:2]
    draws = random_heads(cue.heads, shape[1], args.draws, args.seed)
    further, notes = further_ways(job, cue, torch.cat([classes, says]), reference)
    plan = Plan((), shape, cue.heads, draws, further)
    rows = {
        "base": plan.row(),
        "heads mean-ablated": plan.row(heads=cue.heads),
        "  + MLPs": plan.row(heads=cue.heads, mlps=True),
        "cue's directions in the heads": plan.row(directions=cue.heads),
        "cue's directions everywhere": plan.row(everywhere=True),
    } | {label: plan.row(further=label) for label in further}
    others = [plan.row(heads=heads) for heads in other_heads(cue.heads, shape, args.draws, args.seed)]
    every = [torch.stack(list(rows.values())), plan.draws, torch.stack(others) if others else plan.draws[:0]]
    tally = Tally(test)
    scores = scorer(cue.reference, cue.directions, cue.votes, torch.cat([classes, says]), further)
    for images, indices in one_pass(job, Variants(test), "test", tally):
        for variant, shown in zip(test.variants, images.unbind(dim=1), strict=True):
            found = scores(shown, decompose(clip.model, shown), indices).after(torch.cat(every))
            tally.update(variant, found, indices)
    found, drawn, others = in_blocks(tally.rows(), every)
    rows = dict(zip(rows, found, strict=True))
    results = {
        "rows": rows,
        "answers": tally.answers(),
        "random": control(drawn, draws, cue.heads, plan.sets),
        "others": others,
        **cue.results(),
    }
    path = args.out / "typographic" / "sheet.png"
    drawn_sheet = draw_sheet(job, cue, test, classes, says)
    save_picture(drawn_sheet, path)
    where = print_settings(
        job,
        test=test.description,
        means=f"{cue.reference.description}; their words must not go with their classes",
        prompts=f"{len(templates(clip))} templates, {len(test.classes)} classes; {logits(clip)}",
        **cue.settings(),
        shared=f"directions of cue and classes have principal cosines {principal_cosines(cue, classes)}",
    )
    shown = print_rows(results, len(test), len(cue.heads), notes)
    caption = "Where the reading heads look (red), where the others look (blue), and both answers"
    sheet = report.pictures([(drawn_sheet, caption)], size=drawn_sheet.width)
    seen = report.section("Where each picture is read, and where it is seen", sheet)
    sections = [LEAD, page_of_rows(results, len(cue.heads), shown), seen, page_of_heads(results)]
    if reference.boxes is not None and not notes:
        results["rules"], rules = compare_rules(job, cue, reference)
        sections.append(rules)
    print(f"\nWhere each picture is read and where it is seen: {path}")
    return {"settings": where, **results}, sections


def open_data(job: Job, split: str) -> WrittenImages | DemoSigns:
    """--data, or the demo's pictures with signs."""
    args, transform = job.args, job.clip.preprocess
    if args.data is None:
        return DemoSigns(split, transform, args.limit, args.seed)
    size = job.clip.model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    return open_written(args.data, split, transform, side, args.limit, args.seed)


def further_ways(job: Job, cue: Cue, texts: Tensor, reference: WrittenImages) -> tuple[Further, list[str]]:
    """Interventions that are no sum of terms, and a note where the model does not allow all of them.

    They give scores [b, 2 c] of the texts [2 c, d], the classes' and those that say their names are written.
    """
    model, votes, notes, ways = job.clip.model, cue.votes, [], {}
    classes, says = texts.chunk(2)
    score = lambda embedding: embedding.to(texts) @ texts.T  # noqa: E731
    try:
        ways |= without_heads_forward(job, cue.heads, texts, reference)
        ways["  with zeros (Dyslexify)"] = lambda images, *_: score(forward_without(model, images, cue.heads))
    except DecompositionError as error:
        notes.append(f"Without the rows of another forward pass: {error}.")
    mean = cue.reference.embedding.mean
    cross = (votes.embedding - votes.count[:, None] * mean).T / votes.count.sum()
    oblique = leace(cue.reference.embedding.covariance, cross).to(says)
    mean, centred = mean.to(says), says - says.mean(dim=0)

    def erase(_: Tensor, terms: Decomposition, indices: Tensor) -> Tensor:
        embedding = terms.embedding.to(says)
        return score(embedding - (embedding - mean) @ oblique.T)

    def heat(images: Tensor, terms: Decomposition) -> Tensor:
        return map_of_heads(model, images, cue.heads, centred[votes.labels(terms.embedding)])

    some = subset(len(reference), SOME, job.args.seed)
    images = torch.stack([reference[i][0] for i in some]).to(job.clip.device, job.clip.dtype)
    bar = COVERED * float(heat(images, decompose(model, images)).amax(dim=(1, 2)).mean())

    def hide(images: Tensor, terms: Decomposition, indices: Tensor) -> Tensor:
        return score(image_embedding(model, cover(images, heat(images, terms), bar)))

    ways |= {"oblique erasure (LEACE)": erase, "read patches covered": hide}
    published = ways_without(job, cue, ("texts", "rivals"), reference.classes, classes, len(classes))
    del published["LEACE"]
    # These rows are asked for the classes alone.
    return ways | {
        label: lambda *batch, run=run: F.pad(run(*batch), (0, len(says))) for label, run in published.items()
    }, notes


class Tally(Sums):
    """Right answers of every intervention on every variant, summed over images.

    The first intervention changes nothing, and the second takes out the heads that read.
    """

    def __init__(self, test: WrittenImages) -> None:
        super().__init__()
        self.seen, self.written, self.variants = test.seen, test.written, test.variants

    def update(self, variant: str, scores: Tensor, indices: Tensor) -> None:
        """Add images: scores [k, b, 2 c] of the classes, and of texts that say their names are written."""
        of_classes, of_names = scores.cpu().chunk(2, dim=2)
        seen, written = self.seen[indices], self.written[indices]
        predicted = of_classes.argmax(dim=2)
        self.add(variant, (predicted == seen).sum(dim=1))
        if variant != "attacked":
            return
        self.add("images", len(indices))
        self.add("read", (predicted == written).sum(dim=1))
        both = predicted[1] == seen, (of_names[0] - of_names[1]).argmax(dim=1) == written
        self.add("answers", torch.stack([*both, both[0] & both[1]]).sum(dim=1))

    def rows(self) -> list[dict[str, float]]:
        """The shares of each intervention; read: of attacked pictures that are called by the written word."""
        names = [*self.variants, "read"]
        shares = torch.stack([self[name] for name in names], dim=1) / self["images"]
        return [dict(zip(names, row, strict=True)) for row in shares.tolist()]

    def answers(self) -> dict[str, float]:
        """What the two sums of heads say of attacked pictures: shares that are right."""
        return dict(
            zip(("seen", "written", "both"), (self["answers"] / self["images"]).tolist(), strict=True)
        )


def principal_cosines(cue: Cue, classes: Tensor) -> str:
    """Between the subspaces of the cue's texts and of the classes: 1 for a direction that they share."""
    cosines = torch.linalg.svdvals(subspace(classes) @ cue.directions.T)
    return " ".join(f"{cosine:.2f}" for cosine in cosines.tolist())


def rest(chosen: list[Head], shape: tuple[int, int]) -> list[Head]:
    """The heads of the model, of layers and heads `shape`, that were not chosen."""
    return [head for head in product(range(shape[0]), range(shape[1])) if head not in chosen]


def other_heads(chosen: list[Head], shape: tuple[int, int], draws: int, seed: int) -> list[list[Head]]:
    """Sets of as many heads that were not chosen, of any layers; none if there are too few."""
    left = rest(chosen, shape)
    generator, count = torch.Generator().manual_seed(seed), len(chosen)
    if len(left) < count:
        return []
    return [[left[i] for i in torch.randperm(len(left), generator=generator)[:count]] for _ in range(draws)]


def control(drawn: list[dict], draws: list[list[Head]], chosen: list[Head], sets: str) -> dict | None:
    """What mean-ablating random heads does to attacked pictures; `shared`: chosen heads in each draw."""
    if not drawn:
        return None
    shared = [len({*heads} & {*chosen}) for heads in draws]
    attacked = spread(row["attacked"] for row in drawn)
    return {"draws": len(drawn), "sets": sets, "attacked": attacked, "rows": drawn, "shared": shared}


def print_rows(results: dict, images: int, heads: int, notes: list[str]) -> Shown:
    """The table, with the random control under it, and notes: for the page, too."""
    rows, drawn = results["rows"], results["random"]
    names = list(rows["base"])
    header, lines, random = ["accuracy, %", *(TITLES[name] for name in names)], [], []
    for label, row in rows.items():
        cells = [
            percent(row[name], images) if name == "attacked" else in_tenths([row[name]])[0] for name in names
        ]
        lines.append([label, *cells])
    if drawn:
        shares = [[row[name] for row in drawn["rows"]] for name in names]
        random.append([f"{heads} random heads, mean ± std", *map(mean_and_std, shares)])
        best = max(range(drawn["draws"]), key=lambda i: drawn["rows"][i]["attacked"])
        random.append(
            [f"{heads} random heads, best", *in_tenths(drawn["rows"][best][name] for name in names)]
        )
    if results["others"]:
        shares = [[row[name] for row in results["others"]] for name in names]
        random.append([f"{heads} heads that were not chosen", *map(mean_and_std, shares)])
    said = ["Attacked: another class's name is written on the picture. [..]: 95 % interval (Wilson)."]
    if drawn:
        ours = rows["heads mean-ablated"]["attacked"]
        said.append(control_in_words(drawn, ours, len(results["others"])))
    return print_table(header, with_published_last(lines, random)), say(
        *said, answers_in_words(results["answers"]), *notes
    )


def control_in_words(drawn: dict, ours: float, others: int) -> str:
    """Where the random heads come from, and what they do by how many of the chosen ones are among them."""
    by_shared = defaultdict(list)
    for row, shared in zip(drawn["rows"], drawn["shared"], strict=True):
        by_shared[shared].append(row["attacked"])
    means = [f"{shared}: {100 * sum(found) / len(found):.1f}" for shared, found in sorted(by_shared.items())]
    below = sum(row["attacked"] < ours for row in drawn["rows"])
    words = f"Random: {drawn['sets']}, mean-ablated;"
    words += f" {below} stay below the\nchosen heads on attacked pictures. By how many of these they share: "
    return f"{words}{', '.join(means)}.\nNot chosen: {others} draws from all other heads of the model."


def answers_in_words(answers: dict[str, float]) -> str:
    """What is seen and what is written, in two lines."""
    seen, written, both = in_tenths(answers.values())
    words = (
        f"Two answers for an attacked picture: without the reading heads, what is seen ({seen} % right);\n"
    )
    return f"{words}from the reading heads alone, what is written ({written} %). Both are right for {both} %."


def page_of_rows(results: dict, heads: int, shown: Shown) -> report.Html:
    rows, drawn, parts = results["rows"], results["random"], [shown[0]]
    if drawn:
        marks = {label: 100 * rows[label]["attacked"] for label in ("base", "heads mean-ablated")}
        values = [100 * row["attacked"] for row in drawn["rows"]]
        parts.append(
            report.histogram(values, marks, f"Attacked, without {heads} random heads", "accuracy, %")
        )
    return report.section("Seen although something else is written", *parts, note=shown[1])


@torch.no_grad()
def draw_sheet(job: Job, cue: Cue, test: WrittenImages, classes: Tensor, says: Tensor) -> Image.Image:
    """Some pictures with the maps of the reading heads and of the others, and the model's two answers."""
    model, others = job.clip.model, rest(cue.heads, cue.reference.maps.shape[:2])
    count = min(SHOWN, len(test))
    images = torch.stack([test[i][0] for i in range(count)]).to(job.clip.device, job.clip.dtype)
    terms = decompose(model, images)
    away = cue.reference.values.mean.to(cue.reference.maps) - terms.values
    layers, heads = zip(*cue.heads, strict=True)
    change = torch.einsum("bhe,hed->bd", away[:, layers, heads], cue.reference.maps[layers, heads])
    written = (-change @ says.T).argmax(dim=1)
    seen = ((terms.embedding + change) @ classes.T).argmax(dim=1)
    read = map_of_heads(model, images, cue.heads, (says - says.mean(dim=0))[written])
    saw = map_of_heads(model, images, others, (classes - classes.mean(dim=0))[seen])
    answers = ([test.classes[i] for i in found] for found in (written.tolist(), seen.tolist()))
    shown = (images - images.amin(dim=(1, 2, 3), keepdim=True)).float().cpu()
    shown = [TF.to_pil_image(image / image.max()) for image in shown]  # as the model sees them, cropped
    return contact_sheet(list(zip(shown, read, saw, *answers, strict=True)))


def compare_rules(job: Job, cue: Cue, reference: WrittenImages) -> tuple[dict, report.Html]:
    """Print which heads other rules take, and how many of them read in truth: for the page, too."""
    measures = measure_rules(job, reference)
    found = {"cue (texts alone)": cue.heads, **picks(measures, len(cue.heads))}
    true, results, rows = set(found["true word"]), {}, []
    for rule, heads in found.items():
        right = len(true & {*heads})
        results[rule] = {"heads": [list(head) for head in heads], "right": right, "true": len(true)}
        rows.append([rule, name_heads(heads), f"{right} of {len(heads)}", f"{right} of {len(true)}"])
    shown = print_table(["rule", "heads", "right", "of the true ones"], rows)
    meaning = "True: the word that is written explains over 30 % of what they write on the reference images."
    results["measures"] = {name: values.tolist() for name, values in measures.items()}
    return results, report.section("Which heads read", shown, note=say(meaning))
