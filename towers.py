"""Where open_clip's image towers keep what decompose.py needs: blocks, their ways out, read-outs. One adapter per family.

A tower is a residual stream x, blocks that write onto it (attention heads, an MLP), and a read-out that maps it to the embedding. Two
facts make it linear, once norms and pooling attention are frozen at the values they had in a forward pass:

* Heads and neurons leave their module by one road: perhaps a norm, a linear map, perhaps a norm, perhaps LayerScale. See `Exit`.
* Every read-out is a sum over rows r of a fixed matrix G_r [D, d] applied to a weighted sum of tokens:

      e = sum_r (sum_t weights[r, t] x_t) G_r + constant

  The class token: one row, weight 1 / sigma there. Mean pooling: one row, 1 / (T sigma). Attention pooling: a row per pooling head.

Attention itself is watched at one door, F.scaled_dot_product_attention, which the blocks of open_clip and of timm all go through with
what their own queries and keys are made of: norms, rotary or relative positions. See `attention_calls`.

Axes as in decompose.py, and
    T  the tokens that are read out (N: all tokens, each a source)     r  rows of the read-out     q  queries of attention pooling
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DecompositionError(ValueError):
    """The model cannot be decomposed exactly, or a decomposition does not sum to the embedding; the message says which and why."""


# Attention, watched.


@dataclass
class Call:
    """One call of F.scaled_dot_product_attention."""

    q: Tensor  # [b, H, T, e] queries, of all tokens in a block, of the latents in attention pooling
    k: Tensor  # [b, H, N, e]
    v: Tensor  # [b, H, N, e]
    mask: Tensor | None  # added to the logits, or, where boolean, what may be attended to
    scale: float
    out: Tensor  # [b, H, T, e]

    def weights(self, queries: slice) -> Tensor:
        """[b, H, T, N] the attention of these queries."""
        logits = promote(self.q[:, :, queries]) @ promote(self.k).mT * self.scale
        if self.mask is not None:
            mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., queries, :]
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(dim=-1)


_door = threading.RLock()  # one watcher at a time; threads that only run a model pass by


@contextmanager
def attention_calls() -> Iterator[list[Call]]:
    """While open, every attention of this thread is noted in the list that is yielded, which whoever reads it also empties."""
    calls: list[Call] = []
    with _door:
        stock, thread, fast = (
            F.scaled_dot_product_attention,
            threading.get_ident(),
            torch.backends.mha.get_fastpath_enabled(),
        )

        def noted(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
            out = stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
            if threading.get_ident() == thread:
                if is_causal:
                    raise DecompositionError("an attention is causal, which no image tower of open_clip is")
                calls.append(
                    Call(
                        query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale, out
                    )
                )
            return out

        F.scaled_dot_product_attention = noted
        torch.backends.mha.set_fastpath_enabled(
            False
        )  # nn.MultiheadAttention's own kernel goes through another door
        try:
            yield calls
        finally:
            F.scaled_dot_product_attention = stock
            torch.backends.mha.set_fastpath_enabled(fast)


# Blocks.


@dataclass
class Exit:
    """From hidden features h (the heads' values, the neurons) to the residual stream: gain * outer(linear(inner(h))).

    With each norm's divisor frozen (s for the inner, u for the outer) this is h @ maps() / (s u) + bias / u + shift.
    """

    linear: nn.Module  # weight [D, in], perhaps bias
    inner: nn.LayerNorm | None = None
    outer: nn.LayerNorm | None = None
    gain: Tensor | None = None  # [D] LayerScale

    @property
    def reader(self) -> nn.Module:
        """The module whose input is h."""
        return self.linear if self.inner is None else self.inner

    def maps(self) -> Tensor:
        """[in, D] what a unit of each feature adds, divisors aside."""
        W = promote(self.linear.weight).T
        if self.inner is not None:  # the norm's centring comes first: (I - 11'/n) diag(gamma) W
            W = affine(self.inner, W)[0][:, None] * W
            W = W - W.mean(dim=0)
        if self.outer is not None:
            W = centre(W) * affine(self.outer, W)[0]
        return W if self.gain is None else W * promote(self.gain)

    def bias(self) -> tuple[Tensor, Tensor]:
        """bias and shift, each [D]: what belongs to no feature."""
        W = promote(self.linear.weight).T
        bias = torch.zeros_like(W[0]) if self.linear.bias is None else promote(self.linear.bias)
        if self.inner is not None:
            bias = bias + affine(self.inner, W)[1] @ W
        shift = torch.zeros_like(bias)
        if self.outer is not None:
            gamma, shift = affine(self.outer, W)
            bias = centre(bias) * gamma
        return (bias, shift) if self.gain is None else (bias * promote(self.gain), shift * promote(self.gain))

    def weigh(self, weights: Tensor, h: Tensor, written: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights [b, r, T] of tokens, divided by the norms that h is still to pass, and the biases' weighted sum [b, r, D].

        h: [b, T, ...] the features; written: [b, T, D] what the outer norm was given.
        """
        bias, shift = self.bias()
        shift = weights.sum(dim=-1, keepdim=True) * shift
        if self.outer is not None:
            weights = weights / divisor(self.outer, promote(written)).mT
        bias = weights.sum(dim=-1, keepdim=True) * bias + shift
        if self.inner is not None:
            weights = weights / divisor(self.inner, h.flatten(2)).mT
        return weights, bias


@dataclass
class Block:
    """What a block of one of the families has in common with the others."""

    module: nn.Module
    heads: int
    attention: Exit
    attention_written: nn.Module  # its output is what attention adds to the stream
    mlp: nn.Module
    mlp_written: nn.Module  # its output is what the MLP adds
    mlp_exit: Callable[[], Exit]  # raises DecompositionError where neurons cannot be told apart
    head_scale: Tensor | None = None  # [H, 1, 1] values are multiplied by it

    def writes(self) -> Tensor:
        """[H, e, D] what a unit of each value adds to the residual stream, norms' divisors aside."""
        return self.attention.maps().unflatten(0, (self.heads, -1))


def native_block(block: nn.Module) -> Block:
    """open_clip's ResidualAttentionBlock and CustomResidualAttentionBlock."""
    missing = [name for name in ("ln_1", "attn", "ls_1", "ls_2", "mlp") if not hasattr(block, name)]
    if missing or hasattr(block, "ln_1_kv"):
        raise DecompositionError(
            f"block {type(block).__name__} "
            + (f"has no {missing[0]}" if missing else "attends to another input")
        )
    attn, mlp = block.attn, block.mlp
    if getattr(attn, "in_proj_weight", None) is None or not hasattr(attn, "out_proj"):
        raise DecompositionError(f"attention {type(attn).__name__} has no in_proj_weight and out_proj")
    if getattr(attn, "logit_scale", None) is not None:
        raise DecompositionError(
            "its scaled cosine attention does not run in this release of open_clip, and is not supported"
        )
    if isinstance(attn, nn.MultiheadAttention) and (attn.bias_k is not None or attn.add_zero_attn):
        raise DecompositionError(
            "attention with add_bias_kv or add_zero_attn attends to tokens that are not in the image"
        )

    def mlp_exit() -> Exit:
        steps = dict(mlp.named_children()) if isinstance(mlp, nn.Sequential) else {}
        if isinstance(steps.get("ln"), nn.Identity):
            del steps["ln"]
        if list(steps) not in (["c_fc", "gelu", "c_proj"], ["c_fc", "gelu", "ln", "c_proj"]):
            found = ", ".join(steps) or type(mlp).__name__
            raise DecompositionError(
                f"is {found}; expected c_fc, gelu, c_proj, with or without a norm ln before c_proj"
            )
        return Exit(linear(steps, "c_proj"), norm(steps, "ln"), gain=getattr(block.ls_2, "gamma", None))

    way_out = Exit(
        attn.out_proj, norm(attn, "ln_inner"), norm(block, "ln_attn"), getattr(block.ls_1, "gamma", None)
    )
    scale = getattr(attn, "head_scale", None)
    return Block(block, attn.num_heads, way_out, block.ls_1, mlp, block.ls_2, mlp_exit, scale)


PRE_NORM, POST_NORM = (
    ("Block", "RelPosBlock", "EvaBlock"),
    ("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm"),
)


def timm_block(block: nn.Module) -> Block:
    """timm's blocks with one attention and one MLP, with their norms before (ViT, EVA, relative positions) or after them."""
    kind = type(block).__name__
    if kind not in PRE_NORM + POST_NORM:
        raise DecompositionError(f"its blocks are {kind}; expected one of {', '.join(PRE_NORM + POST_NORM)}")
    missing = [name for name in ("attn", "mlp", "drop_path1", "drop_path2") if not hasattr(block, name)]
    if missing:
        raise DecompositionError(f"block {kind} has no {missing[0]}")
    attn, mlp, post = block.attn, block.mlp, kind in POST_NORM
    if not isinstance(getattr(attn, "proj", None), nn.Linear):
        raise DecompositionError(f"attention {type(attn).__name__} has no linear proj")
    if getattr(attn, "gate", None) is not None:
        raise DecompositionError(
            f"attention {type(attn).__name__} is gated: what a head writes is no linear map of its values"
        )

    def gain(i: int) -> Tensor | None:
        scale = getattr(block, f"gamma_{i}", None)
        return getattr(getattr(block, f"ls{i}", None), "gamma", None) if scale is None else scale

    def mlp_exit() -> Exit:
        names = [
            name for name in ("fc2", "w2") if hasattr(mlp, name)
        ]  # GeGluMlp of ViTamin has w2, and its norm at the entrance
        if not names:
            raise DecompositionError(f"is {type(mlp).__name__}; expected fc2 or w2 as its last linear map")
        inner = norm(mlp, "norm") if names[0] == "fc2" else None
        return Exit(linear(mlp, names[0]), inner, norm(block, "norm2") if post else None, gain(2))

    way_out = Exit(attn.proj, norm(attn, "norm"), norm(block, "norm1") if post else None, gain(1))
    return Block(block, attn.num_heads, way_out, block.drop_path1, mlp, block.drop_path2, mlp_exit)


# Read-outs.


@dataclass
class Rows:
    """The matrices G_r = down_r @ up_r."""

    down: Tensor  # [r, D, p]
    up: Tensor | None = None  # [r, p, d]; None: `down` is all of G

    def __len__(self) -> int:
        return len(self.down)

    def read(self, x: Tensor) -> Tensor:
        """[b, ..., d] from weighted sums of tokens, or of what was written on them, [b, r, ..., D]."""
        if len(self) == 1 and self.up is None:
            return x[:, 0] @ self.down[0]
        x = torch.einsum("br...D,rDp->br...p", x, self.down)
        return x.sum(dim=1) if self.up is None else torch.einsum("br...p,rpd->b...d", x, self.up)

    def directions(self, texts: Tensor) -> Tensor:
        """[r, D, t] where in the stream each row looks for texts [t, d]."""
        return self.down @ (texts.T if self.up is None else self.up @ texts.T)


@dataclass
class Frozen:
    """What of a read-out depends on the images."""

    weights: Tensor  # [b, r, T] norms' divisors included
    constant: Tensor  # [b, d]
    mlp: Tensor  # [b, d] the term of the pooling's own MLP; zero where there is none


@dataclass
class Direct:
    """Class token or mean of tokens: perhaps a norm before, the mean over `targets`, perhaps a norm after, linear maps."""

    name: str
    targets: slice  # which tokens
    before: nn.LayerNorm | None
    after: nn.LayerNorm | None
    maps: list[tuple[Tensor, Tensor | None]]  # weight [out, in] and bias [out] of each
    like: Tensor  # [D] of the stream's width, the model's precision and device

    mlp = None

    @property
    def one_pass(self) -> bool:
        """Whether all tokens weigh the same, up to a factor that is known after the pass; else a pass has to tell the weights."""
        return self.before is None or self.targets == slice(0, 1)

    @property
    def as_in_the_paper(self) -> bool:
        """The class token behind one norm, and one projection."""
        return self.targets == slice(0, 1) and (self.before is None) != (self.after is None)

    def rows(self, centring: bool = True) -> Rows:
        """One; with or without the norms' subtraction of the mean."""
        P = torch.eye(len(self.like), dtype=promote(self.like).dtype, device=self.like.device)
        for i, (weight, _) in enumerate(self.maps):
            P = P @ promote(weight).T if i else promote(weight).T
        return Rows(
            behind([norm for norm in (self.before, self.after) if norm is not None], P, centring)[None]
        )

    def freeze(self, x: Tensor, calls: list[Call], mlp: Tensor | None = None) -> Frozen:
        """From the last residual of the targets x [b, T, D]."""
        weights, bias = torch.full_like(x[:, :, 0], 1 / x.shape[1]), torch.zeros_like(x[:, 0])
        if self.before is not None:
            sigma, (gamma, beta) = divisor(self.before, x), affine(self.before, x)
            weights, bias, x = weights / sigma[..., 0], beta.expand_as(bias), centre(x) / sigma * gamma + beta
        if self.after is not None:
            sigma, (gamma, beta) = divisor(self.after, x.mean(dim=1)), affine(self.after, x)
            weights, bias = weights / sigma, centre(bias) / sigma * gamma + beta
        for weight, shift in self.maps:
            bias = bias @ promote(weight).T
            bias = bias if shift is None else bias + promote(shift)
        return Frozen(weights[:, None], bias, torch.zeros_like(bias))


@dataclass
class Pooled:
    """Attention pooling: norms, attention of learned queries to the tokens, perhaps an MLP, and a read-out of the queries' results."""

    name: str
    targets: slice
    before: list[nn.LayerNorm]
    heads: int
    value: tuple[Tensor, Tensor | None]  # weight [heads e, D] and bias
    out: nn.Linear  # [D', heads e]
    then: Direct | Pooled  # of the queries
    call: int = 0  # which call of attention after the last block
    mlp: nn.Module | None = None
    one_pass = as_in_the_paper = False

    @property
    def like(self) -> Tensor:
        """Some parameter, for precision and device."""
        return self.out.weight

    def rows(self) -> Rows:
        """One for each pooling head, and each row of the read-out after it."""
        W_v, W_o, then = *self.weights(), self.then.rows()
        down = behind(self.before, W_v.mT)[:, None].expand(-1, len(then), -1, -1)
        up = torch.einsum("Dpe,rDd->pred", W_o, then.down if then.up is None else then.down @ then.up)
        return Rows(down.flatten(0, 1), up.flatten(0, 1))

    def weights(self) -> tuple[Tensor, Tensor]:
        """W_V [heads, e, D] and W_O [D', heads, e]"""
        return promote(self.value[0]).unflatten(0, (self.heads, -1)), promote(self.out.weight).unflatten(
            1, (self.heads, -1)
        )

    def freeze(self, x: Tensor, calls: list[Call], mlp: Tensor | None = None) -> Frozen:
        """From the last residual of the targets x [b, T, D], the attentions after it, and what the pooling's MLP wrote [b, q, D']."""
        sigma, bias = torch.ones_like(x[..., :1]), torch.zeros_like(x)
        for norm in self.before:
            s, (gamma, beta) = divisor(norm, x), affine(norm, x)
            sigma, bias, x = sigma * s, centre(bias) / s * gamma + beta, centre(x) / s * gamma + beta
        W_v, W_o = self.weights()
        b_v = (
            torch.zeros_like(W_v[..., 0])
            if self.value[1] is None
            else promote(self.value[1]).unflatten(0, (self.heads, -1))
        )
        b_o = torch.zeros_like(W_o[:, 0, 0]) if self.out.bias is None else promote(self.out.bias)

        if len(calls) <= self.call:
            raise DecompositionError(
                f"its pooling called F.scaled_dot_product_attention {len(calls)} times, expected {self.call + 1}"
            )
        attention, queries = calls[self.call], self.then.targets
        alpha = attention.weights(queries)  # [b, p, q, T]
        z = torch.einsum("bpqe,Dpe->bqD", promote(attention.out[:, :, queries]), W_o) + b_o
        written = torch.zeros_like(z) if mlp is None else promote(mlp[:, queries])
        then = self.then.freeze(z + written, calls)

        shift = torch.einsum("bpqt,btD,peD->bpqe", alpha, bias, W_v) + b_v[:, None]
        shift = torch.einsum("bpqe,Dpe->bqD", shift, W_o) + b_o
        weights = torch.einsum("brq,bpqt->bprt", then.weights, alpha / sigma[:, None, None, :, 0]).flatten(
            1, 2
        )
        read = self.then.rows().read
        return Frozen(
            weights, read(then.weights @ shift) + then.constant, read(then.weights @ written) + then.mlp
        )


def behind(norms: list[nn.LayerNorm], W: Tensor, centring: bool = True) -> Tensor:
    """[..., D, p] the map W behind norms, the first outermost, divisors aside: (I - 11'/D) diag(gamma) W."""
    for norm in reversed(norms):
        W = affine(norm, W)[0][:, None] * W
        W = W - W.mean(dim=-2, keepdim=True) if centring else W
    return W


# Towers.


@dataclass
class Tower:
    """An image tower as decompose.py sees it."""

    visual: nn.Module
    blocks: list[Block]
    readout: Direct | Pooled
    prefix: int  # tokens before the patches: class token, registers
    batch_first: bool = True

    def tokens(self, x: Tensor) -> Tensor:
        """[b, N, D]"""
        return x if self.batch_first else x.transpose(0, 1)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        size = tuple(images.shape[-2:])
        embed = getattr(getattr(self.visual, "trunk", None), "patch_embed", None)
        if embed is not None:
            return embed.dynamic_feat_size(size)
        rows, columns = (pixels // patch for pixels, patch in zip(size, self.visual.patch_size, strict=True))
        return rows, columns


def refusal(model: nn.Module, reason: str) -> DecompositionError:
    """The error that names the model's tower."""
    visual = getattr(model, "visual", None)
    tower = type(visual).__name__ + (f" ({type(visual.trunk).__name__})" if hasattr(visual, "trunk") else "")
    return DecompositionError(f"cannot decompose {type(model).__name__} with image tower {tower}: {reason}")


OTHERS = {  # why not
    "ModifiedResNet": "a ResNet has convolutions, not a residual stream of attention heads",
    "ResNet": "a ResNet has convolutions, not a residual stream of attention heads",
    "ConvNeXt": "a ConvNeXt has convolutions, not a residual stream of attention heads",
    "FastVit": "a FastViT mixes tokens by convolutions in most stages, and its stages do not share one residual stream",
    "SwinTransformer": "a Swin merges tokens between stages, which do not share one residual stream",
}


def open_tower(model: nn.Module) -> Tower:
    """The model's tower, or a DecompositionError that names it and what it lacks."""
    visual = getattr(model, "visual", None)
    if visual is None:
        raise refusal(model, "it has no attribute `visual`; expected an open_clip model")
    if isinstance(model, torch.jit.ScriptModule):
        raise refusal(model, "scripted models cannot be watched; load it without jit")
    kind = type(getattr(visual, "trunk", visual)).__name__
    try:
        if kind in OTHERS:
            raise DecompositionError(OTHERS[kind])
        return timm_tower(visual) if hasattr(visual, "trunk") else native_tower(visual)
    except DecompositionError as error:
        raise refusal(model, str(error)) from None


def native_tower(visual: nn.Module) -> Tower:
    """open_clip's VisionTransformer: class token or mean, norm before or after; CoCa's attention pooling."""
    if not hasattr(getattr(visual, "transformer", None), "resblocks") or not hasattr(visual, "ln_post"):
        raise DecompositionError(
            "it has no residual stream of attention heads (transformer.resblocks and ln_post)"
        )
    ln_post = norm(visual, "ln_post")
    if ln_post is None:
        raise DecompositionError("has Identity as ln_post; expected LayerNorm")
    if getattr(visual, "global_average_pool", False):
        raise DecompositionError(
            "it averages its tokens as older releases of open_clip did (global_average_pool)"
        )
    pool = getattr(visual, "pool_type", "tok")
    pooler, second = getattr(visual, "attn_pool", None), getattr(visual, "attn_pool_contrastive", None)
    if pool not in ("tok", "avg") and second is None:
        raise DecompositionError(f"it reads out by pooling {pool!r}; expected 'tok' or 'avg'")
    name, targets = ("class token", slice(0, 1)) if pool == "tok" else ("mean of patches", slice(1, None))
    maps = [] if visual.proj is None else [(visual.proj.T, None)]
    like, everything = next(visual.parameters()), slice(None)
    if pooler is None:
        first = getattr(visual, "final_ln_after_pool", False)
        like = like.new_empty(ln_post.normalized_shape)
        readout = Direct(name, targets, None if first else ln_post, ln_post if first else None, maps, like)
    elif second is None:
        then = Direct("", targets, ln_post, None, maps, like.new_empty(ln_post.normalized_shape))
        readout = coca_pooling("attention pooling", pooler, [], everything, then)
    else:
        then = Direct("", slice(0, 1), None, None, maps, like.new_empty(second.attn.embed_dim))
        if visual.attn_pool_type == "parallel":
            readout = coca_pooling(
                "attention pooling (parallel)", second, [ln_post], everything, then, call=1
            )
        else:
            readout = coca_pooling("", second, [], everything, then, call=1)
            readout = coca_pooling("attention pooling (cascade)", pooler, [ln_post], everything, readout)
    blocks = [native_block(block) for block in visual.transformer.resblocks]
    batch_first = getattr(visual.transformer, "batch_first", True)
    if isinstance(blocks[0].module.attn, nn.MultiheadAttention):
        batch_first = blocks[0].module.attn.batch_first
    return Tower(visual, blocks, readout, 1, batch_first)


def coca_pooling(
    name: str, pooler: nn.Module, before: list, targets: slice, then: Direct | Pooled, call: int = 0
) -> Pooled:
    """open_clip's AttentionalPooler: latents attend to the normed tokens; `then` reads what they gather."""
    attn = pooler.attn
    weight = attn.in_proj_weight.chunk(3)[2] if attn.in_proj_weight is not None else attn.v_proj_weight
    bias = None if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)[2]
    before = [*before, *filter(None, [norm(pooler, "ln_k")])]
    return Pooled(name, targets, before, attn.num_heads, (weight, bias), attn.out_proj, then, call)


def timm_tower(visual: nn.Module) -> Tower:
    """A vision transformer of timm behind open_clip's TimmModel."""
    trunk = visual.trunk
    if not hasattr(trunk, "blocks") or not hasattr(trunk, "global_pool"):
        raise DecompositionError("it has no residual stream of attention heads (blocks)")
    missing = [name for name in ("patch_embed", "head", "num_prefix_tokens") if not hasattr(trunk, name)]
    if missing or hasattr(trunk, "head_dist"):
        raise DecompositionError(
            f"it has no {missing[0]}" if missing else "it reads out two tokens (head_dist)"
        )
    maps, width = [], getattr(trunk, "embed_dim", trunk.num_features)
    for layer in (trunk.head, *visual.head):
        if isinstance(layer, nn.Linear):
            maps.append((layer.weight, layer.bias))
        elif not isinstance(layer, nn.Identity | nn.Dropout):
            raise DecompositionError(
                f"its projection has a {type(layer).__name__}; expected linear maps alone"
            )
    like, prefix, pool = next(trunk.parameters()).new_empty(width), trunk.num_prefix_tokens, trunk.global_pool
    before, after = norm(trunk, "norm"), norm(trunk, "fc_norm")
    patches = slice(0 if getattr(trunk, "pool_include_prefix", False) else prefix, None)
    pooler = getattr(trunk, "attn_pool", None)
    if pooler is not None:
        if (
            type(pooler).__name__ != "AttentionPoolLatent"
            or pooler.pos_embed is not None
            or pooler.pool not in ("token", "avg")
        ):
            raise DecompositionError(
                f"its pooling is {type(pooler).__name__} of another kind; expected AttentionPoolLatent"
            )
        then = Direct("", slice(0, 1) if pooler.pool == "token" else slice(None), None, after, maps, like)
        weight, bias = (
            pooler.kv.weight.chunk(2)[1],
            None if pooler.kv.bias is None else pooler.kv.bias.chunk(2)[1],
        )
        # EVA's pooling takes every token, ViT's leaves the prefix out.
        targets = patches if hasattr(trunk, "pool_include_prefix") else slice(None)
        first = [] if before is None else [before]
        readout = Pooled(
            "attention pooling",
            targets,
            first,
            pooler.num_heads,
            (weight, bias),
            pooler.proj,
            then,
            mlp=pooler.mlp,
        )
    elif pool == "token":
        readout = Direct("class token", slice(0, 1), before, after, maps, like)
    elif pool == "avg":
        readout = Direct("mean of patches", patches, before, after, maps, like)
    else:
        raise DecompositionError(f"it reads out by pooling {pool!r}; expected 'token', 'avg' or 'map'")
    return Tower(visual, [timm_block(block) for block in trunk.blocks], readout, prefix)


# Norms and precision.


def norm(module: nn.Module, name: str) -> nn.LayerNorm | None:
    """A module's LayerNorm of that name; None where it has none."""
    found = module.get(name) if isinstance(module, dict) else getattr(module, name, None)
    if found is None or isinstance(found, nn.Identity):
        return None
    if not isinstance(found, nn.LayerNorm):
        raise DecompositionError(f"has {type(found).__name__} as {name}; expected LayerNorm")
    return found


def linear(module: nn.Module | dict, name: str) -> nn.Linear:
    """The Linear of that name; anything else there is refused."""
    found = module.get(name) if isinstance(module, dict) else getattr(module, name, None)
    if not isinstance(found, nn.Linear):
        raise DecompositionError(f"has {type(found).__name__} as {name}; expected Linear")
    return found


def promote(x: Tensor) -> Tensor:
    """float32, or float64 as it was."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def centre(x: Tensor) -> Tensor:
    """x less its mean over the last axis, as LayerNorm begins."""
    return x - x.mean(dim=-1, keepdim=True)


def divisor(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """[..., 1] what the norm divides x by."""
    return (x.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()


def affine(norm: nn.LayerNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """gamma and beta; 1 and 0, made like another tensor, where the norm has none."""
    gamma = promote(like).new_ones(norm.normalized_shape) if norm.weight is None else promote(norm.weight)
    return gamma, torch.zeros_like(gamma) if norm.bias is None else promote(norm.bias)
