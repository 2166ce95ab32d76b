"""The shipped recipes for translation pairs, each from its first stage to its verified bundle on tiny stand-ins."""

import json

import numpy as np
import pytest
import torch
from tiny import JOB_WORDS, tiny_encoder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from distillabse.config import DenseStudentConfig, TeacherConfig
from distillabse.errors import ConfigurationError
from distillabse.models.reduction import load_reduction
from distillabse.models.student import build_student
from distillabse.models.teacher import encoder_settings, load_encoder, load_teacher, transformer_of
from distillabse.models.tokens import tokenise
from distillabse.pipeline import prepare, run_job
from distillabse.settings import load_config
from distillabse.storage import read_json

PAIRED = ("multilingual-minilm", "mmkd", "lealla-small", "labse-multilingual", "sbert-xlm-roberta")


def translated(text):
    """Other words of the same vocabulary, so that any tokenizer of it reads both languages."""
    return " ".join(JOB_WORDS[(JOB_WORDS.index(word) + 7) % len(JOB_WORDS)] for word in reversed(text.split()))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where teachers, a base model and pairs are, and the runs go."""
    place = tmp_path_factory.mktemp("recipes")
    random = np.random.default_rng(0)
    texts = dict.fromkeys(" ".join(random.choice(JOB_WORDS, size=random.integers(2, 8))) for _ in range(260))
    table = "\n".join(["en\txx", *(f"{text}\t{translated(text)}" for text in texts)]) + "\n"
    (place / "pairs.tsv").write_text(table, encoding="utf-8")
    tiny_encoder(place / "sbert", layers=2, hidden=48)
    tiny_encoder(place / "labse", layers=4, pooling="cls", dense=True)
    xlm_roberta(place / "xlm-roberta", list(texts))
    return place


def xlm_roberta(folder, texts):
    """A plain transformers model of 2 layers and width 32 with XLM-R's kind of tokenizer; nothing says how to pool."""
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(special_tokens=special, vocab_size=120, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*texts, "unused pieces: zebra quagga jigsaw quiz"], trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.add_special_tokens(["<mask>"])
    settings = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=68, initializer_range=0.2, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        XLMRobertaModel(settings).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, bos_token="<s>", cls_token="<s>", pad_token="<pad>",
        eos_token="</s>", sep_token="</s>", unk_token="<unk>", mask_token="<mask>",
    ).save_pretrained(folder)  # fmt: skip


def recipe(place, name, *overrides, job=None, teacher="labse"):
    """A shipped configuration with tiny models, 260 pairs and a few steps."""
    source = {"kind": "files", "path": str(place / "pairs.tsv"), "text": "en", "language": "en", "translation": "xx",
              "translation_language": "de"}  # fmt: skip
    values = {
        "name": job or name,
        "output": str(place / "runs"),
        "teacher.model": str(place / teacher),
        "corpus.sources": [source],
        "corpus.split": {"dev": 0.1, "test": 0.2},
        "training.max_steps": 6,
        "training.per_device_train_batch_size": 16,
        "training.warmup_steps": 1,
        "training.learning_rate": 2e-3,
        "training.bf16": False,
        "training.report_to": [],
        "training.logging_steps": 1,
        "training.eval_strategy": "steps",
        "training.save_strategy": "steps",
        "training.eval_steps": 3,
        "training.save_steps": 3,
        "training.dataloader_num_workers": 0,
        "gates": {"int8_to_fp32_mean": 0.9, "teacher_skill": -100, "teacher_cosine_mean": -1},
        "evaluation.bootstrap_samples": 100,
        "bench": {
            "device": "cpu",
            "batch_sizes": [1],
            "rounds": 5,
            "seconds_per_round": 0.001,
            "threads": 1,
            "interval": None,
            "cold_starts": 0,
            "throughput_runs": 1,
        },
    }
    return load_config(name, [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *overrides])


def logged(run):
    """The rows of the training log that hold losses."""
    return [row for row in read_json(run.training_history)["log"] if "loss" in row]


def finished(run):
    """The history of the training and what was verified."""
    verification = read_json(run.verification)
    assert all(gate["passed"] for gate in verification["gates"])
    return read_json(run.training_history), verification


# The recipes


def test_multilingual_minilm(place):
    run = run_job(
        recipe(place, "multilingual-minilm", "vocabulary.size=150", "student.layers=1", teacher="sbert"), until="verify"
    )
    history, _ = finished(run)
    assert history["steps"] == 6 and history["pairs"] > 100
    assert set(logged(run)[0]) > {"multilingual/source", "multilingual/translation"}


def test_mmkd_has_four_levels(place):
    small = ["vocabulary.size=150", "student.layers=2", "student.intermediate_size=64"]
    run = run_job(recipe(place, "mmkd", *small, teacher="sbert"), until="verify")
    finished(run)
    levels = {name.split("/")[0] for row in logged(run) for name in row if "/" in name or name == "token_level"}
    assert levels == {"multilingual", "token_level", "word_level", "structure_level"}
    assert logged(run)[-1]["loss"] < logged(run)[0]["loss"]
    assert all(row["token_level"] > 0 and row["word_level/to_source"] > 0 for row in logged(run))


def test_levels_are_switched_off_one_by_one(place):
    kinds = ["multilingual", "token_level", "word_level", "structure_level"]
    whole = load_config("mmkd")
    assert [objective.kind for objective in whole.objectives] == kinds
    for number, kind in enumerate(kinds):
        config = load_config("mmkd", [f"objectives.{number}.weight=0"])
        assert {o.kind for o in config.objectives if o.weight == 0} == {kind}
        others = [other for other in range(4) if other != number]
        assert [config.objectives[i] for i in others] == [whole.objectives[i] for i in others]
    small = ["vocabulary.size=150", "student.layers=1", "objectives.2.weight=0", "objectives[3].weight=0"]
    run = run_job(recipe(place, "mmkd", *small, teacher="sbert", job="two-levels"), until="distill")
    assert {"token_level", "multilingual/source"} < set(logged(run)[0])
    assert not any("word_level" in name or "structure" in name for name in logged(run)[0])


def test_lealla_is_deep_and_thin(place):
    thin = ["student.layers=6", "student.hidden_size=16", "student.attention_heads=4", "student.intermediate_size=32"]
    steps = ["training.learning_rate=5e-3", "training.max_steps=30", "training.eval_steps=15", "training.save_steps=15"]
    config = recipe(place, "lealla-small", *thin, *steps)
    run = run_job(config, until="verify")
    _, verification = finished(run)
    student = load_encoder(str(run.student))
    assert transformer_of(student).config.num_hidden_layers == 6  # its teacher has 4
    vectors = student.encode(["the dog", "house by the river"])
    assert vectors.shape == (2, 16) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # The map leads to all dimensions of the teacher, whose own vectors teach.
    from safetensors.numpy import load_file

    learnt = load_file(run.checkpoints / "checkpoint-30" / "objectives.safetensors")
    (weight,) = (value for name, value in learnt.items() if name.endswith("weight"))
    assert weight.shape == (32, 16)
    # It began with the directions that the student is measured by, and has changed.
    reduction = load_reduction(run.student)
    assert reduction.shape == (32, 16) and 0 < np.abs(weight - reduction).max() < 0.5
    # So the space it learns is that of these directions, and not one turned at random, and verify sees that.
    assert verification["reduction"]["dimension"] == 16
    measured = verification["fidelity"]["torch"]["test"]
    assert measured["cosine_mean"] > 0.6


def test_labse_multilingual_learns_vectors_and_relations(place):
    small = ["vocabulary.size=230", "student.layers=2", "objectives.1.relation_heads=8"]
    run = run_job(recipe(place, "labse-multilingual", *small), until="verify")
    finished(run)
    assert read_json(run.vocabulary_counts)["rows_kept"] <= 230
    student = load_encoder(str(run.student))
    assert student.get_embedding_dimension() == 32
    assert {"multilingual/source", "multilingual/translation", "minilm_v2/qq"} < set(logged(run)[0])


@pytest.mark.parametrize("vocabulary", ["trim", "keep"])
def test_xlm_roberta_meets_a_teacher_of_another_dimension(place, vocabulary):
    overrides = [f"base_model.model={place / 'xlm-roberta'}", "base_model.max_length=32", "student.layers=2",
                 "student.head=dense", f"vocabulary.kind={vocabulary}"]  # fmt: skip
    if vocabulary == "trim":
        overrides.append("vocabulary.coverage=0.99")
    config = recipe(place, "sbert-xlm-roberta", *overrides, job=f"xlm-{vocabulary}", teacher="sbert")
    run = run_job(config, until="verify")
    finished(run)
    student = load_encoder(str(run.student))
    model = transformer_of(student)
    assert type(model).__name__ == "XLMRobertaModel" and model.config.hidden_size == 32
    assert student.get_embedding_dimension() == 48
    whole = encoder_settings(config.base_model)["vocab_size"]
    assert (model.config.vocab_size < whole) == (vocabulary == "trim")
    assert student.tokenizer.unk_token_id not in tokenise(student, ["the dog"])[0][1:-1] or vocabulary == "trim"
    # The trained student reads with its own tokenizer, and gives the same from the folder as from the graph.
    from distillabse.encoder import Encoder

    texts = [" ".join(JOB_WORDS[:3]), JOB_WORDS[5]]
    graph = Encoder(run.bundle, file="onnx/model.onnx").encode(texts)
    np.testing.assert_allclose(graph, student.encode(texts), atol=1e-5)


# What the student starts from, where that is not the teacher


@pytest.fixture
def base(place):
    return load_teacher(TeacherConfig(model=str(place / "labse")))


@pytest.mark.parametrize(("hidden", "teacher"), [(32, 48), (32, 20), (16, 48)])
def test_a_dense_head_gives_the_dimension_that_is_asked_for(base, hidden, teacher, sentences):
    student = build_student(base, DenseStudentConfig(layers=2, hidden_size=hidden, head="dense"), dimension=teacher)
    assert student.get_embedding_dimension() == teacher
    weight = student[2].linear.weight.detach()
    assert weight.shape == (teacher, hidden)
    product = weight @ weight.T if teacher < hidden else weight.T @ weight
    torch.testing.assert_close(product, torch.eye(min(teacher, hidden)), atol=1e-5, rtol=0)
    assert student.eval().encode(sentences).shape == (len(sentences), teacher)


def test_the_head_of_the_base_is_kept_where_it_fits(base):
    student = build_student(base, DenseStudentConfig(layers=2, head="dense"), dimension=32)
    assert torch.equal(student[2].linear.weight, base[2].linear.weight)


def test_embeddings_alone_may_start_a_student_that_is_deeper_than_the_teacher(base):
    counts = np.arange(len(base.tokenizer))
    deep = DenseStudentConfig(layers=7, hidden_size=16, attention_heads=4, initialisation="embeddings")
    one, two = (transformer_of(build_student(base, deep, counts)) for _ in range(2))
    assert len(one.encoder.layer) == 7
    words = transformer_of(base).embeddings.word_embeddings.weight
    own = one.embeddings.word_embeddings.weight.detach()
    # Each row is the teacher's on orthonormal directions.
    basis = torch.linalg.lstsq(words.detach(), own).solution
    torch.testing.assert_close(basis.T @ basis, torch.eye(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(words.detach() @ basis, own, atol=1e-3, rtol=1e-3)
    assert torch.equal(own, two.embeddings.word_embeddings.weight)
    assert not torch.equal(one.encoder.layer[6].output.dense.weight, two.encoder.layer[6].output.dense.weight)
    with pytest.raises(ConfigurationError, match="wider than the teacher's 32"):
        build_student(base, DenseStudentConfig(hidden_size=64, initialisation="embeddings"))


def test_shapes_are_checked_against_what_the_student_starts_from(place):
    base_model = f"base_model.model={place / 'xlm-roberta'}"
    settings = encoder_settings(TeacherConfig(model=str(place / "xlm-roberta")))
    assert settings["hidden_size"] == 32 and settings["model_type"] == "xlm-roberta"
    # The teacher is 48 wide and heads of 48 / 5 would not fit; 3 layers would not fit into either.
    fits = recipe(place, "sbert-xlm-roberta", base_model, "student.layers=2", "student.attention_heads=8",
                  "student.initialisation=random", job="fits", teacher="sbert")  # fmt: skip
    prepare(fits)
    for refused, message in (
        (["student.layers=3"], "has only 2"),
        (["student.layers=2", "student.attention_heads=6"], "6 heads do not divide the hidden size 32"),
        (["student.layers=2", "student.hidden_size=40", "student.attention_heads=4"], "wider than the teacher's 32"),
    ):
        config = recipe(place, "sbert-xlm-roberta", base_model, *refused, job="refused", teacher="sbert")
        with pytest.raises(ConfigurationError, match=message):
            run_job(config)
        assert not config.run_folder.exists()
