"""CLIP's image embedding as a sum of terms: one per attention head, per MLP, and per image patch.

Gandelsman, Efros, Steinhardt, "Interpreting CLIP's Image Representation via Text-Based Decomposition",
section 3, https://arxiv.org/abs/2310.05916. This file needs torch alone. It takes the vision transformers of
open_clip (2.0 to 3.3) and of OpenAI's `clip` that read out their class token; with families.py beside it,
open_clip's others, too (SigLIP, EVA, CoCa, ...). MIT licence, (c) 2026 The TextSpan reference authors.

Four facts, in the names that the code uses:

1. A residual stream is a sum. The class token leaves the last block as x = stem + attentions + MLPs, where
   the stem is the token as it enters the first block.
2. Attention is a sum over heads and source tokens. A head writes z W_O, z = sum over tokens n of A[n] v[n].
   A is how the class token attends in this head, v = y W_V + b_V, and y is what ln_1 gives to the attention.
   A sums to one, so b_V is part of z. The output bias b_O belongs to no head.
3. LayerNorm (ln_post: weight gamma, bias beta) is linear once sigma, the standard deviation that it divides
   each image's x by, is held fixed at its value from this forward pass. With the projection P (visual.proj):
       embedding = x G / sigma + shift       G = (I - 11'/D) diag(gamma) P       shift = beta P
4. So whatever writes s onto the class token adds s G / sigma to the embedding. That is its term.

The forward pass is the model's own. Hooks work out A and z from y, which adds up to a tenth to its time.

Axes: b images   L layers   H heads   N tokens, class token first   t texts
      e width of a head   D width of the residual stream   d width of the embedding
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, einsum, nn

__all__ = "Decomposition", "DecompositionError", "check", "decompose", "head_maps", "heatmap", "token_scores"
# Relative errors of the sum that rounding explains, by the precision of the forward pass.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.1}
Layers = int | Sequence[int] | None


class DecompositionError(ValueError):
    """The model cannot be decomposed exactly, or its terms do not sum to the embedding; the message tells."""


@dataclass(frozen=True, repr=False)
class Decomposition:
    """An image embedding, not normalised, as a sum of terms in float32 (float64 for a float64 model)."""

    embedding: Tensor  # [b, d] what model.encode_image returned, in the model's own precision
    stem: Tensor  # [b, d] from what enters the first block
    heads: Tensor  # [b, L, H, d]
    mlps: Tensor  # [b, L, d]
    constant: Tensor  # [b, d] from output biases and LayerNorm's beta; zero for convention="paper"
    values: Tensor  # [b, L, H, e] z / sigma; heads = values @ head_maps(model) for convention="term"
    own: Tensor | None = None  # [b, L, H, e] the part of `values` whose source is the class token itself
    pool: Tensor | None = None  # [b, d] from the MLP of attention pooling, in the models that have one

    def total(self) -> Tensor:
        """[b, d] the sum of all terms."""
        total = self.stem + self.heads.sum(dim=(1, 2)) + self.mlps.sum(dim=1) + self.constant
        return total if self.pool is None else total + self.pool

    def error(self) -> float:
        """max |total - embedding| / max |embedding|, over all images; NaN if either holds a NaN."""
        return float((self.total() - self.embedding).abs().max() / self.embedding.abs().max())

    def without(self, heads: Sequence[tuple[int, int]], mean: Tensor) -> Tensor:
        """[b, d] the embedding, with the terms of heads (layer, head) from a mean [L, H, d] (section 4)."""
        mean = mean.to(self.heads).expand(self.heads.shape[1:])
        return self.embedding - sum(self.heads[:, i, head] - mean[i, head] for i, head in set(heads))

    def __repr__(self) -> str:
        shapes = [f"{name} {list(x.shape)}" for name, x in vars(self).items() if x is not None]
        return f"{type(self).__name__}({', '.join(shapes)})"


@torch.no_grad()
def decompose(
    model: nn.Module, images: Tensor, *, convention: str = "term", tolerance: float | None = None
) -> Decomposition:
    """Split model.encode_image(images) into terms that sum to it (sections 3.2 and 3.3 of the paper).

    The model runs once, in eval mode and without gradients, and is left as it was found.

    Args:
        images: [b, 3, rows, columns] as encode_image takes them.
        convention: who gets b_O, LayerNorm's mean and beta. "term": LayerNorm's mean of x is the sum of the
            terms' own means, which G subtracts; b_O and beta are the constant. "paper", the authors' way: b_O
            is divided evenly over its layer's heads, mean and beta over stem, L attentions and L MLPs, then
            heads. (They also divide by the embedding's norm.) Either way the sum is the embedding.
        tolerance: the largest `error()` accepted. None: what rounding explains in the model's precision. A
            larger error means a wrong sum, from a weight that changes while the model runs, say.

    Raises:
        DecompositionError: the model has another architecture, or the sum is wrong; the message says which.
    """
    tower = open_tower(model, convention, images=images)
    terms = tower.terms(images, convention)
    if tolerance is None:
        autocast = torch.is_autocast_enabled(images.device.type)
        tolerance = TOLERANCE[torch.bfloat16 if autocast else terms.embedding.dtype]
    if tolerance < float("inf") and not terms.error() <= tolerance:  # an error of NaN is too large
        error = f"relative error {terms.error():.1e}, tolerance {tolerance:.1e} ({terms.embedding.dtype})"
        culprit = beside("diagnose", "culprit")
        where = culprit(terms, tower, images, tolerance) if culprit else "; for the block see diagnose.py"
        raise DecompositionError(f"the terms do not sum to the embedding: {error}{where}")
    return terms


def check(model: nn.Module, images: Tensor, tolerance: float = 1e-4) -> float:
    """The relative error of the sum; a larger one raises, and names its block. (For half precision: 3e-2.)"""
    return decompose(model, images, tolerance=tolerance).error()


def head_maps(model: nn.Module) -> Tensor:
    """[L, H, e, d] W_O G, from a head's values to its term. (Under attention pooling: identities.)"""
    return open_tower(model).head_maps()


@torch.no_grad()
def token_scores(
    model: nn.Module, images: Tensor, texts: Tensor, layers: Layers = None, *, convention: str = "term"
) -> Tensor:
    """The dot product of each head's term with each text, split by source token (section 3.3 of the paper).

    Args:
        model, images, convention: as for `decompose`; "paper" divides biases and means over the tokens, too.
        texts: [t, d] text embeddings, or any vectors of the joint space.
        layers: which, in the order wanted: 0 is the first, negative ones count from the end. None: all.

    Returns:
        [b, layers, H, N, t]: class token and registers first, if there are any, then the patches row by row.
        The sum over N is decompose(...).heads @ texts.T.
    """
    tower = open_tower(model, convention, images=images, texts=texts)
    L = len(tower.W_O)
    wanted = list(range(L) if layers is None else [layers] if isinstance(layers, int) else layers)
    if not wanted or not all(isinstance(layer, int) and -L <= layer < L for layer in wanted):
        raise ValueError(f"layers must be between {-L} and {L - 1} and at least one, got {wanted}")
    return tower.scores(images, texts.to(tower.W_O[0]), convention, [layer % L for layer in wanted])


@torch.no_grad()
def heatmap(model: nn.Module, images: Tensor, texts: Tensor, *, convention: str = "term") -> Tensor:
    """[b, t, rows, columns] what each patch adds to <embedding, text> through all heads (section 5).

    Arguments as for `token_scores`. The rest comes from other source tokens, MLPs, the stem and the constant.
    """
    tower = open_tower(model, convention, images=images, texts=texts)
    texts, every = texts.to(tower.W_O[0]), list(range(len(tower.W_O)))
    scores = tower.scores(images, texts, convention, every, by_head=False).sum(dim=(1, 2))
    return scores[:, tower.prefix :].mT.unflatten(2, tower.grid(images))


@dataclass
class Written:
    """What a forward pass wrote on the class token, before the read-out."""

    embedding: Tensor  # [b, d] as the model returned it
    stem: Tensor  # [b, D] what enters the first block
    z: Tensor  # [b, L, H, e]
    own: Tensor | None  # [b, L, H, e] the part of z whose source is the class token itself
    b_O: Tensor  # [b or 1, L, D] what the attentions write and no head does
    mlps: Tensor  # [b, L, D]
    last: Tensor  # [b, D] the x of the facts: what leaves the last block


@dataclass
class ReadOut:
    """embedding = x @ G / sigma + shift"""

    G: Tensor  # [D, d]
    sigma: Tensor  # [b, 1]
    shift: Tensor  # [b, d]

    def read(self, s: Tensor) -> Tensor:
        """The terms [b, ..., d] of what was written, s [b, ..., D] (fact 4)."""
        return s @ self.G / self.sigma.view(-1, *[1] * (s.ndim - 1))

    def layer_shares(self, w: Written) -> Tensor:
        """[b, L, d] what convention "paper" adds to the heads of each layer, all heads together."""
        return self.read(w.b_O) + self.shift[:, None] / (2 * w.mlps.shape[1] + 1)


def terms_of(w: Written, W_O: list[Tensor], out: ReadOut, convention: str) -> Decomposition:
    """Read out everything that was written (fact 4); share out what belongs to no term, by the convention."""
    heads = [out.read(einsum("bHe,HeD->bHD", z, W)) for z, W in zip(w.z.unbind(dim=1), W_O, strict=True)]
    stem, heads, mlps = out.read(w.stem), torch.stack(heads, dim=1), out.read(w.mlps)
    constant = out.shift + out.read(w.b_O).sum(dim=1)
    if convention == "paper":
        share = out.shift / (2 * len(W_O) + 1)
        stem = stem + share
        heads = heads + out.layer_shares(w)[:, :, None] / heads.shape[2]
        mlps = mlps + share[:, None]
        constant = torch.zeros_like(stem)
    values, own = (None if z is None else z / out.sigma[..., None, None] for z in (w.z, w.own))
    return Decomposition(w.embedding, stem, heads, mlps, constant, values, own)


class ClipTower:
    """A vision transformer that reads out its class token behind one LayerNorm, as CLIP's do."""

    name, prefix = "class token", 1  # prefix: tokens before the patches

    def __init__(self, model: nn.Module) -> None:
        self.model, self.norm, self.P = model, model.visual.ln_post, upcast(model.visual.proj)
        self.width, self.hooks = self.P.shape[1], []  # hooks: more to run in `watch`; diagnose.py sets some
        self.blocks = list(model.visual.transformer.resblocks)
        self.batch_first = self.blocks[0].attn.batch_first  # False before open_clip 2.24: tokens [N, b, D]
        self.attentions = [getattr(block, "ls_1", block.attn) for block in self.blocks]  # write to the stream
        self.W_O, self.b_O = [], []  # L x [H, e, D], L x [D]
        for attn, writer in zip([block.attn for block in self.blocks], self.attentions, strict=True):
            layer_scale = upcast(getattr(writer, "gamma", torch.ones_like(self.norm.weight)))
            self.W_O.append((upcast(attn.out_proj.weight).T * layer_scale).unflatten(0, (attn.num_heads, -1)))
            self.b_O.append(upcast(attn.out_proj.bias) * layer_scale)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Has it such a tower? (OpenAI's lacks pool_type; older open_clip has global_average_pool.)"""
        visual = getattr(model, "visual", None)
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", ())
        plain = [type(getattr(block, "attn", None)) is nn.MultiheadAttention for block in blocks]
        pools = [getattr(visual, name, None) for name in ("attn_pool", "global_average_pool")]
        return any(plain) and all(plain) and not any(pools) and getattr(visual, "pool_type", "tok") == "tok"

    def G(self, convention: str = "term") -> Tensor:
        """[D, d] the G of fact 3; for "paper" without its first factor, I - 11'/D."""
        G = upcast(self.norm.weight)[:, None] * self.P
        return G - G.mean(dim=0) if convention == "term" else G

    def read_out(self, x: Tensor, convention: str) -> ReadOut:
        """Fact 3, for the last residual x [b, D]."""
        G, sigma = self.G(convention), (x.var(dim=-1, correction=0, keepdim=True) + self.norm.eps).sqrt()
        # For "paper" G lacks (I - 11'/D), so the shift subtracts x's mean. For "term" G.sum(dim=0) is zero.
        shift = upcast(self.norm.bias) @ self.P - x.mean(dim=-1, keepdim=True) / sigma * G.sum(dim=0)
        return ReadOut(G, sigma, shift)

    def terms(self, images: Tensor, convention: str) -> Decomposition:
        w = self.watch(images)
        with torch.autocast(images.device.type, enabled=False):
            return terms_of(w, self.W_O, self.read_out(w.last, convention), convention)

    def head_maps(self) -> Tensor:
        with torch.autocast(self.W_O[0].device.type, enabled=False):
            return torch.stack([W @ self.G() for W in self.W_O])

    def scores(self, images: Tensor, texts: Tensor, convention: str, layers: list, by_head=True) -> Tensor:
        """[b, layers, H, N, t]; without `by_head` summed over heads, [b, layers, 1, N, t]."""
        found = {}

        def at_attention(layer: int, A: Tensor, v_times: Callable) -> None:
            scores = A[..., None] * v_times(self.W_O[layer] @ (self.G(convention) @ texts.T))  # [b, H, N, t]
            found[layer] = scores if by_head else scores.sum(dim=1, keepdim=True)

        w = self.watch(images, at_attention, layers)
        with torch.autocast(images.device.type, enabled=False):
            out = self.read_out(w.last, convention)
            scores = torch.stack([found[layer] for layer in layers], dim=1) / out.sigma[..., None, None, None]
            if convention == "paper":
                shares = out.layer_shares(w)[:, layers] @ texts.T  # [b, layers, t]
                scores = scores + shares[:, :, None, None] / scores.shape[2:4].numel()
            return scores

    def watch(self, images: Tensor, at_attention: Callable | None = None, layers: Sequence = ()) -> Written:
        """Run the model; in these layers call at_attention(layer, A [b, H, N], M -> v @ M)."""
        stem, z, own, mlps, last = [], [], [], [], []

        def before_attention(layer: int, attn: nn.MultiheadAttention, args: tuple) -> None:
            y = upcast(args[0] if self.batch_first else args[0].transpose(0, 1))  # [b, N, D]
            W_Q, W_K, W_V = upcast(attn.in_proj_weight).unflatten(0, (3, attn.num_heads, -1))  # [H, e, D]
            b_Q, _, b_V = upcast(attn.in_proj_bias).unflatten(0, (3, attn.num_heads, -1))  # softmax drops b_K
            q = einsum("bD,HeD->bHe", y[:, 0], W_Q) + b_Q  # the one query; (q W_K) y needs no keys
            logits = einsum("bHD,bND->bHN", einsum("bHe,HeD->bHD", q, W_K), y) * q.shape[-1] ** -0.5
            A = logits.softmax(dim=-1)
            z.append(einsum("bHD,HeD->bHe", einsum("bHN,bND->bHD", A, y), W_V) + b_V)
            own.append(A[:, :, :1] * (einsum("bD,HeD->bHe", y[:, 0], W_V) + b_V))
            if layer in layers:
                at_attention(layer, A, lambda M: einsum("bND,HDt->bHNt", y, W_V.mT @ M) + b_V[:, None] @ M)

        hooks = [(self.blocks[0].register_forward_pre_hook, lambda _, args: stem.append(self.token(args[0])))]
        hooks.append((self.blocks[-1].register_forward_hook, lambda _, args, x: last.append(self.token(x))))
        for layer, block in enumerate(self.blocks):
            hooks.append((block.attn.register_forward_pre_hook, partial(before_attention, layer)))
            mlp = getattr(block, "ls_2", block.mlp)
            hooks.append((mlp.register_forward_hook, lambda _, args, x: mlps.append(self.token(x))))
        embedding = image_embedding(self.model, images, hooks + self.hooks)
        z, own, mlps = (torch.stack(parts, dim=1) for parts in (z, own, mlps))
        return Written(embedding, stem[0], z, own, torch.stack(self.b_O)[None], mlps, last[0])

    def token(self, x: Tensor) -> Tensor:
        """[b, D] the class token; a copy, since a view would hold on to all tokens."""
        return upcast(x[:, 0] if self.batch_first else x[0]).clone()

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = getattr(self.model.visual, "patch_size", None) or self.model.visual.conv1.kernel_size
        return images.shape[-2] // rows, images.shape[-1] // columns


def open_tower(model: nn.Module, convention: str = "term", **given: object) -> ClipTower:
    """The model's image tower, once the images and texts that are given are found to be usable."""
    open_family = beside("families", "open_family")
    if open_family is None and not ClipTower.fits(model):
        files = "families.py, towers.py, readouts.py, blocks.py and attention.py"
        hint = f"its `visual` is not CLIP's class-token ViT; put {files} beside decompose.py"
        raise DecompositionError(f"cannot decompose {type(model).__name__}: {hint}")
    tower = ClipTower(model) if open_family is None else open_family(model, convention)
    if convention not in ("term", "paper"):
        raise ValueError(f'convention must be "term" or "paper", got {convention!r}')
    texts = f"[t, {tower.width}], embeddings as encode_text gives"
    wanted = {"images": "[b, 3, rows, columns] (x[None] for one image x)", "texts": texts}
    for name, x in given.items():
        shape = list(x.shape) if isinstance(x, Tensor) else [type(x).__name__]
        if shape[0] == 0 or (len(shape) != 4 if name == "images" else shape[1:] != [tower.width]):
            raise ValueError(f"{name} must be {wanted[name]}, got {shape}")
    return tower


def beside(file: str, function: str) -> Callable | None:
    """A function of another file of this project, where that lies beside this one."""
    try:
        module = importlib.import_module(f"{__package__}.{file}" if __package__ else file)
    except ImportError:
        return None
    return getattr(module, function, None)


def image_embedding(model: nn.Module, images: Tensor, hooks: Sequence[tuple] = ()) -> Tensor:
    """[b, d] model.encode_image(images), not normalised, in eval mode; the model is left as it was found.

    Each hook is a module's register_..., and a function. It runs in full precision, and in this thread alone.
    """
    thread = threading.get_ident()

    def here(hook: Callable, *args: object) -> None:
        if threading.get_ident() == thread:  # another one may run the same model meanwhile
            with torch.autocast(images.device.type, enabled=False):
                hook(*args)

    with ExitStack() as undo:
        for register, hook in hooks:
            undo.callback(register(partial(here, hook)).remove)
        for module in [module for module in model.modules() if module.training]:
            undo.callback(setattr, module, "training", True)
            module.training = False
        normalises = "normalize" in inspect.signature(model.encode_image).parameters
        output = model.encode_image(images, **({"normalize": False} if normalises else {}))
    output = output[0] if isinstance(output, tuple) else output  # towers with output_tokens=True
    if output.ndim == 2:
        return output
    raise DecompositionError(f"encode_image must give [b, d], and gives {list(output.shape)}")


def upcast(x: Tensor) -> Tensor:
    """float32 at least."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
