"""What decompose.py promises beyond its terms: the paper's convention for source tokens, the proof of the
sum, one line for what was given wrongly, one forward pass, and the shapes of older releases.

Models and the long way of working them out are those of test_decompose.py and test_families.py.
"""

import math
import sys
from functools import partial
from types import ModuleType

import pytest
import releases
import test_decompose as plain
import test_families as other
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_decompose import EXACT, FAR, far, found, pictures, sentences
from torch import nn

import decompose as core
from decompose import DecompositionError, check, decompose, head_maps, heatmap, token_scores
from neurons import neurons

CALLS = {
    "decompose": lambda model, images, texts: decompose(model, images),
    "token_scores": token_scores,
    "heatmap": heatmap,
    "check": lambda model, images, texts: check(model, images),
    "neurons": lambda model, images, texts: neurons(model, images, 1),
}
TEXTUAL = {name: CALLS[name] for name in ("token_scores", "heatmap")}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
every_textual_call = pytest.mark.parametrize("call", TEXTUAL.values(), ids=TEXTUAL)
either_convention = pytest.mark.parametrize("convention", ["term", "paper"])


# The paper's convention, divided over source tokens.


@torch.no_grad()
def authors_way(model, images, summands=None):
    """[b, L, H, N, d] by their definition: k = H N parts of each attention, 2 L + 1 summands of the stream.

    [gamma (c - mu / (summands k)) / sigma + beta / (summands k)] P,   c = alpha W_O (W_V x_n + b_V) + b_O / k
    """
    visual, written = model.visual, []
    x = visual._embeds(images)
    for block in visual.transformer.resblocks:
        attn, y = block.attn, block.ln_1(x)
        alpha = attn(y, y, y, average_attn_weights=False)[1][:, :, 0]  # [b, H, N] torch's own
        H, k = attn.num_heads, alpha[0].numel()
        v = F.linear(y, attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2]).chunk(H, dim=-1)
        W_O = attn.out_proj.weight.chunk(H, dim=1)
        parts = [alpha[:, h, :, None] * (v[h] @ W_O[h].T) + attn.out_proj.bias / k for h in range(H)]
        written.append(block.ls_1(torch.stack(parts, dim=1)))
        x = block(x)
    c, last, norm = torch.stack(written, dim=1), x[:, 0, None, None, None], visual.ln_post
    share = (2 * c.shape[1] + 1 if summands is None else summands) * k
    sigma = (last.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()
    centred = c - last.mean(dim=-1, keepdim=True) / share
    return (norm.weight * centred / sigma + norm.bias / share) @ visual.proj


every_scale = pytest.mark.parametrize("options", [{}, {"ls_init_value": 0.3}], ids=["plain", "LayerScale"])


@every_scale
@pytest.mark.parametrize("layers", [None, [2, 0]])
def test_token_scores_in_the_papers_convention_are_the_authors(options, layers):
    model = plain.build(**options)
    images, texts = pictures(model), sentences(model)
    wanted = slice(None) if layers is None else layers
    scores = token_scores(model, images, texts, layers, convention="paper")
    assert far(scores, authors_way(model, images)[:, wanted] @ texts.T) < EXACT
    # Another count of summands changes but one of many shares.
    assert far(scores, authors_way(model, images, summands=2 * 3)[:, wanted] @ texts.T) > FAR / 10
    assert far(scores, token_scores(model, images, texts, layers)) > FAR


@every_scale
def test_a_heatmap_in_the_papers_convention_is_the_authors(options):
    model = plain.build(**options)
    images, texts = pictures(model), sentences(model)
    maps = heatmap(model, images, texts, convention="paper")
    truth = authors_way(model, images).sum(dim=(1, 2))[:, 1:] @ texts.T  # [b, patches, t]
    assert far(maps, truth.mT.unflatten(2, (2, 3))) < EXACT
    assert far(maps, heatmap(model, images, texts)) > FAR


CLASS_TOKENS = ["EVA01", "EVA02", "EVA02 with layer scale", "MobileCLIP2-L", "registers"]


@pytest.mark.parametrize("family", CLASS_TOKENS)
def test_source_tokens_of_other_class_tokens_get_even_shares_in_the_papers_convention(family):
    model = other.model_of(family)
    images, texts = other.pictures(model), other.sentences(model)
    hand = other.by_hand(model, images, centred=False)
    L, H, N = hand.sources.shape[1:4]
    shares = (hand.biases + hand.rest[:, None] / (2 * L + 1)) / (H * N)
    truth = (hand.sources + shares[:, :, None, None]) @ texts.T
    assert far(token_scores(model, images, texts, convention="paper"), truth) < EXACT
    assert far(hand.sources @ texts.T, truth) > FAR
    prefix = N - 6  # of 2 x 3 patches
    maps = truth.sum(dim=(1, 2))[:, prefix:].mT.unflatten(2, (2, 3))
    assert far(heatmap(model, images, texts, convention="paper"), maps) < EXACT


@pytest.mark.parametrize("family", ["plain", "LayerScale", "class token, every norm", *CLASS_TOKENS])
def test_source_tokens_in_the_papers_convention_sum_to_its_heads(family):
    options = {"plain": {}, "LayerScale": {"ls_init_value": 0.3}}.get(family)
    model = other.model_of(family) if options is None else plain.build(**options)
    images, texts = other.pictures(model), other.sentences(model)
    heads = decompose(model, images, convention="paper").heads @ texts.T
    scores = token_scores(model, images, texts, convention="paper")
    assert far(scores.sum(dim=3), heads) < EXACT
    assert far(scores[..., :-1, :].sum(dim=3), heads) > FAR
    assert far(token_scores(model, images, texts).sum(dim=3), heads) > FAR


@every_textual_call
@pytest.mark.parametrize("family", ["mean, norm first", "SigLIP", "CoCa", "EVA01 by mean"])
def test_the_papers_convention_is_refused_for_means_and_attention_pooling(call, family):
    model = other.model_of(family)
    images, texts = other.pictures(model), other.sentences(model)
    with pytest.raises(DecompositionError, match='"paper" is defined for a class token'):
        call(model, images, texts, convention="paper")
    assert call(model, images, texts).isfinite().all()


@every_textual_call
def test_an_unknown_convention_is_refused(call):
    model = plain.build()
    with pytest.raises(ValueError, match='convention must be "term" or "paper", got \'mine\''):
        call(model, pictures(model), sentences(model), convention="mine")


@settings(max_examples=25, deadline=None)
@given(plain.models(), st.integers(1, 3), st.sampled_from(["term", "paper"]))
def test_patches_and_the_class_tokens_own_part_are_all_that_the_heads_add(model, batch, convention):
    images, texts = pictures(model, batch), sentences(model)
    heads = decompose(model, images, convention=convention).heads.sum(dim=(1, 2)) @ texts.T
    patches = heatmap(model, images, texts, convention=convention).sum(dim=(2, 3))
    own = token_scores(model, images, texts, convention=convention)[:, :, :, 0].sum(dim=(1, 2))
    assert far(patches + own, heads) < EXACT
    assert far(patches + 1.1 * own, heads) > 1e-6  # however little the class token adds


@settings(max_examples=10, deadline=None)
@given(plain.models())
def test_the_class_tokens_own_part_is_its_token_score(model):
    images, texts = pictures(model), sentences(model)
    maps, own = head_maps(model), decompose(model, images).own
    terms = torch.einsum("blhe,lhed->blhd", own, maps)
    assert far(terms @ texts.T, token_scores(model, images, texts)[:, :, :, 0]) < EXACT


# Layers.


@pytest.mark.parametrize("layer", [0, 2, -1, -3])
def test_layers_may_be_one_number(layer):
    model = plain.build()
    images, texts = pictures(model), sentences(model)
    scores = token_scores(model, images, texts, layers=layer)
    assert torch.equal(scores, token_scores(model, images, texts, layers=[layer]))
    assert far(scores, token_scores(model, images, texts, layers=1)) > FAR


@pytest.mark.parametrize("layer", [3, -4])
def test_one_number_of_a_layer_that_is_not_there_is_refused(layer):
    model = plain.build()
    with pytest.raises(
        ValueError, match=rf"layers must be between -3 and 2 and at least one, got \[{layer}\]"
    ):
        token_scores(model, pictures(model), sentences(model), layers=layer)


# What is given by mistake gets one clear line.


def told(call, *args):
    """The message of an error of one line that no module of torch has raised."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        call(*args)
    assert "torch" not in str(raised.traceback[-1].path)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    return message


@every_call
def test_what_is_right_is_taken(call):
    model = plain.build()
    call(model, pictures(model), sentences(model))


@every_textual_call
@pytest.mark.parametrize("texts", [["a bird", "a ship"], "a bird"], ids=str)
def test_texts_that_are_not_embedded_are_refused(call, texts):
    message = told(call, plain.build(), pictures(plain.build()), texts)
    assert "texts must be [t, 24], embeddings as encode_text gives" in message
    assert f"got ['{type(texts).__name__}']" in message


@every_textual_call
def test_one_text_without_its_axis_or_none_at_all_is_refused(call):
    model = plain.build()
    message = told(call, model, pictures(model), sentences(model)[0])
    assert message == "texts must be [t, 24], embeddings as encode_text gives, got [24]"
    message = told(call, model, pictures(model), sentences(model)[:0])
    assert message == "texts must be [t, 24], embeddings as encode_text gives, got [0, 24]"


@every_call
@pytest.mark.parametrize("images", [Image.new("RGB", (12, 8)), [torch.zeros(3, 8, 12)], "a.png"], ids=type)
def test_images_that_are_no_tensor_are_refused(call, images):
    message = told(call, plain.build(), images, sentences(plain.build()))
    assert message.startswith("images must be [b, 3, rows, columns]")
    assert message.endswith(f"got ['{type(images).__name__}']")


@every_call
def test_one_image_without_its_axis_or_none_at_all_is_refused_and_told_what_to_add(call):
    model = plain.build()
    message = told(call, model, pictures(model)[0], sentences(model))
    assert message == "images must be [b, 3, rows, columns] (x[None] for one image x), got [3, 8, 12]"
    message = told(call, model, pictures(model)[:0], sentences(model))
    assert message == "images must be [b, 3, rows, columns] (x[None] for one image x), got [0, 3, 8, 12]"


MODELS = {
    "its tower": (lambda model: model.visual, "it is an image tower; give the whole model, not its .visual"),
    "parallel": (nn.DataParallel, "it is a wrapper; give the model inside, its .module"),
    "scripted": (torch.jit.script, "scripted models cannot be watched; load it without jit"),
    "another": (lambda model: nn.Linear(2, 2), "it has no attribute `visual`; expected an open_clip model"),
    "no module": (lambda model: "ViT-B-16", "it has no attribute `visual`; expected an open_clip model"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@every_call
@pytest.mark.parametrize(("change", "reason"), MODELS.values(), ids=MODELS)
def test_another_object_in_place_of_the_model_is_refused(call, change, reason):
    model = plain.build()
    message = told(call, change(model), pictures(model), sentences(model))
    assert message.startswith("cannot decompose ")
    assert message.endswith(reason)
    assert told(head_maps, change(model)) == message


def test_the_tower_of_timm_in_place_of_the_model_is_refused():
    model = other.model_of("EVA02")
    message = told(decompose, model.visual, other.pictures(model))
    assert message.endswith("it is an image tower; give the whole model, not its .visual")


@pytest.mark.parametrize("family", ["SigLIP", "EVA02", "mean, norm first"])
def test_other_families_refuse_the_same_inputs(family):
    model = other.model_of(family)
    images, texts = other.pictures(model), other.sentences(model)
    d = texts.shape[1]
    assert told(decompose, model, images[0]).startswith("images must be [b, 3, rows, columns]")
    for call in TEXTUAL.values():
        assert f"texts must be [t, {d}]" in told(call, model, images, ["a bird"])
        assert f"texts must be [t, {d}]" in told(call, model, images, texts[:, 1:])


# What is printed.


def test_a_decomposition_and_neurons_print_their_shapes_and_no_numbers():
    model = plain.build()
    printed = repr(decompose(model, pictures(model)))
    assert printed == (
        "Decomposition(embedding [2, 24], stem [2, 24], heads [2, 3, 4, 24], mlps [2, 3, 24], "
        "constant [2, 24], values [2, 3, 4, 8], own [2, 3, 4, 8])"
    )
    printed = repr(neurons(model, pictures(model), 1))
    assert printed == (
        "Neurons(embedding [2, 24], term [2, 24], activations [2, 64], maps [64, 24], constant [2, 24])"
    )


def test_what_a_decomposition_has_not_is_not_printed():
    pooled, averaged = (
        repr(decompose(other.model_of(family), other.pictures(other.model_of(family))))
        for family in ("SigLIP", "mean, norm first")
    )
    assert "pool [2, 48]" in pooled
    assert "own" not in pooled
    assert "pool" not in averaged


# The sum is proved.


def changed_while_running(weight, module, size=0.3):
    """Adds noise to a weight while the module runs, and takes it away again, as adapters do."""
    noise, forward = size * torch.randn_like(weight), module.forward

    def wrapped(*args, **kwargs):
        kept = weight.data.clone()
        weight.data += noise
        try:
            return forward(*args, **kwargs)
        finally:
            weight.data.copy_(kept)

    module.forward = wrapped


def attention_of(model):
    return model.visual.transformer.resblocks[1].attn


PLACES = {
    "values": lambda model: (attention_of(model).in_proj_weight, attention_of(model)),
    "out-projection": lambda model: (attention_of(model).out_proj.weight, attention_of(model)),
    "last norm": lambda model: (model.visual.ln_post.weight, model.visual.ln_post),
    "projection": lambda model: (model.visual.proj, model.visual),
}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@every_place
@either_convention
def test_a_weight_that_changes_only_while_the_model_runs_is_an_error(place, convention):
    model = plain.build()
    changed_while_running(*place(model))
    before = found(model)
    with pytest.raises(DecompositionError, match="the terms do not sum to the embedding: relative error"):
        decompose(model, pictures(model), convention=convention)
    assert found(model) == before


@every_place
def test_an_infinite_tolerance_returns_the_terms_as_they_are(place):
    model = plain.build()
    changed_while_running(*place(model))
    assert decompose(model, pictures(model), tolerance=math.inf).error() > FAR


@every_place
def test_a_wrapper_that_changes_nothing_is_no_error(place):
    model = plain.build()
    changed_while_running(*place(model), size=0.0)
    assert decompose(model, pictures(model)).error() < EXACT


@pytest.mark.parametrize("place", ["values", "out-projection"])
def test_the_block_is_named_whose_weight_changes(place):
    model = plain.build()
    changed_while_running(*PLACES[place](model))
    with pytest.raises(DecompositionError, match="largest gap in block 1: its heads differ"):
        decompose(model, pictures(model))


@pytest.mark.parametrize("stem", [1.0, 1e-8])
@torch.no_grad()
def test_the_gap_is_a_share_of_what_the_attention_wrote_however_little_that_is(stem):
    model = plain.build()
    for p in model.visual.ln_pre.parameters():
        p.mul_(stem)
    for p in attention_of(model).out_proj.parameters():
        p.mul_(1e-8)
    attention_of(model).register_forward_hook(lambda module, args, output: (2 * output[0], None))
    named = r"in block 1: its heads differ from what its attention wrote by 5\.0e-01 of its norm"
    with pytest.raises(DecompositionError, match=named):
        decompose(model, pictures(model), tolerance=0.0)


@pytest.mark.parametrize("family", ["EVA02", "SigLIP", "MobileCLIP2-L"])
def test_a_weight_of_another_family_that_changes_only_while_it_runs_is_an_error(family):
    model = other.FAMILIES[family]()
    attn = model.visual.trunk.blocks[1].attn
    changed_while_running(attn.proj.weight, attn)
    with pytest.raises(DecompositionError, match=r"do not sum to the embedding.*largest gap in block 1"):
        decompose(model, other.pictures(model))
    assert decompose(model, other.pictures(model), tolerance=math.inf).error() > FAR
    assert decompose(other.model_of(family), other.pictures(model)).error() < EXACT


def slightly_wrong(dtype):
    """A model whose error is about 1e-6: more than float64 rounds, less than float32 may."""
    model = plain.build(dtype)
    changed_while_running(*PLACES["out-projection"](model), size=1e-6)
    return model


def test_an_error_that_float64_does_not_explain_is_none_in_float32_unless_larger():
    model = slightly_wrong(torch.float64)
    assert 1e-7 < decompose(model, pictures(model), tolerance=1e-5).error() < 1e-5
    with pytest.raises(DecompositionError, match=r"tolerance 1\.0e-09 \(torch\.float64\)"):
        decompose(model, pictures(model))
    model = slightly_wrong(torch.float32)
    decompose(model, pictures(model))
    model = plain.build(torch.float32)
    changed_while_running(*PLACES["out-projection"](model), size=1e-2)
    with pytest.raises(DecompositionError, match=r"tolerance 1\.0e-04 \(torch\.float32\)"):
        decompose(model, pictures(model))


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_honest_rounding_in_half_precision_is_no_error(dtype, mixed):
    model = plain.half(dtype, mixed)
    assert core.TOLERANCE[torch.float32] < decompose(model, pictures(model)).error() < core.TOLERANCE[dtype]


def test_honest_rounding_under_autocast_is_no_error():
    model = plain.build(torch.float32)
    terms = plain.under_autocast(lambda: decompose(model, pictures(model)))
    assert terms.error() > core.TOLERANCE[torch.float32]
    with pytest.raises(DecompositionError, match=r"tolerance 1\.0e-04"):
        plain.under_autocast(lambda: decompose(model, pictures(model), tolerance=1e-4))


def test_under_autocast_the_pass_rounds_even_where_the_embedding_comes_in_float32():
    model = plain.build(torch.float32)
    model.visual.register_forward_hook(lambda module, args, output: output.float())
    terms = plain.under_autocast(lambda: decompose(model, pictures(model)))
    assert terms.embedding.dtype == torch.float32
    assert terms.error() > core.TOLERANCE[torch.float32]


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_a_wrong_sum_in_half_precision_is_an_error(mode):
    model = plain.build(torch.bfloat16 if mode == "bfloat16" else torch.float32)
    changed_while_running(*PLACES["projection"](model), size=1.0)
    call = partial(decompose, model, pictures(model))
    with pytest.raises(DecompositionError, match=r"tolerance 1\.0e-01"):
        plain.under_autocast(call) if mode == "autocast" else call()


def test_a_sum_that_is_no_number_is_an_error():
    model = plain.build()
    with pytest.raises(DecompositionError, match="not a number"):
        decompose(model, pictures(model) * torch.nan)
    assert math.isnan(decompose(model, pictures(model) * torch.nan, tolerance=math.inf).error())


@every_place
def test_the_message_of_a_wrong_sum_is_one_clear_line(place):
    model = plain.build()
    changed_while_running(*place(model))
    message = told(decompose, model, pictures(model))
    assert "; norm of the sum " in message
    assert "; ;" not in message


def test_the_norm_of_an_embedding_in_half_precision_is_not_rounded():
    model = plain.build(torch.bfloat16)
    changed_while_running(*PLACES["projection"](model), size=1.0)
    embedding = decompose(model, pictures(model), tolerance=math.inf).embedding.float()
    assert (
        told(decompose, model, pictures(model)).count(f"norm of the embedding {embedding.norm():.6g};") == 1
    )


def test_a_tower_that_turns_autocast_off_adds_up_in_full_precision():
    model = plain.build(torch.float32)
    forward = model.visual.forward

    def in_full(images):
        with torch.autocast("cpu", enabled=False):
            return forward(images) + 1

    model.visual.forward = in_full
    with pytest.raises(DecompositionError, match="every block adds up, so the difference arises in the read"):
        plain.under_autocast(lambda: decompose(model, pictures(model), tolerance=1e-4))


# One forward pass.

FAMILIES = {
    "plain": plain.build,
    **{name: other.FAMILIES[name] for name in ("class token, every norm", "mean, norm first", "CoCa")},
    **{name: other.FAMILIES[name] for name in ("EVA02", "SigLIP")},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*CALLS, "head_maps"])
def test_one_forward_pass_and_no_hook_is_left(family, name):
    model, passes = FAMILIES[family](), []
    images, texts = other.pictures(model), other.sentences(model)
    model.visual.register_forward_hook(lambda *_: passes.append(None))
    before, stock = found(model.visual), F.scaled_dot_product_attention
    (CALLS | {"head_maps": lambda model, images, texts: head_maps(model)})[name](model, images, texts)
    assert len(passes) == (0 if name == "head_maps" else 1)
    assert found(model.visual) == before
    assert F.scaled_dot_product_attention is stock


@pytest.mark.parametrize("family", ["plain", "EVA02"])
def test_what_is_kept_of_the_class_token_does_not_hold_on_to_all_tokens(family):
    model = FAMILIES[family]()
    written = core.open_tower(model).watch(other.pictures(model))
    for kept in (written.stem, written.mlps, written.last):
        assert kept.untyped_storage().nbytes() == kept.nbytes


# The other files.


@pytest.mark.parametrize("name", ["families", "diagnose"])
def test_somebody_elses_module_of_the_same_name_is_passed_over(name, monkeypatch):
    model = plain.build()
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert decompose(model, pictures(model)).error() < EXACT
    with pytest.raises(DecompositionError, match=r"do not sum to the embedding: relative error"):
        decompose(model, pictures(model), tolerance=-1.0)


# The shapes of older releases.

SHAPES = [release for release in releases.RELEASES if release != "open_clip 2.0"]
every_release = pytest.mark.parametrize("release", SHAPES)
NEWEST = "open_clip 2.26"


@torch.no_grad()
def of_release(release, **options):
    """A toy of 7 tokens, no parameter at its trivial value; with LayerScale or without, the same for all."""
    layer_scale = releases.RELEASES[release].get("layer_scale")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = releases.CLIP(NEWEST if layer_scale else "openai", **options)
        for p in model.visual.parameters():
            p.add_(0.3 * torch.randn_like(p))
    older = releases.CLIP(release, **options)
    older.visual.load_state_dict(model.visual.state_dict())
    return older.double().eval()


def seven():
    """As many images as tokens: no shape tells the two axes apart."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(7, 3, 8, 12, generator=generator, dtype=torch.float64)
    return images, torch.randn(5, 24, generator=generator, dtype=torch.float64)


@every_release
@either_convention
def test_the_terms_of_an_older_release_sum_to_its_embedding(release, convention):
    model, (images, _) = of_release(release), seven()
    terms = decompose(model, images, convention=convention)
    assert terms.error() < EXACT
    assert far(terms.embedding, model.encode_image(images)) < EXACT


@every_release
@either_convention
def test_the_source_tokens_of_an_older_release_sum_to_its_heads(release, convention):
    model, (images, texts) = of_release(release), seven()
    scores = token_scores(model, images, texts, convention=convention)
    heads = decompose(model, images, convention=convention).heads @ texts.T
    assert far(scores.sum(dim=3), heads) < EXACT
    assert far(scores[:, :, :, 1:].sum(dim=3), heads) > FAR


@every_release
def test_the_neurons_of_an_older_release_sum_to_the_term_of_its_mlp(release):
    model, (images, _) = of_release(release), seven()
    for layer in range(3):
        split = neurons(model, images, layer)
        assert split.error() < EXACT
        assert far(split.total(), decompose(model, images).mlps[:, layer]) < EXACT


@pytest.mark.parametrize("release", ["open_clip 2.16", "open_clip 2.24"])
def test_an_older_release_gives_what_a_newer_one_gives(release):
    older, newer, (images, texts) = of_release(release), of_release(NEWEST), seven()
    assert older.visual.transformer.resblocks[0].attn.batch_first is False
    assert newer.visual.transformer.resblocks[0].attn.batch_first is True
    terms, truth = decompose(older, images), decompose(newer, images)
    for name, value in vars(truth).items():
        if value is not None:
            assert far(getattr(terms, name), value) < EXACT
    for call in TEXTUAL.values():
        assert far(call(older, images, texts), call(newer, images, texts)) < EXACT
    split, whole = (neurons(model, images, 0) for model in (older, newer))
    assert far(split.activations, whole.activations) < EXACT


@every_release
def test_each_image_of_an_older_release_has_the_terms_that_it_has_alone(release):
    model, (images, texts) = of_release(release), seven()
    heads, maps = decompose(model, images).heads, heatmap(model, images, texts)
    for i in range(7):
        assert far(heads[i, None], decompose(model, images[i, None]).heads) < EXACT
        assert far(maps[i, None], heatmap(model, images[i, None], texts)) < EXACT
    assert far(heads[:1], heads[1:2]) > FAR


@every_release
def test_the_block_of_an_older_release_is_named_whose_weight_changes(release):
    model, (images, _) = of_release(release), seven()
    changed_while_running(*PLACES["values"](model))
    with pytest.raises(DecompositionError, match="largest gap in block 1: its heads differ"):
        decompose(model, images)


def test_axes_that_are_confused_do_not_pass(monkeypatch):
    model, (images, _) = of_release("open_clip 2.24"), seven()
    create = core.ClipTower.__init__

    def confused(tower, model):
        create(tower, model)
        tower.batch_first = True

    monkeypatch.setattr(core.ClipTower, "__init__", confused)
    with pytest.raises(DecompositionError, match="do not sum to the embedding"):
        decompose(model, images)


@every_release
def test_the_grid_of_an_older_release_is_that_of_its_patches(release):
    (_, texts), shape = seven(), {"patch": (4, 3), "grid": (2, 5)}
    model = of_release(release, **shape)
    images = torch.randn(2, 3, 8, 15, dtype=torch.float64)
    maps, scores = heatmap(model, images, texts), token_scores(model, images, texts)
    assert maps.shape == (2, 5, 2, 5)
    assert far(maps, scores.sum(dim=(1, 2))[:, 1:].mT.unflatten(2, (2, 5))) < EXACT


def test_the_grid_is_known_where_a_linear_map_takes_in_the_patches():
    """Older releases of open_clip have no convolution there under input_patchnorm."""
    model, (images, texts) = of_release("open_clip 2.16"), seven()
    expected, kernel = heatmap(model, images, texts), model.visual.conv1.weight
    linear = nn.Linear(kernel[0].numel(), len(kernel), bias=False).double()
    linear.weight = nn.Parameter(kernel.flatten(1))
    linear.register_forward_pre_hook(lambda module, args: F.unfold(args[0], 4, stride=4).mT)
    linear.register_forward_hook(lambda module, args, output: output.mT)
    model.visual.conv1 = linear
    assert far(heatmap(model, images, texts), expected) < EXACT


@pytest.mark.parametrize("release", ["open_clip 2.16", "open_clip 2.24", "open_clip 2.26"])
def test_a_mean_is_exact_where_it_is_taken_and_else_refused(release):
    model, (images, texts) = of_release(release, pool="avg"), seven()
    if release == "open_clip 2.16":
        assert told(decompose, model, images).endswith(
            "as older releases of open_clip did (global_average_pool)"
        )
        return
    terms = decompose(model, images)
    assert terms.error() < EXACT
    assert far(token_scores(model, images, texts).sum(dim=3), terms.heads @ texts.T) < EXACT
    assert neurons(model, images, 1).error() < EXACT


def test_the_class_token_of_open_clip_2_0_is_taken_beside_families_as_it_is_without_it(monkeypatch):
    model, (images, _) = of_release("open_clip 2.0"), seven()
    with monkeypatch.context() as patch:
        patch.setattr(core, "beside", lambda file, function: None)
        assert decompose(model, images).error() < EXACT
    assert decompose(model, images).error() < EXACT
