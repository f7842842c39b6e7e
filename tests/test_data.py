"""Images: sources, the test set and splits, held and unheld sets, augmentation against a naive version."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from faulty import never_waits
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ftnas import data, images
from ftnas.data import SOURCES, AugmentConfig, DataConfig, Source, load, stratified_split
from ftnas.settings import parse

FOLDERS = os.environ.get("FTNAS_CIFAR10_FOLDERS")
real_folders = pytest.mark.skipif(not FOLDERS, reason="FTNAS_CIFAR10_FOLDERS is not set: no real image folders here")


def picture(seed: int, size=(6, 7), channels=3) -> np.ndarray:
    """Return noise, uint8 [H, W, C], or [H, W] for one channel."""
    shape = size if channels == 1 else (*size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_folder(root: Path, *, num=4, size=(6, 7), channels=3, classes=("ant", "bee"), suffix=".png") -> Path:
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(num):
                pixels = picture(1000 * label + index + (500 if split == "test" else 0), size, channels)
                Image.fromarray(pixels).save(folder / f"{index}{suffix}")
    return root


def folder_config(root: Path, **settings) -> DataConfig:
    return DataConfig(name="image_folder", root=str(root), **settings)


@pytest.fixture(scope="module")
def digits() -> tuple[data.ImageSet, data.ImageSet]:
    return load(DataConfig(name="digits"), "train"), load(DataConfig(name="digits"), "test")


def raw_pixels(images_: data.ImageSet) -> torch.Tensor:
    """Undo the normalisation: uint8 [N, C, H, W]."""
    values = torch.cat([batch for batch, _ in images_.batches(64)]).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (images_.mean, images_.std))
    return ((values * std + mean) * 255).round().to(torch.uint8)


# --- digits, splits -----------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_scans_exactly_once(digits):
    from sklearn.datasets import load_digits

    train, test = digits
    assert (train.num_images, test.num_images) == (1438, 359)
    assert train.shape == (1, 8, 8) and train.classes == tuple("0123456789")
    both = torch.cat([raw_pixels(train), raw_pixels(test)]).numpy()[:, 0]
    found = sorted(
        (int(label), *np.rint(scan * 16.0 / 255).astype(int).ravel())
        for scan, label in zip(both, torch.cat([train.labels, test.labels]), strict=True)
    )
    source = load_digits()
    expected = sorted(
        (int(label), *scan.astype(int).ravel()) for scan, label in zip(source.images, source.target, strict=True)
    )
    assert found == expected
    share = torch.bincount(test.labels) / torch.bincount(torch.cat([train.labels, test.labels]))
    assert (share - 0.2).abs().max() < 1 / 170


def test_mean_and_std_are_the_training_sets_for_both_splits(digits):
    train, test = digits
    values = raw_pixels(train).double() / 255
    assert train.mean == pytest.approx([values.mean().item()], rel=1e-12)
    assert train.std == pytest.approx([values.std(correction=0).item()], rel=1e-12)
    assert (test.mean, test.std) == (train.mean, train.std)
    batch = torch.cat([images_ for images_, _ in train.batches(500)])
    assert abs(batch.mean().item()) < 1e-5 and abs(batch.std(correction=0).item() - 1) < 1e-5


def test_the_digits_test_set_never_changes(digits):
    assert digits[1].digest == "02c39b8387e309c8cd50d79c079945b9d69c78d12c1c11f4a723d1b49806c492"


@pytest.mark.parametrize("counts", [(10, 10), (7, 1, 12, 5), (1, 1, 1), (100, 3)])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_stratified_split_takes_the_share_of_every_class(counts, fraction):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    first, rest = stratified_split(labels, fraction, seed=3)
    assert sorted(torch.cat([first, rest]).tolist()) == list(range(len(labels)))
    assert first.tolist() == sorted(first.tolist()) and rest.tolist() == sorted(rest.tolist())
    assert len(first) == round(fraction * len(labels))
    for label, count in enumerate(counts):
        assert abs(int((labels[first] == label).sum()) - fraction * count) < 1
    assert torch.equal(first, stratified_split(labels, fraction, seed=3)[0])


def test_stratified_split_draws_every_image_as_often():
    labels = torch.tensor([0] * 5 + [1] * 5)
    taken = torch.zeros(10)
    for seed in range(2000):
        taken[stratified_split(labels, 0.4, seed=seed)[0]] += 1
    # Binomial(2000, 0.4): 5.6 standard deviations of 21.9, ten images, false alarms 2e-7 by the normal tail.
    assert (taken - 800).abs().max() < 123


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 0.01])
def test_stratified_split_refuses_an_empty_part(fraction):
    with pytest.raises(ValueError, match="fraction of a split"):
        stratified_split(torch.arange(10), fraction, seed=0)


def test_subset_of_the_training_images_is_stratified_and_fixed(digits):
    part = load(DataConfig(name="digits", subset=100), "train")
    assert part.num_images == 100 and torch.bincount(part.labels).min() >= 9
    assert part.digest == load(DataConfig(name="digits", subset=100), "train").digest
    assert part.mean != digits[0].mean
    test = load(DataConfig(name="digits", subset=100), "test")
    assert test.digest == digits[1].digest and test.mean == part.mean


@pytest.mark.parametrize(("subset", "message"), [(1439, "there are 1438"), (5, "leave class '.' without any")])
def test_subset_that_cannot_be(subset, message):
    with pytest.raises(ValueError, match=message):
        load(DataConfig(name="digits", subset=subset), "train")


# --- torchvision's files ------------------------------------------------------------------------------------------


class _Pickled:
    """Pickles as the call it holds, to write what Python 2 and an old NumPy wrote."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def write_cifar(root: Path, name: str) -> np.ndarray:
    """Write the files of CIFAR with three images each, and return the training images [N, 3, 32, 32]."""
    coarse = name == "cifar100"
    folder = root / ("cifar-100-python" if coarse else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    written = []
    files = ["train", "test"] if coarse else [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for number, file in enumerate(files):
        pixels = np.random.default_rng(number).integers(0, 256, (3, 3072), dtype=np.uint8)
        # NumPy of 2009 gave the dtype's alignment as 0; a new NumPy warns about that when it reads it.
        kind = _Pickled(np.dtype, ("u1", 0, 1))
        array = _Pickled(np.ndarray, ((3, 3072), kind, pixels.tobytes()))
        entry = {"data": array, "fine_labels" if coarse else "labels": [number % 3, 1, 2]}
        (folder / file).write_bytes(pickle.dumps(entry, protocol=2))
        if not file.startswith("test"):
            written.append(pixels)
    meta = {"fine_label_names" if coarse else "label_names": [f"class {i}" for i in range(3)]}
    (folder / ("meta" if coarse else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return np.concatenate(written).reshape(-1, 3, 32, 32)


def write_mnist(root: Path, name: str) -> np.ndarray:
    folder = root / ("MNIST" if name == "mnist" else "FashionMNIST") / "raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 5, 28, 28) + pixels.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 5) + bytes([0, 9, 1, 2, 3]))
    return pixels[:, None]


def write_svhn(root: Path, name: str) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    for split in ("train", "test"):
        content = {"X": pixels.transpose(2, 3, 1, 0), "y": np.array([[10], [1], [9], [2], [3]], dtype=np.uint8)}
        scipy.io.savemat(root / f"{split}_32x32.mat", content)
    return pixels


WRITERS = {
    "cifar10": write_cifar,
    "cifar100": write_cifar,
    "mnist": write_mnist,
    "fashion_mnist": write_mnist,
    "svhn": write_svhn,
}


@pytest.fixture
def no_checksums(monkeypatch):
    import torchvision.datasets

    for module in (torchvision.datasets.cifar, torchvision.datasets.svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.mark.parametrize("name", WRITERS)
def test_torchvisions_files_are_read(name, tmp_path, monkeypatch, no_checksums):
    expected = WRITERS[name](tmp_path, name)
    monkeypatch.setenv("FTNAS_DATA", str(tmp_path))
    train, test = load(DataConfig(name=name), "train"), load(DataConfig(name=name), "test")
    assert torch.equal(raw_pixels(train), torch.from_numpy(expected))
    assert train.labels.dtype == torch.int64 and test.shape == train.shape == expected.shape[1:]
    first_labels = {"cifar10": [0, 1, 2, 1], "cifar100": [0, 1, 2]}.get(
        name, [0, 1, 9] if name == "svhn" else [0, 9, 1]
    )
    assert train.labels.tolist()[: len(first_labels)] == first_labels
    assert len(train.classes) == (3 if name.startswith("cifar") else 10)


@pytest.mark.parametrize("name", WRITERS)
def test_missing_files_are_one_line_that_tells_how(name, tmp_path):
    with pytest.raises(ValueError, match=f"data.name: {name}: .*data.download=true.*data.root") as caught:
        load(DataConfig(name=name, root=str(tmp_path)), "train")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_cut_file_of_mnist_is_one_line(tmp_path):
    write_mnist(tmp_path, "mnist")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="data.name: mnist: no intact files") as caught:
        load(DataConfig(name="mnist", root=str(tmp_path)), "train")
    assert "\n" not in str(caught.value)


def test_stored_arrays_are_resized_and_converted_too(tmp_path):
    expected = write_mnist(tmp_path, "mnist")
    small = load(DataConfig(name="mnist", root=str(tmp_path), image_size=(16, 12), channels=3), "train")
    assert small.shape == (3, 16, 12)
    oracle = np.asarray(Image.fromarray(expected[0, 0]).resize((12, 16), Image.Resampling.BILINEAR))
    assert (raw_pixels(small)[0].numpy() == oracle).all()


# --- class folders ------------------------------------------------------------------------------------------------


def test_class_folders_are_read_in_sorted_order(tmp_path):
    make_folder(tmp_path, classes=("zebra", "ant"))
    (tmp_path / "train/ant/.DS_Store").write_bytes(b"x")
    (tmp_path / "train/.hidden").mkdir()
    train = load(folder_config(tmp_path), "train")
    assert train.classes == ("ant", "zebra") and train.labels.tolist() == [0] * 4 + [1] * 4
    assert train.shape == (3, 6, 7) and train.held
    assert (raw_pixels(train)[5].permute(1, 2, 0).numpy() == picture(1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"stored": torch.rand(8, 1, 4, 4)}, "pixels are uint8 from 0 to 255, got float32; convert them"),
        ({"stored": torch.zeros(8, 4, 4, dtype=torch.uint8)}, r"C of 1 or 3, got \[8, 4, 4\]; reshape"),
        ({"stored": torch.zeros(8, 4, 4, 3, dtype=torch.uint8)}, r"C of 1 or 3, got \[8, 4, 4, 3\]; reshape"),
        ({"stored": np.zeros((8, 1, 4, 4), np.uint8)}, r"a tensor of pixels or a tuple of paths, got ndarray; give"),
        ({"labels": np.arange(8) % 2}, r"labels are a tensor, got ndarray; give torch.as_tensor\(labels\)"),
        ({"labels": [0, 1] * 4}, "labels are a tensor, got list"),
        ({"labels": torch.arange(8, dtype=torch.int32) % 2}, r"labels are int64, got int32; give labels.long\(\)"),
        ({"labels": torch.arange(7) % 2}, r"got labels \[7\] for 8 images"),
        ({"labels": torch.eye(8, dtype=torch.int64)}, r"got labels \[8, 8\] for 8 images"),
        ({"labels": torch.arange(8) % 3}, "labels are 0 to 1, for 2 classes; got 2"),
        ({"labels": torch.arange(8) % 2 - 1}, "labels are 0 to 1, for 2 classes; got -1"),
        ({"stored": torch.zeros(0, 1, 4, 4, dtype=torch.uint8), "labels": torch.zeros(0).long()}, "one image or more"),
    ],
)
def test_a_source_of_ones_own_is_checked(change, message, monkeypatch):
    whole = {"stored": torch.zeros(8, 1, 4, 4, dtype=torch.uint8), "labels": torch.arange(8) % 2}
    source = Source(**{**whole, **change}, classes=("a", "b"))
    monkeypatch.setitem(SOURCES._entries, "own", lambda config, split: source)
    if message is None:
        assert load(DataConfig(name="own"), "test").num_images == 8
        return
    with pytest.raises(ValueError, match=message) as caught:
        load(DataConfig(name="own"), "train")
    assert str(caught.value).startswith("data.name: own, train: ") and "\n" not in str(caught.value)


def test_val_stands_in_for_a_missing_test(tmp_path):
    make_folder(tmp_path)
    test = load(folder_config(tmp_path), "test")
    (tmp_path / "test").rename(tmp_path / "val")
    assert load(folder_config(tmp_path), "test").digest == test.digest


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".gif", ".ppm", ".jpg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decoding_agrees_with_pillow(suffix, channels, tmp_path):
    if (suffix, channels) in ((".webp", 1), (".gif", 3)):
        pytest.skip("the format has no such images")
    path = tmp_path / f"image{suffix}"
    Image.fromarray(picture(0, (16, 24), channels)).save(path)
    with Image.open(path) as image:
        oracle = np.asarray(image.convert("L" if channels == 1 and suffix != ".gif" else "RGB"))
    found = images.Images((str(path),), images.first_shape((str(path),))).decode(0)
    assert (found == (oracle[None] if oracle.ndim == 2 else oracle.transpose(2, 0, 1))).all()


def test_odd_images_are_brought_to_8_bit_rgb(tmp_path):
    colours = picture(0, (8, 8))
    alpha = np.dstack([colours, picture(1, (8, 8), 1)])
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    Image.fromarray(colours).quantize(4).save(tmp_path / "palette.png", transparency=bytes([0, 9, 255, 255]))
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name, oracle in (("alpha.png", colours), ("palette.png", None), ("cmyk.jpg", None)):
        path = (str(tmp_path / name),)
        assert images.first_shape(path) == (3, 8, 8)
        found = images.Images(path, (3, 8, 8)).decode(0)
        if oracle is None:
            with Image.open(path[0]) as image:
                oracle = np.asarray(image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB"))
        assert (found.transpose(1, 2, 0) == oracle).all(), name


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_photographs_are_turned_upright(suffix, tmp_path):
    image = Image.fromarray(np.kron(picture(0, (2, 3)), np.ones((8, 8, 1), dtype=np.uint8)))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise for viewing
    path = str(tmp_path / f"photo{suffix}")
    image.save(path, exif=exif, **({"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}))
    assert images.first_shape((path,)) == (3, 24, 16)
    found = images.Images((path,), (3, 24, 16)).decode(0).transpose(1, 2, 0)
    assert np.abs(found.astype(int) - np.rot90(np.asarray(image), -1)).max() <= (8 if suffix == ".jpg" else 0)


def test_resizing_is_pillows_bilinear_of_the_stored_image(tmp_path):
    make_folder(tmp_path, size=(20, 30))
    Image.fromarray(picture(9, (50, 40))).save(tmp_path / "train/ant/9.png")
    Image.fromarray(picture(9, (50, 40), 1)).save(tmp_path / "train/ant/99.png")
    train = load(folder_config(tmp_path, image_size=16, channels=3), "train")
    assert train.shape == (3, 16, 16)
    for row, pixels in ((0, picture(0, (20, 30))), (4, picture(9, (50, 40))), (5, picture(9, (50, 40), 1))):
        oracle = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR).convert("RGB"))
        assert (raw_pixels(train)[row].permute(1, 2, 0).numpy() == oracle).all()


def test_colour_becomes_grey_on_request(tmp_path):
    make_folder(tmp_path)
    grey = load(folder_config(tmp_path, channels=1), "train")
    red, green, blue = picture(0).astype(float).transpose(2, 0, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    assert grey.shape == (1, 6, 7) and np.abs(raw_pixels(grey)[0, 0].numpy() - luma).max() <= 0.51


def break_size(root):
    Image.fromarray(picture(0, (9, 9))).save(root / "train/bee/1.png")


def break_kind(root):
    Image.fromarray(picture(0, (6, 7), 1)).save(root / "train/bee/1.png")


def break_text(root):
    (root / "train/bee/1.png").write_text("no image")


def break_end(root):
    path = root / "train/bee/1.png"
    path.write_bytes(path.read_bytes()[:-40])


def break_depth(root):
    Image.fromarray(picture(0, (6, 7), 1).astype(np.uint16) * 256).save(root / "train/bee/1.png")


def break_link(root):
    (root / "train/bee/1.png").unlink()
    (root / "train/bee/1.png").symlink_to(root / "nowhere.png")


BREAKS = [
    (break_size, r"bee/1.png: 9x9 pixels .* 6x7; set data.image_size", False),
    (break_kind, r"bee/1.png: is grey, .* set data.channels", False),
    (break_text, r"bee/1.png: cannot be read as an image \(.*data.unreadable=skip", True),
    (break_end, r"bee/1.png: cannot be read as an image \(.*data.unreadable=skip", True),
    (break_depth, r"bee/1.png: cannot be read as an image \(.*more than 8 bits", True),
    (break_link, r"bee/1.png: cannot be read as an image \(", True),
]


@pytest.mark.parametrize(("breaks", "message", "skippable"), BREAKS, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("held", [True, False])
def test_a_bad_file_is_named(breaks, message, skippable, held, tmp_path, monkeypatch):
    make_folder(tmp_path, num=6)
    breaks(tmp_path)
    # 12 images of 126 bytes; a limit of 1 MiB holds them.
    config = folder_config(tmp_path, memory_limit_mb=1, workers=0)
    if not held:
        monkeypatch.setattr(data.math, "prod", lambda shape: 2**20)
    with pytest.raises(ValueError, match=message) as caught:
        list(load(config, "train").batches(4))
    assert "\n" not in str(caught.value)
    skip = config.model_copy(update={"unreadable": "skip"})
    if not skippable:
        with pytest.raises(ValueError, match=message):
            load(skip, "train")
        return
    with pytest.warns(UserWarning, match=r"1 unreadable images were skipped: .*bee/1.png$"):
        train = load(skip, "train")
    assert train.held == held and train.labels.tolist() == [0] * 6 + [1] * 5
    assert (raw_pixels(train)[7].permute(1, 2, 0).numpy() == picture(1002)).all()


def test_a_class_without_a_readable_image_is_an_error(tmp_path):
    make_folder(tmp_path, num=1)
    (tmp_path / "train/bee/0.png").write_text("no image")
    with pytest.raises(ValueError, match="no readable image is left in class 'bee'"):
        load(folder_config(tmp_path, unreadable="skip"), "train")


LAYOUTS = {
    "no root": (lambda root: os.rename(root, f"{root}-away"), "data.root: no such folder"),
    "no train": (lambda root: os.rename(root / "train", root / "training"), "has no folder train/"),
    "no test": (lambda root: os.rename(root / "test", root / "testing"), r"has no folder test/ \(or val/\)"),
    "other classes": (lambda root: os.rename(root / "test/bee", root / "test/wasp"), "'bee' is in train/ and not in"),
    "empty class": (lambda root: (root / "train/bee/0.png").unlink(), "train/bee: the class folder is empty"),
    "empty class of the other split": (
        lambda root: [path.unlink() for path in (root / "test/bee").iterdir()],
        "test/bee: the class folder is empty",
    ),
    "loose image": (lambda root: os.rename(root / "train/bee/0.png", root / "train/0.png"), "outside the class"),
    "nested": (lambda root: (root / "train/bee/more").mkdir(), "bee/more: a folder inside a class folder"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_layout_is_one_line_with_the_fix(layout, tmp_path):
    change, message = LAYOUTS[layout]
    root = make_folder(tmp_path / "mine", num=1)
    change(root)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder_config(root), "train")
    assert "\n" not in str(caught.value)


def test_one_class_is_not_enough(tmp_path):
    make_folder(tmp_path, classes=("ant",))
    with pytest.raises(ValueError, match="two or more class folders, got 1"):
        load(folder_config(tmp_path), "train")


def test_a_subset_decodes_the_chosen_files_only(tmp_path, monkeypatch):
    make_folder(tmp_path, num=10)
    opened = []
    read = images._read
    monkeypatch.setattr(images, "_read", lambda path: opened.append(path) or read(path))
    assert load(folder_config(tmp_path, subset=4), "train").num_images == 4
    assert len(set(opened)) == len(opened) == 4


def test_the_test_split_reuses_the_training_sets_statistics(tmp_path, monkeypatch):
    make_folder(tmp_path)
    train = load(folder_config(tmp_path), "train")
    opened = []
    read = images._read
    monkeypatch.setattr(images, "_read", lambda path: opened.append(path) or read(path))
    test = load(folder_config(tmp_path), "test")
    assert test.mean == train.mean and all("/test/" in path for path in opened)
    Image.fromarray(np.zeros((6, 7, 3), dtype=np.uint8)).save(tmp_path / "train/ant/0.png")
    assert load(folder_config(tmp_path), "test").mean != train.mean


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cifar"}, "did you mean 'cifar10'"),
        ({"name": "digits", "root": "x"}, "data.root: has no effect on digits"),
        ({"name": "digits", "download": True}, "data.download: has no effect"),
        ({"name": "image_folder"}, "data.root: required for image_folder"),
        ({"name": "mnist", "unreadable": "skip"}, "data.unreadable: concerns files of image_folder"),
        ({"name": "digits", "channels": 2}, "data.channels"),
        ({"name": "digits", "image_size": 0}, "data.image_size"),
        ({"name": "digits", "workers": -1}, "data.workers"),
        ({"name": "digits", "subsets": 3}, "did you mean 'subset'"),
        ({}, "data.name: required"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(DataConfig, settings, where="data")
    assert "\n" not in str(caught.value)


def test_only_train_and_test_are_splits():
    with pytest.raises(ValueError, match="split: 'train' or 'test', got 'validation'"):
        load(DataConfig(name="digits"), "validation")


# --- image sets ---------------------------------------------------------------------------------------------------

AUGMENT = AugmentConfig(crop_padding=2, flip=True, cutout=3)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_set_that_is_not_held_gives_the_same(workers, tmp_path, monkeypatch):
    make_folder(tmp_path, num=9)
    held = load(folder_config(tmp_path), "train")
    before = torch.get_rng_state()
    monkeypatch.setattr(data.math, "prod", lambda shape: 2**30)
    lazy = load(folder_config(tmp_path, workers=workers), "train")
    assert held.held and not lazy.held
    assert (lazy.mean, lazy.std, lazy.digest, lazy.shape) == (held.mean, held.std, held.digest, held.shape)
    chosen = torch.tensor([3, 17, 1, 8, 8, 0])
    for one, other in ((held, lazy), (held.subset(chosen), lazy.subset(chosen))):
        pairs = zip(
            one.batches(4, seed=5, epoch=2, augment=AUGMENT),
            other.batches(4, seed=5, epoch=2, augment=AUGMENT),
            strict=True,
        )
        for (a, labels_a), (b, labels_b) in pairs:
            assert torch.equal(a, b) and torch.equal(labels_a, labels_b)
    assert torch.equal(before, torch.get_rng_state())


def test_a_damaged_file_met_in_a_worker_is_one_line(tmp_path, monkeypatch):
    make_folder(tmp_path, num=3)
    monkeypatch.setattr(data.math, "prod", lambda shape: 2**30)
    lazy = load(folder_config(tmp_path, workers=0), "train")
    (tmp_path / "train/bee/1.png").write_text("gone wrong later")
    with pytest.raises(ValueError, match=r"bee/1.png: cannot be read") as caught:
        list(lazy.batches(2))
    assert "\n" not in str(caught.value)


def test_statistics_of_a_large_unheld_set_come_from_evenly_spaced_images(tmp_path, monkeypatch):
    make_folder(tmp_path, num=10)
    everything = raw_pixels(load(folder_config(tmp_path), "train")).double() / 255
    monkeypatch.setattr(data.math, "prod", lambda shape: 2**30)
    monkeypatch.setattr(data, "STATISTICS_SAMPLE", 6)
    monkeypatch.setattr(data, "_STATISTICS", {})
    lazy = load(folder_config(tmp_path, workers=0), "train")
    sample = everything[[0, 3, 6, 10, 13, 16]]
    assert lazy.mean == pytest.approx(sample.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert lazy.std == pytest.approx(sample.transpose(0, 1).flatten(1).std(1, correction=0).tolist(), rel=1e-12)


def test_a_constant_channel_is_divided_by_one(tmp_path):
    make_folder(tmp_path)
    for path in tmp_path.glob("*/*/*.png"):
        Image.fromarray(np.full((6, 7), 51, dtype=np.uint8)).save(path)
    train = load(folder_config(tmp_path), "train")
    assert train.mean == pytest.approx((0.2,)) and train.std == (1.0,)
    assert next(iter(train.batches(4)))[0].abs().max() < 1e-6


def test_batches_cover_every_image_once_in_an_order_of_seed_and_epoch(digits):
    test = digits[1]
    orders = {}
    for key in ((0, 0), (0, 1), (1, 0)):
        batches = list(test.batches(100, seed=key[0], epoch=key[1]))
        assert [len(labels) for _, labels in batches] == [100, 100, 100, 59]
        orders[key] = torch.cat([labels for _, labels in batches])
        assert torch.equal(orders[key].bincount(), test.labels.bincount())
        assert torch.equal(orders[key], torch.cat([y for _, y in test.batches(7, seed=key[0], epoch=key[1])]))
    assert len({tuple(order.tolist()) for order in orders.values()}) == 3
    assert [len(labels) for _, labels in test.batches(100, seed=0, drop_last=True)] == [100, 100, 100]
    in_order = list(test.batches(100, augment=AUGMENT))
    assert torch.equal(torch.cat([labels for _, labels in in_order]), test.labels)
    assert torch.equal(in_order[0][0], next(iter(test.batches(100)))[0])


def test_the_batch_size_does_not_change_what_happens_to_an_image(digits):
    train = digits[0]
    whole, parts = (
        torch.cat([images_ for images_, _ in train.batches(size, seed=1, augment=AUGMENT)]) for size in (1438, 100)
    )
    assert torch.equal(whole, parts)


def test_subsets_of_subsets(digits):
    test = digits[1]
    part = test.subset([5, 3, 200, 100]).subset(torch.tensor([2, 0]))
    assert part.labels.tolist() == test.labels[[200, 5]].tolist() and part.num_images == len(part) == 2
    assert torch.equal(raw_pixels(part), raw_pixels(test)[[200, 5]])
    assert (part.mean, part.classes, part.shape) == (test.mean, test.classes, test.shape)
    assert part.digest != test.digest


@pytest.mark.parametrize(
    ("indices", "message"), [([], "got none"), ([359], "must be 0..358, got 359"), ([-1], "got -1")]
)
def test_subset_indices_are_checked(indices, message, digits):
    with pytest.raises(ValueError, match=message):
        digits[1].subset(indices)


def test_digest_tells_pixels_labels_and_order(tmp_path):
    make_folder(tmp_path)
    train = load(folder_config(tmp_path), "train")
    digests = {train.digest, train.subset([1, 0, *range(2, 8)]).digest, train.subset(range(7)).digest}
    Image.fromarray(picture(77)).save(tmp_path / "train/ant/0.png")
    digests.add(load(folder_config(tmp_path), "train").digest)
    (tmp_path / "train/ant/3.png").rename(tmp_path / "train/bee/-.png")  # the same pixels in order, one label other
    digests.add(load(folder_config(tmp_path), "train").digest)
    assert len(digests) == 5
    assert train.digest == train.subset(range(8)).digest


@pytest.mark.parametrize(("size", "drop_last"), [(0, False), (-1, False), (400, True)])
def test_batch_size_is_checked(size, drop_last, digits):
    with pytest.raises(ValueError, match=r"batch_size: .* got"):
        digits[1].batches(size, drop_last=drop_last)


# --- augmentation -------------------------------------------------------------------------------------------------


def naive(pixels: np.ndarray, draws: list[float], augment: AugmentConfig, mean, std) -> np.ndarray:
    """Augment and normalise one image [C, H, W] with plain loops."""
    channels, height, width = pixels.shape
    pad = augment.crop_padding
    top, left = int(draws[0] * (2 * pad + 1)) - pad, int(draws[1] * (2 * pad + 1)) - pad
    row, column = int(draws[3] * height), int(draws[4] * width)
    half, side = augment.cutout // 2, augment.cutout
    out = np.zeros((channels, height, width))
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                source_y = y + top
                source_x = (width - 1 - x if augment.flip and draws[2] < 0.5 else x) + left
                inside = 0 <= source_y < height and 0 <= source_x < width
                value = pixels[c, source_y, source_x] if inside else 0
                out[c, y, x] = (value / 255 - mean[c]) / std[c]
                if row - half <= y < row - half + side and column - half <= x < column - half + side:
                    out[c, y, x] = 0.0
    return out


@pytest.mark.parametrize(
    "augment",
    [
        AUGMENT,
        AugmentConfig(crop_padding=5),
        AugmentConfig(flip=True),
        AugmentConfig(cutout=4),
        AugmentConfig(cutout=1, flip=True),
    ],
    ids=str,
)
def test_augmentation_agrees_with_a_loop_over_samples(augment, tmp_path):
    make_folder(tmp_path, num=12)
    train = load(folder_config(tmp_path), "train")
    stream = data.rng.generator(8, "batches", 3)
    order = torch.randperm(24, generator=stream)
    draws = torch.rand(24, 5, generator=stream, dtype=torch.float64).tolist()
    raw = raw_pixels(train).numpy()
    place = 0
    for batch, labels in train.batches(10, seed=8, epoch=3, augment=augment):
        assert batch.dtype == torch.float32 and batch.is_contiguous()
        for image, label in zip(batch, labels, strict=True):
            expected = naive(raw[order[place]], draws[place], augment, train.mean, train.std)
            np.testing.assert_allclose(image.numpy(), expected, atol=2e-6)
            assert label == train.labels[order[place]]
            place += 1
    assert place == 24


def test_crops_flips_and_cutouts_are_uniform(tmp_path):
    # One bright pixel in the middle tells the crop and the flip; 8,000 epochs of one image.
    pixels = torch.zeros(1, 1, 5, 6, dtype=torch.uint8)
    pixels[..., 2, 2] = 255
    one = data.ImageSet(images.Images(pixels, (1, 5, 6)), pixels, labels=torch.zeros(1).long(), classes=("a", "b"))
    many = one.subset(torch.zeros(8000, dtype=torch.int64))
    batch = torch.cat([b for b, _ in many.batches(1000, seed=1, augment=AugmentConfig(crop_padding=1, flip=True))])
    spots, counts = batch.flatten(1).argmax(1).unique(return_counts=True)
    # Rows 1..3, and columns 1..3 or, mirrored, 2..4: 3 x 4 spots, the two outer columns half as likely as the inner.
    assert len(spots) == 12
    share = torch.where((spots % 6 == 1) | (spots % 6 == 4), 1 / 18, 1 / 9)
    # 12 binomial counts within 5.7 standard deviations: false alarms 12 x 1.2e-8 by the normal tail.
    assert ((counts - 8000 * share).abs() < 5.7 * (8000 * share * (1 - share)).sqrt()).all()
    batch = torch.cat([b for b, _ in many.batches(1000, seed=2, augment=AugmentConfig(cutout=1))])
    spots, counts = (batch == 0).flatten(1).float().argmax(1).unique(return_counts=True)
    assert len(spots) == 30 and ((counts - 8000 / 30).abs() < 5.9 * (8000 / 30 * 29 / 30) ** 0.5).all()


@pytest.mark.parametrize("name", ["crop_padding", "cutout"])
def test_augmentation_that_leaves_nothing_is_refused(name, digits):
    with pytest.raises(
        ValueError, match=f"augment.{name}: must be less than the image's shorter side, 8 pixels, got 8"
    ):
        digits[0].batches(10, seed=0, augment=AugmentConfig(**{name: 8}))
    with pytest.raises(ValueError, match=name):
        parse(AugmentConfig, {name: -1})


class Copies(TorchDispatchMode):
    """Counts what is copied from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = next((a for a in args if isinstance(a, torch.Tensor)), None)
        self.seen += isinstance(out, torch.Tensor) and given is not None and given.device != out.device
        return out


@pytest.mark.parametrize("augment", [AUGMENT, None])
@pytest.mark.parametrize("part", [None, range(0, 320, 2)])
def test_what_a_pass_needs_is_copied_to_a_device_at_once(augment, part, digits):
    images = digits[0] if part is None else digits[0].subset(part)
    found = set()
    for batch_size in (80, 20):
        with Copies() as copies:
            batches = list(images.to("meta").batches(batch_size, seed=1, augment=augment))
        assert all(x.is_meta and y.is_meta and len(x) == len(y) for x, y in batches)
        found.add(copies.seen)
    assert len(found) == 1 and found.pop() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_do_not_wait_for_it(digits):
    batches = digits[0].to("cuda").batches(64, seed=1, augment=AUGMENT)
    next(batches)
    with never_waits():
        assert len(list(batches)) > 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_on_the_cpu(digits):
    train = digits[0]
    on_gpu = train.to("cuda")
    assert on_gpu.to("cuda:0") is on_gpu
    for one, other in ((train, on_gpu), (train.subset(range(99)), on_gpu.subset(range(99)))):
        pairs = zip(one.batches(64, seed=1, augment=AUGMENT), other.batches(64, seed=1, augment=AUGMENT), strict=True)
        for (a, labels_a), (b, labels_b) in pairs:
            assert b.is_cuda and torch.equal(labels_a, labels_b.cpu())
            torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)
    assert on_gpu.digest == train.digest


# --- real images --------------------------------------------------------------------------------------------------


@real_folders
def test_real_cifar10_folders():
    train = load(folder_config(Path(FOLDERS), subset=300), "train")
    assert train.shape == (3, 32, 32) and train.num_classes == 10 and torch.bincount(train.labels).tolist() == [30] * 10
    # CIFAR-10's known mean and std; 300 images are off by some hundredths.
    assert train.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.04)
    assert train.std == pytest.approx((0.247, 0.243, 0.262), abs=0.03)


@real_folders
@pytest.mark.slow
def test_all_real_cifar10_images():
    train, test = (load(folder_config(Path(FOLDERS)), split) for split in ("train", "test"))
    assert (train.num_images, test.num_images) == (50_000, 10_000)
    assert train.mean == test.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)
    assert train.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=3e-3)


def test_names_that_are_no_utf8_are_read(tmp_path):
    """Old zip archives leave such names."""
    for split in ("train", "test"):
        for name, colour in (("ant", 10), ("zebra", 200)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (6, 6), (colour, 0, 0)).save(folder / "a.png")
            os.rename(folder / "a.png", os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    read = data.load(data.DataConfig(name="image_folder", root=str(tmp_path)), "train")
    assert read.num_images == 2
