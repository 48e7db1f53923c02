"""open_clip's other vision transformers for decompose.py: SigLIP, EVA, CoCa, CLIPA, ViTamin, MobileCLIP, PE.

They differ from CLIP's class-token ViT in three places. Each becomes linear once norms and all attention are
held fixed at their values from this forward pass:

* The way from heads (or neurons) to the residual stream: perhaps a norm, a linear map, perhaps a norm,
  perhaps LayerScale. See blocks.py.
* What queries and keys are made of: norms, rotary or relative positions. All these towers end in
  F.scaled_dot_product_attention, where attention.py intercepts them.
* The read-out. A virtual token is a weighted mean of tokens T, x = sum over T of w_T x_T, where the weights
  sum to one. A mean of tokens reads out one; with a LayerNorm before the mean, w_T is proportional to
  1 / sigma_T, and sigma is the harmonic mean of the tokens' sigmas. See `TokenReadOut`. Attention pooling is
  a sum of such read-outs, one for each of its heads. See `AttentionPooling`.

So decompose.py's formulas hold for every virtual token. One forward pass serves all: what is written on the
tokens is kept until their weights are known, which depend on the last layer.

To add a kind of model, write a function like `timm_tower` (a Block for each block, a TokenReadOut or an
AttentionPooling, then family_of), and call it from `open_family`; or a file of its own, as huggingface.py is.
This file needs torch, and decompose.py, attention.py and blocks.py beside it.
MIT licence, (c) 2026 The TextSpan reference authors.

Axes as in decompose.py, and T tokens that are read out, r virtual tokens, q queries and p heads of a pooling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, einsum, nn

try:
    from . import decompose as core
    from .attention import Call, attention_calls
    from .blocks import Block, child, divisor, gamma_beta, native_block, require, through_norm, timm_block
except ImportError:  # not in a package
    import decompose as core
    from attention import Call, attention_calls
    from blocks import Block, child, divisor, gamma_beta, native_block, require, through_norm, timm_block

ClipTower, ReadOut, Written, upcast = core.ClipTower, core.ReadOut, core.Written, core.upcast
Decomposition, DecompositionError = core.Decomposition, core.DecompositionError

KEPT_BYTES = 1e9  # of what is kept of a batch until the weights are known; larger batches are split
QUERIES = 64  # whose attention is formed at a time: never [N, N] of all tokens


# Read-outs.


@dataclass
class VirtualTokens:
    """r virtual tokens and their read-out: the sum of their x G / sigma, times `up` where there is one."""

    weights: Tensor  # [b, r, T] the virtual tokens' parts of the tokens; they sum to one
    out: ReadOut
    up: Tensor | None = None  # [r, e, d]
    pool: Tensor | None = None  # [b, d] the term of the pooling's own MLP

    def mix(self, x: Tensor) -> Tensor:
        """[b, r, D] the virtual tokens' weighted means of x [b, T, D]; an x [1, 1, D] is the same for all."""
        return x.expand(*self.weights.shape[:2], -1) if x.shape[:2] == (1, 1) else self.weights @ x

    def lift(self, read: Tensor) -> Tensor:
        """[b, ..., d] what was read out of the virtual tokens [r b, ..., e], times `up`, and summed."""
        if self.up is None:
            return read
        rows = read.unflatten(0, (len(self.up), -1)).movedim(0, -2)  # [b, ..., r, e]
        return rows.flatten(-2) @ self.up.flatten(0, 1)


class ReadOuts(ReadOut):
    """The read-outs of r virtual tokens, G [r, D, e]. A batch holds all images of one, then of the next."""

    def read(self, s: Tensor) -> Tensor:
        """The terms [r b, ..., e] of what was written, s [r b, ..., D]."""
        rows = s.reshape(len(self.G), -1, s.shape[-1]) @ self.G
        return rows.view(*s.shape[:-1], -1) / self.sigma.view(-1, *[1] * (s.ndim - 1))


@dataclass
class TokenReadOut:
    """A class token or a mean of tokens: perhaps a norm before or after the mean, linear maps."""

    name: str
    targets: slice  # which tokens
    norm: nn.LayerNorm | None
    norm_first: bool
    maps: list[tuple[Tensor, Tensor | None]]  # [in, out] and bias [out] of each
    template: Tensor  # [D] only its size, precision and device are used

    def G(self, convention: str = "term") -> Tensor:
        """[D, d]"""
        P = upcast(self.maps[0][0]) if self.maps else torch.diag(torch.ones_like(upcast(self.template)))
        for matrix, _ in self.maps[1:]:
            P = P @ upcast(matrix)
        return through_norm(self.norm, P, centring=convention == "term")

    def virtual_token(self, x: Tensor, convention: str = "term") -> VirtualTokens:
        """From the last residual x [b, T, D]."""
        inverse, shift = torch.ones_like(x[..., 0]), torch.zeros_like(x[:, 0])
        if self.norm is not None:
            shift = shift + gamma_beta(self.norm, x)[1]
            inverse = 1 / divisor(self.norm, x)[..., 0] if self.norm_first else inverse
        weights, sigma = inverse / inverse.sum(dim=1, keepdim=True), 1 / inverse.mean(dim=1, keepdim=True)
        pooled, G = einsum("bT,bTD->bD", weights, x), self.G(convention)
        if self.norm is not None and not self.norm_first:
            sigma = divisor(self.norm, pooled)
        for matrix, bias in self.maps:
            shift = shift @ upcast(matrix) + (0 if bias is None else upcast(bias))
        if convention == "paper":  # G leaves the mean in
            shift = shift - pooled.mean(dim=-1, keepdim=True) / sigma * G.sum(dim=0)
        return VirtualTokens(weights[:, None], ReadOut(G, sigma, shift))


@dataclass
class AttentionPooling:
    """Attention pooling: a norm, attention of learned queries to the tokens, perhaps an MLP, a read-out.

    Pooling head p writes norm(x) W_V,p W_O,p of the tokens, mixed by its attention. So it has a virtual
    token, whose G is diag(gamma) W_V,p, centred; W_O,p and what comes after is `up`.
    """

    name: str
    targets: slice
    norm: nn.LayerNorm | None
    heads: int
    value: tuple[Tensor, Tensor | None]  # weight [p e, D] and bias
    out: nn.Linear  # [D', p e]
    then: TokenReadOut  # of the queries
    mlp: nn.Module | None = None

    def virtual_tokens(
        self, x: Tensor, call: Call, written_by_mlp: Tensor | None
    ) -> tuple[VirtualTokens, Tensor]:
        """The virtual tokens, and the shift [b, d].

        x: [b, T, D] the last residual; call: of the pooling's attention; written_by_mlp: [b, q, D'].
        """
        (weight, bias), queries = self.value, self.then.targets
        W_V = upcast(weight).unflatten(0, (self.heads, -1))  # [p, e, D]
        W_O = upcast(self.out.weight).T.unflatten(0, (self.heads, -1))  # [p, e, D']
        b_V = torch.zeros_like(W_V[..., 0]) if bias is None else upcast(bias).view(W_V.shape[:2])
        b_O = torch.zeros_like(W_O[0, 0]) if self.out.bias is None else upcast(self.out.bias)
        written = einsum("bpqe,peD->bqD", upcast(call.out[:, :, queries]), W_O) + b_O
        by_mlp = torch.zeros_like(written) if written_by_mlp is None else upcast(written_by_mlp[:, queries])
        then = self.then.virtual_token(written + by_mlp)
        alpha = then.weights[:, :, None] @ call.attention(queries)  # [b, p, 1, T], mean over queries
        if self.norm is not None:
            alpha = alpha / divisor(self.norm, x)[..., 0][:, None, None]
            b_V = b_V + einsum("D,peD->pe", gamma_beta(self.norm, W_V)[1], W_V)  # attention sums to one
        # Weights sum to one, so that what is on all tokens alike keeps its size; sigma takes the factor.
        total = alpha.sum(dim=-1)  # [b, p, 1]
        sigma = (then.out.sigma[:, None] / total).transpose(0, 1).flatten(0, 1)  # [p b, 1]
        G = torch.stack([through_norm(self.norm, W.T) for W in W_V])
        pool = None if self.mlp is None else then.out.read((then.weights @ by_mlp)[:, 0])
        shift = then.out.shift + then.out.read(einsum("pe,peD->D", b_V, W_O)[None] + b_O)
        out = ReadOuts(G, sigma, torch.zeros_like(sigma))
        return VirtualTokens(alpha[:, :, 0] / total, out, W_O @ then.out.G, pool), shift


# Towers.


class Family(ClipTower):
    """A tower that reads out its class token as CLIP's do, from other blocks or through other norms."""

    def __init__(
        self, model: nn.Module, blocks: list[Block], readout: TokenReadOut | AttentionPooling, prefix: int
    ) -> None:
        self.model, self.readout, self.prefix, self.name = model, readout, prefix, readout.name
        self.parts, self.blocks, self.hooks = blocks, [block.module for block in blocks], []
        self.attentions = [block.attention_written for block in blocks]
        batch_first = getattr(getattr(model.visual, "transformer", None), "batch_first", True)
        self.batch_first = getattr(blocks[0].attn, "batch_first", batch_first)
        self.W_O = [x.heads.maps().unflatten(0, (x.attn.num_heads, -1)) for x in blocks]
        then = readout if isinstance(readout, TokenReadOut) else readout.then
        self.width = then.maps[-1][0].shape[1] if then.maps else len(then.template)

    def targets(self, x: Tensor) -> Tensor:
        """[b, T, D] the tokens that are read out; one is copied, since a view would hold on to all."""
        x = upcast((x if self.batch_first else x.transpose(0, 1))[:, self.readout.targets])
        return x.clone() if x.shape[1] == 1 else x

    def token(self, x: Tensor) -> Tensor:
        """[b, D] their mean."""
        return self.targets(x).mean(dim=1)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        visual = self.model.visual
        if hasattr(visual, "embeddings"):  # transformers
            return tuple(side // visual.embeddings.patch_size for side in images.shape[-2:])
        embed = getattr(getattr(visual, "trunk", None), "patch_embed", None)
        return super().grid(images) if embed is None else embed.dynamic_feat_size(tuple(images.shape[-2:]))

    def G(self, convention: str = "term") -> Tensor:
        """[D, d]"""
        return self.readout.G(convention)

    def read_out(self, x: Tensor, convention: str) -> ReadOut:
        """The read-out for the last residual x [b, D]."""
        return self.readout.virtual_token(x[:, None], convention).out

    def watch(self, images: Tensor, at_attention: Callable | None = None, layers: Sequence = ()) -> Written:
        """As ClipTower's; A is divided by the norms behind the heads."""
        z, own, b_O, mlps = [], [], [], []

        def at_block(layer: int, call: Call, normed: Tensor | None) -> None:
            A, v = call.attention(self.readout.targets)[:, :, 0], upcast(call.v)
            mixed = einsum("bHN,bHNe->bHe", A, v)
            scale, bias = self.parts[layer].heads.scale_and_bias(mixed.flatten(1)[:, None], normed)
            A = A * scale[..., None]
            z.append(mixed * scale[..., None])
            own.append(A[:, :, :1] * v[:, :, 0])
            b_O.append(bias[:, 0].expand(len(A), -1))
            if layer in layers:
                at_attention(layer, A, lambda x: v @ x)

        embedding, stem, last, _, _ = self.run_blocks(images, at_block, mlps.append)
        z, own, b_O = (torch.stack(parts, dim=1) for parts in (z, own, b_O))
        return Written(embedding, stem[:, 0], z, own, b_O, torch.cat(mlps, dim=1), last[:, 0])

    def run_blocks(self, images: Tensor, at_block: Callable, at_mlp: Callable) -> tuple:
        """Run the model. Every block calls at_block(layer, call, what a norm behind its attention was given),
        and at_mlp(what its MLP wrote [b, T, D]).

        Returns:
            embedding [b, d], stem and last residual [b, T, D], calls of attention after the last block, and
            what the pooling's MLP wrote.
        """
        kept: dict[object, Tensor] = {}

        def keep(name: object, module: nn.Module, args: tuple, *output: Tensor) -> None:
            x = output[0] if output else args[0]
            kept[name] = self.targets(x[0] if isinstance(x, tuple) else x)  # of transformers 4

        def before_mlp(layer: int, module: nn.Module, args: tuple) -> None:  # the block's attention is over
            attn, causes = self.parts[layer].attn, []
            causes += ["is TIMM_FUSED_ATTN=0 set?"] * (not getattr(attn, "fused_attn", True))
            causes += ["the forward of its attention was replaced"] * ("forward" in vars(attn))
            causes += ["a hook on its attention may set need_weights"] * bool(attn._forward_pre_hooks)
            times = f"{len(calls)} times, expected once" + f" ({', '.join(causes)})" * bool(causes)
            require(len(calls) == 1, f"block {layer} called F.scaled_dot_product_attention {times}")
            # Each block's one call is taken off here: what is left after the last block is the pooling's.
            call, head_scale = calls.pop(), self.parts[layer].head_scale
            within = call.k.shape[2] == call.q.shape[2]
            require(within, f"block {layer} attends to tokens that are not in the image")
            if head_scale is not None:
                call = replace(call, v=call.v * head_scale, out=call.out * head_scale)
            at_block(layer, call, kept.pop(layer, None))

        hooks = [(self.blocks[0].register_forward_pre_hook, partial(keep, "stem")), *self.hooks]
        for layer, block in enumerate(self.parts):
            if block.heads.outer is not None:
                hooks.append((block.heads.outer.register_forward_pre_hook, partial(keep, layer)))
            hooks.append((block.module.mlp.register_forward_pre_hook, partial(before_mlp, layer)))
            after_mlp = block.mlp_written.register_forward_hook
            hooks.append((after_mlp, lambda _, args, x: at_mlp(self.targets(x))))
        hooks.append((self.blocks[-1].register_forward_hook, partial(keep, "last")))
        if getattr(self.readout, "mlp", None) is not None:
            after_pool = self.readout.mlp.register_forward_hook
            hooks.append((after_pool, lambda _, args, x: kept.update(pool=x)))
        with refused(self.model), attention_calls() as calls:
            embedding = core.image_embedding(self.model, images, hooks)
        return embedding, kept["stem"], kept["last"], calls, kept.get("pool")

    def neurons(self, images: Tensor, layer: int) -> tuple:
        """Split one MLP by neuron; the fields of neurons.Neurons, in their order."""
        with refused(self.model, f"the MLP of block {layer} "):
            way_out, kept = self.parts[layer].neurons(), {}

        def keep(name: str, module: nn.Module, args: tuple, *output: Tensor) -> None:
            kept[name] = self.targets(output[0] if output else args[0])

        features = way_out.linear if way_out.inner is None else way_out.inner  # the module that reads them
        self.hooks = [(features.register_forward_pre_hook, partial(keep, "h"))]
        self.hooks.append((self.parts[layer].mlp_written.register_forward_hook, partial(keep, "written")))
        if way_out.outer is not None:
            self.hooks.append((way_out.outer.register_forward_pre_hook, partial(keep, "normed")))
        embedding, _, *ends = self.run_blocks(images, lambda *_: None, lambda *_: None)
        with torch.autocast(images.device.type, enabled=False):
            virtual, _ = self.virtual_tokens(*ends)
            scale, bias = way_out.scale_and_bias(kept["h"], kept.get("normed"))
            sigma = virtual.out.sigma.view(virtual.weights.shape[1], -1, 1).transpose(0, 1)  # [b, r, 1]
            activations = (virtual.weights * scale[:, None]) @ kept["h"] / sigma  # [b, r, n]
            mixed = (virtual.mix(x).transpose(0, 1).flatten(0, 1) for x in (kept["written"], bias))
            term, constant = (virtual.lift(virtual.out.read(x)) for x in mixed)
            maps = way_out.maps() @ virtual.out.G  # [n, d] or [r, n, e]
        activations = activations[:, 0] if virtual.up is None else activations
        return embedding, term, activations, maps, constant, virtual.up

    def virtual_tokens(
        self, last: Tensor, calls: list[Call], pool: Tensor | None
    ) -> tuple[VirtualTokens, Tensor | float]:
        """The virtual tokens, and what attention pooling adds to the shift."""
        if isinstance(self.readout, TokenReadOut):
            return self.readout.virtual_token(last), 0.0
        with refused(self.model):
            times = f"{len(calls)} times, expected once"
            require(len(calls) == 1, f"its pooling called F.scaled_dot_product_attention {times}")
        return self.readout.virtual_tokens(last, calls[0], pool)


class PooledFamily(Family):
    """A tower that reads out several tokens, by a mean or by attention.

    Their weights depend on the last layer, so what is written on all of them is kept until then.
    """

    def in_parts(self, function: Callable, images: Tensor, kept: int) -> list:
        """The function of parts of a batch. At most KEPT_BYTES are kept of a part, `kept` numbers a token."""
        rows, columns = self.grid(images)
        size = len(self.W_O) * (self.prefix + rows * columns) * kept * max(4, images.element_size())
        parts = min(len(images), math.ceil(len(images) * size / KEPT_BYTES))
        return [function(part) for part in images.tensor_split(parts)]

    def watch_tokens(
        self, images: Tensor, virtual_of: Callable
    ) -> tuple[Written, VirtualTokens, Tensor | float]:
        """What was written on the virtual tokens; virtual_of(last residual, calls, pool) says which."""
        z, scales, b_O, mlps = [], [], [], []  # L x [b, T, H e], [b, T], [b, T, D] or [1, 1, D], [b, T, D]

        def at_block(layer: int, call: Call, normed: Tensor | None) -> None:
            z.append(upcast(call.out[:, :, self.readout.targets]).transpose(1, 2).flatten(2))
            scale, bias = self.parts[layer].heads.scale_and_bias(z[-1], normed)
            scales.append(scale)
            b_O.append(bias)

        embedding, stem, last, *pooling = self.run_blocks(images, at_block, mlps.append)
        with torch.autocast(images.device.type, enabled=False):
            virtual, shift = virtual_of(last, *pooling)
            w = virtual.weights
            z = torch.stack([(w * s[:, None]) @ x for x, s in zip(z, scales, strict=True)], dim=2)
            b_O, mlps = (torch.stack([virtual.mix(x) for x in written], dim=2) for written in (b_O, mlps))
            z = z.unflatten(3, (len(self.W_O[0]), -1))  # [b, r, L, H, e]
            parts = (w @ stem, z, b_O, mlps, w @ last)
            stem, z, b_O, mlps, last = (x.transpose(0, 1).flatten(0, 1) for x in parts)
        return Written(embedding, stem, z, None, b_O, mlps, last), virtual, shift

    def watch(self, images: Tensor, at_attention: Callable | None = None, layers: Sequence = ()) -> Written:
        """As ClipTower's, for the plain mean of the tokens; diagnose.py needs it."""

        def mean(last: Tensor, *_: object) -> tuple:
            return VirtualTokens(torch.full_like(last[:, None, :, 0], 1 / last.shape[1]), None), 0.0

        return self.watch_tokens(images, mean)[0]

    def terms(self, images: Tensor, convention: str) -> Decomposition:
        """The decomposition: the sum of those of the virtual tokens."""

        def of_part(images: Tensor) -> Decomposition:
            x, virtual, shift = self.watch_tokens(images, self.virtual_tokens)
            with torch.autocast(images.device.type, enabled=False):
                terms = core.terms_of(x, self.W_O, virtual.out, "term")
                if virtual.up is None:
                    return terms
                names = ("stem", "heads", "mlps", "constant")
                stem, heads, mlps, constant = (virtual.lift(getattr(terms, name)) for name in names)
                constant = constant + shift
                return Decomposition(x.embedding, stem, heads, mlps, constant, heads, None, virtual.pool)

        H, e, D = self.W_O[0].shape
        fields = zip(*(vars(x).values() for x in self.in_parts(of_part, images, H * e + D)), strict=True)
        return Decomposition(*(None if x[0] is None else torch.cat(x) for x in fields))

    def head_maps(self) -> Tensor:
        """[L, H, e, d]; under attention pooling a head's values are its term."""
        if isinstance(self.readout, TokenReadOut):
            return super().head_maps()
        return torch.eye(self.width).to(self.W_O[0]).expand(len(self.W_O), len(self.W_O[0]), -1, -1)

    def scores(self, images: Tensor, texts: Tensor, convention: str, layers: list, by_head=True) -> Tensor:
        """As ClipTower's."""

        def of_part(images: Tensor) -> Tensor:
            kept, found = {}, {}

            def at_block(layer: int, call: Call, normed: Tensor | None) -> None:
                if layer in layers:
                    z = upcast(call.out[:, :, self.readout.targets]).transpose(1, 2).flatten(2)
                    kept[layer] = call, self.parts[layer].heads.scale_and_bias(z, normed)[0]

            _, _, *ends = self.run_blocks(images, at_block, lambda x: None)
            with torch.autocast(images.device.type, enabled=False):
                virtual, _ = self.virtual_tokens(*ends)
                r = virtual.weights.shape[1]
                weights = virtual.weights / virtual.out.sigma.view(r, -1, 1).transpose(0, 1)
                texts_up = texts.T if virtual.up is None else virtual.up @ texts.T  # [r, e, t]
                directions = (virtual.out.G @ texts_up).view(r, -1, len(texts))  # [r, D, t]
                directions = directions.movedim(0, 1).flatten(1)  # [D, r t]
                for layer, (call, scale) in kept.items():
                    A = self.mixed_attention(call, weights * scale[:, None])  # [b, H, r, N]
                    by_row = (upcast(call.v) @ (self.W_O[layer] @ directions)).unflatten(3, (r, -1))
                    scores = einsum("bHrN,bHNrt->bHNt", A, by_row)
                    found[layer] = scores if by_head else scores.sum(dim=1, keepdim=True)
                return torch.stack([found[layer] for layer in layers], dim=1)

        H, e, _ = self.W_O[0].shape
        return torch.cat(self.in_parts(of_part, images, 3 * H * e))

    def mixed_attention(self, call: Call, weights: Tensor) -> Tensor:
        """[b, H, r, N] the attention of the virtual tokens that these weights [b, r, T] make."""
        A, count = 0.0, weights.shape[2]
        start = call.q.shape[2] - count
        for first in range(0, count, QUERIES):
            part = call.attention(slice(start + first, start + min(first + QUERIES, count)))
            A = A + weights[:, None, :, first : first + QUERIES] @ part
        return A


# Which tower a model has.

REFUSED = {
    "ModifiedResNet": "a ResNet has convolutions, not a residual stream of attention heads",
    "ResNet": "a ResNet has convolutions, not a residual stream of attention heads",
    "ConvNeXt": "a ConvNeXt has convolutions, not a residual stream of attention heads",
    "FastVit": "a FastViT mixes tokens by convolutions in most stages, which share no residual stream",
    "SwinTransformer": "a Swin merges tokens between stages, which do not share one residual stream",
}


@contextmanager
def refused(model: nn.Module, where: str = "") -> Iterator[None]:
    """While open, a DecompositionError gets the name of the model's tower."""
    try:
        yield
    except (DecompositionError, NotImplementedError) as error:
        visual = getattr(model, "visual", None)
        trunk = f" ({type(visual.trunk).__name__})" if hasattr(visual, "trunk") else ""
        kind = getattr(model, "kind", type(model).__name__)  # huggingface.py's views have a kind
        name = f"cannot decompose {kind} with image tower {type(visual).__name__}{trunk}: "
        raise DecompositionError(f"{name}{where}" + str(error).removeprefix(name)) from None


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


def family_of(
    model: nn.Module, blocks: list[Block], readout: TokenReadOut | AttentionPooling, prefix: int
) -> Family:
    """A Family where the class token alone is read out, else a PooledFamily."""
    single = isinstance(readout, TokenReadOut) and readout.targets == slice(0, 1)
    return (Family if single else PooledFamily)(model, blocks, readout, prefix)


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
