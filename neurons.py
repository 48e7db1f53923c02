"""An MLP's term of decompose.py, split by neuron.

The MLP writes sum over neurons j of a_j W_j, + bias, onto the residual stream: a_j is the neuron's activation and
W_j its row of the out-projection. (A gated MLP's neuron is the product of its two halves.) So neuron j's term is
a_j W_j G / sigma, in the names of decompose.py, which has to be beside this file; families.py, too, for models that
it takes. MIT licence, (c) 2026 The TextSpan reference authors.

Axes as in decompose.py, and n neurons of one MLP, r virtual tokens (see families.py).
"""

from __future__ import annotations

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
    """The term of one layer's MLP, split by neuron: neuron j adds activations[:, j] times maps[j] to the embedding.

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
    tower = core.open_tower(model, images)
    depth, families = len(tower.blocks), core.beside("families")
    if not isinstance(layer, int) or not -depth <= layer < depth:
        raise ValueError(f"layer must be between {-depth} and {depth - 1}, got {layer!r}")
    if type(tower) is not core.ClipTower:
        return of_family(tower, images, layer % depth)
    steps = [(name, isinstance(step, nn.Linear)) for name, step in tower.blocks[layer].mlp.named_children()]
    if steps == [("c_fc", True), ("gelu", False), ("c_proj", True)]:
        return of_clip(tower, images, layer % depth)
    if families is None:
        found = ", ".join(name for name, _ in steps)
        raise core.DecompositionError(
            f"the MLP of block {layer % depth} is {found}; expected c_fc, gelu, c_proj"
        )
    with families.refused(model):
        return of_family(families.native_tower(model), images, layer % depth)


def of_clip(tower: core.ClipTower, images: Tensor, layer: int) -> Neurons:
    """Of CLIP's class token."""
    block, kept = tower.blocks[layer], {}

    def keep(name: str, module: nn.Module, args: tuple, *output: Tensor) -> None:
        kept[name] = tower.token(output[0] if output else args[0])

    hooks = [
        (block.mlp.c_proj.register_forward_pre_hook, partial(keep, "activations")),
        (getattr(block, "ls_2", block.mlp).register_forward_hook, partial(keep, "written")),
        (tower.blocks[-1].register_forward_hook, partial(keep, "last")),
    ]
    embedding = core.image_embedding(tower.model, images, hooks)
    with torch.autocast(images.device.type, enabled=False):
        out = tower.read_out(kept["last"], "term")
        W, bias = core.upcast(block.mlp.c_proj.weight).T, block.mlp.c_proj.bias  # [n, D], [D]
        bias = torch.zeros_like(W[0]) if bias is None else core.upcast(bias)
        layer_scale = getattr(getattr(block, "ls_2", None), "gamma", None)
        if layer_scale is not None:
            W, bias = W * core.upcast(layer_scale), bias * core.upcast(layer_scale)
        term, constant = out.read(kept["written"]), out.read(bias[None])
        return Neurons(embedding, term, kept["activations"] / out.sigma, W @ out.G, constant)


def of_family(tower: Any, images: Tensor, layer: int) -> Neurons:
    """Of the tokens that a tower of families.py reads out."""
    families, kept = core.beside("families"), {}
    with families.refused(tower.model, f"the MLP of block {layer} "):
        way_out = tower.parts[layer].mlp()
    first = way_out.linear if way_out.inner is None else way_out.inner  # what reads the neurons
    tower.hooks = [(first.register_forward_pre_hook, lambda _, args: kept.update(h=tower.targets(args[0])))]
    if way_out.outer is not None:
        register = way_out.outer.register_forward_pre_hook
        tower.hooks.append((register, lambda _, args: kept.update(normed=tower.targets(args[0]))))
    seen = tower.see(images)
    with torch.autocast(images.device.type, enabled=False):
        tokens, _, _ = tower.virtual(seen)
        weights = torch.stack([token.weights for token in tokens], dim=1)  # [b, r, T]
        scale, bias = way_out.freeze(kept["h"], kept.get("normed"))
        sigma = torch.stack([token.out.sigma for token in tokens], dim=1)  # [b, r, 1]
        activations = (weights * scale[:, None]) @ kept["h"] / sigma  # [b, r, n]
        maps = torch.stack([way_out.maps() @ token.out.G for token in tokens])  # [r, n, e]
        up = None if tokens[0].up is None else torch.stack([token.up for token in tokens])  # [r, e, d]
        terms = []
        for written in (seen.mlps[layer], bias):
            rows = families.mix(weights, written).unbind(dim=1)  # r x [b, D]
            read = [token.out.read(x) for token, x in zip(tokens, rows, strict=True)]
            terms.append(
                read[0] if up is None else sum(x @ token.up for x, token in zip(read, tokens, strict=True))
            )
    if up is None:
        activations, maps = activations[:, 0], maps[0]
    return Neurons(seen.embedding, terms[0], activations, maps, terms[1], up)
