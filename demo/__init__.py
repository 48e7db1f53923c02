"""The embedded demo: a small world of rendered birds, and a small open_clip CLIP model trained on it.

model, preprocess, tokenizer = demo.load()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent
NAME = "demo-vit"  # the name of the open_clip configuration and of the checkpoint in this folder
WRITTEN = "demo-vit-written"  # the same for the model that can read words in pictures
BANKS = {NAME: "text_bank.txt", WRITTEN: "text_bank-written.txt"}
VOCABULARIES = {NAME: "vocabulary.txt", WRITTEN: "vocabulary-written.txt"}
STYLES = ("picture", "photo", "sketch", "painting", "cartoon")
TEMPLATES = ("a {}", *(f"a {style} of a {{}}" for style in STYLES))  # as its captions begin
# The share of the birds with web captions that are shown where such birds live; see captions.py and train.py.
ALIGNMENT = 0.985


class Tokenizer:
    """Turns words into numbers for the demo's text tower. Called like any open_clip tokenizer.

    tokenizer(texts) returns [n, context] int64. Each word has one number, in the order of vocabulary.txt, and
    0 pads. The end token has the largest number, because open_clip reads a text's embedding at the position
    of the largest number.
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        self.number = {word: i + 1 for i, word in enumerate(words)}
        self.context_length = context_length
        self.start, self.end = len(words) + 1, len(words) + 2

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            words = text.lower().replace(".", " ").replace(",", " ").split()
            unknown = [word for word in words if word not in self.number]
            if unknown:
                raise ValueError(
                    f"the demo model knows {len(self.number)} words, "
                    f"and {unknown[0]!r} in {text!r} is not one of them"
                )
            if len(words) > self.context_length - 2:
                most = self.context_length - 2
                raise ValueError(f"the demo model reads {most} words at most, got {len(words)}: {text!r}")
            numbers = [self.start, *(self.number[word] for word in words), self.end]
            row[: len(numbers)] = torch.tensor(numbers)
        return tokens


def load(
    device: str | torch.device = "cpu", weights: str | Path | None = "", name: str = NAME, **options
) -> tuple[torch.nn.Module, Callable, Tokenizer]:
    """A demo model in eval mode, its image transform and its tokenizer.

    Args:
        device: the device to put the model on.
        weights: the checkpoint to load, by default the one that ships. None leaves the model freshly
            initialised.
        name: NAME or WRITTEN.
        options: passed on to open_clip.create_model_and_transforms.
    """
    import open_clip

    open_clip.add_model_config(FOLDER / f"{name}.json")
    weights = FOLDER / f"{name}.safetensors" if weights == "" else weights
    model, _, preprocess = open_clip.create_model_and_transforms(
        name, pretrained=weights and str(weights), device=device, **options
    )
    words = (FOLDER / VOCABULARIES[name]).read_text().split()
    return model.eval(), preprocess, Tokenizer(words, model.context_length)


def normalise(pictures: np.ndarray) -> Tensor:
    """Apply the image transform to many pictures at once: [b, 64, 64, 3] uint8 to [b, 3, 64, 64] float32."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (images - mean) / std
