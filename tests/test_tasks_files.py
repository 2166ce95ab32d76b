"""Tasks from files: what is read, and how clearly the rest is refused."""

from __future__ import annotations

import gzip
import sys

import numpy as np
import pytest
import yaml
from tiny import tiny_encoder, tiny_job

from distillabse.config import JobConfig, LabelledTable, ProbeTask, RetrievalTask, SimilarityTask, TasksConfig
from distillabse.errors import ConfigurationError, InputError
from distillabse.layout import RunFolder
from distillabse.settings import load_suite, shipped_suites
from distillabse.tasks.encoders import distil_static, is_static, open_encoder
from distillabse.tasks.languages import iso_639_1, labels, select
from distillabse.tasks.probe import load_probe
from distillabse.tasks.retrieval import load_retrieval
from distillabse.tasks.run import load_tasks, named_places, static_floor
from distillabse.tasks.similarity import ScoredPair, load_similarity


def table(path, *rows):
    text = "\n".join("\t".join(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def parallel(path, **keys):
    columns = {"text": "src", "language_column": "lang", "translation": "eng", "translation_language": "en"}
    return RetrievalTask.model_validate({"name": "pairs", "pairs": {"kind": "files", "path": path, **columns}, **keys})


def aligned(path, **keys):
    values = {"path": path, "id": "line", "language_column": "lang"}
    return RetrievalTask.model_validate({"name": "lines", "aligned": values, **keys})


HEADER = ("lang", "src", "eng")
GERMAN = [("deu", f"Satz {i}", f"sentence {i}") for i in range(5)]
LINES = [("eng", "1", "one"), ("eng", "2", "two"), ("eng", "3", "three"), ("deu", "2", "zwei"), ("deu", "1", "eins"),
         ("zho-CN", "3", "三"), ("zho-CN", "1", "一")]  # fmt: skip


def test_pairs_of_a_table_by_language(tmp_path):
    path = table(tmp_path / "t.tsv.gz", HEADER, *GERMAN, ("cmn", "你好", "hello"), ("cmn", "再见", "goodbye"))
    task = load_retrieval(parallel(path), 0)
    assert list(task.pairs) == ["de", "zh"]
    assert task.pairs["zh"] == [("你好", "hello"), ("再见", "goodbye")]
    only = load_retrieval(parallel(path, languages=["de"], max_pairs=3), 0)
    assert list(only.pairs) == ["de"] and len(only.pairs["de"]) == 3
    assert set(only.pairs["de"]) < set(task.pairs["de"])
    assert only.pairs == load_retrieval(parallel(path, languages=["deu"], max_pairs=3), 0).pairs


def test_one_bound_for_all_tasks_that_have_none(tmp_path):
    path = table(tmp_path / "t.tsv", HEADER, *GERMAN)
    tasks = [parallel(path), parallel(path, name="own", max_pairs=4)]
    sizes = [len(task.pairs["de"]) for task in load_tasks(TasksConfig(tasks=tasks, max_pairs=2), 0)]
    assert sizes == [2, 4]


def test_a_source_with_the_pivot_first_is_turned_round(tmp_path):
    path = table(tmp_path / "t.tsv", ("en", "xx"), ("one", "eins"), ("two", "zwei"))
    columns = {"text": "en", "language": "en", "translation": "xx", "translation_language": "de"}
    values = {"name": "pairs", "pairs": {"kind": "files", "path": path, **columns}}
    assert load_retrieval(RetrievalTask.model_validate(values), 0).pairs == {"de": [("eins", "one"), ("zwei", "two")]}
    with pytest.raises(InputError, match="one of them has to be the pivot language 'fr'"):
        load_retrieval(RetrievalTask.model_validate({**values, "pivot": "fr"}), 0)


def test_sentences_are_paired_by_id(tmp_path):
    path = table(tmp_path / "t.tsv", ("lang", "line", "text"), *LINES)
    task = load_retrieval(aligned(path), 0)
    assert task.pairs == {"de": [("zwei", "two"), ("eins", "one")], "zh": [("三", "three"), ("一", "one")]}
    german = load_retrieval(aligned(path, pivot="de", languages=["en"]), 0)
    assert german.pairs == {"en": [("one", "eins"), ("two", "zwei")]}


@pytest.mark.parametrize(
    ("rows", "keys", "words"),
    [
        ([*LINES, ("deu", "1", "noch eins")], {}, "several rows with line '1' in 'deu'"),
        (LINES, {"pivot": "fr"}, "has 0 languages 'fr', of eng, deu, zho-CN"),
        (LINES, {"languages": ["fr"]}, "no rows in 'fr'. Languages found: deu, zho-CN"),
        ([*LINES, ("xyz", "1", "?"), ("xyz", "2", "?")], {}, "unknown language 'xyz'"),
        ([*LINES, ("fra", "1", "un")], {}, "1 rows in 'fra'; at least two are needed"),
        ([*LINES, ("fra", "1", " ")], {}, "line 9: the column 'text' is empty"),
        ([*LINES, ("fra", "1")], {}, "line 9: wrong number of columns"),
        ([*LINES, ("zho_CN", "1", "一"), ("zho_CN", "3", "三")], {}, "two names of one language"),
    ],
)
def test_a_table_that_is_not_aligned_is_named(tmp_path, rows, keys, words):
    path = table(tmp_path / "t.tsv", ("lang", "line", "text"), *rows)
    with pytest.raises(InputError, match=r"tasks: lines|t.tsv") as error:
        load_retrieval(aligned(path, **keys), 0)
    assert words in str(error.value)


def test_a_missing_column_an_empty_file_and_no_file_are_named(tmp_path):
    path = table(tmp_path / "t.tsv", ("lang", "number", "text"), ("de", "1", "eins"))
    with pytest.raises(InputError, match=r"has no column 'line'. Columns found: 'lang', 'number', 'text'"):
        load_retrieval(aligned(path), 0)
    empty = table(tmp_path / "empty.tsv", ("lang", "line", "text"))
    with pytest.raises(InputError, match=r"empty.tsv is empty. Columns wanted: 'line', 'text', 'lang'"):
        load_retrieval(aligned(empty), 0)
    with pytest.raises(InputError, match="No file matches"):
        load_retrieval(aligned(str(tmp_path / "nothing.tsv")), 0)
    broken = table(tmp_path / "broken.tsv", HEADER, *GERMAN, ("deu", "", "nothing"))
    with pytest.raises(InputError, match=r"tasks: pairs: .*broken.tsv, line 7: empty text"):
        load_retrieval(parallel(broken), 0)


def test_scores_are_numbers(tmp_path):
    header = ("lang", "sentence1", "sentence2", "score")
    rows = [("en", "a", "b", "5.0"), ("en", "c", "d", "1"), ("de", "e", "f", "5"), ("de", "g", "h", "1")]
    values = {"name": "sts", "table": {"path": table(tmp_path / "t.tsv", header, *rows), "language_column": "lang"}}
    task = load_similarity(SimilarityTask.model_validate(values), 0)
    assert task.pairs["en"] == [ScoredPair("a", "b", 5.0), ScoredPair("c", "d", 1.0)]
    for bad in ("high", "nan"):
        table(tmp_path / "t.tsv", header, *rows, ("en", "i", "j", bad))
        with pytest.raises(InputError, match=f"the score '{bad}', which is not a number"):
            load_similarity(SimilarityTask.model_validate(values), 0)


def test_languages_that_are_not_aligned_are_told_of(tmp_path, caplog):
    rows = [("en", "a", "b", "5"), ("en", "c", "d", "1"), ("de", "e", "f", "1"), ("de", "g", "h", "5")]
    path = table(tmp_path / "t.tsv", ("lang", "sentence1", "sentence2", "score"), *rows)
    load_similarity(
        SimilarityTask.model_validate({"name": "sts", "table": {"path": path, "language_column": "lang"}}), 0
    )
    assert "rows in de do not have the scores of those in en" in caplog.text


def probe(path, **train):
    keys = {"path": path, "language": "en"}
    where = {"train": {"where": {"split": "train"}, **train}, "test": {"where": {"split": "test"}}}
    return ProbeTask(name="intents", **{side: LabelledTable(**keys, **where[side]) for side in where})


def test_probes_read_their_rows_by_split(tmp_path, caplog):
    rows = [("train", "x", "a"), ("train", "y", "b"), ("test", "x", "c"), ("test", "z", "d")]
    path = table(tmp_path / "t.tsv", ("split", "label", "text"), *rows)
    task = load_probe(probe(path), 0)
    assert task.train == [("a", "x"), ("b", "y")] and task.test == {"en": [("c", "x"), ("d", "z")]}
    assert "classes without a train row are never right: z" in caplog.text
    with pytest.raises(InputError, match="the train rows have one class, 'x'"):
        load_probe(probe(path, where={"label": "x"}), 0)
    with pytest.raises(InputError, match=r"no row of .* passes where: {'split': 'dev'}"):
        load_probe(probe(path, where={"split": "dev"}), 0)
    with pytest.raises(InputError, match="no class of the test rows"):
        load_probe(probe(path, label="text"), 0)


@pytest.mark.parametrize(
    ("code", "iso"),
    [("deu", "de"), ("zho-CN", "zh"), ("cmn", "zh"), ("arb_Arab", "ar"), ("pes", "fa"), ("tgl", "tl"), ("swh", "sw"),
     ("EN", "en"), ("nb", "nb"), ("xx", None), ("", None)],
)  # fmt: skip
def test_codes_become_iso_639_1(code, iso):
    assert iso_639_1(code) == iso


def test_two_scripts_of_one_language_stay_apart():
    assert labels(["zho_Hans", "zho_Hant", "deu_Latn"], "x") == {
        "zho_Hans": "zh-Hans", "zho_Hant": "zh-Hant", "deu_Latn": "de",
    }  # fmt: skip
    assert select(["zho_Hans", "zho_Hant"], ["zh"], "x") == {"zho_Hans": "zh-Hans", "zho_Hant": "zh-Hant"}
    assert select(["zho_Hans", "zho_Hant"], ["zh-Hant"], "x") == {"zho_Hant": "zh-Hant"}


def test_shipped_suites_are_valid_and_a_suite_of_ones_own_is_read(tmp_path):
    assert list(shipped_suites()) == ["evaluation-data"]
    names = [task.name for task in load_suite("evaluation-data")]
    assert names == ["tatoeba", "ntrex", "flores", "stsb", "banking77", "emotion", "massive"]
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"tasks": [aligned("x.tsv").model_dump()]}))
    assert load_suite(own) == [aligned("x.tsv")]
    own.write_text(yaml.safe_dump({"tasks": [{"kind": "retrieval", "name": "x", "pares": 1}]}))
    with pytest.raises(ConfigurationError, match=r"tasks\.0\.pares: no such key \(did you mean 'pairs'\?\)"):
        load_suite(own)
    with pytest.raises(ConfigurationError, match=r"neither a file nor a shipped suite of tasks.*evaluation-data"):
        load_suite("evaluation")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "retrieval", "name": "x"}, "exactly one of pairs and aligned"),
        ({"kind": "retrieval", "name": "x", "pairs": {"kind": "phrasebook"}}, "text to train on"),
        (
            {"kind": "retrieval", "name": "x", "pairs": {"kind": "files", "path": "x", "language": "de"}},
            "name the column of the translations",
        ),
        ({"kind": "similarity", "name": "x", "table": {"path": "x"}}, "exactly one of language and language_column"),
    ],
)
def test_a_task_that_says_too_little_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        TasksConfig(tasks=[values])


def test_tasks_are_chosen_by_name(tmp_path):
    path = table(tmp_path / "t.tsv", ("lang", "line", "text"), *LINES)
    config = TasksConfig(tasks=[aligned(path), aligned("nothing.tsv", name="other")])
    assert [task.name for task in load_tasks(config, 0, ["lines"])] == ["lines"]
    with pytest.raises(ConfigurationError, match=r"--only line: no such task. This job's tasks: lines, other"):
        load_tasks(config, 0, ["line"])
    with pytest.raises(ConfigurationError, match="several tasks are named lines"):
        load_tasks(TasksConfig(tasks=[aligned(path), aligned(path)]), 0)
    with pytest.raises(ConfigurationError, match=r"tasks.suite=evaluation-data"):
        load_tasks(TasksConfig(), 0)


@pytest.mark.parametrize("given", [["x"], ["=x"], ["x="], ["x=a", "x=b"]])
def test_encoders_to_compare_with_have_a_name_and_a_place(given):
    with pytest.raises(ConfigurationError, match="--against"):
        named_places(given)


def test_encoders_are_opened_by_what_they_are(tmp_path):
    folder = tiny_encoder(tmp_path / "encoder")
    assert open_encoder(str(folder)).encode(["the dog"]).shape == (1, 32)
    with pytest.raises(InputError, match="neither a local folder nor"):
        open_encoder("nobody/nothing")
    with pytest.raises(InputError, match="There is no bundle"):
        open_encoder(str(tmp_path / "bundle" / "onnx" / "model.onnx"))


def test_a_static_encoder_is_opened_without_model2vec(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "dog": 1, "cat": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.array([[0, 0], [1, 0], [0, 1]], dtype=np.float32)
    folder = tmp_path / "static"
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu").save(str(folder))
    assert is_static(folder)
    np.testing.assert_allclose(open_encoder(str(folder)).encode(["dog cat", "cat"]), [[0.5, 0.5], [0, 1]])


def test_the_static_floor_is_distilled_once_for_a_teacher(tmp_path, caplog):
    pytest.importorskip("model2vec", reason="pip install 'distillabse[floor]'")
    folder = tiny_encoder(tmp_path / "teacher")
    values = tiny_job(tmp_path, "floor", teacher={"model": str(folder)})
    job, run = JobConfig.model_validate(values), RunFolder(tmp_path / "run")
    caplog.set_level("INFO")
    vectors = static_floor(job, run).encode(["the dog and the cat", "the cat and the dog", "morning"])
    assert vectors.shape[0] == 3
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)  # the order of tokens does not count
    assert not np.allclose(vectors[0], vectors[2], atol=0.1)
    static_floor(job, run)
    assert caplog.text.count("Distilling the static floor") == 1
    static_floor(job.model_copy(update={"teacher": job.teacher.model_copy(update={"max_length": 32})}), run)
    assert caplog.text.count("Distilling the static floor") == 2


def test_a_static_floor_without_model2vec_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model2vec.distill", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'distillabse\[floor\]'"):
        distil_static(None, tmp_path)
