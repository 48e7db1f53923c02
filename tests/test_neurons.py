"""neurons.py against every neuron's term worked out the long way, and the task against figures by hand."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import captured
from test_decompose import (
    EXACT,
    FAR,
    HALF,
    INNER,
    OPTIONS,
    SINGLE,
    OlderTower,
    blocks,
    build,
    every_option,
    far,
    fields,
    found,
    frozen,
    gamma_beta,
    half,
    half_trained,
    pictures,
    sequence_first,
    std,
    stock,
    under_autocast,
)
from test_decompose import models as any_models
from test_roles import epsilon_squared
from torch import nn

import decompose as core
import report
import tasks.neurons as task
from attention import attention_calls
from data import InputError
from decompose import DecompositionError, decompose
from demo.images import DemoBirds
from evaluate import main
from neurons import Neurons, neurons
from tasks.job import Job
from tasks.neurons import Activity, ablate, choose_layer, in_words, likeness
from tasks.removal import random_heads
from zeroshot import classifier, default_bank, embed_texts, load_bank, load_clip, templates

n, d = 64, 24  # of the models of `build`: mlp_ratio 2 times width 32; embedding
# Every option in the middle, and two models at either end.
CASES = {(name, 1): OPTIONS[name] for name in OPTIONS} | {
    (name, end): OPTIONS[name] for name in ("plain", "all of them") for end in (0, 2)
}
every_case = pytest.mark.parametrize(
    ("options", "layer"),
    [(o, layer) for (_, layer), o in CASES.items()],
    ids=[f"{name}, {i}" for name, i in CASES],
)


# The long way: the stock forward pass, and every neuron pushed alone through the modules after it.


@torch.no_grad()
def streams(model, images, layer):
    """The class token's activations [b, n] in one MLP and what the last norm gets [b, D], by plain hooks."""
    seen = {}
    gelu, norm = blocks(model)[layer].mlp.gelu, model.visual.ln_post
    handles = [
        gelu.register_forward_hook(lambda m, args, output: seen.update(hidden=output[:, 0])),
        norm.register_forward_pre_hook(
            lambda m, args: seen.update(last=args[0][:, 0] if args[0].ndim == 3 else args[0])
        ),
    ]
    embedding = model.encode_image(images)
    for handle in handles:
        handle.remove()
    return seen["hidden"], seen["last"], embedding[0] if isinstance(embedding, tuple) else embedding


@torch.no_grad()
def long_way(model, images, layer):
    hidden, last, embedding = streams(model, images, layer)
    block, norm, P = blocks(model)[layer], model.visual.ln_post, model.visual.proj
    W, bias, inner = block.mlp.c_proj.weight.T, block.mlp.c_proj.bias, getattr(block.mlp, "ln", None)
    parts, scale = torch.diag_embed(hidden), std(norm, last)  # [b, n, n]: one neuron each
    if isinstance(inner, nn.LayerNorm):
        parts, scale = frozen(inner, parts, hidden), scale * std(inner, hidden)
        bias = bias + gamma_beta(inner)[1] @ W
    return SimpleNamespace(
        terms=frozen(norm, block.ls_2(parts @ W), last) @ P,
        constant=frozen(norm, block.ls_2(bias.expand(len(last), -1)), last) @ P,
        activations=hidden / scale,
        embedding=embedding,
    )


# The sum.


@every_case
def test_neurons_and_constant_sum_to_the_term_of_their_mlp(options, layer):
    model = build(**options)
    split, whole = neurons(model, pictures(model), layer), decompose(model, pictures(model)).mlps[:, layer]
    assert far(split.terms().sum(dim=1) + split.constant, whole) < EXACT
    assert far(split.total(), whole) < EXACT
    assert split.error() < EXACT


@every_option
def test_neurons_and_constant_of_a_float32_model_sum_to_the_term_of_their_mlp(options):
    model = build(torch.float32, **options)
    whole = decompose(model, pictures(model)).mlps[:, 1]
    assert float((neurons(model, pictures(model), 1).total() - whole).norm() / whole.norm()) < SINGLE


@settings(max_examples=25, deadline=None)
@given(any_models(), st.integers(1, 3), st.integers(0, 3), st.integers(0, 1000))
def test_the_sum_holds_whatever_the_shape_and_options(model, batch, layer, seed):
    layer, images = layer % len(blocks(model)), pictures(model, batch, seed)
    assert far(neurons(model, images, layer).total(), decompose(model, images).mlps[:, layer]) < EXACT


@every_option
def test_without_the_constant_or_any_one_neuron_the_sum_is_another_than_that_of_decompose(options):
    model = build(**options)
    split = neurons(model, pictures(model), 1)
    whole, terms = decompose(model, pictures(model)).mlps[:, 1], split.terms()
    assert far(terms.sum(dim=1), whole) > FAR
    gaps = [far(split.total() - terms[:, j], whole) for j in range(n)]
    assert sum(gap > FAR for gap in gaps) > 0.9 * n  # GELU leaves a few next to silent
    assert far(neurons(model, pictures(model), 1).term, decompose(model, pictures(model)).mlps[:, 1]) < EXACT


def of(**more):
    """Neurons of small whole numbers."""
    parts = {
        "activations": [[1.0, 2.0]],
        "maps": [[1.0, 0.0, 3.0], [0.0, 1.0, -1.0]],
        "constant": [[0.5, 0.5, 0.0]],
    }
    parts |= {"embedding": [[0.0, 0.0, 0.0]], "term": [[1.5, 2.5, 1.0]]} | more
    return Neurons(**{key: torch.tensor(value) for key, value in parts.items()})


def test_terms_are_activations_times_maps_and_the_total_adds_the_constant():
    assert of().terms().tolist() == [[[1.0, 0.0, 3.0], [0.0, 2.0, -2.0]]]
    assert of().total().tolist() == [[1.5, 2.5, 1.0]]


def test_the_error_is_the_largest_difference_over_the_largest_entry_of_the_term():
    assert of().error() == 0
    assert of(term=[[1.5, 2.5, -4.0]]).error() == 5 / 4


@pytest.mark.parametrize(
    "part", [{"term": [[torch.nan, 1.0, 1.0]]}, {"constant": [[torch.nan, 1.0, 1.0]]}], ids=["term", "sum"]
)
def test_the_error_is_nan_where_one_number_is(part):
    error = of(**part).error()
    assert error != error


# Neuron by neuron.


@every_case
def test_each_neuron_is_that_of_the_long_way(options, layer):
    model = build(**options)
    split, truth = neurons(model, pictures(model), layer), long_way(model, pictures(model), layer)
    assert far(split.terms(), truth.terms) < EXACT
    assert far(split.activations, truth.activations) < EXACT
    with attention_calls():  # which keeps torch's fused kernel of a whole attention away, as families.py does
        intercepted = stock(model)
    assert any(torch.equal(split.embedding, expected) for expected in (stock(model), intercepted))
    assert far(split.embedding, truth.embedding) < EXACT


@every_option
def test_the_constant_is_that_of_the_long_way(options):
    model = build(**options)
    assert (
        far(neurons(model, pictures(model), 1).constant, long_way(model, pictures(model), 1).constant) < EXACT
    )


def test_a_map_of_the_plain_block_is_its_row_of_the_out_projection_read_out():
    model = build()
    rows = blocks(model)[1].mlp.c_proj.weight.T
    expected = (rows - rows.mean(-1, keepdim=True)) * model.visual.ln_post.weight @ model.visual.proj
    assert far(neurons(model, pictures(model), 1).maps, expected) < EXACT


@pytest.mark.parametrize("options", [{}, INNER], ids=["plain", "custom"])
def test_the_maps_are_the_same_for_all_images(options):
    model = build(**options)
    one, other = (neurons(model, pictures(model, batch, seed), 1).maps for batch, seed in ((2, 1), (3, 5)))
    assert torch.equal(one, other)


def test_nothing_as_large_as_the_terms_is_kept():
    split = neurons(build(), pictures(build(), batch=3), 1)
    shapes = {key: tuple(value.shape) for key, value in fields(split).items()}
    assert shapes == {
        "embedding": (3, d),
        "term": (3, d),
        "activations": (3, n),
        "maps": (n, d),
        "constant": (3, d),
    }


@torch.no_grad()
def permute(model, layer, order):
    mlp = blocks(model)[layer].mlp
    for x in (
        mlp.c_fc.weight,
        mlp.c_fc.bias,
        *(mlp.ln.parameters() if "ln" in dict(mlp.named_children()) else ()),
    ):
        x.copy_(x[order])
    mlp.c_proj.weight.copy_(mlp.c_proj.weight[:, order])
    return model


@pytest.mark.parametrize("options", [{}, INNER], ids=["plain", "custom"])
def test_permuting_the_neurons_permutes_their_terms_and_nothing_else(options):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    before = neurons(build(**options), pictures(build()), 1)
    after = neurons(permute(build(**options), 1, order), pictures(build()), 1)
    assert far(after.terms(), before.terms()[:, order]) < EXACT
    assert far(after.terms(), before.terms()) > FAR
    assert far(after.constant, before.constant) < EXACT


@pytest.mark.parametrize("part", ["embedding", "term", "activations", "constant"])
def test_a_batch_gives_what_single_images_give(part):
    model = build(**INNER)
    images = pictures(model, batch=3)
    singles = torch.cat([getattr(neurons(model, image[None], 1), part) for image in images])
    together = getattr(neurons(model, images, 1), part)
    assert far(together, singles) < EXACT
    assert far(together[0], together[1]) > FAR


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_negative_layers_count_from_the_end(layer):
    model = build(**INNER)
    ours, truth = neurons(model, pictures(model), layer - 3), neurons(model, pictures(model), layer)
    assert all(torch.equal(getattr(ours, part), getattr(truth, part)) for part in fields(truth))


def test_layers_differ():
    model = build()
    assert (
        far(neurons(model, pictures(model), 0).activations, neurons(model, pictures(model), 1).activations)
        > FAR
    )


# An intervention: the neuron's direct effect, with norms frozen and what later blocks write held as it was.


@torch.no_grad()
def intervene(model, images, layer, j, value=None, hold=True, freeze=True):
    """The embedding with the neuron j at the class token set to a value.

    None: the run is only recorded and replayed.
    """
    block, after, written, norms = blocks(model)[layer], blocks(model)[layer + 1 :], {}, {}
    places = [x for later in after for x in (later.ls_1, later.ls_2)]
    inner = [block.mlp.ln] if isinstance(getattr(block.mlp, "ln", None), nn.LayerNorm) else []
    handles = [x.register_forward_hook(lambda m, args, output: written.update({m: output})) for x in places]
    handles += [
        x.register_forward_hook(lambda m, args, output: norms.update({m: std(m, args[0])}))
        for x in [*inner, model.visual.ln_post]
    ]
    model.encode_image(images)
    for handle in handles:
        handle.remove()

    def set_neuron(module, args, output):
        output = output.clone()
        output[:, 0, j] = value
        return output

    def as_it_was(module, args, output):
        gamma, beta = gamma_beta(module)
        return (args[0] - args[0].mean(-1, keepdim=True)) / norms[module] * gamma + beta

    handles = [] if value is None else [block.mlp.gelu.register_forward_hook(set_neuron)]
    handles += [x.register_forward_hook(lambda m, args, output: written[m]) for x in places if hold]
    handles += [x.register_forward_hook(as_it_was) for x in norms if freeze]
    embedding = model.encode_image(images)
    for handle in handles:
        handle.remove()
    return embedding[0] if isinstance(embedding, tuple) else embedding


@every_case
def test_a_silenced_neuron_takes_exactly_its_term_out_of_the_embedding(options, layer):
    model, j = build(**options), 5
    images = pictures(model)
    split, before = neurons(model, images, layer), intervene(model, images, layer, j)
    change = intervene(model, images, layer, j, value=0.0) - before
    assert far(before, split.embedding) < EXACT
    assert float((change + split.terms()[:, j]).abs().max()) < EXACT * float(before.abs().max())


@pytest.mark.parametrize("options", [{}, INNER], ids=["plain", "custom"])
def test_a_neuron_at_its_mean_adds_the_mean_less_its_term(options):
    model, j, layer = build(**options), 7, 1
    images = pictures(model, batch=3)
    split, hidden = neurons(model, images, layer), streams(model, images, layer)[0][:, j]
    divisor = hidden / split.activations[:, j]
    # The raw activation that is the mean once it reaches the embedding.
    at = split.activations[:, j].mean() * divisor
    change = intervene(model, images, layer, j, value=at) - split.embedding
    # A difference of near numbers.
    assert far(change, split.terms()[:, j].mean(dim=0) - split.terms()[:, j]) < 1e-8


@pytest.mark.parametrize("way", ["hold", "freeze"])
def test_a_silenced_neuron_changes_more_where_the_rest_may_answer(way):
    model, j, layer = build(**INNER), 5, 1
    images = pictures(model)
    change = intervene(model, images, layer, j, value=0.0, **{way: False}) - intervene(
        model, images, layer, j
    )
    assert far(change, -neurons(model, images, layer).terms()[:, j]) > FAR


# The model is left as found.


def test_the_model_is_left_as_found():
    model = half_trained(**INNER)
    before = found(model)
    neurons(model, pictures(model), 1)
    assert found(model) == before
    with pytest.raises(RuntimeError):
        neurons(model, torch.zeros(2, 3, 16, 16, dtype=torch.float64), 1)
    assert found(model) == before


def test_one_forward_pass_without_gradients():
    model, recorded = build(), []
    model.visual.register_forward_hook(lambda m, args, output: recorded.append(torch.is_grad_enabled()))
    split = neurons(model, pictures(model).requires_grad_(), 1)
    assert recorded == [False]
    assert not any(x.requires_grad for x in vars(split).values() if x is not None)


def test_the_attention_is_not_looked_at(monkeypatch):
    model, expected = build(), neurons(build(), pictures(build()), 1)
    monkeypatch.setattr(core.ClipTower, "watch", lambda *args: pytest.fail("attention was worked out"))
    assert torch.equal(neurons(model, pictures(model), 1).terms(), expected.terms())


def test_a_model_in_training_is_split_as_in_evaluation():
    model = build(patch_dropout=0.5)
    expected = neurons(model, pictures(model), 1).activations
    assert torch.equal(neurons(model.train(), pictures(model), 1).activations, expected)


# Other layouts, and precision.


@pytest.mark.parametrize("part", ["embedding", "term", "activations", "maps", "constant"])
def test_tokens_on_the_first_axis_give_the_same(part):
    ours, turned = (getattr(neurons(m, pictures(m), 1), part) for m in (build(), sequence_first(build())))
    assert far(turned, ours) < EXACT


def test_a_tower_of_older_releases_gives_the_same():
    model = build(block_type="custom", scale_fc=True)
    images, expected = pictures(model), neurons(model, pictures(model), 1).terms()
    model.visual = OlderTower(model.visual)
    assert far(neurons(model, images, 1).terms(), expected) < EXACT


def test_an_out_projection_without_bias_leaves_no_constant():
    model = build()
    blocks(model)[1].mlp.c_proj = nn.Linear(n, 32, bias=False, dtype=torch.float64)
    split = neurons(model, pictures(model), 1)
    assert not split.constant.any()
    assert far(split.total(), decompose(model, pictures(model)).mlps[:, 1]) < EXACT


def test_an_out_projection_without_bias_after_a_norm_leaves_beta():
    model = build(scale_fc=True)
    blocks(model)[1].mlp.c_proj = nn.Linear(n, 32, bias=False, dtype=torch.float64)
    split = neurons(model, pictures(model), 1)
    assert far(split.total(), decompose(model, pictures(model)).mlps[:, 1]) < EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_norm_without_gamma_and_beta_is_split(dtype):
    model = build(dtype, scale_fc=True, norm_kwargs={"elementwise_affine": False})
    split = neurons(model, pictures(model), 1)
    assert far(split.total(), decompose(model, pictures(model)).mlps[:, 1]) < SINGLE
    assert split.maps.dtype == dtype


def test_a_tower_without_projection_is_split_at_its_norm():
    model = build()
    model.visual.proj = None
    assert (
        far(neurons(model, pictures(model), 1).total(), decompose(model, pictures(model)).mlps[:, 1]) < EXACT
    )


def test_gradient_checkpointing_changes_nothing():
    model = build()
    plain = neurons(model, pictures(model), 1).activations
    model.set_grad_checkpointing()
    assert torch.equal(neurons(model, pictures(model), 1).activations, plain)


@pytest.mark.parametrize(
    ("mixed", "options"), [(False, {}), (True, {}), (False, INNER)], ids=["pure", "mixed", "custom"]
)
def test_a_model_in_half_precision_is_split_in_float32(mixed, options):
    model = half(torch.bfloat16, mixed, **options)
    split = neurons(model, pictures(model), 1)
    assert {key: value.dtype for key, value in fields(split).items()} == {
        "embedding": torch.bfloat16,
        "term": torch.float32,
        "activations": torch.float32,
        "maps": torch.float32,
        "constant": torch.float32,
    }
    assert 1e-6 < split.error() < HALF  # what the MLP wrote was rounded, the sum of neurons is not


@pytest.mark.parametrize("options", [{}, INNER], ids=["plain", "custom"])
def test_autocast_does_not_reach_the_sums(options):
    model = build(torch.float32, **options)
    plain, cast = (
        neurons(model, pictures(model), 1),
        under_autocast(lambda: neurons(model, pictures(model), 1)),
    )
    assert far(cast.maps, plain.maps) < SINGLE
    assert far(under_autocast(cast.total), cast.terms().sum(dim=1) + cast.constant) < SINGLE
    assert under_autocast(cast.error) == cast.error() < HALF


# Refusals.


@pytest.mark.parametrize("layer", [3, -4, 1.0, None, "1"])
def test_a_layer_that_is_not_there_is_refused(layer):
    model = build()
    with pytest.raises(ValueError, match=f"layer must be between -3 and 2, got {layer!r}"):
        neurons(model, pictures(model), layer)


def linear(*size):
    return nn.Linear(*size, dtype=torch.float64)


def steps(**named):
    mlp = nn.Sequential()
    for key, step in named.items():
        mlp.add_module(key, step)
    return mlp


OTHERS = {
    "no names": (lambda: nn.Sequential(linear(32, 32)), "is 0; expected c_fc, gelu, c_proj"),
    "no sequence": (lambda: nn.Identity(), "is Identity; expected c_fc, gelu, c_proj"),
    "a dropout": (
        lambda: steps(c_fc=linear(32, n), gelu=nn.GELU(), drop=nn.Dropout(), c_proj=linear(n, 32)),
        "is c_fc, gelu, drop, c_proj; expected",
    ),
    "a norm before the nonlinearity": (
        lambda: steps(c_fc=linear(32, n), ln=nn.LayerNorm(n).double(), gelu=nn.GELU(), c_proj=linear(n, 32)),
        "is c_fc, ln, gelu, c_proj; expected c_fc, gelu, c_proj, with or without a norm ln before c_proj",
    ),
    "another norm": (
        lambda: steps(c_fc=linear(32, n), gelu=nn.GELU(), ln=nn.RMSNorm(n).double(), c_proj=linear(n, 32)),
        "has RMSNorm as ln; expected LayerNorm",
    ),
    "another projection": (
        lambda: steps(c_fc=linear(32, n), gelu=nn.GELU(), c_proj=nn.Bilinear(n, n, 32)),
        "has Bilinear as c_proj; expected Linear",
    ),
}


@pytest.mark.parametrize(("mlp", "reason"), OTHERS.values(), ids=OTHERS)
def test_an_mlp_of_another_kind_is_refused_by_name(mlp, reason):
    model = build()
    blocks(model)[1].mlp = mlp()
    before = found(model)
    for layer in (1, -2):
        message = f"cannot decompose CLIP with image tower VisionTransformer: the MLP of block 1 {reason}"
        with pytest.raises(DecompositionError, match=message):
            neurons(model, pictures(model), layer)
    assert found(model) == before


def test_a_block_without_mlp_is_refused():
    model = build()
    del blocks(model)[2].mlp
    with pytest.raises(DecompositionError, match="block ResidualAttentionBlock has no mlp"):
        neurons(model, pictures(model), 2)


def test_an_mlp_of_another_kind_elsewhere_is_no_obstacle():
    model = build()
    blocks(model)[0].mlp = nn.Sequential(linear(32, 32))
    assert (
        far(neurons(model, pictures(model), 1).total(), decompose(model, pictures(model)).mlps[:, 1]) < EXACT
    )


def test_other_towers_and_objects_are_refused_as_by_decompose():
    with pytest.raises(
        DecompositionError,
        match=r"cannot decompose CLIP with image tower VisionTransformer: .*pooling 'none'",
    ):
        neurons(build(pool_type="none"), pictures(build()), 0)
    with pytest.raises(
        DecompositionError,
        match="cannot decompose Linear with image tower NoneType: it has no attribute `visual`",
    ):
        neurons(nn.Linear(2, 2), pictures(build()), 0)


# The task, what it keeps.


def some(images, seed=0, size=7, width=5, dtype=torch.float32):
    """Neurons of many images, with ties among the activations."""
    g = torch.Generator().manual_seed(seed)
    activations = torch.randint(-3, 4, (images, size), generator=g).to(dtype)
    maps, embedding = (
        torch.randn(size, width, generator=g, dtype=dtype),
        torch.randn(images, width, generator=g, dtype=dtype),
    )
    constant = torch.zeros(images, width, dtype=dtype)
    return Neurons(embedding, activations @ maps, activations, maps, constant)


def in_batches(all_of, sizes, kept=4):
    activity, start = Activity(2, all_of.maps, kept), 0
    for size in sizes:
        rows = slice(start, start + size)
        start += size
        parts = (getattr(all_of, key)[rows] for key in ("embedding", "term", "activations"))
        activity.update(
            Neurons(*parts, all_of.maps, all_of.constant[rows]), torch.arange(start - size, start)
        )
    return activity


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 1000))
def test_the_images_kept_are_the_first_of_all_sorted(sizes, kept, seed):
    whole = some(sum(sizes), seed)
    activity = in_batches(whole, sizes, kept)
    for j in range(7):
        # Of equals the earlier.
        order = sorted(range(sum(sizes)), key=lambda i, j=j: (-float(whole.activations[i, j]), i))[:kept]
        assert activity.images[j].tolist() == order
        assert activity.top[j].tolist() == whole.activations[order, j].tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 1000))
def test_mean_variance_and_spread_are_those_of_all_at_once(sizes, seed):
    whole = some(sum(sizes), seed, dtype=torch.float64)
    activity = in_batches(whole, sizes)
    close = {"rtol": 1e-6, "atol": 1e-12}  # embeddings are summed from float32
    torch.testing.assert_close(activity.activations.mean[:, 0], whole.activations.mean(0), **close)
    torch.testing.assert_close(
        activity.activations.covariance[:, 0, 0], whole.activations.var(0, correction=0), **close
    )
    spread = whole.terms().var(0, correction=0).sum(1) / whole.embedding.var(0, correction=0).sum()
    torch.testing.assert_close(activity.spread(), spread, **close)


def test_what_is_kept_does_not_grow_with_the_number_of_images():
    few, many = (in_batches(some(images), [10] * (images // 10)) for images in (10, 200))
    size = lambda activity: sum(x.numel() for x in vars(activity).values() if isinstance(x, torch.Tensor))  # noqa: E731
    assert size(few) == size(many)


def test_the_error_is_the_largest_of_the_pass():
    whole = some(6)
    whole.term[1] += 1
    activity = in_batches(whole, [2, 2, 2])
    assert activity.error == in_batches(whole, [2]).error > 0.01


@pytest.mark.parametrize(("asked", "layer"), [(None, 3), (0, 0), (3, 3), (-1, 3), (-4, 0)])
def test_the_layer_counts_from_either_end_and_is_the_last_by_default(asked, layer):
    assert choose_layer(asked, 4) == layer


@pytest.mark.parametrize("asked", [4, -5])
def test_a_layer_that_is_not_there_is_an_input_error_of_one_line(asked):
    with pytest.raises(
        InputError, match=f"^--layer {asked}: the model has layers 0 to 3, or -4 to -1 from the end$"
    ):
        choose_layer(asked, 4)


def test_what_all_texts_share_does_not_count():
    g = torch.Generator().manual_seed(4)
    texts, direction, shared = (
        torch.randn(9, 6, generator=g),
        torch.randn(6, generator=g),
        5 * torch.randn(6, generator=g),
    )
    assert torch.allclose(likeness(direction, texts + shared), likeness(direction, texts), atol=1e-5)
    plain, moved = (F.cosine_similarity(rows, direction[None]) for rows in (texts, texts + shared))
    assert not torch.allclose(moved, plain, atol=0.1)


def test_likeness_is_a_cosine():
    texts = torch.eye(3)
    centred = texts - 1 / 3
    assert torch.allclose(likeness(7 * centred[1], texts), torch.tensor([-0.5, 1.0, -0.5]))


def test_a_change_of_nothing_has_no_minus():
    row = {"neuron": "0.1", "spread": 0.5, "mean": 1.0, "variance": 4.0, "accuracy without it": 0.6999999}
    assert "accuracy without it 70.0 (+0.0)" in in_words(row, 0.7)
    assert "activation 1.000 ± 2.000" in in_words(row, 0.7)
    assert "accuracy without it 70.0 (-1.0)" in in_words(row, 0.71)


# The task on the demo.


def options(**more):
    defaults = {
        "task": "neurons",
        "layer": None,
        "order": 1,
        "protocol": "aligned",
        "neurons": 5,
        "text_bank": None,
        "limit": 96,
        "seed": 0,
        "reference": "train",
    }
    defaults |= {
        "model": None,
        "pretrained": None,
        "device": "cpu",
        "precision": "fp32",
        "batch_size": 40,
        "workers": 0,
        "data": None,
    }
    defaults |= {"out": Path("results"), "image_size": None, "resume": False, "save_every": 60.0}
    return Job(Namespace(**defaults | more))


@pytest.fixture(scope="module")
def ran():
    return captured(task, options())


@pytest.fixture(scope="module")
def truth():
    """The same images, all terms of all neurons of the last layer."""
    clip = load_clip(device="cpu")
    sets = {split: DemoBirds(split, clip.preprocess, 96, seed=0) for split in ("train", "test")}
    splits = {
        split: long_way(clip.model, torch.stack([x for x, _ in (data[i] for i in range(96))]), -1)
        for split, data in sets.items()
    }
    bank = load_bank(default_bank(clip))
    rows = clip.model.visual.transformer.resblocks[-1].mlp.c_proj.weight.T
    norm = clip.model.visual.ln_post
    with torch.no_grad():
        maps = (rows - rows.mean(-1, keepdim=True)) * norm.weight @ clip.model.visual.proj
    return SimpleNamespace(
        clip=clip, **sets, seen=splits, maps=maps, bank=bank, texts=embed_texts(clip, bank.texts),
        classes=classifier(clip, sets["test"].kinds, templates(clip)),
    )  # fmt: skip


def numbers(ran):
    return [int(row["neuron"].split(".")[1]) for row in ran.results["neurons"]]


def test_the_neurons_shown_are_those_of_largest_spread_with_mean_and_variance_in_the_embedding(ran, truth):
    seen = truth.seen["train"]
    spread = seen.terms.double().var(0).sum(1) / seen.embedding.double().var(0).sum()
    assert numbers(ran) == spread.argsort(descending=True)[:5].tolist()
    assert all(row["neuron"].startswith("3.") for row in ran.results["neurons"])
    assert [row["spread"] for row in ran.results["neurons"]] == pytest.approx(
        spread[numbers(ran)].tolist(), rel=1e-4
    )
    mine = truth.seen["train"].activations[:, numbers(ran)].double()
    assert [row["mean"] for row in ran.results["neurons"]] == pytest.approx(mine.mean(0).tolist(), rel=1e-4)
    assert [row["variance"] for row in ran.results["neurons"]] == pytest.approx(
        mine.var(0, correction=0).tolist(), rel=1e-4
    )


def test_the_images_are_those_of_largest_activation_with_their_facts_in_words(ran, truth):
    for j, row in zip(numbers(ran), ran.results["neurons"], strict=True):
        activations = truth.seen["train"].activations[:, j]
        order = activations.argsort(descending=True)[: task.KEPT].tolist()
        assert [i for i, _, _ in row["images"]] == order
        assert [caption for _, caption, _ in row["images"]] == [truth.train.caption(i) for i in order]
        assert [value for _, _, value in row["images"]] == pytest.approx(
            activations[order].tolist(), rel=1e-4
        )


def test_the_texts_are_the_nearest_and_the_farthest_by_cosine_less_the_mean_text(ran, truth):
    texts = truth.texts.double().numpy()
    texts = texts - texts.mean(axis=0)
    for j, row in zip(numbers(ran), ran.results["neurons"], strict=True):
        direction = truth.maps[j].double().numpy()
        fit = [float(t @ direction / ((t @ t) * (direction @ direction)) ** 0.5) for t in texts]
        order = sorted(range(len(fit)), key=lambda i: -fit[i])
        for sign, picked in (("towards", order[: task.SHOWN]), ("away from", order[::-1][: task.SHOWN])):
            assert [value for _, value in row[sign]] == pytest.approx([fit[i] for i in picked], abs=1e-5)
            by_name = dict(zip(truth.bank.texts, fit, strict=True))  # equal texts may change places
            assert [by_name[text] for text, _ in row[sign]] == pytest.approx(
                [value for _, value in row[sign]], abs=1e-5
            )
        assert row["towards"][0][1] > 0 > row["away from"][0][1]


def without(truth, chosen):
    """Accuracy with these neurons' terms at their mean over the training images, by hand."""
    terms, means = truth.seen["test"].terms[:, chosen], truth.seen["train"].terms[:, chosen].mean(0)
    embedding = truth.seen["test"].embedding - terms.sum(1) + means.sum(0)
    right = (F.normalize(embedding, dim=-1) @ truth.classes.T).argmax(1) == truth.test.facts["kind"]
    return right.double().mean().item()


def test_accuracies_are_of_the_stock_model_and_of_embeddings_with_those_terms_at_their_reference_mean(
    ran, truth
):
    assert ran.results["accuracy"]["base"] == pytest.approx(without(truth, []))
    assert [row["accuracy without it"] for row in ran.results["neurons"]] == pytest.approx(
        [without(truth, [j]) for j in numbers(ran)]
    )
    assert ran.results["accuracy"]["without the neurons shown"] == pytest.approx(without(truth, numbers(ran)))


def test_the_control_is_as_many_random_neurons_of_the_layer(ran, truth):
    draws = random_heads([(3, j) for j in numbers(ran)], 256, task.DRAWS, seed=0)
    assert {len(draw) for draw in draws} == {5}
    assert ran.results["random"] == pytest.approx([without(truth, [j for _, j in draw]) for draw in draws])


def test_ablations_that_matter_are_counted_exactly(truth):
    """Single neurons hardly change the accuracy: here quarters of the layer go, and means are moved."""
    activity = task.watch(options(), truth.train, 3)
    sets = [[], list(range(64)), list(range(64, 128)), list(range(128)), list(range(256))]
    labels = truth.test.facts["kind"]
    accuracy, _ = ablate(options(), truth.test, labels, truth.classes, activity, sets)
    assert accuracy == pytest.approx([without(truth, chosen) for chosen in sets])
    assert min(accuracy) < accuracy[0]  # or nothing was compared
    activity.rows.mean += 3
    moved = []
    for chosen in sets:
        embedding = truth.seen["test"].embedding + (
            (truth.seen["train"].activations.mean(0) + 3 - truth.seen["test"].activations)[:, chosen]
            @ truth.maps[chosen]
        )
        moved.append(((embedding @ truth.classes.T).argmax(1) == labels).double().mean().item())
    assert ablate(options(), truth.test, labels, truth.classes, activity, sets)[0] == pytest.approx(moved)
    assert moved != pytest.approx(accuracy)


def test_the_factors_are_epsilon_squared_on_the_test_images(ran, truth):
    for j, row in zip(numbers(ran), ran.results["neurons"], strict=True):
        activations = truth.seen["test"].activations[:, [j]].numpy()
        for factor, values in truth.test.facts.items():
            assert row["factors"][factor] == pytest.approx(
                epsilon_squared(activations, values.numpy())[1], abs=1e-4
            )
        best = max(row["factors"], key=row["factors"].get)
        assert f"   factor {best} {row['factors'][best]:.0%}\n" in ran.out


def test_everything_printed_is_in_the_results(ran):
    lines = ran.out.splitlines()
    for key, value in ran.results["settings"].items():
        assert any(line.startswith(f"{key}:") and line.endswith(value) for line in lines)
    base = ran.results["accuracy"]["base"]
    for row in ran.results["neurons"]:
        at = lines.index(f"neuron {row['neuron']:<7} {in_words(row, base)}")
        assert lines[at + 1] == "  towards    " + "; ".join(
            f"{text} {fit:+.2f}" for text, fit in row["towards"]
        )
        assert lines[at + 2] == "  away from  " + "; ".join(
            f"{text} {fit:+.2f}" for text, fit in row["away from"]
        )
        assert lines[at + 3] == "  fired by   " + "; ".join(
            f"{i}: {caption}" for i, caption, _ in row["images"][:3]
        )
    random = 100 * torch.tensor(ran.results["random"], dtype=torch.float64)
    table = lines[lines.index(next(line for line in lines if line.startswith("mean-ablated"))) :]
    assert table[2].split(maxsplit=1) == ["base", task.percent(base, 96)]
    assert table[3].endswith(task.percent(ran.results["accuracy"]["without the neurons shown"], 96))
    assert table[4].endswith(f"{random.mean():.1f} ± {random.std(correction=0):.1f}")
    assert table[5].endswith(f"{random.min():.1f}")
    assert "[..]: 95 % interval (Wilson)" in ran.out


def test_the_settings_say_where_the_numbers_come_from(ran):
    where = ran.results["settings"]
    assert where["model"] == "demo-vit, weights demo/demo-vit.safetensors, GELU, float32 on cpu"
    assert where["means"] == "demo world, train split, 96 images"
    assert where["test"] == "demo world, test split, 96 images"
    assert where["bank"].startswith("demo/text_bank.txt, 189 texts, less their mean")
    assert where["prompts"] == "6 templates, 8 classes; softmax of 29.9 cosine"
    assert where["layer"] == "3 of 0 to 3, 256 neurons"
    assert 0 < float(where["sum"].split(" within ")[1].split()[0]) < SINGLE
    assert where["seed"] == "0"
    assert (ran.results["layer"], ran.results["images"]) == (3, 96)


def test_the_results_are_json_and_the_page_shows_them(ran):
    assert json.loads(json.dumps(ran.results))["layer"] == 3
    document = report.page("neurons", ran.results["settings"], ran.sections)
    assert document.count("<img") == 5 * task.KEPT
    for row in ran.results["neurons"]:
        assert in_words(row, ran.results["accuracy"]["base"]) in document
        assert f"{row['towards'][0][0]} ({row['towards'][0][1]:+.2f})" in document


# The task, its options.


def short(**more):
    return task.run(options(limit=24, neurons=2, **more))[0]


def test_another_layer_and_more_neurons_than_it_has(capsys, monkeypatch):
    monkeypatch.setattr(task, "page", lambda *_: [])  # 1,536 pictures
    results, _ = task.run(options(limit=24, layer=-3, neurons=300))
    assert (results["layer"], len(results["neurons"]), results["random"]) == (1, 256, [])
    assert all(row["neuron"].startswith("1.") for row in results["neurons"])
    assert "random" not in capsys.readouterr().out
    spread = [row["spread"] for row in results["neurons"]]
    assert spread == sorted(spread, reverse=True)


@pytest.mark.slow
def test_the_seed_draws_other_images_and_neurons(capsys):
    first, again, other = short(), short(), short(seed=1)
    assert first == again != other
    assert other["settings"]["seed"] == "1"


def test_means_of_the_test_split_are_said_to_be(capsys):
    means = short(reference="test")["settings"]["means"]
    assert means == "demo world, test split, 24 images; on the images that are scored"


def test_fewer_images_than_are_kept(capsys):
    assert [len(row["images"]) for row in task.run(options(limit=4, neurons=2))[0]["neurons"]] == [4, 4]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"layer": 4}, "^--layer 4: the model has layers 0 to 3"),
        ({"limit": 1}, "1 images.* all have the same embedding; raise --limit"),
    ],
    ids=["layer", "limit"],
)
def test_what_cannot_be_done_is_an_input_error(more, reason):
    with pytest.raises(InputError, match=reason):
        task.run(options(**more))


def test_a_bank_of_one_text_is_refused(tmp_path):
    (tmp_path / "bank.txt").write_text("a bird\n")
    with pytest.raises(InputError, match=r"bank\.txt holds one text, and it takes two"):
        task.run(options(text_bank=tmp_path / "bank.txt"))


def test_embeddings_that_are_not_numbers_are_refused(truth, monkeypatch):
    bad = Neurons(torch.full((1, 96), torch.nan), *[torch.zeros(1, 1)] * 4)
    monkeypatch.setattr(task, "neurons", lambda model, images, layer: bad)
    with pytest.raises(
        InputError, match="demo-vit in fp32 gives embeddings that are not numbers; try --precision fp32"
    ):
        task.watch(options(), truth.train, 3)


def test_a_model_in_half_precision_is_run(capsys):
    assert short(precision="bf16")["settings"]["model"].endswith("bfloat16 on cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Waterbirds' layout with pictures of the demo, and beside it the same pictures without labels."""
    root, data = tmp_path_factory.mktemp("birds"), DemoBirds("test", lambda image: image, 24)
    (root / "plain").mkdir()
    with (root / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["img_id", "img_filename", "y", "split", "place"])
        for i in range(24):
            data[i][0].save(root / "plain" / f"{i}.png")
            rows.writerow([i, f"plain/{i}.png", int(data.y[i]), 0 if i < 12 else 2, int(data.place[i])])
    return root


def test_waterbirds_are_told_as_landbird_and_waterbird(folder, truth, capsys):
    results = short(data=folder)
    assert results["settings"]["prompts"] == "6 templates, 2 classes; softmax of 29.9 cosine"
    assert "factors" not in results["neurons"][0]
    assert results["neurons"][0]["images"][0][1].startswith("plain/")
    assert "Factor" not in capsys.readouterr().out
    pixels = torch.stack(
        [truth.clip.preprocess(Image.open(folder / "plain" / f"{i}.png")) for i in range(12, 24)]
    )
    classes = classifier(truth.clip, ["landbird", "waterbird"], templates(truth.clip))
    with torch.no_grad():
        told = (truth.clip.model.encode_image(pixels) @ classes.T).argmax(1)
    y = DemoBirds("test", lambda image: image, 24).y[12:]
    assert results["accuracy"]["base"] == pytest.approx((told == y).double().mean().item())


def test_a_folder_without_labels_is_refused(folder):
    with pytest.raises(InputError, match="has no labels"):
        task.run(options(data=folder / "plain"))


def test_the_command_line_runs_it(tmp_path, capsys):
    quick = ["--limit", "24", "--neurons", "2", "--workers", "0", "--out", str(tmp_path)]
    assert main(["--task", "neurons", "--layer", "0", *quick]) == 0
    assert json.loads((tmp_path / "neurons" / "results.json").read_text())["layer"] == 0
    capsys.readouterr()
    assert main(["--task", "neurons", "--layer", "9", *quick]) == 2
    assert (
        capsys.readouterr().err
        == "evaluate.py: --layer 9: the model has layers 0 to 3, or -4 to -1 from the end\n"
    )
