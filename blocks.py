"""Where the blocks of open_clip's and timm's vision transformers keep heads and neurons; for families.py.

Heads and neurons are features h, which reach the residual stream by a norm, a linear map, a norm and
LayerScale, of which all but the linear map may be missing. See `WayOut`. This file needs torch, and
decompose.py beside it.
MIT licence, (c) 2026 The TextSpan reference authors.

Axes: b images   H heads   T tokens   D width of the residual stream
      n features: the values of all heads, or the neurons of an MLP
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

try:
    from .decompose import DecompositionError, upcast
except ImportError:  # not in a package
    from decompose import DecompositionError, upcast


@dataclass
class WayOut:
    """From features h [b, T, n] to the residual stream: gain * outer(linear(inner(h))).

    With the norms' divisors held fixed (s of the inner, u of the outer) this is h @ maps / (s u) + bias.
    """

    linear: nn.Linear
    inner: nn.LayerNorm | None = None
    outer: nn.LayerNorm | None = None
    gain: Tensor | float = 1.0  # [D] LayerScale

    def maps(self) -> Tensor:
        """[n, D] what each feature adds per unit, before the division by s u."""
        W = through_norm(self.inner, upcast(self.linear.weight).T)
        return (W if self.outer is None else centre(W) * gamma_beta(self.outer, W)[0]) * self.gain

    def scale_and_bias(self, h: Tensor, written: Tensor | None) -> tuple[Tensor, Tensor]:
        """1 / (s u) [b, T], and the bias [b, T, D]; [1, 1, D] without outer norm (its input: `written`)."""
        W, divisors = upcast(self.linear.weight).T, torch.ones_like(h[..., :1])
        bias = torch.zeros_like(W[:1]) if self.linear.bias is None else upcast(self.linear.bias)[None]
        if self.inner is not None:
            divisors, bias = divisor(self.inner, h), bias + gamma_beta(self.inner, W)[1] @ W
        if self.outer is not None:
            u, (gamma, beta) = divisor(self.outer, written), gamma_beta(self.outer, W)
            divisors, bias = divisors * u, centre(bias) * gamma / u + beta
        return 1 / divisors[..., 0], (bias * self.gain).view(-1, *bias.shape[-2:])


@dataclass
class Block:
    """Where one block keeps its heads and neurons, and which modules write to the stream."""

    module: nn.Module
    attn: nn.Module  # has num_heads
    heads: WayOut
    attention_written: nn.Module  # its output is what the attention adds to the stream
    mlp_written: nn.Module  # its output is what the MLP adds
    neurons: Callable[[], WayOut]  # raises DecompositionError where neurons cannot be told apart
    head_scale: Tensor | None = None  # [H, 1, 1] values are multiplied by it


def native_block(block: nn.Module) -> Block:
    """open_clip's ResidualAttentionBlock and CustomResidualAttentionBlock."""
    for name in ("ln_1", "attn", "ls_1", "ls_2", "mlp"):
        require(hasattr(block, name), f"block {type(block).__name__} has no {name}")
    require(not hasattr(block, "ln_1_kv"), f"block {type(block).__name__} attends to another input")
    attn, mlp = block.attn, block.mlp
    known = getattr(attn, "in_proj_weight", None) is not None and hasattr(attn, "out_proj")
    require(known, f"attention {type(attn).__name__} has no in_proj_weight and out_proj")
    dot = getattr(attn, "logit_scale", None) is None
    require(dot, "its scaled cosine attention does not run in open_clip 3.3, and is not supported")
    within = getattr(attn, "bias_k", None) is None and not getattr(attn, "add_zero_attn", False)
    require(within, "attention with add_bias_kv or add_zero_attn attends to tokens that are not in the image")

    def mlp_way_out() -> WayOut:
        steps = [name for name, step in mlp.named_children() if not isinstance(step, nn.Identity)]
        found = ", ".join(steps) if isinstance(mlp, nn.Sequential) else type(mlp).__name__
        known = found in ("c_fc, gelu, c_proj", "c_fc, gelu, ln, c_proj")
        require(known, f"is {found}; expected c_fc, gelu, c_proj, with or without a norm ln before c_proj")
        return WayOut(child(mlp, "c_proj", nn.Linear), child(mlp, "ln"), gain=gain(block, "ls_2"))

    way_out = WayOut(attn.out_proj, child(attn, "ln_inner"), child(block, "ln_attn"), gain(block, "ls_1"))
    head_scale = getattr(attn, "head_scale", None)
    return Block(block, attn, way_out, block.ls_1, block.ls_2, mlp_way_out, head_scale)


# timm's classes; those with their norms behind attention and MLP have them in norm1 and norm2.
PRE_NORM = ("Block", "RelPosBlock", "EvaBlock")
POST_NORM = ("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm")


def timm_block(block: nn.Module) -> Block:
    """timm's blocks with one attention and one MLP, with their norms before or after them."""
    kind, known = type(block).__name__, PRE_NORM + POST_NORM
    require(kind in known, f"its blocks are {kind}; expected one of {', '.join(known)}")
    for name in ("attn", "mlp", "drop_path1", "drop_path2"):
        require(hasattr(block, name), f"block {kind} has no {name}")
    attn, mlp, post = block.attn, block.mlp, kind in POST_NORM
    name, gated = f"attention {type(attn).__name__}", getattr(attn, "gate", None) is not None
    require(isinstance(getattr(attn, "proj", None), nn.Linear), f"{name} has no linear proj")
    require(not gated, f"{name} is gated: what a head writes is no linear map of its values")

    def mlp_way_out() -> WayOut:
        last = "fc2" if hasattr(mlp, "fc2") else "w2"  # GeGluMlp has w2, and its norm at the entrance
        require(hasattr(mlp, last), f"is {type(mlp).__name__}; expected fc2 or w2 as its last linear map")
        inner, outer = child(mlp, "norm") if last == "fc2" else None, child(block, "norm2") if post else None
        return WayOut(child(mlp, last, nn.Linear), inner, outer, gain(block, "ls2", "gamma_2"))

    outer = child(block, "norm1") if post else None
    way_out = WayOut(attn.proj, child(attn, "norm"), outer, gain(block, "ls1", "gamma_1"))
    # In eval mode drop_path1 and drop_path2 are identities, behind LayerScale.
    return Block(block, attn, way_out, block.drop_path1, block.drop_path2, mlp_way_out)


# Modules and norms.


def require(condition: bool, reason: str) -> None:
    """Raise a DecompositionError with this reason unless the condition holds."""
    if not condition:
        raise DecompositionError(reason)


def child(module: nn.Module, name: str, kind: type = nn.LayerNorm) -> nn.Module | None:
    """A module's child of that kind and name, None where it has none."""
    found = getattr(module, name, None)
    if found is None or isinstance(found, nn.Identity):
        return None
    require(isinstance(found, kind), f"has {type(found).__name__} as {name}; expected {kind.__name__}")
    return found


def gain(module: nn.Module, *names: str) -> Tensor | float:
    """[D] LayerScale of a block, under one of these names, or 1."""
    for name in names:
        found = getattr(module, name, None)
        gamma = getattr(found, "gamma", found)
        if isinstance(gamma, Tensor):
            return upcast(gamma)
    return 1.0


def centre(x: Tensor) -> Tensor:
    """x less its mean over the last axis, as LayerNorm begins."""
    return x - x.mean(dim=-1, keepdim=True)


def divisor(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """[..., 1] what the norm divides x by."""
    return (x.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()


def gamma_beta(norm: nn.LayerNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """[D] each; 1 and 0 in the precision of another tensor, where the norm has none."""
    gamma = like.new_ones(norm.normalized_shape) if norm.weight is None else upcast(norm.weight)
    return gamma, torch.zeros_like(gamma) if norm.bias is None else upcast(norm.bias)


def through_norm(norm: nn.LayerNorm | None, W: Tensor, centring: bool = True) -> Tensor:
    """[D, d] the map W behind a norm, apart from its divisor: (I - 11'/D) diag(gamma) W."""
    if norm is None:
        return W
    W = gamma_beta(norm, W)[0][:, None] * W
    return W - W.mean(dim=0) if centring else W
