# MIT licence, copyright (c) 2026 The TextSpan reference authors; see LICENSE.
"""Ten attributions that a CLIP ViT's decomposition is compared with. This file needs torch alone.

    maps = METHODS["gradcam"](model, images, texts)     # one text per image, texts [b, d] -> [b, rows, cols]

The model is a stock CLIP of open_clip (2.0 to 3.3) or of OpenAI's package clip. Every method explains the
score of texts[i] for images[i], in one of three forms: "dot" <z, t>, "cosine" <z, t> / |z|, "logit"
exp(logit_scale) <z, t> / |z|, where z is the embedding and t the text made a unit vector. The default is the
form that a method was published with; score="dot" for all makes them equal. No map is clipped or resized.

A block, in open_clip's names and the letters used below (a and the last summand are times LayerScale):

    y = ln_1(x)    q, k, v = in_proj(y)    A = softmax(q k' / sqrt e)    O = A v    a = out_proj(O)
    mid = x + a    out = mid + c_proj(gelu(c_fc(ln_2(mid))))

The model runs with its own fused attention, which never shows A. Hooks keep y, and A is worked out again from
it. A acts through O alone, so its gradient is that of O, times v; the gradient of O is that of a, times W_o:

    ds/dA = (ds/da W_o) v'

Axes (as in decompose.py):
    b  images      N  tokens, class token first    D  residual stream    e  width of one head
    L  layers      H  heads                        d  embedding
Blocks of OpenAI, and of open_clip up to 2.24, take [N, b, D], as attn.batch_first says; here it is [b, N, D].

Published code that is cited, by commit:
    TE  github.com/hila-chefer/Transformer-Explainability @c3e578f
    MM  github.com/hila-chefer/Transformer-MM-Explainability @58eaea8
    LG  github.com/WalBouss/LeGrad @a9edb03
    GE  github.com/Cyang-Zhao/Grad-Eclip @5c1b5cc
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORES = ("dot", "cosine", "logit")


class BaselineError(ValueError):
    """The model is none that these methods are written for; the message says which and why."""


@dataclass(frozen=True)
class Attribution:
    """A function of (model, images, texts) that gives maps [b, rows, cols], and the score it explains."""

    function: Callable[..., Tensor]
    score: str | None  # the function's default, as it was published; None where no text enters

    @torch.no_grad()  # what gradients need, the method itself switches on
    def __call__(self, model: nn.Module, images: Tensor, texts: Tensor, **options) -> Tensor:
        return self.function(model, images, texts, **options)

    @property
    def reads_text(self) -> bool:
        return self.score is not None


# From attention alone.


def raw_attention(model: nn.Module, images: Tensor, texts: Tensor, *, score: str = "dot") -> Tensor:
    """The class token's attention to each patch in the last block, mean over heads. No text enters.

    TE ViT_LRP.py:382-387. The maps sum to one, less the class token's attention to itself.
    """
    run = _run(model, images, texts, score, first=-1, keep=("y",))
    block = run.blocks[-1]
    q, k = block.project(block.y, "qk")
    return run.grid(_attention(q[:, :, :1], k).mean(dim=1)[:, 0])


def rollout(
    model: nn.Module, images: Tensor, texts: Tensor, *, score: str = "dot", start_layer: int = 1
) -> Tensor:
    """Attention followed through the layers: row 0 of B_L ... B_start, B = (mean over heads of A + I) / 2.

    No text enters. Abnar and Zuidema, "Quantifying Attention Flow in Transformers",
    https://arxiv.org/abs/2005.00928; TE ViT_explanation_generator.py:7-18.

    Args:
        start_layer: first layer that takes part. 0 is the paper's; 1 is what the published segmentation
            comparison runs (TE imagenet_seg_eval.py:187).
    """
    run = _run(model, images, texts, score, first=_start(model, start_layer), keep=("y",))
    row = run.class_token()
    for block in reversed(run.blocks):
        q, k = block.project(block.y, "qk")
        row = (row + torch.einsum("bN,bNM->bM", row, _attention(q, k).mean(dim=1))) / 2
    return run.grid(row)


# From attention and its gradient.


def gradcam(model: nn.Module, images: Tensor, texts: Tensor, *, score: str = "dot") -> Tensor:
    """relu(mean over heads of w_h A_h[0, patch]) in the last block.

    w_h is the mean over patches of ds/dA_h[0, patch]. Selvaraju et al., "Grad-CAM",
    https://arxiv.org/abs/1610.02391, equations 1 and 2, with heads as channels and the class token's row of
    the attention as their picture: TE ViT_explanation_generator.py:50-71. All zero where every weighted sum
    is negative; GradCAM is known to be weak on CLIP's ViTs.
    """
    run = _run(model, images, texts, score, first=-1, keep=("y", "a"))
    block = run.blocks[-1]
    q, k, v = block.project(block.y)
    dA = block.attention_gradient(*run.gradients(block.a), v)[:, :, 0]  # [b, H, N]
    weight = dA[:, :, 1:].mean(dim=-1, keepdim=True)
    return run.grid((weight * _attention(q[:, :, :1], k)[:, :, 0]).mean(dim=1)).relu()


def chefer2021_mm(
    model: nn.Module, images: Tensor, texts: Tensor, *, score: str = "logit", start_layer: int = 0
) -> Tensor:
    """Row 0 of (I + C_L) ... (I + C_start), C = mean over heads of relu(ds/dA * A).

    Chefer, Gur and Wolf, "Generic Attention-model Explainability", https://arxiv.org/abs/2103.15679,
    equations 5 and 6; MM's ViT notebook. MM's CLIP notebook takes the last layer alone: start_layer=L - 1.
    """
    run = _run(model, images, texts, score, first=_start(model, start_layer), keep=("y", "a"))
    return _follow(run, (_attention(*block.project(block.y, "qk")) for block in reversed(run.blocks)))


def legrad(
    model: nn.Module, images: Tensor, texts: Tensor, *, score: str = "cosine", layers: int = 2
) -> Tensor:
    """Sum over the last layers l of mean over heads and rows of relu(ds_l/dA_l).

    s_l scores the mean token after block l. Bousselham et al., "LeGrad", https://arxiv.org/abs/2404.03214; LG
    wrapper.py:144-186. All tokens are averaged before ln_post and the projection, the class token too,
    although the model reads that one alone: the published code's choice. (On open_clip 3 the published code
    takes batch and tokens for each other; here they are told apart.)

    Args:
        layers: how many of the last blocks; 2 is the published code's default.
    """
    if not 1 <= layers <= len(_blocks(model)):
        raise ValueError(f"layers must be between 1 and the model's {len(_blocks(model))}, got {layers}")
    run = _run(model, images, texts, score, first=-layers, keep=("y", "a", "out"))
    total = 0.0
    for block in run.blocks:
        with torch.enable_grad():
            embedding = run.read_out(block.out.mean(dim=1))
        dA = block.attention_gradient(*run.gradients(block.a, of=embedding), *block.project(block.y, "v"))
        total = total + dA.relu().mean(dim=(1, 2))
    return run.grid(total)


def grad_eclip(model: nn.Module, images: Tensor, texts: Tensor, *, score: str = "cosine") -> Tensor:
    """relu(sum_c ds/dO[0, c] v[patch, c] lambda[patch]) in the last block.

    lambda is cos(q[0], k[patch]), scaled to 0..1. Zhao et al., "Gradient-based Visual Explanation for
    Transformer-based CLIP", ICML 2024; GE grad_eclip_image.ipynb. Heads are concatenated in q, k, v and O. GE
    computes the last block anew with a single head, which changes the embedding; this is the model's own.
    """
    run = _run(model, images, texts, score, first=-1, keep=("y", "a"))
    block = run.blocks[-1]
    q, k, v = (_merge(x) for x in block.project(block.y))  # [b, N, D]
    (da,) = run.gradients(block.a)
    cosine = F.cosine_similarity(q[:, :1], k[:, 1:], dim=-1)  # [b, N - 1]
    low, high = cosine.amin(dim=1, keepdim=True), cosine.amax(dim=1, keepdim=True)
    scaled = (cosine - low) / (high - low).clamp_min(torch.finfo(cosine.dtype).tiny)
    evidence = (v[:, 1:] @ (da[:, 0] @ block.W_o)[..., None]).squeeze(-1)
    return (evidence * scaled).relu().unflatten(1, run.size)


# By propagating relevance (LRP).


def lrp(
    model: nn.Module, images: Tensor, texts: Tensor, *, score: str = "dot", conserving: bool = False
) -> Tensor:
    """Relevance propagated to the patches by the published rules; signed.

    Bach et al. 2015, as TE's orig_lrp, method "full" (ViT_LRP.py:337-343), runs it on a ViT. Their map has
    pixels; its sum over a patch is given here, because the rule for the patch convolution keeps each patch's
    total. The published rules double the relevance at every Linear, so nothing is conserved, and rounding
    grows: compare in float64. `conserving`: by the rules of Chefer et al. 2021, section 3.2, where every
    layer's relevance sums to one.
    """
    run = _run(model, images, texts, score, first=0, keep=("x",))
    for _, _, R in _relevance(run, conserving):  # noqa: B007
        pass
    # Down to the patches, without what the position embeddings and the class token get.
    position = full_precision(run.model.visual.positional_embedding).expand_as(run.tokens)
    return run.grid(_add(run.tokens - position, position, R, conserving)[0].sum(dim=-1))


lrp_conserving = partial(lrp, conserving=True)


def partial_lrp(model: nn.Module, images: Tensor, texts: Tensor, *, score: str = "dot") -> Tensor:
    """Mean over heads of relu(R_A)[0, patch] in the last block, by the published rules.

    Voita et al., https://arxiv.org/abs/1905.09418; TE ViT_LRP.py:371-380, method "last_layer" of orig_lrp.
    """
    run = _run(model, images, texts, score, first=-1, keep=("x",))
    _, R_A, _ = next(_relevance(run, conserving=False))
    return run.grid(R_A[:, :, 0].relu().mean(dim=1))


def chefer2021(
    model: nn.Module, images: Tensor, texts: Tensor, *, score: str = "dot", start_layer: int = 1
) -> Tensor:
    """Row 0 of (I + C_L) ... (I + C_start), C = mean over heads of relu(ds/dA * R_A).

    R_A is the attention's relevance by the conserving rules; `chefer2021_mm` has A in its place. Chefer, Gur
    and Wolf, "Transformer Interpretability Beyond Attention Visualization", https://arxiv.org/abs/2012.09838,
    section 3.3; TE ViT_LRP.py:357-369, which also leaves the rows as they are (the normalisation there is
    commented out) and starts from a relevance of one.

    Args:
        start_layer: 1 is what the published segmentation comparison runs.
    """
    run = _run(model, images, texts, score, first=_start(model, start_layer), keep=("x", "y", "a"))
    return _follow(run, (R_A for _, R_A, _ in _relevance(run, conserving=True)))


METHODS: dict[str, Attribution] = {
    "raw-attention": Attribution(raw_attention, None),
    "rollout": Attribution(rollout, None),
    "gradcam": Attribution(gradcam, "dot"),
    "lrp": Attribution(lrp, "dot"),
    "lrp-conserving": Attribution(lrp_conserving, "dot"),
    "partial-lrp": Attribution(partial_lrp, "dot"),
    "chefer2021": Attribution(chefer2021, "dot"),
    "chefer2021-mm": Attribution(chefer2021_mm, "logit"),
    "legrad": Attribution(legrad, "cosine"),
    "grad-eclip": Attribution(grad_eclip, "cosine"),
}


def _follow(run: _Run, attentions: Iterable[Tensor]) -> Tensor:
    """[b, rows, cols] row 0 of (I + C_L) ... (I + C_start), C = mean over heads of relu(ds/dA * attention).

    attentions: [b, H, N, N] each, from the last block to the first.
    """
    gradients, row = run.gradients(*(block.a for block in run.blocks)), run.class_token()
    for block, da, attention in zip(reversed(run.blocks), reversed(gradients), attentions, strict=True):
        dA = block.attention_gradient(da, *block.project(block.y, "v"))
        row = row + torch.einsum("bN,bNM->bM", row, (dA * attention).relu().mean(dim=1))
    return run.grid(row)


def _relevance(run: _Run, conserving: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(layer, R_A [b, H, N, N], R [b, N, D]) from the run's last block to its first: of attention and input.

    The run must have kept "x". The rules are those of Chefer et al. 2021 (TE layers_ours.py) where
    `conserving`, else those of TE layers_lrp.py. One is what the score starts with. LayerNorm, GELU, softmax
    and scales pass relevance on as it is, and biases take no part. A score that is not linear in the
    embedding is replaced by its gradient's; the projection and that gradient are one Linear.
    """
    head = run.direction(run.embedding) @ run.proj.T  # [b, D] projection and score as one Linear
    R = _linear(run.last[:, None], head[:, None], torch.ones_like(head[:, None, :1]), conserving)
    for i, block in reversed(list(enumerate(run.blocks, start=run.first))):
        R_A, R = _through_block(block, R, conserving)
        yield i, R_A, R


def _through_block(block: _Block, R: Tensor, conserving: bool) -> tuple[Tensor, Tensor]:
    """From the relevance of a block's output to that of its attention [b, H, N, N] and its input [b, N, D].

    R: [b, N, D]; or [b, 1, D] after the last block, whose class token alone is read.
    """
    # The block once more, from its input: cheaper than keeping all of this for every block.
    x, n = block.x, R.shape[1]
    y = block.ln_1(x)
    q, k, v = block.project(y)
    A = _attention(q, k)
    q, A, O = (part[:, :, :n] for part in (q, A, A @ v))  # noqa: E741
    a = block.ls_1(block.attn.out_proj(_merge(O).to(x.dtype)))
    mid = x[:, :n] + a
    u = block.ln_2(mid)
    hidden = block.mlp.gelu(block.mlp.c_fc(u))
    m = block.ls_2(block.mlp.c_proj(hidden))
    x, y, a, mid, u, hidden, m = map(full_precision, (x, y, a, mid, u, hidden, m))

    R_mid, R_m = _add(mid, m, R, conserving)
    R_hidden = _linear(hidden, full_precision(block.mlp.c_proj.weight), R_m, conserving)
    R_mid = R_mid + _linear(u, full_precision(block.mlp.c_fc.weight), R_hidden, conserving)
    R_x, R_a = _add(x[:, :n], a, R_mid, conserving)
    R_O = block.split(_linear(_merge(O), block.W_o, R_a, conserving))
    R_A, R_v = _matmul(A, v, R_O)
    R_q, R_k = _matmul(q, k.mT, R_A)
    # No relevance reached the other tokens.
    R_A, R_q, R_x = (F.pad(part, (0, 0, 0, len(x[0]) - n)) for part in (R_A, R_q, R_x))
    R_qkv = torch.cat([_merge(R_q), _merge(R_k.mT), _merge(R_v)], dim=-1)
    return R_A, R_x + _linear(y, block.W_in, R_qkv, conserving)


# The rules, each written once. R is the relevance of a result; they return that of what it was made from.


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is: the published stabiliser (TE layers_ours.py:10-13)."""
    ratio = b + 1e-9
    return torch.div(a, ratio, out=ratio).masked_fill_(b == 0, 0)  # in place: these tensors are large


def _linear(x: Tensor, weight: Tensor, R: Tensor, conserving: bool) -> Tensor:
    """z+ rule for x @ weight.T: a positive product x_i w_oi takes its part of R_o, a negative one nothing.

    A product is positive where both factors are, or neither is. In the conserving rule the two groups share
    R_o (TE layers_ours.py:218). The published rule divides each group by its own sum, so both carry R_o: it
    doubles (layers_lrp.py:199).
    """
    groups = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
    sums = [x_s @ w_s.mT for x_s, w_s in groups]
    shares = [_divide(R, sums[0].add_(sums[1]))] * 2 if conserving else [_divide(R, group) for group in sums]
    (x_p, w_p), (x_n, w_n) = groups
    return (shares[0] @ w_p).mul_(x_p).addcmul_(shares[1] @ w_n, x_n)


def _add(a: Tensor, b: Tensor, R: Tensor, conserving: bool) -> tuple[Tensor, Tensor]:
    """z rule for a + b: R in proportion to the summands, which explodes where they cancel.

    The conserving rule then scales both parts, so that they sum to what R sums to, in proportion to the size
    of their sums (TE layers_ours.py:101-121, where a sum runs over the whole batch; here over each image).
    """
    per_unit = _divide(R, a + b)
    R_a, R_b = a * per_unit, b * per_unit
    if not conserving:
        return R_a, R_b
    total, sum_a, sum_b = (x.flatten(1).sum(dim=1).view(-1, *[1] * (x.ndim - 1)) for x in (R, R_a, R_b))
    size = sum_a.abs() + sum_b.abs()
    R_a = R_a * _divide(_divide(sum_a.abs(), size) * total, sum_a)
    R_b = R_b * _divide(_divide(sum_b.abs(), size) * total, sum_b)
    return R_a, R_b


def _matmul(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """z rule for a @ b, half of R to each operand (TE ViT_LRP.py:160-173)."""
    per_unit = _divide(R, a @ b)
    return a * (per_unit @ b.mT) / 2, b * (a.mT @ per_unit) / 2


# The forward pass, recorded.


@dataclass
class _Run:
    """One forward pass from block `first` on, and how the score follows from it."""

    model: nn.Module
    score: str
    texts: Tensor  # [b, d] unit vectors
    first: int
    blocks: list[_Block]
    embedding: Tensor  # [b, d]
    tokens: Tensor  # [b, N, D] with positions, before ln_pre
    last: Tensor  # [b, D] the class token after ln_post
    size: tuple[int, int]  # rows and columns of the patch grid
    proj: Tensor  # [D, d] from the residual stream to the embedding

    def direction(self, embedding: Tensor) -> Tensor:
        """[b, d] the gradient of each image's score with respect to its embedding [b, d]."""
        if self.score == "dot":
            return self.texts
        z = full_precision(embedding)
        length = z.norm(dim=-1, keepdim=True)
        along = (z * self.texts).sum(dim=-1, keepdim=True) / length.square() * z
        gradient = (self.texts - along) / length
        if self.score == "cosine":
            return gradient
        return gradient * full_precision(self.model.logit_scale).exp()

    def gradients(self, *activations: Tensor, of: Tensor | None = None) -> list[Tensor]:
        """[b, N, D] each: of the embedding's score (or another's) with respect to what blocks wrote."""
        embedding = self.embedding if of is None else of
        direction = self.direction(embedding).to(embedding.dtype)
        found = torch.autograd.grad(embedding, activations, direction, retain_graph=True)
        return [full_precision(self.blocks[0].batch_first(gradient)) for gradient in found]

    def read_out(self, x: Tensor) -> Tensor:
        """[b, d] the embedding that the residual stream x [b, D] would give."""
        return full_precision(self.model.visual.ln_post(x)) @ self.proj

    def class_token(self) -> Tensor:
        """[b, N] the class token's row of the identity, to propagate."""
        row = torch.zeros_like(self.tokens[:, :, 0])
        row[:, 0] = 1
        return row

    def grid(self, row: Tensor) -> Tensor:
        """[b, N] to [b, rows, cols], without the class token."""
        return row[:, 1:].unflatten(1, self.size)


def _run(
    model: nn.Module, images: Tensor, texts: Tensor, score: str, first: int, keep: tuple[str, ...]
) -> _Run:
    """Run the stock model, which is left as it was found.

    Args:
        first: keep what blocks from this one on take and give; negative counts from the end.
        keep: which of a block's "x", "y", "a", "out". "a" also keeps what gradients from `first` on need.
    """
    blocks, visual = _blocks(model), model.visual
    first %= len(blocks)
    blocks = blocks[first:]
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
    width = visual.ln_post.normalized_shape[0]
    proj = torch.eye(width) if visual.proj is None else full_precision(visual.proj)
    if texts.shape != (len(images), proj.shape[1]):
        expected = f"texts must be [{len(images)}, {proj.shape[1]}], one for each image"
        raise ValueError(f"{expected}; got {list(texts.shape)}")
    ends = {}

    def at_start(module: nn.Module, args: tuple) -> None:
        ends["tokens"] = full_precision(args[0])

    def at_end(module: nn.Module, args: tuple, output: Tensor) -> None:
        x = output.detach()  # [b, N, D], or [b, D] where the norm follows the pooling
        ends["last"] = full_precision(x[:, 0] if x.ndim == 3 else x).clone()

    hooks = [(visual.ln_pre.register_forward_pre_hook, at_start)]
    hooks.append((visual.ln_post.register_forward_hook, at_end))
    for i, block in enumerate(blocks):
        hooks += block.hooks(keep, start=i == 0 and "a" in keep)
    with _hooked(model, hooks), torch.no_grad():  # which also ends what the first block's hook switches on
        embedding = model.encode_image(images)
    embedding = embedding[0] if isinstance(embedding, tuple) else embedding
    texts = F.normalize(full_precision(texts).to(ends["tokens"]), dim=-1)
    patch = getattr(visual, "patch_size", None) or visual.conv1.kernel_size  # OpenAI's tower has none
    size = tuple(pixels // side for pixels, side in zip(images.shape[-2:], patch, strict=True))
    proj = proj.to(ends["tokens"])
    return _Run(model, score, texts, first, blocks, embedding, **ends, size=size, proj=proj)


@contextmanager
def _hooked(model: nn.Module, hooks: list[tuple[Callable, Callable]]) -> Iterator[None]:
    """Eval mode, no checkpointing, and the hooks, while open; all put back also after an error."""
    transformer = model.visual.transformer
    switched = [(module, "training") for module in model.modules() if module.training]
    if getattr(transformer, "grad_checkpointing", False):  # would run the blocks, and these hooks, twice
        switched.append((transformer, "grad_checkpointing"))
    with ExitStack() as stack:
        for register, hook in hooks:
            stack.callback(register(hook).remove)
        for module, name in switched:
            stack.callback(setattr, module, name, True)
            setattr(module, name, False)
        yield


def _attention(q: Tensor, k: Tensor) -> Tensor:
    """[b, H, rows of q, N]"""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)


def _merge(x: Tensor) -> Tensor:
    """[b, H, N, e] to [b, N, H e]: heads concatenated."""
    return x.transpose(1, 2).flatten(2)


def full_precision(x: Tensor) -> Tensor:
    """In float32 at least: half precision is for the model alone."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


# What a model must have.


def _start(model: nn.Module, start_layer: int) -> int:
    depth = len(_blocks(model))
    if not 0 <= start_layer < depth:
        expected = f"start_layer must be between 0 and {depth - 1} for a model of {depth} layers"
        raise ValueError(f"{expected}, got {start_layer}")
    return start_layer


def _blocks(model: nn.Module) -> list[_Block]:
    """One adapter per block, or a BaselineError that names the model's tower and what is in the way."""
    visual = getattr(model, "visual", None)
    wrapper = visual is None and hasattr(model, "module")
    reason = "it is a wrapper; give the model inside, its .module" if wrapper else _obstacle(visual)
    if reason is not None:
        tower = f"{type(model).__name__} with image tower {type(visual).__name__}"
        raise BaselineError(f"no baseline supports {tower}: {reason}")
    return [_Block(block) for block in visual.transformer.resblocks]


def _obstacle(visual: nn.Module | None) -> str | None:
    """Why these methods cannot take an image tower; None where they can."""
    for part in [] if visual is None else visual.modules():
        if hasattr(part, "module"):
            return f"{type(part).__name__} is a wrapper; put its .module in its place"
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            return "it is compiled, and hooks do not run in it; use it before torch.compile"
    if hasattr(visual, "trunk"):
        return f"its trunk {type(visual.trunk).__name__} comes from timm"
    transformer = getattr(visual, "transformer", None)
    if not hasattr(transformer, "resblocks") or not hasattr(visual, "ln_post"):
        return "it is no ViT (transformer.resblocks and ln_post)"
    pooled = getattr(visual, "pool_type", "tok") != "tok" or getattr(visual, "global_average_pool", False)
    if pooled or getattr(visual, "attn_pool", None) is not None:
        return "it does not read out the class token, from which these maps start"
    orders = {getattr(transformer, "batch_first", None)} - {None}  # from open_clip 2.25 on, it says
    for block in transformer.resblocks:
        if not _is_standard(block):
            return f"its block {type(block).__name__} is not open_clip's standard one"
        orders.add(block.attn.batch_first)
        if len(orders) > 1:
            return f"its block {type(block).__name__} has tokens and images on other axes than the rest"
    return None


def _is_standard(block: nn.Module) -> bool:
    """Is it torch's attention with one input projection, and no step but those at the top of this file?"""
    attn = getattr(block, "attn", None)
    if not isinstance(attn, nn.MultiheadAttention) or attn.in_proj_weight is None:
        return False
    if not isinstance(getattr(block, "ln_attn", nn.Identity()), nn.Identity):  # early releases have it
        return False
    steps = [name for name, part in block.mlp.named_children() if not isinstance(part, nn.Identity)]
    return steps == ["c_fc", "gelu", "c_proj"]


class _Block:
    """A ResidualAttentionBlock, its attention taken apart, with what it took and gave in the forward pass."""

    x: Tensor  # [b, N, D] its input
    y: Tensor  # [b, N, D] the attention's input
    a: Tensor  # what out_proj wrote, on the block's own axes: gradients need what the model went on with
    out: Tensor  # [b, N, D] its output

    def __init__(self, block: nn.Module) -> None:
        self.module = block
        self.attn, self.mlp, self.ln_1, self.ln_2 = block.attn, block.mlp, block.ln_1, block.ln_2
        self.ls_1, self.ls_2 = (getattr(block, name, nn.Identity()) for name in ("ls_1", "ls_2"))
        self.W_in = full_precision(block.attn.in_proj_weight)  # [3 D, D]
        self.W_o = full_precision(block.attn.out_proj.weight)  # [D, D]

    def hooks(self, keep: tuple[str, ...], start: bool) -> list[tuple[Callable, Callable]]:
        """(how to register, hook) of what records `keep` and, where `start`, begins the graph here."""

        def enter(module: nn.Module, args: tuple) -> tuple | None:
            self.x = self.batch_first(args[0]) if "x" in keep else None
            if not start:
                return None
            torch.set_grad_enabled(True)
            return (args[0].detach().requires_grad_(), *args[1:])  # nothing below this block needs a gradient

        def leave(name: str, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            output = output[0] if isinstance(output, tuple) else output
            setattr(self, name, output if name == "a" else self.batch_first(output))

        hooks = [(self.module.register_forward_pre_hook, enter)]
        modules = {"y": self.ln_1, "a": self.attn, "out": self.module}
        for name in modules.keys() & set(keep):
            hooks.append((modules[name].register_forward_hook, partial(leave, name)))
        return hooks

    def batch_first(self, x: Tensor) -> Tensor:
        """[b, N, D] from the block's own order of axes."""
        return x if self.attn.batch_first else x.transpose(0, 1)

    def split(self, x: Tensor) -> Tensor:
        """[b, N, H e] to [b, H, N, e]"""
        return x.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)

    def project(self, y: Tensor, names: str = "qkv") -> list[Tensor]:
        """Queries, keys and values [b, H, N, e] of the attention's input; or neighbours among them."""
        first, width = "qkv".index(names), self.attn.embed_dim
        rows, bias = slice(first * width, (first + len(names)) * width), self.attn.in_proj_bias
        bias = None if bias is None else full_precision(bias)[rows]
        projected = F.linear(full_precision(y), self.W_in[rows], bias)
        return [self.split(part) for part in projected.split(width, dim=-1)]

    def attention_gradient(self, da: Tensor, v: Tensor) -> Tensor:
        """[b, H, N, N] ds/dA from ds/da [b, N, D]."""
        return self.split(da @ self.W_o) @ v.mT
