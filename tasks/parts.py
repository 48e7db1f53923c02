"""What a task learns from images is held in parts, so that any pass can be split over processes, saved and continued.

A part has `merge`, which adds what another of its kind has seen, and its state is its attributes, or those that it names in `running`.
Here are three that serve many tasks, and how any part becomes a state and comes back from one; Moments, Segmentation, CueVotes and
the tasks' own classes are parts, too.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class Sums:
    """Numbers or tensors by name, added up in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    def add(self, name: str, x: Tensor | float) -> None:
        """x, or a tensor of it, once more."""
        x = x.detach().to("cpu", torch.float64) if isinstance(x, Tensor) else x
        self.sums[name] = self.sums[name] + x if name in self.sums else x

    def merge(self, other: Sums) -> None:
        for name, x in other.sums.items():
            self.add(name, x)

    def __getitem__(self, name: str) -> Any:
        return self.sums[name]


class Rows:
    """Tensors [b, ...] of every image, in the images' order; for what must be kept of each."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.rows.append(x.detach().cpu())

    def merge(self, other: Rows) -> None:
        self.rows = [*self.rows, *other.rows]

    def tensor(self) -> Tensor:
        """[n, ...]"""
        return torch.cat(self.rows)


class Largest:
    """The largest number by name; a NaN is larger than any."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def add(self, name: str, x: float) -> None:
        self.largest[name] = x if x != x else max(self.largest.get(name, x), x)

    def merge(self, other: Largest) -> None:
        for name, x in other.largest.items():
            self.add(name, x)


# States: what torch.load reads without unpickling.


def state(part: Any) -> dict:
    """A copy of all that changes in a part, on the CPU."""
    return {name: _packed(getattr(part, name)) for name in _running(part)}


def restore(part: Any, seen: dict) -> None:
    """What `state` gave, back into a part."""
    for name, value in seen.items():
        setattr(part, name, _unpacked(getattr(part, name), value))


def _running(part: Any) -> tuple[str, ...]:
    return tuple(getattr(part, "running", vars(part)))


def _packed(x: Any) -> Any:
    if hasattr(x, "merge"):
        return state(x)
    if isinstance(x, Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: _packed(value) for key, value in x.items()}
    return [_packed(value) for value in x] if isinstance(x, list) else x


def _unpacked(held: Any, value: Any) -> Any:
    if hasattr(held, "merge"):
        restore(held, value)
        return held
    if isinstance(value, dict):
        return {key: _unpacked(held.get(key), one) for key, one in value.items()}
    return value


def twin(part: Any) -> Any:
    """A part of its own, to restore another state into; what does not change is shared."""
    other = copy.copy(part)
    for name in _running(part):
        held = getattr(part, name)
        if hasattr(held, "merge"):
            setattr(other, name, twin(held))
        elif isinstance(held, dict):
            setattr(
                other, name, {key: twin(one) if hasattr(one, "merge") else one for key, one in held.items()}
            )
    return other
