"""Models of transformers: exact, and equal to models of open_clip and timm with the same weights."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from small import EXACT, FAR, SINGLE, build, far, found, noise
from test_families import SIGLIP
from test_python_page import recipes, run_cells

from baselines import METHODS, BaselineError
from decompose import DecompositionError, check, decompose, head_maps, heatmap, token_scores
from forward import class_values, forward_without
from neurons import neurons, writers

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

ROOT = Path(__file__).parent.parent
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
TEXT |= {"vocab_size": 99, "max_position_embeddings": 8}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"image_size": 12, "patch_size": 4}
SIGLIP_SIZES = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
SIGLIP_SIZES |= {"image_size": 32, "patch_size": 16}


def clip(kind="CLIPModel", text=TEXT, **options):
    vision = SIZES | options
    if kind == "CLIPVisionModelWithProjection":
        config = transformers.CLIPVisionConfig(**vision, projection_dim=24)
    else:
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return getattr(transformers, kind)(config).double().eval()


def siglip(**options):
    text, vision = TEXT | {"projection_size": 48}, SIGLIP_SIZES | options
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    return transformers.SiglipModel(config).double().eval()


@torch.no_grad()
def give(theirs, ours, names):
    """Copy parameters; names: {theirs: ours}, of modules (weight and bias) or of parameters."""
    for name, other in names.items():
        source = ours.get_submodule(other) if f"{other}.weight" in ours.state_dict() else None
        if source is not None:
            theirs.get_submodule(name).load_state_dict(source.state_dict())
        else:
            theirs.get_parameter(name).copy_(ours.get_parameter(other).view_as(theirs.get_parameter(name)))


@torch.no_grad()
def split_qkv(attn, weight, bias):
    """Queries, keys and values are three maps in transformers, and one in open_clip and timm."""
    for name, W, b in zip(("q_proj", "k_proj", "v_proj"), weight.chunk(3), bias.chunk(3), strict=True):
        getattr(attn, name).weight.copy_(W)
        getattr(attn, name).bias.copy_(b)


@torch.no_grad()
def clip_pair(kind="CLIPModel", quick_gelu=True):
    """(open_clip's model, transformers' model of the same weights)"""
    ours = build(image_size=(12, 12), quick_gelu=quick_gelu)
    theirs = clip(kind, hidden_act="quick_gelu" if quick_gelu else "gelu")
    names = {"embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding": "conv1"}
    names |= {"embeddings.position_embedding.weight": "positional_embedding"}
    names |= {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for i, layer in enumerate(theirs.vision_model.encoder.layers):
        names |= {f"encoder.layers.{i}.{a}": f"transformer.resblocks.{i}.{b}" for a, b in parts.items()}
        attn = ours.visual.transformer.resblocks[i].attn
        split_qkv(layer.self_attn, attn.in_proj_weight, attn.in_proj_bias)
    give(theirs.vision_model, ours.visual, names)
    theirs.visual_projection.weight.copy_(ours.visual.proj.T)
    return ours, theirs


@torch.no_grad()
def siglip_pair():
    """timm's model behind open_clip's TimmModel, and transformers'."""
    ours = SIGLIP(size=(32, 32))
    trunk, theirs = ours.visual.trunk, siglip(hidden_act="gelu")
    assert "tanh" not in str(trunk.blocks[0].mlp.act)
    names = {"embeddings.patch_embedding": "patch_embed.proj", "post_layernorm": "norm"}
    names |= {"embeddings.position_embedding.weight": "pos_embed", "head.probe": "attn_pool.latent"}
    names |= {"head.attention.out_proj": "attn_pool.proj", "head.layernorm": "attn_pool.norm"}
    names |= {"head.mlp.fc1": "attn_pool.mlp.fc1", "head.mlp.fc2": "attn_pool.mlp.fc2"}
    parts = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
    parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i, (layer, block) in enumerate(zip(theirs.vision_model.encoder.layers, trunk.blocks, strict=True)):
        names |= {f"encoder.layers.{i}.{a}": f"blocks.{i}.{b}" for a, b in parts.items()}
        split_qkv(layer.self_attn, block.attn.qkv.weight, block.attn.qkv.bias)
    give(theirs.vision_model, trunk, names)
    pool, attn = trunk.attn_pool, theirs.vision_model.head.attention
    attn.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
    attn.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
    return ours, theirs


PAIRS = {
    "CLIPModel, quick_gelu": clip_pair,
    "CLIPModel, gelu": partial(clip_pair, quick_gelu=False),
    "CLIPVisionModelWithProjection": partial(clip_pair, "CLIPVisionModelWithProjection"),
    "SiglipModel": siglip_pair,
}
TAKEN = pytest.mark.parametrize("name", PAIRS)


def pictures(model, batch=2, seed=1):
    """Of the size and precision of a model of transformers."""
    embeddings = model.vision_model.embeddings
    images = noise(batch, 3, embeddings.image_size, embeddings.image_size, seed=seed)
    return images.to(embeddings.patch_embedding.weight)


@torch.no_grad()
def features(model, images):
    """What the model's own method returns: a tensor in transformers 4, in 5 an object that holds it."""
    if not hasattr(model, "get_image_features"):
        return model(pixel_values=images).image_embeds
    out = model.get_image_features(pixel_values=images)
    return getattr(out, "pooler_output", out)


@TAKEN
def test_the_terms_are_those_of_the_same_weights_in_open_clip(name):
    ours, theirs = PAIRS[name]()
    images = pictures(theirs)
    a, b = decompose(ours, images), decompose(theirs, images)
    for field, x in vars(a).items():
        y = getattr(b, field)
        assert (x is None) == (y is None)
        assert x is None or far(y, x) < EXACT, field
    assert far(head_maps(theirs), head_maps(ours)) < EXACT
    texts = noise(5, a.embedding.shape[1], seed=2)
    for function in (token_scores, heatmap):
        assert far(function(theirs, images, texts), function(ours, images, texts)) < EXACT
    for layer in (0, -1):
        assert far(neurons(theirs, images, layer).terms(), neurons(ours, images, layer).terms()) < EXACT


@TAKEN
def test_the_sum_is_exact_and_equals_what_the_model_returns(name):
    _, model = PAIRS[name]()
    images = pictures(model)
    terms = decompose(model, images)
    assert far(terms.embedding, features(model, images)) < EXACT
    assert terms.error() < EXACT
    assert check(model, images, tolerance=EXACT) < EXACT
    texts = noise(5, terms.embedding.shape[1], seed=2)
    assert far(token_scores(model, images, texts).sum(dim=3), terms.heads @ texts.T) < EXACT
    split = neurons(model, images, -1)
    assert far(split.total(), terms.mlps[:, -1]) < EXACT


@TAKEN
def test_other_weights_give_other_terms(name):
    """The comparison above would notice."""
    ours, theirs = PAIRS[name]()
    theirs.vision_model.encoder.layers[0].self_attn.v_proj.weight.data[0] += 1
    images = pictures(theirs)
    assert far(decompose(theirs, images).heads, decompose(ours, images).heads) > FAR


def test_the_activation_makes_a_difference():
    ours, _ = clip_pair(quick_gelu=True)
    _, theirs = clip_pair(quick_gelu=False)
    images = pictures(theirs)
    assert far(decompose(theirs, images).mlps, decompose(ours, images).mlps) > FAR


@TAKEN
def test_the_model_is_left_as_it_was_found(name):
    _, model = PAIRS[name]()
    model.train()
    before = found(model)
    with torch.random.fork_rng():
        decompose(model, pictures(model))
    assert found(model) == before


@TAKEN
def test_a_weight_that_changes_while_the_model_runs_is_noticed_and_its_block_named(name):
    _, model = PAIRS[name]()
    out = model.vision_model.encoder.layers[1].self_attn.out_proj
    out.register_forward_hook(lambda module, args, output: 1.5 * output)
    with pytest.raises(DecompositionError, match=r"do not sum .* largest gap in block 1"):
        decompose(model, pictures(model))


@TAKEN
def test_a_read_out_that_changes_is_told_from_the_blocks(name):
    _, model = PAIRS[name]()
    model.vision_model.post_layernorm.register_forward_hook(lambda module, args, output: 1.5 * output)
    with pytest.raises(DecompositionError, match="every block adds up, so the difference arises in the read"):
        decompose(model, pictures(model))


def test_the_convention_of_the_paper_holds_for_clip_alone():
    ours, theirs = clip_pair()
    images = pictures(theirs)
    assert far(*(decompose(m, images, convention="paper").heads for m in (theirs, ours))) < EXACT
    with pytest.raises(DecompositionError, match=r"SiglipModel with image tower .*convention"):
        decompose(siglip(), pictures(siglip()), convention="paper")


def test_heads_are_taken_out_of_the_forward_pass_of_clip():
    ours, theirs = clip_pair()
    images, heads = pictures(theirs), [(0, 1), (2, 3)]
    values = class_values(theirs, images)
    assert far(values, class_values(ours, images)) < EXACT
    changed = [forward_without(m, images, heads, values.mean(dim=0)) for m in (theirs, ours)]
    assert far(*changed) < EXACT
    assert far(changed[0], features(theirs, images)) > FAR


def test_single_and_half_precision():
    model = clip().float()
    assert decompose(model, pictures(model)).error() < SINGLE
    model = siglip().bfloat16()
    terms = decompose(model, pictures(model))
    assert terms.heads.dtype == torch.float32
    assert terms.embedding.dtype == torch.bfloat16


def eager(model):
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    return model


def of(kind, config, **options):
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**options)).double()


def without(model, path):
    owner, _, name = path.rpartition(".")
    delattr(model.get_submodule(owner), name)
    return model


def half_a_head(model):
    model.vision_model.head.attention.in_proj_bias = None
    return model


BOTH = {"vision_config": SIZES, "text_config": TEXT}
REFUSED = {
    "eager": (lambda: eager(clip()), "CLIPModel .*'eager', which cannot be intercepted.*attn_implementation"),
    "tower": (lambda: clip().vision_model, "it is an image tower; give the whole model, CLIPModel"),
    "NaFlex": (
        of("Siglip2Model", "Siglip2Config", **BOTH),
        r"Siglip2Model with image tower Siglip2Vision.*\(NaFlex\), not images",
    ),
    "no projection": (
        lambda: without(clip(), "visual_projection"),
        "neither a visual_projection nor attention pooling; give CLIPModel",
    ),
    "no head": (lambda: siglip(vision_use_head=False), "neither a visual_projection nor attention pooling"),
    "another head": (lambda: half_a_head(siglip()), "MultiheadAttention of another kind"),
    "another attention": (
        of("BlipModel", "BlipConfig", **BOTH),
        "BlipModel .*attention BlipAttention has no out_proj",
    ),
    "no layers": (lambda: without(clip(), "vision_model.encoder"), "no encoder.layers and post_layernorm"),
    "no patches": (lambda: without(clip(), "vision_model.embeddings"), "no embeddings.patch_embedding"),
    "another block": (
        lambda: without(clip(), "vision_model.encoder.layers.1.layer_norm2"),
        "block CLIPEncoderLayer has layer_norm1, mlp, self_attn; expected",
    ),
    "text alone": (of("CLIPTextModel", "CLIPTextConfig", **TEXT), "CLIPTextModel .*no attribute `visual`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decomposed_is_refused_by_name(name):
    make, reason = REFUSED[name]
    with pytest.raises(DecompositionError, match=f"^cannot decompose {reason}|^cannot decompose .*{reason}"):
        decompose(make(), noise(2, 3, 12, 12, seed=1))


def test_another_mlp_is_refused_for_its_neurons_alone():
    model = clip()
    model.vision_model.encoder.layers[1].mlp.norm = torch.nn.LayerNorm(64)
    assert decompose(model, pictures(model)).error() < EXACT
    with pytest.raises(DecompositionError, match="MLP of block 1 is activation_fn, fc1, fc2, norm; expected"):
        neurons(model, pictures(model), 1)


def test_what_needs_the_names_of_open_clip_refuses():
    model = clip()
    images = pictures(model)
    with pytest.raises(DecompositionError, match="cannot follow what heads read in CLIPModel"):
        writers(model, images, 1, 0)
    with pytest.raises(DecompositionError, match="cannot run SiglipModel without heads: its read-out is"):
        forward_without(siglip(), pictures(siglip()), [(0, 0)])
    with pytest.raises(BaselineError, match="no baseline supports CLIPModel"):
        METHODS["rollout"](model, images, noise(2, 24, seed=2))


def test_without_the_adapter_a_model_is_told_which_file_to_add(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface", None)
    with pytest.raises(DecompositionError, match=r"^cannot decompose CLIPModel: put huggingface.py beside"):
        decompose(clip(), noise(2, 3, 12, 12, seed=1))


def test_the_product_does_not_import_transformers():
    """open_clip does, where it is installed; so the files that need torch alone are imported."""
    files = "decompose, families, huggingface, neurons, forward"
    program = f"import {files}, sys; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_recipe_prints_what_stands_below_it():
    [(code, printed)] = [recipe for recipe in recipes() if "transformers" in recipe[0]]
    assert run_cells([code]) == [printed]
