"""The teacher's signals on disk, so that it runs once and not in every epoch, and for many jobs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from distillabse import layout
from distillabse.errors import ConfigurationError, InputError, StorageError
from distillabse.models.teacher import transformer_of
from distillabse.storage import read_json, remove_folder, sha256_of_file, sha256_of_json, shared_folder, write_json
from distillabse.training.data import FileArray, PaddingCollator, TokenisedSentences, sentence_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from distillabse.training.distiller import Distiller

logger = logging.getLogger(__name__)
_BATCH = 128
# Sentences that are sorted by length together before the teacher sees them.
_WINDOW = 100 * _BATCH
# Where the weights came from says nothing about what they are.
_NOT_COMPARED = ("model", "revision")


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache was made from.

    Attributes:
        teacher: digest of its weights and settings.
        model: where it was loaded from; kept for people, not compared.
        revision: of a model from the hub; the same.
        sentences: digest of the token ids.
        max_length: tokens at which texts were cut.
        taps: the tapped tensors, e.g. "hidden 11", in order.
        precision: what the teacher computed in.
        rows: number of sentences.
    """

    teacher: str
    model: str
    revision: str | None
    sentences: str
    max_length: int
    taps: tuple[str, ...]
    precision: Literal["bf16", "fp32"]
    rows: int


class TeacherCache:
    """Memory-mapped float16 arrays of a folder; pickled as no more than its name.

    Attributes:
        sentence: [rows, dimension].
        taps: each [tokens of all rows, width], in the order of `Distiller.teacher_taps`.
        starts: [rows + 1], where the tokens of each row begin.
    """

    def __init__(self, folder: Path, starts: NDArray[np.int64] | FileArray) -> None:
        self.folder = folder
        self.starts = starts
        self.sentence = np.load(folder / layout.CACHE_SENTENCES, mmap_mode="r", allow_pickle=False)
        names = _tap_files(read_json(folder / layout.CACHE_RECORD)["made_from"]["taps"])
        self.taps = [np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in names]

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherCache, (self.folder, self.starts)

    def read(self, rows: Sequence[int], tokens: int) -> dict[str, Any]:
        """What `Distiller.forward` takes for these rows: float32, the taps padded with zeros to `tokens`."""
        sentence = torch.from_numpy(np.asarray(self.sentence[list(rows)], dtype=np.float32))
        padded = [torch.zeros(len(rows), tokens, tap.shape[1]) for tap in self.taps]
        if padded:
            bounds = self.starts[np.asarray(rows, np.int64)[:, None] + np.arange(2)].tolist()
            for index, (start, end) in enumerate(bounds):
                for target, tap in zip(padded, self.taps, strict=True):
                    target[index, : end - start] = torch.from_numpy(np.array(tap[start:end]))
        return {"teacher_sentence": sentence, "teacher_taps": padded}


def teacher_cache(
    distiller: Distiller,
    sentences: TokenisedSentences,
    folder: Path,
    identity: CacheIdentity,
    device: torch.device,
    replace: bool = False,
) -> TeacherCache:
    """The cache in `folder`, opened if it is whole and of this identity, else built.

    Of several processes that call this at once, all may build; the first to finish is kept and all others open it. Let
    one process call this, and the others `open_cache` after it, to build only once.

    Args:
        distiller: gives the teacher and the taps that its objectives need.
        sentences: what the teacher sees.
        folder: the cache's own, or one that does not exist.
        identity: as from `cache_identity` of the same distiller and sentences.
        device: where the teacher runs.
        replace: build anew where the folder's cache is of something else, instead of refusing.

    Raises:
        ConfigurationError: the folder holds a cache of something else, or something that is no cache.
        StorageError: the disk is full, or somebody removed the cache at once.
    """
    cache = open_cache(sentences, folder, identity, replace=replace)
    if cache is None:
        build_cache(distiller, sentences, folder, identity, device)
        # Not verified again: it was written by this process, or in this moment by another.
        cache = open_cache(sentences, folder, identity, verify=False)
    if cache is None:
        raise StorageError(f"The teacher cache in {folder} was removed as soon as it was there. Run the job again.")
    return cache


def cache_identity(
    distiller: Distiller, sentences: TokenisedSentences, bf16: bool, model: str = "", revision: str | None = None
) -> CacheIdentity:
    """What a cache of these would be made from; reads all weights of the teacher."""
    return CacheIdentity(
        teacher=teacher_digest(distiller.teacher),
        model=model,
        revision=revision,
        sentences=sentences.digest,
        max_length=int(distiller.teacher.max_seq_length),
        taps=tuple(f"{tap.kind} {tap.layer}" for tap in distiller.teacher_taps),
        precision="bf16" if bf16 else "fp32",
        rows=len(sentences),
    )


def teacher_digest(teacher: SentenceTransformer) -> str:
    """SHA-256 of all that decides what an encoder makes of token ids: weights, buffers and settings of its modules.

    Weights count with names, shapes, types and bytes. BERT's own pooler takes no part in the sentence vector, and
    where a checkpoint lacks it, it is drawn at random at every load: it does not count.
    """
    digest = hashlib.sha256()
    for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
        if ".pooler." not in name:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    settings = transformer_of(teacher).config.to_dict()
    modules = [f"{type(module).__name__} {getattr(module, 'get_config_dict', dict)()}" for module in teacher]
    transient = ("_name_or_path", "transformers_version", "architectures")
    return sha256_of_json(
        {
            "weights": digest.hexdigest(),
            "modules": modules,
            "settings": {key: str(value) for key, value in settings.items() if key not in transient},
        }
    )


def open_cache(
    sentences: TokenisedSentences, folder: Path, identity: CacheIdentity, verify: bool = True, replace: bool = False
) -> TeacherCache | None:
    """The cache in `folder`; None where there is none, or where it was of no use and is now removed.

    Args:
        sentences: what it was made from.
        folder: the cache's own.
        identity: what it must have been made from.
        verify: read all files and compare checksums.
        replace: remove a cache of something else instead of refusing it.

    Raises:
        ConfigurationError: the folder holds a cache of something else, or something that is no cache.
    """
    if not _holds_cache(folder):
        return None
    differences: list[str] = []
    damage = None
    try:
        record = read_json(folder / layout.CACHE_RECORD)
        differences = _differences(record["made_from"], identity)
        if verify and not differences:
            damage = _damage(folder, record)
    except (InputError, LookupError, TypeError, AttributeError) as error:
        damage = f"its {layout.CACHE_RECORD} cannot be read ({error})"
    if damage:
        logger.warning("The teacher cache in %s is damaged: %s. It is removed.", folder, damage)
    elif not differences:
        return TeacherCache(folder, sentences.starts)
    elif not replace:
        raise ConfigurationError(
            f"teacher_cache: {folder} was made from something else: {'; '.join(differences)}. Name another folder for "
            "this job, or remove that one."
        )
    remove_folder(folder)
    return None


def build_cache(
    distiller: Distiller, sentences: TokenisedSentences, folder: Path, identity: CacheIdentity, device: torch.device
) -> None:
    """Run the teacher over every sentence and write its signals: `folder` is whole or absent.

    Where another process finishes first, its cache is left as it is. Arguments as for `teacher_cache`.

    Raises:
        StorageError: the disk is full.
    """
    distiller.teacher.to(device)
    started = time.monotonic()
    with shared_folder(folder) as temporary:
        _write_signals(distiller, sentences, temporary, device, identity.precision == "bf16")
        names = [layout.CACHE_SENTENCES, *_tap_files(identity.taps)]
        checksums = {name: sha256_of_file(temporary / name) for name in names}
        size = sum((temporary / name).stat().st_size for name in names)
        write_json(temporary / layout.CACHE_RECORD, {"made_from": asdict(identity), "sha256": checksums})
    seconds = time.monotonic() - started
    rate = identity.rows / max(seconds, 1e-9)
    logger.info(f"Teacher cache of {identity.rows:,} sentences, {size / 1e9:.2f} GB, {rate:,.0f} sentences/s: {folder}")


def _write_signals(
    distiller: Distiller, sentences: TokenisedSentences, folder: Path, device: torch.device, bf16: bool
) -> None:
    """Fill the arrays in `folder`, window by window, within each the longest sentences first."""
    collator = PaddingCollator(distiller.teacher.tokenizer.pad_token_id)
    tokens = int(sentences.starts[np.array([len(sentences)])][0])
    vectors: NDArray[Any] | None = None
    taps: list[NDArray[Any]] = []
    with (
        sentence_progress("Teacher, once", len(sentences)) as (progress, task),
        torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext(),
    ):
        for rows in _batches(sentences):
            batch = collator(sentences.__getitems__(rows.tolist()))
            signals = distiller.teacher_signals(**{name: tensor.to(device) for name, tensor in batch.items()})
            tapped = [signals.taps[tap].float().cpu().numpy() for tap in distiller.teacher_taps]
            if vectors is None:
                vectors = _empty(folder / layout.CACHE_SENTENCES, (len(sentences), signals.sentence.shape[1]))
                names = _tap_files(tapped)
                taps = [_empty(folder / name, (tokens, x.shape[2])) for name, x in zip(names, tapped, strict=True)]
            vectors[rows] = signals.sentence.float().cpu().numpy()
            bounds = sentences.starts[rows[:, None] + np.arange(2)].tolist() if taps else []
            for index, (start, end) in enumerate(bounds):
                for array, tensor in zip(taps, tapped, strict=True):
                    array[start:end] = tensor[index, : end - start]
            progress.advance(task, len(rows))


def _batches(sentences: TokenisedSentences) -> Iterator[NDArray[np.int64]]:
    """All rows, once: those of a batch have about one length, and their signals lie close together on disk."""
    for start in range(0, len(sentences), _WINDOW):
        rows = np.arange(start, min(start + _WINDOW, len(sentences)))
        rows = rows[np.argsort(-sentences.lengths(rows), kind="stable")]
        yield from np.split(rows, range(_BATCH, len(rows), _BATCH))


def _holds_cache(folder: Path) -> bool:
    """Whether there is a cache, of whatever and in whatever state.

    Raises:
        ConfigurationError: there is something that is no cache, and so not for this job to remove.
    """
    try:
        # One look: another process may put a cache there or take one away at any time.
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        names = {folder.name}
    if names and layout.CACHE_RECORD not in names:
        raise ConfigurationError(
            f"teacher_cache: {folder} holds something that is no teacher cache (there is no {layout.CACHE_RECORD}). "
            "Name a folder of its own."
        )
    return bool(names)


def _differences(kept: dict[str, Any], identity: CacheIdentity) -> list[str]:
    """For each part that is not the same: its name, the kept value and the wanted one."""
    wanted = json.loads(json.dumps(asdict(identity)))
    parts = [key for key in wanted if key not in _NOT_COMPARED and kept.get(key) != wanted[key]]
    return [f"{part} is {_shown(part, kept)}, this job's {_shown(part, wanted)}" for part in parts]


def _shown(part: str, identity: dict[str, Any]) -> str:
    """A value for people: digests are cut short, and the teacher has a name."""
    value = identity.get(part)
    if part == "sentences":
        return str(value)[:12]
    if part == "teacher":
        revision = f" at {identity['revision']}" if identity.get("revision") else ""
        return f"{identity.get('model') or 'unnamed'}{revision} ({str(value)[:12]})"
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def _damage(folder: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with the files, if anything."""
    logger.info("Checking the teacher cache in %s", folder)
    for name in (layout.CACHE_SENTENCES, *_tap_files(record["made_from"]["taps"])):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of_file(folder / name) != record["sha256"][name]:
            return f"the checksum of {name} does not hold"
    return None


def _tap_files(taps: Sequence[Any]) -> list[str]:
    return [layout.CACHE_TAP.format(number) for number in range(len(taps))]


def _empty(path: Path, shape: tuple[int, int]) -> NDArray[np.float16]:
    array: NDArray[np.float16] = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    with path.open("r+b") as file:
        # A disk that fills up while a mapped file is written kills the process; one that is full now is an error.
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
