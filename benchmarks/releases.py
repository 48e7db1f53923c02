"""Is the decomposition exact on models that older releases build? One table of errors.

    $ pip install --no-deps --target DIR open_clip_torch==2.24.0    # or clip-anytorch: OpenAI's clip
    $ python -m benchmarks.releases DIR [DIR ...]                   # (which needs setuptools up to 80)

Each release builds its small random models in float64, in a process of its own. There are as many images as a
model has tokens: no shape tells the two axes apart. Errors are relative to the largest entry: "terms" of the
sum; "tokens" of token_scores, summed over tokens, against the heads; "neurons" of one MLP's; "maps" of one
attribution, against that of the same weights in the open_clip installed here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP, CLIPVisionCfg
from torch import Tensor, nn

from baselines import METHODS, BaselineError
from decompose import DecompositionError, decompose, token_scores
from neurons import neurons

TEXT = {"context_length": 4, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}
VISION = {"layers": 3, "width": 128, "head_width": 64, "patch_size": 4, "image_size": 12}
TOKENS = {"embed_cls": True, "output_tokens": True}  # of CoCa's text tower
POOLER = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
# The options of each kind, in newer and in older names: a model has the first that its release knows.
KINDS = {
    "class token": [{}],
    "with LayerScale": [{"ls_init_value": 0.3}],
    "mean": [{"pool_type": "avg"}, {"global_average_pool": True}],
    "CoCa": [{**POOLER, "attn_pooler_queries": 4}, {**POOLER, "n_queries": 4}],
}
COLUMNS = "terms", "tokens", "neurons", "maps"


def far(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).abs().max() / truth.abs().max())


def build(kind: str, openai: bool) -> nn.Module | None:
    """What the release of this process builds; None if it has no such model."""
    if openai:
        from clip.model import CLIP as OpenAI

        model = OpenAI(24, 12, 3, 128, 4, 4, 8, 64, 1, 1)  # the sizes above
        for norm in [module for module in model.modules() if isinstance(module, nn.LayerNorm)]:
            norm.__class__ = nn.LayerNorm  # theirs computes in float32 and does not take float64
        return model if kind == "class token" else None
    for vision in [VISION | x for x in KINDS[kind] if set(x) <= set(CLIPVisionCfg.__dataclass_fields__)]:
        if kind != "CoCa":
            return CLIP(24, vision, TEXT)
        return open_clip.coca_model.CoCa(24, TEXT | {"attn_pooler_heads": 1}, TEXT | TOKENS, vision)
    return None


@torch.no_grad()
def measure(model: nn.Module) -> dict:
    """A row of the table, and what it takes to draw its maps again."""
    for p in model.visual.parameters():
        p.copy_(p + 0.3 * torch.randn_like(p) if p.ndim == 1 else torch.randn_like(p) * p.shape[-1] ** -0.5)
    model.double().eval()
    images, texts = torch.randn(10, 3, 12, 12).double(), torch.randn(10, 24).double()
    try:
        terms = decompose(model, images, tolerance=float("inf"))
        tokens = far(token_scores(model, images, texts).sum(dim=3), terms.heads @ texts.T)
        row = {"terms": terms.error(), "tokens": tokens, "neurons": neurons(model, images, 1).error()}
    except DecompositionError as refusal:
        row = {"refused": str(refusal).partition(": ")[2]}
    with suppress(BaselineError):
        row["maps"] = METHODS["chefer2021"](model, images, texts)
    return row | {"inputs": (images, texts), "weights": model.visual.state_dict()}


def save_rows(openai: bool, path: str) -> None:
    torch.manual_seed(0)
    torch.save({kind: measure(model) for kind in KINDS if (model := build(kind, openai))}, path)


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]] or sys.exit(__doc__)
    print(f"torch {torch.__version__}, maps against open_clip {open_clip.__version__}, float64\n")
    print(f"{'release':<23}{'model':<16}", *[f"{x:>7}" for x in COLUMNS])
    for folder in folders:
        release = next(folder.glob("*clip*.dist-info")).name.removesuffix(".dist-info")
        openai = (folder / "clip").is_dir()
        with tempfile.NamedTemporaryFile() as file:
            program = f"from benchmarks.releases import save_rows; save_rows({openai}, {file.name!r})"
            environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "PYTHONWARNINGS": "ignore"}
            subprocess.run([sys.executable, "-c", program], check=True, env=environment)
            rows = torch.load(file.name)
        for kind, row in rows.items():
            if "maps" in row:
                newest = CLIP(24, VISION | KINDS[kind][0], TEXT, quick_gelu=openai).double().eval()
                newest.visual.load_state_dict(row["weights"])
                row["maps"] = far(row["maps"], METHODS["chefer2021"](newest, *row["inputs"]))
            cells = [f"{row[name]:.0e}" if name in row else "-" for name in COLUMNS]
            print(f"{release:<23}{kind:<16}", *[f"{x:>7}" for x in [*cells, row.get("refused")] if x])


if __name__ == "__main__":
    main()
