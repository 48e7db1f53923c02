"""Where a decomposition goes wrong that does not sum to the embedding; decompose() calls it for its message.

It needs torch, and decompose.py beside it. MIT licence, (c) 2026 The TextSpan reference authors.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, einsum, nn

if TYPE_CHECKING:
    from decompose import ClipTower, Decomposition


def culprit(terms: Decomposition, tower: ClipTower, images: Tensor, tolerance: float) -> str:
    """The end of an error message: both norms, and the block that does not add up. Runs the model again."""
    total, embedding = terms.total().norm(), terms.embedding.to(terms.stem.dtype).norm()
    norms = f"; norm of the sum {total:.6g}, norm of the embedding {embedding:.6g}; "
    attention, stream = [], []  # L x [b, D], L + 1 x [b, D]
    before, changed = [weights(block) for block in tower.blocks], [set() for _ in tower.blocks]

    def after_attention(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        attention.append(tower.token(output[0] if isinstance(output, tuple) else output))

    def before_block(module: nn.Module, args: tuple) -> None:
        stream.append(tower.token(args[0]))

    def before_part(i: int, module: nn.Module, args: tuple) -> None:  # an adapter may be at work now
        now = weights(tower.blocks[i])
        changed[i].update(name for name, number in before[i].items() if now.get(name) != number)

    tower.hooks = [(module.register_forward_hook, after_attention) for module in tower.attentions]
    tower.hooks += [(block.register_forward_pre_hook, before_block) for block in tower.blocks]
    for i, block in enumerate(tower.blocks):
        hook = partial(before_part, i)
        tower.hooks += [(part.register_forward_pre_hook, hook) for part in block.modules()]
    x = tower.watch(images)
    stream.append(x.last)
    if not x.stem.isfinite().all():
        first = "the embedding of patches and positions"
        return norms + f"{first} is the first to write something that is not a number"
    gaps = []
    for i, W_O in enumerate(tower.W_O):
        with torch.autocast(images.device.type, enabled=False):
            heads = einsum("bHe,HeD->bD", x.z[:, i], W_O) + x.b_O[:, i]
        # The heads are checked, too: a fused kernel of attention can hide a NaN.
        if not (stream[i + 1].isfinite().all() and heads.isfinite().all()):
            return norms + f"block {i} is the first to write something that is not a number"
        floor = 1e-12 * x.stem.norm()  # an attention may write nothing
        written, added = attention[i], stream[i + 1] - stream[i]
        gap = (heads - written).norm() / written.norm().clamp_min(floor)
        gaps.append((float(gap), i, "its heads differ from what its attention wrote"))
        gap = (added - written - x.mlps[:, i]).norm() / added.norm().clamp_min(floor)
        gaps.append((float(gap), i, "its attention and MLP differ from what it added to the stream"))
    gap, i, where = max(gaps)
    if gap < tolerance:
        return norms + "every block adds up, so the difference arises in the read-out after them"
    found = f"largest gap in block {i}: {where} by {gap:.1e} of its norm"
    hint = "merge what changes them (LoRA, say) into the weights"
    names = ", ".join(sorted(changed[i]))
    return norms + found + (f"; while the model runs, {names} holds other numbers: {hint}" if names else "")


def weights(block: nn.Module) -> dict[str, float]:
    """Of each weight a number that another one would not have."""
    return {name: float(x.detach().norm()) for name, x in block.named_parameters()}
