"""Images with masks: what is read, what is refused, and that a mask lies where its image does after any
resizing and cropping.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision import transforms

from data import InputError
from demo.images import DemoBirds, DemoMasks
from masks import ImageNetSegmentation, MaskFolder, mask_geometry, seen
from tasks.passes import batches

CPU = torch.device("cpu")


def transform_to(size=32, mode="shortest"):
    return image_transform(
        size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode
    )  # pixels stay in 0..1


PLAIN = transform_to(8)  # leaves pictures of 8 x 8 as they are


def patch(width, height, left, top, right, bottom):
    """A dark picture with a bright patch, and the patch's mask."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=-1)), mask


def save_folder(root, pairs, suffix=".png"):
    """pairs: {name: (picture, mask image)}"""
    for name, (picture, mask) in pairs.items():
        for kind, image in (("images", picture), ("masks", mask)):
            path = root / kind / f"{name}{suffix if kind == 'images' else '.png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


def one_pair(tmp_path, mask, picture=None):
    """A folder with one picture of 8 x 8 and this mask."""
    picture = Image.new("RGB", (8, 8), (10, 200, 30)) if picture is None else picture
    mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    return save_folder(tmp_path / "data", {"one": (picture, mask)})


def item(data, index=0):
    """(image, mask, foreground), or the line that says why not."""
    found, number = data[index]
    assert number == index
    return found


def said(data, index=0):
    """The one line that a data set gives in place of an image."""
    line = item(data, index)
    assert isinstance(line, str), "expected a line of text, got an image"
    assert "\n" not in line
    return line


def left_half():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, :3] = 1
    return mask


def write_mat(path, pictures, masks, nested=True):
    """As MATLAB stores cell arrays in files of version 7.3: references to arrays with their axes reversed.

    nested: as in gtsegs_ijcv.mat, by what its published readers index: an image at file[img[i, 0]], its mask
    at file[file[gt[i, 0]][0, 0]].
    """
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, arrays in (("img", pictures), ("gt", masks)):
            cells = file.create_dataset(f"value/{name}", (len(arrays), 1), dtype=h5py.ref_dtype)
            for i, array in enumerate(arrays):
                reference = file.create_dataset(f"#refs#/{name}{i}", data=np.asarray(array).T).ref
                if name == "gt" and nested:
                    cell = file.create_dataset(f"#refs#/cell{i}", (1, 1), dtype=h5py.ref_dtype)
                    cell[0, 0] = reference
                    reference = cell.ref
                cells[i, 0] = reference
    return path


def published_reader(path, index):
    """The image and the mask, as code published with other papers takes them from the file."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "r") as file:
        image = np.array(file[file["/value/img"][index, 0]]).transpose(2, 1, 0)
        mask = np.array(file[file[file["/value/gt"][index, 0]][0, 0]]).transpose(1, 0)
    return image, mask


def some_mat(tmp_path, count=5):
    """Pictures of different shapes, each with its own patch."""
    pairs = [patch(20 + 3 * i, 30 - 2 * i, 4 + i, 9, 14, 16 + i) for i in range(count)]
    return write_mat(
        tmp_path / "some.mat", [np.array(picture) for picture, _ in pairs], [mask for _, mask in pairs]
    ), pairs


# Geometry: a mask goes where its image goes.

MODES = ["shortest", "squash", "longest"]
SIZES = [(32, 32), (24, 40), (40, 24)]
WIDE, TALL = (200, 100), (90, 180)


def overlap(image, mask):
    """Intersection over union of the bright pixels and the mask, in the model's coordinates."""
    bright, marked = image.mean(dim=0) > 0.5, mask == 1
    assert bright.any()
    return float((bright & marked).sum() / (bright | marked).sum())


def through(tmp_path, size, model, mode, protocol):
    width, height = size
    # Off the centre, but inside the crop of every mode.
    picture, mask = patch(
        width, height, int(0.52 * width), int(0.42 * height), int(0.72 * width), int(0.7 * height)
    )
    root = save_folder(tmp_path / "data", {"one": (picture, Image.fromarray(mask))})
    return item(MaskFolder(root, transform_to(model, mode), protocol=protocol))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("size", [WIDE, TALL, (120, 120)])
def test_an_aligned_mask_lies_on_its_object(tmp_path, size, model, mode):
    image, mask, _ = through(tmp_path, size, model, mode, "aligned")
    assert image.shape[1:] == mask.shape == model
    grown = torch.nn.functional.max_pool2d((mask == 1).float()[None], 3, 1, 1)[0] > 0
    shrunk = torch.nn.functional.max_pool2d((mask != 1).float()[None], 3, 1, 1)[0] == 0
    bright = image.mean(dim=0) > 0.5
    assert shrunk.any()
    assert (grown[bright]).all()  # to the pixel, but for the edge, where the image is blurred
    assert (bright[shrunk]).all()


@pytest.mark.parametrize(
    ("size", "model", "mode"),
    [(WIDE, (32, 32), "shortest"), (TALL, (32, 32), "shortest"), (WIDE, (32, 32), "longest")],
)
def test_the_authors_protocol_misplaces_the_mask_of_an_image_that_is_not_square(tmp_path, size, model, mode):
    image, mask, _ = through(tmp_path, size, model, mode, "authors")
    assert overlap(image, mask) < 0.6
    image, mask, _ = through(tmp_path / "again", size, model, mode, "aligned")
    assert overlap(image, mask) > 0.8


@pytest.mark.parametrize(
    ("size", "model", "mode"),
    [((120, 120), (32, 32), "shortest"), (WIDE, (32, 32), "squash"), (TALL, (24, 40), "squash")],
)
def test_the_protocols_agree_where_nothing_is_cropped(tmp_path, size, model, mode):
    authors = through(tmp_path / "authors", size, model, mode, "authors")
    aligned = through(tmp_path / "aligned", size, model, mode, "aligned")
    assert torch.equal(authors[0], aligned[0])
    assert (
        authors[1] != aligned[1]
    ).float().mean() < 0.01  # Pillow's and torchvision's call may round an edge apart


def test_the_authors_protocol_squashes_the_whole_mask(tmp_path):
    mask = np.zeros((10, 40), dtype=np.uint8)
    mask[:, :10], mask[:5, 30:] = 1, 1
    root = save_folder(tmp_path, {"one": (Image.new("RGB", (40, 10)), Image.fromarray(mask))})
    expected = torch.zeros(8, 8, dtype=torch.int8)
    expected[:, :2], expected[:4, 6:] = 1, 1
    assert torch.equal(item(MaskFolder(root, PLAIN, protocol="authors"))[1], expected)
    assert item(MaskFolder(root, PLAIN))[1].sum() == 0  # both patches lie outside of the crop


def test_what_the_transform_pads_is_not_labelled(tmp_path):
    image, mask, _ = through(tmp_path, WIDE, (32, 32), "longest", "aligned")
    assert (mask[:8] == -1).all()
    assert (mask[24:] == -1).all()
    assert (mask[8:24] >= 0).all()
    assert image[:, :8].sum() == 0
    image, mask, _ = through(tmp_path / "tall", TALL, (32, 32), "longest", "aligned")
    assert (mask[:, :8] == -1).all()
    assert (mask[:, 24:] == -1).all()
    assert (mask[:, 8:24] >= 0).all()


def test_a_mask_gets_no_new_values_from_resizing(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.choice(np.uint8([0, 1, 9]), (37, 53))
    root = save_folder(tmp_path, {"one": (Image.new("RGB", (53, 37)), Image.fromarray(values))})
    for mode in MODES:
        mask = item(MaskFolder(root, transform_to(16, mode), void=9))[1]
        assert mask.unique().tolist() == [-1, 0, 1]
        assert mask.dtype == torch.int8


def test_the_transform_is_left_as_it_was():
    transform = transform_to(32, "longest")
    before = repr(transform), transform.transforms[0].interpolation, transform.transforms[1].fill
    mask_geometry(transform)
    assert (repr(transform), transform.transforms[0].interpolation, transform.transforms[1].fill) == before


def test_the_demos_transform_is_known():
    import demo

    _, preprocess, _ = demo.load()
    mask = Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64))
    assert np.array_equal(mask_geometry(preprocess)(mask), mask)


def test_a_transform_of_one_step_is_known_too():
    assert mask_geometry(transforms.Resize((6, 4)))(Image.new("L", (20, 20))).size == (4, 6)


@pytest.mark.parametrize(
    "step", [transforms.RandomHorizontalFlip(), transforms.Pad(3), transforms.TenCrop(8)]
)
def test_a_step_that_moves_pixels_in_another_way_is_refused_by_name(step):
    transform = transforms.Compose([*PLAIN.transforms[:2], step, *PLAIN.transforms[2:]])
    for refuses in (
        mask_geometry,
        lambda transform: DemoMasks(transform, 1),
        lambda transform: seen(transform, (9, 9), (8, 8)),
    ):
        with pytest.raises(InputError, match=type(step).__name__):
            refuses(transform)


# What the model sees, in the image's pixels.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("size", [(600, 300), (300, 750), (500, 500)])
def test_a_dot_is_found_where_seen_says(size, model, mode):
    transform = transform_to(model, mode)
    width, height = size
    rows, cols = model
    left, top, right, bottom = seen(transform, size, (cols, rows))
    pitch = (right - left) / cols, (bottom - top) / rows  # of a pixel of the model, in pixels of the image
    for x, y in [(0.5, 0.5), (0.44, 0.58), (0.57, 0.41)]:
        x, y = x * width, y * height
        dot = np.zeros((height, width, 3), dtype=np.uint8)
        radius = 1.5 * max(pitch)
        v, u = np.mgrid[:height, :width] + 0.5
        dot[(u - x) ** 2 + (v - y) ** 2 < radius**2] = 255
        found = transform(Image.fromarray(dot)).mean(dim=0)
        total = found.sum()
        column = float((found.sum(dim=0) * (torch.arange(cols) + 0.5)).sum() / total)
        row = float((found.sum(dim=1) * (torch.arange(rows) + 0.5)).sum() / total)
        # A resized side and a crop's offset are whole pixels of the model: half a pixel each.
        assert left + column * pitch[0] == pytest.approx(x, abs=1.01 * pitch[0])
        assert top + row * pitch[1] == pytest.approx(y, abs=1.01 * pitch[1])


@pytest.mark.parametrize(
    ("mode", "model", "size", "expected"),
    [
        ("shortest", 32, (200, 100), (50, 0, 150, 100)),
        ("shortest", 32, (100, 200), (0, 50, 100, 150)),
        ("shortest", (20, 40), (100, 100), (0, 25, 100, 75)),
        ("shortest", (20, 40), (300, 100), (50, 0, 250, 100)),
        ("longest", 32, (200, 100), (0, -50, 200, 150)),
        ("longest", (20, 40), (100, 100), (-50, 0, 150, 100)),
        ("squash", 32, (200, 100), (0, 0, 200, 100)),
        ("squash", (20, 40), (70, 90), (0, 0, 70, 90)),
        ("shortest", 32, (64, 64), (0, 0, 64, 64)),
    ],
)
def test_seen_by_hand(mode, model, size, expected):
    transform = transform_to(model, mode)
    rows, cols = (model, model) if isinstance(model, int) else model
    assert seen(transform, size, (cols, rows)) == pytest.approx(expected)


def test_seen_takes_one_step_alone():
    assert seen(transforms.Resize((6, 4)), (20, 30), (4, 6)) == (0, 0, 20, 30)


# Values of a mask.


def as_is(mask):
    return Image.fromarray(mask)


def times_255(mask):
    return Image.fromarray(mask * np.uint8(255))


def palette(mask):
    image = Image.fromarray(mask).convert("P")
    image.putdata((mask.ravel()).tolist())
    image.putpalette([40, 90, 200, 250, 10, 10] + [0] * 750)
    return image


def one_bit(mask):
    return Image.fromarray(mask * np.uint8(255)).convert("1")


def equal_channels(mask):
    return Image.fromarray(np.repeat(mask[..., None] * np.uint8(200), 3, axis=-1))


def sixteen_bits(mask):
    return Image.fromarray(mask.astype(np.uint16) * np.uint16(4000))


@pytest.mark.parametrize(
    ("write", "foreground"),
    [(as_is, 1), (times_255, 255), (palette, 1), (one_bit, 1), (equal_channels, 200), (sixteen_bits, 4000)],
)
def test_a_mask_may_mark_foreground_in_many_ways(tmp_path, write, foreground):
    image = write(left_half())
    assert (
        image.mode
        == {
            as_is: "L",
            times_255: "L",
            palette: "P",
            one_bit: "1",
            equal_channels: "RGB",
            sixteen_bits: "I;16",
        }[write]
    )
    _, mask, value = item(MaskFolder(one_pair(tmp_path, image), PLAIN))
    assert torch.equal(mask, torch.from_numpy(left_half()).to(torch.int8))
    assert value == foreground


@pytest.mark.parametrize("void", [255, 7])
def test_pixels_of_the_void_value_are_not_labelled(tmp_path, void):
    values = left_half()
    values[5:, :] = void
    _, mask, foreground = item(MaskFolder(one_pair(tmp_path, values), PLAIN, void=void))
    expected = torch.from_numpy(left_half()).to(torch.int8)
    expected[5:] = -1
    assert torch.equal(mask, expected)
    assert foreground == 1
    line = said(MaskFolder(tmp_path / "data", PLAIN))
    assert "one.png" in line
    assert "3 values (0, 1, " in line
    assert "--void" in line


def test_a_void_value_that_no_mask_holds_changes_nothing(tmp_path):
    root = one_pair(tmp_path, times_255(left_half()))
    assert torch.equal(item(MaskFolder(root, PLAIN, void=7))[1], item(MaskFolder(root, PLAIN))[1])


def test_a_void_value_of_255_makes_a_mask_of_0_and_255_a_mask_without_foreground(tmp_path):
    _, mask, foreground = item(MaskFolder(one_pair(tmp_path, times_255(left_half())), PLAIN, void=255))
    assert foreground == 0
    assert sorted(mask.unique().tolist()) == [-1, 0]


def test_a_mask_without_foreground_is_valid(tmp_path):
    _, mask, foreground = item(MaskFolder(one_pair(tmp_path, np.zeros((8, 8), dtype=np.uint8)), PLAIN))
    assert (mask == 0).all()
    assert foreground == 0


def test_a_mask_that_is_all_foreground_is_valid(tmp_path):
    _, mask, foreground = item(MaskFolder(one_pair(tmp_path, np.full((8, 8), 255, dtype=np.uint8)), PLAIN))
    assert (mask == 1).all()
    assert foreground == 255


# A folder of images and masks.


def numbered(tmp_path, count=9, prefix=""):
    """Pictures and masks that tell which one they are: i + 1 columns of foreground of 16."""
    pairs = {f"{prefix}{i:02d}": patch(16, 16, 0, 0, i + 1, 16) for i in range(count)}
    return save_folder(
        tmp_path / "data", {name: (picture, Image.fromarray(mask)) for name, (picture, mask) in pairs.items()}
    )


def columns(data):
    return [int((item(data, i)[1] == 1).sum()) // 16 for i in range(len(data))]


def test_images_come_sorted_by_name_each_with_its_own_mask(tmp_path):
    data = MaskFolder(numbered(tmp_path), transform_to(16))
    assert columns(data) == list(range(1, 10))
    for i in range(len(data)):
        image, mask, _ = item(data, i)
        assert torch.equal(image.mean(dim=0) > 0.5, mask == 1)


def test_a_limit_draws_pairs_with_the_seed(tmp_path):
    root = numbered(tmp_path)
    some = columns(MaskFolder(root, transform_to(16), limit=4, seed=0))
    assert len(set(some)) == 4
    assert some == sorted(some) == columns(MaskFolder(root, transform_to(16), limit=4, seed=0))
    assert some != columns(MaskFolder(root, transform_to(16), limit=4, seed=1))
    assert "4 of 9" in MaskFolder(root, transform_to(16), limit=4).description


def test_a_limited_folder_draws_pairs_and_not_images_alone(tmp_path):
    data = MaskFolder(numbered(tmp_path), transform_to(16), limit=4, seed=3)
    for i in range(4):
        image, mask, _ = item(data, i)
        assert torch.equal(image.mean(dim=0) > 0.5, mask == 1)


def test_image_and_mask_may_be_of_different_kinds_of_files(tmp_path):
    picture, mask = patch(8, 8, 0, 0, 3, 8)
    for folder in ("images", "masks"):
        (tmp_path / folder / "deep" / "er").mkdir(parents=True)
    picture.save(tmp_path / "images" / "deep" / "er" / "a.b.JPG", format="JPEG", quality=95)
    Image.fromarray(mask).save(tmp_path / "masks" / "deep" / "er" / "a.b.bmp")
    (tmp_path / "images" / "deep" / "notes.txt").write_text("not an image")
    data = MaskFolder(tmp_path, PLAIN)
    assert len(data) == 1
    assert torch.equal(item(data)[1], torch.from_numpy(mask).to(torch.int8))


def test_class_folders_say_what_an_image_shows(tmp_path):
    mask = Image.fromarray(left_half())
    pairs = {
        f"{name}/{i}": (Image.new("RGB", (8, 8)), mask)
        for name, count in (("gull", 2), ("crow", 1), ("duck", 3))
        for i in range(count)
    }
    data = MaskFolder(save_folder(tmp_path, pairs), PLAIN)
    assert data.names == ["crow", "duck", "gull"]
    assert data.labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert [data.name(i).split("/")[-2] for i in range(6)] == [data.names[label] for label in data.labels]


def test_without_class_folders_there_are_no_labels(tmp_path):
    mask = Image.fromarray(left_half())
    data = MaskFolder(
        save_folder(
            tmp_path, {"gull/1": (Image.new("RGB", (8, 8)), mask), "2": (Image.new("RGB", (8, 8)), mask)}
        ),
        PLAIN,
    )
    assert data.labels is None
    assert data.names is None


def test_folders_below_images_and_masks_that_are_links(tmp_path):
    mask = Image.fromarray(left_half())
    store = save_folder(tmp_path / "store", {"crow/1": (Image.new("RGB", (8, 8)), mask)})
    root = save_folder(tmp_path / "data", {"red_bird/1": (Image.new("RGB", (8, 8)), mask)})
    for kind in ("images", "masks"):
        (root / kind / "crow").symlink_to(store / kind / "crow")
    data = MaskFolder(root, PLAIN)
    assert data.names == ["crow", "red bird"]  # as in a folder of images
    assert data.labels.tolist() == [0, 1]
    assert all(torch.equal(item(data, i)[1], torch.from_numpy(left_half()).to(torch.int8)) for i in range(2))


def test_what_is_passed_over_beside_images_and_masks_is_said(tmp_path):
    root = numbered(tmp_path, 3)
    assert MaskFolder(root, PLAIN).description.endswith("3 of 3 images")
    (root / "images" / "00.png").unlink()
    (root / "images" / "notes.txt").touch()
    (root / "masks" / "._01.png").touch()
    description = MaskFolder(root, PLAIN).description
    assert description.endswith("2 of 2 images; passed over: 1 (.txt; first notes.txt); 1 masks of no image")


def test_some_of_the_wordnet_ids_name_no_classes(tmp_path):
    mask = Image.fromarray(left_half())
    pairs = {f"{name}/1": (Image.new("RGB", (8, 8)), mask) for name in ("n01440764", "n01443537")}
    data = MaskFolder(save_folder(tmp_path, pairs), PLAIN)
    assert data.names is data.labels is None
    assert "2 of them WordNet ids" in data.unlabelled


def test_a_limit_draws_images_and_leaves_the_classes(tmp_path):
    mask = Image.fromarray(left_half())
    root = save_folder(
        tmp_path, {f"{name}/1": (Image.new("RGB", (8, 8)), mask) for name in ("crow", "duck", "gull")}
    )
    for seed in range(3):
        data = MaskFolder(root, PLAIN, limit=1, seed=seed)
        assert data.names == ["crow", "duck", "gull"]
        assert data.name(0).split("/")[-2] == data.names[data.labels[0]]


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (1, 1, 1)),  # transparent: white
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), (1, 0, 0)),
        (Image.new("L", (8, 8), 51), (0.2, 0.2, 0.2)),
        (Image.new("1", (8, 8), 1), (1, 1, 1)),
        (
            Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16)),
            (128 / 255,) * 3,
        ),  # Pillow alone would clip it to white
    ],
)
def test_an_image_of_any_kind_comes_as_three_channels(tmp_path, picture, expected):
    image, _, _ = item(MaskFolder(one_pair(tmp_path, left_half(), picture), PLAIN))
    assert image.shape == (3, 8, 8)
    assert image.mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1.01 / 255)


def loaded(data, workers, batch_size=2):
    found = list(batches(data, batch_size, workers, "test", CPU))
    return [torch.cat([part[0][k] for part in found]) for k in range(3)] + [
        torch.cat([part[1] for part in found])
    ]


@pytest.mark.filterwarnings("ignore:This process")  # forking a process with threads
def test_workers_change_nothing(tmp_path):
    data = MaskFolder(numbered(tmp_path, 5), transform_to(16))
    alone, together = loaded(data, 0), loaded(data, 2)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert alone[2].tolist() == [1] * 5
    assert alone[3].tolist() == list(range(5))


def broken_image(root):
    (root / "images" / "one.png").write_text("not an image")
    return "images/one.png"


def cut_image(root):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = root / "images" / "one.png"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:6000])
    return "images/one.png"


def broken_mask(root):
    (root / "masks" / "one.png").write_text("not an image")
    return "masks/one.png"


def cut_mask(root):
    noise = np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8)
    Image.new("RGB", (64, 64)).save(root / "images" / "one.png")
    path = root / "masks" / "one.png"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:200])
    return "masks/one.png"


def empty_mask_file(root):
    (root / "masks" / "one.png").write_bytes(b"")
    return "masks/one.png"


def mask_of_another_size(root):
    Image.new("L", (8, 9)).save(root / "masks" / "one.png")
    return "8 x 9"


def turned_mask(root):
    Image.new("RGB", (10, 8)).save(root / "images" / "one.png")
    Image.new("L", (8, 10)).save(root / "masks" / "one.png")
    return "8 x 10"


def mask_with_three_values(root):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3).save(root / "masks" / "one.png")
    return "holds 3 values (0, 1, 2)"


def grey_photograph_as_a_mask(root):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(root / "masks" / "one.png")
    return "holds 64 values (0, 1, 2, 3, 4, ...)"


def colour_mask(root):
    Image.new("RGB", (8, 8), (0, 0, 200)).save(root / "masks" / "one.png")
    return "masks/one.png"


def mask_with_transparency(root):
    Image.new("RGBA", (8, 8), (1, 1, 1, 255)).save(root / "masks" / "one.png")
    return "transparency"


def mask_of_real_numbers(root):
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(root / "masks" / "one.tif")
    (root / "masks" / "one.png").unlink()
    return "masks/one.tif"


DAMAGES = [
    broken_image, cut_image, broken_mask, cut_mask, empty_mask_file, mask_of_another_size, turned_mask,
    mask_with_three_values, grey_photograph_as_a_mask, colour_mask, mask_with_transparency,
    mask_of_real_numbers,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_pair_that_cannot_be_used_is_named_in_one_line(tmp_path, damage):
    root = one_pair(tmp_path, left_half())
    assert not isinstance(item(MaskFolder(root, PLAIN)), str)
    fragment = damage(root)
    line = said(MaskFolder(root, PLAIN))
    assert fragment in line
    assert "one." in line


@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_pair_in_a_batch_is_raised_in_the_main_process(tmp_path, workers):
    root = numbered(tmp_path, 5)
    (root / "masks" / "03.png").write_text("not an image")
    with pytest.raises(InputError, match=r"03\.png"):
        list(batches(MaskFolder(root, transform_to(16)), 2, workers, "test", CPU))


def test_a_mask_with_void_alone_is_refused(tmp_path):
    root = one_pair(tmp_path, np.full((8, 8), 255, dtype=np.uint8))
    line = said(MaskFolder(root, PLAIN, void=255))
    assert "one.png" in line
    assert "no labelled pixel" in line


@pytest.mark.parametrize("protocol", ["aligned", "authors"])
def test_a_mask_whose_labels_are_all_cropped_away_is_refused(tmp_path, protocol):
    values = np.full((8, 40), 9, dtype=np.uint8)
    values[:, :3] = 1
    root = save_folder(tmp_path, {"one": (Image.new("RGB", (40, 8)), Image.fromarray(values))})
    data = MaskFolder(root, PLAIN, protocol=protocol, void=9)
    if protocol == "authors":  # squashed, it is still there
        assert item(data)[1].max() == 1
    else:
        assert "nothing of the mask" in said(data)
        assert "one.png" in said(data)


def test_an_image_without_a_mask_is_named_with_what_was_expected(tmp_path):
    root = numbered(tmp_path, 3)
    (root / "masks" / "01.png").unlink()
    with pytest.raises(InputError, match=r"images/01\.png: expected .*masks/01\.png"):
        MaskFolder(root, PLAIN)


def test_a_mask_in_another_folder_than_its_image_is_missing(tmp_path):
    root = numbered(tmp_path, 2, "gull/")
    (root / "masks" / "gull").rename(root / "masks" / "crow")
    with pytest.raises(InputError, match=r"images/gull/00\.png"):
        MaskFolder(root, PLAIN)


def test_a_mask_without_an_image_does_no_harm(tmp_path):
    root = numbered(tmp_path, 3)
    (root / "images" / "01.png").unlink()
    assert columns(MaskFolder(root, transform_to(16))) == [1, 3]


@pytest.mark.parametrize("missing", ["images", "masks"])
def test_a_missing_folder_is_named(tmp_path, missing):
    root = numbered(tmp_path, 1)
    (root / missing).rename(root / "elsewhere")
    with pytest.raises(InputError, match=rf"no folder .*{missing}.*images/ and masks/"):
        MaskFolder(root, PLAIN)


def test_an_empty_folder_is_named(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    with pytest.raises(InputError, match=r"no images in .*images \(.*\.png"):
        MaskFolder(tmp_path, PLAIN)


@pytest.mark.parametrize(
    "build",
    [lambda **options: DemoMasks(PLAIN, 1, **options), lambda **options: MaskFolder("x", PLAIN, **options)],
)
def test_zero_cannot_be_void(build):
    with pytest.raises(InputError, match="--void 0"):
        build(void=0)


# The demo's birds.


def test_the_demos_masks_are_its_birds():
    data, birds = (
        DemoMasks(transform_to(64), limit=6, seed=1),
        DemoBirds("test", lambda image: image, limit=6, seed=1),
    )
    for i in range(6):
        image, mask, foreground = item(data, i)
        picture, soft = birds.render(i)
        assert torch.equal(image, torch.from_numpy(picture).permute(2, 0, 1) / 255)
        assert torch.equal(mask, torch.from_numpy(soft > 127).to(torch.int8))
        assert foreground == 1
        assert 0.02 < (mask == 1).float().mean() < 0.6


def test_the_demos_labels_are_the_kinds_of_its_birds():
    from demo.scenes import FACTORS

    data, birds = DemoMasks(PLAIN, limit=20), DemoBirds("test", PLAIN, limit=20)
    assert data.names == list(FACTORS["kind"])
    assert torch.equal(data.labels, birds.facts["kind"])
    assert len(data) == len(data.labels) == 20
    assert data.description == birds.description
    assert "picture 3" in data.name(3)


def test_the_demos_limit_is_drawn_with_the_seed():
    first, again, other = (DemoMasks(PLAIN, limit=5, seed=seed).birds.rows for seed in (0, 0, 1))
    assert first == again != other
    assert len(DemoMasks(PLAIN)) == 4096


# gtsegs_ijcv.mat, as MATLAB writes it. These need h5py.


def test_a_mat_file_gives_images_and_masks_upright(tmp_path):
    path, pairs = some_mat(tmp_path)
    data = ImageNetSegmentation(path, transform_to(16, "squash"))
    folder = save_folder(
        tmp_path / "data",
        {str(i): (picture, Image.fromarray(mask)) for i, (picture, mask) in enumerate(pairs)},
    )
    same = MaskFolder(folder, transform_to(16, "squash"))
    assert len(data) == 5
    for i in range(5):
        for found, expected in zip(item(data, i), item(same, i), strict=True):
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert data.labels is None
    assert data.names is None
    assert "5 of 5" in data.description


def test_a_mat_file_is_read_as_published_readers_do(tmp_path):
    path, _ = some_mat(tmp_path)
    data = ImageNetSegmentation(path, PLAIN)
    for i in range(5):
        image, mask = data.pair(i)
        expected_image, expected_mask = published_reader(path, i)
        assert np.array_equal(np.asarray(image), expected_image)
        assert np.array_equal(mask, expected_mask)


def test_masks_of_a_mat_file_behind_one_reference_are_read_alike(tmp_path):
    nested, pairs = some_mat(tmp_path)
    arrays = [np.array(picture) for picture, _ in pairs], [mask for _, mask in pairs]
    plain = write_mat(tmp_path / "plain.mat", *arrays, nested=False)
    with pytest.raises((IndexError, TypeError, ValueError)):  # the two files differ
        published_reader(plain, 0)
    for i in range(5):
        one, other = ImageNetSegmentation(nested, PLAIN).pair(i), ImageNetSegmentation(plain, PLAIN).pair(i)
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])


@pytest.mark.parametrize("protocol", ["aligned", "authors"])
def test_a_mat_file_follows_the_protocol(tmp_path, protocol):
    picture, mask = patch(200, 100, 104, 50, 136, 70)
    path = write_mat(tmp_path / "one.mat", [np.array(picture)], [mask])
    image, marked, _ = item(ImageNetSegmentation(path, transform_to(32), protocol=protocol))
    assert (overlap(image, marked) > 0.8) == (protocol == "aligned")
    assert (overlap(image, marked) < 0.6) == (protocol == "authors")


def test_a_mat_files_colours_keep_their_order(tmp_path):
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    picture[...] = 255, 128, 0
    picture[0, 7] = 0
    image, _, _ = item(ImageNetSegmentation(write_mat(tmp_path / "one.mat", [picture], [left_half()]), PLAIN))
    assert torch.equal(image, torch.from_numpy(picture).permute(2, 0, 1) / 255)


def test_a_greyscale_array_in_a_mat_file_becomes_three_channels(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image, mask, _ = item(ImageNetSegmentation(write_mat(tmp_path / "one.mat", [grey], [left_half()]), PLAIN))
    assert torch.equal(image, torch.from_numpy(grey).expand(3, 8, 8) / 255)
    assert torch.equal(mask, torch.from_numpy(left_half()).to(torch.int8))


def test_a_mask_in_a_mat_file_may_mark_void_with_a_negative_number_or_a_value(tmp_path):
    negative = left_half().astype(np.int16)
    negative[5:] = -1
    value = left_half()
    value[5:] = 200
    path = write_mat(tmp_path / "two.mat", [np.zeros((8, 8, 3), dtype=np.uint8)] * 2, [negative, value])
    data = ImageNetSegmentation(path, PLAIN, void=200)
    assert torch.equal(item(data, 0)[1], item(data, 1)[1])
    assert (item(data, 0)[1][5:] == -1).all()
    assert item(data, 0)[1][:5].min() == 0
    assert "3 values" in said(ImageNetSegmentation(path, PLAIN), 1)


def test_a_mask_of_logical_values_in_a_mat_file_is_read(tmp_path):
    path = write_mat(tmp_path / "one.mat", [np.zeros((8, 8, 3), dtype=np.uint8)], [left_half().astype(bool)])
    _, mask, foreground = item(ImageNetSegmentation(path, PLAIN))
    assert torch.equal(mask, torch.from_numpy(left_half()).to(torch.int8))
    assert foreground == 1


def test_a_limit_draws_from_a_mat_file_with_the_seed(tmp_path):
    path, _ = some_mat(tmp_path, 9)
    whole = ImageNetSegmentation(path, transform_to(16))
    first, again, other = (
        ImageNetSegmentation(path, transform_to(16), limit=3, seed=seed) for seed in (0, 0, 1)
    )
    assert first.rows == again.rows != other.rows
    assert len(first) == 3
    for i, row in enumerate(first.rows):
        assert torch.equal(item(first, i)[1], item(whole, row)[1])
        assert f"image {row} of" in first.name(i)
    assert "3 of 9" in first.description


@pytest.mark.filterwarnings("ignore:This process")
def test_workers_change_nothing_in_a_mat_file(tmp_path):
    data = ImageNetSegmentation(some_mat(tmp_path)[0], transform_to(16))
    alone, together, again = (
        loaded(data, 0),
        loaded(data, 2),
        loaded(data, 2),
    )  # the second time the file is open here
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
    assert alone[3].tolist() == list(range(5))


def refused_mat(path, *fragments):
    with pytest.raises(InputError) as caught:
        ImageNetSegmentation(path, PLAIN)
    line = str(caught.value)
    assert "\n" not in line
    for fragment in (str(path), *fragments):
        assert fragment in line


def test_a_mat_file_of_random_bytes_is_refused(tmp_path):
    pytest.importorskip("h5py")
    path = tmp_path / "random.mat"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    refused_mat(path, "gtsegs_ijcv.mat", "value/img")


def test_an_empty_mat_file_is_refused(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "empty.mat").write_bytes(b"")
    refused_mat(tmp_path / "empty.mat", "gtsegs_ijcv.mat")


def test_a_missing_mat_file_is_named(tmp_path):
    pytest.importorskip("h5py")
    refused_mat(tmp_path / "nowhere.mat", "images/ and masks/")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_mat_file_cut_short_is_refused(tmp_path, share):
    path, _ = some_mat(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused_mat(path, "truncated")


def edit_mat(tmp_path, change):
    h5py = pytest.importorskip("h5py")
    path, _ = some_mat(tmp_path)
    with h5py.File(path, "r+") as file:
        change(file, h5py)
    return path


def drop_images(file, h5py):
    del file["value/img"]


def drop_masks(file, h5py):
    del file["value/gt"]


def numbers(file, h5py):
    drop_images(file, h5py)
    file["value/img"] = np.ones((5, 1))


def a_group(file, h5py):
    drop_images(file, h5py)
    file.create_group("value/img")


def a_word(file, h5py):
    drop_images(file, h5py)
    file["value/img"] = "pictures"


def fewer_masks(file, h5py):
    some = file["value/gt"][:3]
    drop_masks(file, h5py)
    file.create_dataset("value/gt", data=some, dtype=h5py.ref_dtype)


def no_pictures(file, h5py):
    for name in ("img", "gt"):
        del file[f"value/{name}"]
        file.create_dataset(f"value/{name}", (0, 1), dtype=h5py.ref_dtype)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (drop_images, "value/img"),
        (drop_masks, "value/gt"),
        (numbers, "float64, expected references"),
        (a_group, "value/img"),
        (a_word, "value/img"),
        (fewer_masks, "5 images and 3 masks"),
        (no_pictures, "0 images"),
    ],
)
def test_a_mat_file_of_something_else_is_refused(tmp_path, change, fragment):
    refused_mat(edit_mat(tmp_path, change), fragment)


def real_numbers(file, h5py):
    file["value/img"][2, 0] = file.create_dataset("other", data=np.zeros((3, 26, 26))).ref


def four_channels(file, h5py):
    file["value/img"][2, 0] = file.create_dataset("other", data=np.zeros((4, 26, 26), dtype=np.uint8)).ref


def mask_of_real(file, h5py):
    file["value/gt"][2, 0] = file.create_dataset("other", data=np.zeros((26, 26))).ref


def mask_of_channels(file, h5py):
    file["value/gt"][2, 0] = file.create_dataset("other", data=np.zeros((3, 26, 26), dtype=np.uint8)).ref


def mask_too_small(file, h5py):
    file["value/gt"][2, 0] = file.create_dataset("other", data=np.zeros((25, 26), dtype=np.uint8)).ref


def null_reference(file, h5py):
    file["value/img"][2, 0] = h5py.Reference()


def reference_to_a_group(file, h5py):
    file["value/img"][2, 0] = file.create_group("other").ref


def reference_to_a_word(file, h5py):
    file["value/img"][2, 0] = file.create_dataset("other", data="a picture").ref


def cell_of_itself(file, h5py):
    cell = file["value/gt"]
    cell[2, 0] = cell[0, 0] = cell.ref


def empty_cell(file, h5py):
    file["value/gt"][2, 0] = file.create_dataset("other", (0, 0), dtype=h5py.ref_dtype).ref


SECRET = b"a local file, 26 x 26 x 3 bytes of it".ljust(26 * 26 * 3)


def secret(file):
    path = Path(file.filename).with_name("secret")
    path.write_bytes(SECRET)
    return str(path)


def pixels_of_a_local_file(file, h5py):
    """HDF5's external storage: the array's bytes are those of any file."""
    stored = [(secret(file), 0, len(SECRET))]
    file["value/img"][2, 0] = file.create_dataset("other", (3, 26, 26), np.uint8, external=stored).ref


def other_file(file, h5py):
    path = Path(file.filename).with_name("other.h5")
    with h5py.File(path, "w") as other:
        other["picture"] = np.zeros((3, 26, 26), dtype=np.uint8)
        cells = other.create_dataset("img", (5, 1), dtype=h5py.ref_dtype)
        for i in range(5):
            cells[i, 0] = other["picture"].ref
    return str(path)


def a_virtual_array(file, h5py):
    layout = h5py.VirtualLayout((3, 26, 26), np.uint8)
    layout[:] = h5py.VirtualSource(other_file(file, h5py), "picture", (3, 26, 26))
    file["value/img"][2, 0] = file.create_virtual_dataset("other", layout).ref


def a_link_to_another_file(file, h5py):
    drop_images(file, h5py)
    file["value/img"] = h5py.ExternalLink(other_file(file, h5py), "img")


def a_folder_of_another_file(file, h5py):
    drop_images(file, h5py)
    file["there"] = h5py.ExternalLink(other_file(file, h5py), "/")
    file["value/img"] = h5py.SoftLink("/there/img")


@pytest.mark.parametrize("change", [a_link_to_another_file, a_folder_of_another_file])
def test_a_mat_file_does_not_lead_to_another_file(tmp_path, change):
    path = edit_mat(tmp_path, change)
    h5py = pytest.importorskip("h5py")
    with h5py.File(path) as file:
        assert file["value/img"].shape == (5, 1)  # which h5py follows
    refused_mat(path, "/img lies in another file")


@pytest.mark.parametrize("change", [pixels_of_a_local_file, a_virtual_array])
def test_h5py_would_read_the_other_file_of_a_mat_file(tmp_path, change):
    h5py = pytest.importorskip("h5py")
    with h5py.File(edit_mat(tmp_path, change)) as file:
        array = file["other"][()]
    assert array.tobytes() == (SECRET if change is pixels_of_a_local_file else bytes(3 * 26 * 26))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (real_numbers, "float64, expected [rows, columns, 3] of uint8"),
        (four_channels, "(26, 26, 4) of uint8"),
        (mask_of_real, "float64, expected integers"),
        (mask_of_channels, "(26, 26, 3)"),
        (mask_too_small, "25 x 26"),
        (null_reference, "value/img"),
        (reference_to_a_group, "value/img"),
        (reference_to_a_word, "image 2"),
        (cell_of_itself, "value/gt of image 2"),
        (empty_cell, "value/gt of image 2"),
        (pixels_of_a_local_file, "lies in another file"),
        (a_virtual_array, "lies in another file"),
    ],
)
def test_an_array_that_cannot_be_used_in_a_mat_file_is_named(tmp_path, change, fragment):
    path = edit_mat(tmp_path, change)
    data = ImageNetSegmentation(path, transform_to(16))
    assert not isinstance(item(data, 1), str)
    line = said(data, 2)
    assert "image 2" in line
    assert str(path) in line
    assert fragment in line


def test_without_h5py_a_mat_file_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "some.mat").write_bytes(b"")
    refused_mat(tmp_path / "some.mat", "pip install h5py")
