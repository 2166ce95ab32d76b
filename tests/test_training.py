"""Distiller and trainer on tiny models: what is learnt, logged, saved, resumed and refused."""

import numpy as np
import pytest
import torch

from distillabse.config import (
    CosineObjective,
    DenseStudentConfig,
    HiddenObjective,
    JobConfig,
    MiniLMObjective,
    MiniLMv2Objective,
    RoutingObjective,
    SwitchStudentConfig,
    TeacherConfig,
)
from distillabse.errors import ConfigurationError, TrainingError
from distillabse.models.student import build_student
from distillabse.models.teacher import load_encoder, load_teacher, transformer_of
from distillabse.models.tokens import tokenise
from distillabse.settings import training_arguments
from distillabse.training.cache import cache_identity, teacher_cache
from distillabse.training.data import PaddingCollator, TokenisedSentences, tokenised_sentences
from distillabse.training.distillation import distill, held_out_fidelity
from distillabse.training.distiller import Distiller
from distillabse.training.trainer import DistillationTrainer

OBJECTIVES = [CosineObjective(), MiniLMObjective(weight=0.5), MiniLMv2Objective(relation_heads=8, weight=0.1)]
WORDS = """the man woman dog cat house city walk run small big old red blue water tree night day hand friend
book""".split()


def corpus(n, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(3, 12))) for _ in range(n)]


def job(folder, **training):
    return JobConfig.model_validate(
        {
            "name": "tiny",
            "teacher": {"model": str(folder)},
            "corpus": {"sources": [{"kind": "phrasebook"}]},
            "student": {"layers": 2},
            "objectives": [{"kind": "cosine"}, {"kind": "minilm_v2", "relation_heads": 8, "weight": 0.1}],
            "training": {
                "per_device_train_batch_size": 8,
                "learning_rate": 2e-3,
                "max_steps": 12,
                "logging_steps": 2,
                "eval_steps": 6,
                "save_steps": 6,
                "bf16": False,
                "report_to": [],
                **training,
            },
        }
    )


def train(config, folder, output, checkpoint=None, texts=None):
    teacher = load_teacher(TeacherConfig(model=str(folder)))
    student = build_student(teacher, config.student)
    held_out = held_out_fidelity(teacher, corpus(40, seed=1))
    arguments = training_arguments(config, output)
    text = tokenised_sentences(teacher, texts or corpus(96))
    return student, distill(config, teacher, student, text, held_out, arguments, checkpoint)


def batch_of(encoder, texts):
    return PaddingCollator(0)([{"input_ids": row} for row in tokenise(encoder, texts)])


def test_loss_is_the_weighted_sum_of_its_terms_and_the_teacher_is_not_saved(encoder_folder, sentences):
    teacher = load_teacher(TeacherConfig(model=str(encoder_folder)))
    student = build_student(teacher, DenseStudentConfig(layers=2))
    distiller = Distiller(student, teacher, OBJECTIVES)
    batch = batch_of(student, sentences)
    outputs = distiller(**batch)
    assert set(outputs["terms"]) == {"cosine", "minilm/attention", "minilm/value"} | {
        f"minilm_v2/{r}" for r in ("qq", "kk", "vv")
    }
    torch.testing.assert_close(outputs["loss"].detach(), sum(outputs["terms"].values()))
    doubled = Distiller(student, teacher, [MiniLMObjective(weight=1.0)])(**batch)["terms"]
    torch.testing.assert_close(doubled["minilm/value"], 2 * outputs["terms"]["minilm/value"])
    assert all(key.startswith("student.") for key in distiller.state_dict())
    outputs["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    trained = [name for name, parameter in student.named_parameters() if parameter.grad is not None]
    assert any("word_embeddings" in name for name in trained) and any("layer.1" in name for name in trained)


def test_a_student_with_every_layer_starts_at_zero_loss(encoder_folder, sentences):
    teacher = load_teacher(TeacherConfig(model=str(encoder_folder)))
    student = build_student(teacher, DenseStudentConfig(layers=4))
    distiller = Distiller(student, teacher, [*OBJECTIVES, HiddenObjective()])
    assert distiller(**batch_of(student, sentences))["loss"].item() == pytest.approx(0, abs=1e-5)


def test_teacher_moves_with_the_distiller_and_stays_in_evaluation_mode(encoder_folder):
    teacher = load_teacher(TeacherConfig(model=str(encoder_folder)))
    distiller = Distiller(build_student(teacher, DenseStudentConfig(layers=2)), teacher, OBJECTIVES)
    distiller.train()
    assert not teacher.training and distiller.student.training
    distiller.double()
    assert next(teacher.parameters()).dtype == torch.float64


def test_training_raises_held_out_fidelity_and_logs_every_term(encoder_folder, tmp_path):
    config = job(encoder_folder, max_steps=60, eval_steps=30, save_steps=30)
    student, history = train(config, encoder_folder, tmp_path)
    skills = [entry["eval_skill"] for entry in history["log"] if "eval_skill" in entry]
    assert len(skills) == 2 and skills[-1] > skills[0]
    untrained = build_student(load_teacher(config.teacher), config.student).eval()
    measure = held_out_fidelity(load_teacher(config.teacher), corpus(40, seed=1))
    assert measure(student)["skill"] > measure(untrained)["skill"] + 0.05
    assert measure(student)["skill"] == pytest.approx(max(skills), abs=1e-5)
    logged = [entry for entry in history["log"] if "loss" in entry]
    terms = {"cosine", "minilm_v2/qq", "minilm_v2/kk", "minilm_v2/vv"}
    assert all(terms <= entry.keys() for entry in logged)
    assert logged[0]["loss"] == pytest.approx(sum(logged[0][term] for term in terms), rel=1e-3)
    assert logged[-1]["cosine"] < logged[0]["cosine"]
    assert history["steps"] == 60 and history["precision"] == "fp32"


SWITCH = {"kind": "switch", "layers": 2, "experts": 4, "sparse_layers": "all", "expert_dropout": 0.1}


@pytest.mark.parametrize("student", [{"layers": 2}, SWITCH])
def test_resuming_equals_no_interruption(encoder_folder, tmp_path, student):
    """Jitter and dropout included: the random numbers go on where they were."""
    config = job(encoder_folder)
    if student is SWITCH:
        routed = {"student": SwitchStudentConfig(**SWITCH), "objectives": [*config.objectives, RoutingObjective()]}
        config = config.model_copy(update=routed)
    whole, _ = train(config, encoder_folder, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    resumed, history = train(config, encoder_folder, tmp_path / "resumed", str(checkpoint))
    assert history["resumed_from"] == "checkpoint-6"
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_is_a_student_that_sentence_transformers_loads(encoder_folder, tmp_path, sentences):
    train(job(encoder_folder, load_best_model_at_end=False), encoder_folder, tmp_path)
    student = load_encoder(str(tmp_path / "checkpoint-12"))
    assert student.encode(sentences).shape == (len(sentences), 32)
    assert not (tmp_path / "checkpoint-12" / "training_args.bin").exists()


def test_cached_teacher_signals_are_the_live_ones(encoder_folder, tmp_path, sentences):
    teacher = load_teacher(TeacherConfig(model=str(encoder_folder)))
    distiller = Distiller(
        build_student(teacher, DenseStudentConfig(layers=2)), teacher, [*OBJECTIVES, HiddenObjective()]
    )
    dataset = tokenised_sentences(teacher, sentences)
    identity = cache_identity(distiller, dataset, bf16=False)
    cache = teacher_cache(distiller, dataset, tmp_path / "cache", identity, torch.device("cpu"))
    batch = PaddingCollator(0, cache=cache)([dataset[row] for row in (5, 2, 0)])
    cached = distiller(**batch)
    live = distiller(batch["input_ids"], batch["attention_mask"])
    assert cached["terms"].keys() == live["terms"].keys()
    for name, term in live["terms"].items():
        assert cached["terms"][name].item() == pytest.approx(term.item(), rel=2e-3, abs=1e-4), name


def test_training_with_a_cache_follows_training_without(encoder_folder, tmp_path):
    losses = []
    for cached in (False, True):
        config = job(encoder_folder)
        config.teacher_cache = cached
        _, history = train(config, encoder_folder, tmp_path / str(cached))
        losses.append([entry["loss"] for entry in history["log"] if "loss" in entry])
        assert (tmp_path / str(cached) / "teacher-cache").exists() == cached
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-3)


def test_a_cache_at_a_path_stays_and_spares_the_next_job_its_teacher(encoder_folder, tmp_path, monkeypatch):
    losses, calls = [], []
    run = Distiller.teacher_signals
    monkeypatch.setattr(Distiller, "teacher_signals", lambda self, **batch: calls.append(1) or run(self, **batch))
    for number, layers in enumerate((2, 2, 1)):
        config = job(encoder_folder, eval_steps=100, save_steps=100, load_best_model_at_end=False)
        config.teacher_cache = tmp_path / "shared"
        config.student.layers = layers
        _, history = train(config, encoder_folder, tmp_path / str(number))
        losses.append([entry["loss"] for entry in history["log"] if "loss" in entry])
        assert len(calls) == 1  # 96 sentences are one batch of the teacher's
    assert losses[0] == losses[1] != losses[2]
    assert not (tmp_path / "0" / "teacher-cache").exists()


def test_epochs_end_when_every_sentence_was_seen_that_often(encoder_folder, tmp_path, monkeypatch):
    seen = []
    read = TokenisedSentences.__getitems__
    monkeypatch.setattr(TokenisedSentences, "__getitems__", lambda self, rows: seen.extend(rows) or read(self, rows))
    config = job(encoder_folder, max_steps=-1, num_train_epochs=2, eval_steps=8, save_steps=8)
    _, history = train(config, encoder_folder, tmp_path, texts=corpus(61))
    counts = np.bincount(seen, minlength=61)
    assert history["steps"] == 16 and counts.sum() == 128  # 15.25 batches of 8
    assert counts.min() == 2 and counts.max() == 3
    seen.clear()
    _, history = train(config, encoder_folder, tmp_path / "resumed", str(tmp_path / "checkpoint-8"), corpus(61))
    assert history["steps"] == 16 and (counts - np.bincount(seen, minlength=61) >= 0).all() and len(seen) == 64


def test_frozen_embeddings_stay_the_teachers(encoder_folder, tmp_path):
    config = job(encoder_folder)
    config.student.freeze_embeddings = True
    student, _ = train(config, encoder_folder, tmp_path)
    teacher = load_teacher(config.teacher)
    for name, parameter in transformer_of(student).named_parameters():
        same = torch.equal(parameter, dict(transformer_of(teacher).named_parameters()).get(name, torch.empty(0)))
        assert same == (name.startswith(("embeddings.", "pooler."))), name


def test_accumulating_two_batches_equals_one_of_twice_the_size(encoder_folder, tmp_path):
    texts = ["the red dog", "a big cat", "the old man", "my blue house"] * 8  # all of one length: the same mean
    results = []
    for size, accumulation in ((8, 1), (4, 2)):
        config = job(
            encoder_folder, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=4,
            eval_strategy="no", save_strategy="no", load_best_model_at_end=False, logging_steps=1,
        )  # fmt: skip
        _, history = train(config, encoder_folder, tmp_path / str(size), texts=texts)
        results.append([entry["loss"] for entry in history["log"] if "loss" in entry])
    assert len(results[0]) == 4
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


def test_a_loss_that_is_no_number_stops_and_leaves_the_last_checkpoint(encoder_folder, tmp_path):
    config = job(encoder_folder, learning_rate=1e30, max_grad_norm=0, warmup_steps=0, save_steps=4, eval_steps=4)
    with pytest.raises(TrainingError, match=r"no longer a number .*learning_rate"):
        train(config, encoder_folder, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_early_stopping_on_held_out_skill(encoder_folder, tmp_path):
    config = job(encoder_folder, learning_rate=1e-12, max_steps=40, eval_steps=4, save_steps=4)
    config.early_stopping = {"patience": 2, "threshold": 0.001}
    _, history = train(config, encoder_folder, tmp_path)
    assert history["steps"] == 12


def test_several_gpus_are_refused_with_the_remedy(encoder_folder, tmp_path):
    config = job(encoder_folder)
    teacher = load_teacher(config.teacher)
    distiller = Distiller(build_student(teacher, config.student), teacher, OBJECTIVES)
    arguments = training_arguments(config, tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(ConfigurationError, match=r"2 GPUs .*CUDA_VISIBLE_DEVICES=0"):
        DistillationTrainer(distiller, arguments, tokenised_sentences(teacher, ["one", "two"]))


def test_tokens_are_those_of_encode(encoder_folder, sentences):
    teacher = load_teacher(TeacherConfig(model=str(encoder_folder)))
    rows = tokenise(teacher, sentences)
    assert rows == [teacher.tokenizer(text)["input_ids"] for text in sentences]
    dataset = tokenised_sentences(teacher, sentences)
    assert [row["input_ids"].tolist() for row in dataset.__getitems__(range(len(rows)))] == rows
    assert len(tokenise(teacher, ["dog " * 500])[0]) == 64


def test_padding_collator():
    batch = PaddingCollator(9, multiple_of=4)([{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [6, 9, 9, 9, 9, 9, 9, 9]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 1]


def test_a_dev_split_of_one_sentence_is_refused(encoder_folder):
    with pytest.raises(ConfigurationError, match=r"corpus\.split\.dev"):
        held_out_fidelity(load_teacher(TeacherConfig(model=str(encoder_folder))), ["one"])
