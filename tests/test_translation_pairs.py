"""Training on translation pairs: what each model reads, what is learnt from what, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from tiny import JOB_WORDS, tiny_encoder

from distillabse.config import (
    DenseStudentConfig,
    FeatureObjective,
    JobConfig,
    MultilingualObjective,
    StaticWarmupConfig,
    StructureLevelObjective,
    TeacherConfig,
)
from distillabse.corpus.records import Record, Sentence, known_texts, read_records, sentences
from distillabse.errors import ConfigurationError, InputError
from distillabse.evaluation.sets import texts_for_speed
from distillabse.models.student import build_student
from distillabse.models.teacher import load_base, load_teacher, training_teacher, transformer_of
from distillabse.models.tokens import tokenise
from distillabse.pipeline import run_job
from distillabse.settings import training_arguments, validate
from distillabse.storage import read_json
from distillabse.training.cache import cache_identity, teacher_cache
from distillabse.training.distillation import distill, held_out_fidelity
from distillabse.training.distiller import Distiller
from distillabse.training.pairs import PairCollator, TranslationPairs, prepare_pairs
from distillabse.training.static_warmup import StaticModel, warm_up_table
from distillabse.vocabulary.making import make_tokenizer, with_tokenizer

CPU = torch.device("cpu")
# A language that the teacher's tokenizer does not know: every word backwards and in other letters.
LETTERS = str.maketrans("abcdefghijklmnopqrstuvwxyz", "აბგდევზთიკლმნოპჟრსტუფქღყშჩ")
PAIRS = [
    Record("the dog", "en", "ძაღლი", "ka"),
    Record("the cat", "en", "კატა", "ka"),
    Record("the dog", "en", "der Hund", "de"),
    Record("a dog", "en", "the dog", "xx"),
]


def translated(text):
    return " ".join(word[::-1] for word in text.split()).translate(LETTERS)


def corpus(n, seed=0):
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(JOB_WORDS, size=random.integers(2, 9))) for _ in range(n)]
    return [Record(text, "en", translated(text), "ka") for text in texts]


@pytest.fixture(scope="module")
def teacher(encoder_folder):
    return load_teacher(TeacherConfig(model=str(encoder_folder)))


@pytest.fixture(scope="module")
def base(teacher):
    """The teacher with a tokenizer that knows both languages."""
    texts = [side for record in corpus(400) for side in (record.text, record.translation)]
    return with_tokenizer(teacher, make_tokenizer(texts, 300, "wordpiece", True), seed=0)


def pairs_of(student, teacher, records, folder, both=False, languages=("en",), distinct=True):
    return prepare_pairs(student, teacher, lambda: records, folder, both, languages, distinct)


def texts_of(encoder, ids):
    return [encoder.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


# What is stored


def test_each_text_is_stored_once_and_sources_come_first(teacher, tmp_path):
    pairs = pairs_of(teacher, teacher, PAIRS, tmp_path / "pairs")
    assert len(pairs) == 4 and len(pairs.student) == 6 and len(pairs.teacher) == 3
    sources = [item["input_ids"].tolist() for item in pairs.teacher.__getitems__([0, 1, 2])]
    assert sources == tokenise(teacher, ["the dog", "the cat", "a dog"])
    assert pairs.pair_rows(np.arange(4)).tolist() == [[0, 3], [1, 4], [0, 5], [2, 0]]
    assert pairs[2]["source"].tolist() == tokenise(teacher, ["the dog"])[0]
    assert pairs[2]["translation"].tolist() == tokenise(teacher, ["der Hund"])[0]
    expected = [max(map(len, tokenise(teacher, [record.text, record.translation]))) for record in PAIRS]
    assert pairs.lengths(np.arange(4)).tolist() == expected


def test_a_streamed_corpus_gives_the_same_pairs(teacher, tmp_path):
    once = pairs_of(teacher, teacher, PAIRS, tmp_path / "once")
    streamed = pairs_of(teacher, teacher, PAIRS, tmp_path / "streamed", distinct=False)
    assert len(streamed.student) == 8 and len(streamed.teacher) == 4
    for number in range(4):
        for side in ("source", "translation"):
            assert once[number][side].tolist() == streamed[number][side].tolist()


def test_a_teacher_of_both_sides_reads_every_text(teacher, tmp_path):
    assert len(pairs_of(teacher, teacher, PAIRS, tmp_path / "pairs", both=True).teacher) == 6


def test_rows_that_are_no_pairs_and_unknown_sources_are_refused(teacher, tmp_path):
    for distinct in (True, False):
        with pytest.raises(ConfigurationError, match="sentences without translation"):
            pairs_of(teacher, teacher, [*PAIRS, Record("alone", "en")], tmp_path / "a", distinct=distinct)
        with pytest.raises(ConfigurationError, match=r"'sw'.*does not know.*teacher\.languages: en"):
            pairs_of(teacher, teacher, [*PAIRS, Record("mbwa", "sw", "dog", "en")], tmp_path / "b", distinct=distinct)
    assert not list(tmp_path.iterdir())
    pairs_of(teacher, teacher, [Record("mbwa", "sw", "dog", "en")], tmp_path / "c", languages=None)


def test_a_damaged_folder_is_refused(teacher, tmp_path):
    pairs_of(teacher, teacher, PAIRS, tmp_path / "pairs")
    (tmp_path / "pairs" / "pairs.bin").unlink()
    with pytest.raises(InputError, match="is not whole"):
        TranslationPairs.open(tmp_path / "pairs")


# What a batch holds


def test_a_batch_holds_sources_then_translations_and_what_the_teacher_reads(teacher, base, tmp_path):
    student = build_student(base, DenseStudentConfig(layers=1))
    pairs = pairs_of(student, teacher, corpus(5), tmp_path / "pairs")
    batch = PairCollator(pairs, student.tokenizer.pad_token_id, teacher.tokenizer.pad_token_id, False)(
        pairs.__getitems__([3, 1])
    )
    wanted = [corpus(5)[3], corpus(5)[1]]
    assert texts_of(student, batch["input_ids"]) == [r.text for r in wanted] + [r.translation for r in wanted]
    assert texts_of(teacher, batch["teacher_input_ids"]) == [r.text for r in wanted]
    assert batch["attention_mask"].sum(1).tolist() == [
        len(ids) for ids in tokenise(student, [r.text for r in wanted] + [r.translation for r in wanted])
    ]


def test_links_of_a_batch_name_their_pair(teacher, tmp_path):
    pairs = pairs_of(teacher, teacher, PAIRS, tmp_path / "pairs")
    spans = np.arange(18, dtype=np.int32)
    pairs.link_starts, pairs.link_spans = np.array([0, 1, 1, 3, 3]), spans
    batch = PairCollator(pairs, 0, 0, False)(pairs.__getitems__([2, 1, 0]))
    assert batch["links"].tolist() == [[0, *spans[6:12]], [0, *spans[12:]], [2, *spans[:6]]]


# What is learnt


def test_the_loss_is_that_of_the_formula(teacher, base, tmp_path):
    student = build_student(base, DenseStudentConfig(layers=1)).eval()
    records = corpus(6)
    pairs = pairs_of(student, teacher, records, tmp_path / "pairs")
    collator = PairCollator(pairs, student.tokenizer.pad_token_id, teacher.tokenizer.pad_token_id, False)
    outputs = Distiller(student, teacher, [MultilingualObjective(weight=2.0)])(**collator(pairs.__getitems__(range(6))))
    target = teacher.encode([record.text for record in records])
    source = student.encode([record.text for record in records])
    translation = student.encode([record.translation for record in records])
    expected = 2 * (((target - source) ** 2).sum(1) + ((target - translation) ** 2).sum(1)).mean()
    assert outputs["loss"].item() == pytest.approx(float(expected), rel=1e-5)
    outputs["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert transformer_of(student).embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_an_objective_of_sources_gets_no_translations_of_the_teacher(teacher, base, tmp_path):
    student = build_student(base, DenseStudentConfig(layers=1)).eval()
    of_sources = [MultilingualObjective(), StructureLevelObjective()]
    terms = []
    for both, objectives in ((False, of_sources), (True, [*of_sources, FeatureObjective()])):
        pairs = pairs_of(student, teacher, corpus(6), tmp_path / f"pairs-{both}", both)
        collator = PairCollator(pairs, student.tokenizer.pad_token_id, teacher.tokenizer.pad_token_id, both)
        terms.append(Distiller(student, teacher, objectives)(**collator(pairs.__getitems__(range(6))))["terms"])
    assert len(terms[1]) == len(terms[0]) + 2
    for name, value in terms[0].items():
        assert terms[1][name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_weight_zero_leaves_a_term_out(teacher, tmp_path):
    used = Distiller(teacher, copy.deepcopy(teacher), [MultilingualObjective(), MultilingualObjective(weight=0)])
    assert len(used.objectives) == 1


def test_cached_vectors_give_the_same_loss(teacher, base, tmp_path):
    student = build_student(base, DenseStudentConfig(layers=1)).eval()
    pairs = pairs_of(student, teacher, corpus(20), tmp_path / "pairs")
    distiller = Distiller(student, teacher, [MultilingualObjective()])
    cache = teacher_cache(
        distiller, pairs.teacher, tmp_path / "cache", cache_identity(distiller, pairs.teacher, False), CPU
    )
    pads = student.tokenizer.pad_token_id, teacher.tokenizer.pad_token_id
    items = pairs.__getitems__([5, 2, 9])
    live = distiller(**PairCollator(pairs, *pads, False)(items))["loss"]
    cached = distiller(**PairCollator(pairs, *pads, False, cache=cache)(items))["loss"]
    assert cached.item() == pytest.approx(live.item(), abs=2e-3)
    assert cache.sentence.shape[0] == len(pairs.teacher) == len({record.text for record in corpus(20)})


def test_a_student_of_both_languages_is_trained_and_resumed_exactly(encoder_folder, base, tmp_path, caplog):
    config = job(tmp_path, encoder_folder)
    with caplog.at_level("INFO"):
        student, history = train(config, base, tmp_path / "whole")
    assert (history["pairs"], history["sentences"]) == (64, 128)
    # 8 steps of 8 pairs, both sides of each.
    assert history["sentences_per_second"] == pytest.approx(128 / history["training_seconds"], rel=0.1)
    assert "pairs/s" in caplog.text
    resumed, _ = train(config, base, tmp_path / "parted", checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    logged = [row["multilingual/translation"] for row in history["log"] if "multilingual/translation" in row]
    assert len(logged) == 8 and min(logged[4:]) < logged[0]


def job(folder, teacher, **blocks):
    return JobConfig.model_validate(
        {
            "name": "pairs",
            "output": str(folder / "runs"),
            "teacher": {"model": str(teacher), "languages": ["en"]},
            "corpus": {"sources": [source(folder)], "split": {"dev": 0.1, "test": 0.2}},
            "vocabulary": {"kind": "train", "size": 300, "algorithm": "wordpiece"},
            "student": {"layers": 1},
            "objectives": [{"kind": "multilingual"}],
            "training": {"max_steps": 8, "per_device_train_batch_size": 8, "bf16": False, "report_to": [],
                         "eval_steps": 4, "save_steps": 4, "logging_steps": 1, "learning_rate": 3e-3},
            "gates": {"int8_to_fp32_mean": 0.9, "teacher_skill": -100, "teacher_cosine_mean": -1},
            "evaluation": {"bootstrap_samples": 100},
            "bench": {"batch_sizes": [1], "rounds": 5, "seconds_per_round": 0.001, "threads": 1,
                      "interval": None, "cold_starts": 0, "throughput_runs": 1},
            **blocks,
        }
    )  # fmt: skip


def source(folder):
    table = folder / "pairs.tsv"
    if not table.is_file():
        rows = dict.fromkeys(f"{record.text}\t{record.translation}\tka" for record in corpus(300))
        table.write_text("\n".join(["en\txx\tlang", *rows]) + "\n", encoding="utf-8")
    return {"kind": "files", "path": str(table), "text": "en", "language": "en", "translation": "xx",
            "translation_language_column": "lang"}  # fmt: skip


def train(config, base, output, checkpoint=None):
    teacher = load_teacher(config.teacher)
    student = build_student(base, config.student)
    pairs = pairs_of(student, teacher, corpus(64), output.with_name(f"{output.name}-data"))
    dev = sentences(corpus(20, seed=1))
    held_out = held_out_fidelity(teacher, [sentence.text for sentence in dev], known_texts(dev, ["en"]))
    arguments = training_arguments(config, output)
    return student, distill(config, teacher, student, pairs, held_out, arguments, checkpoint)


# The table's own start


def test_the_table_learns_alone_and_the_layers_start_near_identity(teacher, base, tmp_path):
    student = build_student(base, DenseStudentConfig(layers=1, initialisation="random"))
    pairs = pairs_of(student, teacher, corpus(300), tmp_path / "pairs")
    distiller = Distiller(student, teacher, [MultilingualObjective()])
    cache = teacher_cache(
        distiller, pairs.teacher, tmp_path / "cache", cache_identity(distiller, pairs.teacher, False), CPU
    )
    before = copy.deepcopy(transformer_of(student).state_dict())
    config = StaticWarmupConfig(epochs=20, batch_size=32, learning_rate=0.03)
    losses = warm_up_table(student, pairs, cache, config, 7, CPU)
    assert losses[-1] < 0.5 * losses[0]
    after = transformer_of(student).state_dict()
    for name, weight in before.items():
        if name.endswith("output.dense.weight"):
            assert torch.allclose(after[name], 0.1 * weight)
        elif "word_embeddings" not in name:
            assert torch.equal(after[name], weight), name
    # The mean of a text's rows is near the teacher's vector of its source, in both languages.
    static = StaticModel(*after["embeddings.word_embeddings.weight"].shape, 32)
    static.table.weight.data.copy_(after["embeddings.word_embeddings.weight"])
    record = corpus(1)[0]
    for text in (record.text, record.translation):
        vector = static(torch.tensor(tokenise(student, [text])[0]), torch.tensor([0]))[0]
        assert float(vector.detach() @ torch.from_numpy(teacher.encode(record.text))) > 0.8
    again = build_student(base, DenseStudentConfig(layers=1, initialisation="random"))
    assert warm_up_table(again, pairs, cache, config, 7, CPU) == losses


def test_the_static_model_is_the_mean_of_rows():
    static = StaticModel(4, 2, 2)
    static.table.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]]))
    vectors = static(torch.tensor([2, 1, 1, 0]), torch.tensor([0, 3]))
    assert torch.allclose(vectors, torch.tensor([[3 / 13**0.5, 2 / 13**0.5], [1.0, 0.0]]))


def test_a_corpus_larger_than_asked_is_sampled_for_the_table(teacher, tmp_path):
    from distillabse.training.static_warmup import _examples

    pairs = pairs_of(teacher, teacher, corpus(100), tmp_path / "pairs")
    texts, targets = _examples(pairs, 20, np.random.default_rng(0))
    assert 10 < len(targets) <= 20 and len(texts.starts) == len(targets) + 1
    ids, starts = texts.gather(np.array([3, 0]))
    assert starts.tolist() == [0, int(texts.starts[4] - texts.starts[3])]
    assert ids.tolist() == [*texts.ids[texts.starts[3] : texts.starts[4]], *texts.ids[: texts.starts[1]]]


# The tokenizer made from the corpus


@pytest.mark.parametrize("algorithm", ["wordpiece", "unigram"])
def test_a_made_tokenizer_reads_what_the_teacher_cannot(algorithm, teacher):
    texts = [side for record in corpus(400) for side in (record.text, record.translation)]
    tokenizer = make_tokenizer(texts, 200, algorithm, True)
    assert tokenizer.get_vocab_size() <= 200
    unknown = tokenizer.token_to_id("[UNK]")
    encoding = tokenizer.encode(translated("the dog").upper())
    assert unknown not in encoding.ids and encoding.tokens[0] == "[CLS]" and encoding.tokens[-1] == "[SEP]"
    assert teacher.tokenizer.unk_token_id in tokenise(teacher, [translated("dog")])[0]
    assert tokenizer.decode(tokenizer.encode("the dog").ids) == "the dog"


def test_rows_of_a_new_table_come_from_the_base(teacher):
    texts = [side for record in corpus(400) for side in (record.text, record.translation)]
    tokenizer = make_tokenizer(texts, 300, "wordpiece", True)
    encoder = with_tokenizer(teacher, tokenizer, seed=0)
    old, new = (transformer_of(model).get_input_embeddings().weight for model in (teacher, encoder))
    vocabulary, own = tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    assert new.shape == (tokenizer.get_vocab_size(), old.shape[1])
    for token in ("[PAD]", "[CLS]", "dog", "##o"):
        if token in vocabulary:
            assert torch.equal(new[vocabulary[token]], old[own[token]]), token
    unknown = [token for token in vocabulary if not token.isascii()]
    assert unknown and not any((old == new[vocabulary[token]]).all(dim=1).any() for token in unknown)
    assert torch.equal(transformer_of(with_tokenizer(teacher, tokenizer, seed=0)).get_input_embeddings().weight, new)
    # A text of tokens that both know has the vector of the teacher.
    assert np.allclose(encoder.encode("dog"), teacher.encode("dog"), atol=1e-6)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigurationError, match=r"vocabulary\.size: 8 rows cannot hold"):
        make_tokenizer(["abcdefghijkl mnop"], 8, "wordpiece", True)


# Other encoders to start from


def test_a_plain_transformers_model_is_pooled_by_the_mean(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    encoder = load_teacher(TeacherConfig(model=str(tiny_encoder(tmp_path / "encoder", pooling="mean"))))
    transformer_of(encoder).save_pretrained(tmp_path / "plain")
    encoder.tokenizer.save_pretrained(tmp_path / "plain")
    config = validate(
        {
            **job(tmp_path, tmp_path / "encoder").model_dump(),
            "base_model": {"model": str(tmp_path / "plain"), "max_length": 16},
        }
    )
    base = load_base(config)
    assert base.max_seq_length == 16
    tokens = AutoTokenizer.from_pretrained(tmp_path / "plain")("the dog", return_tensors="pt")
    states = AutoModel.from_pretrained(tmp_path / "plain")(**tokens).last_hidden_state
    assert np.allclose(base.encode("the dog"), states.mean(1)[0].detach().numpy(), atol=1e-5)


# The job


def test_a_job_on_pairs_runs_to_its_bundle(encoder_folder, tmp_path):
    config = job(tmp_path, encoder_folder, teacher_cache=True, static_warmup={"epochs": 2, "batch_size": 32})
    run = run_job(config, until="verify")
    student = load_teacher(TeacherConfig(model=str(run.student)))
    assert student.tokenizer.unk_token_id not in tokenise(student, [translated("the dog")])[0]
    assert np.allclose(np.linalg.norm(student.encode(["the dog"])), 1, atol=1e-5)
    # Speed is measured on what both can read.
    assert texts_for_speed(config, run) == [s.text for s in _test_set(run) if s.language == "en"]
    # Held-out translations are compared with the teacher's vectors of their sources.
    teacher = training_teacher(config, run)
    chosen = [sentence for sentence in _test_set(run) if sentence.language == "ka"]
    cosines = (teacher.encode([s.source.text for s in chosen]) * student.encode([s.text for s in chosen])).sum(1)
    measured = read_json(run.verification)["fidelity"]["torch"]["test"]["slices"]["language"]["ka"]["cosine_mean"]
    assert measured == pytest.approx(float(cosines.mean()), abs=1e-4)


def _test_set(run):
    return sentences(read_records(run.split("test")))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"corpus": "monolingual"}, r"corpus\.sources\.0: the objectives learn from translation pairs"),
        ({"corpus": "swahili"}, r"corpus\.sources\.0: its sources are 'sw'"),
        (
            {"objectives": [{"kind": "multilingual"}, {"kind": "cosine"}]},
            "cosine needs the teacher's vectors of transl",
        ),
        ({"objectives": [{"kind": "cosine"}]}, "a student with a tokenizer of its own learns from translation pairs"),
        (
            {"objectives": [{"kind": "multilingual"}, {"kind": "minilm"}], "teacher": None},
            "minilm compares token by token",
        ),
        ({"student": {"kind": "teacher"}, "objectives": [{"kind": "multilingual"}]}, "nothing is trained"),
        ({"vocabulary": {"kind": "train"}}, "kind: train needs the number of rows"),
        ({"static_warmup": {}}, "static_warmup: it reads the teacher's vectors"),
        ({"assistant": {"student": {"layers": 2}, "objectives": [{"kind": "cosine"}]}}, "assistant: none can stand"),
        ({"objectives": [{"kind": "multilingual", "weight": 0}]}, "at least one objective"),
        (
            {"evaluation": {"sets": {"news": {"kind": "files", "path": "x.tsv", "language": "sv"}}}},
            r"evaluation\.sets\.news: its texts are 'sv'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(blocks, message, tmp_path):
    values = {**job(tmp_path, "nowhere").model_dump(mode="json"), **blocks}
    if values["corpus"] == "monolingual":
        values["corpus"] = {"sources": [{"kind": "files", "path": "x.tsv", "text": "en", "language": "en"}]}
    if values["corpus"] == "swahili":
        values["corpus"] = {"sources": [{"kind": "moses", "path": "x", "language": "sw", "translation_language": "en"}]}
    values["teacher"] = values["teacher"] or {"model": "nowhere"}
    with pytest.raises(ConfigurationError, match=message):
        validate(values)


def test_a_teacher_reads_the_source_of_what_it_does_not_know():
    dog = Sentence("the dog", "en")
    hund = Sentence("der Hund", "de", dog)
    assert known_texts([dog, hund], ["en"]) == ["the dog", "the dog"]
    assert known_texts([dog, hund], None) == ["the dog", "der Hund"]
    assert sentences([Record("the dog", "en", "der Hund", "de")]) == [dog, hund]
    with pytest.raises(InputError, match="does not know 'de'"):
        known_texts([Sentence("der Hund", "de")], ["en"])
