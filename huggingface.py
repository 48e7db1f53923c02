"""The image side of Hugging Face's CLIP and SigLIP models, for families.py; transformers is not imported.

    model = transformers.CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
    decompose(model, images)    # sums to model.get_image_features(pixel_values=images)

It takes CLIPModel, CLIPVisionModelWithProjection and SiglipModel (SigLIP, and SigLIP 2 at fixed resolutions)
of transformers 4 and 5, and models with the same attributes. Their blocks are CLIP's under other names, and
their attention must end in F.scaled_dot_product_attention, where attention.py intercepts it.

This file needs torch, and families.py with the files that it needs beside it.
MIT licence, (c) 2026 The TextSpan reference authors.

Axes as in decompose.py.
"""

from __future__ import annotations

from torch import Tensor, nn

try:
    from .blocks import Block, WayOut, child, require
    from .readouts import AttentionPooling, TokenReadOut
    from .towers import Family, family_of
except ImportError:  # not in a package
    from blocks import Block, WayOut, child, require
    from readouts import AttentionPooling, TokenReadOut
    from towers import Family, family_of

PARTS = {"layer_norm1", "self_attn", "layer_norm2", "mlp"}  # of a block


class ImageSide:
    """A model of transformers with the attributes of open_clip's that the towers read."""

    def __init__(self, model: nn.Module) -> None:
        self.visual, self.modules, self.kind = model.vision_model, model.modules, type(model).__name__
        self.projection = getattr(model, "visual_projection", None)
        self.head = getattr(self.visual, "head", None)

    def encode_image(self, images: Tensor) -> Tensor:
        """[b, d] what get_image_features returns: in transformers 5 in an object, in 4 as it is."""
        if self.projection is not None:
            return self.projection(self.visual(pixel_values=images)[1])
        # Asked for its weights, as it is here, nn.MultiheadAttention does not call the intercepted function.
        unasked = lambda attn, args, options: (args, options | {"need_weights": False})  # noqa: E731
        hook = self.head.attention.register_forward_pre_hook(unasked, with_kwargs=True)
        try:
            return self.visual(pixel_values=images)[1]
        finally:
            hook.remove()

    def tower(self) -> Family:
        """The blocks and the read-out.

        Raises:
            DecompositionError: what the model has instead of them.
        """
        layers = getattr(getattr(self.visual, "encoder", None), "layers", ())
        norm = child(self.visual, "post_layernorm")
        require(len(layers) > 0 and norm is not None, "it has no encoder.layers and post_layernorm")
        patches = getattr(getattr(self.visual, "embeddings", None), "patch_embedding", None)
        naflex = isinstance(patches, nn.Linear)
        require(not naflex, "it takes patches with their sizes and masks (NaFlex), not images")
        require(isinstance(patches, nn.Conv2d), "it has no embeddings.patch_embedding that is a convolution")
        blocks = [block_of(block) for block in layers]
        if self.projection is None:
            return family_of(self, blocks, self.pooling(norm), prefix=0)
        maps = [(self.projection.weight.T, self.projection.bias)]
        readout = TokenReadOut("class token", slice(0, 1), norm, True, maps, norm.weight)
        return family_of(self, blocks, readout, prefix=1)

    def pooling(self, norm: nn.LayerNorm) -> AttentionPooling:
        """SigLIP's read-out."""
        attn = getattr(self.head, "attention", None)
        needed = "give CLIPModel, CLIPVisionModelWithProjection or SiglipModel"
        require(attn is not None, f"it has neither a visual_projection nor attention pooling; {needed}")
        known = type(attn) is nn.MultiheadAttention and attn.in_proj_bias is not None and attn.bias_k is None
        kind = f"{type(attn).__name__} of another kind; expected nn.MultiheadAttention"
        require(known, f"its pooling has {kind}")
        then = TokenReadOut("", slice(0, 1), None, False, [], norm.weight)
        value, heads = (attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2]), attn.num_heads
        name, mlp = "attention pooling", self.head.mlp
        return AttentionPooling(name, slice(None), norm, heads, value, attn.out_proj, then, mlp)


def block_of(block: nn.Module) -> Block:
    """CLIPEncoderLayer, SiglipEncoderLayer, and what is built like them."""
    parts = {name for name, _ in block.named_children()}
    found = f"block {type(block).__name__} has {', '.join(sorted(parts))}"
    require(parts == PARTS, f"{found}; expected {', '.join(sorted(PARTS))}")
    attn, mlp = block.self_attn, block.mlp
    out = child(attn, "out_proj", nn.Linear)
    known = out is not None and hasattr(attn, "num_heads")
    require(known, f"attention {type(attn).__name__} has no out_proj and num_heads")
    runs = getattr(getattr(attn, "config", None), "_attn_implementation", None)
    hint = 'load it with attn_implementation="sdpa", or call model.set_attn_implementation("sdpa")'
    require(runs == "sdpa", f"its attention runs as {runs!r}, which cannot be intercepted; {hint}")

    def mlp_way_out() -> WayOut:
        names = {name for name, _ in mlp.named_children()}
        known = names == {"activation_fn", "fc1", "fc2"}
        require(known, f"is {', '.join(sorted(names))}; expected activation_fn, fc1, fc2")
        return WayOut(child(mlp, "fc2", nn.Linear))

    return Block(block, attn, WayOut(out), out, mlp, mlp_way_out)
