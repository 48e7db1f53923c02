"""families.py against small random models of every kind of image tower, beside open_clip's class-token ViT.

The long way (`by_hand`) carries every part of the residual stream, at every token, through the rest of the
tower: each source of each head, each MLP, the stem, and one part for what belongs to none of them. A norm
divides a part by what it divides the whole by; pooling attention is that of the whole.
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.coca_model import CoCa
from open_clip.model import CLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import Transformer
from small import EXACT, FAR, HALF, INNER, SINGLE, TEXT_TOWER, VISION
from timm.layers import Attention, AttentionPoolLatent, GluMlp, Mlp, RmsNorm, SwiGLU
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

import families
import readouts
import towers
from attention import attention_calls
from decompose import DecompositionError, check, decompose, head_maps, heatmap, token_scores
from neurons import neurons


@torch.no_grad()
def perturbed(model):
    """No parameter of the image tower at its trivial value; logits of attention of about one."""
    for name, p in model.visual.named_parameters():
        if p.ndim == 1:  # gammas, betas, biases, layer scales
            p.add_(0.3 * torch.randn_like(p))
        elif p.ndim == 3 or "positional" in name:  # tokens, positions, latents, scales of heads
            p.add_(0.5 * torch.randn_like(p))
        else:
            p.copy_(
                (1.5 if "in_proj" in name or "qkv" in name else 0.9)
                * torch.randn_like(p)
                * p[0].numel() ** -0.5
            )
    for name, buffer in model.visual.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(0.2 * torch.rand_like(buffer))
    return model.double().eval()


def native(embed=24, **vision):
    """open_clip's own ViT: three blocks, four heads, 2 x 3 patches."""
    vision = VISION | vision
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perturbed(CLIP(embed, vision, TEXT_TOWER))


def coca():
    vision = {
        "layers": 2,
        "width": 32,
        "head_width": 8,
        "patch_size": 4,
        "image_size": (8, 12),
        "output_tokens": True,
    }
    vision |= {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}
    text = {**TEXT_TOWER, "embed_cls": True, "output_tokens": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perturbed(CoCa(24, {**TEXT_TOWER, "attn_pooler_heads": 2}, text, vision))


def of_timm(name, pool, proj=None, size=(32, 48), embed=24, proj_bias=False, **overrides):
    """timm's model of this name, made small: two blocks, three heads, 2 x 3 patches."""
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": size, **overrides}
    small = {key: value for key, value in small.items() if value is not None}
    create = timm.create_model
    vision = {
        "timm_model_name": name,
        "timm_pool": pool,
        "timm_proj": proj,
        "timm_proj_bias": proj_bias,
        "image_size": size,
    }
    with (
        torch.random.fork_rng(),
        mock.patch.object(timm, "create_model", lambda name, **more: create(name, **{**more, **small})),
    ):
        torch.manual_seed(0)
        return perturbed(CLIP(embed, vision, TEXT_TOWER))


def altered_siglip(change, **options):
    model = SIGLIP(**options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        change(model.visual.trunk)
        return perturbed(model)


def latents(pool, **options):
    """A tower of timm with two latents that pool, normed queries and keys."""
    pooler = partial(
        AttentionPoolLatent,
        48,
        num_heads=4,
        mlp_ratio=2.0,
        latent_len=2,
        pool_type=pool,
        qk_norm=True,
        **options,
    )
    return altered_siglip(lambda trunk: setattr(trunk, "attn_pool", pooler()))


def without_biases(trunk):
    """No bias on the way out of heads, neurons, and the pooling's heads."""
    for block in trunk.blocks:
        block.attn.proj.bias = block.mlp.fc2.bias = None
    trunk.attn_pool.proj.bias = None


SIGLIP = partial(of_timm, "vit_base_patch16_siglip_224", "map", proj="none", embed=48)
PROJECTED = partial(of_timm, "vit_base_patch16_siglip_224", "map", "linear", proj_bias=True)
PE = partial(of_timm, "vit_pe_core_tiny_patch16_384", "map", attn_pool_num_heads=4)
EVA = partial(of_timm, "eva02_base_patch16_clip_224")
VIT = partial(of_timm, "vit_base_patch16_224")
RELPOS = partial(of_timm, "vit_relpos_medium_patch16_cls_224", "", "linear", rel_pos_dim=16)
FOURTEEN, PLAIN = (28, 42), {"bias": False}
FAMILIES = {
    # open_clip's own
    "class token, every norm": partial(native, **INNER),
    "mean, norm first": partial(native, pool_type="avg"),
    "mean, norm last": partial(native, pool_type="avg", final_ln_after_pool=True),
    "mean, every norm": partial(native, pool_type="avg", **INNER),
    "mean, every norm, norm last": partial(
        native, pool_type="avg", final_ln_after_pool=True, no_ln_pre=True, **INNER
    ),
    "queries, first": partial(native, attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2),
    "queries, first, tokens returned": partial(
        native, attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2, output_tokens=True
    ),
    "queries, mean": partial(
        native, attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2, pool_type="avg"
    ),
    "queries, same width": partial(
        native, embed=32, attentional_pool=True, attn_pooler_queries=2, attn_pooler_heads=4
    ),
    "queries, every norm": partial(
        native, attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2, **INNER
    ),
    "CoCa": coca,
    "queries, norms without beta": partial(
        native, attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2, norm_kwargs=PLAIN
    ),
    "mean, norms without beta": partial(native, pool_type="avg", norm_kwargs=PLAIN),
    # timm's
    "SigLIP": SIGLIP,
    "SigLIP with registers": partial(SIGLIP, reg_tokens=2, class_token=True),
    "SigLIP with layer scale": partial(SIGLIP, init_values=0.3),
    "SigLIP, projected": PROJECTED,
    "SigLIP by mean": partial(of_timm, "vit_base_patch16_siglip_gap_224", "avg", "none", embed=48),
    "two latents, first": partial(latents, "token"),
    "two latents, mean": partial(latents, "avg", qkv_bias=False),
    "SigLIP with a last norm": partial(SIGLIP, fc_norm=True),
    "SigLIP, projected twice": partial(
        altered_siglip, lambda trunk: setattr(trunk, "head", nn.Linear(48, 48)), proj="linear"
    ),
    "SigLIP without biases": partial(altered_siglip, without_biases, qkv_bias=False),
    "PE-Core": PE,
    "PE-Core with a last norm": partial(PE, use_fc_norm=True),
    "PE-Core without class token": partial(PE, class_token=False),
    "ViTamin": partial(
        of_timm, "vitamin_small_224", "", "linear", embed_dim=None, num_heads=4, mlp_ratio=0.1
    ),
    "MobileCLIP-B": partial(of_timm, "vit_base_mci_224", "token", embed_dim=None, num_heads=4, mlp_ratio=0.1),
    "MobileCLIP2-L": partial(of_timm, "vit_large_patch14_clip_224", "token", size=FOURTEEN),
    "EVA01": partial(of_timm, "eva_giant_patch14_224", "token", size=FOURTEEN),
    "EVA01 by mean": partial(of_timm, "eva_giant_patch14_224", "avg", size=FOURTEEN),
    "EVA02": partial(EVA, "token"),
    "EVA02 with layer scale": partial(EVA, "token", init_values=0.3),
    "EVA02 with layer scale of attention": partial(
        of_timm, "eva02_tiny_patch14_224", "token", size=FOURTEEN, init_values=0.3, attn_only_layer_scale=True
    ),
    "EVA02-E": partial(of_timm, "eva02_enormous_patch14_clip_224", "token", size=FOURTEEN, mlp_ratio=2.0),
    "EVA02 without last norm": partial(EVA, "token", use_post_transformer_norm=False),
    "PE-Core with shared values": partial(PE, num_kv_heads=1, qkv_fused=False),
    "DINOv3": partial(of_timm, "vit_base_patch16_dinov3", "avg"),
    "BEiT": partial(of_timm, "beit_base_patch16_224", "avg"),
    "ViT-M by mean": partial(of_timm, "vit_medium_patch16_gap_256", "", "linear"),
    "relative positions": RELPOS,
    "relative positions, norms after": partial(
        of_timm, "vit_relpos_medium_patch16_rpn_224", "", "linear", rel_pos_dim=16
    ),
    "registers": partial(VIT, "token", reg_tokens=2, init_values=0.3),
    "registers, mean": partial(VIT, "avg", reg_tokens=2, init_values=0.3, pool_include_prefix=True),
    "registers, mean of patches": partial(VIT, "avg", "linear", reg_tokens=2, proj_bias=True, fc_norm=True),
    "every norm": partial(
        VIT, "token", qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=0.3
    ),
    "norms after": partial(VIT, "token", block_fn=ResPostBlock),
    "registers and rotation": partial(of_timm, "vit_medium_patch16_rope_reg1_gap_256", "avg"),
    "rotation by head": partial(of_timm, "vit_small_patch16_rope_mixed_224", "avg"),
}
model_of = cache(lambda family: FAMILIES[family]())
every_family = pytest.mark.parametrize("family", FAMILIES)
ATTENDED = [name for name in FAMILIES if name.startswith(("queries", "two latents", "CoCa", "SigLIP", "PE"))]
ATTENDED.remove("SigLIP by mean")
FEW = ["mean, norm first", "queries, mean", "SigLIP", "PE-Core", "EVA02", "registers, mean of patches"]
some_families = pytest.mark.parametrize("family", FEW)


def pictures(model, batch=2, seed=1, size=None):
    x = torch.randn(
        batch,
        3,
        *(size or model.visual.image_size),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    return x.to(next(model.visual.parameters()).dtype)


@torch.no_grad()
def stock(model, images):
    """The embedding, not normalised, whatever the model's default."""
    output = model.visual(images)
    output = output[0] if isinstance(output, tuple) else output
    return output


def sentences(model, count=5, seed=2):
    width = stock(model, pictures(model, 1)).shape[1]
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(next(model.visual.parameters()).dtype)


def blocks(model):
    return list(
        model.visual.trunk.blocks if hasattr(model.visual, "trunk") else model.visual.transformer.resblocks
    )


@torch.no_grad()
def far(a, b):
    """max |a - b| / max |b|"""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def off(a, b, whole):
    """max |a - b| / max |whole|"""
    assert a.shape == b.shape
    return float((a - b).abs().max() / whole.abs().max())


# The long way.


def std(norm, x):
    return ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + norm.eps).sqrt()


@dataclass
class Split:
    """Some vectors, and parts that sum to them. The last part belongs to no other: it takes the biases."""

    whole: Tensor  # [b, T, D]
    parts: Tensor  # [p, b, T, D]
    scale: Tensor | None = None  # [b, T, 1] one over the divisors of the norms so far
    # Whether a norm takes every part's own mean from it, or the whole's from the last part.
    centred: bool = True

    def __post_init__(self):
        self.scale = torch.ones_like(self.whole[..., :1]) if self.scale is None else self.scale

    def through(self, *steps):
        split = self
        for step in steps:
            whole, parts, scale, bias = split.whole, split.parts, split.scale, getattr(step, "bias", None)
            if step is None or isinstance(step, nn.Identity | nn.Dropout):
                continue
            if isinstance(step, nn.LayerNorm):
                divisor, mean = std(step, whole), whole.mean(-1, keepdim=True)
                parts = (
                    parts - parts.mean(-1, keepdim=True)
                    if split.centred
                    else torch.cat([parts[:-1], parts[-1:] - mean])
                )
                whole, parts, scale = step(whole), parts / divisor * step.weight, scale / divisor
            elif isinstance(step, nn.Linear):
                whole, parts = step(whole), parts @ step.weight.T
            elif isinstance(step, Tensor):
                whole, parts = (
                    (whole @ step, parts @ step) if step.ndim == 2 else (whole * step, parts * step)
                )
            else:
                assert type(step).__name__ == "LayerScale", step
                gamma = next(step.parameters())
                whole, parts = whole * gamma, parts * gamma
            if bias is not None:
                parts = torch.cat([parts[:-1], parts[-1:] + bias])
            split = Split(whole, parts, scale, split.centred)
        return split

    def attended(self, A, W, bias, *steps):
        """Mixed as attention A [b, H, q, T] mixes values x W' + bias, then through the steps."""
        heads = A.shape[1]

        def mix(x):
            return torch.einsum("bhqt,...bthe->...bqhe", A, x.unflatten(-1, (heads, -1))).flatten(-2)

        parts = self.parts @ W.T
        return Split(mix(self.whole @ W.T + bias), mix(torch.cat([parts[:-1], parts[-1:] + bias]))).through(
            *steps
        )

    def pooled(self, tokens, weight):
        """The sum of some tokens, times weight; one token is left."""
        whole, parts = (weight * x[..., tokens, :].sum(-2, keepdim=True) for x in (self.whole, self.parts))
        return Split(whole, parts, centred=self.centred)


def of_heads(q, k, heads, q_norm=None, k_norm=None):
    """Attention [b, H, T, N] of q [b, T, H e] to k [b, N, H e]."""
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    q, k = (q, k) if q_norm is None else (q_norm(q), k_norm(k))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


@torch.no_grad()
def watched(model, images):
    """What enters each block and leaves the last [b, N, D]; timm's attention matrices [b, H, N, N].

    The matrices are those of timm's slow path.
    """
    model, stream, attention = copy.deepcopy(model), [], []
    for module in model.visual.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    for block in blocks(model):
        block.register_forward_pre_hook(lambda module, args: stream.append(args[0]))
        if hasattr(block.attn, "proj"):
            block.attn.attn_drop.register_forward_hook(lambda module, args, output: attention.append(output))
    blocks(model)[-1].register_forward_hook(lambda module, args, output: stream.append(output))
    model.visual(images)
    return stream, attention


def native_attention(attn, y):
    """Attention [b, H, N, N], values [b, H, N, e]."""
    W, c = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = ((y @ W[i].T + c[i]).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for i in range(3))
    q, k = (attn.ln_q(q), attn.ln_k(k)) if hasattr(attn, "ln_q") else (q, k)
    v = v if getattr(attn, "head_scale", None) is None else v * attn.head_scale
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), v


def values_of(attn, y):
    """[b, H, N, e] of one of timm's attentions."""
    if attn.qkv is None:
        v = attn.v_proj(y)
    else:
        v = F.linear(y, attn.qkv.weight, attn.qkv.bias).chunk(3, -1)[2]
        v = v if getattr(attn, "v_bias", None) is None else v + attn.v_bias
    width = attn.proj.in_features // attn.num_heads
    return (
        v.unflatten(-1, (-1, width))
        .transpose(1, 2)
        .repeat_interleave(attn.proj.in_features // v.shape[-1], dim=1)
    )


def anatomy(block):
    """The norms and maps of a block, before and after its attention and its MLP's hidden features."""
    attn, mlp = block.attn, block.mlp
    if hasattr(block, "ln_1"):
        after = [getattr(attn, "ln_inner", None), attn.out_proj, getattr(block, "ln_attn", None), block.ls_1]
        return block.ln_1, after, block.ln_2, [getattr(mlp, "ln", None), mlp.c_proj, block.ls_2]
    norm, out = (None, mlp.w2) if isinstance(mlp, GeGluMlp) else (mlp.norm, mlp.fc2)
    attn_out, mlp_out = [getattr(attn, "norm", None), attn.proj], [norm, out]
    if isinstance(block, EvaBlockPostNorm | ResPostBlock | ResPostRelPosBlock):
        return nn.Identity(), [*attn_out, block.norm1], nn.Identity(), [*mlp_out, block.norm2]
    scales = (getattr(block, f"ls{i}", getattr(block, f"gamma_{i}", None)) for i in (1, 2))
    return block.norm1, [*attn_out, next(scales)], block.norm2, [*mlp_out, next(scales)]


def hidden_of(mlp, y):
    """[b, N, n] past the nonlinearity."""
    if isinstance(mlp, nn.Sequential):
        return mlp.gelu(mlp.c_fc(y))
    if isinstance(mlp, GeGluMlp):
        return mlp.act(mlp.w0(mlp.norm(y))) * mlp.w1(mlp.norm(y))
    if isinstance(mlp, SwiGLU):
        return mlp.act(mlp.fc1_g(y)) * mlp.fc1_x(y)
    if isinstance(mlp, GluMlp):
        one, other = mlp.fc1(y).chunk(2, -1)
        return one * mlp.act(other) if mlp.gate_last else mlp.act(one) * other
    assert isinstance(mlp, Mlp)
    return mlp.act(mlp.fc1(y))


def spread(x, slots):
    """x [..., slots, w] -> [slots, ..., slots w]: each slot alone, zero elsewhere."""
    eye = torch.eye(slots, dtype=x.dtype)
    return torch.einsum("...sw,rs->r...sw", x, eye).flatten(-2)


def heads_of(A, v):
    """The context [b, N, H e], and its parts [H N, b, N, H e] by head and source, and none for the rest."""
    parts = torch.einsum("bhns,bhse->sbnhe", A, v)
    parts = spread(parts, A.shape[1]).flatten(0, 1)
    whole = (A @ v).transpose(1, 2).flatten(2)
    return Split(whole, torch.cat([parts, torch.zeros_like(parts[:1])]))


def by_queries(pool, split):
    """open_clip's attention pooling."""
    split, q, attn = split.through(pool.ln_k), pool.ln_q(pool.query), pool.attn
    W = (
        [attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight]
        if attn.in_proj_weight is None
        else attn.in_proj_weight.chunk(3)
    )
    c = attn.in_proj_bias.chunk(3)
    q = (q @ W[0].T + c[0]).expand(len(split.whole), -1, -1)
    return split.attended(of_heads(q, split.whole @ W[1].T + c[1], attn.num_heads), W[2], c[2], attn.out_proj)


def by_latent(pool, split):
    """timm's attention pooling; its MLP comes in as a first part."""
    k, v = pool.kv.weight.chunk(2)
    c, d = (0, 0) if pool.kv.bias is None else pool.kv.bias.chunk(2)
    q = pool.q(pool.latent).expand(len(split.whole), -1, -1)
    A = of_heads(q, split.whole @ k.T + c, pool.num_heads, pool.q_norm, pool.k_norm)
    split, tokens = (
        split.attended(A, v, d, pool.proj),
        [0] if pool.pool == "token" else list(range(pool.latent_len)),
    )
    more = pool.mlp(pool.norm(split.whole))
    return Split(split.whole + more, torch.cat([more[None], split.parts])).pooled(tokens, 1 / len(tokens))


def read_out(model, split):
    """The embedding and its parts, one token each.

    Also the weights [b, N] of the tokens, where attention does not pool them.
    """
    visual, N = model.visual, split.whole.shape[1]
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        with_prefix = (
            trunk.global_pool == "map"
            if isinstance(trunk, Eva)
            else getattr(trunk, "pool_include_prefix", False)
        )
        tokens = (
            [0]
            if trunk.global_pool == "token"
            else list(range(0 if with_prefix else trunk.num_prefix_tokens, N))
        )
        split, pool, last = (
            split.through(trunk.norm),
            getattr(trunk, "attn_pool", None),
            [trunk.fc_norm, trunk.head, *visual.head],
        )
        if pool is not None:
            split = Split(split.whole[:, tokens], split.parts[:, :, tokens])
            return by_latent(pool, split).through(*last), None
    elif visual.attn_pool is not None:
        return natively_attended(visual, split), None
    else:
        tokens = [0] if visual.pool_type == "tok" else list(range(1, N))
        split = split if visual.final_ln_after_pool else split.through(visual.ln_post)
        last = [visual.ln_post, visual.proj] if visual.final_ln_after_pool else [visual.proj]
    pooled = split.pooled(tokens, 1 / len(tokens)).through(*last)
    weights = torch.zeros_like(split.scale[..., 0])
    weights[:, tokens] = split.scale[:, tokens, 0] / len(tokens) * pooled.scale[:, 0]
    return pooled, weights


def natively_attended(visual, split):
    split = by_queries(visual.attn_pool, split).through(visual.ln_post)
    queries = [0] if visual.pool_type == "tok" else list(range(1, split.whole.shape[1]))
    return split.pooled(queries, 1 / len(queries)).through(visual.proj)


@torch.no_grad()
def by_hand(model, images, centred=True):
    """The terms of `decompose`; sources [b, L, H, N, d]; and of every layer's neurons three things.

    These are their terms [b, n, d], the rest [b, d], and the activations.
    """
    stream, attention = watched(model, images)
    heads, mlps, biases, mixed, own, neurons = [], [], [], [], [], []
    for i, block in enumerate(blocks(model)):
        before, after, before_mlp, after_mlp = anatomy(block)
        y = before(stream[i])
        A, v = (attention[i], values_of(block.attn, y)) if attention else native_attention(block.attn, y)
        out = heads_of(A, v).through(*after)
        features = hidden_of(block.mlp, before_mlp(stream[i] + out.whole))
        parts = torch.cat([spread(features[..., None], features.shape[-1]), torch.zeros_like(features)[None]])
        mlp = Split(features, parts).through(*after_mlp)
        assert far(stream[i] + out.whole + mlp.whole, stream[i + 1]) < EXACT
        heads.append(out.parts[:-1])
        mlps.append(mlp.whole)
        biases.append(out.parts[-1])
        mixed.append(A @ v * out.scale[:, None])
        own.append((A[:, :, 0, :1] * v[:, :, 0]) * out.scale[:, :1])
        neurons.append((features * mlp.scale, mlp.parts))
    parts = torch.cat(
        [stream[0][None], torch.stack(mlps), *heads, torch.stack(biases), torch.zeros_like(biases[0])[None]]
    )
    pooled, weights = read_out(model, Split(stream[-1], parts, centred=centred))
    parts, L, (H, N) = pooled.parts[:, :, 0].transpose(0, 1), len(heads), A.shape[1:3]
    pool, stem, mlps, sources, biases, rest = parts.split(
        [parts.shape[1] - 2 - 2 * L - L * H * N, 1, L, L * H * N, L, 1], dim=1
    )
    sources = sources.unflatten(1, (L, H, N))
    hand = SimpleNamespace(
        embedding=pooled.whole[:, 0], stem=stem[:, 0], mlps=mlps, sources=sources, heads=sources.sum(3)
    )
    hand.biases, hand.rest, hand.constant = biases, rest[:, 0], biases.sum(1) + rest[:, 0]
    hand.pool, hand.values, hand.own = pool[:, 0] if pool.shape[1] else None, None, None
    hand.neurons = []
    for activations, parts in neurons:
        parts = (
            read_out(model, Split(stream[-1], torch.cat([parts, torch.zeros_like(parts[:1])])))[0]
            .parts[:, :, 0]
            .transpose(0, 1)
        )
        parts = parts[:, pool.shape[1] :]
        activations = None if weights is None else torch.einsum("bn,bnj->bj", weights, activations)
        hand.neurons.append(
            SimpleNamespace(terms=parts[:, :-2], constant=parts[:, -2], activations=activations)
        )
    if weights is not None:
        hand.values = torch.stack([torch.einsum("bn,bhne->bhe", weights, x) for x in mixed], 1)
        hand.own = torch.stack(own, 1) * weights[:, 0, None, None, None] if not weights[:, 1:].any() else None
    return hand


@cache
def truth_of(family):
    return by_hand(model_of(family), pictures(model_of(family)))


@cache
def terms_of(family):
    return decompose(model_of(family), pictures(model_of(family)))


# Every family, against the long way.


@every_family
def test_the_long_way_ends_at_the_stock_embedding_with_parts_that_sum_to_it(family):
    assert far(truth_of(family).embedding, stock(model_of(family), pictures(model_of(family)))) < EXACT
    hand = truth_of(family)
    total = (
        hand.stem
        + hand.heads.sum((1, 2))
        + hand.mlps.sum(1)
        + hand.constant
        + (0 if hand.pool is None else hand.pool)
    )
    assert far(total, hand.embedding) < EXACT


@every_family
def test_the_terms_sum_to_what_the_stock_tower_returns(family):
    assert far(terms_of(family).embedding, stock(model_of(family), pictures(model_of(family)))) < EXACT
    assert terms_of(family).error() < EXACT


@every_family
@pytest.mark.parametrize("part", ["stem", "heads", "mlps", "constant"])
def test_each_term_is_that_of_the_long_way(family, part):
    ours, truth = getattr(terms_of(family), part), getattr(truth_of(family), part)
    assert off(ours, truth, truth_of(family).embedding) < EXACT


@every_family
def test_no_term_of_the_long_way_is_trivial(family):
    hand = truth_of(family)
    size = hand.embedding.abs().max()
    # Every head, every MLP.
    assert all((x[0] - x[1]).abs().amax(-1).min() > FAR * size for x in (hand.heads, hand.mlps))
    assert all(x.abs().amax(-1).min() > FAR * size for x in (hand.stem, hand.constant))


@every_family
def test_the_mlp_of_the_pooling_is_that_of_the_long_way(family):
    ours, truth = terms_of(family).pool, truth_of(family).pool
    assert (ours is None) == (truth is None)
    assert ours is None or far(ours, truth) < EXACT


@every_family
def test_a_head_is_its_values_through_its_map(family):
    terms = terms_of(family)
    assert (
        far(torch.einsum("blhe,lhed->blhd", terms.values, head_maps(model_of(family))), terms.heads) < EXACT
    )


@every_family
def test_values_and_own_part_of_a_head_are_those_of_the_long_way(family):
    ours, truth = terms_of(family).values, truth_of(family).values
    assert (truth is None) == (family in ATTENDED)
    assert far(ours, terms_of(family).heads if truth is None else truth) < EXACT
    ours, truth = terms_of(family).own, truth_of(family).own
    assert (ours is None) == (truth is None)
    assert ours is None or far(ours, truth) < EXACT


@every_family
def test_source_tokens_and_heatmap_are_those_of_the_long_way(family):
    model = model_of(family)
    texts = sentences(model)
    assert far(token_scores(model, pictures(model), texts), truth_of(family).sources @ texts.T) < EXACT
    sources = truth_of(family).sources.sum((1, 2))
    patches = (sources[:, -6:] @ texts.T).mT.unflatten(2, (2, 3))
    assert far(heatmap(model, pictures(model), texts), patches) < EXACT


@every_family
@pytest.mark.parametrize("layer", [0, -1])
def test_each_neuron_is_that_of_the_long_way(family, layer):
    model, hand = model_of(family), truth_of(family)
    ours, truth = neurons(model, pictures(model), layer), hand.neurons[layer]
    assert off(ours.terms(), truth.terms, hand.mlps) < EXACT
    assert off(ours.constant, truth.constant, hand.mlps) < EXACT
    assert off(ours.total(), hand.mlps[:, layer], hand.mlps) < EXACT
    assert off(ours.term, hand.mlps[:, layer], hand.mlps) < EXACT
    assert ours.error() < EXACT
    assert truth.activations is None or far(ours.activations, truth.activations) < EXACT


@every_family
def test_a_good_model_passes_the_check(family):
    model = model_of(family)
    assert check(model, pictures(model)) < EXACT


# The paper's convention, where a class token is read out behind one norm.

PAPER = [
    "MobileCLIP-B",
    "MobileCLIP2-L",
    "EVA01",
    "EVA02",
    "EVA02-E",
    "registers",
    "norms after",
    "relative positions",
]


@pytest.mark.parametrize("family", PAPER)
def test_the_paper_shares_biases_and_means_evenly(family):
    model = model_of(family)
    ours, hand = (
        decompose(model, pictures(model), convention="paper"),
        by_hand(model, pictures(model), centred=False),
    )
    L, H = hand.heads.shape[1:3]
    share = hand.rest / (2 * L + 1)
    heads = hand.heads + ((hand.biases + share[:, None]) / H)[:, :, None]
    for part, truth in (("stem", hand.stem + share), ("heads", heads), ("mlps", hand.mlps + share[:, None])):
        assert off(getattr(ours, part), truth, hand.embedding) < EXACT
        assert off(getattr(terms_of(family), part), truth, hand.embedding) > FAR
    assert not ours.constant.any()
    assert ours.error() < EXACT


NO_PAPER = [*ATTENDED, "mean, norm first", "mean, norm last", "EVA01 by mean", "EVA02 without last norm"]


@pytest.mark.parametrize("family", NO_PAPER)
def test_the_paper_is_refused_where_it_has_no_meaning(family):
    model = model_of(family)
    with pytest.raises(
        DecompositionError,
        match=r"image tower (VisionTransformer|TimmModel).*\"paper\" is defined for a class token",
    ):
        decompose(model, pictures(model), convention="paper")


# The sums can fail.


@some_families
@pytest.mark.parametrize("part", ["stem", "heads", "mlps", "constant"])
def test_the_error_is_not_small_once_a_term_is_altered(family, part):
    terms = terms_of(family)
    assert replace(terms, **{part: 1.1 * getattr(terms, part)}).error() > FAR


def test_the_error_is_not_small_without_the_mlp_of_the_pooling():
    terms = terms_of("SigLIP")
    assert replace(terms, pool=None).error() > FAR


@some_families
def test_one_source_less_does_not_sum_to_the_heads(family):
    model = model_of(family)
    texts = sentences(model)
    scores = token_scores(model, pictures(model), texts)
    assert far(scores.sum(3), terms_of(family).heads @ texts.T) < EXACT
    assert far(scores[:, :, :, 1:].sum(3), terms_of(family).heads @ texts.T) > FAR


@pytest.mark.parametrize("family", ["registers", "registers, mean", "PE-Core", "SigLIP with registers"])
def test_class_token_and_registers_are_left_out_of_the_heatmap(family):
    model = model_of(family)
    texts = sentences(model)
    scores, total = (
        token_scores(model, pictures(model), texts).sum((1, 2)),
        heatmap(model, pictures(model), texts).sum((2, 3)),
    )
    prefix = scores.shape[1] - 6
    assert prefix == model.visual.trunk.num_prefix_tokens > 0
    assert far(total, scores[:, prefix:].sum(1)) < EXACT
    assert far(total, scores.sum(1)) > FAR


@pytest.mark.parametrize("family", [*FEW, "EVA02-E"])
@pytest.mark.parametrize("index", [0, 1])
def test_the_block_whose_attention_is_altered_is_named(family, index):
    model = copy.deepcopy(model_of(family))
    blocks(model)[index].attn.register_forward_hook(altered)
    with pytest.raises(
        DecompositionError,
        match=f"largest gap in block {index}: its heads differ from what its attention wrote",
    ):
        check(model, pictures(model))


def altered(module, args, output):
    whole = output if torch.is_tensor(output) else output[0]
    whole = whole + whole.flip(-1)
    return whole if torch.is_tensor(output) else (whole, None)


@some_families
def test_an_embedding_altered_after_the_last_block_is_blamed_on_no_block(family):
    model = copy.deepcopy(model_of(family))
    model.visual.register_forward_hook(lambda m, args, output: output + 1)
    with pytest.raises(
        DecompositionError, match="every block adds up, so the difference arises in the read-out"
    ):
        check(model, pictures(model))


# Many tokens, other sizes.

MANY = {
    "mean, norm first": partial(native, layers=1, pool_type="avg", patch_size=1, image_size=(9, 15)),
    "queries": partial(
        native, layers=1, attentional_pool=True, attn_pooler_heads=2, patch_size=1, image_size=(9, 15)
    ),
    "relative positions by mean": partial(
        of_timm, "vit_relpos_medium_patch16_224", "avg", size=(18, 30), patch_size=2, depth=1
    ),
}


@pytest.mark.parametrize("tower", MANY)
def test_each_source_token_is_that_of_the_long_way_where_there_are_many(tower):
    model = MANY[tower]()
    images, texts = pictures(model, 1), sentences(model)
    scores = token_scores(model, images, texts)
    assert scores.shape[3] >= 135
    assert far(scores, by_hand(model, images).sources @ texts.T) < EXACT


def test_the_sources_sum_to_the_heads_where_registers_are_more_than_a_head_is_wide():
    model = VIT("avg", reg_tokens=20)  # heads of 16
    images, texts = pictures(model), sentences(model)
    assert far(token_scores(model, images, texts).sum(3), decompose(model, images).heads @ texts.T) < EXACT


DYNAMIC = {
    "SigLIP": partial(SIGLIP, dynamic_img_size=True),
    "PE-Core": partial(PE, dynamic_img_size=True),
    "EVA02": partial(EVA, "token", dynamic_img_size=True),
    "registers, mean": partial(VIT, "avg", reg_tokens=2, dynamic_img_size=True),
}
every_size = pytest.mark.parametrize(
    ("size", "grid"), [((48, 32), (3, 2)), ((32, 64), (2, 4)), ((16, 80), (1, 5))], ids=str
)


@every_size
@pytest.mark.parametrize("tower", DYNAMIC)
def test_a_heatmap_has_the_grid_of_the_image(tower, size, grid):
    model = DYNAMIC[tower]()
    images, texts = pictures(model, size=size), sentences(model)
    hand = by_hand(model, images)
    patches = hand.sources[:, :, :, -grid[0] * grid[1] :].sum((1, 2)) @ texts.T
    assert decompose(model, images).error() < EXACT
    assert far(heatmap(model, images, texts), patches.mT.unflatten(2, grid)) < EXACT


def test_a_padded_image_has_a_patch_for_its_rest():
    model = SIGLIP(dynamic_img_size=True, dynamic_img_pad=True)
    images, texts = pictures(model, size=(40, 50)), sentences(model)
    assert heatmap(model, images, texts).shape == (2, 5, 3, 4)
    assert decompose(model, images).error() < EXACT


def test_an_image_of_another_size_is_left_to_the_tower():
    model = SIGLIP()
    with pytest.raises(AssertionError):
        decompose(model, pictures(model, size=(48, 32)))


# Whatever the images and texts.


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(FEW), st.integers(1, 3), st.integers(0, 1000), st.integers(1, 4))
def test_the_sources_sum_to_the_heads_and_all_terms_to_the_embedding(family, batch, seed, count):
    model = model_of(family)
    images, texts = pictures(model, batch, seed), sentences(model, count, seed)
    terms = decompose(model, images)
    assert terms.error() < EXACT
    assert far(token_scores(model, images, texts).sum(3), terms.heads @ texts.T) < EXACT
    assert heatmap(model, images, texts).shape == (batch, count, 2, 3)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([(2, 32), (3, 48), (4, 64)]),
    st.integers(1, 3),
    st.fixed_dictionaries(
        {
            "qk_norm": st.booleans(),
            "scale_attn_norm": st.booleans(),
            "scale_mlp_norm": st.booleans(),
            "class_token": st.booleans(),
            "proj_bias": st.booleans(),
            "qkv_bias": st.booleans(),
        },
        optional={
            "init_values": st.floats(0.1, 1),
            "pre_norm": st.booleans(),
            "reg_tokens": st.integers(1, 3),
        },
    ),
    st.sampled_from(["avg", "map"]),
)
def test_each_term_is_that_of_the_long_way_whatever_the_options(shape, depth, options, pool):
    heads, width = shape
    model = of_timm(
        "vit_base_patch16_224", pool, num_heads=heads, embed_dim=width, depth=depth, mlp_ratio=1.5, **options
    )
    ours, hand = decompose(model, pictures(model)), by_hand(model, pictures(model))
    assert ours.error() < EXACT
    assert all(
        off(getattr(ours, part), getattr(hand, part), hand.embedding) < EXACT
        for part in ("stem", "heads", "mlps", "constant")
    )
    assert neurons(model, pictures(model), -1).error() < EXACT


@some_families
def test_a_batch_gives_what_single_images_give(family):
    model = model_of(family)
    texts = sentences(model)
    for part in ("embedding", "stem", "heads", "mlps", "constant", "values"):
        singles = torch.cat([getattr(decompose(model, image[None]), part) for image in pictures(model)])
        assert off(getattr(terms_of(family), part), singles, truth_of(family).embedding) < EXACT
    singles = torch.cat([token_scores(model, image[None], texts) for image in pictures(model)])
    assert far(token_scores(model, pictures(model), texts), singles) < EXACT
    singles = torch.cat([neurons(model, image[None], 0).activations for image in pictures(model)])
    assert far(neurons(model, pictures(model), 0).activations, singles) < EXACT
    assert far(terms_of(family).heads[0], terms_of(family).heads[1]) > FAR


@pytest.mark.parametrize("family", ["SigLIP", "PE-Core", "mean, norm first"])
def test_layers_come_in_the_order_wanted(family):
    model = model_of(family)
    texts = sentences(model)
    every, some = (token_scores(model, pictures(model), texts, layers) for layers in (None, [-1, 0]))
    assert torch.equal(some, every[:, [-1, 0]])
    assert far(some, every[:, [0, -1]]) > FAR


# What other releases and other models have.


@pytest.mark.parametrize("family", ["mean, norm first", "mean, norm last", "queries, mean"])
def test_tokens_on_the_first_axis_give_the_same_terms(family):
    model = copy.deepcopy(model_of(family))
    turned = Transformer(32, 3, 4, mlp_ratio=2.0, batch_first=False).double()
    turned.load_state_dict(model.visual.transformer.state_dict())
    model.visual.transformer = turned
    texts = sentences(model)
    assert far(decompose(model, pictures(model)).heads, terms_of(family).heads) < EXACT
    assert far(decompose(model, pictures(model)).mlps, terms_of(family).mlps) < EXACT
    assert far(token_scores(model, pictures(model), texts), truth_of(family).sources @ texts.T) < EXACT


def test_a_model_that_normalises_unless_told_otherwise_is_not_normalised():
    model = model_of("CoCa")
    with torch.no_grad():
        assert (
            far(model.encode_image(pictures(model)), F.normalize(terms_of("CoCa").embedding, dim=-1)) < EXACT
        )
    assert far(F.normalize(terms_of("CoCa").embedding, dim=-1), terms_of("CoCa").embedding) > FAR


class Plain(nn.Module):
    """A model whose encode_image takes images alone."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual

    def encode_image(self, images):
        return self.visual(images)


def test_a_model_that_cannot_be_told_to_normalise_is_decomposed():
    model = Plain(model_of("SigLIP").visual)
    assert far(decompose(model, pictures(model)).heads, terms_of("SigLIP").heads) < EXACT


# Permuted heads.


@torch.no_grad()
def permuted(model, order):
    """With the heads of every block in another order."""
    model = copy.deepcopy(model)
    for block in blocks(model):
        attn, e = block.attn, 48 // len(order)
        for p in (attn.qkv.weight, attn.qkv.bias):
            p.copy_(p.unflatten(0, (3, len(order), e))[:, order].flatten(0, 2))
        attn.proj.weight.copy_(attn.proj.weight.unflatten(1, (-1, e))[:, order].flatten(1))
    return model


@pytest.mark.parametrize("family", ["SigLIP", "PE-Core", "registers, mean"])
def test_permuting_the_heads_permutes_their_terms(family):
    model, order = model_of(family), [2, 0, 1]
    after, before = decompose(permuted(model, order), pictures(model)).heads, terms_of(family).heads
    assert far(after, before[:, :, order]) < EXACT
    assert far(after, before) > FAR


# The model is left as found.

CALLS = {
    "decompose": lambda model, images, texts: decompose(model, images).heads,
    "token_scores": token_scores,
    "heatmap": heatmap,
    "neurons": lambda model, images, texts: neurons(model, images, 0).terms(),
    "check": lambda model, images, texts: torch.tensor(check(model, images)),
    "head_maps": lambda model, images, texts: head_maps(model),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def found(model):
    """All that a call might leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {name: (m.training, *(list(getattr(m, h)) for h in hooks)) for name, m in model.named_modules()}
    parameters = {
        name: (p.requires_grad, p.dtype, p.sum().item(), p.grad is None)
        for name, p in model.named_parameters()
    }
    buffers = {name: b.sum().item() for name, b in model.named_buffers()}
    return (
        modules,
        parameters,
        buffers,
        F.scaled_dot_product_attention,
        torch.backends.mha.get_fastpath_enabled(),
    )


def half_trained(family):
    """A model with modes mixed, and a hook of the user's."""
    model = copy.deepcopy(model_of(family)).train()
    blocks(model)[1].eval()
    blocks(model)[0].register_forward_hook(lambda module, args, output: None)
    return model


@pytest.fixture(params=[True, False], ids=["fast path", "slow path"])
def fast_path(request):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.usefixtures("fast_path")
@some_families
@every_call
def test_the_model_is_left_as_found(family, call):
    model = half_trained(family)
    before = found(model)
    call(model, pictures(model), sentences(model_of(family)))
    assert found(model) == before


@pytest.mark.slow
@pytest.mark.usefixtures("fast_path")
@some_families
@pytest.mark.parametrize("name", ["decompose", "token_scores", "heatmap", "neurons", "check"])
@pytest.mark.parametrize("where", ["block", "tower"])
def test_the_model_is_left_as_found_when_its_forward_raises(family, name, where):
    model = half_trained(family)

    def fail(module, args, output):
        assert found(model) != before  # watched
        raise RuntimeError("out of memory")

    (blocks(model)[1] if where == "block" else model.visual).register_forward_hook(fail)
    before = found(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        CALLS[name](model, pictures(model), sentences(model_of(family)))
    assert found(model) == before


def test_the_model_is_left_as_found_when_it_is_refused_in_the_middle():
    model = half_trained("SigLIP")
    blocks(model)[1].attn.fused_attn = False
    before = found(model)
    with pytest.raises(DecompositionError, match=r"block 1 called F\.scaled_dot_product_attention 0 times"):
        decompose(model, pictures(model))
    assert found(model) == before


@pytest.mark.parametrize(
    "family", ["EVA02", "mean, norm last", "mean, norm first", "SigLIP", "queries, mean"]
)
@pytest.mark.parametrize("name", ["decompose", "token_scores", "heatmap", "neurons", "check"])
def test_every_tower_runs_once_in_eval_mode_without_gradients(family, name):
    model, modes, whole = copy.deepcopy(model_of(family)).train(), [], []
    texts = sentences(model_of(family))
    blocks(model)[-1].register_forward_hook(
        lambda m, args, output: modes.append((m.training, torch.is_grad_enabled()))
    )
    model.visual.register_forward_hook(lambda *_: whole.append(1))
    CALLS[name](model, pictures(model), texts)
    assert modes == [(False, False)]
    assert whole == [1]


# Large batches.


@pytest.mark.parametrize("family", ["mean, norm first", "queries, mean", "SigLIP", "PE-Core"])
def test_a_large_batch_is_split_and_gives_the_same(family, monkeypatch):
    model, batches = model_of(family), []
    images, texts = pictures(model, batch=5), sentences(model)
    expected = decompose(model, images), token_scores(model, images, texts), heatmap(model, images, texts)
    handle = blocks(model)[0].register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
    monkeypatch.setattr(towers, "KEPT_BYTES", 1)
    try:
        terms = decompose(model, images)
        assert batches == [1] * 5
        scores, heat = token_scores(model, images, texts), heatmap(model, images, texts)
    finally:
        handle.remove()
    assert terms.error() < EXACT
    for name in ("embedding", "stem", "heads", "mlps", "constant", "values"):
        assert far(getattr(terms, name), getattr(expected[0], name)) < EXACT
    assert far(scores, expected[1]) < EXACT
    assert far(heat, expected[2]) < EXACT


def test_parts_of_a_batch_keep_no_more_than_what_is_allowed(monkeypatch):
    model, kept = model_of("SigLIP"), []
    mix = readouts.VirtualTokens.mix

    def recorded(self, x):  # what is kept of a part is weighed at the end
        kept.append(len(self.weights))
        return mix(self, x)

    monkeypatch.setattr(readouts.VirtualTokens, "mix", recorded)
    decompose(model, pictures(model, batch=4))
    assert set(kept) == {4}
    tower = families.open_family(model)
    (heads, e, width), tokens = tower.W_O[0].shape, 6
    monkeypatch.setattr(towers, "KEPT_BYTES", 2 * len(tower.W_O) * tokens * (heads * e + width) * 8)
    kept.clear()
    decompose(model, pictures(model, batch=4))
    assert set(kept) == {2}
    kept.clear()
    decompose(model, pictures(model, batch=5))
    assert set(kept) == {1, 2}


@pytest.mark.parametrize("call", [token_scores, heatmap])
def test_parts_of_a_batch_keep_queries_keys_and_values_of_no_more_tokens_than_is_allowed(call, monkeypatch):
    model, batches = copy.deepcopy(model_of("SigLIP")), []
    images, texts, layers = pictures(model, batch=5), sentences(model), len(blocks(model))
    blocks(model)[0].register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
    an_image = layers * 6 * 3 * 48 * 8  # six tokens, three vectors of 48 numbers of each, in float64
    for allowed, parts in ((5, [5]), (4.99, [3, 2]), (2, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(towers, "KEPT_BYTES", allowed * an_image)
        call(model, images, texts)
        assert batches == parts
        batches.clear()


@some_families
def test_gradient_checkpointing_changes_nothing(family):
    model = copy.deepcopy(model_of(family))
    model.visual.set_grad_checkpointing()
    assert far(decompose(model.train(), pictures(model)).heads, terms_of(family).heads) < EXACT


def test_a_model_in_training_is_decomposed_as_in_evaluation():
    model = VIT(
        "avg", reg_tokens=2, drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, patch_drop_rate=0.5
    )
    expected = decompose(model, pictures(model)).heads
    assert far(decompose(model.train(), pictures(model)).heads, expected) < EXACT
    assert far(model.encode_image(pictures(model)), model.eval().encode_image(pictures(model))) > FAR


@pytest.mark.parametrize("family", ["SigLIP", "mean, norm first"])
@every_call
def test_nothing_carries_gradients(family, call):
    model = copy.deepcopy(model_of(family))
    model.requires_grad_(True)
    assert not call(model, pictures(model).requires_grad_(), sentences(model).requires_grad_()).requires_grad


# Threads.


def in_threads(*calls):
    """Their results, all called at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize(
    "families", [("SigLIP", "queries, mean"), ("EVA02", "PE-Core"), ("SigLIP", "SigLIP")], ids=str
)
def test_two_threads_decomposing_give_what_one_gives(families):
    def repeat(family):
        return [decompose(model_of(family), pictures(model_of(family))) for _ in range(8)]

    expected, stock_attention = [terms_of(family) for family in families], F.scaled_dot_product_attention
    for many, terms in zip(
        in_threads(*[partial(repeat, family) for family in families]), expected, strict=True
    ):
        assert all(far(ours.heads, terms.heads) < EXACT and ours.error() < EXACT for ours in many)
    assert F.scaled_dot_product_attention is stock_attention


@pytest.mark.parametrize("same", [False, True], ids=["another model", "the same model"])
@pytest.mark.parametrize("family", ["SigLIP", "queries, mean", "EVA02"])
def test_another_thread_may_run_a_model_while_one_is_decomposed(family, same):
    model = copy.deepcopy(model_of(family))
    other = model if same else model_of("registers" if family == "SigLIP" else "SigLIP")
    expected, results, stock_attention = stock(other, pictures(other)), [], F.scaled_dot_product_attention

    def in_the_middle(module, args, output):
        if threading.current_thread() is threading.main_thread():
            assert F.scaled_dot_product_attention is not stock_attention  # the decomposition is under way
            results.extend(in_threads(lambda: stock(other, pictures(other, seed=1))))

    blocks(model)[0].attn.register_forward_hook(in_the_middle)
    terms = decompose(model, pictures(model))
    assert results
    assert all(far(result, expected) < EXACT for result in results)
    assert far(terms.heads, terms_of(family).heads) < EXACT
    assert terms.error() < EXACT


# Precision.


@every_family
def test_the_terms_of_a_float32_model_sum_to_the_embedding(family):
    model = copy.deepcopy(model_of(family)).float()
    terms = decompose(model, pictures(model))
    assert terms.error() < SINGLE
    assert {x.dtype for x in vars(terms).values() if x is not None} == {torch.float32}
    assert far(terms.heads.double(), terms_of(family).heads) < 10 * SINGLE


# The attention of one class token is worked out in float32; of many tokens, the heads take the forward pass's
# own rounded results.
SOURCES = {family: SINGLE if family == "EVA02" else HALF for family in FEW}


@some_families
def test_the_terms_of_a_bfloat16_model_sum_to_the_embedding(family):
    model = copy.deepcopy(model_of(family)).bfloat16()
    images, texts = pictures(model), sentences(model)
    terms = decompose(model, images)
    assert 0 < terms.error() < HALF
    assert terms.heads.dtype == torch.float32
    assert terms.embedding.dtype == torch.bfloat16
    assert far(token_scores(model, images, texts).sum(3), terms.heads @ texts.float().T) < SOURCES[family]
    assert neurons(model, images, -1).error() < HALF


@some_families
def test_autocast_costs_no_more_than_the_forward_pass_rounds(family):
    model = copy.deepcopy(model_of(family)).float()
    images, texts = pictures(model), sentences(model)
    with torch.autocast("cpu", torch.bfloat16):
        terms, scores, maps = decompose(model, images), token_scores(model, images, texts), head_maps(model)
        total = neurons(model, images, 0)
    assert terms.error() < HALF
    assert total.error() < HALF
    assert far(scores.sum(3), terms.heads @ texts.T) < SOURCES[family]
    assert far(torch.einsum("blhe,lhed->blhd", terms.values, maps), terms.heads) < SINGLE


# Refusals.


def with_tower(name, pool="", proj="linear"):
    """A model whose tower has no weights: it is to be refused by its build."""
    model = native()
    with torch.device("meta"):
        model.visual = TimmModel(name, 24, pool=pool, proj=proj)
    return model


def refused(reason, model, calls=CALLS):
    images, texts = torch.zeros(2, 3, 32, 48).double(), torch.zeros(5, 24).double()
    for name in calls:
        with pytest.raises(DecompositionError, match=reason) as raised:
            CALLS[name](model, images, texts)
        assert str(raised.value).startswith("cannot decompose CLIP with image tower ")
        assert "\n" not in str(raised.value)


def with_pool(**options):
    model = SIGLIP()
    model.visual.trunk.attn_pool = AttentionPoolLatent(48, num_heads=4, **options).double()
    return model


def with_attention_of_timm():
    model = native()
    model.visual.transformer.resblocks[1].attn = Attention(32, 4).double()
    return model


def with_projection(**projection):
    """Of the second block's attention: another, or none."""
    model = VIT("token")
    del blocks(model)[1].attn.proj
    vars(blocks(model)[1].attn).update(projection)
    return model


def with_rms_norm(place):
    model = VIT("token", block_fn=ResPostBlock)
    module = model.visual.trunk if place == "norm" else blocks(model)[1]
    setattr(module.attn if place == "attn.norm" else module, place.split(".")[-1], RmsNorm(48).double())
    return model


def gated():
    model = EVA("token")
    for block in blocks(model):
        block.attn.gate = nn.Linear(48, 48).double()
    return model


QUERIES = partial(native, embed=32, attn_pooler_queries=3, attn_pooler_heads=2)
BOTH_NORMS = {"use_fc_norm": True, "use_post_transformer_norm": True}
CONVOLUTIONS = "has convolutions, not a residual stream of attention heads"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", f"ResNet.: a ResNet {CONVOLUTIONS}"),
        ("convnext_atto", f"ConvNeXt.: a ConvNeXt {CONVOLUTIONS}"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer.: a Swin merges tokens between stages"),
        ("fastvit_mci0", "FastVit.: a FastViT mixes tokens by convolutions"),
        ("resnetv2_50", "ResNetV2.: it has no residual stream of attention heads"),
        ("xcit_nano_12_p16_224", "Xcit.: its blocks are XCABlock; expected one of Block"),
        ("aimv2_large_patch14_224", "VisionTransformer.: has RmsNorm as norm; expected LayerNorm"),
    ],
)
def test_a_tower_of_another_kind_is_refused(name, reason):
    refused(f"TimmModel .{reason}", with_tower(name))


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("efficientnet_b0", "EfficientNet"),
        ("mobilenetv3_small_050", "MobileNetV3"),
        ("mixer_s32_224", "MlpMixer"),
        ("convit_tiny", "ConVit"),
        ("tnt_s_patch16_224", "TNT"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),  # reads out two tokens
    ],
)
def test_a_tower_that_resembles_a_vit_is_refused(name, tower):
    refused(f"image tower TimmModel .{tower}.: ", with_tower(name))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: with_tower("test_vit", "avg", "mlp"),
            "TimmModel .VisionTransformer.: its projection has a Mlp; expected linear maps alone",
        ),
        (partial(VIT, "avgmax"), "it reads out by pooling 'avgmax'; expected 'token', 'avg' or 'map'"),
        (partial(VIT, "max"), "it reads out by pooling 'max'; expected 'token', 'avg' or 'map'"),
        (partial(VIT, "prr"), "pooling is AttentionPoolPrr of another kind; expected AttentionPoolLatent"),
        (partial(with_pool, feat_size=6, pos_embed="abs"), "pooling is AttentionPoolLatent of another kind"),
        (partial(with_pool, latent_len=2, pool_type=""), "pooling is AttentionPoolLatent of another kind"),
        (partial(QUERIES, attentional_pool="parallel"), "it pools by two attentions .attn_pool_contrastive."),
        (partial(QUERIES, attentional_pool="cascade"), "it pools by two attentions .attn_pool_contrastive."),
        (partial(EVA, "token", **BOTH_NORMS), "it has norms both before and after its pooling"),
        (partial(EVA, "avg", **BOTH_NORMS), "it has norms both before and after its pooling"),
        (
            partial(native, pool_type="none"),
            "VisionTransformer: it reads out by pooling 'none'; expected 'tok' or 'avg'",
        ),
        (gated, "attention EvaAttention is gated: what a head writes is no linear map of its values"),
        (with_attention_of_timm, "attention Attention has no in_proj_weight and out_proj"),
        (
            partial(VIT, "token", block_fn=ParallelScalingBlock),
            "blocks are ParallelScalingBlock; expected one of Block, RelPosBlock",
        ),
        (
            partial(VIT, "token", block_fn=ParallelThingsBlock),
            "blocks are ParallelThingsBlock; expected one of Block, RelPosBlock",
        ),
        (partial(with_projection, proj=nn.Identity()), "attention Attention has no linear proj"),
        (with_projection, "attention Attention has no linear proj"),
        (partial(with_rms_norm, "norm"), "has RmsNorm as norm; expected LayerNorm"),
        (partial(with_rms_norm, "attn.norm"), "has RmsNorm as norm; expected LayerNorm"),
        (partial(with_rms_norm, "norm1"), "has RmsNorm as norm1; expected LayerNorm"),
    ],
)
def test_what_is_not_linear_or_of_another_kind_is_refused(build, reason):
    refused(reason, build())


def test_gated_attention_is_not_a_sum_of_heads():
    model = gated()
    assert far(stock(model, pictures(model)), stock(EVA("token"), pictures(model))) > FAR


def test_a_norm_of_another_kind_on_the_way_in_is_not_refused():
    model = VIT("token")
    blocks(model)[1].norm1 = RmsNorm(48).double()
    assert decompose(model, pictures(model)).error() < EXACT


FORWARD = ["decompose", "token_scores", "heatmap", "neurons", "check"]


def test_attention_that_goes_another_way_is_refused():
    model = PROJECTED()
    for module in model.visual.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # as TIMM_FUSED_ATTN=0 does
    reason = (
        r"block 0 called F.scaled_dot_product_attention 0 times, expected once \(is TIMM_FUSED_ATTN=0 set\?\)"
    )
    refused(reason, model, FORWARD)


def test_attention_in_two_calls_is_refused():
    refused(
        "block 0 called F.scaled_dot_product_attention 2 times, expected once$",
        VIT("token", attn_layer="diff"),
        FORWARD,
    )


class Sink(Attention):
    """Attention that may also go to a token of its own."""

    def forward(self, x, **more):
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, *(F.pad(t, (0, 0, 1, 0)) for t in (k, v)))
        return self.proj(out.transpose(1, 2).flatten(2))


def test_attention_to_a_token_that_is_not_in_the_image_is_refused():
    refused("block 0 attends to tokens that are not in the image", VIT("token", attn_layer=Sink), FORWARD)


def test_pooling_attention_that_goes_another_way_is_refused():
    model = PROJECTED()
    model.visual.trunk.attn_pool.fused_attn = False
    refused("scaled_dot_product_attention", model, FORWARD)


def test_an_mlp_of_another_kind_or_norm_has_no_neurons_but_a_term():
    model = SIGLIP()
    blocks(model)[1].mlp = nn.Sequential(nn.Linear(48, 48), nn.GELU()).double()
    assert decompose(model, pictures(model)).error() < EXACT
    assert neurons(model, pictures(model), 0).error() < EXACT
    with pytest.raises(
        DecompositionError,
        match="the MLP of block 1 is Sequential; expected fc2 or w2 as its last linear map",
    ):
        neurons(model, pictures(model), -1)
    blocks(model)[0].mlp.norm = RmsNorm(192).double()
    assert decompose(model, pictures(model)).error() < EXACT
    with pytest.raises(
        DecompositionError, match="the MLP of block 0 has RmsNorm as norm; expected LayerNorm"
    ):
        neurons(model, pictures(model), 0)


# Masks of attention.


def test_a_mask_that_forbids_is_one_that_adds_minus_infinity():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    allowed = torch.rand(6, 6, generator=generator) > 0.3
    allowed.fill_diagonal_(True)
    for mask in (
        allowed,
        torch.zeros(6, 6, dtype=torch.float64).masked_fill(~allowed, float("-inf")),
        allowed[:1],
        None,
    ):
        with attention_calls() as calls:
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=0.7)
        assert far(calls[0].attention(slice(None)) @ v, out) < EXACT
        assert far(calls[0].attention(slice(2, 4)) @ v, out[:, :, 2:4]) < EXACT
    assert far(calls[0].attention(slice(None)), (q @ k.mT * 0.7).softmax(-1)) < EXACT


def test_causal_attention_and_dropout_of_another_thread_pass_by_as_they_are():
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with attention_calls() as calls:
        causal, dropped = in_threads(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=1.0),
        )
    assert torch.equal(causal, expected)
    assert not dropped.any()
    assert not calls


def test_queries_that_share_keys_and_values_are_attended_to_as_they_are():
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    with attention_calls():
        shared = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    assert torch.equal(shared, expected)


def test_causal_attention_is_refused():
    x = torch.randn(1, 1, 3, 4)
    with attention_calls(), pytest.raises(NotImplementedError, match="causal"):
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
