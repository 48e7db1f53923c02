"""baselines.py against small random CLIPs of open_clip, and against every attribution worked out the long way
(`the_long_way`).

The long way takes one image at a time, builds each attention matrix in the graph, keeps every tensor, and
follows the rules term by term with loops. It shares no code with baselines.py. All of it runs in float64
unless a test says otherwise.
"""

import inspect
import math
from functools import cache, partial
from types import SimpleNamespace

import pytest
import releases
import small
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip.coca_model import CoCa
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from small import (
    CHANGES,
    EXACT,
    FAR,
    ORDER,
    TEXT_TOWER,
    VISION,
    blocks,
    build,
    far,
    found,
    half,
    half_trained,
    noise,
    permute_heads,
    permute_patches,
    permute_positions,
)
from torch import nn

import baselines
from baselines import METHODS, BaselineError

# Relevance divides by sums near zero: over 60 models like these the worst map lost seven digits of sixteen.
RELEVANCE = 1e-8
# What the 1e-9 in every denominator takes from a sum that would else be kept exactly; measured 1e-7 at most.
STABILISED = 1e-6

KEYS = [
    "raw-attention",
    "rollout",
    "gradcam",
    "lrp",
    "lrp-conserving",
    "partial-lrp",
    "chefer2021",
    "chefer2021-mm",
    "legrad",
    "grad-eclip",
]
BLIND = {"raw-attention", "rollout"}  # these do not see the text
SIGNED = {"lrp", "lrp-conserving"}
PROPAGATED = {"lrp", "lrp-conserving", "partial-lrp", "chefer2021"}  # these use relevance
SCORES = ["dot", "cosine", "logit"]
DEFAULTS = {
    **dict.fromkeys(KEYS, "dot"),
    "chefer2021-mm": "logit",
    "legrad": "cosine",
    "grad-eclip": "cosine",
}
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
    "one head": {"head_width": 32},
    "frozen": {"frozen": True},
    "all of them": {
        "quick_gelu": True,
        "ls_init_value": 0.3,
        "no_ln_pre": True,
        "final_ln_after_pool": True,
        "output_tokens": True,
    },
}
every_option = pytest.mark.parametrize("option", OPTIONS)
every_method = pytest.mark.parametrize("method", KEYS)
every_score = pytest.mark.parametrize("score", SCORES)
both_rules = pytest.mark.parametrize("conserving", [False, True], ids=["published", "conserving"])
seeds = st.integers(0, 10**6)


def pictures(model, batch=3, seed=1):
    return small.pictures(model, batch, seed)


def sentences(model, batch=3, seed=2):
    return small.sentences(model, batch, seed)


def mapped(method, model, batch=3, **options):
    return METHODS[method](model, pictures(model, batch), sentences(model, batch), **options)


@torch.no_grad()
def relevance(model, images, texts, *, conserving, score="dot"):
    """(layer, R_A, R) of every block, from the last one to the first."""
    run = baselines._run(model, images, texts, score, first=0, keep=("x",))
    yield from baselines._relevance(run, conserving)


def every_layer(method, model):
    """The options under which a method reads all blocks there are."""
    return {"legrad": {"layers": len(blocks(model))}}.get(
        method, {"start_layer": 0} if method in ("rollout", "chefer2021") else {}
    )


@torch.no_grad()
def pearson(a, b):
    """The lowest correlation of the pairs of maps. Where one is zero everywhere, so must be the other."""
    lowest = 1.0
    for x, y in zip(a.double().flatten(1), b.double().flatten(1), strict=True):
        if x.any() or y.any():
            x, y = x - x.mean(), y - y.mean()
            lowest = min(lowest, float((x @ y / x.norm() / y.norm()).nan_to_num(-1)))
    return lowest


# The long way: one image, x [N, D].


def layer_norm(norm, x):
    if isinstance(norm, nn.Identity):
        return x
    rows = []
    for row in x:
        centred = row - row.mean()
        rows.append(centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight.detach())
    return torch.stack(rows) + (0 if norm.bias is None else norm.bias.detach())


def activation(module, x):
    return (
        x * torch.sigmoid(1.702 * x)
        if type(module).__name__ == "QuickGELU"
        else x * (1 + torch.erf(x / math.sqrt(2))) / 2
    )


def layer_scale(module, x):
    return x if isinstance(module, nn.Identity) else x * module.gamma.detach()


def embedded(visual, image):
    """Tokens before the positions are added [N, D]: class token, then patches row by row."""
    height, width = visual.patch_size
    W = visual.conv1.weight.detach().flatten(1)
    tokens = [visual.class_embedding.detach()]
    for row in range(image.shape[1] // height):
        for column in range(image.shape[2] // width):
            tokens.append(
                W
                @ image[:, row * height : (row + 1) * height, column * width : (column + 1) * width].flatten()
            )
    return torch.stack(tokens)


def read_out(visual, x):
    """x [D] to the embedding [d]."""
    return layer_norm(visual.ln_post, x[None])[0] @ visual.proj.detach()


def forward(model, image):
    """Every tensor of the forward pass, with the attention matrices in the graph."""
    visual = model.visual
    tokens = embedded(visual, image.detach()).requires_grad_()
    positions = visual.positional_embedding.detach()
    x, steps = layer_norm(visual.ln_pre, tokens + positions), []
    for block in blocks(model):
        s = SimpleNamespace(x=x, block=block, H=block.attn.num_heads, e=block.attn.head_dim)
        s.y = layer_norm(block.ln_1, x)
        q, k, v = (s.y @ block.attn.in_proj_weight.detach().T + block.attn.in_proj_bias.detach()).chunk(
            3, dim=1
        )
        s.q, s.k, s.v = ([t[:, h * s.e : (h + 1) * s.e] for h in range(s.H)] for t in (q, k, v))
        # [H, N, N]
        s.A = torch.stack([(s.q[h] @ s.k[h].T / math.sqrt(s.e)).softmax(dim=1) for h in range(s.H)])
        s.O = torch.cat([s.A[h] @ s.v[h] for h in range(s.H)], dim=1)  # [N, D]
        s.attention = layer_scale(
            block.ls_1, s.O @ block.attn.out_proj.weight.detach().T + block.attn.out_proj.bias.detach()
        )
        s.mid = x + s.attention
        s.y2 = layer_norm(block.ln_2, s.mid)
        s.hidden = activation(
            block.mlp.gelu, s.y2 @ block.mlp.c_fc.weight.detach().T + block.mlp.c_fc.bias.detach()
        )
        s.mlp = layer_scale(
            block.ls_2, s.hidden @ block.mlp.c_proj.weight.detach().T + block.mlp.c_proj.bias.detach()
        )
        s.out = x = s.mid + s.mlp
        steps.append(s)
    return SimpleNamespace(
        tokens=tokens, positions=positions, steps=steps, z=read_out(visual, x[0]), visual=visual, model=model
    )


def scored(model, z, text, score):
    text = text / text.norm()
    if score == "dot":
        return z @ text
    return z @ text / z.norm() * (model.logit_scale.detach().exp() if score == "logit" else 1)


def gradients(run, text, score):
    """ds/dA [L][H, N, N]"""
    s = scored(run.model, run.z, text, score)
    return torch.autograd.grad(s, [step.A for step in run.steps], retain_graph=True)


def safe_div(a, b):
    return a / (b + 1e-9) * (b != 0)


def linear_rule(x, W, R, conserving):
    """x [N, i], W [o, i], R [N, o]: relevance of x."""
    R_x = torch.zeros_like(x)
    for n in range(len(x)):
        for plus in (True, False):
            sign = {"min": 0} if plus else {"max": 0}
            parts = x[n].clamp(**sign) * W.clamp(**sign)  # [o, i]
            total = parts.sum(1)
            if conserving:
                total = (x[n].clamp(min=0) * W.clamp(min=0)).sum(1) + (
                    x[n].clamp(max=0) * W.clamp(max=0)
                ).sum(1)
            R_x[n] += (parts * safe_div(R[n], total)[:, None]).sum(0)
    return R_x


def add_rule(a, b, R, conserving):
    """For one image."""
    share = safe_div(R, a + b)
    R_a, R_b = a * share, b * share
    if conserving:
        S_a, S_b, S = R_a.sum(), R_b.sum(), R.sum()
        whole = S_a.abs() + S_b.abs()
        R_a = R_a * safe_div(safe_div(S_a.abs(), whole) * S, S_a)
        R_b = R_b * safe_div(safe_div(S_b.abs(), whole) * S, S_b)
    return R_a, R_b


def matmul_rule(a, b, R):
    """a [i, j], b [j, k], R [i, k]"""
    parts = a[:, :, None] * b[None]  # [i, j, k]
    parts = parts * safe_div(R, parts.sum(1))[:, None] / 2
    return parts.sum(2), parts.sum(0)


def relevances(run, text, score, conserving):
    """Relevance of each block's attention [L][H, N, N] and input [L][N, D], from first block to last."""
    z = run.z.detach().requires_grad_()
    g = torch.autograd.grad(scored(run.model, z, text, score), z)[0]
    with torch.no_grad():
        last = layer_norm(run.visual.ln_post, run.steps[-1].out[:1])
        R = torch.zeros_like(run.steps[-1].out)
        R[0] = linear_rule(last, (run.visual.proj @ g)[None], torch.ones(1, 1, dtype=z.dtype), conserving)[0]
        R_As, Rs = [], []
        for s in reversed(run.steps):
            block = s.block
            R_mid, R_mlp = add_rule(s.mid, s.mlp, R, conserving)
            R_hidden = linear_rule(s.hidden, block.mlp.c_proj.weight, R_mlp, conserving)
            R_mid = R_mid + linear_rule(s.y2, block.mlp.c_fc.weight, R_hidden, conserving)
            R_x, R_attention = add_rule(s.x, s.attention, R_mid, conserving)
            R_O = linear_rule(s.O, block.attn.out_proj.weight, R_attention, conserving)
            R_A, R_q, R_k, R_v = [], [], [], []
            for h in range(s.H):
                for_A, for_v = matmul_rule(s.A[h], s.v[h], R_O[:, h * s.e : (h + 1) * s.e])
                for_q, for_k = matmul_rule(s.q[h], s.k[h].T, for_A)
                for group, part in ((R_A, for_A), (R_q, for_q), (R_k, for_k.T), (R_v, for_v)):
                    group.append(part)
            R = R_x + linear_rule(
                s.y, block.attn.in_proj_weight, torch.cat([*R_q, *R_k, *R_v], dim=1), conserving
            )
            R_As.insert(0, torch.stack(R_A))
            Rs.insert(0, R)
    return R_As, Rs


def long_raw(run, text, score):
    return run.steps[-1].A.mean(0)[0]


def long_rollout(run, text, score, start_layer=1):
    J = torch.eye(len(run.tokens), dtype=torch.float64)
    for step in run.steps[start_layer:]:
        B = step.A.mean(0) + torch.eye(len(J), dtype=torch.float64)
        J = (B / B.sum(1, keepdim=True)) @ J
    return J[0]


def long_gradcam(run, text, score):
    G, A = gradients(run, text, score)[-1], run.steps[-1].A
    return torch.stack([G[h, 0, 1:].mean() * A[h, 0] for h in range(len(A))]).mean(0).relu()


def long_lrp(run, text, score, conserving=False):
    _, Rs = relevances(run, text, score, conserving)
    return add_rule(run.tokens, run.positions, Rs[0], conserving)[0].sum(1)


def long_partial(run, text, score):
    return relevances(run, text, score, False)[0][-1].relu().mean(0)[0]


def long_chefer(run, text, score, start_layer=1):
    G, (R_As, _) = gradients(run, text, score), relevances(run, text, score, True)
    J = torch.eye(len(run.tokens), dtype=torch.float64)
    for layer in range(start_layer, len(G)):
        J = (torch.eye(len(J), dtype=torch.float64) + (G[layer] * R_As[layer]).relu().mean(0)) @ J
    return J[0]


def long_mm(run, text, score, start_layer=0):
    G = gradients(run, text, score)
    R = torch.eye(len(run.tokens), dtype=torch.float64)
    for layer in range(start_layer, len(G)):
        R = R + (G[layer] * run.steps[layer].A).relu().mean(0) @ R
    return R[0]


def long_legrad(run, text, score, layers=2):
    total = torch.zeros(len(run.tokens), dtype=torch.float64)
    for step in run.steps[-layers:]:
        s = scored(run.model, read_out(run.visual, step.out.mean(0)), text, score)
        total = total + torch.autograd.grad(s, step.A, retain_graph=True)[0].relu().mean(dim=(0, 1))
    return total


def similarity(run):
    """lambda [N]: the class token's query against every key in the last block, over all heads at once, from 0
    to 1 over the patches.
    """
    q, k = (torch.cat(t, dim=1) for t in (run.steps[-1].q, run.steps[-1].k))
    cosine = torch.stack([q[0] @ k[j] / q[0].norm() / k[j].norm() for j in range(len(k))])
    return (cosine - cosine[1:].min()) / (cosine[1:].max() - cosine[1:].min())


def long_eclip(run, text, score):
    step = run.steps[-1]
    G = torch.autograd.grad(scored(run.model, run.z, text, score), step.O, retain_graph=True)[0][0]
    v = torch.cat(step.v, dim=1)
    return torch.stack([(G * v[j]).sum() for j in range(len(v))]).mul(similarity(run)).relu()


LONG = {
    "raw-attention": long_raw,
    "rollout": long_rollout,
    "gradcam": long_gradcam,
    "lrp": long_lrp,
    "lrp-conserving": lambda run, text, score: long_lrp(run, text, score, conserving=True),
    "partial-lrp": long_partial,
    "chefer2021": long_chefer,
    "chefer2021-mm": long_mm,
    "legrad": long_legrad,
    "grad-eclip": long_eclip,
}


def the_long_way(method, model, images, texts, score=None, runs=None, **options):
    """[b, rows, columns]"""
    runs = runs or [forward(model, image) for image in images]
    score = score or DEFAULTS[method]
    rows = [LONG[method](run, text, score, **options) for run, text in zip(runs, texts, strict=True)]
    return torch.stack(rows).detach()[:, 1:].unflatten(1, model.visual.grid_size)


@cache
def runs_of(option):
    """A model, which is left as it is, and its forward passes."""
    model = build(**OPTIONS[option])
    return model, [forward(model, image) for image in pictures(model)]


@every_option
def test_the_long_way_ends_at_the_stock_embedding(option):
    model, runs = runs_of(option)
    stock = model.encode_image(pictures(model))
    ours = torch.stack([run.z for run in runs])
    assert far(ours, stock[0] if isinstance(stock, tuple) else stock) < EXACT


# Every method, against the long way.


def tolerance(method):
    return RELEVANCE if method in PROPAGATED else EXACT


def test_the_methods_are_the_ten_of_the_table():
    assert set(METHODS) == set(KEYS)


@every_method
def test_an_entry_says_which_function_it_is_and_which_score_it_explains_by_default(method):
    entry = METHODS[method]
    assert entry.score == (None if method in BLIND else DEFAULTS[method])
    assert entry.reads_text == (method not in BLIND)
    default = inspect.signature(entry.function).parameters["score"].default
    assert default == (entry.score or "dot")
    assert METHODS[method].function is getattr(baselines, method.replace("-", "_"))


@every_method
@every_option
def test_each_map_is_that_of_the_long_way(option, method):
    model, runs = runs_of(option)
    for score in (None, *SCORES) if option in ("plain", "all of them") else (None,):
        given = {} if score is None else {"score": score}
        truth = the_long_way(method, model, pictures(model), sentences(model), score, runs)
        assert far(mapped(method, model, **given), truth) < tolerance(method)


ROLLED = ["rollout", "chefer2021", "chefer2021-mm"]
DEPTHS = [(method, {"start_layer": layer}) for method in ROLLED for layer in range(3)]
DEPTHS += [("legrad", {"layers": layers}) for layers in (1, 2, 3)]


@pytest.mark.parametrize(("method", "options"), DEPTHS, ids=str)
def test_each_map_of_some_blocks_is_that_of_the_long_way(method, options):
    model = build()
    truth = the_long_way(method, model, pictures(model), sentences(model), **options)
    assert far(mapped(method, model, **options), truth) < tolerance(method)


@every_method
def test_each_map_of_a_single_block_is_that_of_the_long_way(method):
    model = build(layers=1)
    options = every_layer(method, model)
    truth = the_long_way(method, model, pictures(model), sentences(model), **options)
    assert far(mapped(method, model, **options), truth) < tolerance(method)


@every_method
def test_the_score_matters_to_all_that_see_the_text_and_has_the_default_of_the_table(method):
    model = build()
    assert torch.equal(mapped(method, model), mapped(method, model, score=DEFAULTS[method]))
    differs = far(mapped(method, model, score="cosine"), mapped(method, model, score="dot")) > FAR
    assert differs == (method not in BLIND)


@pytest.mark.parametrize(
    ("method", "option", "default", "other"),
    [
        ("rollout", "start_layer", 1, 0),
        ("chefer2021", "start_layer", 1, 0),
        ("chefer2021-mm", "start_layer", 0, 1),
        ("legrad", "layers", 2, 1),
    ],
)
def test_the_blocks_read_by_default_are_those_of_the_table(method, option, default, other):
    model = build()
    assert torch.equal(mapped(method, model), mapped(method, model, **{option: default}))
    assert far(mapped(method, model, **{option: default}), mapped(method, model, **{option: other})) > FAR


@st.composite
def shapes(draw, min_width=4):
    """What `build` takes: any number of blocks, heads, rows and columns, two patches at least."""
    widths = [
        (heads, head_width)
        for heads in (1, 2, 3, 4)
        for head_width in (4, 6, 8)
        if heads * head_width >= min_width
    ]
    grids = [(rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3, 4) if rows * columns > 1]
    (heads, head_width), (rows, columns) = draw(st.sampled_from(widths)), draw(st.sampled_from(grids))
    patch, flag = draw(st.sampled_from([1, 2, 4])), st.booleans()
    options = st.fixed_dictionaries(
        dict.fromkeys(("quick_gelu", "no_ln_pre", "final_ln_after_pool", "output_tokens", "frozen"), flag),
        optional={"ls_init_value": st.floats(0.1, 2), "patch_dropout": st.floats(0.1, 0.9)},
    )
    sizes = {
        "width": heads * head_width,
        "head_width": head_width,
        "patch_size": patch,
        "image_size": (rows * patch, columns * patch),
    }
    return {"layers": draw(st.integers(1, 3)), "seed": draw(st.integers(0, 1000)), **sizes, **draw(options)}


# No relevance here: on some of these models it has no correct digit left.
@settings(max_examples=40, deadline=None)
@given(
    shapes(),
    st.integers(1, 3),
    seeds,
    st.sampled_from(sorted(set(KEYS) - PROPAGATED)),
    st.sampled_from(SCORES),
)
def test_each_map_is_that_of_the_long_way_whatever_the_shape_and_options(shape, batch, seed, method, score):
    model = build(**shape)
    images, texts, options = (
        pictures(model, batch, seed),
        sentences(model, batch, seed + 1),
        every_layer(method, model),
    )
    ours = METHODS[method](model, images, texts, score=score, **options)
    truth = the_long_way(method, model, images, texts, score, **options)
    # Where no patch is positive the map is zero. Entries are of order one otherwise, or less by what cancels
    # in them.
    assert float((ours - truth).abs().max()) <= EXACT * max(float(truth.abs().max()), 1e-3)


# Of any width but narrow ones, always the same: a model could be drawn on which relevance has no correct
# digit.
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shapes(min_width=24),
    st.integers(1, 3),
    seeds,
    st.sampled_from(sorted(PROPAGATED)),
    st.sampled_from(SCORES),
)
def test_each_map_of_relevance_is_that_of_the_long_way_whatever_the_shape_and_options(
    shape, batch, seed, method, score
):
    model = build(**shape)
    images, texts, options = (
        pictures(model, batch, seed),
        sentences(model, batch, seed + 1),
        every_layer(method, model),
    )
    ours = METHODS[method](model, images, texts, score=score, **options)
    assert far(ours, the_long_way(method, model, images, texts, score, **options)) < RELEVANCE


@every_method
def test_a_map_has_a_row_and_a_column_for_every_patch_and_is_finite_for_one(method):
    model = build(patch_size=(4, 2), image_size=(8, 10))
    assert mapped(method, model, batch=2).shape == (2, 2, 5)
    maps = mapped(method, build(image_size=4))
    assert maps.shape == (3, 1, 1)
    assert maps.isfinite().all()


@every_method
def test_a_float64_model_has_float64_maps(method):
    assert mapped(method, build()).dtype == torch.float64


@every_method
def test_maps_are_not_negative_except_those_of_signed_relevance(method):
    model = build()
    lowest = min(
        float(METHODS[method](model, pictures(model), sentences(model, seed=seed)).min()) for seed in range(5)
    )
    assert (lowest < -FAR) if method in SIGNED else (lowest >= 0)


# What each map is made of.


def test_raw_attention_sums_to_what_the_class_token_does_not_give_itself():
    model = build()
    kept = torch.stack([forward(model, image).steps[-1].A.mean(0)[0, 0] for image in pictures(model)])
    assert far(mapped("raw-attention", model).sum((1, 2)), 1 - kept) < EXACT
    assert (mapped("raw-attention", build()).sum((1, 2)) < 1 - FAR).all()


@pytest.mark.parametrize("start_layer", [0, 1, 2])
def test_rollout_sums_to_what_the_class_token_does_not_keep(start_layer):
    model = build()
    kept = torch.stack(
        [long_rollout(forward(model, i), None, "dot", start_layer)[0] for i in pictures(model)]
    )
    assert far(mapped("rollout", model, start_layer=start_layer).sum((1, 2)), 1 - kept) < EXACT


@torch.no_grad()
def with_even_attention(model):
    for block in blocks(model):
        D = block.attn.embed_dim
        block.attn.in_proj_weight[: 2 * D] = 0  # no queries and keys
        block.attn.in_proj_bias[: 2 * D] = 0
    return model


def test_raw_attention_of_even_attention_is_one_over_the_number_of_tokens():
    maps = mapped("raw-attention", with_even_attention(build()))
    assert far(maps, torch.full_like(maps, 1 / 7)) < EXACT


@pytest.mark.parametrize("blocks_used", [1, 2, 3])
def test_rollout_of_even_attention_has_the_closed_form(blocks_used):
    maps = mapped("rollout", with_even_attention(build()), start_layer=3 - blocks_used)
    assert far(maps, torch.full_like(maps, (1 - 0.5**blocks_used) / 7)) < EXACT


def test_rollout_of_the_last_block_alone_is_half_of_raw_attention():
    model = build()
    assert far(mapped("rollout", model, start_layer=2), mapped("raw-attention", model) / 2) < EXACT


@pytest.mark.parametrize("width", [32, 8], ids=["one head", "four heads"])
def test_gradcam_is_raw_attention_or_nothing_with_one_head_alone(width):
    model = build(head_width=width)
    images, texts = pictures(model), sentences(model)
    # Dot is odd in the text.
    either = baselines.gradcam(model, images, texts) + baselines.gradcam(model, images, -texts)
    ratio = (either / baselines.raw_attention(model, images, texts)).flatten(1)
    spread = (ratio.amax(1) / ratio.amin(1) - 1).max()
    assert spread < EXACT if width == 32 else spread > FAR


def test_the_gradient_of_the_attention_is_the_value_read_by_the_gradient_of_the_head():
    """dA[h, 0, j] = <G[h], v[h, j]>, so Grad-ECLIP is the sum of dA over heads, times lambda."""
    model = build()
    truth = []
    for image, text in zip(pictures(model), sentences(model), strict=True):
        run = forward(model, image)
        truth.append(
            (gradients(run, text, "cosine")[-1][:, 0].sum(0).relu() * similarity(run))[1:].reshape(2, 3)
        )
    assert far(mapped("grad-eclip", model), torch.stack(truth).detach()) < EXACT


def test_grad_eclip_is_zero_at_the_patch_least_like_the_query():
    model = build()
    maps = mapped("grad-eclip", model).flatten(1)
    least = [int(similarity(forward(model, image))[1:].argmin()) for image in pictures(model)]
    assert [float(m[j]) for m, j in zip(maps, least, strict=True)] == [0, 0, 0]


@pytest.mark.parametrize("start_layer", [0, 1, 2])
def test_chefer2021_mm_is_a_product_over_the_blocks(start_layer):
    model = build()
    truth = []
    for image, text in zip(pictures(model), sentences(model), strict=True):
        run, one = forward(model, image), torch.eye(7, dtype=torch.float64)
        C = [(G * s.A).relu().mean(0) for G, s in zip(gradients(run, text, "logit"), run.steps, strict=True)]
        truth.append(
            torch.linalg.multi_dot([*reversed([one + c for c in C[start_layer:]]), one])[0, 1:].reshape(2, 3)
        )
    assert far(mapped("chefer2021-mm", model, start_layer=start_layer), torch.stack(truth).detach()) < EXACT


def test_chefer2021_of_the_last_block_alone_is_gradient_times_relevance():
    model = build()
    _, R_A, _ = next(iter(relevance(model, pictures(model), sentences(model), conserving=True)))
    G = torch.stack(
        [
            gradients(forward(model, i), t, "dot")[-1]
            for i, t in zip(pictures(model), sentences(model), strict=True)
        ]
    )
    assert (
        far(mapped("chefer2021", model, start_layer=2), (G * R_A).relu().mean(1)[:, 0, 1:].reshape(3, 2, 3))
        < EXACT
    )


def test_partial_lrp_is_the_positive_relevance_of_the_last_attention():
    model = build()
    _, R_A, _ = next(iter(relevance(model, pictures(model), sentences(model), conserving=False)))
    assert far(mapped("partial-lrp", model), R_A.relu().mean(1)[:, 0, 1:].reshape(3, 2, 3)) < EXACT


def test_legrad_grows_with_the_number_of_layers():
    model = build()
    maps = [mapped("legrad", model, layers=n) for n in (1, 2, 3)]
    assert (maps[0] <= maps[1]).all()
    assert (maps[1] <= maps[2]).all()
    assert far(mapped("legrad", model, layers=1), mapped("legrad", model, layers=2)) > FAR


def test_a_layer_of_legrad_does_not_change_with_the_layers_after_it():
    model, shorter = build(), build()
    shorter.visual.transformer.resblocks = blocks(shorter)[:2]
    added = mapped("legrad", model, layers=2) - mapped("legrad", model, layers=1)
    assert far(added, mapped("legrad", shorter, layers=1)) < EXACT


@pytest.mark.parametrize("method", ["gradcam", "legrad", "grad-eclip"])
def test_the_logit_scale_only_scales_maps_that_are_linear_in_the_gradient(method):
    model = build()
    assert (
        far(
            mapped(method, model, score="logit"),
            model.logit_scale.exp().detach() * mapped(method, model, score="cosine"),
        )
        < EXACT
    )


@pytest.mark.parametrize("method", ["chefer2021", "chefer2021-mm"])
def test_the_logit_scale_does_not_only_scale_products_over_blocks(method):
    model = build()
    scaled = model.logit_scale.exp().detach() * mapped(method, model, score="cosine", start_layer=0)
    assert far(mapped(method, model, score="logit", start_layer=0), scaled) > FAR


@pytest.mark.parametrize("method", ["lrp", "lrp-conserving", "partial-lrp"])
def test_relevance_does_not_see_the_logit_scale(method):
    model = build()
    # it enters once, beside the stabiliser of the first denominator
    assert far(mapped(method, model, score="logit"), mapped(method, model, score="cosine")) < STABILISED


def test_chefer2021_does_see_the_logit_scale():
    model = build()
    assert far(mapped("chefer2021", model, score="logit"), mapped("chefer2021", model, score="cosine")) > FAR


# The rules of relevance, one at a time.


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_the_rule_of_a_linear_map_is_that_of_the_long_way(seed, b, N, i, o, conserving):
    x, W, R = noise(b, N, i, seed=seed), noise(o, i, seed=seed + 1), noise(b, N, o, seed=seed + 2)
    truth = torch.stack([linear_rule(x[n], W, R[n], conserving) for n in range(b)])
    assert torch.allclose(baselines._linear(x, W, R, conserving), truth, rtol=EXACT, atol=EXACT)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_the_rule_of_a_sum_is_that_of_the_long_way(seed, b, N, D, conserving):
    x, y, R = (noise(b, N, D, seed=seed + n) for n in range(3))
    truth = [
        torch.stack(parts)
        for parts in zip(*(add_rule(x[n], y[n], R[n], conserving) for n in range(b)), strict=True)
    ]
    for ours, long in zip(baselines._add(x, y, R, conserving), truth, strict=True):
        # a sum that nearly cancels divides rounding errors too; the rule is continuous, so scale by its own
        # size
        assert float((ours - long).abs().max()) <= EXACT * max(1, float(long.abs().max()) ** 2)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 3), *(st.integers(1, 5) for _ in range(3)))
def test_the_rule_of_a_matrix_product_is_that_of_the_long_way(seed, b, H, i, j, k):
    x, y, R = noise(b, H, i, j, seed=seed), noise(b, H, j, k, seed=seed + 1), noise(b, H, i, k, seed=seed + 2)
    R_x, R_y = baselines._matmul(x, y, R)
    for image in range(b):
        for h in range(H):
            for ours, long in zip(
                (R_x, R_y), matmul_rule(x[image, h], y[image, h], R[image, h]), strict=True
            ):
                assert float((ours[image, h] - long).abs().max()) <= EXACT * max(
                    1, float(long.abs().max()) ** 2
                )


def test_a_linear_map_of_one_vector_per_image_has_the_same_rule():
    x, W, R = noise(2, 5, seed=0), noise(3, 5, seed=1), noise(2, 3, seed=2)
    for conserving in (False, True):
        assert torch.equal(
            baselines._linear(x, W, R, conserving),
            baselines._linear(x[:, None], W, R[:, None], conserving)[:, 0],
        )


# Wide enough that every output has a positive and a negative part: 64 inputs leave none out but once in 1e8.
@settings(max_examples=40, deadline=None)
@given(seeds)
def test_the_rules_of_a_linear_map_keep_relevance_or_double_it(seed):
    x, W, R = noise(4, 64, seed=seed), noise(5, 64, seed=seed + 1), noise(4, 5, seed=seed + 2)
    kept, doubled = (baselines._linear(x, W, R, conserving).sum(1) for conserving in (True, False))
    kept_too = baselines._linear(x.abs(), W, R, False).sum(1)  # published, where no input is negative
    for ours, truth in ((kept, R), (doubled, 2 * R), (kept_too, R)):
        assert float((ours - truth.sum(1)).abs().max()) < STABILISED


@both_rules
def test_relevance_of_an_output_without_positive_parts_is_lost(conserving):
    x, W, R = torch.tensor([[1.0, -2.0]]), torch.tensor([[-3.0, 1.0]]), torch.tensor([[5.0]])
    assert baselines._linear(x, W, R, conserving).tolist() == [[0, 0]]


@both_rules
@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_a_sum_keeps_relevance(conserving, seed):
    # terms of one sign, so that no denominator comes near zero
    a, b, R = (
        noise(3, 4, 5, seed=seed).abs() + 0.1,
        noise(3, 4, 5, seed=seed + 1).abs() + 0.1,
        noise(3, 4, 5, seed=seed + 2),
    )
    assume(float(R.sum((1, 2)).abs().min()) > 0.01)
    R_a, R_b = baselines._add(a, b, R, conserving)
    assert float((R_a.sum((1, 2)) + R_b.sum((1, 2)) - R.sum((1, 2))).abs().max()) < STABILISED


@both_rules
@settings(max_examples=40, deadline=None)
@given(seed=seeds, batch=st.integers(2, 4))
def test_a_sum_is_shared_out_image_by_image(conserving, seed, batch):
    a, b, R = (noise(batch, 4, 5, seed=seed + n) for n in range(3))
    together = baselines._add(a, b, R, conserving)
    singles = [baselines._add(a[[n]], b[[n]], R[[n]], conserving) for n in range(batch)]
    for whole, parts in zip(together, zip(*singles, strict=True), strict=True):
        assert far(torch.cat(parts), whole) < EXACT


@pytest.mark.parametrize(("conserving", "shares"), [(True, [2 * 3.5 / 5, 2 * 1.5 / 5]), (False, [3.5, -1.5])])
def test_the_conserving_sum_gives_each_term_a_share_of_one_sign(conserving, shares):
    """Published: R_a and R_b may be huge and opposite. Conserving: shares |S_a| / (|S_a| + |S_b|) of the
    whole.
    """
    a, b, R = torch.tensor([[3.0, 1.0]]), torch.tensor([[-2.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    # Before the rescaling [3, 0.5] and [-2, 0.5].
    parts = baselines._add(a.double(), b.double(), R.double(), conserving)
    assert torch.allclose(
        torch.stack([x.sum() for x in parts]), torch.tensor(shares).double(), atol=STABILISED
    )


@both_rules
def test_relevance_of_a_sum_that_is_zero_is_lost(conserving):
    a, b, R = (
        torch.tensor([[1.0, 1.0]]).double(),
        torch.tensor([[-1.0, 1.0]]).double(),
        torch.tensor([[1.0, 1.0]]).double(),
    )
    for part in baselines._add(a, b, R, conserving):
        assert part.isfinite().all()
        assert part[0, 0] == 0


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_each_operand_of_a_matrix_product_has_half_of_the_relevance(seed):
    # factors of one sign, so that no denominator comes near zero
    a, b, R = (
        noise(2, 3, 4, 5, seed=seed).abs() + 0.1,
        noise(2, 3, 5, 6, seed=seed + 1).abs() + 0.1,
        noise(2, 3, 4, 6, seed=seed + 2),
    )
    R_a, R_b = baselines._matmul(a, b, R)
    assert torch.allclose(R_a.sum(-1), R.sum(-1) / 2, atol=STABILISED)  # row by row
    assert torch.allclose(R_b.sum(-2), R.sum(-2) / 2, atol=STABILISED)  # column by column


def test_relevance_of_a_matrix_product_that_is_zero_is_lost():
    a, b = torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[1.0], [-1.0]]).double()
    R_a, R_b = baselines._matmul(a, b, torch.ones(1, 1).double())
    assert not R_a.any()
    assert not R_b.any()


@both_rules
def test_the_rules_leave_their_arguments_as_found(conserving):
    x, W, R, a, b = (
        noise(2, 5, 4, seed=0),
        noise(6, 4, seed=1),
        noise(2, 5, 6, seed=2),
        noise(2, 5, 6, seed=3),
        noise(2, 4, 6, seed=4),
    )
    arguments = [x, W, R, a, b]
    before = [t.clone() for t in arguments]
    baselines._linear(x, W, R, conserving)
    baselines._add(a, R, R, conserving)
    baselines._matmul(x, b, R)
    assert all(torch.equal(t, as_found) for t, as_found in zip(arguments, before, strict=True))


# Relevance through the whole model.


@both_rules
@every_score
def test_relevance_of_every_block_is_that_of_the_long_way(score, conserving):
    model = build()
    images, texts = pictures(model), sentences(model)
    truth = [relevances(forward(model, i), t, score, conserving) for i, t in zip(images, texts, strict=True)]
    # None changes later.
    for layer, R_A, R in list(relevance(model, images, texts, conserving=conserving, score=score)):
        assert far(R_A, torch.stack([R_As[layer] for R_As, _ in truth])) < RELEVANCE
        assert far(R, torch.stack([Rs[layer] for _, Rs in truth])) < RELEVANCE


def test_relevance_goes_from_the_last_block_to_the_first_with_the_axes_of_the_docstring():
    model = build()
    assert [
        layer for layer, _, _ in relevance(model, pictures(model), sentences(model), conserving=True)
    ] == [2, 1, 0]
    shapes = {
        (R_A.shape, R.shape)
        for _, R_A, R in relevance(model, pictures(model), sentences(model), conserving=False)
    }
    assert shapes == {((3, 4, 7, 7), (3, 7, 32))}


def test_relevance_explains_dot_by_default_from_the_row_of_the_class_token():
    model = build()
    ours = list(relevance(model, pictures(model), sentences(model), conserving=True))
    dot = list(relevance(model, pictures(model), sentences(model), conserving=True, score="dot"))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(ours, dot, strict=True))
    (_, last, _), (_, before, _), *_ = relevance(model, pictures(model), sentences(model), conserving=True)
    assert not last[:, :, 1:].any()
    assert before[:, :, 1:].abs().max() > FAR  # the other rows do come in one block below


@pytest.mark.parametrize("layers", [1, 3, 6])
@every_score
def test_the_conserving_rules_keep_relevance_one_at_every_block(score, layers):
    model = build(layers=layers)
    for _, _, R in relevance(model, pictures(model), sentences(model), conserving=True, score=score):
        assert float((R.sum((1, 2)) - 1).abs().max()) < STABILISED


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all of them"]], ids=["plain", "all of them"])
def test_the_published_rules_do_not_keep_relevance(options):
    model = build(**options)
    for _, _, R in relevance(model, pictures(model), sentences(model), conserving=False):
        assert float((R.sum((1, 2)) - 1).abs().min()) > FAR


# Widths of which every output has both a positive and a negative part; see the same theorem for one linear
# map above.
@settings(max_examples=20, deadline=None, derandomize=True)
@given(shapes(min_width=24), st.integers(1, 3), seeds)
def test_the_conserving_rules_keep_relevance_one_whatever_the_shape_and_options(shape, batch, seed):
    model = build(**shape)
    for _, _, R in relevance(
        model, pictures(model, batch, seed), sentences(model, batch, seed + 1), conserving=True
    ):
        assert float((R.sum((1, 2)) - 1).abs().max()) < 1e-4  # the stabiliser beside the smallest sum met


def watched(monkeypatch, model, conserving):
    """Each call of the linear rule: (relevance out, relevance in, size of the relevance out), a number per
    image.
    """
    calls, rule = [], baselines._linear

    def linear(x, weight, R, conserving):
        R_x = rule(x, weight, R, conserving)
        calls.append([t.flatten(1).sum(1) for t in (R, R_x, R.abs())])
        return R_x

    monkeypatch.setattr(baselines, "_linear", linear)
    list(relevance(model, pictures(model), sentences(model), conserving=conserving))
    return calls


@pytest.mark.parametrize(("conserving", "ratio"), [(True, 1), (False, 2)], ids=["conserving", "published"])
def test_every_linear_map_of_the_model_has_its_ratio(monkeypatch, conserving, ratio):
    calls = watched(monkeypatch, build(width=64), conserving)  # wide, as in the theorem above
    # The head; in each block queries, keys and values, the projection, and two in the MLP.
    assert len(calls) >= 1 + 4 * 3
    for before, after, size in calls:
        assert float(((after - ratio * before) / size).abs().max()) < STABILISED


def test_relevance_starts_at_one(monkeypatch):
    (before, after, _), *_ = watched(monkeypatch, build(), conserving=False)
    assert before.tolist() == [1, 1, 1]
    # What the published rules make of it in the head.
    assert far(after, torch.full_like(after, 2)) < STABILISED


def test_published_relevance_grows_from_block_to_block_and_conserved_relevance_less():
    model, growth = build(layers=6), []
    for conserving in (False, True):
        blocks_ = relevance(model, pictures(model), sentences(model), conserving=conserving)
        sizes = [R.abs().sum((1, 2)) for _, _, R in blocks_]
        growth.append(sizes[-1] / sizes[0])
    assert (growth[0] > 10).all()
    assert (growth[1] < growth[0] / 10).all()


def test_the_patches_and_the_rest_of_the_stem_share_the_relevance_of_the_first_block():
    model = build()
    *_, (_, _, R) = relevance(model, pictures(model), sentences(model), conserving=False)
    tokens = torch.stack([embedded(model.visual, image) for image in pictures(model)]).detach()
    positions = model.visual.positional_embedding.detach().expand_as(tokens)
    patches, rest = baselines._add(tokens, positions, R, False)
    assert far(mapped("lrp", model), patches.sum(2)[:, 1:].reshape(3, 2, 3)) < RELEVANCE
    assert far(mapped("lrp", model), (patches + rest).sum(2)[:, 1:].reshape(3, 2, 3)) > FAR
    assert far(mapped("lrp", model), mapped("lrp-conserving", model)) > FAR


# Where things are.


@torch.no_grad()
def looking_at(model, images, patch):
    """The class token of the last block attends to one patch and to nothing else, in every head. For one
    image.
    """
    attn, y = blocks(model)[-1].attn, forward(model, images[0]).steps[-1].y.detach()
    only = torch.zeros(len(y), dtype=y.dtype)
    only[1 + patch] = 1
    D = attn.embed_dim
    attn.in_proj_weight[:D] = 0
    attn.in_proj_bias[:D] = 1
    # Keys of that patch are large, all others are zero.
    attn.in_proj_weight[D : 2 * D] = 1000 * (torch.linalg.pinv(y) @ only)
    attn.in_proj_bias[D : 2 * D] = 0
    return model


@pytest.mark.parametrize("at", [(row, column) for row in range(2) for column in range(3)], ids=str)
def test_raw_attention_of_a_class_token_that_looks_at_one_patch_is_one_there(at):
    model = build()
    images = pictures(model, batch=1)
    expected = torch.zeros(1, 2, 3, dtype=torch.float64)
    expected[0][at] = 1
    model = looking_at(model, images, 3 * at[0] + at[1])
    assert far(baselines.raw_attention(model, images, sentences(model, 1)), expected) < EXACT


@pytest.mark.parametrize("at", [(0, 1), (1, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("method", ["rollout", "gradcam", "partial-lrp", "chefer2021", "chefer2021-mm"])
def test_a_map_weighted_by_attention_is_where_the_class_token_looks(method, at):
    model = build()
    images = pictures(model, batch=1)
    model = looking_at(model, images, 3 * at[0] + at[1])
    options = {} if method in ("gradcam", "partial-lrp") else {"start_layer": 2}
    total = sum(METHODS[method](model, images, sign * sentences(model, 1), **options) for sign in (1, -1))[0]
    elsewhere = total.clone()
    elsewhere[at] = 0
    assert float(elsewhere.abs().max()) < EXACT * float(total[at])


@pytest.mark.parametrize("at", [(row, column) for row in range(2) for column in range(3)], ids=str)
def test_the_patch_the_class_token_looks_at_is_where_it_is_in_the_image(at):
    """By the pixels alone: the image is dark but for one patch, positions are all the same, and the class
    token looks for bright.
    """
    model = build(layers=1)
    with torch.no_grad():
        model.visual.positional_embedding[1:] = model.visual.positional_embedding[1]
    images, (row, column) = torch.zeros(1, 3, 8, 12, dtype=torch.float64), at
    images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = noise(4, 4, seed=3)
    y = forward(model, images[0]).steps[0].y.detach()[1:]
    bright = (y - y.median(0).values).norm(dim=1) > FAR  # the median token is a dark one
    assert bright.sum() == 1
    raw = baselines.raw_attention(
        looking_at(model, images, int(bright.int().argmax())), images, sentences(model, 1)
    )[0]
    assert raw[at] > 1 - EXACT


@every_method
def test_permuting_patches_permutes_the_map_if_their_positions_go_with_them(method):
    images, texts = pictures(build()), sentences(build())
    before = METHODS[method](build(), images, texts).flatten(1)
    after = METHODS[method](permute_positions(build(), ORDER), permute_patches(images, ORDER), texts).flatten(
        1
    )
    assert far(after, before[:, ORDER]) < tolerance(method)
    after = METHODS[method](build(), permute_patches(images, ORDER), texts).flatten(1)
    assert far(after, before[:, ORDER]) > FAR


@every_method
def test_permuting_the_heads_changes_nothing_if_their_projection_goes_with_them(method):
    assert far(mapped(method, permute_heads(build(), [2, 0, 3, 1])), mapped(method, build())) < tolerance(
        method
    )
    assert (
        far(mapped(method, permute_heads(build(), [2, 0, 3, 1], projection=False)), mapped(method, build()))
        > FAR
    )


# Batches and texts.


@every_method
def test_a_batch_gives_what_single_images_give_and_each_image_its_own_map(method):
    model = build()
    images, texts = pictures(model), sentences(model)
    singles = torch.cat([METHODS[method](model, images[[n]], texts[[n]]) for n in range(3)])
    assert far(mapped(method, model), singles) < tolerance(method)
    maps = mapped(method, build())
    assert far(maps[0], maps[1]) > FAR


@settings(max_examples=30, deadline=None)
@given(shapes(), st.integers(2, 4), seeds, st.sampled_from(sorted(set(KEYS) - PROPAGATED)))
def test_a_batch_gives_what_single_images_give_whatever_the_shape_and_options(shape, batch, seed, method):
    model = build(**shape)
    images, texts, options = (
        pictures(model, batch, seed),
        sentences(model, batch, seed + 1),
        every_layer(method, model),
    )
    together = METHODS[method](model, images, texts, **options)
    singles = torch.cat([METHODS[method](model, images[[n]], texts[[n]], **options) for n in range(batch)])
    assert float((together - singles).abs().max()) <= EXACT * max(float(singles.abs().max()), 1e-3)


@every_method
def test_the_length_of_a_text_changes_no_map_and_its_direction_all_that_see_it(method):
    model = build()
    lengths = torch.tensor([[0.01], [3.0], [100.0]], dtype=torch.float64)
    maps = METHODS[method](model, pictures(model), lengths * sentences(model))
    assert far(maps, mapped(method, model)) < tolerance(method)
    maps = METHODS[method](model, pictures(model), sentences(model, seed=9))
    if method in BLIND:
        assert torch.equal(maps, mapped(method, model))
    else:
        assert min(far(a, b) for a, b in zip(maps, mapped(method, model), strict=True)) > FAR


# Precision.

# float32 rounds at 6e-8, which leaves these maps six digits. Relevance divides by sums near zero, and keeps
# three as measured.
AGREEMENT = {**dict.fromkeys(KEYS, 1 - 1e-6), **dict.fromkeys(PROPAGATED, 0.999)}


@every_method
def test_float32_agrees_with_float64(method):
    single, double = build(torch.float32), build(torch.float32).double()  # the same weights, rounded once
    images, texts = pictures(single), sentences(single)
    a, b = METHODS[method](single, images, texts), METHODS[method](double, images.double(), texts.double())
    assert a.dtype == torch.float32
    assert pearson(a, b) > AGREEMENT[method]


@every_method
def test_float32_agrees_with_no_other_text(method):
    model = build(torch.float32)
    a, b = mapped(method, model), METHODS[method](model, pictures(model), sentences(model, seed=9))
    assert (pearson(a, b) < AGREEMENT[method]) == (method not in BLIND)


@every_method
@pytest.mark.parametrize("mixed", [False, True], ids=["pure", "mixed"])
def test_a_model_in_half_precision_has_finite_maps(method, mixed):
    maps = mapped(method, half(torch.bfloat16, mixed))
    assert maps.shape == (3, 2, 3)
    assert maps.isfinite().all()
    assert maps.dtype == torch.float32  # half precision is for the model alone


@pytest.mark.parametrize("mixed", [False, True], ids=["pure", "mixed"])
@pytest.mark.parametrize("method", [key for key in KEYS if key not in PROPAGATED])
def test_a_model_in_half_precision_agrees_with_float64_where_nothing_divides(method, mixed):
    # bfloat16 has three digits, and these maps keep two of them; of relevance nothing is left
    model = half(torch.bfloat16, mixed)
    images = pictures(model)[1:]
    a, b = (
        METHODS[method](model, images, sentences(model)[1:]),
        METHODS[method](build(), images.double(), sentences(model)[1:].double()),
    )
    assert pearson(a, b) > 0.98


# Refusals.

CALLS = {**METHODS, "relevance": lambda *args, **options: list(relevance(*args, conserving=True, **options))}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_a_plain_vit_is_not_refused(call):
    call(build(), pictures(build()), sentences(build()))


def refused(reason, model):
    for call in CALLS.values():
        with pytest.raises(BaselineError, match=reason):
            call(model, torch.zeros(2, 3, 8, 12, dtype=torch.float64), torch.ones(2, 24, dtype=torch.float64))


def with_tower(visual):
    model = build()
    model.visual = visual
    return model


def coca():
    vision = {key: VISION[key] for key in ("width", "head_width", "patch_size", "image_size")}
    vision |= {"layers": 1, "attentional_pool": True, "output_tokens": True}
    text = {**TEXT_TOWER, "embed_cls": True, "output_tokens": True}
    decoder = {"layers": 1, "width": 8, "heads": 1, "context_length": 4, "vocab_size": 8}
    return CoCa(24, decoder, text, vision).double()


def averaging_release():
    model = as_released(for_release("open_clip 2.16"), "open_clip 2.16")
    model.visual.global_average_pool = True
    return model


def early_release_with_norm(place):
    model = as_released(build(), "open_clip 2.0")
    blocks(model)[1].set_submodule(place, nn.LayerNorm(32))
    return model


def without(name):
    model = build()
    delattr(model.visual, name)
    return model


def turned(*changed):
    """Some blocks take other axes than they are given."""
    model = build()
    for i in changed:
        blocks(model)[i].attn.batch_first = False
    return model


def with_block(change):
    model = build()
    change(blocks(model)[1])
    return model


def separate_projections(block):
    block.attn = nn.MultiheadAttention(32, 4, kdim=16, batch_first=True)


CLASS_TOKEN, OTHER = "VisionTransformer.*class token", "VisionTransformer.*block ResidualAttentionBlock"
CUSTOM = ["qk_norm", "scale_heads", "scaled_cosine_attn", "scale_attn_inner", "scale_attn", "scale_fc"]
REFUSED = {
    "mean": (lambda: build(pool_type="avg"), CLASS_TOKEN),
    "no pooling": (lambda: build(pool_type="none"), CLASS_TOKEN),
    "attention pooling": (lambda: build(attentional_pool=True, attn_pooler_heads=4), CLASS_TOKEN),
    "CoCa": (coca, f"CoCa.*{CLASS_TOKEN}"),
    "mean of an older release": (averaging_release, CLASS_TOKEN),
    "ResNet": (lambda: with_tower(ModifiedResNet((1, 1, 1, 1), 24, 4, 32, width=8)), "ModifiedResNet"),
    # timm's own toy ViT
    "timm": (lambda: with_tower(TimmModel("test_vit", embed_dim=24, pretrained=False)), "TimmModel.*timm"),
    "an early norm": (lambda: early_release_with_norm("ln_attn"), "VisionTransformer.*Block.*standard"),
    "an early norm in the MLP": (
        lambda: early_release_with_norm("mlp.ln"),
        "VisionTransformer.*Block.*standard",
    ),
    "no blocks": (lambda: without("transformer"), "VisionTransformer.*ViT"),
    "no last norm": (lambda: without("ln_post"), "VisionTransformer.*ViT"),
    "custom": (lambda: build(block_type="custom"), "VisionTransformer.*CustomResidualAttentionBlock"),
    **{
        name: (partial(build, **{name: True}), "VisionTransformer.*CustomResidualAttentionBlock")
        for name in CUSTOM
    },
    "one block turned": (lambda: turned(1), f"{OTHER}.*axes"),
    "all blocks turned": (lambda: turned(0, 1, 2), f"{OTHER}.*axes"),
    "separate projections": (lambda: with_block(separate_projections), OTHER),
    "a norm in the MLP": (
        lambda: with_block(lambda block: block.mlp.add_module("ln", nn.LayerNorm(32))),
        OTHER,
    ),
    "no attention": (lambda: with_block(lambda block: delattr(block, "attn")), OTHER),
    "no tower": (lambda: nn.Linear(2, 2), "Linear"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_tower_of_another_kind_is_refused(make, reason):
    refused(reason, make())


class OlderTower(nn.Module):
    """Without the attributes pool_type and attn_pool, which older releases did not have."""

    def __init__(self, tower):
        super().__init__()
        self.embed, self.positional_embedding, self.patch_size = (
            tower._embeds,
            tower.positional_embedding,
            tower.patch_size,
        )
        self.ln_pre, self.transformer, self.ln_post, self.proj = (
            tower.ln_pre,
            tower.transformer,
            tower.ln_post,
            tower.proj,
        )

    def forward(self, images):
        return self.ln_post(self.transformer(self.embed(images))[:, 0]) @ self.proj


@every_method
def test_a_tower_of_older_releases_that_reads_its_class_token_has_the_same_map(method):
    model = build()
    older = with_tower(OlderTower(model.visual))
    ours = METHODS[method](older, pictures(model), sentences(model))
    assert far(ours, mapped(method, model)) < tolerance(method)


# Older releases, with the weights of this one.

every_release = pytest.mark.parametrize("release", releases.RELEASES)


def as_released(model, release):
    """A CLIP of the older shape with the weights of a new one."""
    older = releases.CLIP(release).to(model.visual.proj.dtype).eval()
    older.visual.load_state_dict(model.visual.state_dict())
    older.logit_scale.data.copy_(model.logit_scale.data)
    return older


def for_release(release, **options):
    return build(ls_init_value=0.3 if releases.RELEASES[release].get("layer_scale") else None, **options)


@every_release
def test_an_older_release_has_the_same_embedding(release):
    model = for_release(release)
    older = as_released(model, release)
    assert far(older.encode_image(pictures(model)), model.encode_image(pictures(model))) < EXACT


@pytest.mark.slow
@every_release
@every_method
@pytest.mark.parametrize("batch", [3, 7])  # 7 images of 7 tokens: no shape tells the axes apart
def test_an_older_release_has_the_same_maps(release, method, batch):
    model = for_release(release)
    images, texts = pictures(model, batch), sentences(model, batch)
    maps = METHODS[method](as_released(model, release), images, texts)
    assert far(maps, METHODS[method](model, images, texts)) < EXACT


@every_release
@both_rules
def test_an_older_release_has_the_same_relevance(release, conserving):
    model = for_release(release)
    images, texts = pictures(model), sentences(model)
    older = relevance(as_released(model, release), images, texts, conserving=conserving)
    for ours, theirs in zip(relevance(model, images, texts, conserving=conserving), older, strict=True):
        assert ours[0] == theirs[0]
        assert far(theirs[1], ours[1]) < EXACT
        assert far(theirs[2], ours[2]) < EXACT


@every_method
def test_tokens_taken_for_images_would_be_noticed(monkeypatch, method):
    model = build()
    images, texts = pictures(model, 7), sentences(model, 7)
    truth = METHODS[method](model, images, texts)
    monkeypatch.setattr(baselines._Block, "batch_first", lambda self, x: x)
    assert far(METHODS[method](as_released(model, "openai"), images, texts), truth) > FAR


@every_release
@every_method
def test_an_older_release_is_left_as_found(release, method):
    model = as_released(for_release(release), release).train()
    before = found(model)
    METHODS[method](model, pictures(build()), sentences(build()))
    assert found(model) == before


@every_method
def test_a_release_that_casts_images_to_half_precision_has_finite_maps(method):
    model = as_released(build(), "openai").half()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()  # as OpenAI's convert_weights leaves them
    maps = METHODS[method](model, pictures(build()).float(), sentences(build()).float())
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()


def test_a_refusal_is_a_value_error():
    assert issubclass(BaselineError, ValueError)


def test_a_refused_model_is_left_as_found():
    model = build(pool_type="avg").train()
    before = found(model)
    refused("class token", model)
    assert found(model) == before


@every_call
@pytest.mark.parametrize(
    "shape", [(3, 23), (3, 25), (24,), (1, 24), (2, 24), (4, 24), (3, 1, 24), (1, 3, 24)], ids=str
)
def test_texts_of_another_shape_are_refused(call, shape):
    model = build()
    with pytest.raises(ValueError, match=r"texts.*\b3\b.*\b24\b"):
        call(model, pictures(model), torch.ones(shape, dtype=torch.float64))


@every_call
def test_an_unknown_score_is_refused_with_the_choices(call):
    model = build()
    with pytest.raises(ValueError, match="score") as error:
        call(model, pictures(model), sentences(model), score="softmax")
    assert all(word in str(error.value) for word in ("softmax", *SCORES))


@pytest.mark.parametrize("start_layer", [-1, 3])
@pytest.mark.parametrize("method", ["rollout", "chefer2021", "chefer2021-mm"])
def test_a_start_layer_that_does_not_exist_is_refused(method, start_layer):
    with pytest.raises(ValueError, match=f"start_layer.*0 and 2.*got {start_layer}"):
        mapped(method, build(), start_layer=start_layer)


@pytest.mark.parametrize("layers", [-1, 0, 4])
def test_a_number_of_layers_that_does_not_exist_is_refused(layers):
    with pytest.raises(ValueError, match=f"layers.*1 and.*3, got {layers}"):
        mapped("legrad", build(), layers=layers)


@every_method
def test_the_score_is_given_by_name(method):
    with pytest.raises(TypeError, match="positional"):
        METHODS[method](build(), pictures(build()), sentences(build()), "dot")


def test_relevance_has_no_default_rules():
    with pytest.raises(TypeError, match="conserving"):
        list(
            baselines._relevance(
                baselines._run(build(), pictures(build()), sentences(build()), "dot", 0, ("x",))
            )
        )


# The model is left as found.


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_left_otherwise_would_be_noticed(change):
    model = half_trained()
    before = found(model)
    change(model)
    assert found(model) != before


@every_call
def test_the_model_is_left_as_found(call):
    model = half_trained()
    before = found(model)
    call(model, pictures(model), sentences(model))
    assert found(model) == before


@settings(max_examples=20, deadline=None)
@given(shapes(), st.integers(1, 3), seeds, st.sampled_from(sorted(CALLS)))
def test_the_model_is_left_as_found_whatever_the_shape_and_options(shape, batch, seed, name):
    model = build(**shape)
    model.train(bool(seed % 2))
    before = found(model)
    options = every_layer(name, model)
    CALLS[name](model, pictures(model, batch, seed), sentences(model, batch, seed + 1), **options)
    assert found(model) == before


@every_call
def test_no_gradient_is_left_on_the_parameters(call):
    model = build()
    call(model, pictures(model), sentences(model))
    assert all(p.grad is None for p in model.parameters())


@every_call
def test_the_model_is_left_as_found_when_its_forward_raises(call):
    model = half_trained()
    before = found(model)
    with pytest.raises((RuntimeError, ValueError)):
        call(model, torch.zeros(2, 3, 16, 16, dtype=torch.float64), sentences(model, 2))
    assert found(model) == before


@every_call
@pytest.mark.parametrize(
    "name", ["visual.transformer.resblocks.0.ln_1", "visual.transformer.resblocks.2.mlp", "visual.ln_post"]
)
def test_the_model_is_left_as_found_when_a_hook_of_the_user_raises(call, name):
    model = half_trained()

    def interrupt(module, args, output):
        raise KeyError("mine")

    model.get_submodule(name).register_forward_hook(interrupt)
    before = found(model)
    with pytest.raises(KeyError, match="mine"):
        call(model, pictures(model), sentences(model))
    assert found(model) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("rule", ["_linear", "_add", "_matmul"])
@pytest.mark.parametrize(
    "call", [CALLS[name] for name in ("lrp", "lrp-conserving", "partial-lrp", "chefer2021", "relevance")]
)
def test_the_model_is_left_as_found_when_a_rule_raises(monkeypatch, call, rule):
    model = half_trained()
    before = found(model)

    def interrupt(*args):
        raise KeyError("mine")

    monkeypatch.setattr(baselines, rule, interrupt)
    with pytest.raises(KeyError, match="mine"):
        call(model, pictures(model), sentences(model))
    assert found(model) == before
    assert torch.is_grad_enabled()


def test_the_model_is_left_as_found_when_relevance_is_not_read_to_the_end():
    model = half_trained()
    before = found(model)
    rest = iter(relevance(model, pictures(model), sentences(model), conserving=True))
    next(rest)
    assert found(model) == before
    assert torch.is_grad_enabled()
    del rest
    assert found(model) == before


@every_call
def test_images_and_texts_are_left_as_found(call):
    model = build()
    images, texts = pictures(model), sentences(model)
    call(model, images, texts)
    assert torch.equal(images, pictures(model))
    assert torch.equal(texts, sentences(model))
    assert not images.requires_grad
    assert not texts.requires_grad


@every_call
def test_nothing_carries_gradients(call):
    model = build()
    images, texts = pictures(model).requires_grad_(), sentences(model).requires_grad_()
    result = call(model, images, texts)
    tensors = [result] if torch.is_tensor(result) else [t for _, R_A, R in result for t in (R_A, R)]
    assert not any(t.requires_grad for t in tensors)
    assert images.grad is None
    assert texts.grad is None


@every_method
def test_a_model_in_training_has_the_maps_of_evaluation(method):
    model = build(patch_dropout=0.5)
    expected = mapped(method, model)
    assert torch.equal(mapped(method, model.train()), expected)


def test_a_model_in_training_drops_patches_by_itself():
    model = build(patch_dropout=0.5)
    assert far(model.train().encode_image(pictures(model)), model.eval().encode_image(pictures(model))) > FAR


@every_method
def test_gradient_checkpointing_changes_nothing(method):
    model = build()
    expected = mapped(method, model)
    model.set_grad_checkpointing()
    assert far(mapped(method, model.train()), expected) < tolerance(method)


@every_call
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_block_runs_once(call, checkpointing):
    model, calls = build(), []
    model.set_grad_checkpointing(checkpointing)
    for i, block in enumerate(blocks(model)):
        block.register_forward_pre_hook(lambda module, args, i=i: calls.append(i))
    call(model, pictures(model), sentences(model))
    assert calls == [0, 1, 2]


@every_method
def test_a_tower_without_projection_is_read_out_at_its_norm(method):
    model, texts = build(), noise(3, 32, seed=2)
    model.visual.proj = nn.Parameter(torch.eye(32, dtype=torch.float64))
    expected = METHODS[method](model, pictures(model), texts)
    model.visual.proj = None
    assert far(METHODS[method](model, pictures(model), texts), expected) < tolerance(method)


@every_method
def test_an_attention_without_biases_is_one_with_biases_of_zero(method):
    model, without = build(), build()
    for block in blocks(model):
        block.attn.in_proj_bias.data.zero_()
        block.attn.out_proj.bias.data.zero_()
    for block in blocks(without):
        block.attn.in_proj_bias = block.attn.out_proj.bias = None
    assert far(mapped(method, without), mapped(method, model)) < tolerance(method)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_of_any_precision_are_taken(method, dtype):
    model = build()
    texts = sentences(model).to(dtype)
    assert far(
        METHODS[method](model, pictures(model), texts),
        METHODS[method](model, pictures(model), texts.double()),
    ) < tolerance(method)


@every_method
def test_no_grad_around_a_call_and_a_frozen_model_change_nothing(method):
    with torch.no_grad():
        without = mapped(method, build())
        assert not torch.is_grad_enabled()
    assert far(without, mapped(method, build())) < tolerance(method)
    # frozen or not, torch may take another kernel: equal but for the last digits
    assert far(mapped(method, build(frozen=True)), mapped(method, build())) < tolerance(method)
