"""decompose.py against small random CLIPs of open_clip, and against the same terms worked out the long way.

The long way is `by_hand`. Wherever a term goes through a norm, the norm is frozen as it was in the forward
pass: the term's own mean is subtracted, and the divisor is that of the whole vector.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import ResidualAttentionBlock, Transformer
from small import (
    EXACT,
    FAR,
    HALF,
    INNER,
    ORDER,
    SINGLE,
    blocks,
    build,
    far,
    found,
    half,
    half_trained,
    permute_heads,
    permute_patches,
    permute_positions,
    pictures,
    sentences,
)
from torch import nn

from decompose import Decomposition, DecompositionError, check, decompose, head_maps, heatmap, token_scores

OPTIONS = {
    "plain": {},
    "quick gelu": {"quick_gelu": True},
    "layer scale": {"ls_init_value": 0.3},
    "no norm before": {"no_ln_pre": True},
    "norm after pooling": {"final_ln_after_pool": True},
    "tokens returned": {"output_tokens": True},
    "patch dropout": {"patch_dropout": 0.5},
    "large eps": {"norm_kwargs": {"eps": 0.1}},
    "norms without beta": {"norm_kwargs": {"bias": False}},
    "fixed positions": {"pos_embed_type": "sin_cos_2d", "image_size": 8},
    "oblong patches": {"patch_size": (4, 3), "image_size": (8, 9)},
    "custom block": {"block_type": "custom"},
    "norm of queries and keys": {"qk_norm": True},
    "scale of heads": {"scale_heads": True},
    "norm in attention": {"scale_attn_inner": True},
    "norm after attention": {"scale_attn": True},
    "norm in mlp": {"scale_fc": True},
    "norms with large eps": {**INNER, "norm_kwargs": {"eps": 0.1}},
    "all of them": {
        **INNER,
        "quick_gelu": True,
        "no_ln_pre": True,
        "final_ln_after_pool": True,
        "output_tokens": True,
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
both_conventions = pytest.mark.parametrize("convention", ["term", "paper"])
CALLS = {
    "decompose": lambda model, images, texts: decompose(model, images),
    "token_scores": token_scores,
    "heatmap": heatmap,
    "check": lambda model, images, texts: check(model, images, tolerance=1.0),
    "head_maps": lambda model, images, texts: head_maps(model),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def fields(terms):
    """Those that are not None."""
    return {name: value for name, value in vars(terms).items() if value is not None}


# The long way.


def std(norm, x):
    return ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + norm.eps).sqrt()


def gamma_beta(norm):
    return norm.weight, torch.zeros_like(norm.weight) if norm.bias is None else norm.bias


def scaled(norm, part, whole):
    """A part [b, ..., D] of the vector whole [b, D], divided as `norm` divides the whole, times gamma."""
    return part / std(norm, whole).reshape(len(part), *[1] * (part.ndim - 1)) * norm.weight


def frozen(norm, part, whole):
    """`norm` of a part of a vector, without beta."""
    return scaled(norm, part - part.mean(-1, keepdim=True), whole)


def attention_matrices(attn, y):
    """Attention [b, H, N, N] of all tokens, values [b, H, N, e]."""
    W, c = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = ((y @ W[i].T + c[i]).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for i in range(3))
    q, k = (attn.ln_q(q), attn.ln_k(k)) if hasattr(attn, "ln_q") else (q, k)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if getattr(attn, "head_scale", None) is not None:
        v = v * attn.head_scale
    return logits.softmax(-1), v


def attend(block, y):
    """What the attention writes: [b, N, D] in all; [b, H, N, D] to the class token, by head and source."""
    A, v = attention_matrices(block.attn, y)
    b, H, N, e = v.shape
    whole = (A @ v).transpose(1, 2).flatten(2)  # [b, N, H e]
    parts = torch.zeros(b, H, N, H, e, dtype=y.dtype)
    for h in range(H):
        parts[:, h, :, h] = A[:, h, 0, :, None] * v[:, h]
    parts = parts.flatten(3)  # [b, H, N, H e], zero outside the slot of the head
    for step in (getattr(block.attn, "ln_inner", None), block.attn.out_proj, getattr(block, "ln_attn", None)):
        if isinstance(step, nn.Linear):
            whole, parts = step(whole), parts @ step.weight.T
        elif isinstance(step, nn.LayerNorm):
            whole, parts = step(whole), frozen(step, parts, whole[:, 0])
    return block.ls_1(whole), block.ls_1(parts)


@torch.no_grad()
def by_hand(model, images, convention="term"):
    """The terms of `decompose`, and sources [b, L, H, N, d]: each source token's part of a head's term."""
    visual = model.visual
    x = visual._embeds(images)
    stem, sources, heads, biases, mlps = x[:, 0], [], [], [], []
    for block in blocks(model):
        written, parts = attend(block, block.ln_1(x))
        sources.append(parts)
        heads.append(parts.sum(2))
        biases.append(written[:, 0] - parts.sum((1, 2)))  # what the attention writes and no head does
        mlps.append(block.ls_2(block.mlp(block.ln_2(x + written))))
        x = x + written + mlps[-1]
    last, norm, P = x[:, 0], visual.ln_post, visual.proj
    sources, heads, biases, mlps = (
        torch.stack(ts, 1) for ts in (sources, heads, biases, [m[:, 0] for m in mlps])
    )
    embedding, beta = norm(last) @ P, gamma_beta(norm)[1] @ P
    sources = frozen(norm, sources, last) @ P
    L, H = heads.shape[1:3]
    if convention == "term":
        stem, heads, biases, mlps = (frozen(norm, t, last) @ P for t in (stem, heads, biases, mlps))
        constant = biases.sum(1) + beta
    else:
        share = (beta - scaled(norm, last.mean(-1, keepdim=True).expand_as(last), last) @ P) / (2 * L + 1)
        stem, heads, biases, mlps = (scaled(norm, t, last) @ P for t in (stem, heads, biases, mlps))
        stem, mlps, constant = stem + share, mlps + share[:, None], torch.zeros_like(share)
        heads = heads + (biases / H)[:, :, None] + (share / H)[:, None, None]
    return SimpleNamespace(
        embedding=embedding,
        stem=stem,
        heads=heads,
        mlps=mlps,
        constant=constant,
        sources=sources,
        biases=biases,
        sigma=std(norm, last),
    )


@every_option
def test_the_long_way_ends_at_the_stock_embedding(options):
    model = build(**options)
    stock = model.encode_image(pictures(model))
    stock = stock[0] if isinstance(stock, tuple) else stock
    assert far(by_hand(model, pictures(model)).embedding, stock) < EXACT


# The sum.


@both_conventions
@every_option
def test_the_terms_sum_to_the_embedding(options, convention):
    model = build(**options)
    assert decompose(model, pictures(model), convention=convention).error() < EXACT


@st.composite
def models(draw):
    heads, head_width = draw(st.integers(1, 4)), draw(st.sampled_from([4, 6, 8]))
    rows, columns, patch = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    flag = st.booleans()
    names = (
        "qk_norm",
        "scale_heads",
        "scale_attn_inner",
        "scale_attn",
        "scale_fc",
        "no_ln_pre",
        "final_ln_after_pool",
        "output_tokens",
    )
    more = st.fixed_dictionaries(
        dict.fromkeys(names, flag),
        optional={
            "quick_gelu": flag,
            "ls_init_value": st.floats(0.01, 2),
            "patch_dropout": st.floats(0.1, 0.9),
            "block_type": st.just("custom"),
            "norm_kwargs": st.fixed_dictionaries({"eps": st.floats(1e-8, 1)}),
        },
    )
    return build(
        layers=draw(st.integers(1, 4)),
        width=heads * head_width,
        head_width=head_width,
        patch_size=patch,
        image_size=(rows * patch, columns * patch),
        **(draw(more) if draw(flag) else {}),
    )


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(1, 3), st.sampled_from(["term", "paper"]), st.integers(0, 1000))
def test_the_terms_sum_to_the_embedding_whatever_the_shape_and_options(model, batch, convention, seed):
    assert decompose(model, pictures(model, batch, seed), convention=convention).error() < EXACT


@settings(max_examples=20, deadline=None)
@given(models(), st.integers(1, 3))
def test_the_source_tokens_sum_to_the_heads_whatever_the_shape_and_options(model, batch):
    images, texts = pictures(model, batch), sentences(model)
    assert far(token_scores(model, images, texts).sum(3), decompose(model, images).heads @ texts.T) < EXACT


@both_conventions
@every_option
def test_the_terms_of_a_float32_model_sum_to_the_embedding(options, convention):
    model = build(torch.float32, **options)
    assert decompose(model, pictures(model), convention=convention).error() < SINGLE


@pytest.mark.parametrize("part", ["stem", "heads", "mlps", "constant", "embedding"])
def test_the_error_is_not_small_once_a_term_is_altered(part):
    terms = decompose(build(), pictures(build()))
    assert replace(terms, **{part: 1.1 * getattr(terms, part)}).error() > FAR


@pytest.mark.parametrize("part", ["stem", "heads", "mlps", "constant"])
def test_the_total_is_the_sum_of_every_term(part):
    parts = {
        "stem": torch.zeros(2, 5),
        "heads": torch.zeros(2, 3, 4, 5),
        "mlps": torch.zeros(2, 3, 5),
        "constant": torch.zeros(2, 5),
    }
    parts[part] = torch.randn_like(parts[part])
    terms = Decomposition(
        embedding=torch.ones(2, 5), values=torch.ones(2, 3, 4, 2), own=torch.ones(2, 3, 4, 2), **parts
    )
    assert torch.allclose(terms.total(), parts[part].reshape(2, -1, 5).sum(1))


def alone(stem, embedding):
    """A decomposition of nothing but a stem."""
    b, d = stem.shape
    zero = torch.zeros_like(stem)
    return Decomposition(
        embedding, stem, torch.zeros(b, 1, 1, d), torch.zeros(b, 1, d), zero, *[torch.zeros(b, 1, 1, 1)] * 2
    )


def test_the_error_is_the_largest_difference_over_the_largest_entry():
    stem, embedding = torch.tensor([[1.0, 2.0], [3.0, -8.5]]), torch.tensor([[1.0, 2.25], [3.0, -8.0]])
    assert alone(stem, embedding).error() == 0.5 / 8
    assert alone(torch.ones(2, 2), torch.ones(2, 2)).error() == 0


@pytest.mark.parametrize("where", ["terms", "embedding"])
def test_the_error_is_nan_where_one_number_is(where):
    good, bad = torch.ones(2, 2), torch.tensor([[1.0, 1.0], [torch.nan, 1.0]])
    error = alone(bad, good).error() if where == "terms" else alone(good, bad).error()
    assert error != error


@torch.no_grad()
def stock(model):
    """The embedding."""
    embedding = model.encode_image(pictures(model))
    return embedding[0] if isinstance(embedding, tuple) else embedding


def test_the_embedding_is_what_the_stock_model_returns():
    model = build()
    assert torch.equal(decompose(model, pictures(model)).embedding, stock(model))


# Term by term, against the long way.


@pytest.mark.parametrize("part", ["stem", "heads", "mlps", "constant"])
@both_conventions
@every_option
def test_each_term_is_that_of_the_long_way(options, convention, part):
    model = build(**options)
    ours, truth = (
        getattr(route(model, pictures(model), convention=convention), part) for route in (decompose, by_hand)
    )
    assert float((ours - truth).abs().max()) < EXACT * float(
        by_hand(model, pictures(model)).embedding.abs().max()
    )


@pytest.mark.parametrize("part", ["stem", "heads", "mlps", "constant"])
def test_the_conventions_differ_in_every_term(part):
    model = build()
    term, paper = (getattr(decompose(model, pictures(model), convention=c), part) for c in ("term", "paper"))
    assert far(paper, term) > FAR


def test_the_convention_is_term_unless_told_otherwise():
    model = build()
    assert torch.equal(
        decompose(model, pictures(model)).heads, decompose(model, pictures(model), convention="term").heads
    )
    with pytest.raises(ValueError, match=r"convention must be .*'mine'"):
        decompose(build(), pictures(build()), convention="mine")


def test_the_constant_of_convention_paper_is_zero():
    assert not decompose(build(), pictures(build()), convention="paper").constant.any()


def test_the_constant_of_the_plain_block_is_the_biases_and_beta_read_out():
    model = build()
    visual, sigma = model.visual, by_hand(model, pictures(model)).sigma
    bias = sum(block.attn.out_proj.bias for block in blocks(model))
    expected = (
        bias - bias.mean()
    ) / sigma * visual.ln_post.weight @ visual.proj + visual.ln_post.bias @ visual.proj
    assert far(decompose(model, pictures(model)).constant, expected) < EXACT


@every_option
def test_a_head_is_its_values_through_its_map(options):
    model = build(**options)
    terms = decompose(model, pictures(model))
    assert far(torch.einsum("blhe,lhed->blhd", terms.values, head_maps(model)), terms.heads) < EXACT


def test_the_values_do_not_depend_on_the_convention_and_the_maps_not_on_the_stream():
    model = build()
    term, paper = (decompose(model, pictures(model), convention=c).values for c in ("term", "paper"))
    assert torch.equal(term, paper)
    before = head_maps(model)
    decompose(model, pictures(model))
    assert torch.equal(head_maps(model), before)


def test_values_and_maps_of_the_plain_block_by_hand():
    model = build()
    x, truth = model.visual._embeds(pictures(model)), []
    for block in blocks(model):
        A, v = attention_matrices(block.attn, block.ln_1(x))
        truth.append((A @ v)[:, :, 0])
        x = block(x)
    truth = torch.stack(truth, 1) / by_hand(model, pictures(model)).sigma[:, :, None, None]
    assert far(decompose(model, pictures(model)).values, truth) < EXACT
    visual, out = model.visual, blocks(model)[1].attn.out_proj.weight  # [D, H e]
    columns = out[:, 16:24].T  # head 2
    expected = (columns - columns.mean(-1, keepdim=True)) * visual.ln_post.weight @ visual.proj
    assert far(head_maps(model)[1, 2], expected) < EXACT


@every_option
def test_each_source_token_is_that_of_the_long_way(options):
    model = build(**options)
    texts = sentences(model)
    assert (
        far(token_scores(model, pictures(model), texts), by_hand(model, pictures(model)).sources @ texts.T)
        < EXACT
    )


def test_a_value_bias_moves_only_its_head_and_what_comes_after():
    model, step = build(), torch.linspace(-1, 2, 8, dtype=torch.float64)
    images, last = pictures(model), blocks(model)[-1]
    before, sigma_before, maps = decompose(model, images), by_hand(model, images).sigma, head_maps(model)
    with torch.no_grad():
        # Queries and keys are 32 wide each; head 1 of the values.
        last.attn.in_proj_bias[64 + 8 : 64 + 16] += step
    after, sigma_after = decompose(model, images), by_hand(model, images).sigma
    # Undo the read-out's divisor.
    moved = after.heads * sigma_after[:, :, None, None] - before.heads * sigma_before[:, :, None, None]
    expected = torch.zeros_like(moved)
    expected[:, 2, 1] = step @ maps[2, 1]  # once: attention weights sum to one
    assert far(moved, expected) < EXACT


def test_a_value_bias_moves_the_mlp_after_it():
    model = build()
    images, last = pictures(model), blocks(model)[-1]
    before, sigma_before = decompose(model, images), by_hand(model, images).sigma
    with torch.no_grad():
        last.attn.in_proj_bias[64:72] += 1
    after, sigma_after = decompose(model, images), by_hand(model, images).sigma
    moved = (after.mlps * sigma_after[:, :, None] - before.mlps * sigma_before[:, :, None]).abs().amax((0, 2))
    assert (moved > FAR).tolist() == [False, False, True]


def test_a_tower_without_projection_is_read_out_at_its_norm():
    model = build()
    model.visual.proj = None
    assert decompose(model, pictures(model)).error() < EXACT
    texts = torch.eye(32, dtype=torch.float64)
    assert (
        far(token_scores(model, pictures(model), texts).sum(3), decompose(model, pictures(model)).heads)
        < EXACT
    )


def sequence_first(model):
    """The same model with tokens on the first axis inside the transformer, as in older open_clip releases."""
    turned = Transformer(32, 3, 4, mlp_ratio=2.0, batch_first=False).to(torch.float64)
    turned.load_state_dict(model.visual.transformer.state_dict())
    model.visual.transformer = turned
    return model.eval()


@pytest.mark.parametrize("part", ["stem", "heads", "mlps", "constant", "embedding"])
def test_tokens_on_the_first_axis_give_the_same_terms(part):
    ours, turned = (getattr(decompose(m, pictures(m)), part) for m in (build(), sequence_first(build())))
    assert far(turned, ours) < EXACT


def test_tokens_on_the_first_axis_give_the_same_source_tokens():
    ours, turned = (token_scores(m, pictures(m), sentences(m)) for m in (build(), sequence_first(build())))
    assert far(turned, ours) < EXACT


def test_a_model_with_tokens_on_the_first_axis_is_blamed_for_the_right_block():
    model = sequence_first(build())
    spoil(blocks(model)[1].attn)
    with pytest.raises(DecompositionError, match="largest gap in block 1"):
        check(model, pictures(model))


def test_a_custom_attention_without_biases_is_decomposed():
    model = build(block_type="custom")
    for block in blocks(model):
        block.attn.in_proj_bias = None
    assert decompose(model, pictures(model)).error() < EXACT


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, EXACT), (torch.float32, SINGLE), (torch.bfloat16, HALF)], ids=str
)
def test_norms_without_gamma_and_beta_are_decomposed(dtype, bound):
    model = build(dtype, norm_kwargs={"elementwise_affine": False})
    images, texts = pictures(model), sentences(model)
    terms = decompose(model, images)
    assert terms.error() < bound
    assert (
        far(token_scores(model, images, texts).sum(3), terms.heads @ texts.to(terms.heads.dtype).T) < SINGLE
    )


@both_conventions
def test_an_attention_without_any_bias_is_decomposed(convention):
    model = build()
    blocks(model)[1].attn = nn.MultiheadAttention(32, 4, bias=False, batch_first=True, dtype=torch.float64)
    assert decompose(model, pictures(model), convention=convention).error() < EXACT


def test_gradient_checkpointing_changes_nothing():
    model = build()
    plain = decompose(model, pictures(model)).heads
    model.set_grad_checkpointing()
    assert torch.equal(decompose(model, pictures(model)).heads, plain)


# Source tokens and heat maps.


@every_option
def test_the_source_tokens_sum_to_the_heads(options):
    model = build(**options)
    texts = sentences(model)
    assert (
        far(
            token_scores(model, pictures(model), texts).sum(3),
            decompose(model, pictures(model)).heads @ texts.T,
        )
        < EXACT
    )


def test_token_scores_have_the_axes_of_the_docstring_and_do_not_sum_to_the_heads_without_the_class_token():
    model = build()
    texts = sentences(model)
    scores = token_scores(model, pictures(model), texts)
    assert far(scores[:, :, :, 1:].sum(3), decompose(model, pictures(model)).heads @ texts.T) > FAR
    assert token_scores(model, pictures(model), sentences(model)).shape == (2, 3, 4, 1 + 2 * 3, 5)


@pytest.mark.parametrize("wanted", [[0], [2, 0], [-1], [-3, 1], [1, 1], (0, 1, 2), range(2)], ids=str)
def test_layers_come_in_the_order_wanted(wanted):
    model = build()
    every = token_scores(model, pictures(model), sentences(model))
    some = token_scores(model, pictures(model), sentences(model), layers=wanted)
    assert torch.equal(some, every[:, [i % 3 for i in wanted]])


@pytest.mark.parametrize("wanted", [[3], [-4], [0, 3], []], ids=str)
def test_layers_that_do_not_exist_are_refused(wanted):
    model = build()
    with pytest.raises(ValueError, match="layers must be between -3 and 2 and at least one"):
        token_scores(model, pictures(model), sentences(model), layers=wanted)


@pytest.mark.parametrize("call", [token_scores, heatmap])
@pytest.mark.parametrize("shape", [(5, 23), (5, 25), (24,), (1, 5, 24)], ids=str)
def test_texts_of_another_shape_are_refused(call, shape):
    model = build()
    with pytest.raises(ValueError, match=r"texts must be \[t, 24\]"):
        call(model, pictures(model), torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", [token_scores, heatmap])
def test_texts_of_any_precision_are_taken(call, dtype):
    model = build(torch.float32)
    texts = sentences(model).to(dtype)
    assert (
        far(call(model, pictures(model), texts).float(), call(model, pictures(model), texts.float())) < SINGLE
    )


def test_a_float64_model_takes_float32_texts():
    model = build()
    texts = sentences(model).float()
    assert (
        far(
            token_scores(model, pictures(model), texts).double(),
            token_scores(model, pictures(model), texts.double()),
        )
        < SINGLE
    )


@every_option
def test_a_heatmap_is_the_patches_summed_over_layers_and_heads(options):
    model = build(**options)
    scores = token_scores(model, pictures(model), sentences(model))
    rows, columns = model.visual.grid_size
    expected = scores[:, :, :, 1:].sum((1, 2)).reshape(2, rows, columns, 5).permute(0, 3, 1, 2)
    assert far(heatmap(model, pictures(model), sentences(model)), expected) < EXACT


@pytest.mark.parametrize("at", [(0, 0), (0, 2), (1, 0), (1, 2)], ids=str)
def test_one_patch_of_the_image_moves_the_heatmap_there_and_nowhere_else(at):
    model = build(layers=1)
    with torch.no_grad():
        # No queries and keys: even attention, so that patches do not meet.
        blocks(model)[0].attn.in_proj_weight[:64] = 0
        blocks(model)[0].attn.in_proj_bias[:64] = 0
    images, (row, column) = pictures(model), at
    bright = images.clone()
    bright[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 2 * torch.randn(
        4, 4, dtype=torch.float64
    )
    maps = [
        heatmap(model, x, sentences(model)) * by_hand(model, x).sigma[:, :, None, None]
        for x in (images, bright)
    ]
    moved = (maps[1] - maps[0]).abs().amax((0, 1))
    expected = torch.zeros(2, 3, dtype=torch.bool)
    expected[at] = True
    assert torch.equal(moved > EXACT, expected)


def test_a_heatmap_of_one_layer_is_that_of_its_token_scores():
    model = build(layers=1)
    scores = token_scores(model, pictures(model), sentences(model))[:, 0, :, 1:].sum(1)  # [b, N - 1, t]
    assert far(heatmap(model, pictures(model), sentences(model)).flatten(2), scores.mT) < EXACT


# Invariances.


def test_permuting_the_heads_permutes_their_terms():
    order = [2, 0, 3, 1]
    before, after = (
        decompose(build(), pictures(build())),
        decompose(permute_heads(build(), order), pictures(build())),
    )
    assert far(after.heads, before.heads[:, :, order]) < EXACT
    before, after = (
        decompose(build(), pictures(build())),
        decompose(permute_heads(build(), [2, 0, 3, 1]), pictures(build())),
    )
    assert far(after.heads, before.heads) > FAR


@pytest.mark.parametrize("part", ["embedding", "stem", "heads", "mlps", "constant", "values"])
@both_conventions
def test_a_batch_gives_what_single_images_give(convention, part):
    model = build(**INNER)
    images = pictures(model, batch=3)
    singles = torch.cat(
        [getattr(decompose(model, image[None], convention=convention), part) for image in images]
    )
    together = getattr(decompose(model, images, convention=convention), part)
    # Absolute, for the constant of "paper" is zero; terms are of order one.
    assert float((together - singles).abs().max()) < EXACT


def test_the_images_of_a_batch_have_terms_of_their_own():
    heads = decompose(build(), pictures(build())).heads
    assert far(heads[0], heads[1]) > FAR


@pytest.mark.parametrize("call", [token_scores, heatmap])
def test_a_batch_scores_as_single_images_do(call):
    model = build(**INNER)
    images, texts = pictures(model, batch=3), sentences(model)
    assert (
        far(call(model, images, texts), torch.cat([call(model, image[None], texts) for image in images]))
        < EXACT
    )


def test_permuting_patches_leaves_the_heads_if_their_positions_go_with_them():
    images = pictures(build())
    before = decompose(build(), images).heads
    after = decompose(permute_positions(build(), ORDER), permute_patches(images, ORDER)).heads
    assert far(after, before) < EXACT
    assert (
        far(decompose(build(), permute_patches(images, ORDER)).heads, decompose(build(), images).heads) > FAR
    )


def test_permuting_patches_with_their_positions_permutes_the_sources():
    images, texts = pictures(build()), sentences(build())
    before = token_scores(build(), images, texts)
    after = token_scores(permute_positions(build(), ORDER), permute_patches(images, ORDER), texts)
    assert far(after, before[:, :, :, [0] + [1 + i for i in ORDER]]) < EXACT


def test_scores_are_linear_in_the_texts():
    model = build()
    texts = sentences(model)
    scores = token_scores(model, pictures(model), texts)
    both = token_scores(model, pictures(model), (texts[0] - 2 * texts[1])[None])
    assert far(both[..., 0], scores[..., 0] - 2 * scores[..., 1]) < EXACT


# The model is left as found.


@every_call
def test_the_model_is_left_as_found(call):
    model = half_trained(**INNER)
    before = found(model)
    call(model, pictures(model), sentences(model))
    assert found(model) == before


@pytest.mark.parametrize("name", ["decompose", "token_scores", "heatmap", "check"])
def test_the_model_is_left_as_found_when_its_forward_raises(name):
    model = half_trained(**INNER)
    before = found(model)
    with pytest.raises(RuntimeError):
        CALLS[name](model, torch.zeros(2, 3, 16, 16, dtype=torch.float64), sentences(model))
    assert found(model) == before


def test_the_model_is_left_as_found_when_the_check_fails():
    model = half_trained(**INNER)
    before = found(model)
    with pytest.raises(DecompositionError, match="do not sum"):
        check(model, pictures(model), tolerance=-1.0)
    assert found(model) == before


def test_the_model_is_left_as_found_when_the_search_for_the_culprit_raises():
    model, calls = half_trained(**INNER), []

    def second_time(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    model.visual.ln_post.register_forward_hook(second_time)
    before = found(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        check(model, pictures(model), tolerance=-1.0)
    assert found(model) == before


def failed_check(model, images, texts):
    with pytest.raises(DecompositionError, match="do not sum"):
        check(model, images, tolerance=-1.0)


@pytest.mark.parametrize(
    ("call", "passes"), [(CALLS["decompose"], 1), (token_scores, 1), (heatmap, 1), (failed_check, 2)]
)
def test_no_forward_pass_records_gradients(call, passes):
    model, recorded = build(), []
    model.visual.register_forward_hook(lambda m, args, output: recorded.append(torch.is_grad_enabled()))
    call(model, pictures(model), sentences(model))
    assert recorded == [False] * passes


@every_call
def test_nothing_carries_gradients(call):
    model = build()
    result = call(model, pictures(model).requires_grad_(), sentences(model).requires_grad_())
    tensors = fields(result).values() if isinstance(result, Decomposition) else [torch.as_tensor(result)]
    assert not any(t.requires_grad for t in tensors)


def test_a_model_in_training_is_decomposed_as_in_evaluation():
    model = build(patch_dropout=0.5)
    expected = decompose(model, pictures(model)).heads
    assert torch.equal(decompose(model.train(), pictures(model)).heads, expected)
    assert far(model.train().encode_image(pictures(model)), model.eval().encode_image(pictures(model))) > FAR


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_call
def test_calls_under_no_grad_and_inference_mode_give_the_same(call, mode):
    model = build()
    expected = call(model, pictures(model), sentences(model))
    with mode():
        result = call(model, pictures(model), sentences(model))
    pick = (lambda r: r.heads) if isinstance(result, Decomposition) else torch.as_tensor
    assert torch.equal(pick(result), pick(expected))


@every_call
def test_a_model_made_in_inference_mode_is_decomposed(call):
    with torch.inference_mode():
        model = build()
    call(model, pictures(model), sentences(model))


# Precision.


def under_autocast(call):
    with torch.autocast("cpu", torch.bfloat16):
        return call()


@both_conventions
@pytest.mark.parametrize("options", [{}, INNER], ids=["plain", "custom"])
def test_autocast_costs_no_more_than_the_forward_pass_rounds(options, convention):
    model = build(torch.float32, **options)
    assert under_autocast(lambda: decompose(model, pictures(model), convention=convention)).error() < HALF


def test_autocast_does_round_the_forward_pass():
    model = build(torch.float32)
    stock = model.encode_image(pictures(model))
    assert far(under_autocast(lambda: model.encode_image(pictures(model))).float(), stock) > FAR


@pytest.mark.parametrize("options", [{}, INNER], ids=["plain", "custom"])
def test_autocast_does_not_reach_the_sums(options):
    model = build(torch.float32, **options)
    maps = head_maps(model)
    terms = under_autocast(lambda: decompose(model, pictures(model)))
    # The values were made from rounded inputs, but what is done with them is float32 throughout.
    assert far(torch.einsum("blhe,lhed->blhd", terms.values, maps), terms.heads) < SINGLE


def rounded_pass(model, convention="term"):
    """The decomposition under autocast, and in float64 that pass's stem, first norm and last norm."""
    seen, first, norm = {}, blocks(model)[0], model.visual.ln_post
    first.register_forward_pre_hook(lambda module, args: seen.update(stem=args[0][:, 0].double()))
    first.ln_1.register_forward_hook(lambda module, args, output: seen.update(y=output.double()))
    norm.register_forward_pre_hook(lambda module, args: seen.update(last=args[0][:, 0].double()))
    terms = under_autocast(lambda: decompose(model, pictures(model), convention=convention))
    model.double()
    return terms, SimpleNamespace(**seen)


@both_conventions
def test_the_stem_under_autocast_is_read_out_in_float32(convention):
    model = build(torch.float32)
    terms, seen = rounded_pass(model, convention)
    norm, P = model.visual.ln_post, model.visual.proj
    if convention == "term":
        expected = frozen(norm, seen.stem, seen.last) @ P
    else:
        mean = seen.last.mean(-1, keepdim=True).expand_as(seen.last)
        expected = (
            scaled(norm, seen.stem, seen.last) @ P + (norm.bias - scaled(norm, mean, seen.last)) @ P / 7
        )
    assert far(terms.stem.double(), expected) < SINGLE


def test_the_attention_under_autocast_is_worked_out_in_float32():
    model = build(torch.float32)
    terms, seen = rounded_pass(model)
    # y was rounded by the pass; what is done with it is not
    A, v = attention_matrices(blocks(model)[0].attn, seen.y)
    expected = (A @ v)[:, :, 0] / std(model.visual.ln_post, seen.last)[:, :, None]
    assert far(terms.values[:, 0].double(), expected) < SINGLE


@pytest.mark.parametrize("options", [{}, INNER], ids=["plain", "custom"])
def test_the_source_tokens_sum_to_the_heads_under_autocast(options):
    model = build(torch.float32, **options)
    images, texts = pictures(model), sentences(model)
    heads = under_autocast(lambda: decompose(model, images)).heads
    assert far(under_autocast(lambda: token_scores(model, images, texts)).sum(3), heads @ texts.T) < SINGLE


def test_a_heatmap_under_autocast_is_the_sum_of_its_token_scores_and_head_maps_are_the_same():
    model = build(torch.float32)
    images, texts = pictures(model), sentences(model)
    scores = (
        under_autocast(lambda: token_scores(model, images, texts))[:, :, :, 1:]
        .sum((1, 2))
        .mT.unflatten(2, (2, 3))
    )
    assert far(under_autocast(lambda: heatmap(model, images, texts)), scores) < SINGLE
    assert far(under_autocast(lambda: head_maps(model)), head_maps(model)) < SINGLE


@both_conventions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("mixed", "options"), [(False, {}), (True, {}), (False, INNER)], ids=["pure", "mixed", "custom"]
)
def test_the_terms_of_a_model_in_half_precision_sum_to_the_embedding(dtype, mixed, options, convention):
    model = half(dtype, mixed, **options)
    assert decompose(model, pictures(model), convention=convention).error() < HALF


@pytest.mark.parametrize("mixed", [False, True], ids=["pure", "mixed"])
@pytest.mark.parametrize("part", ["stem", "heads", "mlps", "constant", "values"])
def test_the_terms_of_a_model_in_half_precision_are_float32(part, mixed):
    model = half(torch.bfloat16, mixed)
    assert getattr(decompose(model, pictures(model)), part).dtype == torch.float32


@pytest.mark.parametrize("mixed", [False, True], ids=["pure", "mixed"])
def test_a_model_in_half_precision_has_its_own_embedding_and_source_tokens_that_sum_to_the_heads(mixed):
    model = half(torch.bfloat16, mixed)
    terms = decompose(model, pictures(model))
    assert terms.embedding.dtype == torch.bfloat16
    assert torch.equal(terms.embedding, stock(model))
    images, texts = pictures(model), sentences(model)
    # float32 sums over the same rounded inputs: only the forward pass is in half precision
    assert (
        far(token_scores(model, images, texts).sum(3), decompose(model, images).heads @ texts.float().T)
        < SINGLE
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_terms_have_the_precision_of_the_model(dtype):
    model = build(dtype)
    assert {x.dtype for x in fields(decompose(model, pictures(model))).values()} == {dtype}


# The check.


def spoil(module, size=0.1):
    """Adds noise to what an attention returns."""

    def hook(module, args, output):
        whole = output if torch.is_tensor(output) else output[0]
        noisy = whole + size * torch.randn_like(whole)
        return noisy if whole is output else (noisy, None)

    module.register_forward_hook(hook)


@every_option
def test_a_good_model_passes_the_check(options):
    model = build(torch.float32, **options)
    assert check(model, pictures(model)) == decompose(model, pictures(model)).error() < 1e-4


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, INNER], ids=["plain", "custom"])
def test_the_block_whose_attention_is_altered_is_named(options, index):
    model = build(torch.float32, **options)
    spoil(blocks(model)[index].attn)
    with pytest.raises(DecompositionError, match=f"largest gap in block {index}: "):
        check(model, pictures(model))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("name", ["attn.in_proj_weight", "mlp.c_proj.bias"])
def test_the_block_that_writes_something_that_is_not_a_number_is_named(index, name):
    model = build()
    with torch.no_grad():
        blocks(model)[index].get_parameter(name).flatten()[3] = torch.nan
    with pytest.raises(
        DecompositionError, match=f"block {index} is the first to write something that is not a number"
    ):
        check(model, pictures(model))


def test_a_stem_that_is_not_a_number_is_not_blamed_on_a_block():
    model = build()
    with torch.no_grad():
        model.visual.class_embedding[3] = torch.nan
    with pytest.raises(DecompositionError) as raised:
        check(model, pictures(model))
    assert "block 0 is the first" not in str(raised.value)


def test_an_attention_that_writes_nothing_is_not_called_not_a_number():
    model = build()
    with torch.no_grad():
        blocks(model)[0].attn.out_proj.weight.zero_()
        blocks(model)[0].attn.out_proj.bias.zero_()
    spoil(blocks(model)[2].attn)
    with pytest.raises(DecompositionError, match="largest gap in block 2: "):
        check(model, pictures(model))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_block_altered_outside_its_attention_is_named(index):
    model = build()
    blocks(model)[index].register_forward_hook(lambda m, args, output: output + torch.randn_like(output))
    with pytest.raises(DecompositionError, match=f"largest gap in block {index}: ") as raised:
        check(model, pictures(model))
    assert "its heads differ" not in str(raised.value)


def twice(module, args, output):
    """The attention writes all twice."""
    return 2 * output[0], None


@pytest.mark.parametrize(
    ("part", "hook", "message"),
    [
        (
            lambda model: blocks(model)[1].attn,
            twice,
            r"differ from what its attention wrote by 5\.0e-01 of its norm",
        ),
        (
            lambda model: blocks(model)[1],
            lambda m, args, output: 2 * output - args[0],
            r"differ from what it added to the stream by 5\.0e-01 of its norm",
        ),
        (
            lambda model: model.visual,
            lambda m, args, output: output + 1,
            "every block adds up, so the difference arises in the read-out",
        ),
    ],
    ids=["attention", "block", "read-out"],
)
def test_the_gap_is_named_with_its_share_of_what_was_written(part, hook, message):
    model = build()
    part(model).register_forward_hook(hook)
    with pytest.raises(DecompositionError, match=message):
        check(model, pictures(model))


def test_the_message_has_both_norms_the_error_the_tolerance_and_the_precision():
    model = build(torch.float32)
    blocks(model)[0].attn.register_forward_hook(twice)
    terms = decompose(model, pictures(model), tolerance=math.inf)
    norms = f"norm of the sum {terms.total().norm():.6g}, norm of the embedding {terms.embedding.norm():.6g}"
    for message in (norms, rf"relative error {terms.error():.1e}, tolerance 1\.0e-03 \(torch\.float32\)"):
        with pytest.raises(DecompositionError, match=message):
            check(model, pictures(model), tolerance=1e-3)


def test_an_error_below_the_tolerance_passes_the_check_and_one_above_fails():
    model = build()
    blocks(model)[0].attn.register_forward_hook(lambda m, args, output: (1.01 * output[0], None))
    error = decompose(model, pictures(model), tolerance=math.inf).error()
    assert error > 1e-4
    assert check(model, pictures(model), tolerance=1.001 * error) == error
    with pytest.raises(DecompositionError, match="do not sum to the embedding"):
        check(model, pictures(model), tolerance=0.999 * error)


def test_the_default_tolerance_is_a_ten_thousandth_and_that_of_the_docstring_does_for_half_precision():
    model = half(torch.bfloat16, mixed=False)
    with pytest.raises(DecompositionError, match=r"tolerance 1\.0e-04 \(torch\.bfloat16\)"):
        check(model, pictures(model))
    assert 1e-4 < check(model, pictures(model), tolerance=HALF) < HALF


# Refusals.


def refused(reason, model, images=None):
    images = torch.zeros(2, 3, 8, 12, dtype=torch.float64) if images is None else images
    for call in CALLS.values():
        with pytest.raises(DecompositionError, match=reason):
            call(model, images, torch.zeros(5, 24, dtype=torch.float64))


def test_the_average_pooling_of_older_releases_is_refused():
    model = build()
    model.visual = OlderTower(model.visual)
    model.visual.global_average_pool = True
    refused("averages its tokens as older releases", model)


@pytest.mark.parametrize("options", [{}, {"block_type": "custom"}], ids=["plain", "custom"])
def test_a_tower_of_older_releases_that_reads_its_class_token_is_decomposed(options):
    model = build(**options)
    images, expected = pictures(model), decompose(model, pictures(model)).heads
    model.visual = OlderTower(model.visual)
    assert far(decompose(model, images).heads, expected) < EXACT


def test_a_tower_of_the_oldest_releases_with_tokens_on_the_first_axis_is_decomposed():
    model = build()
    images, expected = pictures(model), decompose(model, pictures(model)).heads
    for block in blocks(model):
        block.attn.batch_first = False
    model.visual = OlderTower(model.visual, axis=1)
    assert far(decompose(model, images).heads, expected) < EXACT


class OlderTransformer(nn.Module):
    """No attribute batch_first; the axis of the batch is as its blocks expect it."""

    def __init__(self, resblocks):
        super().__init__()
        self.resblocks = resblocks

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


class OlderTower(nn.Module):
    """Without the attributes pool_type and attn_pool, which older releases did not have."""

    def __init__(self, tower, axis=0):
        super().__init__()
        self.embed, self.ln_post, self.proj, self.global_average_pool = (
            tower._embeds,
            tower.ln_post,
            tower.proj,
            False,
        )
        self.transformer, self.axis = OlderTransformer(tower.transformer.resblocks), axis

    def forward(self, images):
        x = self.transformer(self.embed(images).transpose(0, self.axis)).transpose(0, self.axis)
        return self.ln_post(x)[:, 0] @ self.proj


def resnet(model):
    model.visual = ModifiedResNet((1, 1, 1, 1), 24, 4, 32, width=8)


def with_attention(**options):
    """Of the second block."""

    def change(model):
        blocks(model)[1].attn = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64, **options)

    return change


def cross_attention(model):
    blocks(model)[1] = ResidualAttentionBlock(32, 4, is_cross_attention=True).double()


NO_STREAM = r"no residual stream of attention heads \(transformer.resblocks"
ELSEWHERE = "cannot decompose CLIP .*add_bias_kv or add_zero_attn attends to tokens that are not in the image"
MISSING = "block ResidualAttentionBlock has no "
NO_MAPS = "attention MultiheadAttention has no in_proj_weight and out_proj"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            resnet,
            "image tower ModifiedResNet: a ResNet has convolutions, not a residual stream of attention heads",
        ),
        (lambda model: setattr(model.visual, "transformer", nn.Identity()), NO_STREAM),
        (lambda model: delattr(model.visual, "transformer"), NO_STREAM),
        (lambda model: delattr(model.visual, "ln_post"), "no residual stream .*ln_post"),
        (
            lambda model: setattr(model.visual, "ln_post", nn.Identity()),
            "has Identity as ln_post; expected LayerNorm",
        ),
        (with_attention(add_bias_kv=True), ELSEWHERE),
        (with_attention(add_zero_attn=True), ELSEWHERE),
        (with_attention(kdim=16), NO_MAPS),
        (lambda model: delattr(blocks(model)[1].attn, "out_proj"), NO_MAPS),
        (cross_attention, "block ResidualAttentionBlock attends to another input"),
        (lambda model: delattr(blocks(model)[1], "ln_1"), MISSING + "ln_1"),
        (lambda model: delattr(blocks(model)[1], "attn"), MISSING + "attn"),
        (lambda model: delattr(blocks(model)[1], "ls_1"), MISSING + "ls_1"),
        (lambda model: delattr(blocks(model)[1], "ls_2"), MISSING + "ls_2"),
    ],
)
def test_a_model_without_blocks_of_the_known_kind_is_refused(change, reason):
    model = build()
    change(model)
    refused(reason, model)


def test_no_pooling_is_refused():
    reason = "cannot decompose CLIP with image tower VisionTransformer: .*pooling 'none'; expected"
    refused(reason, build(pool_type="none"))


def test_an_object_without_image_tower_is_refused():
    refused("cannot decompose Linear .*no attribute `visual`", nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_model_is_refused():
    refused("scripted models cannot be watched; load it without jit", torch.jit.script(build()))


def test_cosine_attention_is_refused():
    """It does not run in open_clip 3.3: torch.bmm takes three axes only."""
    model = build(scaled_cosine_attn=True)
    with pytest.raises(RuntimeError):
        model.encode_image(pictures(model))
    refused("its scaled cosine attention does not run", model)


def test_a_refusal_is_a_value_error():
    assert issubclass(DecompositionError, ValueError)


def test_a_refused_model_is_left_as_found():
    model = build(pool_type="none").train()
    before = found(model)
    refused("none", model)
    assert found(model) == before


# Ablation.


def test_without_heads_their_terms_are_those_of_the_mean():
    model = build()
    terms = decompose(model, pictures(model, batch=5))
    mean, heads = terms.heads.mean(dim=0), [(0, 1), (2, 3), (2, 0)]
    replaced = terms.heads.clone()
    for layer, head in heads:
        replaced[:, layer, head] = mean[layer, head]
    expected = replace(terms, heads=replaced).total()
    assert far(terms.without(heads, mean), expected) < EXACT
    assert far(terms.without([*heads, heads[0]], mean), expected) < EXACT  # each once
    assert far(terms.without(heads[:2], mean), expected) > FAR
    assert far(terms.without([], mean), terms.embedding) == 0
    every = [(layer, head) for layer in range(3) for head in range(4)]
    rest = terms.stem + terms.mlps.sum(dim=1) + terms.constant
    assert far(terms.without(every, torch.zeros(())), rest) < EXACT


@pytest.mark.parametrize(
    ("heads", "shape", "error"),
    [
        ([(3, 0)], (3, 4, 24), IndexError),
        ([(0, 4)], (3, 4, 24), IndexError),
        ([(0, 0)], (3, 24), RuntimeError),
    ],
)
def test_without_a_head_that_is_not_there_or_by_another_mean_fails(heads, shape, error):
    terms = decompose(build(), pictures(build()))
    with pytest.raises(error):
        terms.without(heads, torch.zeros(shape))


def test_all_that_is_public_is_there_for_a_star():
    names: dict[str, object] = {}
    exec("from decompose import *", names)
    assert {"Decomposition", "DecompositionError"} < set(names)
    assert {"check", "decompose", "head_maps", "heatmap", "token_scores"} < set(names)
    assert "upcast" not in names
