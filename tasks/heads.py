"""Names of attention heads: layer.head, both from 0."""

from __future__ import annotations

from files import InputError

Head = tuple[int, int]  # (layer, head)
LAST_LAYERS = 4  # the paper reads the heads of the last four layers


def head_name(head: Head) -> str:
    """ "3.7" for (3, 7)."""
    return f"{head[0]}.{head[1]}"


def parse_heads(text: str, depth: int, heads: int, option: str = "--heads") -> list[Head]:
    """ "3.7,2.1" -> [(2, 1), (3, 7)], sorted, each once.

    Raises:
        InputError: the text is something else, or names a head that the model does not have.
    """
    chosen = set()
    for part in text.split(","):
        try:
            layer, head = (int(number) for number in part.split("."))
        except ValueError:
            choices = "paper, auto, or a list" if option == "--heads" else "one or a list"
            expected = f"{choices} like 3.7,2.1 (layer.head, both from 0)"
            raise InputError(f"{option} takes {expected}; found {part!r}") from None
        if not (0 <= layer < depth and 0 <= head < heads):
            there = f"layers 0 to {depth - 1} with heads 0 to {heads - 1}"
            raise InputError(f"no head {part}: the model has {there}")
        chosen.add((layer, head))
    return sorted(chosen)
