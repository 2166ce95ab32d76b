"""The teacher's signals on disk: right, refused where they are of something else, and safe from dying writers."""

import errno
import logging
import multiprocessing
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_encoder

from distillabse.config import CosineObjective, DenseStudentConfig, HiddenObjective, MiniLMv2Objective, TrainingConfig
from distillabse.errors import ConfigurationError, StorageError
from distillabse.models.student import build_student
from distillabse.models.teacher import load_encoder
from distillabse.settings import validate
from distillabse.storage import read_json, sha256_of_file
from distillabse.training import cache as module
from distillabse.training.cache import (
    build_cache,
    cache_identity,
    open_cache,
    teacher_cache,
    teacher_digest,
)
from distillabse.training.data import PaddingCollator, tokenise_corpus, tokenised_sentences
from distillabse.training.distiller import Distiller

OBJECTIVES = (CosineObjective(), MiniLMv2Objective(relation_heads=8), HiddenObjective())
CPU = torch.device("cpu")
WORDS = "the man woman dog cat house city walk run small big old red blue water tree".split()


def corpus(n, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(1, 12))) for _ in range(n)]


def distiller_of(folder, objectives=OBJECTIVES):
    teacher = load_encoder(str(folder))
    return Distiller(build_student(teacher, DenseStudentConfig(layers=2)), teacher, objectives)


class Job:
    """What one job brings to a cache."""

    def __init__(self, encoder_folder, texts=None, objectives=OBJECTIVES, bf16=False):
        self.distiller = distiller_of(encoder_folder, objectives)
        self.sentences = tokenised_sentences(self.distiller.student, texts or corpus(300))
        self.identity = cache_identity(self.distiller, self.sentences, bf16, model=f"my/{Path(encoder_folder).name}")

    def cache(self, folder, **options):
        return teacher_cache(self.distiller, self.sentences, folder, self.identity, CPU, **options)

    def open(self, folder, **options):
        return open_cache(self.sentences, folder, self.identity, **options)

    def forbid_the_teacher(self):
        def refuse(**batch):
            raise AssertionError("the teacher ran")

        self.distiller.teacher_signals = refuse


@pytest.fixture
def job(encoder_folder):
    return Job(encoder_folder)


def contents(folder):
    return {path.name: sha256_of_file(path) for path in folder.iterdir()}


def paused_writer(encoder_folder, folder, begun, go_on, results):
    """A process that builds a cache, waits at its first batch, and puts what it reads in the end."""
    job = Job(encoder_folder)
    run = job.distiller.teacher_signals

    def wait(**batch):
        begun.set()
        assert go_on.wait(120)
        return run(**batch)

    job.distiller.teacher_signals = wait
    results.put(job.cache(folder).read([7, 250], 20)["teacher_sentence"].numpy())


def start_writer(encoder_folder, folder):
    context = multiprocessing.get_context("fork")
    begun, go_on, results = context.Event(), context.Event(), context.Queue()
    process = context.Process(target=paused_writer, args=(encoder_folder, folder, begun, go_on, results), daemon=True)
    process.start()
    return process, begun, go_on, results


@pytest.mark.parametrize("batch", [64, 7])
def test_a_cache_holds_what_the_teacher_gives(job, tmp_path, monkeypatch, batch):
    """Windows and batches of any size put every row where it belongs."""
    monkeypatch.setattr(module, "_BATCH", batch)
    monkeypatch.setattr(module, "_WINDOW", 3 * batch)
    cache = job.cache(tmp_path / "cache")
    rows = [299, 0, 17, 130]
    read = cache.read(rows, 20)
    assert cache.sentence.dtype == np.float16 and cache.sentence.shape == (300, 32)
    assert len(read["teacher_taps"]) == len(job.distiller.teacher_taps) == 4
    for index, row in enumerate(rows):
        alone = PaddingCollator(0)([job.sentences[row]])
        length = alone["input_ids"].shape[1]
        live = job.distiller.teacher_signals(**alone)
        torch.testing.assert_close(read["teacher_sentence"][index], live.sentence[0], atol=1e-3, rtol=1e-3)
        for tap, kept in zip(job.distiller.teacher_taps, read["teacher_taps"], strict=True):
            torch.testing.assert_close(kept[index, :length], live.taps[tap][0], atol=2e-3, rtol=2e-3)
            assert kept.dtype == torch.float32 and kept[index, length:].abs().sum() == 0
    with_cache = PaddingCollator(0, cache=cache)([job.sentences[row] for row in rows])
    assert with_cache["teacher_taps"][0].shape[:2] == with_cache["input_ids"].shape


def test_a_cache_is_built_once_and_opened_by_other_jobs(job, encoder_folder, tmp_path):
    folder = tmp_path / "shared" / "cache"
    job.cache(folder)
    kept = contents(folder)
    assert set(kept) == {"cache.json", "sentence.npy", *(f"tap-{n}.npy" for n in range(len(job.identity.taps)))}
    assert read_json(folder / "cache.json")["made_from"]["rows"] == 300
    copy = shutil.copytree(encoder_folder, tmp_path / "the same teacher elsewhere")
    other = Job(copy)
    other.forbid_the_teacher()
    assert other.identity.model != job.identity.model
    opened = other.cache(folder)
    assert torch.equal(opened.read([3], 20)["teacher_sentence"], job.open(folder).read([3], 20)["teacher_sentence"])
    assert contents(folder) == kept and list(folder.parent.iterdir()) == [folder]


def test_a_cache_goes_to_workers_as_a_name(job, tmp_path):
    job.sentences = tokenise_corpus(job.distiller.student, corpus(300), tmp_path / "tokens")
    cache = job.cache(tmp_path / "cache")
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    for kept, sent in zip(cache.read([4, 2], 20)["teacher_taps"], copy.read([4, 2], 20)["teacher_taps"], strict=True):
        assert torch.equal(kept, sent)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "name", "told"),
    [
        (flip_a_bit, "sentence.npy", r"the checksum of sentence\.npy does not hold"),
        (flip_a_bit, "tap-1.npy", r"the checksum of tap-1\.npy does not hold"),
        (truncate, "tap-0.npy", r"the checksum of tap-0\.npy does not hold"),
        (truncate, "cache.json", r"its cache\.json cannot be read"),
        (Path.unlink, "tap-0.npy", r"tap-0\.npy is missing"),
    ],
)
def test_a_damaged_cache_is_told_and_built_anew(job, tmp_path, caplog, harm, name, told):
    folder = tmp_path / "cache"
    job.cache(folder)
    good = contents(folder)
    harm(folder / name)
    with caplog.at_level(logging.WARNING):
        job.cache(folder)
    assert re.search(f"The teacher cache in {folder} is damaged: {told}", caplog.text)
    assert contents(folder) == good and list(tmp_path.iterdir()) == [folder]


def test_a_cache_of_something_else_is_refused_by_name(job, encoder_folder, tmp_path):
    folder = tmp_path / "cache"
    job.cache(folder)
    kept = contents(folder)
    stranger = tiny_encoder(tmp_path / "stranger", layers=4, seed=1)
    refused = {
        r"teacher is my/encoder \([0-9a-f]{12}\), this job's my/stranger \([0-9a-f]{12}\)\. ": Job(stranger),
        r"sentences is [0-9a-f]{12}, this job's [0-9a-f]{12}\. ": Job(encoder_folder, corpus(300, seed=1)),
        r"sentences is .*; rows is 300, this job's 299\. ": Job(encoder_folder, corpus(300)[:-1]),
        r"taps is hidden 3, key 3, query 3, value 3, this job's none\. ": Job(
            encoder_folder, objectives=[CosineObjective()]
        ),
        r"precision is fp32, this job's bf16\. ": Job(encoder_folder, bf16=True),
    }
    shorter = Job(encoder_folder)
    shorter.identity = replace(shorter.identity, max_length=32)
    refused[r"max_length is 64, this job's 32\. "] = shorter
    for message, other in refused.items():
        with pytest.raises(ConfigurationError, match=rf"made from something else: {message}Name another folder"):
            other.cache(folder)
    assert contents(folder) == kept
    replaced = shorter.cache(folder, replace=True)
    assert replaced.sentence.shape == (300, 32) and read_json(folder / "cache.json")["made_from"]["max_length"] == 32


def test_folders_that_are_no_cache_are_left_alone(job, tmp_path):
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for replaced in (False, True):
        with pytest.raises(ConfigurationError, match=r"papers holds something that is no teacher cache"):
            job.cache(folder, replace=replaced)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match=r"file holds something that is no teacher cache"):
        job.cache(tmp_path / "file")
    assert (folder / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    job.cache(tmp_path / "empty")
    assert job.open(tmp_path / "empty") is not None


def test_two_processes_that_build_at_once_leave_one_good_cache(encoder_folder, job, tmp_path):
    folder = tmp_path / "cache"
    writers = [start_writer(encoder_folder, folder) for _ in range(2)]
    for _, begun, _, _ in writers:
        assert begun.wait(120)
    assert len(list(tmp_path.iterdir())) == 2 and not folder.exists()
    for _, _, go_on, _ in writers:
        go_on.set()
    read = [results.get(timeout=120) for _, _, _, results in writers]
    for process, *_ in writers:
        process.join(120)
        assert process.exitcode == 0
    np.testing.assert_array_equal(read[0], read[1])
    job.forbid_the_teacher()
    np.testing.assert_array_equal(job.cache(folder).read([7, 250], 20)["teacher_sentence"].numpy(), read[0])
    assert list(tmp_path.iterdir()) == [folder] and ".lock" not in contents(folder)


def test_a_killed_writer_leaves_nothing_that_counts(encoder_folder, job, tmp_path):
    folder = tmp_path / "cache"
    process, begun, _go_on, _results = start_writer(encoder_folder, folder)
    assert begun.wait(120)
    assert not folder.exists() and job.open(folder) is None
    unfinished = next(tmp_path.glob(".cache.*.building"))
    job.cache(folder)
    assert unfinished.is_dir(), "its writer still lives"
    process.kill()
    process.join()
    truncate(folder / "sentence.npy")
    job.cache(folder)
    assert list(tmp_path.iterdir()) == [folder] and job.open(folder) is not None


def test_a_full_disk_is_told_before_the_teacher_goes_on(job, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"No space left .*cache"):
        build_cache(job.distiller, job.sentences, tmp_path / "cache", job.identity, CPU)
    assert list(tmp_path.iterdir()) == []


def test_the_teachers_digest_is_of_what_makes_its_vectors(encoder_folder, labse_folder, tmp_path):
    digest = teacher_digest(load_encoder(str(encoder_folder)))
    teacher = load_encoder(str(shutil.copytree(encoder_folder, tmp_path / "copy")))
    teacher.max_seq_length = 16
    torch.nn.init.normal_(teacher[0].auto_model.pooler.dense.weight)
    assert teacher_digest(teacher) == digest
    others = [teacher_digest(load_encoder(str(labse_folder)))]
    with torch.no_grad():
        teacher[0].auto_model.encoder.layer[3].output.dense.bias[5] += 1e-6
    others.append(teacher_digest(teacher))
    teacher[0].auto_model.config.layer_norm_eps = 1e-5
    others.append(teacher_digest(teacher))
    teacher[1].pooling_mode = "cls"
    others.append(teacher_digest(teacher))
    assert len({digest, *others}) == 5


def test_the_configuration_takes_true_false_or_a_folder(encoder_folder):
    assert TrainingConfig().teacher_cache is False and TrainingConfig(teacher_cache=True).teacher_cache is True
    assert TrainingConfig(teacher_cache="caches/minilm").teacher_cache == Path("caches/minilm")
    assert TrainingConfig(teacher_cache="caches").model_dump(mode="json")["teacher_cache"] == "caches"
    values = {"name": "a", "teacher": {"model": "m"}, "corpus": {"sources": [{"kind": "phrasebook"}]}}
    with pytest.raises(ConfigurationError, match=r"teacher_cache: must be true, false or a folder \(got 3\)"):
        validate({**values, "objectives": [{"kind": "cosine"}], "teacher_cache": 3})
