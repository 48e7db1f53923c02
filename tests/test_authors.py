"""--protocol authors against the formula of their code, written out; the benchmark that runs their code."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from runs import run
from small import EXACT, FAR, blocks, build, far, noise, pictures

import tasks.ablation
from benchmarks import authors
from decompose import decompose, token_scores
from demo.images import DemoBirds
from tasks.ablation import ablations
from tasks.reference import Mean, Reference, authors_terms
from tasks.removal import Plan, scorer
from zeroshot import classifier, load_clip, templates

IMAGES, DIM, CHOSEN = 7, 24, [(5, 1), (1, 2)]
QUICK = "--limit 96 --batch-size 48 --workers 0 --protocol authors"


@pytest.fixture(scope="module")
def model():
    return build(layers=6, frozen=True)


@pytest.fixture(scope="module")
def images(model):
    return pictures(model, IMAGES)


@torch.no_grad()
def by_hand(model, images):
    """What is written onto the class token [b, n, D], each with its share of mean and beta, through P.

    term = [gamma (written - mean / n) / sigma + beta / n] P / |embedding|, for the n = 2 L + 1 of the stem,
    the attentions (their biases with them) and the MLPs.
    """
    written, layers = [], blocks(model)
    handles = [layers[0].register_forward_pre_hook(lambda _, args: written.append(args[0][:, 0]))]
    for block in layers:
        handles.append(block.attn.register_forward_hook(lambda _, args, x: written.append(x[0][:, 0])))
        handles.append(block.mlp.register_forward_hook(lambda _, args, x: written.append(x[:, 0])))
    embedding = model.encode_image(images)
    for handle in handles:
        handle.remove()
    written, norm = torch.stack(written, dim=1), model.visual.ln_post
    n, last = written.shape[1], written.sum(dim=1)
    mean = last.mean(dim=1)[:, None, None]
    sigma = (last.var(dim=1, correction=0) + norm.eps).sqrt()[:, None, None]
    terms = (norm.weight * (written - mean / n) / sigma + norm.bias / n) @ model.visual.proj
    return terms / embedding.norm(dim=1)[:, None, None], F.normalize(embedding, dim=1)


def test_the_terms_are_those_of_the_formula_and_sum_to_the_unit_embedding(model, images):
    terms, (expected, embedding) = authors_terms(model, images), by_hand(model, images)
    assert far(terms.embedding, embedding) < EXACT
    assert terms.error() < EXACT
    assert far(terms.stem, expected[:, 0]) < EXACT
    assert far(terms.heads.sum(dim=2), expected[:, 1::2]) < EXACT
    assert far(terms.mlps, expected[:, 2::2]) < EXACT
    assert torch.equal(terms.values, terms.heads)
    # Neither the other convention nor the other scale will do.
    norm = model.encode_image(images).norm(dim=1)[:, None, None]
    assert far(decompose(model, images).mlps / norm, expected[:, 2::2]) > FAR
    assert far(decompose(model, images, convention="paper").mlps, expected[:, 2::2]) > FAR


@pytest.mark.parametrize("options", [{}, {"ls_init_value": 0.3}])
def test_heads_and_own_are_those_of_the_tokens(images, options):
    model = build(layers=6, frozen=True, **options)
    terms, each = authors_terms(model, images), torch.eye(DIM).double()
    tokens = token_scores(model, images, each, convention="paper")  # [b, L, H, N, d]
    tokens = tokens / model.encode_image(images).norm(dim=1)[:, None, None, None, None]
    assert far(terms.heads, tokens.sum(dim=3)) < EXACT
    assert far(terms.own, tokens[:, :, :, 0]) < EXACT
    assert far(terms.own, tokens[:, :, :, 1]) > FAR


def summary(terms):
    """The means, as --protocol authors has them."""
    values = Mean()
    values.update(terms.values)
    means = [x.mean(dim=0) for x in (terms.mlps, terms.stem, terms.own)]
    embedding = SimpleNamespace(mean=terms.embedding.mean(dim=0))
    return Reference(values, *means, embedding, torch.eye(DIM).double(), 0.0, "")


def at_means(model, images, heads=(), mlps=False, stem=False):
    """[b, d] the sum of all terms, these replaced by their means, from the formula and the tokens."""
    written = by_hand(model, images)[0]
    tokens = token_scores(model, images, torch.eye(DIM).double(), convention="paper").sum(dim=3)
    found = tokens / model.encode_image(images).norm(dim=1)[:, None, None, None]
    others = torch.cat([written[:, :1], written[:, 2::2]], dim=1)
    for layer, head in heads:
        found[:, layer, head] = found[:, layer, head].mean(dim=0)
    if stem:
        others[:, 0] = others[:, 0].mean(dim=0)
    if mlps:
        others[:, 1:] = others[:, 1:].mean(dim=0)
    return found.sum(dim=(1, 2)) + others.sum(dim=1)


EARLY = [(layer, head) for layer in range(2) for head in range(4)]
ROWS = {
    "base": {},
    "heads mean-ablated": {"heads": CHOSEN},
    "  + MLPs and stem": {"heads": CHOSEN, "mlps": True, "stem": True},
    "  + earlier layers": {"heads": [*CHOSEN, *EARLY], "mlps": True, "stem": True},
}


def test_the_rows_of_waterbirds_are_the_sums_of_terms_at_their_means(model, images):
    classes, terms = noise(2, DIM, seed=3), authors_terms(model, images)
    votes = SimpleNamespace(labels=lambda embedding: torch.zeros(len(embedding)))
    plan = Plan(["heads"], (6, 4), CHOSEN)
    assert plan.labels == list(ROWS)
    found = scorer(summary(terms), torch.zeros(0, DIM).double(), votes, classes)(images, terms)
    for scores, row in zip(found.after(plan.rows), ROWS, strict=True):
        assert far(scores, at_means(model, images, **ROWS[row]) @ classes.T) < EXACT
    for scores, row in zip(found.after(plan.rows)[1:], list(ROWS)[:-1], strict=True):
        assert far(scores, at_means(model, images, **ROWS[row]) @ classes.T) > FAR


def test_the_rows_of_ablation_are_the_sums_of_terms_at_their_means(model, images):
    classes, terms = noise(5, DIM, seed=4), authors_terms(model, images)
    means, every = summary(terms), [(layer, head) for layer in range(6) for head in range(4)]
    found = ablations(terms, means, classes, means.read(classes))
    expected = {
        "all MLPs": {"mlps": True},
        "all MLPs and stem": {"mlps": True, "stem": True},
        "attention of layers 0 to 2": {"heads": every[:12]},
        "attention of layer 3": {"heads": every[12:16]},
        "head 4.2": {"heads": [(4, 2)]},
    }
    for label, which in expected.items():
        assert far(found[label], at_means(model, images, **which) @ classes.T) < EXACT
        assert far(found[label], at_means(model, images) @ classes.T) > FAR
    own = (terms.own.mean(dim=0) - terms.own).sum(dim=(1, 2))
    expected = (at_means(model, images) + own) @ classes.T
    assert far(found["class token's attention to itself"], expected) < EXACT


# The runs.


@pytest.fixture(scope="module")
def world():
    """The demo's test images, and their terms by the authors' convention."""
    clip = load_clip(device="cpu")
    birds = DemoBirds("test", clip.preprocess, 96, seed=0)
    terms = authors_terms(clip.model, torch.stack([birds[i][0] for i in range(96)]))
    return SimpleNamespace(clip=clip, birds=birds, terms=terms)


def without(terms, heads=(), mlps=False, stem=False):
    """[n, d] the sum of terms with these at their means over the same images."""
    parts, away = terms.heads.clone(), terms.embedding.new_zeros(terms.embedding.shape)
    for layer, head in heads:
        parts[:, layer, head] = parts[:, layer, head].mean(dim=0)
    away = away + (terms.mlps.mean(dim=0) if mlps else terms.mlps).sum(dim=-2)
    return away + parts.sum(dim=(1, 2)) + (terms.stem.mean(dim=0) if stem else terms.stem)


@pytest.mark.slow
def test_a_run_of_waterbirds_takes_means_of_their_terms_over_the_test_images(tmp_path, world):
    code, results, _ = run(tmp_path, "--task waterbirds", QUICK, "--heads 3.1,2.2 --remove heads --draws 2")
    assert code == 0
    means = results["settings"]["means"]
    assert "test split" in means
    assert "the authors' convention" in means
    classes = classifier(world.clip, list(world.birds.classes), templates(world.clip))
    group = 2 * world.birds.y + world.birds.place
    given = {"heads": [(3, 1), (2, 2)]}
    for row, which in {
        "base": {}, "heads mean-ablated": given, "  + MLPs and stem": {**given, "mlps": True, "stem": True}
    }.items():  # fmt: skip
        right = (without(world.terms, **which) @ classes.T).argmax(dim=1) == world.birds.y
        expected = [float(right[group == i].double().mean()) for i in range(4)]
        assert list(results["rows"][row]["groups"].values()) == pytest.approx(expected), row


@pytest.mark.slow
def test_a_run_of_ablation_takes_means_of_their_terms_over_the_test_images(tmp_path, world):
    code, results, _ = run(tmp_path, "--task ablation", QUICK)
    assert code == 0
    assert "the authors' convention" in results["settings"]["means"]
    kinds = classifier(world.clip, list(world.birds.kinds), templates(world.clip))
    every = [(layer, head) for layer in range(4) for head in range(8)]
    expected = {"all MLPs": {"mlps": True}, "all MLPs and stem": {"mlps": True, "stem": True}}
    expected |= {f"attention of layers 0 to {i}": {"heads": every[: 8 * i + 8]} for i in range(4)}
    expected |= {f"attention of layer {i}": {"heads": every[8 * i : 8 * i + 8]} for i in range(4)}
    expected |= {f"head {layer}.{head}": {"heads": [(layer, head)]} for layer, head in every}
    for label, which in expected.items():
        right = (without(world.terms, **which) @ kinds.T).argmax(dim=1) == world.birds.facts["kind"]
        assert results["accuracy"][label] == pytest.approx(float(right.double().mean())), label


@pytest.mark.parametrize("protocol", ["aligned", "authors"])
def test_the_terms_that_a_run_of_ablation_scores_are_theirs_if_asked_for(tmp_path, monkeypatch, protocol):
    seen = []  # so few images need not be classified otherwise with one convention than with the other

    def record(terms, means, *rest):
        seen.append((terms.embedding.norm(dim=1), means.values.mean.shape[2]))
        return ablations(terms, means, *rest)

    monkeypatch.setattr(tasks.ablation, "ablations", record)
    run(tmp_path, "--task ablation --limit 16 --workers 0 --protocol", protocol)
    assert sum(len(norms) for norms, _ in seen) == 16
    for norms, width in seen:
        assert torch.allclose(norms, torch.ones(len(norms))) == (protocol == "authors")
        assert (width == 96) == (protocol == "authors")  # of the embedding, not of a head


@pytest.mark.parametrize("task", ["waterbirds", "ablation"])
def test_means_of_other_images_are_not_theirs(refused, task):
    refused(["--task", task, "--protocol authors --reference val"], "--protocol authors", "test images")


# The benchmark.


def refusal(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/authors.py", str(folder)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, said = authors.main(), capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    return said


def test_what_is_no_clone_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    for folder in (tmp_path / "nowhere", tmp_path):
        said = refusal(folder, monkeypatch, capsys)
        assert str(folder) in said
        assert "expected a clone of https://github.com/yossigandelsman/clip_text_span" in said


def test_a_package_that_the_clone_needs_is_named(tmp_path, monkeypatch, capsys):
    for name in authors.MODULES:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("import no_such_package\n")
    said = refusal(tmp_path, monkeypatch, capsys)
    assert "needs a package that is missing, no_such_package: pip install no_such_package" in said


@pytest.mark.slow
@pytest.mark.skipif("AUTHORS_CLONE" not in os.environ, reason="AUTHORS_CLONE: a clone of clip_text_span")
def test_we_are_equal_to_the_authors_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/authors.py", os.environ["AUTHORS_CLONE"]])
    assert authors.main() == 0
    rows = {line[:34].strip(): line[34:].split() for line in capsys.readouterr().out.splitlines()}
    for name in ("embedding", "heads", "MLPs", "stem", "per-token terms", "maps", "AP of their own scores"):
        assert float(rows[name][0]) < EXACT
    for name in ("heads", "MLPs", "stem", "per-token terms", "maps"):
        assert float(rows[name][1]) > FAR
    assert rows["TextSpan, 8 texts: lists"][:3] == ["48", "of", "48"]
