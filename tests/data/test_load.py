"""Data sets from files, by name or by path."""

import contextlib
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iresnet_fast.data import ImageSplit, MissingDataError, load, load_arrays, load_cifar, load_digits
from iresnet_fast.data.augment import augment
from tests.data.test_mnist import REAL
from tests.helpers import write_mnist

CIFAR_JPEG = REAL.parent / "cifar10_jpeg75"


def pixels(seed, count, shape):
    return np.random.default_rng(seed).integers(256, size=(count, *shape), dtype=np.uint8)


def write_cifar10(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        content = {b"data": pixels(index, count, (3072,)), b"labels": [index % 3] * count, b"batch_label": b"of it"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog", b"owl"]}, protocol=2))


def write_cifar100(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(("train", "test")):
        content = {b"data": pixels(index, 3, (3072,)), b"fine_labels": [99, 0, 5], b"coarse_labels": [1, 1, 1]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_folders(folder, sizes=((5, 7),), colour=True, test="test"):
    for part, count in (("train", 3), (test, 2)):
        for name in ("b", "a"):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                height, width = sizes[index % len(sizes)]
                shape = (height, width, 3) if colour else (height, width)
                Image.fromarray(pixels(index, 1, shape)[0]).save(folder / part / name / f"{index}.png")


def write_parquet(folder, image="image", label="label"):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 3), ("test", 2)):
        entries = []
        for index in range(count):
            stored = io.BytesIO()
            Image.fromarray(pixels(index, 1, (4, 4, 3))[0]).save(stored, "PNG")
            entries.append({"bytes": stored.getvalue(), "path": None})
        table = arrow.table({image: entries, label: list(range(count))})
        parquet.write_table(table, folder / f"{part}-00000-of-00001.parquet")


def write_arrays(path, shape=(6, 6), **changes):
    arrays = {
        "train_images": pixels(0, 4, shape),
        "train_labels": np.arange(4),
        "test_images": pixels(1, 2, shape),
        "test_labels": np.arange(2, dtype=np.uint8),
        **changes,
    }
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


def test_cifar10(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    for place in (tmp_path, tmp_path / "cifar-10-batches-py"):
        found = load("cifar10", place)
        assert found.train_images.shape == (20, 3, 32, 32)
        assert found.class_names == ("cat", "dog", "owl")
        assert found.n_classes == 3
    assert torch.equal(found.test_images, torch.from_numpy(pixels(5, 4, (3, 32, 32))))
    assert found.train_labels.tolist()[::4] == [0, 1, 2, 0, 1]
    assert torch.equal(load(tmp_path).train_images, found.train_images)


def test_cifar100_has_its_fine_classes(tmp_path):
    write_cifar100(tmp_path / "cifar-100-python")
    found = load("cifar100", tmp_path)
    assert found.train_labels.tolist() == [99, 0, 5]
    assert found.n_classes == 100


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    """Nothing in it is executed."""
    write_cifar10(tmp_path)
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    for content in ({b"data": Trap(), b"labels": []}, Trap()):
        (tmp_path / "data_batch_3").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"it asks for (posix|nt).mkdir, which a set of images does not need"):
            load_cifar("cifar10", tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize("array", [np.array([{}, 1]), np.zeros((2, 3072)), np.zeros((2, 3072), ">u2")])
def test_arrays_of_anything_but_bytes_are_refused(tmp_path, array):
    """NumPy's own types would take pointers from the file."""
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": array, b"labels": [0, 0]}, protocol=2))
    with pytest.raises(ValueError, match="its arrays are (of type|not plain)"):
        load_cifar("cifar10", tmp_path)


def test_damaged_bytes_are_an_error_and_no_crash(tmp_path):
    write_cifar10(tmp_path, count=1)
    path = tmp_path / "data_batch_1"
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.integers(250)] = draw.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            load_cifar("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"no pickle", "cannot be read"),
        (pickle.dumps([1, 2]), "holds a list, not a dict"),
        (pickle.dumps({b"data": [1], b"labels": [1]}), "no images and labels of CIFAR's kind"),
        (pickle.dumps({b"data": pixels(0, 2, (3072,)), b"labels": [1]}), r"shape \(2, 3072\) and 1 labels"),
    ],
)
def test_damaged_cifar(tmp_path, content, message):
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_cifar("cifar10", tmp_path)
    (tmp_path / "test_batch").unlink()
    with pytest.raises(MissingDataError, match="test_batch is not there"):
        load_cifar("cifar10", tmp_path)


@pytest.mark.parametrize("test", ["test", "val"])
@pytest.mark.parametrize("colour", [False, True])
def test_image_folders(tmp_path, test, colour):
    write_folders(tmp_path, colour=colour, test=test)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    found = load(tmp_path)
    assert found.train_images.shape == (6, 3 if colour else 1, 5, 7)
    assert found.class_names == ("a", "b")
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.from_numpy(pixels(1, 1, (5, 7, 3) if colour else (5, 7))[0])
    assert torch.equal(found.train_images[1], expected.permute(2, 0, 1) if colour else expected[None])


def test_bad_image_folders(tmp_path):
    write_folders(tmp_path / "sizes", sizes=((5, 7), (6, 7)))
    with pytest.raises(ValueError, match=r"images have 2 sizes, from \(5, 7\) to \(6, 7\). Remedy: scale them"):
        load(tmp_path / "sizes")
    write_folders(tmp_path / "more")
    (tmp_path / "more" / "test" / "c").mkdir()
    with pytest.raises(ValueError, match="classes that the training images have not: c"):
        load(tmp_path / "more")
    write_folders(tmp_path / "damaged")
    (tmp_path / "damaged" / "train" / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0.png cannot be read"):
        load(tmp_path / "damaged")
    write_folders(tmp_path / "deep")
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(tmp_path / "deep" / "train" / "a" / "0.png")
    with pytest.raises(ValueError, match=r"more than 8 bits \(mode I;16\). Remedy: convert"):
        load(tmp_path / "deep")
    write_folders(tmp_path / "hidden")
    (tmp_path / "hidden" / "train" / ".ipynb_checkpoints").mkdir()
    assert load(tmp_path / "hidden").class_names == ("a", "b")
    (tmp_path / "hidden" / "train" / "none").mkdir()
    with pytest.raises(ValueError, match="classes without an image: none"):
        load(tmp_path / "hidden")
    for part in ("train", "test"):
        (tmp_path / "empty" / part).mkdir(parents=True)
    with pytest.raises(ValueError, match="has no images in folders of their classes"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")])
@pytest.mark.parametrize("below", ["", "data"])
def test_parquet(tmp_path, columns, below):
    write_parquet(tmp_path / below, *columns)
    found = load(tmp_path)
    assert found.train_images.shape == (3, 3, 4, 4)
    assert torch.equal(found.train_images[2], torch.from_numpy(pixels(2, 1, (4, 4, 3))[0]).permute(2, 0, 1))
    assert found.test_labels.tolist() == [0, 1]


def test_bad_parquet(tmp_path):
    write_parquet(tmp_path, label="kind")
    with pytest.raises(ValueError, match="has the columns image, kind; one of image, img and one of label"):
        load(tmp_path)
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "expected"), [((6, 6), (1, 6, 6)), ((3, 6, 5), (3, 6, 5)), ((6, 5, 3), (3, 6, 5)), ((6, 5, 1), (1, 6, 5))]
)
def test_arrays(tmp_path, shape, expected):
    write_arrays(tmp_path / "set.npz", shape)
    found = load(tmp_path / "set.npz")
    assert found.train_images.shape[1:] == expected
    assert found.test_labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "lacks test_labels"),
        ({"train_images": np.zeros((4, 6, 6))}, r"images of shape \(4, 6, 6\) and type float64; uint8"),
        ({"train_labels": np.zeros(4)}, "train labels of float64; integers are needed"),
        ({"test_labels": np.array([0, -1])}, "test labels must not be negative, got -1, as of hidden labels"),
        ({"train_labels": np.zeros(3, int)}, r"labels \(N,\) of int64, got \(4, 1, 6, 6\) and \(3,\)"),
        ({"train_labels": np.array([{}, 1, 2, 3], dtype=object)}, "cannot be read: .*allow_pickle=False"),
        ({"test_images": pixels(0, 2, (5, 6))}, r"training images are \(1, 6, 6\), test images \(1, 5, 6\)"),
    ],
)
def test_bad_arrays(tmp_path, changes, message):
    write_arrays(tmp_path / "set.npz", **changes)
    with pytest.raises(ValueError, match=message):
        load_arrays(tmp_path / "set.npz")


def test_damaged_arrays(tmp_path):
    write_arrays(tmp_path / "set.npz")
    path = tmp_path / "set.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read"):
        load_arrays(path)
    with pytest.raises(MissingDataError, match="the file of arrays is not there"):
        load(tmp_path / "other.npz")


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(
        MissingDataError, match="(?s)'mnits', which is none of digits, mnist, cifar10, cifar100, is not"
    ):
        load("mnits")
    with pytest.raises(
        MissingDataError, match="(?s)a set of images in .*train-images-idx3.*data_batch_1.*parquet.*train"
    ):
        load(tmp_path)
    monkeypatch.setenv("IRESNET_FAST_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(MissingDataError, match="elsewhere/train-images"):
        load("mnist")
    monkeypatch.delenv("IRESNET_FAST_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingDataError, match="data/MNIST/raw/train-images"):
        load("mnist")
    write_mnist(tmp_path / "data")
    assert len(load("mnist").train_images) == 5
    with pytest.raises(ValueError, match="name must be one of 'cifar10', 'cifar100', got 'cifar'"):
        load_cifar("cifar", tmp_path)


def test_a_named_set_is_never_another_one(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    with pytest.raises(MissingDataError, match="cifar-100-python"):
        load("cifar100", tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    for source in (("cifar10", tmp_path), (tmp_path,)):
        with pytest.raises(MissingDataError, match="cifar-10-batches-py's data_batch_4 is not there"):
            load(*source)
    write_parquet(tmp_path / "hub")
    assert len(load("cifar10", tmp_path / "hub").train_images) == 3


def test_digits_by_name():
    assert torch.equal(load("digits").train_images, load_digits().train_images)


def test_splits_are_checked():
    images, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"train images must be \(N, C, H, W\)"):
        ImageSplit(images[0], labels, images, labels)
    with pytest.raises(ValueError, match="labels .* of torch.float32"):
        ImageSplit(images, labels, images, labels.float())


def test_augmentation_moves_and_mirrors():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    images = image.expand(400, 1, 5, 5)
    found = augment(images, shift=2, flip=True, generator=torch.Generator().manual_seed(0))
    assert found.dtype == torch.uint8
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    possible = {
        tuple(window.flatten().tolist())
        for y in range(5)
        for x in range(5)
        for part in (padded[..., y : y + 5, x : x + 5],)
        for window in (part, part.flip(3))
    }
    drawn = {tuple(one.flatten().tolist()) for one in found}
    assert drawn == possible
    again = augment(images, shift=2, flip=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, again)
    assert torch.equal(augment(images), images)
    with pytest.raises(ValueError, match=r"shift must be from 0 to less than the image's \(5, 5\), got 5"):
        augment(images, shift=5)


@pytest.mark.full
@pytest.mark.skipif(not CIFAR_JPEG.is_dir(), reason="CIFAR-10 (JPEG) is not beside the checkout")
def test_the_real_parquet():
    found = load(Path(CIFAR_JPEG))
    assert found.train_images.shape == (50_000, 3, 32, 32)
    assert found.test_labels.bincount().tolist() == [1000] * 10
