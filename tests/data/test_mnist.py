"""IDX files, and MNIST made of them."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from iresnet_fast.data import load_mnist, read_idx
from tests.helpers import idx, write_mnist

REAL = Path(__file__).parents[3] / "shared" / "data" / "mnist"


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.arange(24, dtype=np.uint8).reshape(2, 3, 4), 0x08),
        (np.array([-3, 4], dtype=np.int8), 0x09),
        (np.array([-3, 400], dtype=">i2"), 0x0B),
        (np.array([[-3, 70_000]], dtype=">i4"), 0x0C),
        (np.array([0.5, -2.25], dtype=">f4"), 0x0D),
        (np.array([0.1, -2.25], dtype=">f8"), 0x0E),
        (np.zeros((0, 3), dtype=np.uint8), 0x08),
    ],
)
def test_every_type_of_number(tmp_path, array, code):
    path = tmp_path / "numbers"
    path.write_bytes(idx(array, code))
    found = read_idx(path)
    assert found.shape == array.shape
    assert found.tolist() == array.tolist()


@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("compress", [False, True])
def test_where_it_may_lie(tmp_path, below, compress):
    write_mnist(tmp_path / below, compress)
    found = load_mnist(tmp_path)
    assert found.train_images.shape == (5, 1, 28, 28)
    assert found.test_images.dtype == torch.uint8
    assert found.test_labels.dtype == torch.int64
    assert found.n_levels == 256


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)train-images-idx3-ubyte is not there. Looked for.*MNIST/raw"):
        load_mnist(tmp_path)
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "is not complete: 3935 bytes of 3936"),
        (whole[:9], "is not complete"),
        (whole + b"0", "is not complete: 3937 bytes of 3936"),
        (b"", "is no IDX file: it starts with nothing"),
        (b"PK\3\4" + whole, "is no IDX file: it starts with 50 4b 03 04"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_mnist(tmp_path)
    path.unlink()
    zipped = path.with_suffix(".gz")
    for content in (gzip.compress(whole)[:-20], b"no gzip at all"):
        zipped.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be decompressed.* Remedy: fetch it again"):
            load_mnist(tmp_path)
    zipped.unlink()
    path.write_bytes(idx(np.zeros((4, 28, 28), dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"images of shape \(4, 28, 28\), torch.uint8, and labels of shape \(5,\)"):
        load_mnist(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="MNIST is not beside the checkout")
def test_the_real_one():
    found = load_mnist(REAL)
    assert found.train_images.shape == (60_000, 1, 28, 28)
    assert found.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    content = idx(found.train_images.squeeze(1).numpy())
    # Of the uncompressed file of training images.
    assert hashlib.md5(content, usedforsecurity=False).hexdigest() == "6bbc9ace898e44ae57da46a324031adb"
    assert len(found.test_labels) == 10_000
