"""Take a CLIP image embedding apart: one term per attention head, per MLP, and per source token, that sum to it.

Reference: Gandelsman, Efros, Steinhardt, "Interpreting CLIP's Image Representation via Text-Based Decomposition",
https://arxiv.org/abs/2310.05916, section 3. This file and towers.py need torch alone and work on any model object with open_clip's
attributes.

    terms = decompose(model, images)      # the stock model; its own forward pass runs, hooks read along
    terms.heads                           # [b, L, H, d] what each head adds to the embedding
    terms.error()                         # max |sum of terms - embedding| / max |embedding|

How it works. A token's last residual x is a sum: stem + what every attention head and every MLP wrote onto it. In the paper's models
the class token is read out by LN, then a projection P, which is linear once LN's standard deviation sigma is taken as it was in this
forward pass:

    e = (x - mean(x)) / sigma * gamma @ P + beta @ P = x @ G / sigma + beta @ P        G = (I - 11'/D) diag(gamma) P

A head writes W_O sum_s A_s v_s, where A is its attention from the class token to the source tokens s and v their values; so its term is
that times G / sigma, and each source's part a summand of it. Other models pool their tokens, by a mean or by attention, with weights
that are frozen, too (T: the tokens that are read out, A_t their attention):

    e = sum_r (sum_t weights[r, t] x_t) @ G_r + constant       a head's term: sum_r (sum_s (weights[r] @ A)_s v_s) W_O @ G_r

Queries, keys and values are those of the forward pass itself, and no other attention than that of the tokens read out is ever made;
which is why this costs next to nothing beside the pass. The authors' code instead stores [b, layer, token, head, d]. Where the weights
depend on the last layer (attention pooling, a norm before a mean), a first pass finds them and the blocks run again to be read.

Axes (one letter each, here and in the shapes below; code -> paper):
    b  images                  (K)        L  layers    H  heads    N  tokens, class token first    e  width of one head
    t  texts                   (M)        D  width of the residual stream                          d  embedding    (d')
    n  neurons of one MLP                 r  rows of the read-out                                  T  tokens read out
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from towers import (
    Block,
    Call,
    DecompositionError,
    Exit,
    Frozen,
    Tower,
    attention_calls,
    open_tower,
    promote,
    refusal,
)

__all__ = [
    "Decomposition",
    "DecompositionError",
    "Neurons",
    "check",
    "decompose",
    "head_maps",
    "heatmap",
    "neurons",
    "token_scores",
]


@dataclass(frozen=True)
class Decomposition:
    """An image embedding (not normalised) as a sum of terms, in float32 (float64 for a float64 model).

    heads = values @ head_maps(model) under convention="term". Where one row reads the tokens out (class token, mean), a head's term
    lives in e dimensions: for a ViT-L-14 `values` is 12 times smaller than `heads`, and its mean and covariance give those of the term.
    Under attention pooling every pooling head reads it another way; it fills the space, and `values` is `heads`.
    """

    embedding: Tensor  # [b, d] what model.encode_image returned, not normalised, in the model's own precision
    stem: Tensor  # [b, d] the residual stream that enters the first block
    heads: Tensor  # [b, L, H, d]
    mlps: Tensor  # [b, L, d]
    constant: Tensor  # [b, d] out-projection biases and the norms' beta; zero for convention="paper"
    values: Tensor  # [b, L, H, e] attention-weighted values, divided by the frozen standard deviations
    own: (
        Tensor | None
    )  # [b, L, H, e] the part of `values` from the class token's attention to itself; None where no such token is read
    pool: Tensor | None = None  # [b, d] what attention pooling's own MLP adds, in the models that have one

    def total(self) -> Tensor:
        """[b, d] the sum of all terms."""
        total = self.stem + self.heads.sum(dim=(1, 2)) + self.mlps.sum(dim=1) + self.constant
        return total if self.pool is None else total + self.pool

    def error(self) -> float:
        """max |total - embedding| / max |embedding|, over all images and dimensions; NaN if either holds a NaN."""
        embedding = self.embedding.to(self.stem.dtype)
        return float((self.total() - embedding).abs().max() / embedding.abs().max())


@torch.no_grad()
def decompose(model: nn.Module, images: Tensor, *, convention: str = "term") -> Decomposition:
    """Split model.encode_image(images) into terms that sum to it (sections 3.2 and 3.3 of the paper).

    The stock model runs in eval mode (patch dropout off) and without gradients, and is left as it was found: once; where the weights of
    the tokens depend on the last layer, its blocks a second time.

    Args:
        model: an open_clip model whose image tower is a ViT, native or of timm: see towers.py.
        images: [b, 3, rows, columns] as encode_image takes them.
        convention: where goes what belongs to no single term? "term": each term is centred by its own mean, and a constant holds
            the out-projection biases and LayerNorm's beta. "paper": the authors' way; a layer's bias is divided evenly over its heads,
            LayerNorm's mean and beta evenly over the 2 L + 1 stem, attention and MLP terms, and the constant is zero. (They also
            divide by the embedding's norm.) Either sums to the same embedding.

    Raises:
        DecompositionError: the model has another architecture; the message names it and the reason. Convention "paper" is defined for
            the class token behind one norm.
        ValueError: unknown convention.
    """
    if convention not in ("term", "paper"):
        raise ValueError(f'convention must be "term" or "paper", got {convention!r}')
    tower, rows = open_tower(model), []
    if convention == "paper" and not tower.readout.as_in_the_paper:
        raise refusal(
            model,
            'convention="paper" is defined for a class token that is read out behind one norm; use "term"',
        )
    seen = _run(model, tower, images, lambda _, row: rows.append((row.value(), row.own(), row.bias)))

    with _full_precision(images):
        G = tower.readout.rows() if convention == "term" else tower.readout.rows(centring=False)
        stem, mlps = (
            G.read(seen.stem * seen.scale),
            G.read(torch.stack(seen.mlps, dim=2) * seen.scale[..., None]),
        )
        values, owns, biases = zip(*rows, strict=True)
        values = [value * seen.scale[..., None] for value in values]  # L x [b, r, H, e]
        heads = [
            G.read(torch.einsum("brHe,HeD->brHD", *pair)) for pair in zip(values, _writes(tower), strict=True)
        ]
        heads, biases = (
            torch.stack(heads, dim=1),
            G.read(torch.stack(biases, dim=2) * seen.scale[..., None]),
        )  # [b, L, d]
        constant = seen.frozen.constant
        if convention == "term":
            constant = constant + biases.sum(dim=1)
        else:
            mean = (
                seen.last.mean(dim=-1) * seen.scale[:, 0] * G.down[0].sum(dim=0)
            )  # [b, d] LayerNorm's mean, read out
            share = (constant - mean) / (2 * len(tower.blocks) + 1)
            stem, mlps, constant = stem + share, mlps + share[:, None], torch.zeros_like(stem)
            heads = heads + ((biases + share[:, None]) / heads.shape[2])[:, :, None]
        values = torch.stack(values, dim=1)[:, :, 0] if G.up is None else heads
        own = None if owns[0] is None else torch.stack(owns, dim=1) * seen.scale[..., None]
        pool = seen.frozen.mlp if tower.readout.mlp is not None else None
    return Decomposition(seen.embedding, stem, heads, mlps, constant, values, own, pool)


@torch.no_grad()
def head_maps(model: nn.Module) -> Tensor:
    """[L, H, e, d] the fixed linear map from each head's values to its term: heads = einsum("bLHe,LHed->bLHd", values, maps).

    Under attention pooling `values` are the terms, and the maps are identities (that share their memory).
    """
    tower = open_tower(model)
    with _full_precision(tower.readout.like):
        G = tower.readout.rows()
        if G.up is None:
            return torch.stack([writes @ G.down[0] for writes in _writes(tower)])
        identity = torch.eye(G.up.shape[-1], dtype=G.up.dtype, device=G.up.device)
        return identity.expand(len(tower.blocks), tower.blocks[0].heads, -1, -1)


@torch.no_grad()
def token_scores(
    model: nn.Module, images: Tensor, texts: Tensor, layers: Sequence[int] | None = None
) -> Tensor:
    """Dot product of every text with every (layer, head, source token) term: who says it, and about which patch (section 3.3).

    Args:
        model, images: as for `decompose`.
        texts: [t, d] text embeddings (or any vectors of the joint space).
        layers: which layers (0 is the first, negative count from the end), in the order wanted; None: all.

    Returns:
        [b, l, H, N, t]; class token and registers first, where the model has them, then patches row by row. Its sum over N is
        heads @ texts.T (convention "term") of those layers.

    Raises:
        DecompositionError: as `decompose`.
        ValueError: a layer that the model does not have, or texts of another width than the embedding.
    """
    depth = len(open_tower(model).blocks)
    wanted = list(range(depth)) if layers is None else list(layers)
    if not wanted or not all(isinstance(layer, int) and -depth <= layer < depth for layer in wanted):
        raise ValueError(f"layers must be between {-depth} and {depth - 1} and at least one, got {wanted}")
    wanted = [layer % depth for layer in wanted]
    scores: dict[int, Tensor] = {}
    scale, _ = _scan(model, images, texts, scores.__setitem__, set(wanted))
    return torch.stack([scores[layer] for layer in wanted], dim=1).mul_(scale[..., None, None])


@torch.no_grad()
def heatmap(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """What each image patch adds to the score <embedding, text> through the heads of all layers (section 5 of the paper).

    Args:
        model, images, texts: as for `token_scores`.

    Returns:
        [b, t, rows, columns], one value per patch. The rest of the score comes from the class token and registers as sources, the MLPs,
        the stem and the constant.
    """
    total: list[Tensor] = []  # one running sum: nothing is kept per layer

    def add(_: int, scores: Tensor) -> None:
        scores = scores.sum(dim=1)  # [b, N, t]
        total[:] = [total[0] + scores if total else scores]

    scale, tower = _scan(model, images, texts, add)
    return (total[0][:, tower.prefix :] * scale).transpose(1, 2).unflatten(2, tower.grid(images))


@dataclass(frozen=True)
class Neurons:
    """The term of one layer's MLP, split by neuron: neuron j adds activations[:, j] times maps[j] to the embedding.

    The factors are kept, not the products: [b, n, d] takes d times the memory. Under attention pooling every pooling head reads a
    neuron another way: one more axis r, and the maps in two factors.
    """

    embedding: Tensor  # [b, d] what model.encode_image returned, in the model's own precision
    term: Tensor  # [b, d] the MLP's term as a whole, from what it wrote
    activations: Tensor  # [b, n] or [b, r, n], past the nonlinearity, divided by the frozen norms on the way to the embedding
    maps: Tensor  # [n, d] or [r, n, p]: the same for all images
    constant: (
        Tensor  # [b, d] what belongs to no neuron: the out-projection's bias, and beta of the norms around it
    )
    up: Tensor | None = None  # [r, p, d] the maps' second factor, where there is one

    def terms(self) -> Tensor:
        """[b, n, d] what each neuron adds to the embedding."""
        if self.up is None:
            return self.activations[:, :, None] * self.maps
        return torch.einsum("brn,rnp,rpd->bnd", self.activations, self.maps, self.up)

    def total(self) -> Tensor:
        """[b, d] the sum of all neurons and the constant."""
        with _full_precision(self.maps):
            if self.up is None:
                return self.activations @ self.maps + self.constant
            return torch.einsum("brn,rnp,rpd->bd", self.activations, self.maps, self.up) + self.constant

    def error(self) -> float:
        """max |total - term| / max |term|, over all images and dimensions; NaN if either holds a NaN or the MLP writes nothing."""
        return float((self.total() - self.term).abs().max() / self.term.abs().max())


@torch.no_grad()
def neurons(model: nn.Module, images: Tensor, layer: int) -> Neurons:
    """Split the term of one layer's MLP, decompose(model, images).mlps[:, layer], by neuron.

    The MLP writes sum_j a_j W_j + bias, where a_j is neuron j's activation at the tokens read out and W_j its row of the out-projection
    (a gated MLP's neuron is the product of its two halves). Norms on the way are frozen like the others, and centring is in the map.

    Args:
        model, images: as for `decompose`; convention "term".
        layer: 0 is the first, negative count from the end.

    Raises:
        DecompositionError: as `decompose`, and an MLP of another kind; the message names what it lacks.
        ValueError: a layer that the model does not have.
    """
    tower = open_tower(model)
    depth = len(tower.blocks)
    if not isinstance(layer, int) or not -depth <= layer < depth:
        raise ValueError(f"layer must be between {-depth} and {depth - 1}, got {layer!r}")
    try:
        way_out = tower.blocks[layer].mlp_exit()
    except DecompositionError as error:
        raise refusal(model, f"the MLP of block {layer % depth} {error}") from None
    seen = _run(model, tower, images, mlp=way_out)

    with _full_precision(images):
        G = tower.readout.rows()
        term = G.read(seen.mlps[layer] * seen.scale)
        weights, bias = way_out.weigh(seen.weights, seen.hidden, seen.hidden_written)
        constant, activations, maps = (
            G.read(bias * seen.scale),
            weights @ seen.hidden * seen.scale,
            way_out.maps() @ G.down,
        )
        if G.up is None:
            activations, maps = activations[:, 0], maps[0]
        return Neurons(seen.embedding, term, activations, maps, constant, G.up)


@torch.no_grad()
def check(model: nn.Module, images: Tensor, tolerance: float = 1e-4) -> float:
    """The relative error of the sum on these images: the proof that nothing is missing.

    Args:
        tolerance: largest error accepted. float32 stays near 1e-6; a model in half precision rounds at every step, allow it 3e-2.

    Raises:
        DecompositionError: the error is larger or not a number; the message has both norms and the block that it comes from.
    """
    terms = decompose(model, images)
    error = terms.error()
    if not error <= tolerance:
        total, embedding = terms.total().norm(), terms.embedding.to(terms.stem.dtype).norm()
        raise DecompositionError(
            f"the terms do not sum to the embedding: relative error {error:.1e}, tolerance {tolerance:.1e} ({terms.embedding.dtype}); "
            f"norm of the sum {total:.6g}, norm of the embedding {embedding:.6g}; {_culprit(model, images, tolerance)}"
        )
    return error


# The forward pass, watched.


@dataclass
class _Row:
    """One block's attention, as the tokens that are read out see it."""

    block: Block
    call: Call
    targets: slice
    weights: Tensor  # [b, r, T] of the tokens, divided by the norms on the attention's way out
    attention: Tensor | None  # [b, H, 1, N] where one token is read out
    mixed: Tensor  # [b, H, T, e] what each head makes of the values
    bias: Tensor  # [b, r, D] what the attention adds that belongs to no head

    def value(self) -> Tensor:
        """[b, r, H, e]"""
        return (self.weights[:, None] @ self.mixed).transpose(1, 2)

    def own(self) -> Tensor | None:
        """[b, H, e] the summand of `value` that has the class token for its source, where that is what is read out."""
        if self.attention is None:
            return None
        return (
            self.weights[:, 0, :, None]
            * self.attention[:, :, 0, :1]
            * self.scaled(promote(self.call.v[:, :, 0]))
        )

    def scaled(self, x: Tensor) -> Tensor:
        """x [b, H, ..., e], times the heads' own scale where the block has one."""
        scale = self.block.head_scale  # [H, 1, 1]
        return x if scale is None else x * promote(scale).view(-1, *[1] * (x.ndim - 2))

    def scores(self, directions: Tensor) -> Tensor:
        """[b, H, N, t] each source token's term, dotted with the directions [r, D, t] of texts."""
        v = self.scaled(promote(self.call.v))
        said = self.block.writes() @ directions[:, None]  # [r, H, e, t]
        mixed = 0  # [b, H, r, N] the tokens' attention, weighted; some tokens at a time: never [N, N] of all of them
        for part in range(0, self.mixed.shape[2], CHUNK):
            tokens = slice(self.targets.start or 0, None).indices(self.call.q.shape[2])[0] + part
            A = (
                self.attention
                if self.attention is not None
                else self.call.weights(slice(tokens, tokens + CHUNK))
            )
            mixed = mixed + self.weights[:, None, :, part : part + CHUNK] @ A
        return sum(mixed[:, :, r, :, None] * (v @ said[r]) for r in range(len(said)))


CHUNK = 64  # tokens


@dataclass
class _Seen:
    """The stream of the tokens read out, in the latest forward pass: sums over them, weighted."""

    weights: Tensor | None = None  # [b, r, T]
    scale: Tensor | None = None  # [b, 1, 1] what these weights are still to be multiplied by
    stem: Tensor | None = None  # [b, r, D]
    mlps: list[Tensor] = field(default_factory=list)  # L x [b, r, D]
    last: Tensor | None = None  # [b, T, D]
    calls: list[Call] = field(default_factory=list)  # of attention, after the last block
    pool: Tensor | None = None  # [b, q, D'] what the pooling's MLP wrote
    hidden: Tensor | None = None  # [b, T, n] the features of the MLP that was asked for
    hidden_written: Tensor | None = None  # [b, T, D] what the norm after that MLP was given
    frozen: Frozen | None = None
    embedding: Tensor | None = None  # [b, d]


OnRow = Callable[[int, _Row], None]


class _BlocksDone(Exception):
    """Ends a forward pass behind its last block."""


def _run(
    model: nn.Module, tower: Tower, images: Tensor, on_row: OnRow | None = None, mlp: Exit | None = None
) -> _Seen:
    """Watch a forward pass; where the weights depend on the last layer, another one tells them first, and this one ends there."""
    weights = frozen = embedding = None
    if not tower.readout.one_pass:
        with _watch(model, tower) as first:
            embedding = _embedding(model, images)
        with _full_precision(images):
            try:
                frozen = tower.readout.freeze(first.last, first.calls, first.pool)
            except DecompositionError as error:
                raise refusal(model, str(error)) from None
        weights = frozen.weights
    with _watch(model, tower, weights, on_row, mlp) as seen, suppress(_BlocksDone):
        embedding = _embedding(model, images)
    seen.embedding = embedding
    with _full_precision(images):
        seen.frozen = tower.readout.freeze(seen.last, seen.calls) if frozen is None else frozen
        seen.scale = seen.frozen.weights[:, :1, :1] / seen.weights[:, :1, :1]
    return seen


@contextmanager
def _watch(
    model: nn.Module,
    tower: Tower,
    weights: Tensor | None = None,
    on_row: OnRow | None = None,
    mlp: Exit | None = None,
) -> Iterator[_Seen]:
    """While open, a forward pass calls on_row(layer, row) at every block and leaves the rest in what is yielded.

    Args:
        weights: [b, r, T] of the tokens read out, with which the pass ends behind the last block; None: their mean.
        mlp: whose features are kept.

    The hooks only read, but for the one that ends the pass. They and the mode (eval while open) are put back on the way out, also
    after an error.
    """
    seen, blocks, written, thread = _Seen(), tower.blocks, {}, threading.get_ident()

    def here(hook: Callable) -> Callable:
        """In this thread alone: another one may run the same model meanwhile."""
        return lambda *args: hook(*args) if threading.get_ident() == thread else None

    def of_targets(x: Tensor) -> Tensor:
        """[b, T, D]"""
        return promote(tower.tokens(x)[:, tower.readout.targets])

    def at_stem(module: nn.Module, args: tuple) -> None:
        x = of_targets(args[0])
        seen.weights = torch.full_like(x[:, None, :, 0], 1 / x.shape[1]) if weights is None else weights
        with _full_precision(x):
            seen.stem = seen.weights @ x

    def keep(key: object) -> Callable:
        return lambda module, args: written.__setitem__(key, of_targets(args[0]).clone())

    def at_mlp(index: int) -> Callable:  # by then the block's attention has written
        def hook(module: nn.Module, args: tuple) -> None:
            if len(calls) != 1:
                found = (
                    f"block {index} called F.scaled_dot_product_attention {len(calls)} times, expected once"
                )
                raise refusal(model, found + (" (is TIMM_FUSED_ATTN=0 set?)" if not calls else ""))
            call, block = calls.pop(), blocks[index]
            if call.k.shape[2] != call.q.shape[2]:
                raise refusal(model, f"block {index} attends to tokens that are not in the image")
            if on_row is not None:
                with _full_precision(call.v):
                    on_row(
                        index,
                        _row(block, call, tower.readout.targets, seen.weights, written.pop(index, None)),
                    )

        return hook

    def at_mlp_end(module: nn.Module, args: tuple, output: Tensor) -> None:
        x = of_targets(output)
        with _full_precision(x):
            seen.mlps.append(seen.weights @ x)

    def at_end(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.last = of_targets(
            output
        ).clone()  # a view would keep all tokens, and show what is written on them later
        if weights is not None:
            raise _BlocksDone

    def at_pool(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.pool = output

    training = [module for module in model.modules() if module.training]
    handles = []
    with attention_calls() as calls:
        try:
            handles.append(blocks[0].module.register_forward_pre_hook(here(at_stem)))
            for i, block in enumerate(blocks):
                if block.attention.outer is not None:
                    handles.append(block.attention.outer.register_forward_pre_hook(here(keep(i))))
                handles.append(block.mlp.register_forward_pre_hook(here(at_mlp(i))))
                handles.append(block.mlp_written.register_forward_hook(here(at_mlp_end)))
            handles.append(blocks[-1].module.register_forward_hook(here(at_end)))
            if tower.readout.mlp is not None:
                handles.append(tower.readout.mlp.register_forward_hook(here(at_pool)))
            if mlp is not None:
                handles.append(mlp.reader.register_forward_pre_hook(here(keep("hidden"))))
                if mlp.outer is not None:
                    handles.append(mlp.outer.register_forward_pre_hook(here(keep("hidden, written"))))
            for module in training:
                module.training = False
            yield seen
        finally:
            for handle in handles:
                handle.remove()
            for module in training:
                module.training = True
    seen.calls, seen.hidden, seen.hidden_written = (
        calls,
        written.get("hidden"),
        written.get("hidden, written"),
    )


def _row(block: Block, call: Call, targets: slice, weights: Tensor, written: Tensor | None) -> _Row:
    """written: [b, T, D] what the norm after the attention was given, where there is one."""
    A = call.weights(targets) if targets == slice(0, 1) else None
    row = _Row(
        block,
        call,
        targets,
        weights,
        A,
        promote(call.out[:, :, targets]) if A is None else A @ promote(call.v),
        weights,
    )
    row.mixed = row.scaled(row.mixed)
    row.weights, row.bias = block.attention.weigh(weights, row.mixed.transpose(1, 2), written)
    return row


def _embedding(model: nn.Module, images: Tensor) -> Tensor:
    raw = (
        {"normalize": False} if "normalize" in inspect.signature(model.encode_image).parameters else {}
    )  # CoCa's default is True
    output = model.encode_image(images, **raw)
    output = (
        output[0] if isinstance(output, tuple) else output
    )  # towers with output_tokens=True also return their patches
    return (
        output[:, 0] if output.ndim == 3 else output
    )  # CoCa's parallel and cascade poolings return one query of one


def _writes(tower: Tower) -> Iterator[Tensor]:
    """L x [H, e, D]"""
    return (block.writes() for block in tower.blocks)


def _scan(
    model: nn.Module,
    images: Tensor,
    texts: Tensor,
    on_scores: Callable[[int, Tensor], None],
    wanted: set[int] | None = None,
) -> tuple[Tensor, Tower]:
    """Call on_scores(layer, [b, H, N, t]) for every wanted layer, scores still to be multiplied by the scale [b, 1, 1] returned."""
    tower = open_tower(model)
    with _full_precision(images):
        G = tower.readout.rows()
        width = (G.down if G.up is None else G.up).shape[-1]
        if texts.ndim != 2 or texts.shape[1] != width:
            raise ValueError(f"texts must be [t, {width}] like the embedding, got {list(texts.shape)}")
        directions = G.directions(texts.to(G.down))

    def score(index: int, row: _Row) -> None:
        if wanted is None or index in wanted:
            on_scores(index, row.scores(directions))

    return _run(model, tower, images, score).scale, tower


def _culprit(model: nn.Module, images: Tensor, tolerance: float) -> str:
    """Which block does not add up, and where in it; for the message of `check`."""
    tower, heads, written, stream = open_tower(model), [], [], []

    def sum_heads(index: int, row: _Row) -> None:
        heads.append(torch.einsum("brHe,HeD->brD", row.value(), row.block.writes()) + row.bias)

    def mean(x: Tensor) -> Tensor:
        return promote(tower.tokens(x)[:, tower.readout.targets]).mean(dim=1, keepdim=True)

    handles = []
    try:
        for block in tower.blocks:
            keep = lambda module, args, output: written.append(mean(output))  # noqa: E731
            handles.append(block.attention_written.register_forward_hook(keep))
            handles.append(
                block.module.register_forward_pre_hook(lambda module, args: stream.append(mean(args[0])))
            )
        with _watch(model, tower, on_row=sum_heads) as seen:
            _embedding(model, images)
    finally:
        for handle in handles:
            handle.remove()
    stream.append(seen.last.mean(dim=1, keepdim=True))
    if not stream[0].isfinite().all():
        return "the embedding of patches and positions is the first to write something that is not a number"
    for i in range(
        len(tower.blocks)
    ):  # the heads are looked at, too: a fused kernel of attention may pass over such a number
        if not (stream[i + 1].isfinite().all() and heads[i].isfinite().all()):
            return f"block {i} is the first to write something that is not a number"
    gaps = []
    for i in range(len(tower.blocks)):
        added = stream[i + 1] - stream[i]
        gaps.append((heads[i] - written[i], written[i], i, "its heads differ from what its attention wrote"))
        gaps.append(
            (
                added - written[i] - seen.mlps[i],
                added,
                i,
                "its attention and MLP differ from what it added to the stream",
            )
        )
    floor = 1e-12 * stream[0].norm()  # of an attention that writes nothing
    gap, block, where = max(
        (float(gap.norm() / whole.norm().clamp_min(floor)), block, where) for gap, whole, block, where in gaps
    )
    if gap < tolerance:
        return "every block adds up, so the difference arises in the read-out after them"
    return f"largest gap in block {block}: {where} by {gap:.1e} of its norm"


def _full_precision(x: Tensor) -> torch.autocast:
    """Keeps a caller's autocast away from the sums."""
    return torch.autocast(x.device.type, enabled=False)
