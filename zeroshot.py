"""A CLIP model and its texts: loading, text embeddings, zero-shot classifiers, banks of descriptions."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import socket
import struct
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit
from urllib.request import getproxies
from weakref import WeakKeyDictionary

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import demo
from files import InputError, atomic_write, read_lines

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TENSORS_ONLY = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}


@dataclass(frozen=True)
class Clip:
    """A model with its transform and tokenizer. `name` and `weights` are printed above every table."""

    model: nn.Module
    preprocess: Callable
    open_tokenizer: Callable[[], Callable]
    name: str
    weights: str
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the images it takes
    is_demo: bool = False
    cache: Path | None = None  # folder that keeps the embeddings of many texts
    notes: tuple[str, ...] = ()  # what open_clip warned of when it loaded the model

    @cached_property
    def tokenizer(self) -> Callable:
        """Opened for the first text: the decomposition needs none."""
        return self.open_tokenizer()


def load_clip(
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    image_size: int | None = None,
    out: Path | None = None,
) -> Clip:
    """A model ready to run: the demo's without `model`, else open_clip's of that name.

    Args:
        model: a name that open_clip knows ("ViT-L-14"), hf-hub:... or local-dir:..., or that of one of the
            demo's models, "demo-vit" or "demo-vit-written".
        pretrained: one of open_clip's tags for it, which also says whether the model has QuickGELU; or a
            checkpoint file (.safetensors, .pt, .bin; loaded with weights_only). "none": random weights, which
            is enough to check the decomposition.
        device: "auto" (a GPU where there is one), or torch's name of a device.
        precision: "fp32" or "bf16" (the sums of the decomposition stay in fp32).
        image_size: side of the images in pixels, if not the model's own; open_clip interpolates the
            positions.
        out: folder for results; the embeddings of banks of texts are kept in it for the next run.

    Raises:
        InputError: unknown name or tag, missing or unsuitable file, weights that are not numbers.
    """
    place = find_device(device)
    size = {} if image_size is None else {"force_image_size": image_size}
    if model is None and pretrained is not None:
        expected = f"the architecture that these weights are for ({demo.NAME}: the demo's)"
        raise InputError(f"--pretrained needs --model: {expected}")
    if model in (None, *demo.BANKS):
        clip = _from_demo(model or demo.NAME, pretrained, place, precision, size)
    else:
        clip = _from_open_clip(model, pretrained, place, precision, size)
    for name, parameter in clip.model.named_parameters():
        # Neither embedding reads CoCa's captioner, of which open_clip leaves a part uninitialised.
        if not name.startswith("text_decoder.") and not parameter.isfinite().all():
            weights = f"the weights of {clip.name} ({clip.weights})"
            raise InputError(f"{weights} hold a NaN or an infinity in {name}")
    return replace(clip, cache=None if out is None or clip.is_demo else Path(out) / "texts")


def find_device(name: str) -> torch.device:
    """The device of this name, which was tried; auto: a GPU where there is one."""
    try:
        with quiet():
            gpu_or_cpu = "cuda" if torch.cuda.is_available() else "cpu"
            device = torch.device(gpu_or_cpu if name == "auto" else name)
            torch.ones(1, device=device).item()
    except Exception as error:  # of a backend that is not in this build, of a driver, of a name
        why = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        asked = f"--device {name or '(empty)'}"
        raise InputError(f"{asked} cannot be used here: {why}; try auto or cpu") from error
    return device


def _from_demo(
    name: str, pretrained: str | None, device: torch.device, precision: str, size: dict[str, int]
) -> Clip:
    weights = pretrained or f"demo/{name}.safetensors"
    chosen = {} if pretrained is None else {"weights": None if pretrained == "none" else pretrained}
    with _loading(name, pretrained, size):
        network, preprocess, tokenizer = demo.load(device, name=name, **chosen, precision=precision, **size)
    dtype = PRECISIONS[precision]
    return Clip(network, preprocess, lambda: tokenizer, name, weights, device, dtype, is_demo=True)


def _from_open_clip(
    model: str, pretrained: str | None, device: torch.device, precision: str, size: dict[str, int]
) -> Clip:
    weights, options = pretrained or model, {"require_pretrained": pretrained != "none", **size}
    if ":" in model and pretrained is not None:
        raise InputError(f"--model {model} brings its own weights: leave out --pretrained {pretrained}")
    if ":" not in model:
        model = known_name(model)
        weights = pretrained = _known_weights(model, pretrained)
        options["force_quick_gelu"] = open_clip.get_pretrained_cfg(model, weights).get("quick_gelu", False)
    source = None if pretrained == "none" else pretrained
    options |= {"device": device, "precision": precision, "pretrained_text": False}
    with _loading(model, weights, size) as warned:
        network, _, preprocess = open_clip.create_model_and_transforms(model, source, **options)
    expected = f"No pretrained weights loaded for model '{model}'. Model initialized randomly."
    notes = tuple(f"open_clip: {line}" for line in warned if line != expected)
    dtype, tokenizer = PRECISIONS[precision], partial(open_tokenizer, model)
    return Clip(network.eval(), preprocess, tokenizer, model, weights, device, dtype, notes=notes)


def known_name(model: str) -> str:
    """open_clip's name of an architecture, found in any case, and with OpenAI's slash (ViT-B/16)."""
    known = {name.casefold(): name for name in open_clip.list_models()}
    asked = model.replace("/", "-").casefold()
    if asked not in known:
        near = ", ".join(known[name] for name in difflib.get_close_matches(asked, known, n=3, cutoff=0.4))
        raise InputError(f"open_clip knows no model {model!r}; near it: {near or 'nothing'}")
    return known[asked]


def _known_weights(model: str, pretrained: str | None) -> str:
    """One of open_clip's tags for the model, as it writes them; the path of a file; or none."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None:
        choices = f"a file, none (random weights), or one of {', '.join(tags) or '(no tags)'}"
        raise InputError(f"--model {model} needs --pretrained: {choices}")
    if open_clip.is_pretrained_cfg(model, pretrained):
        return pretrained.lower().replace("-", "_")
    if pretrained == "none" or Path(pretrained).is_file():
        return pretrained
    if Path(pretrained).suffix in (".safetensors", ".pt", ".pth", ".bin", ".npz"):
        raise InputError(f"--pretrained {pretrained}: there is no such file")
    expected = f"open_clip's tags for {model}: {', '.join(tags)}"
    raise InputError(f"--pretrained {pretrained!r} is neither a file nor one of {expected}")


@contextmanager
def _loading(model: str, weights: str | None, size: dict[str, int]) -> Iterator[list[str]]:
    """Any error inside becomes an InputError: open_clip, torch, safetensors and the hub raise many kinds.

    Afterwards the list holds what open_clip warned of. torch.load unpickles tensors alone: open_clip asks for
    weights_only, but leaves it out when it tries again after a TypeError.
    """
    try:
        offline = patch.object(constants, "HF_HUB_OFFLINE", _hub_is_out_of_reach(model, weights))
        with quiet() as warned, patch.dict(os.environ, TENSORS_ONLY), offline:
            yield warned
    except Exception as error:
        images = "".join(f" for images of {pixels} pixels" for pixels in size.values())
        raise InputError(f"cannot load {model} with weights {weights!r}{images}: {reason(error)}") from error


def _hub_is_out_of_reach(model: str, weights: str | None = None) -> bool:
    """Is the Hugging Face hub needed, and does it not answer? Its client would try for a minute."""
    config = {} if ":" in model else open_clip.get_model_config(model) or {}
    tag = weights is not None and open_clip.is_pretrained_cfg(model, weights)
    theirs = "siglip" in model.lower() or any(key.startswith("hf_") for key in config.get("text_cfg", ()))
    hub = urlsplit(constants.ENDPOINT)
    try:
        if (model.startswith("hf-hub:") or tag or theirs) and not getproxies():
            socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
    except OSError:
        return True
    return constants.HF_HUB_OFFLINE


@contextmanager
def quiet() -> Iterator[list[str]]:
    """While open, nothing is logged and no warning shown; afterwards the list holds open_clip's warnings."""
    home, records, said = str(Path(open_clip.__file__).parent), [], []
    unlogged = patch.object(logging.Logger, "callHandlers", lambda logger, record: records.append(record))
    with unlogged, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            said += [str(warning.message) for warning in caught if warning.filename.startswith(home)]
            said += [record.getMessage() for record in records if record.pathname.startswith(home)]


def reason(error: Exception) -> str:
    """In one line what open_clip and torch say in many."""
    text = " ".join(str(error).split())
    writers = "safetensors or torch.save(model.state_dict(), ...)"
    expected = f"expected a checkpoint: tensors by name, as {writers} write them"
    # Of open_clip, while it fits positions and biases to the model
    if isinstance(error, AssertionError) or "is invalid for input of size" in text or "'NoneType'" in text:
        return f"its tensors are not those of this architecture ({text})"
    if isinstance(error, (EOFError, StopIteration, AttributeError, LookupError, TypeError, struct.error)):
        return f"{expected}; found something else"
    if re.search(r"invalid load key|Unsupported operand (?!149)", text):  # 149 starts a pickle of today
        return f"{expected}; this file is no archive of torch's"
    if "TorchScript" in text:
        hint = "give --pretrained openai, or a file of its state_dict()"
        return f"it is a TorchScript archive, as OpenAI published its models, and holds code; {hint}"
    if "Failed to download" in text or "Failed initial config" in text:
        return f"not in the hub's cache, and not to be had from the network: {text.split('Last error: ')[-1]}"
    if "Weights only load failed" in text or "weights_only" in text:
        danger = "the file holds more than tensors, and unpickling it could run any code in it"
        return f"{danger}; where you trust it, save its tensors anew"
    if "Kernel size can't be greater" in text or "output sizes should be greater than 0" in text:
        return "such images are smaller than a patch of this model"
    if "transformers" in text:
        lacking = "its text tower or tokenizer comes from a package that is not installed"
        return f"{lacking}: pip install transformers"
    if "Error(s) in loading state_dict" not in text:
        return textwrap.shorten(text, 300, placeholder=" ...") or type(error).__name__
    found = _mismatches(str(error))
    if not found:
        return f"{expected}; {textwrap.shorten(text, 200, placeholder=' ...')}"
    return "its tensors are not those of this architecture: it " + "; ".join(found)


def _mismatches(text: str) -> list[str]:
    """What torch's load_state_dict found wrong, in short."""
    found = []
    for kind, verb in (("Missing", "lacks"), ("Unexpected", "has besides")):
        listed = re.search(rf"{kind} key\(s\) in state_dict: (.*)", text)
        keys = re.findall(r'"([^"]+)"', listed[1]) if listed else []
        if keys:
            more = f" and {len(keys) - 3:,} more" if len(keys) > 3 else ""
            found.append(f"{verb} {', '.join(keys[:3])}{more}")
    size = r"torch.Size\((\[.*?\])\)"
    shapes = re.findall(rf"size mismatch for (\S+): .*?{size}.*?{size}", text)
    if shapes:
        key, theirs, ours = shapes[0]
        found.append(f"has {len(shapes):,} of other shapes, first {key} {theirs}, expected {ours}")
    return found


def open_tokenizer(model: str) -> Callable:
    """open_clip's tokenizer of a model."""
    try:
        with patch.object(constants, "HF_HUB_OFFLINE", _hub_is_out_of_reach(model)):
            return open_clip.get_tokenizer(model)
    except Exception as error:  # of the hub, of transformers, of files
        raise InputError(f"cannot open the tokenizer of {model}: {reason(error)}") from error


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


def activation(model: nn.Module) -> str:
    """ "GELU", "QuickGELU", ...: what the MLPs of the image tower apply, which no weight tells."""
    parts = model.visual.named_modules()
    kinds = {type(part).__name__ for name, part in parts if name.split(".")[-1] in ("gelu", "act")}
    return "/".join(sorted(kinds))


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
