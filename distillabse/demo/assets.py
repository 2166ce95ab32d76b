"""What the page runs on: ONNX Runtime for the web and a tokenizer library, from the npm registry, fetched once."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.progress import wrap_file

from distillabse.errors import InputError, StorageError
from distillabse.storage import new_folder

logger = logging.getLogger(__name__)

_REGISTRY = "https://registry.npmjs.org"
_SECONDS = 60


@dataclass(frozen=True)
class Package:
    """One package of the npm registry.

    Attributes:
        name: as npm spells it.
        version: exactly this one.
        integrity: base64 of the SHA-512 of its archive, as npm's lock files say it.
        files: what is kept, by the path inside the archive.
    """

    name: str
    version: str
    integrity: str
    files: tuple[str, ...]

    def url(self, registry: str) -> str:
        """Address of the archive."""
        return f"{registry.rstrip('/')}/{self.name}/-/{self.name.rsplit('/', 1)[-1]}-{self.version}.tgz"


PACKAGES = (
    Package(
        "onnxruntime-web",
        "1.30.0",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        ("dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    ),
    Package(
        "@huggingface/tokenizers",
        "0.2.0",
        "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        ("dist/tokenizers.min.mjs",),
    ),
)


def assets_folder() -> Path:
    """Where the files lie: in the user's cache, by version. Copy this folder to a machine without a network."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = "-".join(package.version for package in PACKAGES)
    return cache / "distillabse" / f"demo-{versions}"


def require_assets() -> Path:
    """The folder of the files.

    Raises:
        InputError: they were not fetched yet.
    """
    folder = assets_folder()
    missing = [name for package in PACKAGES for name in map(_name, package.files) if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"The page runs on ONNX Runtime for the web, which is not there yet ({', '.join(missing)}). Fetch it once, "
            f"with a network: `distillabse demo --fetch-assets`. Or copy {folder} from a machine that has it."
        )
    return folder


def fetch() -> Path:
    """Fetch the files where they are not there yet; NPM_CONFIG_REGISTRY names another registry.

    Raises:
        InputError: an archive is not the one that was published.
        StorageError: the registry cannot be reached, or the disk is full.
    """
    try:
        return require_assets()
    except InputError:
        pass
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or os.environ.get("npm_config_registry") or _REGISTRY
    folder = assets_folder()
    with new_folder(folder) as temporary:
        for package in PACKAGES:
            _unpack(package, _archive(package, registry), temporary)
    return folder


def _archive(package: Package, registry: str) -> bytes:
    url = package.url(registry)
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            size = int(answer.headers.get("Content-Length", 0))
            with wrap_file(answer, size, description=f"{package.name} {package.version}") as file:
                archive: bytes = file.read()
    except (urllib.error.URLError, OSError) as error:
        raise StorageError(
            f"{url} cannot be fetched ({error}). Check the network, or name a registry in NPM_CONFIG_REGISTRY."
        ) from error
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != package.integrity:
        raise InputError(f"{url} is not {package.name} {package.version} as it was published. Try another registry.")
    return archive


def _unpack(package: Package, archive: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for file in package.files:
            content = tar.extractfile(f"package/{file}")
            assert content is not None  # its digest is known
            (folder / _name(file)).write_bytes(content.read())


def _name(file: str) -> str:
    return file.rsplit("/", 1)[-1]
