"""Writing that is whole or absent: everything is written beside its place under a temporary name and then renamed."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distillabse.errors import DistillabseError, InputError, StorageError

_LOCK = ".lock"
_LEFTOVERS = ("partial", "previous", "new", "building")
# How libraries tell of a full disk that do not say so: torch, and numpy, which knows how much it could write.
_FULL = re.compile(r"inline_container|iostream error|PytorchStreamWriter|\d+ requested and \d+ written")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, on failure it is removed.

    Raises:
        StorageError: the disk is full or the place cannot be written; the previous `path` is intact.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        with storage_errors(path):
            yield temporary
            temporary.chmod(0o755)
            _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process left where it made, replaced or removed `path`; call it where no other one does."""
    for suffix in _LEFTOVERS:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.{suffix}"):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """Like `new_folder` for a folder that several processes may write at once: the first to finish gives it its name.

    What a later one has written is dropped. What killed processes have left beside `path` is removed first: a living
    one holds a lock, which goes with it, on this machine or on another.

    Raises:
        StorageError: the disk is full or the place cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{glob.escape(f'.{path.name}.')}*.building"):
            _remove_unlocked(leftover)
        # It gets the name by which others would remove it when its lock is held.
        created = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
        with (created / _LOCK).open("w") as lock:
            with suppress(OSError):  # a file system without locks: others leave it alone, too
                fcntl.flock(lock, fcntl.LOCK_EX)
            temporary = created.rename(created.with_suffix(".building"))
            try:
                yield temporary
                temporary.chmod(0o755)
                _rename_if_first(temporary, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder that other processes may look at: it is gone at once, and never seen half removed."""
    with suppress(FileNotFoundError):
        (path / _LOCK).touch()  # should this process be killed now, the next `shared_folder` removes the rest
        aside = path.rename(path.with_name(f".{path.name}.{secrets.token_hex(4)}.building"))
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; on success it is renamed to `path`, on failure it is removed.

    Raises:
        StorageError: the disk is full or the place cannot be written; the previous `path` is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist. Run the stage that writes it first.") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). Remove it and run its stage again.") from None


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def sha256_of_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _sha256(file: Any) -> str:
    """Python 3.10 has no `hashlib.file_digest`."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _replace_folder(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`: the old folder is moved aside first, so `path` is always whole or absent."""
    if not path.exists():
        new.rename(path)
        return
    previous = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".previous", dir=path.parent))
    path.rename(previous / path.name)
    try:
        new.rename(path)
    except OSError:
        (previous / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(previous, ignore_errors=True)


def _rename_if_first(new: Path, path: Path) -> None:
    try:
        new.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        (path / _LOCK).unlink()


def _remove_unlocked(folder: Path) -> None:
    """Remove a folder unless a process that lives holds its lock, or nothing can be said about that."""
    with suppress(OSError), (folder / _LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a place without permission, met while writing `path`, into a StorageError."""
    try:
        yield
    except DistillabseError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors, torch, numpy and pyarrow wrap the operating system's error into their own.
        full = os.strerror(errno.ENOSPC) in str(error) or _FULL.search(str(error)) is not None
        if number in (errno.ENOSPC, errno.EDQUOT) or full:
            raise StorageError(
                f"No space left on the disk while writing {path}. Free some space, or choose another place with "
                f"`output=...`, and run the same command again; anything that was there before is intact."
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise StorageError(f"{path} cannot be written ({error}). Choose another place.") from error
        raise
