"""Every attention of a forward pass, intercepted where open_clip, timm and torch itself call it.

    with attention_calls() as calls:
        model.encode_image(images)
    calls[0].attention()    # [b, H, N, N] of the first block, whatever its queries and keys are made of

All of them end in F.scaled_dot_product_attention with queries, keys and values, after their norms, rotary or
relative positions. The function is replaced while the context is open. This file needs torch alone.
MIT licence, (c) 2026 The TextSpan reference authors.

Axes: b images   H heads   T queries   N tokens   e width of a head
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Call:
    """One call of F.scaled_dot_product_attention."""

    q: Tensor  # [b, H, T, e]
    k: Tensor  # [b, H, N, e]
    v: Tensor  # [b, H, N, e]
    mask: Tensor | None  # added to the logits, or, where boolean, what may be attended to
    scale: float
    out: Tensor  # [b, H, T, e]

    def attention(self, queries: slice = slice(None)) -> Tensor:
        """[b, H, T, N] the attention of these queries, in float32 at least."""
        precision = torch.promote_types(self.q.dtype, torch.float32)
        logits = self.q[:, :, queries].to(precision) @ self.k.to(precision).mT * self.scale
        if self.mask is not None:
            mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., queries, :]
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(dim=-1)


_lock = threading.RLock()  # one thread at a time intercepts; threads that only run a model pass through


@contextmanager
def attention_calls(replace: Callable[[int, Tensor], Tensor] | None = None) -> Iterator[list[Call]]:
    """While open, every attention of this thread is appended to the list.

    Args:
        replace: gives what the model is to go on with, from the number of the call and its out [b, H, T, e].

    Raises:
        NotImplementedError: an attention is causal; those of image towers are not.
    """
    calls: list[Call] = []
    with _lock:
        stock, thread = F.scaled_dot_product_attention, threading.get_ident()
        fast_path = torch.backends.mha.get_fastpath_enabled()

        def record(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
            out = stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
            if threading.get_ident() == thread:
                if is_causal:
                    raise NotImplementedError("an attention is causal, which no image tower of open_clip is")
                scale = query.shape[-1] ** -0.5 if scale is None else scale
                out = out if replace is None else replace(len(calls), out)
                calls.append(Call(query, key, value, attn_mask, scale, out))
            return out

        F.scaled_dot_product_attention = record
        torch.backends.mha.set_fastpath_enabled(False)  # the fused kernel does not call the function above
        try:
            yield calls
        finally:
            F.scaled_dot_product_attention = stock
            torch.backends.mha.set_fastpath_enabled(fast_path)
