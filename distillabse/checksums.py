"""A folder's SHA-256 sums, in the format of `sha256sum --check`: what tells a whole folder from a broken one."""

from __future__ import annotations

from pathlib import Path

from distillabse import layout
from distillabse.storage import new_file, sha256_of_file

_HUB_ATTRIBUTES, _HUB_CACHE = ".gitattributes", ".cache/huggingface/"


def write_checksums(folder: Path) -> None:
    """List every file in the folder; the list itself appears whole or not at all.

    Raises:
        StorageError: the disk is full.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != layout.CHECKSUMS)
    _write(folder, {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files})


def renew_checksum(folder: Path, name: str) -> None:
    """Bring the line of one file up to date, if the folder has a list."""
    if (folder / layout.CHECKSUMS).is_file():
        _write(folder, {**_read(folder), name: sha256_of_file(folder / name)})


def broken_checksums(folder: Path) -> list[str]:
    """Files that are missing or differ from the list; the list itself where there is none."""
    if not (folder / layout.CHECKSUMS).is_file():
        return [layout.CHECKSUMS]
    return [
        name
        for name, digest in _read(folder).items()
        if not (folder / name).is_file() or sha256_of_file(folder / name) != digest
    ]


def unlisted_files(folder: Path) -> list[str]:
    """Files that the list does not name, apart from what the Hugging Face hub adds to every download."""
    listed = _read(folder) if (folder / layout.CHECKSUMS).is_file() else {}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    known = {*listed, layout.CHECKSUMS, _HUB_ATTRIBUTES}
    return [name for name in names if name not in known and not name.startswith(_HUB_CACHE)]


def _read(folder: Path) -> dict[str, str]:
    lines = (folder / layout.CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _write(folder: Path, digests: dict[str, str]) -> None:
    with new_file(folder / layout.CHECKSUMS) as temporary:
        temporary.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()), encoding="utf-8")
