"""forward.py against a forward pass that is written out, with the heads' rows replaced in it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import EXACT, FAR
from test_decompose import build, far, found, pictures
from test_families import native

from decompose import DecompositionError, decompose
from forward import class_values, forward_without

MODELS = {"plain": {}, "LayerScale": {"ls_init_value": 0.3}, "QuickGELU": {"quick_gelu": True}}
every_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


@torch.no_grad()
def written_out(model, images, heads=(), values=None):
    """(embedding, what every head gives the class token) of a loop over the blocks, one head at a time."""
    visual, given_by = model.visual, []
    x = visual._embeds(images)
    for layer, block in enumerate(visual.transformer.resblocks):
        attn, y = block.attn, block.ln_1(x)
        q, k, v = F.linear(y, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        rows = []
        for head, (q_h, k_h, v_h) in enumerate(
            zip(*(z.chunk(attn.num_heads, dim=-1) for z in (q, k, v)), strict=True)
        ):
            mixed = (q_h @ k_h.mT * q_h.shape[-1] ** -0.5).softmax(dim=-1) @ v_h  # [b, N, e]
            if (layer, head) in heads:
                mixed[:, 0] = 0.0 if values is None else values[layer, head]
            rows.append(mixed)
        given_by.append(torch.stack([mixed[:, 0] for mixed in rows], dim=1))
        x = x + block.ls_1(attn.out_proj(torch.cat(rows, dim=-1)))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return visual.ln_post(x[:, 0]) @ visual.proj, torch.stack(given_by, dim=1)


@every_model
def test_what_heads_give_the_class_token_is_that_of_the_loop(options):
    model = build(**options)
    images = pictures(model)
    embedding, values = written_out(model, images)
    assert far(class_values(model, images), values) < EXACT
    assert far(embedding, decompose(model, images).embedding) < EXACT


@every_model
@settings(max_examples=10, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=6), st.booleans(), st.integers(0, 9))
def test_heads_replaced_in_the_pass_are_those_replaced_in_the_loop(options, heads, zeros, seed):
    model = build(**options)
    images = pictures(model, seed=seed)
    values = None if zeros else class_values(model, pictures(model, batch=4, seed=99)).mean(dim=0)
    without = forward_without(model, images, heads, values)
    assert far(without, written_out(model, images, heads, values)[0]) < EXACT
    if heads:  # and it is another embedding
        assert far(without, decompose(model, images).embedding) > FAR


def test_without_no_heads_the_embedding_is_the_models():
    model = build()
    images = pictures(model)
    assert far(forward_without(model, images, []), decompose(model, images).embedding) < EXACT


def test_half_precision_and_training_mode_are_left_as_they_were():
    model = build(dtype=torch.float32).train()
    before = found(model)
    out = forward_without(model, pictures(model), [(1, 2)])
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert not class_values(model, pictures(model)).requires_grad
    assert found(model) == before


def test_a_model_without_a_class_token_is_refused_by_name():
    model = native(pool_type="avg")
    with pytest.raises(DecompositionError, match="mean of patches"):
        forward_without(model, torch.randn(1, 3, *model.visual.image_size, dtype=torch.float64), [(0, 0)])


@pytest.mark.parametrize("head", [(3, 0), (0, 4), (-1, 0), (0, -1)])
def test_a_head_that_is_not_there_is_named(head):
    model = build()
    with pytest.raises(ValueError, match=r"no head \(.*3 layers of 4 heads"):
        forward_without(model, pictures(model), [(0, 0), head])
    forward_without(model, pictures(model), [(0, 0), (2, 3)])


def test_images_of_another_shape_are_refused():
    model = build()
    with pytest.raises(ValueError, match="images must be"):
        forward_without(model, pictures(model)[0], [(0, 0)])
