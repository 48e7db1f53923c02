"""decompose.neurons: one MLP's term, split by neuron, against the MLP run by hand."""

import pytest
import torch
from test_decompose import EXACT, OPTIONS, blocks, build, far, pictures

from decompose import DecompositionError, decompose, neurons


@pytest.mark.parametrize("layer", [0, 2, -1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_neurons_and_constant_sum_to_the_term_of_their_mlp(options, layer, monkeypatch):
    monkeypatch.setattr(torch, "bmm", torch.matmul)  # see test_decompose.working_bmm
    model = build(**options)
    images = pictures(model)
    split, whole = neurons(model, images, layer), decompose(model, images).mlps[:, layer]
    assert far(split.total(), whole) < EXACT
    assert far(split.terms().sum(dim=1) + split.constant, whole) < EXACT
    assert far(split.activations @ split.maps, whole) > 1e-3  # the constant is needed


def test_a_neuron_adds_its_activation_times_its_row_of_the_out_projection():
    model = build()
    images, seen = pictures(model), {}
    hook = blocks(model)[1].mlp.c_proj.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0][:, 0]))
    terms = decompose(model, images)
    hook.remove()
    split = neurons(model, images, 1)
    ratio = split.activations / seen["hidden"]  # one over sigma, the same for all neurons of an image
    assert far(ratio, ratio[:, :1].expand_as(ratio)) < EXACT
    assert far(split.embedding, terms.embedding) < EXACT


@torch.no_grad()
def test_without_a_neuron_the_embedding_loses_its_term():
    """In the last block, with the read-out's sigma as it was: norm after the fact has none to change where it is frozen by hand."""
    model = build()
    images = pictures(model)
    split, before = neurons(model, images, -1), decompose(model, images)
    blocks(model)[-1].mlp.c_proj.weight[:, 5] = 0
    after = decompose(model, images)
    frozen = neurons(model, images, -1).activations / split.activations  # sigma before over sigma after
    lost = before.mlps[:, -1] - after.mlps[:, -1] / frozen[:, :1]
    constant = split.constant - split.constant
    assert far(lost, split.terms()[:, 5] + constant) < 1e-8


def test_the_model_is_left_as_it_was():
    model = build(patch_dropout=0.5).train()
    before = {name: module.training for name, module in model.named_modules()}
    neurons(model, pictures(model), 0)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("layer", [3, -4, 1.0])
def test_a_layer_that_is_not_there_is_refused(layer):
    model = build()
    with pytest.raises(ValueError, match="between -3 and 2"):
        neurons(model, pictures(model), layer)


def test_an_mlp_of_another_kind_is_refused_by_name():
    model = build()
    blocks(model)[0].mlp = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises(DecompositionError, match="MLP of block 0"):
        neurons(model, pictures(model), 0)
