"""Zero-shot classification with a CLIP model: text embeddings, classifiers, banks of descriptions."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import open_clip
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import demo
from files import InputError, atomic_write, read_lines
from loading import Clip, load_clip, quiet

__all__ = "Bank", "Clip", "classifier", "default_bank", "embed_texts", "load_bank", "load_clip", "templates"
CACHED = 500  # texts from which their embeddings are kept: fewer are soon made again


@torch.no_grad()
def embed_texts(clip: Clip, texts: Sequence[str], title: str | None = None, batch_size: int = 256) -> Tensor:
    """[t, d] unit vectors in float32, on the model's device; those of many texts are kept in a file.

    Raises:
        InputError: as `tokenize`; or the text tower's numbers overflow.
    """
    path = None
    if clip.cache is not None and len(texts) >= CACHED:
        key = "\n".join([clip.name, str(clip.dtype), weights_hash(clip.model), *texts])
        path = clip.cache / f"{digest(key.encode(errors='backslashreplace'))}.safetensors"
        with suppress(OSError, SafetensorError, KeyError, TypeError), safe_open(path, "pt") as file:
            kept = file.get_tensor("texts")
            if file.metadata()["hash"] == tensor_hash(kept):  # else another program's, or a broken one
                return kept.to(clip.device)
    rows = []
    chunks = range(0, len(texts), batch_size)
    with tqdm(chunks, desc=title, unit="x256", leave=False, disable=title is None) as progress:
        for i in progress:
            tokens = tokenize(clip, texts[i : i + batch_size])
            rows.append(F.normalize(clip.model.encode_text(tokens).float(), dim=-1))
    found = torch.cat(rows)
    if not found.isfinite().all():
        embeddings = f"the text embeddings of {clip.name} ({clip.weights})"
        raise InputError(f"{embeddings} are not numbers: its weights overflow")
    if path is not None:
        # A full disk costs the next run some time, and this one nothing.
        with suppress(OSError, SafetensorError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as new:
                kept = found.cpu().contiguous()
                save_file({"texts": kept}, new, metadata={"hash": tensor_hash(kept)})
    return found


_hashes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def weights_hash(model: nn.Module) -> str:
    """Of all parameters and buffers, and of the layers' types (GELU has no weights); made once a model."""
    if model not in _hashes:
        parts = (f"{name} {tensor_hash(tensor)}" for name, tensor in model.state_dict().items())
        _hashes[model] = digest("\n".join([str(model), *parts]).encode())
    return _hashes[model]


def tensor_hash(tensor: Tensor) -> str:
    """Of its numbers, type and shape."""
    bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{tensor.dtype} {list(tensor.shape)} {digest(bits.numpy())}"


def digest(data: bytes) -> str:
    """32 hexadecimal digits that tell whether anything differs."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def tokenize(clip: Clip, texts: Sequence[str]) -> Tensor:
    """[t, context] on the model's device.

    Raises:
        InputError: a text that the tokenizer does not know or would cut.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            hint = "give it in the terminal's encoding, or UTF-8 in a file"
            raise InputError(f"this text is no Unicode: {text[:80]!r}; {hint}") from error
    counts, most = count_tokens(clip.tokenizer, texts)
    for text, count in zip(texts, counts, strict=True):
        if count > most:  # the tokenizer would cut it without a message
            found = f"this text has {count}: {text[:80]!r}..."
            raise InputError(f"the model reads {most} tokens at most, and {found}")
    try:
        return clip.tokenizer(list(texts)).to(clip.device)
    except ValueError as error:  # the demo's tokenizer refuses words it was not trained on
        raise InputError(str(error)) from error


def count_tokens(tokenizer: Callable, texts: Sequence[str]) -> tuple[list[int], int]:
    """(the tokens of each text, how many the model reads); the demo's tokenizer sees to that itself."""
    length = getattr(tokenizer, "context_length", None)
    if hasattr(tokenizer, "encode"):  # open_clip's own, which adds a start and an end
        return [len(tokenizer.encode(text)) for text in texts], length - 2
    if not hasattr(tokenizer, "tokenizer"):
        return [0] * len(texts), 0
    # open_clip's wrappers of transformers' tokenizers; the mode "clips" adds three tokens of its own
    added = getattr(tokenizer, "tokenizer_mode", None) != "clips"
    with quiet():
        cleaned = [tokenizer.clean_fn(text) for text in texts]
        tokens = tokenizer.tokenizer(cleaned, add_special_tokens=added)["input_ids"]
    return [len(row) for row in tokens], length - (0 if added else 3)


@torch.no_grad()
def classifier(
    clip: Clip, names: Sequence[str], templates: Sequence[str | Callable], title: str | None = None
) -> Tensor:
    """[c, d] unit vectors: each class's mean prompt embedding, normalised (Radford et al. 2021, 3.1.4)."""
    embeddings = embed_texts(clip, fill_templates(names, templates), title)
    return F.normalize(embeddings.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)


def fill_templates(names: Sequence[str], templates: Sequence[str | Callable]) -> list[str]:
    """All prompts of the first name, then of the second, and so on."""
    fill = [template if callable(template) else template.format for template in templates]
    return [template(name) for name in names for template in fill]


def templates(clip: Clip) -> tuple:
    """CLIP's 80 prompt templates for ImageNet; for the demo, the six ways its captions begin."""
    return demo.TEMPLATES if clip.is_demo else open_clip.OPENAI_IMAGENET_TEMPLATES


@dataclass(frozen=True)
class Bank:
    """Descriptions, each with the category it stands under."""

    texts: list[str]
    categories: list[str]
    path: Path
    repeats: int = 0  # lines of the file that say a text again

    def of(self, category: str) -> list[str]:
        """The descriptions of one category."""
        return [text for text, name in zip(self.texts, self.categories, strict=True) if name == category]

    @property
    def name(self) -> str:
        """The path of the file, within the repository where it lies there."""
        return str(self.path).removeprefix(f"{Path(__file__).parent}{os.sep}")


def default_bank(clip: Clip) -> Path:
    """The general bank; for the demo its own, in the words that it knows."""
    return demo.FOLDER / demo.BANKS[clip.name] if clip.is_demo else Path(__file__).parent / "text_bank.txt"


def load_bank(path: str | Path, what: str = "text bank") -> Bank:
    """One description per line, under `# category` lines; without any, all are of one category, "texts".

    A text that stands in the file again is taken once, under its first category. "#1 fan" is a text.

    Raises:
        InputError: no such file, or no descriptions; it speaks of the file as `what`.
    """
    path = Path(path)
    texts: dict[str, str] = {}
    category, repeats = "texts", 0
    for line in map(str.strip, read_lines(path, f"cannot read {what} {path}")):
        heading = re.fullmatch(r"#+(\s.*)?", line)
        if heading:
            category = (heading[1] or "").strip()
        elif line:
            repeats += line in texts
            texts.setdefault(line, category)
    if not texts:
        expected = "expected one per line, under `# category` lines"
        raise InputError(f"{what} {path} holds no descriptions: {expected}")
    return Bank(list(texts), list(texts.values()), path, repeats)
