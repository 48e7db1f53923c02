"""Images with masks, to judge maps by: ImageNet-Segmentation, and any folder of images and masks.

Every data set yields ((image, mask, foreground), index): the image as the model takes it, the mask
[height, width] int8 in the same geometry (1 foreground, 0 background, -1 not labelled), and the value that
meant foreground in the file (0: the mask has none).

An open_clip transform may resize and crop. "aligned" puts the mask through the same; "authors" squashes the
whole mask onto the crop, as the paper's authors do (compute_segmentations.py:169-171), which misplaces it
wherever the image is not square.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose, InterpolationMode

from data import label, subset
from files import InputError
from pictures import eight_bits, file_sizes, images_below, read, read_picture

EXPECTED = "--data must be gtsegs_ijcv.mat, or a folder with images/ and masks/"
HDF5_ERRORS = (OSError, LookupError, TypeError, RuntimeError, ValueError)
VOID = 255  # in masks on their way through the geometry


class Masked(Dataset):
    """What the data sets below share: one geometry for image and mask.

    labels [n], indices into `names`, where the data set says what each image shows; None where it does not.
    """

    labels: Tensor | None = None
    names: list[str] | None = None
    unlabelled: str = ""  # why folders give no labels, where they look as if they did
    description: str
    rows: list[int]  # of the whole data set, those that --limit leaves
    pair: Callable[[int], tuple[Image.Image, np.ndarray]]  # the image; its mask [height, width] in raw values
    name: Callable[[int], str]  # what to call an image in a message
    fingerprint: Callable[[], list]  # what tells this data set from another, for --resume

    def __init__(
        self,
        transform: Callable,
        limit: int | None = None,
        seed: int = 0,
        protocol: str = "aligned",
        void: int | None = None,
    ) -> None:
        if void == 0:
            raise InputError("--void 0: the value 0 means background in a mask")
        self.transform, self.protocol, self.void = transform, protocol, void
        self.limit, self.seed = limit, seed
        self._mask_geometry = mask_geometry(transform)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor, int] | str, int]:
        try:
            image, values = self.pair(index)
            if values.shape != (image.height, image.width):
                size = f"{values.shape[1]} x {values.shape[0]} pixels"
                expected = f"its image {image.width} x {image.height}; they must agree"
                raise InputError(f"the mask of {self.name(index)} is {size}, {expected}")
            labels, foreground = self._labels(values, index)
            pixels, mask = self.transform(image), Image.fromarray(labels)
            if self.protocol == "authors":
                mask = mask.resize(pixels.shape[:0:-1], Image.Resampling.NEAREST)
            else:
                mask = self._mask_geometry(mask)
            mask = torch.from_numpy(np.array(mask))
            if mask.shape != pixels.shape[1:] or bool((mask == VOID).all()):
                why = "is left after the model's resizing and cropping"
                raise InputError(f"nothing of the mask of {self.name(index)} {why}")
        except InputError as error:
            return str(error), index
        return (pixels, torch.where(mask == VOID, -1, mask.to(torch.int8)), foreground), index

    def _labels(self, values: np.ndarray, index: int) -> tuple[np.ndarray, int]:
        """uint8 of 0, 1, VOID; and the value that stood for 1."""
        found = [int(value) for value in np.unique(values)]
        foreground = [value for value in found if value > 0 and value != self.void]
        if len(foreground) > 1:
            some = ", ".join(map(str, found[:5])) + ", ..." * (len(found) > 5)
            expected = "0 for background and one other; --void V leaves out pixels of value V"
            held = f"the mask of {self.name(index)} holds {len(found)} values ({some})"
            raise InputError(f"{held}; expected {expected}")
        mask = (values > 0).astype(np.uint8)
        mask[(values < 0) | (values == (-1 if self.void is None else self.void))] = VOID
        if (mask == VOID).all():
            raise InputError(f"the mask of {self.name(index)} holds no labelled pixel")
        return mask, foreground[0] if foreground else 0


class ImageNetSegmentation(Masked):
    """gtsegs_ijcv.mat (Guillaumin, Küttel, Ferrari 2014): 4,276 images of ImageNet with masks. Needs h5py.

    Raises:
        InputError: no h5py, no such file, or one that is something else.
    """

    def __init__(self, path: str | Path, transform: Callable, **options) -> None:
        super().__init__(transform, **options)
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"no {path}: {EXPECTED}")
        try:
            import h5py  # noqa: F401
        except ImportError:
            raise InputError(f"reading {path} needs h5py: pip install h5py") from None
        try:
            count, masks = (read_cells(self.path, f"value/{name}").size for name in ("img", "gt"))
        except HDF5_ERRORS as error:
            expected = "gtsegs_ijcv.mat, an HDF5 file with value/img and value/gt"
            raise InputError(f"{path} is not {expected}: {error}") from error
        if count != masks or not count:
            raise InputError(f"{path} holds {count} images and {masks} masks; expected as many of both")
        self.rows = subset(count, self.limit, self.seed)
        self.description = f"ImageNet-Segmentation in {path}, {len(self.rows):,} of {count:,} images"

    def _array(self, name: str, row: int) -> np.ndarray:
        try:
            return read_cells(self.path, f"value/{name}", row).T  # MATLAB's order of axes
        except HDF5_ERRORS as error:
            raise InputError(f"cannot read value/{name} of image {row} in {self.path}: {error}") from error

    def pair(self, index: int) -> tuple[Image.Image, np.ndarray]:
        pixels, mask = self._array("img", self.rows[index]), self._array("gt", self.rows[index])
        if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
            found = f"{self.name(index)} is an array {pixels.shape} of {pixels.dtype}"
            raise InputError(f"{found}, expected [rows, columns, 3] of uint8")
        if mask.ndim != 2 or mask.dtype.kind not in "bui":
            found = f"the mask of {self.name(index)} is an array {mask.shape} of {mask.dtype}"
            raise InputError(f"{found}, expected integers [rows, columns]")
        return eight_bits(Image.fromarray(np.ascontiguousarray(pixels))), mask.astype(int)

    def name(self, index: int) -> str:
        return f"image {self.rows[index]} of {self.path}"

    def fingerprint(self) -> list:
        return self.rows


def read_cells(path: Path, name: str, row: int | None = None) -> np.ndarray:
    """The cell array `name` of a MATLAB file of version 7.3, as references; or the array in its cell `row`.

    A cell refers to an array, as those of the images do, or to a further cell array, whose first cell refers
    to it, as those of the masks do. Nothing is read from other files, which HDF5 could be told to do.

    Raises:
        ValueError, or what h5py raises: there is no such array in this file.
    """
    import h5py

    with h5py.File(path, "r") as file:
        node = file[name]
        for depth in range(4):
            elsewhere = getattr(node, "external", None) or getattr(node, "is_virtual", False)
            if elsewhere or node.file.filename != file.filename:
                raise ValueError(f"{node.name} lies in another file, which is not read")
            values = np.asarray(node[()])
            references = values.dtype.kind == "O"
            if not depth and not references:
                raise ValueError(f"{name} holds {values.dtype}, expected references to arrays")
            if not references or row is None:
                return values
            reference = values.ravel()[0 if depth else row]
            if not isinstance(reference, h5py.Reference):
                break
            node = file[reference]
    raise ValueError("expected an array, or a cell that refers to one")


class MaskFolder(Masked):
    """images/NAME.jpg with masks/NAME.png (any format, any depth of folders).

    images/CLASS/NAME.jpg also says what an image shows. In a mask 0 is background and one other value
    foreground, the same in all masks.

    Raises:
        InputError: no such folders, no images, or an image without a mask.
    """

    def __init__(self, root: str | Path, transform: Callable, **options) -> None:
        super().__init__(transform, **options)
        root = Path(root)
        self.root = root / "images"
        for folder in (self.root, root / "masks"):
            if not folder.is_dir():
                raise InputError(f"no folder {folder}: {EXPECTED}")
        files, passed_over = images_below(self.root)
        every_mask, _ = images_below(root / "masks")
        masks = {path.with_suffix(""): root / "masks" / path for path in every_mask}
        missing = next((file for file in files if file.with_suffix("") not in masks), None)
        if missing is not None:
            expected = root / "masks" / missing.with_suffix(".png")
            raise InputError(f"no mask for {self.root / missing}: expected {expected}")
        self.rows = subset(len(files), self.limit, self.seed)
        self.files = [files[i] for i in self.rows]
        self.masks = [masks[file.with_suffix("")] for file in self.files]
        # Of all files: --limit must not change what there is to tell apart.
        spare = len(every_mask) - len({file.with_suffix("") for file in files})
        passed_over += f"; {spare:,} masks of no image" if spare else ""
        names, classes, self.unlabelled = label(self.root, files)
        if names:
            self.names, self.labels = names, torch.tensor(classes)[self.rows]
        self.description = f"{root}, {len(self.files):,} of {len(files):,} images{passed_over}"

    def pair(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image = read_picture(self.root / self.files[index])
        values = read(self.masks[index], np.array, keep_mode=True)
        if isinstance(values, str):
            raise InputError(values)
        if values.ndim == 3 and values.shape[2] == 3 and (values == values[..., :1]).all():
            values = values[..., 0]
        if values.ndim != 2 or values.dtype.kind not in "bui":
            found = f"{self.masks[index]} has colours or transparency"
            raise InputError(f"{found}; expected a mask of one channel")
        return image, values.astype(int)

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def fingerprint(self) -> list:
        sizes = file_sizes(self.root, [*self.files, *self.masks])
        return [[*map(str, self.files)], sizes, None if self.labels is None else self.labels.tolist()]


def mask_geometry(transform: Callable) -> Callable[[Image.Image], Image.Image]:
    """An open_clip image transform for a mask: the same resizing and cropping, and no new values.

    Raises:
        InputError: the transform is not one of open_clip's for evaluation.
    """
    steps = []
    for step in getattr(transform, "transforms", [transform]):
        name, changed = type(step).__name__, copy.copy(step)
        if hasattr(step, "interpolation"):  # Resize, ResizeKeepRatio
            changed.interpolation = InterpolationMode.NEAREST
            steps.append(changed)
        elif name in ("CenterCrop", "CenterCropOrPad"):
            changed.fill = VOID
            steps.append(changed)
        elif name not in ("MaybeConvertMode", "ToTensor", "MaybeToTensor", "Normalize"):
            raise InputError(f"cannot tell what the image transform's step {name} does to positions")
    return Compose(steps)


def seen(
    transform: Callable, size: tuple[int, int], model: tuple[int, int]
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what the model sees, in the image's pixels; beyond it where padded.

    Args:
        size: width and height of the image.
        model: width and height of what the transform makes of it.
    """
    mask_geometry(transform)  # refuses what it does not know
    first = getattr(transform, "transforms", [transform])[0]
    pitch = [image / pixels for image, pixels in zip(size, model, strict=True)]  # of the model's pixels
    if hasattr(first, "longest"):  # ResizeKeepRatio: 1 fits the image in, 0 fills
        pitch = [first.longest * max(pitch) + (1 - first.longest) * min(pitch)] * 2
    elif isinstance(first.size, int):
        pitch = [min(pitch)] * 2  # Resize of the shorter side, then CenterCrop
    half = [p * pixels / 2 for p, pixels in zip(pitch, model, strict=True)]
    return size[0] / 2 - half[0], size[1] / 2 - half[1], size[0] / 2 + half[0], size[1] / 2 + half[1]
