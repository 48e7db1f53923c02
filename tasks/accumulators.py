"""Accumulators: what a task learns from images, to be merged over processes, saved and continued.

An accumulator has `merge(other)`, which adds what another one of its kind has seen. Its state is all of its
attributes, or those that it lists in `state_names`. Here are three that serve many tasks, and the functions
that save and load any accumulator. Moments, Segmentation, CueVotes and the tasks' own classes are
accumulators, too.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Accumulator(Protocol):
    """Anything that can be merged with another of its kind."""

    def merge(self, other: Any) -> Any: ...


class Sums:
    """Numbers or tensors by name, added up in float64."""

    state_names = ("sums",)

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    def add(self, name: str, x: Tensor | float) -> None:
        """Add a number or a tensor to the sum of this name."""
        x = x.detach().cpu().double() if isinstance(x, Tensor) else x  # not every device has float64
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


def state_dict(accumulator: Accumulator) -> dict[str, Any]:
    """A copy of all that changes in an accumulator, on the CPU, for torch.save and weights_only loading."""
    return {name: _to_state(getattr(accumulator, name)) for name in _state_names(accumulator)}


def load_state_dict(accumulator: Accumulator, state: dict[str, Any]) -> None:
    """Put what `state_dict` returned back into an accumulator."""
    for name in _state_names(accumulator):
        setattr(accumulator, name, _from_state(getattr(accumulator, name), state[name]))


def _state_names(accumulator: Accumulator) -> tuple[str, ...]:
    return tuple(getattr(accumulator, "state_names", vars(accumulator)))


def _to_state(x: Any) -> Any:
    if hasattr(x, "merge"):
        return state_dict(x)
    if isinstance(x, Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: _to_state(value) for key, value in x.items()}
    return [_to_state(value) for value in x] if isinstance(x, list) else x


def _from_state(current: Any, saved: Any) -> Any:
    if hasattr(current, "merge"):
        load_state_dict(current, saved)
        return current
    if isinstance(saved, dict):
        return {key: _from_state(current.get(key), value) for key, value in saved.items()}
    return saved
