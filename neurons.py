"""An MLP's term of decompose.py, split by neuron.

The MLP writes sum over neurons j of a_j W_j, + bias, onto the residual stream. a_j is neuron j's activation,
W_j its row of the out-projection. (A gated MLP's neuron is the product of its two halves.) So neuron j's term
is a_j W_j G / sigma in the names of decompose.py, which has to be beside this file; and families.py, for the
models that it takes. MIT licence, (c) 2026 The TextSpan reference authors.

Axes as in decompose.py, and n neurons of one MLP, r virtual tokens (see families.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

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
    activations: Tensor  # [b, n] or [b, r, n], divided by the norms on the way to the embedding
    maps: Tensor  # [n, d] or [r, n, e]: the same for all images
    constant: Tensor  # [b, d] what belongs to no neuron: the out-projection's bias, beta of norms around it
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
        return Neurons(*tower.neurons(images, layer % depth))
    children = tower.blocks[layer].mlp.named_children()
    steps = [(name, x) for name, x in children if not isinstance(x, nn.Identity)]
    plain = [name for name, _ in steps] == ["c_fc", "gelu", "c_proj"]
    if plain and isinstance(steps[2][1], nn.Linear):
        return of_clip(tower, images, layer % depth)
    native_tower = core.beside("families", "native_tower")  # knows more MLPs, and names the rest
    if native_tower is None:
        found = ", ".join(name for name, _ in steps)
        reason = f"the MLP of block {layer % depth} is {found}; expected c_fc, gelu, c_proj"
        raise core.DecompositionError(reason)
    return Neurons(*native_tower(model).neurons(images, layer % depth))


def of_clip(tower: core.ClipTower, images: Tensor, layer: int) -> Neurons:
    """The neurons of a class-token CLIP."""
    block, kept = tower.blocks[layer], {}
    mlp = getattr(block, "ls_2", block.mlp)  # LayerScale, where there is one

    def keep(name: str, module: nn.Module, args: tuple, *output: Tensor) -> None:
        kept[name] = tower.token(output[0] if output else args[0])

    hooks = [
        (block.mlp.c_proj.register_forward_pre_hook, partial(keep, "activations")),
        (mlp.register_forward_hook, partial(keep, "written")),
        (tower.blocks[-1].register_forward_hook, partial(keep, "last")),
    ]
    embedding = core.image_embedding(tower.model, images, hooks)
    with torch.autocast(images.device.type, enabled=False):
        out = tower.read_out(kept["last"], "term")
        W, bias = core.upcast(block.mlp.c_proj.weight).T, block.mlp.c_proj.bias  # [n, D], [D]
        gain = core.upcast(getattr(mlp, "gamma", torch.ones_like(W[0])))
        bias = torch.zeros_like(W[0]) if bias is None else core.upcast(bias)
        term, constant = out.read(kept["written"]), out.read((bias * gain)[None])
        return Neurons(embedding, term, kept["activations"] / out.sigma, (W * gain) @ out.G, constant)
