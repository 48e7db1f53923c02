"""How vision transformers read their tokens out into an embedding, for towers.py and families.py.

A virtual token is a weighted mean of tokens T, x = sum over T of w_T x_T, where the weights sum to one. Once
norms and attention are held fixed at their values from this forward pass, every read-out is linear in it:

* A class token is its own mean. A mean of tokens reads out one virtual token; with a LayerNorm before the
  mean, w_T is proportional to 1 / sigma_T, and sigma is the harmonic mean of the tokens' sigmas.
* Attention pooling is a sum of such read-outs, one for each of its heads.

So decompose.py's formulas hold for every virtual token. This file needs torch, and decompose.py, attention.py
and blocks.py beside it. MIT licence, (c) 2026 The TextSpan reference authors.

Axes as in decompose.py, and T tokens that are read out, r virtual tokens, q queries and p heads of a pooling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, einsum, nn

try:
    from .attention import Call
    from .blocks import divisor, gamma_beta, through_norm
    from .decompose import ReadOut, upcast
except ImportError:  # not in a package
    from attention import Call
    from blocks import divisor, gamma_beta, through_norm
    from decompose import ReadOut, upcast


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
