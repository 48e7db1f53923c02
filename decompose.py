"""Take a CLIP image embedding apart: one term per attention head, per MLP, and per source token, that sum to it.

Reference: Gandelsman, Efros, Steinhardt, "Interpreting CLIP's Image Representation via Text-Based Decomposition",
https://arxiv.org/abs/2310.05916, section 3. This file needs torch alone and works on any model object with open_clip's attributes.

    terms = decompose(model, images)      # the stock model; its own forward pass runs once, hooks read along
    terms.heads                           # [b, L, H, d] what each head adds to the embedding
    terms.error()                         # max |sum of terms - embedding| / max |embedding|

How it works. The class token's last residual x is a sum: stem + what every attention head and every MLP wrote onto it. The read-out
LN then projection is linear once LN's standard deviation sigma is taken as it was in this forward pass:

    e = (x - mean(x)) / sigma * gamma @ P + beta @ P = x @ G / sigma + beta @ P        G = (I - 11'/D) diag(gamma) P

A head writes W_O sum_s A_s (W_V y_s + b_V), where A is its attention from the class token to the source tokens s and y the block's
normalised input. Only that one row of A is needed, and neither keys nor values of the other tokens:

    q.(W_K y_s) = (W_K' q).y_s        sum_s A_s W_V y_s = W_V (sum_s A_s y_s)

which is why this costs next to nothing beside the forward pass. The authors' code instead stores [b, layer, token, head, d].

Axes (one letter each, here and in the shapes below; code -> paper):
    b  images                  (K)        L  layers    H  heads    N  tokens, class token first    e  width of one head
    t  texts                   (M)        D  width of the residual stream                          d  embedding    (d')
    n  neurons of one MLP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DecompositionError(ValueError):
    """The model cannot be decomposed exactly, or a decomposition does not sum to the embedding; the message says which and why."""


@dataclass(frozen=True)
class Decomposition:
    """An image embedding (not normalised) as a sum of terms, in float32 (float64 for a float64 model).

    A head's term lives in e dimensions: heads = values @ head_maps(model) under convention="term". For a ViT-L-14 `values` is 12 times
    smaller than `heads`, and its mean and covariance give those of the term.
    """

    embedding: Tensor  # [b, d] what model.encode_image returned, in the model's own precision
    stem: Tensor  # [b, d] the residual stream that enters the first block
    heads: Tensor  # [b, L, H, d]
    mlps: Tensor  # [b, L, d]
    constant: Tensor  # [b, d] out-projection biases and LayerNorm's beta; zero for convention="paper"
    values: Tensor  # [b, L, H, e] attention-weighted values, divided by the frozen standard deviations
    own: Tensor  # [b, L, H, e] the part of `values` that comes from the class token's attention to itself

    def total(self) -> Tensor:
        """[b, d] the sum of all terms."""
        return self.stem + self.heads.sum(dim=(1, 2)) + self.mlps.sum(dim=1) + self.constant

    def error(self) -> float:
        """max |total - embedding| / max |embedding|, over all images and dimensions; NaN if either holds a NaN."""
        embedding = self.embedding.to(self.stem.dtype)
        return float((self.total() - embedding).abs().max() / embedding.abs().max())


@torch.no_grad()
def decompose(model: nn.Module, images: Tensor, *, convention: str = "term") -> Decomposition:
    """Split model.encode_image(images) into terms that sum to it (sections 3.2 and 3.3 of the paper).

    The stock model runs once, in eval mode (patch dropout off) and without gradients, and is left as it was found.

    Args:
        model: an open_clip model whose image tower is a native ViT read at its class token.
        images: [b, 3, rows, columns] as encode_image takes them.
        convention: where goes what belongs to no single term? "term": each term is centred by its own mean, and a constant holds
            the out-projection biases and LayerNorm's beta. "paper": the authors' way; a layer's bias is divided evenly over its heads,
            LayerNorm's mean and beta evenly over the 2 L + 1 stem, attention and MLP terms, and the constant is zero. (They also
            divide by the embedding's norm.) Either sums to the same embedding.

    Raises:
        DecompositionError: the model has another architecture; the message names it and the reason.
        ValueError: unknown convention.
    """
    if convention not in ("term", "paper"):
        raise ValueError(f'convention must be "term" or "paper", got {convention!r}')
    layers, readout = _layers(model), _Readout(model.visual)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    with _watch(model, layers, lambda _, row: rows.append((row.value, row.own, row.bias))) as seen:
        embedding = _embedding(model, images)

    with _full_precision(images):
        sigma = readout.sigma(seen.last)  # [b, 1]
        G = readout.matrix(convention)  # [D, d]
        stem = seen.stem / sigma @ G
        mlps = torch.stack(seen.mlps, dim=1) / sigma[:, None] @ G
        values, own, biases = (torch.stack(parts, dim=1) for parts in zip(*rows, strict=True))
        values, own = values / sigma[:, None, None], own / sigma[:, None, None]
        biases = biases / sigma[:, None] @ G  # [b, L, d]
        written = [torch.einsum("bHe,HeD->bHD", values[:, i], layer.writes()) for i, layer in enumerate(layers)]  # L x [b, H, D]
        heads = torch.stack([x @ G for x in written], dim=1)
        if convention == "term":
            constant = biases.sum(dim=1) + readout.beta()
        else:
            mean = seen.last.mean(dim=-1, keepdim=True) / sigma * G.sum(dim=0)  # [b, d] LayerNorm's mean, read out
            share = (readout.beta() - mean) / (2 * len(layers) + 1)
            stem, mlps, constant = stem + share, mlps + share[:, None], torch.zeros_like(stem)
            heads = heads + ((biases + share[:, None]) / heads.shape[2])[:, :, None]
    return Decomposition(embedding, stem, heads, mlps, constant, values, own)


@torch.no_grad()
def head_maps(model: nn.Module) -> Tensor:
    """[L, H, e, d] the fixed linear map from each head's values to its term: heads = einsum("bLHe,LHed->bLHd", values, maps)."""
    layers, readout = _layers(model), _Readout(model.visual)
    with _full_precision(readout.gamma):
        return torch.stack([layer.writes() @ readout.matrix("term") for layer in layers])


@torch.no_grad()
def token_scores(model: nn.Module, images: Tensor, texts: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """Dot product of every text with every (layer, head, source token) term: who says it, and about which patch (section 3.3).

    Args:
        model, images: as for `decompose`.
        texts: [t, d] text embeddings (or any vectors of the joint space).
        layers: which layers (0 is the first, negative count from the end), in the order wanted; None: all.

    Returns:
        [b, l, H, N, t]; token 0 is the class token itself, patches follow row by row. Its sum over N is heads @ texts.T (convention
        "term") of those layers.

    Raises:
        DecompositionError: as `decompose`.
        ValueError: a layer that the model does not have, or texts of another width than the embedding.
    """
    depth = len(_layers(model))
    wanted = list(range(depth)) if layers is None else list(layers)
    if not wanted or not all(isinstance(layer, int) and -depth <= layer < depth for layer in wanted):
        raise ValueError(f"layers must be between {-depth} and {depth - 1} and at least one, got {wanted}")
    wanted = [layer % depth for layer in wanted]
    scores: dict[int, Tensor] = {}
    sigma = _scan(model, images, texts, scores.__setitem__, set(wanted))
    return torch.stack([scores[layer] for layer in wanted], dim=1).div_(sigma[:, None, None, None])


@torch.no_grad()
def heatmap(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """What each image patch adds to the score <embedding, text> through the heads of all layers (section 5 of the paper).

    Args:
        model, images, texts: as for `token_scores`.

    Returns:
        [b, t, rows, columns], one value per patch. The rest of the score comes from the class token as a source, the MLPs, the stem
        and the constant.
    """
    total: list[Tensor] = []  # one running sum: nothing is kept per layer

    def add(_: int, scores: Tensor) -> None:
        patches = scores[:, :, 1:].sum(dim=1)  # [b, N - 1, t]
        total[:] = [total[0] + patches if total else patches]

    sigma = _scan(model, images, texts, add)
    rows, columns = (size // patch for size, patch in zip(images.shape[-2:], model.visual.patch_size, strict=True))
    return (total[0] / sigma[:, None]).transpose(1, 2).unflatten(2, (rows, columns))


@dataclass(frozen=True)
class Neurons:
    """The term of one layer's MLP, split by neuron: neuron j adds activations[:, j] times maps[j] to the embedding.

    The factors are kept, not the products: [b, n, d] takes d times the memory.
    """

    embedding: Tensor  # [b, d] what model.encode_image returned, in the model's own precision
    term: Tensor  # [b, d] the MLP's term as a whole, from what it wrote
    activations: Tensor  # [b, n] after the nonlinearity, divided by the frozen standard deviations on the way to the embedding
    maps: Tensor  # [n, d] the same for all images
    constant: Tensor  # [b, d] what belongs to no neuron: the out-projection's bias, and beta of the norm before it

    def terms(self) -> Tensor:
        """[b, n, d] what each neuron adds to the embedding."""
        return self.activations[:, :, None] * self.maps

    def total(self) -> Tensor:
        """[b, d] the sum of all neurons and the constant."""
        with _full_precision(self.maps):
            return self.activations @ self.maps + self.constant

    def error(self) -> float:
        """max |total - term| / max |term|, over all images and dimensions; NaN if either holds a NaN or the MLP writes nothing."""
        return float((self.total() - self.term).abs().max() / self.term.abs().max())


@torch.no_grad()
def neurons(model: nn.Module, images: Tensor, layer: int) -> Neurons:
    """Split the term of one layer's MLP, decompose(model, images).mlps[:, layer], by neuron.

    The MLP writes sum_j a_j W_j + bias, where a_j is neuron j's activation at the class token and W_j its row of the out-projection.
    Where the custom block has a norm between the two, it is frozen like the others, and centring is in the map.

    Args:
        model, images: as for `decompose`; convention "term".
        layer: 0 is the first, negative count from the end.

    Raises:
        DecompositionError: as `decompose`, and an MLP of another kind; the message names what it lacks.
        ValueError: a layer that the model does not have.
    """
    layers, readout = _layers(model), _Readout(model.visual)
    if not isinstance(layer, int) or not -len(layers) <= layer < len(layers):
        raise ValueError(f"layer must be between {-len(layers)} and {len(layers) - 1}, got {layer!r}")
    try:
        mlp = _Mlp(layers[layer])
    except DecompositionError as error:
        raise _refusal(model, f"the MLP of block {layer % len(layers)} {error}") from None
    with _watch(model, layers, mlp=mlp) as seen:
        embedding = _embedding(model, images)

    with _full_precision(images):
        sigma, G = readout.sigma(seen.last), readout.matrix("term")
        term, constant = seen.mlps[layer] / sigma @ G, mlp.bias() / sigma @ G
        return Neurons(embedding, term, seen.hidden / mlp.scale(seen.hidden) / sigma, mlp.writes() @ G, constant)


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
    """One block's attention as the class token sees it; `scale`, of the norms on its way out, is already in `value`."""

    attention: Tensor  # [b, H, N]
    value: Tensor  # [b, H, e]
    own: Tensor  # [b, H, e] the summand of `value` whose source is the class token
    bias: Tensor  # [b, D] what the attention adds that belongs to no head
    scale: Tensor  # [b, 1]
    inputs: Tensor  # [b, N, D] the block's normalised input


@dataclass
class _Seen:
    """The class token's stream in the latest forward pass."""

    stem: Tensor | None = None  # [b, D]
    last: Tensor | None = None  # [b, D] what the read-out's LayerNorm gets
    mlps: list[Tensor] = field(default_factory=list)  # L x [b, D]
    hidden: Tensor | None = None  # [b, n] the activations of the MLP that was asked for


@contextmanager
def _watch(
    model: nn.Module, layers: list[_Layer], on_row: Callable[[int, _Row], None] | None = None, mlp: _Mlp | None = None
) -> Iterator[_Seen]:
    """While open, a forward pass calls on_row(layer, row) at every block and leaves the class token's stream in what is yielded.

    Without on_row nobody pays for the attention's rows; of `mlp`, where it is given, the hidden activations are kept, too. The hooks
    only read. They and the mode (eval while open) are put back on the way out, also after an error.
    """
    seen = _Seen()

    def at_stem(module: nn.Module, args: tuple) -> None:
        seen.stem = layers[0].class_token(args[0])

    def at_readout(module: nn.Module, args: tuple) -> None:
        x = args[0]  # [b, N, D], or [b, D] where the norm follows the pooling
        seen.last = _promote(x[:, 0] if x.ndim == 3 else x).clone()

    def at_attention(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            with _full_precision(output):
                on_row(index, layers[index].row(output))

        return hook

    def at_mlp(layer: _Layer) -> Callable:
        return lambda module, args, output: seen.mlps.append(layer.class_token(output))

    def at_hidden(module: nn.Module, args: tuple) -> None:
        seen.hidden = mlp.layer.class_token(args[0])

    training = [module for module in model.modules() if module.training]
    handles = []
    try:
        handles.append(layers[0].block.register_forward_pre_hook(at_stem))
        handles.append(model.visual.ln_post.register_forward_pre_hook(at_readout))
        for i, layer in enumerate(layers):
            if on_row is not None:
                handles.append(layer.block.ln_1.register_forward_hook(at_attention(i)))
            handles.append(layer.block.ls_2.register_forward_hook(at_mlp(layer)))
        if mlp is not None:
            handles.append(mlp.reader.register_forward_pre_hook(at_hidden))
        for module in training:
            module.training = False
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _embedding(model: nn.Module, images: Tensor) -> Tensor:
    output = model.encode_image(images)
    return output[0] if isinstance(output, tuple) else output  # towers with output_tokens=True also return their patches


def _scan(
    model: nn.Module,
    images: Tensor,
    texts: Tensor,
    on_scores: Callable[[int, Tensor], None],
    wanted: set[int] | None = None,
) -> Tensor:
    """Call on_scores(layer, [b, H, N, t]) for every wanted layer, scores still to be divided by sigma; return sigma [b, 1]."""
    layers, readout = _layers(model), _Readout(model.visual)
    with _full_precision(images):
        G = readout.matrix("term")
        if texts.ndim != 2 or texts.shape[1] != G.shape[1]:
            raise ValueError(f"texts must be [t, {G.shape[1]}] like the embedding, got {list(texts.shape)}")
        directions = G @ texts.to(G).T  # [D, t]

    def score(index: int, row: _Row) -> None:
        if wanted is None or index in wanted:
            on_scores(index, layers[index].scores(row, directions))

    with _watch(model, layers, score) as seen:
        _embedding(model, images)
    return readout.sigma(seen.last)


def _culprit(model: nn.Module, images: Tensor, tolerance: float) -> str:
    """Which block does not add up, and where in it; for the message of `check`."""
    layers, heads, written, stream = _layers(model), [], [], []

    def sum_heads(index: int, row: _Row) -> None:
        heads.append(torch.einsum("bHe,HeD->bD", row.value, layers[index].writes()) + row.bias)

    handles = []
    try:
        for layer in layers:
            keep = lambda m, args, output, layer=layer: written.append(layer.class_token(output))  # noqa: E731
            handles.append(layer.block.ls_1.register_forward_hook(keep))
            keep = lambda m, args, layer=layer: stream.append(layer.class_token(args[0]))  # noqa: E731
            handles.append(layer.block.register_forward_pre_hook(keep))
        with _watch(model, layers, sum_heads) as seen:
            _embedding(model, images)
    finally:
        for handle in handles:
            handle.remove()
    stream.append(seen.last)
    broken = next((i for i, x in enumerate(stream) if not x.isfinite().all()), None)
    if broken is not None:
        first = f"block {broken - 1} is" if broken else "the embedding of patches and positions is"
        return f"{first} the first to write something that is not a number"
    gaps = []
    for i in range(len(layers)):
        added = stream[i + 1] - stream[i]
        gaps.append((heads[i] - written[i], written[i], i, "its heads differ from what its attention wrote"))
        gaps.append((added - written[i] - seen.mlps[i], added, i, "its attention and MLP differ from what it added to the stream"))
    floor = 1e-12 * stream[0].norm()  # of an attention that writes nothing
    gap, block, where = max((float(gap.norm() / whole.norm().clamp_min(floor)), block, where) for gap, whole, block, where in gaps)
    if gap < tolerance:
        return "every block adds up, so the difference arises in the read-out after them"
    return f"largest gap in block {block}: {where} by {gap:.1e} of its norm"


# Where a model keeps what is needed: one adapter per kind of block, one read-out per kind of pooling. Further families go here.


def _refusal(model: nn.Module, reason: str) -> DecompositionError:
    tower = type(getattr(model, "visual", None)).__name__
    return DecompositionError(f"cannot decompose {type(model).__name__} with image tower {tower}: {reason}")


def _layers(model: nn.Module) -> list[_Layer]:
    """One adapter per block, or a DecompositionError that names the model's tower and what it lacks."""
    visual = getattr(model, "visual", None)

    def refuse(reason: str) -> DecompositionError:
        return _refusal(model, reason)

    if visual is None:
        raise refuse("it has no attribute `visual`; expected an open_clip model")
    if isinstance(model, torch.jit.ScriptModule):
        raise refuse("scripted models cannot be watched; load it without jit")
    if hasattr(visual, "trunk"):
        raise refuse(f"its trunk {type(visual.trunk).__name__} comes from timm; only open_clip's own ViT is supported")
    if not hasattr(getattr(visual, "transformer", None), "resblocks") or not hasattr(visual, "ln_post"):
        raise refuse("it has no residual stream of attention heads (transformer.resblocks and ln_post)")
    if getattr(visual, "attn_pool", None) is not None:
        raise refuse("it reads out by attention pooling; only the class token is supported")
    if getattr(visual, "pool_type", "tok") != "tok" or getattr(visual, "global_average_pool", False):
        raise refuse(f"it reads out by pooling {getattr(visual, 'pool_type', 'avg')!r}; only the class token is supported")
    if not isinstance(visual.ln_post, nn.LayerNorm):
        raise refuse(f"its last norm is {type(visual.ln_post).__name__}, expected LayerNorm")
    try:
        return [_Layer(block, getattr(visual.transformer, "batch_first", True)) for block in visual.transformer.resblocks]
    except DecompositionError as error:
        raise refuse(str(error)) from None


class _Layer:
    """A native open_clip block: ResidualAttentionBlock around nn.MultiheadAttention, or CustomResidualAttentionBlock."""

    def __init__(self, block: nn.Module, batch_first: bool) -> None:
        missing = [name for name in ("ln_1", "attn", "ls_1", "ls_2") if not hasattr(block, name)]
        if missing or hasattr(block, "ln_1_kv"):
            raise DecompositionError(
                f"block {type(block).__name__} " + (f"has no {missing[0]}" if missing else "attends to another input")
            )
        attn = block.attn
        multihead = isinstance(attn, nn.MultiheadAttention)
        if getattr(attn, "in_proj_weight", None) is None or not hasattr(attn, "out_proj"):
            raise DecompositionError(f"attention {type(attn).__name__} has no in_proj_weight and out_proj")
        if multihead and (attn.bias_k is not None or attn.add_zero_attn):
            raise DecompositionError("attention with add_bias_kv or add_zero_attn attends to tokens that are not in the image")
        self.block, self.attn = block, attn
        self.batch_first = attn.batch_first if multihead else batch_first
        self.n_heads = attn.num_heads
        # The custom block's norms on the attention's way out; nn.Identity where it has none.
        ways_out = getattr(attn, "ln_inner", None), getattr(block, "ln_attn", None)
        self.ln_inner, self.ln_attn = (norm if isinstance(norm, nn.LayerNorm) else None for norm in ways_out)

    def class_token(self, x: Tensor) -> Tensor:
        """[b, D], a copy: a view would keep all tokens of every layer in memory."""
        return _promote(x[:, 0] if self.batch_first else x[0]).clone()

    def row(self, y: Tensor) -> _Row:
        """The class token's attention in this block, from the block's normalised input y."""
        y = _promote(y if self.batch_first else y.transpose(0, 1))  # [b, N, D]
        W_q, W_k, W_v = self.weights()
        b_q, b_k, b_v = self.biases()
        q = torch.einsum("bD,HeD->bHe", y[:, 0], W_q) + b_q
        A = self.logits(q, y, W_k, b_k).softmax(dim=-1)  # [b, H, N]
        value = torch.einsum("bHD,HeD->bHe", A @ y, W_v) + b_v  # b_v once: attention weights sum to one
        own = A[:, :, :1] * (torch.einsum("bD,HeD->bHe", y[:, 0], W_v) + b_v)
        if getattr(self.attn, "head_scale", None) is not None:
            value, own = (x * _promote(self.attn.head_scale)[:, 0] for x in (value, own))
        bias, scale = self.leave(value.flatten(1))
        return _Row(A, value / scale[:, None], own / scale[:, None], bias, scale, y)

    def logits(self, q: Tensor, y: Tensor, W_k: Tensor, b_k: Tensor) -> Tensor:
        """[b, H, N]"""
        ln_q, cosine = getattr(self.attn, "ln_q", None), getattr(self.attn, "logit_scale", None)
        if cosine is None and not isinstance(ln_q, nn.LayerNorm):
            # Keys are never made. q . b_k is the same for all tokens, and softmax does not see it.
            return torch.einsum("bHe,HeD->bHD", q, W_k) @ y.transpose(1, 2) * q.shape[-1] ** -0.5
        k = torch.einsum("bND,HeD->bHNe", y, W_k) + b_k[:, None]
        if cosine is not None:
            scale = _promote(cosine).clamp(max=self.attn.logit_scale_max).exp()  # [H, 1, 1]
            return (F.normalize(k, dim=-1) @ F.normalize(q, dim=-1)[..., None] * scale).squeeze(-1)
        q, k = (F.layer_norm(x, n.normalized_shape, *_affine(n, q), n.eps) for x, n in ((q, ln_q), (k, self.attn.ln_k)))
        return (k @ q[..., None]).squeeze(-1) * q.shape[-1] ** -0.5

    def leave(self, o: Tensor) -> tuple[Tensor, Tensor]:
        """What the way out of the attention does besides `writes`: bias [b, D], and the frozen norms' divisor [b, 1].

        o: [b, D] the heads' values, concatenated.
        """
        W_o = _promote(self.attn.out_proj.weight).T
        bias = torch.zeros_like(W_o[0]) if self.attn.out_proj.bias is None else _promote(self.attn.out_proj.bias)
        scale = torch.ones_like(o[:, :1])
        if self.ln_inner is not None:
            scale = _sigma(self.ln_inner, o)
            gamma, beta = _affine(self.ln_inner, self.attn.out_proj.weight)
            bias = bias + beta @ W_o
            o = _centre(o) / scale * gamma
        bias = bias.expand(o.shape[0], -1)
        if self.ln_attn is not None:
            sigma = _sigma(self.ln_attn, o @ W_o + bias)
            gamma, beta = _affine(self.ln_attn, self.attn.out_proj.weight)
            scale, bias = scale * sigma, _centre(bias) / sigma * gamma + beta
        return bias * _layer_scale(self.block.ls_1), scale

    def writes(self) -> Tensor:
        """[H, e, D] what a unit of each value adds to the residual stream, frozen norms' divisors aside."""
        W = _promote(self.attn.out_proj.weight).T  # [H e, D]
        if self.ln_inner is not None:
            gamma, _ = _affine(self.ln_inner, self.attn.out_proj.weight)
            W = W * gamma[:, None]
            W = W - W.mean(dim=0)  # the norm's centring comes first: (I - 11'/D) diag(gamma) W_o
        if self.ln_attn is not None:
            W = _centre(W) * _affine(self.ln_attn, self.attn.out_proj.weight)[0]
        return (W * _layer_scale(self.block.ls_1)).unflatten(0, (self.n_heads, -1))

    def scores(self, row: _Row, directions: Tensor) -> Tensor:
        """[b, H, N, t] each source token's term, dotted with directions [D, t]."""
        said = self.writes() @ directions  # [H, e, t]
        if getattr(self.attn, "head_scale", None) is not None:
            said = said * _promote(self.attn.head_scale)
        _, _, W_v = self.weights()
        u = torch.einsum("HeD,Het->DHt", W_v, said)  # [D, H, t]
        per_token = (row.inputs @ u.flatten(1)).unflatten(2, u.shape[1:]).transpose(1, 2)  # [b, H, N, t]
        per_token = per_token + torch.einsum("He,Het->Ht", self.biases()[2], said)[:, None]
        return per_token * (row.attention / row.scale[:, None])[..., None]

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_q, W_k, W_v, each [H, e, D]"""
        return _promote(self.attn.in_proj_weight).unflatten(0, (3, self.n_heads, -1)).unbind()

    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        """b_q, b_k, b_v, each [H, e]"""
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return _promote(bias).unflatten(0, (3, self.n_heads, -1)).unbind()


class _Mlp:
    """A native block's MLP: c_fc, gelu, in a custom block perhaps a norm ln, c_proj."""

    def __init__(self, layer: _Layer) -> None:
        mlp = getattr(layer.block, "mlp", None)
        steps = dict(mlp.named_children()) if isinstance(mlp, nn.Sequential) else {}
        if isinstance(steps.get("ln"), nn.Identity):
            del steps["ln"]
        if list(steps) not in (["c_fc", "gelu", "c_proj"], ["c_fc", "gelu", "ln", "c_proj"]):
            found = ", ".join(steps) or type(mlp).__name__
            raise DecompositionError(f"is {found}; expected c_fc, gelu, c_proj, with or without a norm ln before c_proj")
        for name, kind in (("ln", nn.LayerNorm), ("c_proj", nn.Linear)):
            if not isinstance(steps.get(name), kind | None):
                raise DecompositionError(f"has {type(steps[name]).__name__} as {name}; expected {kind.__name__}")
        self.layer, self.ln, self.c_proj = layer, steps.get("ln"), steps["c_proj"]
        self.reader = self.c_proj if self.ln is None else self.ln  # what the activations go into

    def scale(self, hidden: Tensor) -> Tensor | float:
        """[b, 1] the inner norm's divisor."""
        return 1.0 if self.ln is None else _sigma(self.ln, hidden)

    def bias(self) -> Tensor:
        """[D] what the MLP writes that belongs to no neuron."""
        W = _promote(self.c_proj.weight).T  # [n, D]
        bias = torch.zeros_like(W[0]) if self.c_proj.bias is None else _promote(self.c_proj.bias)
        if self.ln is not None:
            bias = bias + _affine(self.ln, self.c_proj.weight)[1] @ W
        return bias * _layer_scale(self.layer.block.ls_2)

    def writes(self) -> Tensor:
        """[n, D] what a unit of each activation adds to the residual stream, the inner norm's divisor aside."""
        W = _promote(self.c_proj.weight).T
        if self.ln is not None:
            W = W * _affine(self.ln, self.c_proj.weight)[0][:, None]
            W = W - W.mean(dim=0)  # the norm's centring comes first: (I - 11'/n) diag(gamma) W
        return W * _layer_scale(self.layer.block.ls_2)


class _Readout:
    """From the class token's last residual to the embedding: LayerNorm, then projection."""

    def __init__(self, visual: nn.Module) -> None:
        self.norm = visual.ln_post
        self.gamma, self.bias = _affine(visual.ln_post, next(visual.parameters()))
        self.proj = torch.eye(len(self.gamma)).to(self.gamma) if visual.proj is None else _promote(visual.proj)  # [D, d]

    def sigma(self, x: Tensor) -> Tensor:
        return _sigma(self.norm, x)

    def matrix(self, convention: str) -> Tensor:
        """G [D, d]; with LayerNorm's centring for convention "term", without for "paper"."""
        G = self.gamma[:, None] * self.proj
        return G - G.mean(dim=0) if convention == "term" else G

    def beta(self) -> Tensor:
        """[d] LayerNorm's beta, projected."""
        return self.bias @ self.proj


def _promote(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _layer_scale(scale: nn.Module) -> Tensor | float:
    """[D] LayerScale's gamma; 1 where a block has none."""
    gamma = getattr(scale, "gamma", None)
    return 1.0 if gamma is None else _promote(gamma)


def _full_precision(x: Tensor) -> torch.autocast:
    """Keeps a caller's autocast away from the sums."""
    return torch.autocast(x.device.type, enabled=False)


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)


def _sigma(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """[..., 1] what the norm divides x by."""
    return (x.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()


def _affine(norm: nn.LayerNorm, like: Tensor) -> tuple[Tensor, Tensor]:
    """gamma and beta; 1 and 0, made like another weight, where the norm has none."""
    like = _promote(like)
    gamma = like.new_ones(norm.normalized_shape) if norm.weight is None else _promote(norm.weight)
    return gamma, torch.zeros_like(gamma) if norm.bias is None else _promote(norm.bias)
