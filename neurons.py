"""An MLP's term of decompose.py, split by neuron.

The MLP writes sum over neurons j of a_j W_j, + bias, onto the residual stream. a_j is neuron j's activation,
W_j its row of the out-projection. (A gated MLP's neuron is the product of its two halves.) So neuron j's term
is a_j W_j G / sigma in the names of decompose.py, which has to be beside this file; and families.py, for the
models that it takes. MIT licence, (c) 2026 The TextSpan reference authors.

Axes as in decompose.py, and n neurons of one MLP, r virtual tokens (see families.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

try:
    from . import decompose as core
except ImportError:  # not in a package
    import decompose as core


@dataclass(frozen=True, repr=False)
class Neurons:
    """The term of one layer's MLP, split by neuron: neuron j adds activations[:, j] times maps[j].

    The factors are kept, not the products: [b, n, d] takes d times the memory. Under attention pooling every
    pooling head reads a neuron in its own way: one more axis r, and the maps in two factors.
    """

    embedding: Tensor  # [b, d] what model.encode_image returned, in the model's own precision
    term: Tensor  # [b, d] the MLP's term as a whole, from what it wrote
    activations: (
        Tensor  # [b, n] or [b, r, n], past the nonlinearity, divided by the norms on the way to the embedding
    )
    maps: Tensor  # [n, d] or [r, n, e]: the same for all images
    constant: (
        Tensor  # [b, d] what belongs to no neuron: the out-projection's bias, and beta of the norms around it
    )
    up: Tensor | None = None  # [r, e, d] the maps' second factor, where there is one

    def terms(self) -> Tensor:
        """[b, n, d] what each neuron adds to the embedding."""
        if self.up is None:
            return self.activations[:, :, None] * self.maps
        return torch.einsum("brn,rne,red->bnd", self.activations, self.maps, self.up)

    def total(self) -> Tensor:
        """[b, d] the sum of all neurons and the constant."""
        with torch.autocast(self.maps.device.type, enabled=False):
            if self.up is None:
                return self.activations @ self.maps + self.constant
            return torch.einsum("brn,rne,red->bd", self.activations, self.maps, self.up) + self.constant

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
    depth = len(tower.blocks)
    if not isinstance(layer, int) or not -depth <= layer < depth:
        raise ValueError(f"layer must be between {-depth} and {depth - 1}, got {layer!r}")
    if type(tower) is not core.ClipTower:
        return of_family(tower, images, layer % depth)
    steps = [(name, isinstance(step, nn.Linear)) for name, step in tower.blocks[layer].mlp.named_children()]
    if steps == [("c_fc", True), ("gelu", False), ("c_proj", True)]:
        return of_clip(tower, images, layer % depth)
    native_tower = core.beside("families", "native_tower")  # it takes more MLPs, and refuses the rest by name
    if native_tower is None:
        found = ", ".join(name for name, _ in steps)
        raise core.DecompositionError(
            f"the MLP of block {layer % depth} is {found}; expected c_fc, gelu, c_proj"
        )
    return of_family(native_tower(model), images, layer % depth)


def of_clip(tower: core.ClipTower, images: Tensor, layer: int) -> Neurons:
    """Of CLIP's class token."""
    block, kept = tower.blocks[layer], {}
    mlp = getattr(block, "ls_2", block.mlp)  # LayerScale, where there is one
    hooks = [
        (block.mlp.c_proj.register_forward_pre_hook, partial(keep, kept, "activations", tower.token)),
        (mlp.register_forward_hook, partial(keep, kept, "written", tower.token)),
        (tower.blocks[-1].register_forward_hook, partial(keep, kept, "last", tower.token)),
    ]
    embedding = core.image_embedding(tower.model, images, hooks)
    with torch.autocast(images.device.type, enabled=False):
        out = tower.read_out(kept["last"], "term")
        W, bias = core.upcast(block.mlp.c_proj.weight).T, block.mlp.c_proj.bias  # [n, D], [D]
        gain = core.upcast(getattr(mlp, "gamma", torch.ones_like(W[0])))
        bias = torch.zeros_like(W[0]) if bias is None else core.upcast(bias)
        term, constant = out.read(kept["written"]), out.read((bias * gain)[None])
        return Neurons(embedding, term, kept["activations"] / out.sigma, (W * gain) @ out.G, constant)


def of_family(tower: Any, images: Tensor, layer: int) -> Neurons:
    """Of the tokens that a tower of families.py reads out."""
    way_out, kept = tower.mlp_way_out(layer), {}
    reader = way_out.linear if way_out.inner is None else way_out.inner
    mlp = tower.parts[layer].mlp_written
    tower.hooks = [
        (reader.register_forward_pre_hook, partial(keep, kept, "activations", tower.targets)),
        (mlp.register_forward_hook, partial(keep, kept, "written", tower.targets)),
    ]
    if way_out.outer is not None:
        before_norm = way_out.outer.register_forward_pre_hook
        tower.hooks.append((before_norm, partial(keep, kept, "normed", tower.targets)))
    embedding, _, *ends = tower.see(images, lambda *_: None, lambda *_: None)
    with torch.autocast(images.device.type, enabled=False):
        virtual, _ = tower.freeze(*ends)
        weights, out = virtual.weights, virtual.out  # [b, r, T]
        scale, bias = way_out.freeze(kept["activations"], kept.get("normed"))
        sigma = out.sigma.view(weights.shape[1], -1, 1).transpose(0, 1)  # [b, r, 1]
        activations = (weights * scale[:, None]) @ kept["activations"] / sigma  # [b, r, n]
        mixed = (virtual.mix(x).transpose(0, 1).flatten(0, 1) for x in (kept["written"], bias))
        term, constant = (virtual.lift(out.read(x)) for x in mixed)
        maps = way_out.maps() @ out.G  # [n, d] or [r, n, e]
    activations = activations[:, 0] if virtual.up is None else activations
    return Neurons(embedding, term, activations, maps, constant, virtual.up)


def keep(kept: dict, name: str, pick: Callable, module: nn.Module, args: tuple, *output: Tensor) -> None:
    """A hook: keep what is picked of a module's output, or of its input before it runs."""
    kept[name] = pick(output[0] if output else args[0])
