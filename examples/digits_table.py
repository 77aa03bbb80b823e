"""Real digits as a table that ``iresnet-fast encode`` takes.

    python examples/digits_table.py digits.parquet

writes the 1797 images of scikit-learn's digits, scaled as classifiers take them, with an id each.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from iresnet_fast.data import centered, load_digits


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    data = load_digits()
    images = centered(torch.cat([data.train_images, data.test_images]), data.n_levels)
    ids = [f"digit {number}" for number in range(len(images))]
    pq.write_table(pa.table({"id": ids, "x": pa.FixedShapeTensorArray.from_numpy_ndarray(images.numpy())}), out)
    print(f"{len(images)} images of {tuple(images.shape[1:])} in {out}")


if __name__ == "__main__":
    main()
