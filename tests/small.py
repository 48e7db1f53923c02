"""What several test files share: bounds of errors, and small random CLIPs of open_clip."""

import torch
from open_clip.model import CLIP, convert_weights_to_lp

# float64 rounds at 1e-16; sums of some thousand terms that partly cancel stay six digits below this.
EXACT = 1e-10
SINGLE = 1e-5  # float32 rounds at 6e-8; the longest sums here lose one digit more
# bfloat16 rounds at 4e-3 in every step of a forward pass; the docstring of `check` allows this much.
HALF = 3e-2
FAR = 1e-3  # what a negative control must differ by at least: far from any rounding error

# Three blocks, four heads, 2 x 3 patches.
VISION = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 4, "image_size": (8, 12), "mlp_ratio": 2.0}
TEXT_TOWER = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
# Every norm and scale that open_clip's blocks can have inside.
INNER = dict.fromkeys(("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), True)
INNER |= {"ls_init_value": 0.3}


@torch.no_grad()
def build(dtype=torch.float64, quick_gelu=False, cast_dtype=None, frozen=False, seed=0, **options):
    """A CLIP of three blocks, four heads, 2 x 3 patches, no parameter at its trivial value, in eval mode."""
    vision = VISION | options
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(24, vision, TEXT_TOWER, quick_gelu=quick_gelu, cast_dtype=cast_dtype)
        for name, p in model.visual.named_parameters():
            if p.ndim == 1:  # gamma, beta, biases, class embedding, layer scale
                p.add_(0.3 * torch.randn_like(p))
            elif "in_proj" in name:  # logits of about one: attention that is neither even nor on one token
                p.copy_(1.5 * torch.randn_like(p) * p.shape[-1] ** -0.5)
            else:
                p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype).eval().requires_grad_(not frozen)


def half(dtype, mixed, **options):
    """A model all of half precision, or one as open_clip makes it, with norms left in float32."""
    if not mixed:
        return build(dtype, **options)
    model = build(torch.float32, cast_dtype=dtype, **options)
    convert_weights_to_lp(model, dtype)
    return model


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(model, batch=2, seed=1):
    return noise(batch, 3, *model.visual.image_size, seed=seed).to(model.visual.conv1.weight)


def sentences(model, count=5, seed=2):
    return noise(count, 24, seed=seed).to(model.visual.conv1.weight)


def blocks(model):
    return model.visual.transformer.resblocks


@torch.no_grad()
def far(a, b):
    """max |a - b| / max |b|"""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


# Other orders of heads and patches.

ORDER = [4, 2, 0, 5, 3, 1]  # of patches


@torch.no_grad()
def permute_heads(model, order, projection=True):
    for block in blocks(model):
        attn = block.attn
        attn.in_proj_weight.copy_(attn.in_proj_weight.unflatten(0, (3, 4, 8))[:, order].flatten(0, 2))
        attn.in_proj_bias.copy_(attn.in_proj_bias.unflatten(0, (3, 4, 8))[:, order].flatten())
        if projection:
            attn.out_proj.weight.copy_(attn.out_proj.weight.unflatten(1, (4, 8))[:, order].flatten(1))
    return model


def permute_patches(images, order):
    tiles = images.unflatten(2, (2, 4)).unflatten(4, (3, 4)).transpose(3, 4).flatten(2, 3)  # [b, 3, 6, 4, 4]
    return tiles[:, :, order].unflatten(2, (2, 3)).transpose(3, 4).flatten(4).flatten(2, 3)


@torch.no_grad()
def permute_positions(model, order):
    position = model.visual.positional_embedding
    position[1:] = position[1:][order]
    return model


# What a call might leave behind.


def found(model):
    """Attributes, modes, hooks, and parameters with their gradients."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {
        name: (
            sorted(vars(m)),
            [v for v in vars(m).values() if isinstance(v, bool | int | float | str)],
            *(list(getattr(m, h)) for h in hooks),
        )
        for name, m in model.named_modules()
    }
    parameters = {
        name: (p.requires_grad, p.dtype, bits(p), bits(p.grad)) for name, p in model.named_parameters()
    }
    return modules, parameters


def bits(tensor):
    return None if tensor is None else tensor.detach().flatten().view(torch.uint8).numpy().tobytes()


def half_trained(**options):
    """A model with modes, gradients and requirements mixed, a hook of the user's, checkpointing."""
    model = build(patch_dropout=0.5, **options).train()
    blocks(model)[1].eval()
    model.visual.ln_post.eval()
    model.visual.conv1.requires_grad_(False)
    model.encode_image(pictures(model)).sum().backward()
    blocks(model)[0].register_forward_hook(lambda module, args, output: None)
    if not options:  # open_clip's blocks with norms inside know no checkpointing
        model.set_grad_checkpointing()
    return model


CHANGES = {
    "mode": lambda model: model.eval(),
    "checkpointing": lambda model: model.set_grad_checkpointing(False),
    "hook": lambda model: model.visual.register_forward_hook(print),
    "attribute": lambda model: setattr(model.visual, "forward", print),
    "weight": lambda model: model.visual.proj.data.add_(1e-9),
    "gradient": lambda model: model.zero_grad(),
    "requirement": lambda model: model.visual.proj.requires_grad_(False),
}
