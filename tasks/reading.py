"""Where a picture is read and where it is seen: maps of two sets of heads, and other rules to find them.

Two published rules know where a word stands, because they draw it on themselves. Dyslexify (Hufe et al.,
ICLR 2026) ranks heads by how much of the class token's attention falls on the word's patches. SamplingTAR
projects values on random directions and asks how much of the resulting map falls there.

Axes: b images   L layers   H heads   N tokens   e width of a head   r random directions
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, einsum, nn
from torch.utils.data import Subset

from attention import attention_calls
from cue import THRESHOLD
from data import subset
from decompose import decompose, head_maps, image_embedding, open_tower
from roles import explained, in_own_space
from written import WrittenImages

from .accumulators import Rows, Sums
from .heads import Head, head_name
from .job import Job
from .passes import one_pass

RULE_IMAGES, DIRECTIONS = 2000, 32
COVERED = 0.25  # of the largest heat of an average reference picture; chosen on the demo's validation split
TILE, GAP = 128, 6  # of the contact sheet


@torch.no_grad()
def cover(images: Tensor, heat: Tensor, bar: float) -> Tensor:
    """The images [b, 3, rows, columns] without the patches whose heat is over the bar.

    Their pixels, and those of the patches left and right of them, as words run in lines, become the mean of
    the image's other pixels.
    """
    hot = nn.functional.max_pool2d((heat > bar)[:, None].float(), (1, 3), stride=1, padding=(0, 1))
    hidden = nn.functional.interpolate(hot, images.shape[2:], mode="nearest").to(images)
    visible = 1 - hidden
    mean = (images * visible).sum(dim=(2, 3), keepdim=True) / visible.sum(dim=(2, 3), keepdim=True).clamp_min(
        1
    )
    return images * visible + mean * hidden


class Rules(Sums):
    """What the rules measure of every head, summed over images: [L, H] each."""

    def __init__(self, depth: int, prefix: int, width: int, seed: int) -> None:
        super().__init__()
        self.depth, self.prefix = depth, prefix
        generator = torch.Generator().manual_seed(seed)
        self.directions = nn.functional.normalize(torch.randn(DIRECTIONS, width, generator=generator), dim=1)

    def update(self, model: nn.Module, images: Tensor, inside: Tensor) -> None:
        """Add images; inside [b, patches]: 1 where a patch overlaps the word."""
        with attention_calls() as calls:
            image_embedding(model, images)
        attention, sampled = [], []
        for call in calls[: self.depth]:
            A = call.attention(slice(0, 1))[:, :, 0]  # [b, H, N]
            along = einsum("bHNe,re->bHrN", call.v.to(A), self.directions.to(A))
            heat = A[:, :, None] * (along - einsum("bHN,bHrN->bHr", A, along)[..., None])
            heat = heat.clamp(0, 1)[..., self.prefix :]
            A = A[..., self.prefix :]
            attention.append(einsum("bHN,bN->bH", A, inside.to(A)) / A.sum(dim=-1))
            mass = einsum("bHrN,bN->bHr", heat, inside.to(A)) / heat.sum(dim=-1).clamp_min(1e-12)
            sampled.append(mass.mean(dim=2))
        self.add("images", len(images))
        self.add("attention", torch.stack(attention, dim=1).sum(dim=0))
        self.add("sampled", torch.stack(sampled, dim=1).sum(dim=0))

    def mean(self, name: str) -> Tensor:
        return self[name] / self["images"]


def measure_rules(job: Job, data: WrittenImages) -> dict[str, Tensor]:
    """{measure: [L, H]} of the rules, and how much the true word and the true class explain of each head."""
    model, rows = job.clip.model, subset(len(data), RULE_IMAGES, job.args.seed)
    tower, maps = open_tower(model), head_maps(model)
    depth, _, width, _ = maps.shape
    rules, values = Rules(depth, tower.prefix, width, job.args.seed), Rows()
    for images, indices in one_pass(job, Subset(data, rows), "other rules", rules, values):
        boxes = data.boxes[torch.tensor(rows)[indices]]
        rules.update(model, images, overlap(boxes, tower.grid(images)).to(images.device))
        values.add(decompose(model, images).values)
    written = in_own_space(values.tensor(), maps.cpu())
    shares = {
        name: explained(written, labels[rows])
        for name, labels in (("word", data.written), ("seen", data.seen))
    }
    return {"attention": rules.mean("attention"), "sampled": rules.mean("sampled"), **shares}


def overlap(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """[b, patches] 1 where a patch overlaps the box [b, 4] (top, left, bottom, right, from 0 to 1)."""
    sides = []
    for low, high, count in ((boxes[:, :1], boxes[:, 2:3], grid[0]), (boxes[:, 1:2], boxes[:, 3:], grid[1])):
        edges = torch.arange(count + 1) / count
        sides.append((edges[:-1] < high - 1e-6) & (edges[1:] > low + 1e-6))
    return (sides[0][:, :, None] & sides[1][:, None]).flatten(1).float()


def picks(measures: dict[str, Tensor], count: int) -> dict[str, list[Head]]:
    """The heads that each rule takes; `count`: as many as the cue rule took."""
    heads, depth = measures["attention"].shape[1], len(measures["attention"])
    most = measures["attention"].flatten().topk(count).indices.tolist()
    late = measures["sampled"][int(0.8 * depth) :]
    bar = late.mean(dim=1, keepdim=True) + late.std(dim=1, keepdim=True)
    sampled = [(layer + int(0.8 * depth), head) for layer, head in (late > bar).nonzero().tolist()]
    return {
        "attention to the word's patches": sorted(divmod(i, heads) for i in most),
        "sampled directions": sampled,
        "true word": [tuple(head) for head in (measures["word"] > THRESHOLD).nonzero().tolist()],
    }


def contact_sheet(items: Sequence[tuple[Image.Image, Tensor, Tensor, str, str]]) -> Image.Image:
    """Columns of an image, where it is read, where it is seen, and both answers; maps [rows, columns]."""
    font = ImageFont.load_default(13)
    across = min(8, len(items))
    height = 3 * (TILE + GAP) + 40
    size = (across * (TILE + GAP) + GAP, -(-len(items) // across) * height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for k, (picture, read, seen, word, name) in enumerate(items):
        left, top = GAP + k % across * (TILE + GAP), k // across * height + GAP
        method = Image.Resampling.NEAREST if picture.width <= TILE else Image.Resampling.BICUBIC
        shown = picture.resize((TILE, TILE), method)
        for i, tile in enumerate((shown, over(shown, read, (224, 62, 24)), over(shown, seen, (24, 92, 224)))):
            sheet.paste(tile, (left, top + i * (TILE + GAP)))
        below = top + 3 * (TILE + GAP) - 2
        draw.text((left, below), f"written: {word}", "#b03010", font)
        draw.text((left, below + 16), f"seen: {name}", "#1848b0", font)
    return sheet


def over(picture: Image.Image, heat: Tensor, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in grey, with this colour where the map [rows, columns] is positive."""
    positive = (heat.clamp_min(0) / heat.max().clamp_min(1e-12)).float().cpu().numpy()
    smooth = Image.fromarray(positive).resize(picture.size, Image.Resampling.BILINEAR)
    opacity = 0.85 * np.asarray(smooth)[..., None]
    grey = 0.6 * np.asarray(picture.convert("L"), dtype=np.float32)[..., None] + 80
    return Image.fromarray(
        (grey * (1 - opacity) + opacity * np.float32(colour)).clip(0, 255).astype(np.uint8)
    )


def name_heads(heads: Sequence[Head]) -> str:
    return ", ".join(map(head_name, heads)) or "none"
