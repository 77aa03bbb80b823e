"""Files of samples: every kind gives any range of rows, and one that is damaged says so."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save_file

from iresnet_fast.scale.ids import check_ids
from iresnet_fast.scale.inputs import InputError, describe, find, read
from tests.scale.conftest import table

VALUES = np.random.default_rng(0).normal(size=(100, 2, 3)).astype(np.float32)
IDS = np.arange(100)[::-1].copy()


def write(folder, kind):
    path = folder / f"a{kind}"
    if kind == ".parquet":
        pq.write_table(table(IDS, torch.from_numpy(VALUES)), path, row_group_size=30)
    elif kind == ".npy":
        np.save(path, VALUES)
    elif kind == ".npz":
        np.savez_compressed(path, z=VALUES, id=IDS)
    else:
        save_file({"z": VALUES, "id": IDS}, path)
    return path


@pytest.mark.parametrize("kind", [".parquet", ".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("ranges", [[(0, 100)], [(0, 7), (7, 40), (61, 62), (90, 100)], [(95, 100)], []], ids=str)
def test_any_ranges_of_rows(tmp_path, kind, ranges):
    file = describe(str(write(tmp_path, kind)), "z")
    assert (file.n_rows, file.has_ids, file.group_rows) == (
        100,
        kind != ".npy",
        {".parquet": 30, ".npz": 100}.get(kind, 1),
    )
    found = list(read(file, "z", ranges))
    assert len(found) == len(ranges)
    for (start, stop), part in zip(ranges, found, strict=True):
        np.testing.assert_array_equal(part.column("z").combine_chunks().to_numpy_ndarray(), VALUES[start:stop])
        if file.has_ids:
            assert part.column("id").to_pylist() == IDS[start:stop].tolist()


@pytest.mark.parametrize("kind", [".parquet", ".npy", ".npz", ".safetensors"])
def test_a_file_that_is_cut_off(tmp_path, kind):
    path = write(tmp_path, kind)
    file = describe(str(path), "z")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"a{kind} cannot be read"):
        describe(str(path), "z")
    with pytest.raises(InputError, match=f"a{kind} cannot be read"):
        list(read(file, "z", [(0, 50), (50, 100)]))


def test_a_file_that_lost_rows(tmp_path):
    path = write(tmp_path, ".npy")
    file = describe(str(path), "z")
    np.save(path, VALUES[:60])
    tables = read(file, "z", [(0, 50), (50, 100)])
    assert next(tables).num_rows == 50
    with pytest.raises(InputError, match="rows 50 to 100 are not all there; it had 100"):
        next(tables)


def test_files_without_rows(tmp_path):
    np.save(tmp_path / "a.npy", VALUES[:0])
    pq.write_table(table(IDS[:1], torch.from_numpy(VALUES[:1])).slice(0, 0), tmp_path / "b.parquet")
    for name in ("a.npy", "b.parquet"):
        file = describe(str(tmp_path / name), "z")
        assert file.n_rows == 0
        assert list(read(file, "z", [])) == []


def test_what_is_wrong_with_files_is_said(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"there is no file .*\*\.npy"):
        find([str(tmp_path / "*.npy")])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"a.txt is none of the kinds that are read: \.parquet, \.npy"):
        find([str(tmp_path / "*")])
    path = write(tmp_path, ".parquet")
    with pytest.raises(InputError, match="has id, z, and none is 'x'. Remedy: --column"):
        describe(str(path), "x")
    np.save(tmp_path / "o.npy", np.array([None, "x"]), allow_pickle=True)
    with pytest.raises(InputError, match="Python objects, which are not loaded"):
        describe(str(tmp_path / "o.npy"), "z")
    np.save(tmp_path / "f.npy", np.asfortranarray(VALUES))
    with pytest.raises(InputError, match="Fortran order. Remedy: numpy.ascontiguousarray"):
        describe(str(tmp_path / "f.npy"), "z")
    np.savez(tmp_path / "i.npz", z=VALUES, id=IDS[:3])
    with pytest.raises(InputError, match=r"it has 100 of z, and 3 ids"):
        describe(str(tmp_path / "i.npz"), "z")
    assert find([str(path), str(tmp_path / "*.parquet")]) == [str(path)]
    (tmp_path / "br[1]").mkdir()
    literal = write(tmp_path / "br[1]", ".npy")
    monkeypatch.chdir(tmp_path / "br[1]")
    assert find([str(literal)]) == find(["a.npy"]) == [str(literal)]


def test_samples_of_another_type_or_shape_are_seen_before_they_are_read(tmp_path):
    shape = (2, 3)
    np.save(tmp_path / "ints.npy", VALUES.astype(np.int8))
    np.save(tmp_path / "other.npy", VALUES[:, :, :2])
    np.save(tmp_path / "one.npy", np.float32(1))
    np.save(tmp_path / "flat.npy", VALUES[:, 0, 0])
    for name, said in (
        ("ints", "column z has int8.*Remedy: scale"),
        ("other", r"samples of shape \(2, 2\), \(2, 3\) is needed"),
        ("one", "z is one number, not an array of samples"),
        ("flat", "column z is of type float"),
    ):
        with pytest.raises(InputError, match=f"{name}.npy cannot be read: .*{said}"):
            describe(str(tmp_path / f"{name}.npy"), "z", shape)


def test_arrays_of_other_kinds_of_numbers(tmp_path):
    np.save(tmp_path / "big.npy", VALUES.astype(">f8"))
    torch_save_file({"z": torch.from_numpy(VALUES).bfloat16()}, tmp_path / "bf16.safetensors")
    for name, expected in (
        ("big.npy", VALUES),
        ("bf16.safetensors", torch.from_numpy(VALUES).bfloat16().float().numpy()),
    ):
        (found,) = read(describe(str(tmp_path / name), "z", (2, 3)), "z", [(10, 30)])
        np.testing.assert_array_equal(found.column("z").combine_chunks().to_numpy_ndarray(), expected[10:30])


def test_another_file_of_the_same_size_is_another(tmp_path):
    np.save(tmp_path / "a.npy", VALUES)
    before = describe(str(tmp_path / "a.npy"), "z")
    assert describe(str(tmp_path / "a.npy"), "z") == before
    np.save(tmp_path / "a.npy", VALUES[::-1])
    assert describe(str(tmp_path / "a.npy"), "z") != before


def files(folder, *ids):
    found = []
    for index, values in enumerate(ids):
        path = folder / f"{index}.parquet"
        pq.write_table(pa.table({"id": values, "z": [[0.0]] * len(values)}), path)
        found.append(describe(str(path), "z"))
    return found


@pytest.mark.parametrize("bucket", [1_000_000, 40])
def test_ids_that_are_distinct(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr("iresnet_fast.scale.ids._BUCKET", bucket)
    numbers = np.random.default_rng(0).permutation(200)
    growing, shuffled = (range(50), range(50, 90)), (numbers[:120], numbers[120:])
    kinds = (pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))
    for kind in kinds:
        check_ids(files(tmp_path, pa.array(map(str, range(90))).cast(kind)), tmp_path)
    for parts, kind in ((growing, pa.int64()), (shuffled, pa.int64()), (([], [5]), pa.int32()), (growing, pa.string())):
        ids = [pa.array(map(str, part) if kind == pa.string() else part, kind) for part in parts]
        check_ids(files(tmp_path, *ids), tmp_path)
    assert not list(tmp_path.glob(".ids*"))


@pytest.mark.parametrize("bucket", [1_000_000, 40])
def test_ids_that_are_not_are_named(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr("iresnet_fast.scale.ids._BUCKET", bucket)
    numbers = np.random.default_rng(0).permutation(200)
    with pytest.raises(InputError, match=r"duplicate ids: 17 \(2 times\). Remedy: an id of its own"):
        check_ids(files(tmp_path, numbers, [17]), tmp_path)
    with pytest.raises(InputError, match=r"duplicate ids: .*'b' \(3 times\)"):
        check_ids(files(tmp_path, ["a", "b", "c", "b"], ["a", "b"]), tmp_path)
    with pytest.raises(InputError, match=r", …\. Remedy"):
        check_ids(files(tmp_path, numbers, numbers), tmp_path)


def test_other_ids_are_refused(tmp_path):
    with pytest.raises(InputError, match="samples without an id, the first in rows 0 and after"):
        check_ids(files(tmp_path, [1, None]), tmp_path)
    with pytest.raises(InputError, match="ids of type double. Remedy: integers or text"):
        check_ids(files(tmp_path, [1.5]), tmp_path)
    with pytest.raises(InputError, match="ids of type string, the files before it of int64"):
        check_ids(files(tmp_path, [1], ["a"]), tmp_path)
    np.save(tmp_path / "a.npy", VALUES)
    with pytest.raises(
        InputError, match=r"a.npy has no 'id', and .*0.parquet has. Remedy: ids in all files, or in none"
    ):
        check_ids([*files(tmp_path, [1]), describe(str(tmp_path / "a.npy"), "z")], tmp_path)
