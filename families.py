"""open_clip's other vision transformers for decompose.py: SigLIP, EVA, CoCa, CLIPA, ViTamin, MobileCLIP, PE.

They differ from CLIP's class-token ViT in three places. Each becomes linear once norms and all attention are
held fixed at their values from this forward pass:

* The way from heads (or neurons) to the residual stream: perhaps a norm, a linear map, perhaps a norm,
  perhaps LayerScale. See blocks.py.
* What queries and keys are made of: norms, rotary or relative positions. All these towers end in
  F.scaled_dot_product_attention, where attention.py intercepts them.
* The read-out: a class token, a mean of tokens, or attention pooling. See readouts.py.

This file says which of these a model has; towers.py runs it. To add a kind of model, write a function like
`timm_tower` (a Block for each block, a TokenReadOut or an AttentionPooling, then family_of), and call it from
`open_family`. This file needs torch, and decompose.py, attention.py, blocks.py, readouts.py and towers.py
beside it. MIT licence, (c) 2026 The TextSpan reference authors.
"""

from __future__ import annotations

import torch
from torch import nn

try:
    from . import decompose as core
    from .blocks import child, native_block, require, timm_block
    from .readouts import AttentionPooling, TokenReadOut
    from .towers import Family, family_of, refused
except ImportError:  # not in a package
    import decompose as core
    from blocks import child, native_block, require, timm_block
    from readouts import AttentionPooling, TokenReadOut
    from towers import Family, family_of, refused

ClipTower = core.ClipTower

REFUSED = {
    "ModifiedResNet": "a ResNet has convolutions, not a residual stream of attention heads",
    "ResNet": "a ResNet has convolutions, not a residual stream of attention heads",
    "ConvNeXt": "a ConvNeXt has convolutions, not a residual stream of attention heads",
    "FastVit": "a FastViT mixes tokens by convolutions in most stages, which share no residual stream",
    "SwinTransformer": "a Swin merges tokens between stages, which do not share one residual stream",
}


def open_family(model: nn.Module, convention: str = "term") -> ClipTower:
    """The model's tower; or a DecompositionError that names it and what it lacks."""
    if hasattr(model, "vision_model"):  # of transformers
        image_side = core.beside("huggingface", "ImageSide")
        lacking = f"cannot decompose {type(model).__name__}: put huggingface.py beside families.py"
        require(image_side is not None, lacking)
        model = image_side(model)
    visual = getattr(model, "visual", None)
    with refused(model):
        scripted = isinstance(model, torch.jit.ScriptModule)
        require(not scripted, "scripted models cannot be watched; load it without jit")
        if visual is None:
            require(not hasattr(model, "module"), "it is a wrapper; give the model inside, its .module")
            tower = hasattr(model, "ln_post") or hasattr(model, "trunk")
            require(not tower, "it is an image tower; give the whole model, not its .visual")
            tower = hasattr(model, "post_layernorm")
            require(not tower, "it is an image tower; give the whole model, CLIPModel or SiglipModel say")
            require(False, "it has no attribute `visual`; expected an open_clip model")
        for name, part in visual.named_modules(prefix="visual"):
            wrapper = f"its {name} is a wrapper, {type(part).__name__}; put its .module in its place"
            require(not hasattr(part, "module"), wrapper)
            compiled = hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
            hint = "hooks do not run in it; decompose it before torch.compile"
            require(not compiled, f"its {name} is compiled, and {hint}")
        kind = type(getattr(visual, "trunk", visual)).__name__
        require(kind not in REFUSED, REFUSED.get(kind, ""))
        if ClipTower.fits(model) and is_plain(visual):
            return ClipTower(model)
        tower = timm_tower if hasattr(visual, "trunk") else getattr(type(model), "tower", native_tower)
        family = tower(model)
        one_norm = type(family) is Family and family.readout.norm is not None
        where = "for a class token that is read out behind one norm"
        require(convention != "paper" or one_norm, f'convention="paper" is defined {where}; use "term"')
    return family


def is_plain(visual: nn.Module) -> bool:
    """Does it have the weights that ClipTower takes for granted, and no others but LayerScale's?"""
    weights = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    for block in visual.transformer.resblocks:
        parts = {name for name, part in block.named_children() if not isinstance(part, nn.Identity)}
        known = parts - {"ls_1", "ls_2"} == {"ln_1", "attn", "ln_2", "mlp"} and len(parts) in (4, 6)
        attention = {name for name, _ in block.attn.named_parameters()}
        if not known or attention != weights or block.attn.add_zero_attn:
            return False
        if hasattr(block, "ls_1") != hasattr(block, "ls_2"):
            return False
    norm = getattr(visual, "ln_post", None)
    return isinstance(norm, nn.LayerNorm) and len(list(norm.parameters())) == 2 and visual.proj is not None


def native_tower(model: nn.Module) -> Family:
    """open_clip's VisionTransformer: class token or mean, norm before or after; CoCa's attention pooling."""
    visual, two_pools = model.visual, getattr(model.visual, "attn_pool_contrastive", None) is not None
    known = hasattr(getattr(visual, "transformer", None), "resblocks") and hasattr(visual, "ln_post")
    require(known, "it has no residual stream of attention heads (transformer.resblocks and ln_post)")
    ln_post, averages = child(visual, "ln_post"), getattr(visual, "global_average_pool", False)
    require(ln_post is not None, "has Identity as ln_post; expected LayerNorm")
    require(not averages, "it averages its tokens as older releases of open_clip did (global_average_pool)")
    unused = "as no configuration of open_clip does"
    require(not two_pools, f"it pools by two attentions (attn_pool_contrastive), {unused}")
    pool, pooler = getattr(visual, "pool_type", "tok"), getattr(visual, "attn_pool", None)
    require(pool in ("tok", "avg"), f"it reads out by pooling {pool!r}; expected 'tok' or 'avg'")
    name, targets = ("class token", slice(0, 1)) if pool == "tok" else ("mean of patches", slice(1, None))
    maps = [] if visual.proj is None else [(visual.proj, None)]
    like = next(visual.parameters()).new_empty(ln_post.normalized_shape)
    # Behind a pooler, ln_post norms each of its queries, before a mean of them.
    norm_first = pooler is not None or not getattr(visual, "final_ln_after_pool", False)
    readout = TokenReadOut(name, targets, ln_post, norm_first, maps, like)
    if pooler is not None:  # latents attend to the normed tokens, and are read out as tokens would be
        attn, before = pooler.attn, child(pooler, "ln_k")
        weight = attn.v_proj_weight if attn.in_proj_weight is None else attn.in_proj_weight.chunk(3)[2]
        value = weight, None if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)[2]
        name, targets, heads = "attention pooling", slice(None), attn.num_heads
        readout = AttentionPooling(name, targets, before, heads, value, attn.out_proj, readout)
    return family_of(model, [native_block(block) for block in visual.transformer.resblocks], readout, 1)


def timm_tower(model: nn.Module) -> Family:
    """A vision transformer of timm behind open_clip's TimmModel."""
    trunk = model.visual.trunk
    known = hasattr(trunk, "blocks") and hasattr(trunk, "global_pool")
    require(known, "it has no residual stream of attention heads (blocks)")
    for name in ("patch_embed", "head", "num_prefix_tokens"):
        require(hasattr(trunk, name), f"it has no {name}")
    require(not hasattr(trunk, "head_dist"), "it reads out two tokens (head_dist)")
    skipped = (nn.Identity, nn.Dropout)
    layers = [layer for layer in (trunk.head, *model.visual.head) if not isinstance(layer, skipped)]
    others = [type(layer).__name__ for layer in layers if not isinstance(layer, nn.Linear)]
    require(not others, f"its projection has a {', '.join(others)}; expected linear maps alone")
    maps = [(layer.weight.T, layer.bias) for layer in layers]
    like = next(trunk.parameters()).new_empty(trunk.embed_dim)
    before, after, prefix = child(trunk, "norm"), child(trunk, "fc_norm"), trunk.num_prefix_tokens
    patches = slice(0 if getattr(trunk, "pool_include_prefix", False) else prefix, None)
    pool, pooler = trunk.global_pool, getattr(trunk, "attn_pool", None)
    if pooler is not None:
        kind = type(pooler).__name__
        known = kind == "AttentionPoolLatent" and pooler.pos_embed is None and pooler.pool in ("token", "avg")
        require(known, f"its pooling is {kind} of another kind; expected AttentionPoolLatent")
        queries = slice(0, 1) if pooler.pool == "token" else slice(None)
        then = TokenReadOut("", queries, after, False, maps, like)
        value = pooler.kv.weight.chunk(2)[1], None if pooler.kv.bias is None else pooler.kv.bias.chunk(2)[1]
        # EVA's pooling takes every token, ViT's leaves the prefix out.
        targets = patches if hasattr(trunk, "pool_include_prefix") else slice(None)
        heads, out = pooler.num_heads, pooler.proj
        readout = AttentionPooling("attention pooling", targets, before, heads, value, out, then, pooler.mlp)
    else:
        expected = "'token', 'avg' or 'map'"
        require(pool in ("token", "avg"), f"it reads out by pooling {pool!r}; expected {expected}")
        name, targets = ("class token", slice(0, 1)) if pool == "token" else ("mean of patches", patches)
        require(before is None or after is None, "it has norms both before and after its pooling")
        readout = TokenReadOut(name, targets, before or after, before is not None, maps, like)
    return family_of(model, [timm_block(block) for block in trunk.blocks], readout, prefix)
