"""--task heatmap: where in an image does each method see a text? Pictures of the maps, and a sheet of all."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

import report
from baselines import BaselineError
from data import read_picture
from decompose import image_embedding
from files import InputError, atomic_write
from masks import seen
from metrics import scale
from zeroshot import embed_texts

from .attribution import attribute, choose_methods, clipped, score_of
from .job import Job
from .processes import process_rank
from .tables import print_settings, table

LONG_SIDE = 512  # of the pictures
TILE, ACROSS, GAP = 200, 6, 8  # of the sheet
SCALE_NOTE = "Each map from its least (dark) to its most (bright); the decomposition from zero."
# matplotlib's inferno at eight even steps: brighter is more, also without colour.
INFERNO = bytes.fromhex("000004 280b54 65156e 9f2a63 d44842 f57d15 fac127 fcffa4")
INFERNO = np.float32([*INFERNO]).reshape(-1, 3)


def run(job: Job) -> tuple[dict, list]:
    """Every method's map of every text, drawn over the image."""
    args = job.args
    if args.image is None or not args.text:
        raise InputError(f"--task heatmap needs {'--image FILE' if args.image is None else '--text TEXT'}")
    if any(not text.strip() for text in args.text):
        raise InputError("--text is empty: give a text to look for")
    image = read_picture(Path(args.image))
    methods, clip = choose_methods(args), job.clip
    texts = embed_texts(clip, args.text)
    pixels = clip.preprocess(image)[None].to(clip.device, clip.dtype)
    cosine = similarity(clip.model, pixels, texts)
    box = seen(clip.preprocess, image.size, pixels.shape[:1:-1])
    drawn, refused = draw_maps(job, methods, image, pixels, box, texts)
    titles = [f'"{text}", cosine {share:.3f}' for text, share in zip(args.text, cosine, strict=True)]
    folder, files, rows = args.out / "heatmap", {}, []
    for i, (text, title, tiles) in enumerate(zip(args.text, titles, drawn, strict=True)):
        prefix = f"{i + 1}-{slug(text)}"
        files |= {f"{prefix}-{method}.png": tile for method, tile in tiles.items() if method != "image"}
        files[f"{prefix}-all.png"] = sheet(title, tiles)
        rows.append([text, f"{cosine[i]:.3f}", str(folder / f"{prefix}-all.png")])
    for name, picture in files.items():
        save_picture(picture, folder / name)
    part = "all of it" if covers(box, image.size) else "what the model's cropping leaves; the rest is dimmed"
    size = f"{args.image}, {image.width} x {image.height}"
    where = print_settings(job, image=size, methods=", ".join(methods), seed=str(args.seed), seen=part)
    print("\n" + table(["text", "cosine", "all methods in one picture"], rows))
    print(f"\n{len(files)} pictures in {folder}. {SCALE_NOTE}")
    print_refused(refused)
    scores = {method: score_of(method, args.score) for method in methods}
    cosines = dict(zip(args.text, cosine, strict=True))
    results = {"settings": where, "cosine": cosines, "scores": scores, "files": list(files)}
    sections = []
    for title, tiles in dict(zip(titles, drawn, strict=True)).items():
        shown = report.pictures([(tile, name) for name, tile in tiles.items()], size=200)
        sections.append(report.section(title, shown))
    return results, sections


def draw_maps(
    job: Job, methods: list[str], image: Image.Image, pixels: Tensor, box: tuple[float, ...], texts: Tensor
) -> tuple[list[dict[str, Image.Image]], dict[str, str]]:
    """(for each text, {"image": the image, method: its map over the image}; {method: why it is refused})."""
    drawn, refused = [], {}
    bar = tqdm(total=len(texts) * len(methods), desc="maps", unit="map", leave=False)
    for text in texts:
        tiles = {"image": resized(image)}
        for method in methods:
            try:
                heat = attribute(method, job.clip.model, pixels, text[None], job.args.score)
                tiles[method] = overlay(image, heat, box, clipped(method))
            except BaselineError as error:  # the decomposition supports more models than they do
                if job.args.methods:
                    raise
                refused[method] = str(error)
            bar.update()
        drawn.append(tiles)
    bar.close()
    return drawn, refused


def print_refused(refused: dict[str, str]) -> list[str]:
    """A line for each reason why methods do not support the model, printed and returned."""
    lines = []
    for reason in dict.fromkeys(refused.values()):
        without = ", ".join(method for method in refused if refused[method] == reason)
        lines.append(f"Without {without}: {reason}")
        print(lines[-1])
    return lines


@torch.no_grad()
def similarity(model: nn.Module, pixels: Tensor, texts: Tensor) -> list[float]:
    """Cosine of the image with each text."""
    return (F.normalize(image_embedding(model, pixels).to(texts), dim=-1) @ texts.T)[0].tolist()


def resized(image: Image.Image, side: int = LONG_SIDE) -> Image.Image:
    """With a long side of so many pixels."""
    factor = side / max(image.size)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    return image.resize(size, Image.Resampling.BICUBIC if factor < 3 else Image.Resampling.NEAREST)


def overlay(
    image: Image.Image, heat: Tensor, box: tuple[float, ...], clip: bool = False, side: int = LONG_SIDE
) -> Image.Image:
    """The image with the map [1, rows, cols] laid on `box` of it; what lies outside is dimmed."""
    canvas = resized(image, side)
    factors = [canvas.width / image.width, canvas.height / image.height] * 2
    left, top, right, bottom = (round(edge * factor) for edge, factor in zip(box, factors, strict=True))
    inside = scale(heat.cpu(), (max(1, bottom - top), max(1, right - left)), clip)[0].float().numpy()
    whole = np.zeros((canvas.height, canvas.width), dtype=np.float32)
    rows, cols = slice(max(0, top), min(canvas.height, bottom)), slice(max(0, left), min(canvas.width, right))
    whole[rows, cols] = inside[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
    grey = np.asarray(canvas.convert("L"), dtype=np.float32)[..., None]
    base = 0.5 * np.asarray(canvas, dtype=np.float32) + 0.5 * grey
    opacity = (0.35 + 0.45 * whole)[..., None]
    return Image.fromarray((base * (1 - opacity) + colours(whole) * opacity).clip(0, 255).astype(np.uint8))


def colours(heat: np.ndarray) -> np.ndarray:
    """[..., 3] in 0..255 for values in 0..1."""
    steps = np.linspace(0, 1, len(INFERNO))
    return np.stack([np.interp(heat, steps, channel) for channel in INFERNO.T], axis=-1)


def sheet(title: str, tiles: dict[str, Image.Image]) -> Image.Image:
    """All tiles with their names, ACROSS in a row, under the title."""
    first = next(iter(tiles.values()))
    width, height = TILE, max(1, round(TILE * first.height / first.width))
    rows, font = -(-len(tiles) // ACROSS), ImageFont.load_default(15)
    across = min(ACROSS, len(tiles))
    picture = Image.new("RGB", (across * (width + GAP) + GAP, rows * (height + 24 + GAP) + 32), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, 6), title, "black", ImageFont.load_default(17))
    for k, (name, tile) in enumerate(tiles.items()):
        left, top = GAP + k % ACROSS * (width + GAP), 32 + k // ACROSS * (height + 24 + GAP)
        draw.text((left, top), name, "#333", font)
        picture.paste(tile.resize((width, height), Image.Resampling.LANCZOS), (left, top + 22))
    return picture


def save_picture(picture: Image.Image, path: Path) -> None:
    """Save as PNG, in the first process alone; an earlier file stays until the new one is complete."""
    if process_rank() > 0:
        return
    try:
        with atomic_write(path) as partial:
            picture.save(partial, format="PNG")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def slug(text: str) -> str:
    """The text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "text"


def covers(box: tuple[float, ...], size: tuple[int, int]) -> bool:
    return box[0] <= 0.5 and box[1] <= 0.5 and box[2] >= size[0] - 0.5 and box[3] >= size[1] - 0.5
