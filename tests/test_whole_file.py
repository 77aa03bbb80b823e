"""A file is there whole, or as it was before."""

import stat

import pytest

from iresnet_fast.whole_file import replacing, sweep, write_whole


def test_the_file_is_replaced_when_all_is_written(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "before")
    with replacing(path) as beside:
        beside.write_text("af")
        assert path.read_text() == "before"
        beside.write_text("after")
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "af\ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_it_where_new_files_may_be_read(tmp_path):
    (tmp_path / "any").touch()
    usual = stat.S_IMODE((tmp_path / "any").stat().st_mode)
    with replacing(tmp_path / "a.txt") as beside:
        beside.write_text("x")
        beside.chmod(0o600)  # as safetensors does
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == usual


def test_sweep_removes_what_a_killed_process_left(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "x")
    (tmp_path / ".a.txt.12345.part").write_text("half")
    (tmp_path / ".hidden").write_text("not ours")
    sweep(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".hidden", "a.txt"]
