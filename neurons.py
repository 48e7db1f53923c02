"""An MLP's term of decompose.py, split by neuron; and a head's term, split by who wrote what the head read.

The MLP writes sum over neurons j of a_j W_j, + bias, onto the residual stream. a_j is neuron j's activation,
W_j its row of the out-projection. (A gated MLP's neuron is the product of its two halves.) So neuron j's term
is a_j W_j G / sigma in the names of decompose.py, which has to be beside this file; and families.py, for the
models that it takes. MIT licence, (c) 2026 The TextSpan reference authors.

That is the direct effect. What is written on any token also reaches the embedding through the heads after it,
which read LayerNorm(x) of every token. With their attention A and the norms' divisors s held fixed at their
values from this forward pass, a head's term is linear in x, which is the sum of all that was written before:
    term = sum over tokens N of A[N] x[N] / s[N] V W_O G / sigma + constant    V = (I - 11'/D) diag(gamma) W_V
`second_order` takes one MLP's part of x, for all later heads; `writers` takes all parts, for one head. Paths
through two heads, through queries and keys, or through a later MLP are not followed.

Axes as in decompose.py, and n neurons of one MLP, r virtual tokens (see families.py) or heads after an MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn

try:
    from . import decompose as core
except ImportError:  # not in a package
    import decompose as core

KEPT_BYTES = 1e9  # of what `writers` keeps of a batch until it knows the head's attention; more is split


@dataclass(frozen=True, repr=False)
class Neurons:
    """The term of one layer's MLP, split by neuron: neuron j adds activations[:, j] times maps[j].

    The factors are kept, not the products: [b, n, d] takes d times the memory. Every pooling head, and every
    later head of `second_order`, reads a neuron in its own way: one more axis r, and maps in two factors.
    """

    embedding: Tensor  # [b, d] what model.encode_image returned, in the model's own precision
    term: Tensor  # [b, d] the MLP's term as a whole, from what it wrote
    activations: Tensor  # [b, n] or [b, r, n], divided by the norms on the way to the embedding
    maps: Tensor  # [n, d] or [r, n, e]: the same for all images
    constant: Tensor  # [b, d] what belongs to no neuron: the out-projection's bias, beta of norms around it
    up: Tensor | None = None  # [r, e, d] the maps' second factor, where there is one

    def terms(self) -> Tensor:
        """[b, n, d] what each neuron adds to the embedding."""
        if self.up is None:
            return self.activations[:, :, None] * self.maps
        return einsum("brn,rne,red->bnd", self.activations, self.maps, self.up)

    def total(self) -> Tensor:
        """[b, d] the sum of all neurons and the constant."""
        with torch.autocast(self.maps.device.type, enabled=False):
            if self.up is None:
                return self.activations @ self.maps + self.constant
            return einsum("brn,rne,red->bd", self.activations, self.maps, self.up) + self.constant

    def error(self) -> float:
        """max |total - term| / max |term|; NaN if either holds a NaN or the MLP writes nothing."""
        return float((self.total() - self.term).abs().max() / self.term.abs().max())

    __repr__ = core.Decomposition.__repr__


@torch.no_grad()
def neurons(model: nn.Module, images: Tensor, layer: int) -> Neurons:
    """Split the term of one layer's MLP, decompose(model, images).mlps[:, layer], by neuron.

    Args:
        model, images: as for `decompose`; convention "term".
        layer: 0 is the first, negative ones count from the end.

    Raises:
        DecompositionError: as `decompose`, and an MLP of another kind; the message names what it lacks.
        ValueError: a layer that the model does not have.
    """
    tower = core.open_tower(model, images=images)
    layer = index("layer", layer, len(tower.blocks))
    if type(tower) is not core.ClipTower:
        return Neurons(*tower.neurons(images, layer))
    try:
        return of_clip(tower, images, layer)
    except core.DecompositionError:
        native_tower = core.beside("families", "native_tower")  # knows more MLPs, and names the rest
        if native_tower is None:
            raise
    return Neurons(*native_tower(model).neurons(images, layer))


def of_clip(tower: core.ClipTower, images: Tensor, layer: int) -> Neurons:
    """The neurons of a class-token CLIP."""
    block, kept, (W, bias) = tower.blocks[layer], {}, out_projection(tower, layer)

    def keep(name: str, module: nn.Module, args: tuple, *output: Tensor) -> None:
        kept[name] = tower.token(output[0] if output else args[0])

    hooks = [(block.mlp.c_proj.register_forward_pre_hook, partial(keep, "activations"))]
    hooks.append((getattr(block, "ls_2", block.mlp).register_forward_hook, partial(keep, "written")))
    hooks.append((tower.blocks[-1].register_forward_hook, partial(keep, "last")))
    embedding = core.image_embedding(tower.model, images, hooks)
    with torch.autocast(images.device.type, enabled=False):
        out = tower.read_out(kept["last"], "term")
        term, constant = out.read(kept["written"]), out.read(bias[None])
        return Neurons(embedding, term, kept["activations"] / out.sigma, W @ out.G, constant)


@torch.no_grad()
def second_order(model: nn.Module, images: Tensor, layer: int) -> Neurons:
    """What one MLP adds to the terms of all heads after it, split by neuron.

    These are the second-order effects of Gandelsman et al., https://arxiv.org/abs/2406.04341. (Their code
    forms [b, N, n, D] for each head, and divides biases and means over the neurons.)

    Args: as for `neurons`; the model must be a CLIP that reads out its class token.

    Returns:
        Neurons whose rows r are the later heads, the first layer's first. Activations are sums over tokens of
        A / s times a neuron's activation, over sigma; maps are W_j V, and up is W_O G. term and constant are
        what the MLP as a whole, and its bias, add to the terms of these heads, all together.

    Raises:
        DecompositionError: a model of another family, an MLP of another kind; the message names it.
        ValueError: a layer that the model does not have, or the last, which no head reads.
    """
    tower = class_token_tower(model, images)
    layer = index("layer", layer, len(tower.blocks))
    block, later = tower.blocks[layer], range(layer + 1, len(tower.blocks))
    if not later:
        raise ValueError(f"layer must be before the last, {layer}: no head reads what its MLP writes")
    W, bias = out_projection(tower, layer)
    sources = {"mlp": (getattr(block, "ls_2", block.mlp).register_forward_hook, None)}
    sources["activations"] = (block.mlp.c_proj.register_forward_pre_hook, None)
    w, read = as_heads_read(tower, images, later, sources)
    with torch.autocast(images.device.type, enabled=False):
        out = tower.read_out(w.last, "term")
        V = torch.cat([value_maps(tower, i)[0] for i in later])  # [r, D, e]
        up = torch.cat([tower.W_O[i] @ out.G for i in later])
        read = {name: x / out.sigma[:, None] for name, x in read.items()}
        term, constant = (einsum("brD,rDe,red->bd", x, V, up) for x in (read["mlp"], read["share"] * bias))
        return Neurons(w.embedding, term, read["activations"], W @ V, constant, up)


@torch.no_grad()
def writers(model: nn.Module, images: Tensor, layer: int, head: int) -> core.Decomposition:
    """One head's term, decompose(model, images).heads[:, layer, head], split by who wrote what the head read.

    Arguments and errors are those of `second_order`, and a head, counted like layers. A large batch is split.

    Returns:
        A Decomposition with the head's term in the place of the embedding: into stem, heads and MLPs of the
        layers before. The constant is due to their output biases, beta of the head's norm, and its own b_V.
    """
    tower = class_token_tower(model, images)
    layer, head = index("layer", layer, len(tower.blocks)), index("head", head, len(tower.W_O[0]))
    size = 2 * layer * (1 + math.prod(tower.grid(images))) * len(tower.norm.weight) * max(4, images.itemsize)
    if len(images) > 1 and len(images) * size > KEPT_BYTES:
        found = [vars(writers(model, part, layer, head)).values() for part in images.chunk(2)]
        return core.Decomposition(*(x[0] if x[0] is None else torch.cat(x) for x in zip(*found, strict=True)))
    sources = {"stem": (tower.blocks[0].register_forward_pre_hook, None)}
    for i, block in enumerate(tower.blocks[:layer]):
        sources["z", i] = (block.attn.register_forward_pre_hook, all_values)
        sources["mlp", i] = (getattr(block, "ls_2", block.mlp).register_forward_hook, None)
    w, read = as_heads_read(tower, images, [layer], sources)
    with torch.autocast(images.device.type, enabled=False):
        out, (V, b_V) = tower.read_out(w.last, "term"), value_maps(tower, layer)
        up, read = tower.W_O[layer][head] @ out.G, {name: x[:, head] / out.sigma for name, x in read.items()}
        M, shape = V[head] @ up, w.z[:, :1].shape  # [D, d], [b, 1, H, e]
        stream = torch.stack([read["stem"], *(read["mlp", i] for i in range(layer))], dim=1) @ M
        values = torch.cat([w.z[:, :0], *(read["z", i].view(shape) for i in range(layer))], dim=1)
        heads = einsum("blHe,lHed->blHd", values, torch.stack(tower.W_O)[:layer] @ M)
        constant = read["share"] * torch.stack(tower.b_O)[:layer].sum(dim=0) @ M + b_V[head] @ up / out.sigma
        term = w.z[:, layer, head] @ up / out.sigma
        return core.Decomposition(term, stream[:, 0], heads, stream[:, 1:], constant, values)


def as_heads_read(tower: core.ClipTower, images: Tensor, layers: Sequence, sources: dict) -> tuple:
    """Run the model; mix what modules take or give over the tokens as the heads of these layers do, by A / s.

    sources: {name: (a module's register_..., None or a function(module, x) to mix in place of x [b, N, D])}.
    Returns what `watch` does, and {name: [b, r, D]}; under "share" the sum of the weights, [b, r, 1].
    """
    kept, mixed = {}, {name: [] for name in ("share", *sources)}

    def keep(name: object, function: Callable | None, module: nn.Module, args: tuple, *out: Tensor) -> None:
        x = core.upcast(out[0] if out else args[0])
        x = x if tower.batch_first else x.transpose(0, 1)
        kept[name] = x if function is None else function(module, x)

    def at_attention(layer: int, A: Tensor, v_times: Callable) -> None:
        s = (kept["x"].var(dim=2, correction=0) + tower.blocks[layer].ln_1.eps).sqrt()  # [b, N]
        kept["share"] = torch.ones_like(s)[..., None]
        for name, parts in mixed.items():
            parts.append(A / s[:, None] @ kept[name])

    norms = [("x", (tower.blocks[layer].ln_1.register_forward_pre_hook, None)) for layer in layers]
    tower.hooks = [(at, partial(keep, name, function)) for name, (at, function) in (*sources.items(), *norms)]
    w = tower.watch(images, at_attention, layers)
    return w, {name: torch.cat(parts, dim=1) for name, parts in mixed.items()}


def class_token_tower(model: nn.Module, images: Tensor) -> core.ClipTower:
    """The model's tower, if its heads read the stream through ln_1, and its class token is read out."""
    tower = core.open_tower(model, images=images)
    if type(tower) is core.ClipTower and all(isinstance(block.ln_1, nn.LayerNorm) for block in tower.blocks):
        return tower
    found = f"{type(model).__name__} with image tower {type(tower.model.visual).__name__} ({tower.name})"
    expected = "expected the blocks of CLIP and its class token"
    raise core.DecompositionError(f"cannot follow what heads read in {found}: {expected}")


def index(name: str, given: int, count: int) -> int:
    """A layer or head, counted from 0, or from the end where negative."""
    if not isinstance(given, int) or not -count <= given < count:
        raise ValueError(f"{name} must be between {-count} and {count - 1}, got {given!r}")
    return given % count


def out_projection(tower: core.ClipTower, layer: int) -> tuple[Tensor, Tensor]:
    """[n, D] what each neuron of a CLIP's MLP writes per unit of its activation, and the bias [D]."""
    block = tower.blocks[layer]
    steps = {name: x for name, x in block.mlp.named_children() if not isinstance(x, nn.Identity)}
    if list(steps) != ["c_fc", "gelu", "c_proj"] or not isinstance(steps["c_proj"], nn.Linear):
        found = f"is {', '.join(steps)}; expected c_fc, gelu, c_proj"
        raise core.DecompositionError(f"the MLP of block {layer} {found}")
    W, bias = core.upcast(block.mlp.c_proj.weight).T, block.mlp.c_proj.bias
    gain = core.upcast(getattr(getattr(block, "ls_2", None), "gamma", torch.ones_like(W[0])))
    return W * gain, gain * (0 if bias is None else core.upcast(bias))


def value_maps(tower: core.ClipTower, layer: int) -> tuple[Tensor, Tensor]:
    """V [H, D, e] from x / s to the values of a layer's heads; what beta and b_V add to them [H, e]."""
    norm, attn = tower.blocks[layer].ln_1, tower.blocks[layer].attn
    W_V, b_V = core.upcast(attn.in_proj_weight).chunk(3)[2], core.upcast(attn.in_proj_bias).chunk(3)[2]
    V, constant = W_V * core.upcast(norm.weight), b_V + W_V @ core.upcast(norm.bias)
    V, constant = (x.unflatten(0, (attn.num_heads, -1)) for x in (V - V.mean(dim=1, keepdim=True), constant))
    return V.mT, constant


def all_values(attn: nn.MultiheadAttention, y: Tensor) -> Tensor:
    """[b, N, H e] the z of every token."""
    qkv = F.linear(y, core.upcast(attn.in_proj_weight), core.upcast(attn.in_proj_bias))
    qkv = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, b, H, N, e]
    return F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
