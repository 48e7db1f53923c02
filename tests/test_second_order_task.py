"""--task neurons --order 2 and the maps by neurons, against the same worked out from all effects at once."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import captured
from small import FAR
from test_roles import epsilon_squared

import report
import tasks.neurons as task
from data import InputError
from decompose import DecompositionError
from demo.images import DemoBirds, DemoMasks
from demo.truth import FACTOR_OF, name_agreement_in_words
from evaluate import main
from neurons import second_order
from options import parse_args
from tasks import segmentation
from tasks.job import Job
from tasks.neurons import choose_layer
from tasks.second_order import pursuit
from tasks.segmentation import neuron_maps
from zeroshot import classifier, default_bank, embed_texts, load_bank, load_clip, templates

LAYER = 1  # the third from the end of the demo's four


def job(*more, task="neurons"):
    quick = ["--limit", "96", "--workers", "0", "--device", "cpu", "--batch-size", "40"]
    return Job(parse_args(["--task", task, *quick, *more]))


@pytest.fixture(scope="module")
def ran():
    return captured(task, job("--order", "2", "--neurons", "5"))


@pytest.fixture(scope="module")
def truth():
    """All effects of all neurons, and their main directions by a singular value decomposition."""
    clip = load_clip(device="cpu")
    sets = {split: DemoBirds(split, clip.preprocess, 96, seed=0) for split in ("train", "test")}
    seen = {
        split: second_order(clip.model, torch.stack([data[i][0] for i in range(96)]), LAYER)
        for split, data in sets.items()
    }
    terms = {split: found.terms().double() for split, found in seen.items()}
    away = (terms["train"] - terms["train"].mean(0)).transpose(0, 1)  # [n, images, d]
    _, strength, axes = torch.linalg.svd(away, full_matrices=False)
    axes = axes[:, 0] * torch.sign(torch.einsum("nd,nd->n", axes[:, 0], terms["train"].mean(0)))[:, None]
    bank = load_bank(default_bank(clip))
    texts = embed_texts(clip, bank.texts)
    return SimpleNamespace(
        clip=clip, **sets, seen=seen, terms=terms, axes=axes, bank=bank,
        share=strength[:, 0] ** 2 / (strength**2).sum(1), texts=F.normalize(texts - texts.mean(0), dim=1),
        classes=classifier(clip, sets["test"].kinds, templates(clip)),
    )  # fmt: skip


def numbers(ran):
    return [int(row["neuron"].removeprefix(f"{LAYER}.")) for row in ran.results["neurons"]]


def test_the_neurons_shown_are_those_whose_effect_varies_most(ran, truth):
    spread = truth.terms["train"].var(0, correction=0).sum(1)
    spread = spread / truth.seen["train"].embedding.double().var(0, correction=0).sum()
    assert numbers(ran) == spread.argsort(descending=True)[:5].tolist()
    assert [row["spread"] for row in ran.results["neurons"]] == pytest.approx(
        spread[numbers(ran)].tolist(), rel=1e-4
    )


def test_the_effect_is_the_length_of_the_term_and_the_images_those_where_it_is_longest(ran, truth):
    length = truth.terms["train"].norm(dim=2)
    for j, row in zip(numbers(ran), ran.results["neurons"], strict=True):
        assert row["mean"] == pytest.approx(float(length[:, j].mean()), rel=1e-4)
        assert [i for i, _, _ in row["images"]] == length[:, j].argsort(descending=True)[: task.KEPT].tolist()


def test_the_share_is_that_of_the_first_principal_axis(ran, truth):
    shares = [row["share"] for row in ran.results["neurons"]]
    assert shares == pytest.approx(truth.share[numbers(ran)].tolist(), rel=1e-4)
    assert 0 < min(shares) < max(shares) < 1


def test_the_texts_are_a_pursuit_of_the_first_principal_axis(ran, truth):
    for j, row in zip(numbers(ran), ran.results["neurons"], strict=True):
        found = pursuit(truth.axes[j].float(), truth.texts, task.SHOWN)
        assert [text for text, _ in row["direction"]] == [truth.bank.texts[i] for i, _ in found]
        assert [c for _, c in row["direction"]] == pytest.approx([c for _, c in found], abs=1e-3)


def without(truth, chosen):
    """Accuracy with the effects of these neurons at their mean over the training images."""
    terms, means = truth.terms["test"][:, chosen], truth.terms["train"][:, chosen].mean(0)
    embedding = truth.seen["test"].embedding - terms.sum(1).float() + means.sum(0).float()
    return ((embedding @ truth.classes.T).argmax(1) == truth.test.facts["kind"]).double().mean().item()


def test_accuracies_are_of_embeddings_with_those_effects_at_their_reference_mean(ran, truth):
    accuracy, chosen = ran.results["accuracy"], numbers(ran)
    assert accuracy["base"] == pytest.approx(without(truth, []))
    assert accuracy["without the neurons shown"] == pytest.approx(without(truth, chosen))
    every = list(range(256))
    assert accuracy["without all neurons of the layer"] == pytest.approx(without(truth, every))
    assert len(ran.results["random"]) == task.DRAWS


def test_the_factors_are_of_the_effect_along_the_axis_on_the_test_images(ran, truth):
    along = torch.einsum("bnd,nd->bn", truth.terms["test"], truth.axes).float()
    for j, row in zip(numbers(ran), ran.results["neurons"], strict=True):
        for factor, values in truth.test.facts.items():
            share = epsilon_squared(along[:, [j]].numpy(), values.numpy())[1]
            assert row["factors"][factor] == pytest.approx(share, abs=1e-3)


def test_the_truth_counts_neurons_whose_first_text_names_the_true_factor(ran, truth):
    along = torch.einsum("bnd,nd->bn", truth.terms["test"], truth.axes).float()
    named, true = [], []
    for j in range(256):
        shares = {
            factor: epsilon_squared(along[:, [j]].numpy(), values.numpy())[1]
            for factor, values in truth.test.facts.items()
        }
        best = max(shares, key=shares.get)
        if shares[best] > 0.3:
            first = int((truth.texts @ truth.axes[j].float()).abs().argmax())
            named.append(FACTOR_OF.get(truth.bank.categories[first]))
            true.append(best)
    right = sum(a == b for a, b in zip(named, true, strict=True))
    dealt = sum(named.count(factor) * true.count(factor) for factor in truth.test.facts) / len(true)
    expected = {"neurons": 256, "clear": len(true), "right": right, "dealt": pytest.approx(dealt)}
    assert ran.results["truth"] == expected
    assert 0 < right < len(true) < 256
    assert name_agreement_in_words(ran.results["truth"]) in ran.out


def test_what_is_printed_is_on_the_page_and_in_the_results(ran):
    assert json.loads(json.dumps(ran.results))["layer"] == LAYER
    where = ran.results["settings"]
    assert where["sum"].startswith("neurons and biases sum to what the MLP adds through later heads within")
    document = report.page("neurons", where, ran.sections)
    assert "What single neurons add through later heads" in document
    assert f"of {ran.results['truth']['clear']} of 256 neurons" in document
    for row in ran.results["neurons"]:
        texts = "; ".join(f"{text} {c:+.2f}" for text, c in row["direction"])
        assert f"  direction  {texts}\n" in ran.out
        assert f"   direction {row['share']:.0%}   accuracy without it" in ran.out
        assert f"{row['direction'][0][0]} ({row['direction'][0][1]:+.2f})" in document
    assert "all neurons of the layer" in ran.out
    assert "towards" not in ran.out


# The pursuit.


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 1000))
def test_what_the_pursuit_leaves_is_orthogonal_to_its_texts_and_shrinks(count, size, seed):
    g = torch.Generator().manual_seed(seed)
    texts = F.normalize(torch.randn(count, 9, generator=g, dtype=torch.float64), dim=1)
    direction, lengths = torch.randn(9, generator=g, dtype=torch.float64), []
    for k in range(1, size + 1):
        found = pursuit(direction, texts, k)
        assert len({i for i, _ in found}) == len(found) == min(k, count)
        left = direction - sum(c * texts[i] for i, c in found)
        assert all(abs(float(left @ texts[i])) < 1e-9 for i, _ in found)
        lengths.append(float(left.norm()))
    assert lengths == sorted(lengths, reverse=True)
    assert pursuit(direction, texts, size)[0][0] == int((texts @ direction).abs().argmax())


def test_a_sum_of_two_texts_is_found_with_signs_even_where_a_text_stands_twice():
    texts = torch.eye(6)[[0, 1, 1, 2, 3]]
    found = dict(pursuit(2 * texts[0] - texts[4], texts, 2))
    assert found == {0: pytest.approx(2.0), 4: pytest.approx(-1.0)}
    assert len(dict(pursuit(texts[1], texts, 3))) == 3  # nothing is left to explain, and none is picked twice


# Options.


@pytest.mark.parametrize(("asked", "depth", "layer"), [(None, 4, 1), (None, 12, 9), (None, 2, 0), (-2, 4, 2)])
def test_the_layer_is_the_third_from_the_end_by_default(asked, depth, layer):
    assert choose_layer(asked, depth, order=2) == layer


@pytest.mark.parametrize("asked", [3, -1])
def test_the_last_layer_is_an_input_error_of_one_line(asked):
    with pytest.raises(
        InputError, match=r"^--order 2 takes no MLP of the last layer, 3: no head comes after"
    ):
        choose_layer(asked, 4, order=2)


def test_the_command_line_runs_it(tmp_path, capsys):
    quick = ["--limit", "24", "--neurons", "2", "--workers", "0", "--out", str(tmp_path), "--order", "2"]
    assert main(["--task", "neurons", "--layer", "2", *quick]) == 0
    assert json.loads((tmp_path / "neurons" / "results.json").read_text())["layer"] == 2
    assert main(["--task", "neurons", "--layer", "3", *quick]) == 2
    error = "evaluate.py: --order 2 takes no MLP of the last layer, 3: no head comes after it\n"
    assert capsys.readouterr().err.endswith(error)


# Maps.


def test_a_map_is_the_mean_activation_of_the_neurons_nearest_to_the_text():
    masks = job(task="segmentation")
    clip = masks.clip
    data = DemoMasks(clip.preprocess, 30, 0, protocol="aligned", void=None)
    images = torch.stack([data[i][0][0] for i in range(30)])
    axes, activations = [], []
    for layer in (0, 1, 2):
        terms = second_order(clip.model, images, layer).terms().double()
        axes.append(torch.linalg.svd((terms - terms.mean(0)).transpose(0, 1), full_matrices=False).Vh[:, 0])
        mlp = clip.model.visual.transformer.resblocks[layer].mlp
        hook = mlp.gelu.register_forward_hook(lambda m, args, output: activations.append(output))
        with torch.no_grad():
            clip.model.encode_image(images)
        hook.remove()
    texts = classifier(clip, data.names, templates(clip))[data.labels]
    maps = neuron_maps(masks, data)(images[:4], texts[:4])
    fit = (torch.cat(axes).float() @ texts[:4].T).abs()  # [n, b]
    for b in range(4):
        best = fit[:, b].topk(17).indices  # 2.2 % of 768
        mean = torch.cat(activations, dim=2)[b, 1:, best].mean(1).view(8, 8)
        assert torch.allclose(maps[b], mean, atol=1e-5)
        other = torch.cat(activations, dim=2)[b, 1:, fit[:, b].topk(17, largest=False).indices].mean(1)
        assert float((maps[b] - other.view(8, 8)).abs().max()) > FAR


@pytest.mark.slow
def test_a_model_that_second_order_refuses_has_no_such_maps(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise DecompositionError("cannot follow what heads read")

    monkeypatch.setattr(segmentation, "second_order", refuse)
    quick = ["--task", "segmentation", "--limit", "2", "--workers", "0", "--out", str(tmp_path)]
    assert main(quick) == 0
    results = json.loads((tmp_path / "segmentation" / "results.json").read_text())
    assert results["refused"] == {"neurons": "cannot follow what heads read"}
    assert "neurons" not in results["rows"]
    assert {"decomposition", "random"} < set(results["rows"])
    assert main([*quick, "--methods", "neurons", "random"]) == 2
    assert capsys.readouterr().err.endswith("evaluate.py: cannot follow what heads read\n")


def test_the_row_says_dot_and_the_contrast(tmp_path):
    quick = ["--task", "segmentation", "--limit", "4", "--workers", "0", "--out", str(tmp_path)]
    assert main([*quick, "--methods", "neurons", "--contrast", "none"]) == 0
    row = json.loads((tmp_path / "segmentation" / "results.json").read_text())["rows"]["neurons"]
    assert (row["score"], row["text"]) == ("dot", "class")
