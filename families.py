"""open_clip's other vision transformers for decompose.py: SigLIP, EVA, CoCa, CLIPA, ViTamin, MobileCLIP, PE, ...

They differ from CLIP's class-token ViT in three places. Each is linear, too, once norms and pooling attention
are held fixed at their values from this forward pass:

* The way from heads (or neurons) to the residual stream: perhaps a norm, a linear map, perhaps a norm, perhaps
  LayerScale. See `WayOut`.
* What queries and keys are made of: norms, rotary or relative positions. All these towers end in
  F.scaled_dot_product_attention, where attention.py intercepts them.
* The read-out. A mean of tokens T reads one virtual token, x = sum over T of w_T x_T, whose weights w sum to one.
  With a LayerNorm before the mean, w_T is proportional to 1 / sigma_T, and sigma is the harmonic mean of the
  tokens' sigmas. See `Mean`. Attention pooling is a sum of such read-outs, one for each pooling head. See `Pooled`.

So decompose.py's formulas hold for every virtual token. One forward pass serves all: what is written on the
tokens is kept until their weights are known, which depend on the last layer. This file needs torch, decompose.py
and attention.py beside it. MIT licence, (c) 2026 The TextSpan reference authors.

Axes as in decompose.py, and   T tokens that are read out   r virtual tokens   q queries, p heads of the pooling
                               n features: the values of all heads, or the neurons of an MLP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, einsum, nn

try:
    from . import decompose as core
    from .attention import Call, attention_calls
except ImportError:  # not in a package
    import decompose as core
    from attention import Call, attention_calls

ClipTower, ReadOut, Written, upcast = core.ClipTower, core.ReadOut, core.Written, core.upcast
Decomposition, DecompositionError = core.Decomposition, core.DecompositionError

KEPT_BYTES = 1e9  # of what is kept of a batch until the weights are known; larger batches are split
QUERIES = 64  # whose attention is formed at a time: never [N, N] of all tokens


# Blocks.


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
        """[n, D] what a unit of each feature adds, apart from the divisors."""
        W = through_norm(self.inner, upcast(self.linear.weight).T)
        return (W if self.outer is None else centre(W) * gamma_beta(self.outer, W)[0]) * self.gain

    def freeze(self, h: Tensor, written: Tensor | None) -> tuple[Tensor, Tensor]:
        """1 / (s u) [b, T], and the bias [b, T, D]; [1, 1, D] without the outer norm, which was given `written`."""
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
    """What the blocks of all families have in common."""

    module: nn.Module
    attention: WayOut
    attention_written: nn.Module  # its output is what the attention adds to the stream
    mlp_written: nn.Module  # its output is what the MLP adds
    mlp: Callable[[], WayOut]  # raises DecompositionError where neurons cannot be told apart
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
    return Block(block, way_out, block.ls_1, block.ls_2, mlp_way_out, getattr(attn, "head_scale", None))


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
        inner = child(mlp, "norm") if last == "fc2" else None
        return WayOut(
            child(mlp, last, nn.Linear),
            inner,
            child(block, "norm2") if post else None,
            gain(block, "ls2", "gamma_2"),
        )

    way_out = WayOut(
        attn.proj, child(attn, "norm"), child(block, "norm1") if post else None, gain(block, "ls1", "gamma_1")
    )
    return Block(block, way_out, block.drop_path1, block.drop_path2, mlp_way_out)


# Read-outs.


@dataclass
class Seen:
    """What a forward pass wrote on the tokens that are read out; the lists hold a tensor for each layer."""

    embedding: Tensor | None = None  # [b, d]
    stem: Tensor | None = None  # [b, T, D]
    z: list[Tensor] = field(default_factory=list)  # [b, T, H e] attention-weighted values
    own: list[Tensor] = field(default_factory=list)  # [b, H, e] a class token's part of them
    scales: list[Tensor] = field(default_factory=list)  # [b, T] 1 / divisors of the norms behind the heads
    b_O: list[Tensor] = field(default_factory=list)  # [b, T, D] or [1, 1, D] what belongs to no head
    mlps: list[Tensor] = field(default_factory=list)  # [b, T, D]
    last: Tensor | None = None  # [b, T, D]
    calls: dict[int, Call] = field(default_factory=dict)  # of the layers whose source tokens are wanted
    pooling: Sequence[Call] = ()  # after the last block
    pool_mlp: Tensor | None = None  # [b, q, D'] what the pooling's own MLP wrote


@dataclass
class Virtual:
    """A virtual token, and how it is read out: x G / sigma, times `up` where there is one."""

    weights: Tensor  # [b, T] they sum to one
    out: ReadOut
    up: Tensor | None = None  # [e, d]


@dataclass
class Mean:
    """A class token or a mean of tokens: perhaps a norm before, perhaps a norm after, linear maps."""

    name: str
    targets: slice  # which tokens
    before: nn.LayerNorm | None
    after: nn.LayerNorm | None
    maps: list[tuple[Tensor, Tensor | None]]  # [in, out] and bias [out] of each
    like: Tensor  # [D] of the stream's width, for precision and device

    def G(self, convention: str = "term") -> Tensor:
        """[D, d]"""
        P, *more = [upcast(matrix) for matrix, _ in self.maps] or [
            torch.diag(torch.ones_like(upcast(self.like)))
        ]
        for matrix in more:
            P = P @ matrix
        centring = convention == "term"
        return through_norm(self.before, through_norm(self.after, P, centring), centring)

    def freeze(self, x: Tensor, convention: str = "term") -> Virtual:
        """From the last residual x [b, T, D]."""
        inverse = torch.ones_like(x[..., 0]) if self.before is None else 1 / divisor(self.before, x)[..., 0]
        weights, sigma = inverse / inverse.sum(dim=1, keepdim=True), 1 / inverse.mean(dim=1, keepdim=True)
        pooled = einsum("bT,bTD->bD", weights, x)
        G, normed, shift = self.G(convention), pooled, torch.zeros_like(pooled)
        if self.before is not None:
            gamma, shift = gamma_beta(self.before, x)
            normed = centre(pooled) / sigma * gamma + shift
        if self.after is not None:
            u, (gamma, beta) = divisor(self.after, normed), gamma_beta(self.after, x)
            sigma, shift = sigma * u, centre(shift) / u * gamma + beta
        for matrix, bias in self.maps:
            shift = shift @ upcast(matrix) + (0 if bias is None else upcast(bias))
        if convention == "paper":  # G leaves the mean in
            shift = shift - pooled.mean(dim=-1, keepdim=True) / sigma * G.sum(dim=0)
        return Virtual(weights, ReadOut(G, sigma, shift.expand(len(x), -1)))


@dataclass
class Pooled:
    """Attention pooling: a norm, attention of learned queries to the tokens, perhaps an MLP, a read-out of these.

    Pooling head p writes norm(x) W_V,p W_O,p of the tokens, mixed by its attention. So it has a virtual token,
    whose G is diag(gamma) W_V,p, centred; W_O,p and what comes after is `up`.
    """

    name: str
    targets: slice
    before: nn.LayerNorm | None
    heads: int
    value: tuple[Tensor, Tensor | None]  # weight [p e, D] and bias
    out: nn.Linear  # [D', p e]
    then: Mean  # of the queries
    mlp: nn.Module | None = None

    def freeze(self, seen: Seen) -> tuple[list[Virtual], Tensor, Tensor | None]:
        """The virtual tokens, the shift [b, d], and the term of the pooling's MLP [b, d]."""
        times = f"{len(seen.pooling)} times, expected once"
        require(len(seen.pooling) == 1, f"its pooling called F.scaled_dot_product_attention {times}")
        (weight, bias), call, queries = self.value, seen.pooling[0], self.then.targets
        W_V = upcast(weight).unflatten(0, (self.heads, -1))  # [p, e, D]
        W_O = upcast(self.out.weight).T.unflatten(0, (self.heads, -1))  # [p, e, D']
        b_V = torch.zeros_like(W_V[..., 0]) if bias is None else upcast(bias).view(W_V.shape[:2])
        b_O = torch.zeros_like(W_O[0, 0]) if self.out.bias is None else upcast(self.out.bias)
        written = einsum("bpqe,peD->bqD", upcast(call.out[:, :, queries]), W_O) + b_O
        more = torch.zeros_like(written) if seen.pool_mlp is None else upcast(seen.pool_mlp[:, queries])
        then = self.then.freeze(written + more)

        inverse = torch.ones_like(seen.last[..., 0])
        if self.before is not None:
            inverse = 1 / divisor(self.before, seen.last)[..., 0]
            b_V = b_V + einsum("D,peD->pe", gamma_beta(self.before, W_V)[1], W_V)  # attention sums to one
        mixed = einsum("bq,bpqT,bT->bpT", then.weights, call.attention(queries), inverse)
        tokens = []
        for p, w in enumerate(mixed.unbind(dim=1)):
            total = w.sum(dim=1, keepdim=True)
            out = ReadOut(through_norm(self.before, W_V[p].T), then.out.sigma / total, total * 0)
            tokens.append(Virtual(w / total, out, W_O[p] @ then.out.G))
        shift = then.out.shift + then.out.read(einsum("pe,peD->D", b_V, W_O)[None] + b_O)
        pool = None if self.mlp is None else then.out.read(einsum("bq,bqD->bD", then.weights, more))
        return tokens, shift, pool


# The tower.


class Family(ClipTower):
    """ClipTower's interface for these blocks and read-outs."""

    def __init__(self, model: nn.Module, blocks: list[Block], readout: Mean | Pooled, prefix: int) -> None:
        self.model, self.readout, self.prefix, self.name = model, readout, prefix, readout.name
        self.parts, self.blocks, self.hooks = blocks, [block.module for block in blocks], []
        self.attentions = [block.attention_written for block in blocks]
        batch_first = getattr(getattr(model.visual, "transformer", None), "batch_first", True)
        self.batch_first = getattr(self.blocks[0].attn, "batch_first", batch_first)
        self.W_O = [x.attention.maps().unflatten(0, (x.module.attn.num_heads, -1)) for x in blocks]
        self.single = isinstance(readout, Mean) and readout.targets == slice(0, 1)
        then = readout if isinstance(readout, Mean) else readout.then
        self.width = then.maps[-1][0].shape[1] if then.maps else len(then.like)

    def targets(self, x: Tensor) -> Tensor:
        """[b, T, D] the tokens that are read out; one is copied, since a view would hold on to all."""
        x = upcast((x if self.batch_first else x.transpose(0, 1))[:, self.readout.targets])
        return x.clone() if self.single else x

    def token(self, x: Tensor) -> Tensor:
        """[b, D] their mean."""
        return self.targets(x).mean(dim=1)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        embed = getattr(getattr(self.model.visual, "trunk", None), "patch_embed", None)
        return super().grid(images) if embed is None else embed.dynamic_feat_size(tuple(images.shape[-2:]))

    def see(self, images: Tensor, layers: Sequence[int] = ()) -> Seen:
        """Run the model. Queries, keys and values are kept of these layers."""
        seen, normed = Seen(), {}

        def before_norm(layer: int, module: nn.Module, args: tuple) -> None:
            normed[layer] = self.targets(args[0])

        def before_mlp(layer: int, module: nn.Module, args: tuple) -> None:  # the block's attention is over
            times = f"{len(calls)} times, expected once" + ("" if calls else " (is TIMM_FUSED_ATTN=0 set?)")
            require(len(calls) == 1, f"block {layer} called F.scaled_dot_product_attention {times}")
            call, head_scale = calls.pop(), self.parts[layer].head_scale
            within = call.k.shape[2] == call.q.shape[2]
            require(within, f"block {layer} attends to tokens that are not in the image")
            if head_scale is not None:
                call = replace(call, v=call.v * head_scale, out=call.out * head_scale)
            z = upcast(call.out[:, :, self.readout.targets])
            if self.single:  # worked out in full precision, whatever the pass's
                A, v = call.attention(self.readout.targets), upcast(call.v)
                z = A @ v
            seen.z.append(z.transpose(1, 2).flatten(2))
            scale, bias = self.parts[layer].attention.freeze(seen.z[-1], normed.pop(layer, None))
            seen.scales.append(scale)
            seen.b_O.append(bias)
            if self.single:
                seen.own.append(A[:, :, 0, :1] * v[:, :, 0] * scale[..., None])
            if layer in layers:
                seen.calls[layer] = call

        def keep(name: str, module: nn.Module, args: tuple, *output: Tensor) -> None:
            setattr(seen, name, self.targets(output[0] if output else args[0]))

        hooks = [(self.blocks[0].register_forward_pre_hook, partial(keep, "stem")), *self.hooks]
        for layer, block in enumerate(self.parts):
            if block.attention.outer is not None:
                hooks.append((block.attention.outer.register_forward_pre_hook, partial(before_norm, layer)))
            hooks.append((block.module.mlp.register_forward_pre_hook, partial(before_mlp, layer)))
            after = block.mlp_written.register_forward_hook
            hooks.append((after, lambda _, args, x: seen.mlps.append(self.targets(x))))
        hooks.append((self.blocks[-1].register_forward_hook, partial(keep, "last")))
        if getattr(self.readout, "mlp", None) is not None:
            after = self.readout.mlp.register_forward_hook
            hooks.append((after, lambda _, args, x: setattr(seen, "pool_mlp", x)))
        with refused(self.model), attention_calls() as calls:
            seen.embedding, seen.pooling = core.image_embedding(self.model, images, hooks), calls
        return seen

    def virtual(self, seen: Seen, convention: str = "term") -> tuple:
        """The virtual tokens, what attention pooling adds to the shift, and the term of its MLP."""
        if isinstance(self.readout, Mean):
            return [self.readout.freeze(seen.last, convention)], 0.0, None
        with refused(self.model):
            return self.readout.freeze(seen)

    def weigh(self, seen: Seen, weights: Tensor) -> list[Written]:
        """What was written on the virtual tokens that these weights [b, r, T] make."""
        z = [(weights * scale[:, None]) @ z for z, scale in zip(seen.z, seen.scales, strict=True)]
        z = torch.stack(z, dim=2).unflatten(3, (len(self.W_O[0]), -1))  # [b, r, L, H, e]
        own = torch.stack(seen.own, dim=1) if self.single else None
        b_O = torch.stack([mix(weights, bias) for bias in seen.b_O], dim=2)
        mlps = torch.stack([weights @ x for x in seen.mlps], dim=2)
        stem, last = weights @ seen.stem, weights @ seen.last
        rows = zip(*(x.unbind(dim=1) for x in (stem, z, b_O, mlps, last)), strict=True)
        return [Written(seen.embedding, s, z, own, b_O, mlps, x) for s, z, b_O, mlps, x in rows]

    def watch(self, images: Tensor) -> Written:
        """What was written on the mean of the tokens."""
        seen = self.see(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.weigh(seen, torch.full_like(seen.last[:, None, :, 0], 1 / seen.last.shape[1]))[0]

    def in_parts(self, function: Callable, images: Tensor, kept: int) -> list:
        """The function of parts of a batch. Of a part at most KEPT_BYTES is kept, in `kept` numbers of each token."""
        rows, columns = self.grid(images)
        size = len(self.W_O) * (self.prefix + rows * columns) * kept * max(4, images.element_size())
        return [function(part) for part in images.split(max(1, int(KEPT_BYTES / size)))]

    def terms(self, images: Tensor, convention: str) -> Decomposition:
        """The decomposition: the sum of those of the virtual tokens."""

        def of_part(images: Tensor) -> Decomposition:
            seen = self.see(images)
            with torch.autocast(images.device.type, enabled=False):
                tokens, shift, pool = self.virtual(seen, convention)
                written = self.weigh(seen, torch.stack([token.weights for token in tokens], dim=1))
                pairs = zip(written, tokens, strict=True)
                read = [core.terms_of(x, self.W_O, token.out, convention) for x, token in pairs]
                if tokens[0].up is None:
                    return read[0]
                pairs = list(zip(read, tokens, strict=True))
                stem, heads, mlps, constant = (
                    sum(getattr(x, name) @ token.up for x, token in pairs)
                    for name in ("stem", "heads", "mlps", "constant")
                )
                return Decomposition(seen.embedding, stem, heads, mlps, constant + shift, heads, None, pool)

        H, e, D = self.W_O[0].shape
        parts = [of_part(images)] if self.single else self.in_parts(of_part, images, H * e + D)
        fields = zip(*(vars(part).values() for part in parts), strict=True)
        return Decomposition(*(None if x[0] is None else torch.cat(x) for x in fields))

    def head_maps(self) -> Tensor:
        """[L, H, e, d]; under attention pooling a head's values are its term."""
        if isinstance(self.readout, Mean):
            with torch.autocast(self.W_O[0].device.type, enabled=False):
                return torch.stack([W_O @ self.readout.G() for W_O in self.W_O])
        return torch.eye(self.width).to(self.W_O[0]).expand(len(self.W_O), len(self.W_O[0]), -1, -1)

    def scores(self, images: Tensor, texts: Tensor, convention: str, layers: list, by_head=True) -> Tensor:
        """As ClipTower's."""

        def of_part(images: Tensor) -> Tensor:
            seen, found = self.see(images, layers), {}
            with torch.autocast(images.device.type, enabled=False):
                tokens, _, _ = self.virtual(seen, convention)
                weights = torch.stack([x.weights / x.out.sigma for x in tokens], dim=1)  # [b, r, T]
                sought = [x.out.G @ (texts.T if x.up is None else x.up @ texts.T) for x in tokens]  # [D, t]
                for layer, call in seen.calls.items():
                    A = self.attention(call, weights * seen.scales[layer][:, None])  # [b, H, r, N]
                    v, W_O = upcast(call.v), self.W_O[layer]
                    pairs = zip(A.unbind(dim=2), sought, strict=True)
                    scores = sum(A_r[..., None] * (v @ (W_O @ text)) for A_r, text in pairs)
                    found[layer] = scores if by_head else scores.sum(dim=1, keepdim=True)
                scores = torch.stack([found[layer] for layer in layers], dim=1)
                if convention == "paper":
                    x = self.weigh(seen, tokens[0].weights[:, None])[0]
                    shares = tokens[0].out.layer_shares(x)[:, layers] @ texts.T
                    scores = scores + shares[:, :, None, None] / scores.shape[2:4].numel()
                return scores

        H, e, D = self.W_O[0].shape
        return torch.cat(self.in_parts(of_part, images, 4 * H * e + D))

    def attention(self, call: Call, weights: Tensor) -> Tensor:
        """[b, H, r, N] the attention of the virtual tokens that these weights [b, r, T] make."""
        A, count = 0.0, weights.shape[2]
        start = 0 if self.single else call.q.shape[2] - count
        for first in range(0, count, QUERIES):
            part = call.attention(slice(start + first, start + min(first + QUERIES, count)))
            A = A + weights[:, None, :, first : first + QUERIES] @ part
        return A


def mix(weights: Tensor, x: Tensor) -> Tensor:
    """[b, r, D] weighted means of tokens x [b, T, D], or [1, 1, D] where all are the same."""
    return x.expand(*weights.shape[:2], -1) if x.shape[:2] == (1, 1) else weights @ x


# Which tower a model has.

REFUSED = {
    "ModifiedResNet": "a ResNet has convolutions, not a residual stream of attention heads",
    "ResNet": "a ResNet has convolutions, not a residual stream of attention heads",
    "ConvNeXt": "a ConvNeXt has convolutions, not a residual stream of attention heads",
    "FastVit": "a FastViT mixes tokens by convolutions in most stages, which share no residual stream",
    "SwinTransformer": "a Swin merges tokens between stages, which do not share one residual stream",
}


def require(condition: bool, reason: str) -> None:
    """The fence around what is exact here."""
    if not condition:
        raise DecompositionError(reason)


@contextmanager
def refused(model: nn.Module, where: str = "") -> Iterator[None]:
    """While open, a DecompositionError gets the name of the model's tower."""
    try:
        yield
    except (DecompositionError, NotImplementedError) as error:
        visual = getattr(model, "visual", None)
        tower = type(visual).__name__ + (
            f" ({type(visual.trunk).__name__})" if hasattr(visual, "trunk") else ""
        )
        name = f"cannot decompose {type(model).__name__} with image tower {tower}: "
        raise DecompositionError(f"{name}{where}" + str(error).removeprefix(name)) from None


def open_family(model: nn.Module, convention: str = "term") -> ClipTower:
    """The model's tower; or a DecompositionError that names it and what it lacks."""
    visual = getattr(model, "visual", None)
    with refused(model):
        require(
            not isinstance(model, torch.jit.ScriptModule),
            "scripted models cannot be watched; load it without jit",
        )
        if visual is None:
            require(not hasattr(model, "module"), "it is a wrapper; give the model inside, its .module")
            tower = hasattr(model, "ln_post") or hasattr(model, "trunk")
            require(not tower, "it is an image tower; give the whole model, not its .visual")
            require(False, "it has no attribute `visual`; expected an open_clip model")
        kind = type(getattr(visual, "trunk", visual)).__name__
        require(kind not in REFUSED, REFUSED.get(kind, ""))
        if ClipTower.fits(model) and is_plain(visual):
            return ClipTower(model)
        family = timm_tower(model) if hasattr(visual, "trunk") else native_tower(model)
        one_norm = family.single and (family.readout.before is None) != (family.readout.after is None)
        meaning = (
            'convention="paper" is defined for a class token that is read out behind one norm; use "term"'
        )
        require(convention != "paper" or one_norm, meaning)
    return family


def is_plain(visual: nn.Module) -> bool:
    """Does it have the weights that ClipTower takes for granted, and no others? (LayerScale may be missing.)"""
    weights = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    for block in visual.transformer.resblocks:
        parts, attention = {name for name, _ in block.named_children()}, dict(block.attn.named_parameters())
        known = parts - {"ls_1", "ls_2"} == {"ln_1", "attn", "ln_2", "mlp"} and len(parts) in (4, 6)
        if not known or set(attention) != weights or block.attn.add_zero_attn:
            return False
    norm = getattr(visual, "ln_post", None)
    return isinstance(norm, nn.LayerNorm) and len(list(norm.parameters())) == 2 and visual.proj is not None


def native_tower(model: nn.Module) -> Family:
    """open_clip's VisionTransformer: class token or mean, norm before or after; CoCa's attention pooling."""
    visual, two = model.visual, getattr(model.visual, "attn_pool_contrastive", None) is not None
    known = hasattr(getattr(visual, "transformer", None), "resblocks") and hasattr(visual, "ln_post")
    require(known, "it has no residual stream of attention heads (transformer.resblocks and ln_post)")
    ln_post, averages = child(visual, "ln_post"), getattr(visual, "global_average_pool", False)
    require(ln_post is not None, "has Identity as ln_post; expected LayerNorm")
    require(not averages, "it averages its tokens as older releases of open_clip did (global_average_pool)")
    require(
        not two, "it pools by two attentions (attn_pool_contrastive), as no configuration of open_clip does"
    )
    pool, pooler = getattr(visual, "pool_type", "tok"), getattr(visual, "attn_pool", None)
    require(pool in ("tok", "avg"), f"it reads out by pooling {pool!r}; expected 'tok' or 'avg'")
    name, targets = ("class token", slice(0, 1)) if pool == "tok" else ("mean of patches", slice(1, None))
    maps = [] if visual.proj is None else [(visual.proj, None)]
    like = next(visual.parameters()).new_empty(ln_post.normalized_shape)
    last = getattr(visual, "final_ln_after_pool", False) and pooler is None
    readout = Mean(name, targets, None if last else ln_post, ln_post if last else None, maps, like)
    if pooler is not None:  # latents attend to the normed tokens, and are read out as tokens would be
        attn, before = pooler.attn, child(pooler, "ln_k")
        weight = attn.v_proj_weight if attn.in_proj_weight is None else attn.in_proj_weight.chunk(3)[2]
        value = weight, None if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)[2]
        everything, heads = slice(None), attn.num_heads
        readout = Pooled("attention pooling", everything, before, heads, value, attn.out_proj, readout)
    return Family(model, [native_block(block) for block in visual.transformer.resblocks], readout, 1)


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
    like = next(trunk.parameters()).new_empty(getattr(trunk, "embed_dim", trunk.num_features))
    before, after, prefix = child(trunk, "norm"), child(trunk, "fc_norm"), trunk.num_prefix_tokens
    patches = slice(0 if getattr(trunk, "pool_include_prefix", False) else prefix, None)
    pool, pooler = trunk.global_pool, getattr(trunk, "attn_pool", None)
    if pooler is not None:
        kind = type(pooler).__name__
        known = kind == "AttentionPoolLatent" and pooler.pos_embed is None and pooler.pool in ("token", "avg")
        require(known, f"its pooling is {kind} of another kind; expected AttentionPoolLatent")
        then = Mean("", slice(0, 1) if pooler.pool == "token" else slice(None), None, after, maps, like)
        value = pooler.kv.weight.chunk(2)[1], None if pooler.kv.bias is None else pooler.kv.bias.chunk(2)[1]
        # EVA's pooling takes every token, ViT's leaves the prefix out.
        targets = patches if hasattr(trunk, "pool_include_prefix") else slice(None)
        heads, out = pooler.num_heads, pooler.proj
        readout = Pooled("attention pooling", targets, before, heads, value, out, then, pooler.mlp)
    else:
        require(
            pool in ("token", "avg"), f"it reads out by pooling {pool!r}; expected 'token', 'avg' or 'map'"
        )
        name, targets = ("class token", slice(0, 1)) if pool == "token" else ("mean of patches", patches)
        readout = Mean(name, targets, before, after, maps, like)
    return Family(model, [timm_block(block) for block in trunk.blocks], readout, prefix)


# Modules.


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
