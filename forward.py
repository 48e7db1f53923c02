"""Run a model without some of its heads: what they give the class token is replaced during the forward pass.

    z = class_values(model, images)                                 # [b, L, H, e] what every head gives it
    forward_without(model, images, [(3, 0), (3, 7)], z.mean(dim=0))  # [b, d]; without a mean they give zero

Replacing a head's term by its mean (section 4 of the paper) changes the sum of terms alone: it takes out what
the head writes directly to the embedding. Here every later layer sees the change, so what the head writes
through them goes, too. The result is the embedding of another forward pass, and no longer a sum of terms of
the first. With zeros it is the intervention of Dyslexify (Hufe et al., ICLR 2026).

This file needs torch, and decompose.py and attention.py beside it (with families.py it takes EVA, too).
MIT licence, (c) 2026 The TextSpan reference authors.

Axes: b images   L layers   H heads   N tokens   e width of a head   d width of the embedding
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

try:
    from .attention import Call, attention_calls
    from .decompose import ClipTower, DecompositionError, image_embedding, open_tower
except ImportError:  # not in a package
    from attention import Call, attention_calls
    from decompose import ClipTower, DecompositionError, image_embedding, open_tower


@torch.no_grad()
def class_values(model: nn.Module, images: Tensor) -> Tensor:
    """[b, L, H, e] what every head mixes for the class token: sum over tokens of attention times value.

    Arguments and errors as for `forward_without`.
    """
    tower = _tower(model, images)
    _, calls = _run(tower, images)
    return torch.stack([call.out[:, :, 0] for call in calls[: len(tower.W_O)]], dim=1)


@torch.no_grad()
def forward_without(
    model: nn.Module, images: Tensor, heads: Collection[tuple[int, int]], values: Tensor | None = None
) -> Tensor:
    """[b, d] model.encode_image(images) where these heads give the class token something else.

    What they give the other tokens stays. The model runs once, in eval mode, and is left as it was found.

    Args:
        images: [b, 3, rows, columns] as encode_image takes them.
        heads: (layer, head) of each, both from 0.
        values: [L, H, e] what every head is to give, the mean of `class_values` say; None: zero.

    Raises:
        DecompositionError: the model has no class token that is read out, or another architecture.
        ValueError: a head that the model does not have.
    """
    tower = _tower(model, images)
    depth, width = len(tower.W_O), len(tower.W_O[0])
    unknown = [(layer, head) for layer, head in heads if not (0 <= layer < depth and 0 <= head < width)]
    if unknown:
        raise ValueError(f"no head {unknown[0]}: the model has {depth} layers of {width} heads")

    def replace(layer: int, out: Tensor) -> Tensor:
        mine = [head for at, head in heads if at == layer]
        if mine:
            out[:, mine, 0] = 0.0 if values is None else values[layer, mine].to(out)
        return out

    return _run(tower, images, replace)[0]


def _tower(model: nn.Module, images: Tensor) -> ClipTower:
    """The model's image tower; refused where what is read out is not the class token."""
    tower = open_tower(model, images=images)
    if tower.name != "class token":
        reason = f"its read-out is {tower.name}, and this replaces what the class token is given"
        raise DecompositionError(f"cannot run {type(model).__name__} without heads: {reason}")
    return tower


def _run(tower: ClipTower, images: Tensor, replace: Callable | None = None) -> tuple[Tensor, list[Call]]:
    with attention_calls(replace) as calls:
        embedding = image_embedding(tower.model, images)
    return embedding, calls
