import errno

import pytest

from distillabse.errors import InputError, StorageError
from distillabse.storage import new_file, new_folder, read_json, sha256_of_file, sha256_of_json, write_json


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "product"
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert leftovers(tmp_path) == []
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1" and leftovers(tmp_path) == ["product"]
    with new_folder(target) as folder:
        (folder / "b").write_text("3")
    assert leftovers(target) == ["b"] and leftovers(tmp_path) == ["product"]


@pytest.mark.parametrize("writer", [new_file, new_folder])
def test_a_full_disk_is_one_clear_error_and_the_old_result_stays(tmp_path, writer):
    target = tmp_path / "product"
    with writer(target) as place:
        (place / "a" if writer is new_folder else place).write_text("old")
    with pytest.raises(StorageError, match=r"No space left .*product.*intact"), writer(target) as place:
        (place / "a" if writer is new_folder else place).write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "a" if writer is new_folder else target).read_text() == "old"
    assert leftovers(tmp_path) == ["product"]


def test_json_round_trip_and_errors(tmp_path):
    write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ü": [1, None]}
    with pytest.raises(InputError, match="does not exist"):
        read_json(tmp_path / "b.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(tmp_path / "b.json")


def test_hashes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_json({"a": 1, "b": 2}) == sha256_of_json({"b": 2, "a": 1}) != sha256_of_json({"a": 1, "b": 3})
