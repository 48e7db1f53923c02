"""Loading a CLIP model: the demo's, or any that open_clip knows, by name, tag or checkpoint file.

What goes wrong on the way becomes one line, whichever of open_clip, torch, safetensors and the hub says it.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import socket
import struct
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit
from urllib.request import getproxies

import open_clip
import torch
from huggingface_hub import constants
from torch import nn

import demo
from files import InputError

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


def activation(model: nn.Module) -> str:
    """ "GELU", "QuickGELU", ...: what the MLPs of the image tower apply, which no weight tells."""
    parts = model.visual.named_modules()
    kinds = {type(part).__name__ for name, part in parts if name.split(".")[-1] in ("gelu", "act")}
    return "/".join(sorted(kinds))
