"""Are we equal to the authors' own code? One table of largest relative differences.

    $ git clone https://github.com/yossigandelsman/clip_text_span CLONE     # or its older name, clip_prs
    $ pip install einops scipy scikit-learn scikit-image matplotlib imageio opencv-python-headless h5py
    $ python -m benchmarks.authors CLONE                                    # half a minute

Their functions are imported from the clone and run as they are, beside ours, on the same random weights (a
CLIP ViT of open_clip with 12 layers of 12 heads, in float64), images, texts and labels. A difference is the
largest one over the largest entry of theirs. "Changed" is the same number after a deliberate change of our
side, named in the last column: it shows that the comparison would notice.

Axes: b images   L layers   H heads   N tokens   d embedding   c classes
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import subprocess
import sys
import tempfile
import warnings
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from decompose import Decomposition, decompose, head_maps, heatmap, token_scores
from metrics import Segmentation, average_precision
from tasks.ablation import ablations
from tasks.heads import parse_heads
from tasks.reference import Mean, Reference, authors_terms
from tasks.removal import PAPER_HEADS, Plan, scorer
from tasks.tables import table
from textspan import reconstruct, textspan

FILES = ("prs_hook", "compute_ablations", "compute_use_specific_heads", "compute_complete_text_set")
MODULES = (*FILES, "compute_segmentations", "utils.model", "utils.misc")
PACKAGES = {"sklearn": "scikit-learn", "skimage": "scikit-image", "cv2": "opencv-python-headless"}
DIM, SIDE, PATCH, IMAGES, BATCH, TEXTS, CLASSES = 128, 12, 4, 240, 20, 500, 10
# As many layers and heads as ViT-B-16, whose heads their Waterbirds script names; 3 x 3 patches.
VISION = {"layers": 12, "width": 96, "head_width": 8, "patch_size": PATCH, "image_size": SIDE}
TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
TERM = 'convention="term"'
Row = tuple[str, str, str, str]  # what is compared, difference, difference after a change, the change


class CloneError(Exception):
    """The clone cannot be used; the message says why, in one line."""


def load_clone(folder: Path) -> dict[str, ModuleType]:
    """{name: module} of their code."""
    missing = [name for name in MODULES if not (folder / f"{name.replace('.', '/')}.py").is_file()]
    if missing:
        expected = "expected a clone of https://github.com/yossigandelsman/clip_text_span"
        raise CloneError(f"{folder} has no {missing[0].replace('.', '/')}.py: {expected}")
    sys.path.insert(0, str(folder.resolve()))
    try:
        clone = {name: importlib.import_module(name) for name in MODULES}
    except ImportError as error:
        name = (error.name or "?").partition(".")[0]
        need = f"pip install {PACKAGES.get(name, name)}" if isinstance(error, ModuleNotFoundError) else error
        raise CloneError(f"the code in {folder} needs a package that is missing, {name}: {need}") from error

    # numpy 2.4 makes no float of an array with one entry, which their accuracy() asks for.
    clone["utils.misc"].float = lambda x: np.asarray(x).item()
    # On a CPU all rows of their reconstruction share one row of memory: einops.repeat gives a view. Their GPU
    # runs copy it, as this does.
    module = clone["compute_complete_text_set"]
    repeat = module.einops.repeat
    module.einops = SimpleNamespace(repeat=lambda *x, **sizes: repeat(*x, **sizes).clone())
    return clone


def far(x: Tensor, theirs: Tensor) -> float:
    return float((x - theirs).abs().max() / theirs.abs().max())


def rows_of(names: list[str], ours: list, changed: list, theirs: list, change: str) -> list[Row]:
    """A row for each tensor."""
    found = zip(names, ours, changed, theirs, strict=True)
    return [(name, f"{far(x, truth):.0e}", f"{far(y, truth):.0e}", change) for name, x, y, truth in found]


# The model, and what their logger says of it.


@torch.no_grad()
def build(theirs: ModuleType) -> tuple[nn.Module, nn.Module]:
    """(open_clip's model, theirs), of the same random weights, none at its trivial value."""
    ours = CLIP(DIM, VISION, TEXT)
    for p in ours.visual.parameters():
        p.copy_(p + 0.3 * torch.randn_like(p) if p.ndim == 1 else torch.randn_like(p) * p.shape[-1] ** -0.5)
    copy = theirs.CLIP(DIM, VISION, TEXT)
    copy.visual.load_state_dict(ours.visual.state_dict())
    return ours.double().eval(), copy.double().eval()


@torch.no_grad()
def logged(prs: object, model: nn.Module, images: Tensor) -> list[Tensor]:
    """Embeddings [b, d]; what their logger finds: attentions [b, L, N, H, d], stem and MLPs [b, L + 1, d]."""
    found = []
    for batch in images.split(BATCH):
        prs.reinit()
        embedding = model.encode_image(batch, attn_method="head", normalize=False)
        found.append((embedding, *prs.finalize(embedding)))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def usual(model: nn.Module, images: Tensor) -> Decomposition:
    """The terms of convention="term" over the norm of the embedding: a change."""
    terms = decompose(model, images)
    norm = terms.embedding.norm(dim=1)
    over = {k: torch.einsum("b...,b->b...", x, 1 / norm) for k, x in vars(terms).items() if x is not None}
    own = torch.einsum("bLHe,LHed->bLHd", over["own"], head_maps(model))
    return Decomposition(**over | {"values": over["heads"], "own": own})


def compare_terms(both: list[Decomposition], found: list[Tensor]) -> list[Row]:
    """Our terms, theirs as `logged`."""
    embedding, attentions, mlps = found
    theirs = {
        "heads": attentions.sum(dim=2),
        "MLPs": mlps[:, 1:],
        "stem": mlps[:, 0],  # they store it as the first of the MLPs
        "class token's attention to itself": attentions[:, :, 0],
    }
    listed = [[terms.heads, terms.mlps, terms.stem, terms.own] for terms in both]
    unit = embedding / embedding.norm(dim=1, keepdim=True)
    first = ("embedding", f"{far(both[0].embedding, unit):.0e}", "", "")
    return [first, *rows_of(list(theirs), *listed, list(theirs.values()), TERM)]


def compare_tokens(model: nn.Module, images: Tensor, classes: Tensor, found: list[Tensor]) -> list[Row]:
    """The term of every source token, and maps: the dot products with texts, summed over layers and heads."""
    embedding, attentions, _ = found
    theirs = [attentions.transpose(2, 3), attentions[:, :, 1:].sum(dim=(1, 3)) @ classes.T]
    both, each = [], torch.eye(DIM).double()  # a text for each direction: the terms themselves
    for convention in ("paper", "term"):
        tokens = token_scores(model, images, each, convention=convention)
        maps = heatmap(model, images, classes, convention=convention).flatten(2).mT
        both.append([torch.einsum("b...,b->b...", x, 1 / embedding.norm(dim=1)) for x in (tokens, maps)])
    return rows_of(["per-token terms", "maps"], *both, theirs, TERM)


# TextSpan.


def compare_spans(module: ModuleType, heads: Tensor, texts: Tensor, size: int = 8) -> list[Row]:
    """Their lists beside ours, of every head of the last four layers."""
    names = list(range(len(texts)))

    def theirs(C: Tensor, rank: int) -> tuple[np.ndarray, list[int]]:
        return module.replace_with_iterative_removal(C.numpy(), texts.numpy(), names, size, rank, "cpu")

    same, plain, first, stable, shared, errors = 0, 0, 0, 0, 0, []
    every = heads[:, -4:].flatten(1, 2).unbind(dim=1)
    for C in every:
        rounded = C.float().double()
        span = textspan(C, texts, size)
        told, picks = theirs(C, int(torch.linalg.matrix_rank(C)))
        same += picks == span.indices
        plain += picks == textspan(C, texts, size, rank=None).indices
        errors.append(far(reconstruct(C, span, C.mean(dim=0)), torch.from_numpy(told)))
        one, other = (theirs(x, 80)[1] for x in (C, rounded))
        first += one[0] == other[0] == span.indices[0]
        shared += len({*one} & {*other}) / size / len(every)
        stable += textspan(rounded, texts, size).indices == span.indices
    count, change = len(every), "rank=None: texts not projected"
    return [
        (f"TextSpan, {size} texts: lists", f"{same} of {count}", f"{plain} of {count}", change),
        ("  the heads rebuilt from them", f"{max(errors):.0e}", "", "theirs computes in float32"),
        ("  at their rank 80: first text", f"{first} of {count}", "", "two roundings of the same data"),
        ("  at their rank 80: texts shared", f"{shared:.0%}", "", "their two lists of them"),
        ("  at our rank 80: lists equal", f"{stable} of {count}", "", "our two lists of them"),
    ]


# Ablations: their scripts read arrays from a folder and print accuracies.


def printed(module: ModuleType, arrays: dict[str, np.ndarray], dataset: str) -> list:
    """The values that one of their scripts prints, for arrays under the names that it reads."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        for name, array in arrays.items():
            np.save(Path(folder) / f"{dataset}_{name}.npy", array)
        module.main(Namespace(model="ViT-B-16", dataset=dataset, input_dir=folder))
    return [ast.literal_eval(line.partition(": ")[2]) for line in out.getvalue().splitlines()]


def mean_of(terms: Decomposition) -> Reference:
    """The means of terms, as --protocol authors has them."""
    values, maps = Mean(), torch.eye(DIM).double()
    values.update(terms.values)
    mlps, stem, own = (x.mean(dim=0) for x in (terms.mlps, terms.stem, terms.own))
    embedding = SimpleNamespace(mean=terms.embedding.mean(dim=0))
    return Reference(values, mlps, stem, own, embedding, maps, 0.0, "")


def ablated(terms: Decomposition, classes: Tensor, labels: Tensor) -> list[float]:
    """Our accuracies, in the order of theirs."""
    means = mean_of(terms)
    found = ablations(terms, means, classes, means.read(classes))
    layers = [f"attention of layers 0 to {i}" for i in range(VISION["layers"])]
    order = ["base", "all MLPs and stem", "class token's attention to itself", *layers]
    return [100 * float((found[name].argmax(dim=1) == labels).double().mean()) for name in order]


def without_heads(
    terms: Decomposition, classes: Tensor, y: Tensor, group: Tensor, row: str = "  + earlier layers"
) -> list[float]:
    """Our accuracies by group and over all: unchanged, and those of a row of --task waterbirds."""
    votes = SimpleNamespace(labels=lambda embedding: torch.zeros(len(embedding)))
    plan = Plan(["heads"], (12, 12), parse_heads(PAPER_HEADS["ViT-B-16"], 12, 12))
    scores = scorer(mean_of(terms), torch.zeros(0, DIM).double(), votes, classes)(None, terms)
    right = scores.after(plan.rows).argmax(dim=2) == y
    picked = [right[plan.labels.index(name)].double() for name in ("base", row)]
    sets = [*(group == i for i in range(4)), group >= 0]
    return [100 * float(x[members].mean()) for x in picked for members in sets]


def largest(ours: list[float], theirs: list[float]) -> str:
    """The largest difference of accuracies, in points."""
    return f"{max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.2f} points"


def compare_ablations(clone: dict, terms: Decomposition, other: Decomposition, arrays: dict) -> list[Row]:
    """Both of their scripts, on labels that the model gets right for about two images in three."""
    centred = terms.embedding - terms.embedding.mean(dim=0)
    classes = normalize(centred[:CLASSES], dim=1)
    labels = (terms.embedding @ classes.T).argmax(dim=1)
    noisy = torch.rand(IMAGES) < 0.3
    labels = torch.where(noisy, torch.randint(CLASSES, (IMAGES,)), labels)
    arrays = {f"{name}_ViT-B-16": x.numpy() for name, x in arrays.items()}
    given = arrays | {"classifier_ViT-B-16": classes.T.numpy(), "labels": labels.numpy()}
    base, mlps, own, _, layers = printed(clone["compute_ablations"], given, "labelled")
    theirs = [base, mlps, own, *layers[1:]]
    ours, changed = (ablated(x, classes, labels) for x in (terms, other))
    print_range("compute_ablations.py", theirs)
    rows = [(f"ablation, {len(theirs)} accuracies", largest(ours, theirs), largest(changed, theirs), TERM)]
    two = classes[:2]
    y = torch.where(noisy, torch.randint(2, (IMAGES,)), (terms.embedding @ two.T).argmax(dim=1))
    place = torch.randint(2, (IMAGES,))
    both = torch.stack([y, place], dim=1)[..., None].numpy()
    given = arrays | {"classifier_ViT-B-16": two.T.numpy(), "labels": both}
    found = printed(clone["compute_use_specific_heads"], given, "birds")
    theirs = [x[key] for x in found for key in ("(0, 0)", "(0, 1)", "(1, 0)", "(1, 1)", "full")]
    ours = without_heads(terms, two, y, 2 * y + place)
    changed = without_heads(terms, two, y, 2 * y + place, "  + MLPs and stem")
    print_range("compute_use_specific_heads.py", theirs)
    differences = largest(ours, theirs), largest(changed, theirs)
    return [*rows, ("Waterbirds, 10 accuracies", *differences, "earlier layers kept")]


def print_range(script: str, values: list[float]) -> None:
    print(f"{script}: accuracies of {min(values):.1f} to {max(values):.1f} %")


# Segmentation.


@torch.no_grad()
def compare_segmentation(
    module: ModuleType, prs: object, copy: nn.Module, ours: nn.Module, images: Tensor, classes: Tensor
) -> list[Row]:
    """Their evaluation of one image after another, from pixels to measures, beside our maps and sums."""
    masks = interpolate(torch.randn(len(images), 1, 4, 4), (SIDE, SIDE))[:, 0].gt(0).long()
    masks[:, :2, :2] = -1  # not labelled
    options = Namespace(save_img=False, device="cpu", image_size=SIDE, thr=0.0)
    found, scores, their_ap = [], [], module.get_ap_scores
    module.get_ap_scores = lambda scored, truth: (scores.append(scored), their_ap(scored, truth))[1]
    for i in range(len(images)):
        given = images[i : i + 1], masks[i : i + 1]
        found.append(module.eval_batch(copy, prs, *given, i, options, classes.T.numpy(), None)[:5])
    module.get_ap_scores = their_ap
    correct, labelled, shared, either, precision = (np.array(x) for x in zip(*found, strict=True))
    ratios = shared.sum(axis=0) / either.sum(axis=0)
    theirs = [correct.sum() / labelled.sum(), ratios.mean(), precision.mean()]
    shown = (ours.encode_image(images) @ classes.T).argmax(dim=1)
    maps = heatmap(ours, images, classes, convention="paper")
    rows = maps[torch.arange(len(images)), shown] - maps.mean(dim=1)
    measured = [Segmentation(clip=clip).update(rows, masks) for clip in (True, False)]
    both = [(x.pixel_accuracy, x.mean_iou, x.mean_ap) for x in measured]
    names = [f"segmentation, {name}" for name in ("pixel accuracy", "mean IoU", "mean AP")]
    tensors = [[torch.tensor([value], dtype=torch.float64) for value in values] for values in (*both, theirs)]
    # Of equal scores, rounding breaks other ties for them than for us. So the last row takes their scores.
    flat, truth = masks.flatten(1), torch.from_numpy(precision)[:, 0]
    positive = torch.cat([flat == 0, flat == 1], dim=1)
    same = average_precision(torch.cat(scores).flatten(1), positive, (flat >= 0).repeat(1, 2))
    last = ("  AP of their own scores", f"{far(same, truth):.0e}", "", "ties as rounding leaves them")
    return [*rows_of(names, *tensors, "maps not clipped"), last]


def compare(clone: dict[str, ModuleType]) -> list[Row]:
    torch.manual_seed(0)
    ours, copy = build(clone["utils.model"])
    prs = clone["prs_hook"].hook_prs_logger(copy, "cpu")
    images = torch.randn(IMAGES, 3, SIDE, SIDE).double()
    classes, texts = (normalize(torch.randn(n, DIM).double(), dim=1) for n in (CLASSES, TEXTS))
    found = logged(prs, copy, images)
    both = [terms_of(ours, images) for terms_of in (authors_terms, usual)]
    rows = compare_terms(both, found)
    rows += compare_tokens(ours, images[:BATCH], classes, [x[:BATCH] for x in found])
    rows += compare_spans(clone["compute_complete_text_set"], both[0].heads, texts)
    _, attentions, mlps = found
    arrays = {"attn": attentions.sum(dim=2), "mlp": mlps, "cls_attn": attentions[:, :, 0].sum(dim=2)}
    rows += compare_ablations(clone, *both, arrays)
    module = clone["compute_segmentations"]
    return rows + compare_segmentation(module, prs, copy, ours, images[:BATCH], classes)


def commit(folder: Path) -> str:
    """The commit of the clone, or that it has none."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "no commit"


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")  # of their libraries
    try:
        clone = load_clone(folder)
    except CloneError as error:
        print(f"benchmarks.authors: {error}", file=sys.stderr)
        return 2
    versions = f"torch {torch.__version__}, open_clip {open_clip.__version__}, numpy {np.__version__}"
    print(f"{versions}; the authors' code at {commit(folder)}\n")
    print(table(["ours against theirs", "difference", "changed", "the change"], compare(clone)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
