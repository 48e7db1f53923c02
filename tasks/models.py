"""open_clip's models: which can be decomposed, how they are read out; small random copies to check it on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import open_clip
import torch
from open_clip import timm_model
from open_clip.model import _build_vision_tower
from torch import Tensor, nn

import demo
from decompose import ClipTower, DecompositionError, open_tower
from loading import known_name, quiet

LAYERS, WIDTH, HEADS, GRID = 2, 64, 4, 4  # of the small copies; patches in a row


class Images(nn.Module):
    """An image tower as a CLIP without its text tower."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images)


@dataclass
class Listed:
    """One of open_clip's configurations."""

    family: str
    tower: ClipTower | None  # of the full size, without memory behind it
    refusal: str  # why there is none


def listed(name: str) -> Listed:
    """The configuration at its full size, on torch's meta device: no memory, no weights, no network."""
    # Drawing weights would take timm most of the time, although this device has none to draw.
    draw = "timm.layers.weight_init._trunc_normal_"
    no_draws = patch(draw, lambda tensor, *_: tensor, create=True)
    with quiet(), torch.device("meta"), no_draws:
        model = Images(_tower(open_clip.get_model_config(name)))
    try:
        return Listed(family(model.visual), open_tower(model), "")
    except DecompositionError as error:
        return Listed(family(model.visual), None, str(error).split(": ", 1)[1])


def check_decomposable(name: str | None) -> None:
    """Refuse what cannot be decomposed by its configuration, before it is built and its weights are loaded.

    Raises:
        DecompositionError: the reason.
    """
    if name in (None, *demo.BANKS) or ":" in name:
        return
    found = listed(known_name(name))
    if found.tower is None:
        raise DecompositionError(f"cannot decompose {name} ({found.family}): {found.refusal}")


def print_list() -> None:
    """A line for each configuration, as soon as it is known."""
    print(f"{'model':<38}  {'read-out':<30}  {'layers x heads':>14}  pretrained tags, or why it is refused")
    print("-" * 130)
    names = open_clip.list_models()
    refused = 0
    for name in names:
        found = listed(name)
        if found.tower is None:
            refused += 1
            print(f"{name:<38}  {'-':<30}  {'':>14}  {found.refusal}")
        else:
            size = f"{len(found.tower.W_O)} x {len(found.tower.W_O[0])}"
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "-"
            print(f"{name:<38}  {found.tower.name:<30}  {size:>14}  {tags}")
    count = f"{len(names) - refused} of {len(names)} configurations"
    print(f"\n{count} of open_clip {open_clip.__version__} can be decomposed.")


def family(visual: nn.Module) -> str:
    """Who made the tower's class, and how it is called."""
    trunk = getattr(visual, "trunk", None)
    return f"open_clip {type(visual).__name__}" if trunk is None else f"timm {type(trunk).__name__}"


def small(name: str, seed: int = 0) -> Images:
    """The same architecture with few, narrow layers for small images, with random weights in float64.

    No weight keeps a trivial value, 0 or 1. The width of blocks behind a convolutional stem stays: the stem
    fixes it.
    """
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, more = config["vision_cfg"], {}
    if "timm_model_name" in vision:
        more, vision["image_size"] = _smaller(config)
    else:
        vision |= {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "attn_pooler_heads": HEADS}
        vision["image_size"] = GRID * vision.get("patch_size", 16)
    create = partial(timm_model.timm.create_model, **more)
    with quiet(), torch.random.fork_rng(devices=[]), patch.object(timm_model.timm, "create_model", create):
        torch.manual_seed(seed)
        model = Images(_tower(config))
        with torch.no_grad():
            for parameter in model.parameters():
                # gamma, beta and biases; latents and tokens that start at zero
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def _smaller(config: dict) -> tuple[dict, int]:
    """What to tell timm for a small copy, and the side of its images."""
    with quiet(), torch.device("meta"):
        trunk = _tower(config).trunk
    embed = trunk.patch_embed
    stride = embed.feat_ratio() if hasattr(embed, "feat_ratio") else embed.patch_size
    side = GRID * (stride if isinstance(stride, int) else stride[0])
    more = {"depth": LAYERS, "img_size": side}
    if not hasattr(embed, "backbone"):
        more |= {"embed_dim": WIDTH, "num_heads": HEADS}
    # One family gives the pooling heads of its own.
    if hasattr(trunk, "rope") and getattr(trunk, "attn_pool", None) is not None:
        more["attn_pool_num_heads"] = HEADS
    return more, side


def pictures(model: Images, count: int = 2) -> Tensor:
    """[b, 3, rows, columns] noise of the size that the model takes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *model.visual.image_size, generator=generator, dtype=torch.float64)


def _tower(config: dict) -> nn.Module:
    return _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
