import errno
import fcntl
from pathlib import Path

import numpy as np
import pytest
import torch

from distillabse.errors import InputError, StorageError
from distillabse.storage import (
    new_file,
    new_folder,
    read_json,
    remove_folder,
    remove_leftovers,
    sha256_of_file,
    sha256_of_json,
    shared_folder,
    write_json,
)


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


def test_of_two_writers_of_a_shared_folder_the_first_to_finish_is_kept(tmp_path):
    target = tmp_path / "product"
    with shared_folder(target) as slow:
        (slow / "a").write_text("slow")
        with shared_folder(target) as fast:
            (fast / "a").write_text("fast")
            assert slow.is_dir() and not target.exists()
        assert (target / "a").read_text() == "fast"
    with pytest.raises(RuntimeError), shared_folder(target):
        raise RuntimeError
    assert (target / "a").read_text() == "fast"
    assert leftovers(tmp_path) == ["product"] and leftovers(target) == ["a"]
    remove_folder(target)
    remove_folder(target)
    assert leftovers(tmp_path) == []


def test_only_what_no_living_process_writes_is_removed(tmp_path):
    for name in (".product.dead.building", ".product.alive.building", ".product.unknown.building", ".other.x.building"):
        (tmp_path / name).mkdir()
        if "unknown" not in name:
            (tmp_path / name / ".lock").touch()
    with (tmp_path / ".product.alive.building" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with shared_folder(tmp_path / "product"):
            pass
    assert leftovers(tmp_path) == [
        ".other.x.building",
        ".product.alive.building",
        ".product.unknown.building",
        "product",
    ]


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


def save_with_torch():
    torch.save({"a": torch.zeros(5000)}, "/dev/full")


def save_with_torch_into_a_file():
    with open("/dev/full", "wb") as file:
        torch.save({"a": torch.zeros(5000)}, file)


def save_with_numpy():
    with open("/dev/full", "wb") as file:
        np.save(file, np.zeros(100_000))


def save_text():
    Path("/dev/full").write_text("text")


@pytest.mark.parametrize("save", [save_with_torch, save_with_torch_into_a_file, save_with_numpy, save_text])
def test_a_full_disk_in_the_words_of_each_library(tmp_path, save):
    """/dev/full answers every write as a full disk does."""
    with pytest.raises(StorageError, match=r"No space left .*product"), new_folder(tmp_path / "product"):
        save()


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), new_folder(tmp_path / "product"):
        raise RuntimeError("shapes do not fit")


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path):
    own = [f".product.{middle}" for middle in ("ab12cd34.partial", "ab12cd34.previous", "x.new", "0badcafe.building")]
    others = ["product", "product.partial", ".product2.x.partial", ".product.x.backup"]
    for name in own + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_leftovers(tmp_path / "product")
    assert leftovers(tmp_path) == sorted(others)


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
