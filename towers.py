"""The forward pass of a vision transformer of any family, recorded, for families.py.

`Family` is a tower that reads out its class token as CLIP's do, from other blocks or through other norms, and
`PooledFamily` one that reads out several tokens. One forward pass serves both: what is written on the tokens
is kept until their weights are known, which depend on the last layer.

This file needs torch, and decompose.py, attention.py, blocks.py and readouts.py beside it.
MIT licence, (c) 2026 The TextSpan reference authors.

Axes as in readouts.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, einsum, nn

try:
    from . import decompose as core
    from .attention import Call, attention_calls
    from .blocks import Block, require
    from .readouts import AttentionPooling, TokenReadOut, VirtualTokens
except ImportError:  # not in a package
    import decompose as core
    from attention import Call, attention_calls
    from blocks import Block, require
    from readouts import AttentionPooling, TokenReadOut, VirtualTokens

ClipTower, ReadOut, Written, upcast = core.ClipTower, core.ReadOut, core.Written, core.upcast
Decomposition, DecompositionError = core.Decomposition, core.DecompositionError

KEPT_BYTES = 1e9  # of what is kept of a batch until the weights are known; larger batches are split
QUERIES = 64  # whose attention is formed at a time: never [N, N] of all tokens


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


def family_of(
    model: nn.Module, blocks: list[Block], readout: TokenReadOut | AttentionPooling, prefix: int
) -> Family:
    """A Family where the class token alone is read out, else a PooledFamily."""
    single = isinstance(readout, TokenReadOut) and readout.targets == slice(0, 1)
    return (Family if single else PooledFamily)(model, blocks, readout, prefix)
