"""neurons.second_order and neurons.writers against what a head reads, written out token by token.

`Record` runs a small model by hand and keeps what every head, MLP and neuron writes on every token. `term` is
a head's term as a function of the residual stream, with the attention and the norms' divisors as they were.
Its derivative along what one writer wrote, by autograd, is that writer's part of the term.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import EXACT, FAR, HALF, INNER, SINGLE
from test_decompose import (
    attention_matrices,
    blocks,
    build,
    far,
    fields,
    found,
    half,
    pictures,
    sequence_first,
    std,
    under_autocast,
)
from torch import nn

import neurons as module
from decompose import DecompositionError, check, decompose
from neurons import neurons, second_order, writers

OPTIONS = {
    "plain": {},
    "quick gelu": {"quick_gelu": True},
    "layer scale": {"ls_init_value": 0.3},
    "no norm before": {"no_ln_pre": True},
    "large eps": {"norm_kwargs": {"eps": 0.1}},
    "all of them": {"quick_gelu": True, "ls_init_value": 0.3, "no_ln_pre": True, "output_tokens": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_layer = pytest.mark.parametrize("layer", [0, 1])


class Record:
    """A forward pass by hand. Lists by layer, of what is there or is written on all tokens [b, N, ...]."""

    @torch.no_grad()
    def __init__(self, model, images):
        self.model = model
        x = model.visual._embeds(images)
        self.stem, self.x, self.A, self.heads, self.b_O, self.mlps, self.h = x, [], [], [], [], [], []
        for block in blocks(model):
            A, v = attention_matrices(block.attn, block.ln_1(x))
            W_O = block.attn.out_proj.weight.T.unflatten(0, (A.shape[1], -1))
            heads = [block.ls_1(A[:, i] @ v[:, i] @ W_O[i]) for i in range(len(W_O))]
            b_O = block.ls_1(block.attn.out_proj.bias.expand_as(x))
            middle = x + sum(heads) + b_O
            h = block.mlp.gelu(block.mlp.c_fc(block.ln_2(middle)))
            mlp = block.ls_2(block.mlp.c_proj(h))
            for name, value in (("x", x), ("A", A), ("heads", heads), ("b_O", b_O), ("mlps", mlp), ("h", h)):
                getattr(self, name).append(value)
            x = middle + mlp
        self.last = x[:, 0]

    def neuron(self, layer, j):
        """What neuron j writes."""
        block = blocks(self.model)[layer]
        return block.ls_2(self.h[layer][..., [j]] * block.mlp.c_proj.weight[:, j])

    def bias(self, layer):
        """What the MLP's bias writes."""
        block = blocks(self.model)[layer]
        return block.ls_2(block.mlp.c_proj.bias.expand_as(self.stem))

    def term(self, layer, head, x, frozen=True):
        """[b, d] the term of a head that reads the stream x; not `frozen`: with the attention of this x."""
        block, norm, visual = blocks(self.model)[layer], blocks(self.model)[layer].ln_1, self.model.visual
        y = (x - x.mean(-1, keepdim=True)) / std(norm, self.x[layer]) * norm.weight + norm.bias
        A, v = attention_matrices(block.attn, y)
        A = self.A[layer] if frozen else A
        z = sum(A[:, head, 0, t, None] * v[:, head, t] for t in range(x.shape[1]))
        written = block.ls_1(z @ block.attn.out_proj.weight.T.unflatten(0, (A.shape[1], -1))[head])
        written = written - written.mean(-1, keepdim=True)
        return written / std(visual.ln_post, self.last) * visual.ln_post.weight @ visual.proj

    def part(self, layer, head, written, **more):
        """[b, d] the derivative of a head's term along what a writer wrote."""
        term = lambda x: self.term(layer, head, x, **more)  # noqa: E731
        return torch.autograd.functional.jvp(term, self.x[layer], written)[1].detach()

    def later(self, layer, written):
        """[b, d] the same for all heads after an MLP."""
        there = [(i, h) for i in range(layer + 1, len(self.A)) for h in range(self.A[0].shape[1])]
        return sum(self.part(*head, written) for head in there)


@every_option
def test_the_long_way_gives_the_heads_of_decompose(options):
    model = build(**options)
    record, heads = Record(model, pictures(model)), decompose(model, pictures(model)).heads
    assert far(record.term(2, 1, record.x[2]), heads[:, 2, 1]) < EXACT
    assert far(record.term(1, 3, record.x[1]), heads[:, 1, 3]) < EXACT


# Second-order effects.


@every_option
@every_layer
def test_each_neuron_is_the_derivative_of_all_later_heads_along_what_it_wrote(options, layer):
    model = build(**options)
    record, split = Record(model, pictures(model)), second_order(model, pictures(model), layer)
    truth = torch.stack([record.later(layer, record.neuron(layer, j)) for j in range(0, 64, 7)], dim=1)
    assert far(split.terms()[:, ::7], truth) < EXACT
    assert far(split.constant, record.later(layer, record.bias(layer))) < EXACT
    assert far(split.term, record.later(layer, record.mlps[layer])) < EXACT
    assert far(split.embedding, decompose(model, pictures(model)).embedding) < EXACT


def test_a_neuron_is_a_sum_over_later_layers_heads_and_tokens():
    """The formula of the paper, in four loops."""
    model, layer, j = build(), 0, 5
    record, split = Record(model, pictures(model)), second_order(model, pictures(model), layer)
    norm, P, rows = model.visual.ln_post, model.visual.proj, []
    for i in (1, 2):
        block = blocks(model)[i]
        w = blocks(model)[layer].mlp.c_proj.weight[:, j]
        w = (w - w.mean()) * block.ln_1.weight
        for h in range(4):
            slot = slice(8 * h, 8 * h + 8)
            written = block.attn.out_proj.weight[:, slot] @ (block.attn.in_proj_weight[64:][slot] @ w)
            map_ = (written - written.mean()) * norm.weight @ P
            for b in range(2):
                number = 0.0
                for t in range(record.stem.shape[1]):
                    s = std(block.ln_1, record.x[i][b, t])
                    number += record.A[i][b, h, 0, t] * record.h[layer][b, t, j] / s
                number = float(number / std(norm, record.last[b]))
                row = 4 * (i - 1) + h
                assert split.activations[b, row, j] == pytest.approx(number, rel=1e-10)
                rows.append((b, number * map_))
            assert far(split.maps[row, j] @ split.up[row], map_) < EXACT
    truth = torch.stack([sum(term for at, term in rows if at == b) for b in range(2)])
    assert far(split.terms()[:, j], truth) < EXACT


@every_option
@every_layer
def test_neurons_and_bias_sum_to_what_the_mlp_adds_to_later_heads(options, layer):
    model = build(**options)
    split = second_order(model, pictures(model), layer)
    assert split.error() < EXACT
    assert far(split.terms().sum(1) + split.constant, split.term) < EXACT


@every_option
def test_without_the_bias_or_a_neuron_the_sum_is_another(options):
    split = second_order(build(**options), pictures(build(**options)), 0)
    assert far(split.terms().sum(1), split.term) > FAR
    gaps = [far(split.total() - split.terms()[:, j], split.term) for j in range(64)]
    assert sum(gap > FAR for gap in gaps) > 50


def test_with_the_attention_free_to_change_the_derivative_is_another():
    model = build()
    record = Record(model, pictures(model))
    frozen, free = (record.part(1, 2, record.mlps[0], frozen=way) for way in (True, False))
    assert far(free, frozen) > FAR


@every_layer
def test_later_heads_read_something_else_than_the_class_token_alone(layer):
    model = build()
    direct = neurons(model, pictures(model), layer).terms()
    assert far(second_order(model, pictures(model), layer).terms(), direct) > FAR


@st.composite
def towers(draw):
    heads, head_width = draw(st.integers(1, 4)), draw(st.sampled_from([4, 6, 8]))
    rows, columns, patch = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    more = {"quick_gelu": st.booleans(), "ls_init_value": st.floats(0.01, 2), "no_ln_pre": st.booleans()}
    return build(
        layers=draw(st.integers(2, 4)),
        width=heads * head_width,
        head_width=head_width,
        patch_size=patch,
        image_size=(rows * patch, columns * patch),
        **draw(st.fixed_dictionaries({}, optional=more)),
    )


@settings(max_examples=25, deadline=None)
@given(towers(), st.integers(1, 3), st.integers(0, 2), st.integers(0, 1000))
def test_both_hold_whatever_the_sizes(model, batch, layer, seed):
    depth, heads = len(blocks(model)), blocks(model)[0].attn.num_heads
    layer, images = layer % (depth - 1), pictures(model, batch, seed)
    split, record = second_order(model, images, layer), Record(model, images)
    assert split.error() < EXACT
    assert far(split.terms()[:, 3], record.later(layer, record.neuron(layer, 3))) < EXACT
    read = writers(model, images, layer + 1, heads - 1)
    assert read.error() < EXACT
    assert far(read.heads[:, layer, 0], record.part(layer + 1, heads - 1, record.heads[layer][0])) < EXACT
    assert far(read.embedding, decompose(model, images).heads[:, layer + 1, heads - 1]) < EXACT


# Writers.


@every_option
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_writer_is_the_derivative_of_the_head_along_what_it_wrote(options, layer):
    model, head = build(**options), 2
    record, read = Record(model, pictures(model)), writers(model, pictures(model), layer, head)
    assert (read.heads.shape[1], read.mlps.shape[1]) == (layer, layer)
    assert far(read.stem, record.part(layer, head, record.stem)) < EXACT
    for i in range(layer):
        assert far(read.mlps[:, i], record.part(layer, head, record.mlps[i])) < EXACT
        for h in range(4):
            assert far(read.heads[:, i, h], record.part(layer, head, record.heads[i][h])) < EXACT
    constant = record.term(layer, head, torch.zeros_like(record.stem))  # of beta and b_V
    constant = constant + sum(record.part(layer, head, record.b_O[i]) for i in range(layer))
    assert far(read.constant, constant) < EXACT


@every_option
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_writers_sum_to_the_term_of_the_head(options, layer):
    model = build(**options)
    heads = decompose(model, pictures(model)).heads
    for head in range(4):
        read = writers(model, pictures(model), layer, head)
        assert read.error() < EXACT
        assert far(read.total(), heads[:, layer, head]) < EXACT
        assert far(read.total(), heads[:, layer, head - 1]) > FAR


@pytest.mark.parametrize("part", ["stem", "heads", "mlps", "constant"])
def test_without_one_kind_of_writer_the_sum_is_another(part):
    read = writers(build(), pictures(build()), 2, 1)
    rest = read.total() - getattr(read, part).flatten(1, -2).sum(1) if part in ("heads", "mlps") else None
    rest = read.total() - getattr(read, part) if rest is None else rest
    assert far(rest, read.embedding) > FAR


def test_writers_agree_with_second_order_on_every_mlp():
    model = build()
    for layer in (0, 1):
        there = [(i, h) for i in range(layer + 1, 3) for h in range(4)]
        read = sum(writers(model, pictures(model), *head).mlps[:, layer] for head in there)
        assert far(second_order(model, pictures(model), layer).term, read) < EXACT


def test_values_are_what_the_earlier_heads_terms_are_made_of():
    model = build()
    read = writers(model, pictures(model), 2, 1)
    maps = torch.linalg.lstsq(read.values[:, 1, 3], read.heads[:, 1, 3]).solution
    assert read.values.shape == (2, 2, 4, 8)
    assert far(read.values[:, 1, 3] @ maps, read.heads[:, 1, 3]) < EXACT


# One pass, any batch, layout and precision; the model is left as found.

CALLS = {
    "second_order": lambda model, images: second_order(model, images, 1),
    "writers": lambda model, images: writers(model, images, 2, 1),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def same(ours, truth, bound=EXACT):
    ours, truth = fields(ours), fields(truth)
    assert ours.keys() == truth.keys()
    assert {name: far(ours[name], truth[name]) < bound for name in truth} == dict.fromkeys(truth, True)


@every_call
def test_one_forward_pass_without_gradients(call):
    model, recorded = build(), []
    model.visual.register_forward_hook(lambda m, args, output: recorded.append(torch.is_grad_enabled()))
    parts = call(model, pictures(model).requires_grad_())
    assert recorded == [False]
    assert not any(x.requires_grad for x in fields(parts).values())


@every_call
def test_the_model_is_left_as_found(call):
    model = build(patch_dropout=0.5).train()
    blocks(model)[1].eval()
    before = found(model)
    call(model, pictures(model))
    assert found(model) == before
    with pytest.raises(RuntimeError):
        call(model, torch.zeros(2, 3, 16, 16, dtype=torch.float64))
    assert found(model) == before


@every_call
def test_tokens_on_the_first_axis_give_the_same(call):
    same(call(sequence_first(build()), pictures(build())), call(build(), pictures(build())))


@every_call
def test_a_batch_gives_what_single_images_give(call):
    model = build()
    images = pictures(model, batch=3)
    whole, first = fields(call(model, images)), fields(call(model, images[:1]))
    names = [name for name, x in whole.items() if len(x) == 3 and name not in ("maps", "up")]
    assert all(far(whole[name][:1], first[name]) < EXACT for name in names)
    assert far(whole["embedding"][:1], whole["embedding"][1:2]) > FAR


def test_a_batch_that_would_keep_too_much_is_split(monkeypatch):
    model, batches = build(), []
    images = pictures(model, batch=5)
    truth = writers(model, images, 2, 1)
    model.visual.register_forward_hook(lambda m, args, output: batches.append(len(args[0])))
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * (2 * 2 * 7 * 32 * 8))  # what two images keep
    same(writers(model, images, 2, 1), truth)
    assert batches == [2, 1, 2]
    batches.clear()
    monkeypatch.setattr(module, "KEPT_BYTES", 1)  # one image is never split
    same(writers(model, images, 2, 1), truth)
    assert batches == [1] * 5


@every_call
def test_a_float32_model_and_autocast(call):
    model = build(torch.float32)
    plain, cast = call(model, pictures(model)), under_autocast(lambda: call(model, pictures(model)))
    assert plain.error() < SINGLE
    assert 1e-6 < cast.error() < HALF


@every_call
@pytest.mark.parametrize("mixed", [False, True], ids=["pure", "mixed"])
def test_a_model_in_half_precision_is_split_in_float32(call, mixed):
    model = half(torch.bfloat16, mixed)
    parts = call(model, pictures(model))
    assert {x.dtype for name, x in fields(parts).items() if name != "embedding"} == {torch.float32}
    assert 1e-6 < parts.error() < HALF


def test_an_out_projection_without_bias_leaves_no_constant():
    model = build()
    blocks(model)[1].mlp.c_proj = nn.Linear(64, 32, bias=False, dtype=torch.float64)
    split = second_order(model, pictures(model), 1)
    assert not split.constant.any()
    assert split.error() < EXACT


def test_layers_and_heads_count_from_the_end():
    model = build()
    same(second_order(model, pictures(model), -2), second_order(model, pictures(model), 1))
    same(writers(model, pictures(model), -1, -3), writers(model, pictures(model), 2, 1))


# Refusals.


@pytest.mark.parametrize("layer", [3, -4, 1.0, None])
def test_a_layer_that_is_not_there_is_refused(layer):
    for call in (
        lambda: second_order(build(), pictures(build()), layer),
        lambda: writers(build(), pictures(build()), layer, 0),
    ):
        with pytest.raises(ValueError, match=f"layer must be between -3 and 2, got {layer!r}"):
            call()


@pytest.mark.parametrize("head", [4, -5, None])
def test_a_head_that_is_not_there_is_refused(head):
    with pytest.raises(ValueError, match=f"head must be between -4 and 3, got {head!r}"):
        writers(build(), pictures(build()), 1, head)


@pytest.mark.parametrize("layer", [2, -1])
def test_the_last_mlp_has_no_second_order_effect(layer):
    with pytest.raises(
        ValueError, match="layer must be before the last, 2: no head reads what its MLP writes"
    ):
        second_order(build(), pictures(build()), layer)


FAMILIES = {
    "mean": ({"pool_type": "avg"}, "mean of patches"),
    "custom blocks": ({"block_type": "custom"}, "class token"),
    "norms inside": (INNER, "class token"),
}


@every_call
@pytest.mark.parametrize(("options", "name"), FAMILIES.values(), ids=FAMILIES)
def test_other_families_are_refused_by_name(call, options, name):
    model = build(**options)
    before = found(model)
    assert check(model, pictures(model)) < EXACT  # which decompose takes
    message = (
        rf"cannot follow what heads read in CLIP with image tower VisionTransformer \({name}\): expected"
    )
    with pytest.raises(DecompositionError, match=message):
        call(model, pictures(model))
    assert found(model) == before


@every_call
def test_another_norm_before_the_attention_is_refused(call):
    model = build()
    blocks(model)[1].ln_1 = nn.RMSNorm(32).double()
    with pytest.raises(DecompositionError, match="cannot follow what heads read in CLIP"):
        call(model, pictures(model))


def test_an_mlp_of_another_kind_is_refused_by_name_but_its_head_has_writers():
    model = build()
    blocks(model)[1].mlp = nn.Sequential(nn.Linear(32, 32, dtype=torch.float64))
    with pytest.raises(DecompositionError, match="the MLP of block 1 is 0; expected c_fc, gelu, c_proj"):
        second_order(model, pictures(model), 1)
    assert writers(model, pictures(model), 2, 1).error() < EXACT
