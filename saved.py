"""The terms of many images in one file, so that an analysis can start from it and needs no model.

    save_terms("terms.safetensors", model, batches, names)    # batches of images, as decompose takes them
    saved = open_terms("terms.safetensors")
    terms = saved[0:100]    # the Decomposition of the first hundred images, saved.names[0:100]

Rows are written batch by batch and read in slices, so memory does not grow with the number of images. The
file holds the heads' values and their maps, which are the same for all images, in place of the terms: d / e
times less. This file needs torch and safetensors, and decompose.py and files.py beside it.
MIT licence, (c) 2026 The TextSpan reference authors.

Axes as in decompose.py, and n images.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from decompose import Decomposition, decompose, head_maps
from files import InputError, atomic_write

ROWS = ("embedding", "stem", "mlps", "constant", "values", "pool")  # [n, ...] each; most models have no pool
LONGEST = 100_000_000  # bytes of a header that safetensors reads; it holds the names


class SavedTerms:
    """The terms in a file, as a sequence."""

    def __init__(self, file: safe_open) -> None:
        self.file, self.about = file, file.metadata()  # of the model and the images, by name
        self.names: list[str] = json.loads(self.about.pop("names"))  # [n]
        self.shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        self.maps = file.get_tensor("maps") if "maps" in self.shapes else None  # [L, H, e, d]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: int | slice) -> Decomposition:
        """The terms of one image or of a slice of them, in float32; without `own`, which is not saved."""
        chosen = range(len(self))[rows]
        chosen = range(chosen, chosen + 1) if isinstance(chosen, int) else chosen
        if chosen.step != 1:
            raise ValueError(f"saved terms are read in slices of step 1, got {rows}")
        x = {
            name: self.file.get_slice(name)[chosen.start : chosen.stop]
            for name in ROWS
            if name in self.shapes
        }
        values, maps = x["values"], self.maps
        heads = values if maps is None else torch.einsum("blhe,lhed->blhd", values, maps)
        return Decomposition(heads=heads, **x)


def open_terms(path: str | Path) -> SavedTerms:
    """What `save_terms` wrote; slices are read when they are asked for.

    Raises:
        InputError: no such file, one that is not whole, or one that holds something else.
    """
    try:
        file = safe_open(path, "pt")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(f"{path} is no whole file of safetensors ({error}); save the terms anew") from error
    missing = {*ROWS} - {"pool", *file.keys()} or {"names"} - {*(file.metadata() or ())}
    if missing:
        found = ", ".join(sorted(file.keys())[:5]) or "nothing"
        raise InputError(f"{path} holds no terms as save_terms writes them: no {min(missing)}; found {found}")
    return SavedTerms(file)


def save_terms(
    path: str | Path,
    model: nn.Module,
    batches: Iterable[Tensor],
    names: Sequence[str | Path],
    about: dict[str, str] | None = None,
) -> float:
    """Decompose batches of images (convention "term") and save their terms; return the sums' largest error.

    An earlier file of that name stays until the new one is complete.

    Args:
        batches: tensors [b, 3, rows, columns].
        names: [n] of all images, in their order.
        about: what else to say of the model and the images.

    Raises:
        InputError: the file cannot be written; the message says why.
        ValueError: there are more or fewer images than names.
        DecompositionError: as `decompose`.
    """
    path, done, worst, starts = Path(path), 0, 0.0, {}
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; expected the name of a file")
    try:
        with atomic_write(path) as partial, partial.open("wb") as file:
            for images in batches:
                terms, end = decompose(model, images), done + len(images)
                if end > len(names):
                    raise ValueError(f"there are more images than the {len(names)} names")
                rows = {name: getattr(terms, name) for name in ROWS if getattr(terms, name) is not None}
                if not starts:
                    # Under attention pooling a head's values are its term, and need no maps.
                    pooled = torch.equal(terms.values, terms.heads)
                    starts = begin(
                        file, rows, {} if pooled else {"maps": head_maps(model)}, names, about or {}
                    )
                for name, x in rows.items():
                    write(file, starts[name] + done * 4 * x[0].numel(), x)
                done, worst = end, max(worst, terms.error())
            if done < len(names) or not done:
                raise ValueError(f"there are {len(names)} names, and {done} images")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return worst


def begin(
    file: BinaryIO, rows: dict[str, Tensor], once: dict[str, Tensor], names: Sequence, about: dict
) -> dict[str, int]:
    """Write the header of a file of safetensors, and what it holds once; at which byte each tensor begins."""
    shapes = {name: [len(names), *x.shape[1:]] for name, x in rows.items()}
    shapes |= {name: list(x.shape) for name, x in once.items()}
    said = {"convention": "term", **about, "names": json.dumps([*map(str, names)])}
    header, end = {"__metadata__": {key: str(value) for key, value in said.items()}}, 0
    for name, shape in shapes.items():
        first, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    free = shutil.disk_usage(Path(file.name).parent).free
    if free < end:
        raise InputError(
            f"no room for the terms: they take {end / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
        )
    if len(text) > LONGEST:
        raise InputError(f"the names take over {LONGEST:,} bytes: save the images in several files")
    file.write(struct.pack("<Q", len(text)) + text)
    starts = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in shapes}
    for name, x in once.items():
        write(file, starts[name], x)
    return starts


def write(file: BinaryIO, start: int, x: Tensor) -> None:
    """The numbers of x in float32, from this byte on."""
    file.seek(start)
    file.write(x.detach().cpu().float().numpy().tobytes())
