"""Where the rows of fine-tuning come from, and which of them may be on both sides."""

import json
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distillabse.errors import ConfigurationError, InputError
from distillabse.finetuning.comparison import DataChoice, load_rows
from distillabse.finetuning.data import read_hub_split, read_table, select_languages
from distillabse.finetuning.settings import finetuning_settings
from distillabse.finetuning.splitting import groups_of, held_out_split, sample_rows, shared_rows
from distillabse.finetuning.tasks import TASKS, HubSplit, find_task

XNLI, XQUAD = TASKS["xnli"], TASKS["xquad"]


def questions(path, rows):
    lines = ["lang\tid\tquestion\tanswer\tcontext", *("\t".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path):
    """Four paragraphs with two questions each, in two languages."""
    rows = [
        (language, f"q{p}{q}", f"where {q}", f"word{p}", f"{language} the word{p} word{p} is here {p}")
        for language in ("en", "de")
        for p in range(4)
        for q in range(2)
    ]
    return questions(tmp_path / "questions.tsv", rows)


def test_a_table_without_starts_takes_the_first_place_of_the_answer(table):
    rows = read_table(XQUAD, table)
    assert len(rows) == 16 and set(rows["language"]) == {"en", "de"}
    first = rows[0]
    assert first["answers"] == ["word0"] and first["answer_start"] == 7
    assert first["context"][7:12] == "word0"


def test_a_given_start_is_kept_where_it_is_right_and_looked_up_where_it_is_not(tmp_path):
    rows = [
        {"id": "1", "question": "q", "context": "cat cat", "answers": {"text": ["cat"], "answer_start": [4]}},
        {"id": "2", "question": "q", "context": "cat cat", "answers": {"text": ["cat"], "answer_start": [2]}},
        {"id": "3", "question": "q", "context": "cat cat", "answers": {"text": ["dog"], "answer_start": [0]}},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_table(XQUAD, path, "en")["answer_start"] == [4, 0, -1]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.tsv", "pairs.parquet"])
def test_labels_are_names_or_numbers_in_every_format(tmp_path, name):
    rows = [("en", "a cat", "an animal", "entailment"), ("en", "a cat", "a dog", "2"), ("fr", "un chat", "oui", "1")]
    columns = ("language", "premise", "hypothesis", "label")
    path = tmp_path / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(row) for row in (columns, *rows)) + "\n")
    else:
        pq.write_table(pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path)
    found = read_table(XNLI, path)
    assert found["label"] == [0, 2, 1]
    assert found["id"] == ["#1", "#2", "#1"] and found["first"][2] == "un chat"


def test_errors_name_the_row_and_what_is_accepted(tmp_path, table):
    path = tmp_path / "p.tsv"
    path.write_text("language\tpremise\thypothesis\tlabel\nen\ta\tb\tmaybe\n")
    with pytest.raises(InputError, match=r"line 2.*'maybe'.*entailment \(0\), neutral \(1\)"):
        read_table(XNLI, path)
    with pytest.raises(InputError, match="no column 'premise', 'hypothesis', 'label'"):
        read_table(XNLI, table)
    with pytest.raises(InputError, match=r"'fr'.*de, en"):
        select_languages(read_table(XQUAD, table), ["fr"], "it")
    (tmp_path / "none.tsv").write_text("lang\tid\tquestion\tanswer\tcontext\n")
    with pytest.raises(InputError, match="no rows"):
        read_table(XQUAD, tmp_path / "none.tsv")
    (tmp_path / "short.tsv").write_text("lang\tid\tquestion\tanswer\tcontext\nen\t1\tq\n")
    with pytest.raises(InputError, match="no rows"):
        read_table(XQUAD, tmp_path / "short.tsv")
    (tmp_path / "later.tsv").write_text("lang\tid\tquestion\tanswer\tcontext\nen\t1\tq\ta\ta\nen\t2\n")
    with pytest.raises(InputError, match="line 3: wrong number of columns"):
        read_table(XQUAD, tmp_path / "later.tsv")
    (tmp_path / "bare.tsv").write_text("question\tanswer\tcontext\nq\ta\ta\n")
    with pytest.raises(InputError, match="no column 'language'"):
        read_table(XQUAD, tmp_path / "bare.tsv")


def hub_folder(folder, configurations):
    """A dataset laid out as on the hub: one configuration for each language."""
    (folder).mkdir()
    entries = []
    for name, rows in configurations.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        entries.append(f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {name}.parquet\n")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(entries) + "---\n")
    return str(folder)


def test_configurations_of_a_real_dataset_are_read_by_language(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    row = {"id": "1", "context": "das Haus", "question": "was", "answers": {"text": ["Haus"], "answer_start": [4]}}
    folder = hub_folder(tmp_path / "xquad", {"xquad.de": [row], "xquad.en": [{**row, "context": "the Haus"}]})
    found = read_hub_split(XQUAD, HubSplit(folder, "xquad.{language}", "validation"), ["de", "en"])
    assert found["language"] == ["de", "en"] and found["context"] == ["das Haus", "the Haus"]
    assert found["answers"] == [["Haus"], ["Haus"]] and found["answer_start"] == [4, 4]
    with pytest.raises(InputError, match=r"xquad\.fr.*cannot be had.*--train and --test"):
        read_hub_split(XQUAD, HubSplit(folder, "xquad.{language}", "validation"), ["fr"])


def fake_hub(monkeypatch, loaded):
    """`load_dataset` with what it was asked for."""
    asked = []

    def load_dataset(path, name, *, split, revision):
        asked.append((path, name, split, revision))
        return loaded(name)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_the_hubs_own_order_of_labels_is_mapped_and_revisions_are_pinned(monkeypatch):
    names = ["contradiction", "entailment", "neutral"]

    def loaded(language):
        features = datasets.Features(
            premise=datasets.Value("string"), hypothesis=datasets.Value("string"),
            label=datasets.ClassLabel(names=names),
        )  # fmt: skip
        rows = {"premise": [f"{language} p"] * 3, "hypothesis": ["x", "y", "z"], "label": [0, 1, 2]}
        return datasets.Dataset.from_dict(rows, features=features)

    asked = fake_hub(monkeypatch, loaded)
    choice = DataChoice(languages=("de", "fr"), train_revision="abc", test_revision="def")
    train, test, data = load_rows(XNLI, choice, finetuning_settings(XNLI), 1)
    assert asked == [
        ("facebook/xnli", "en", "train", "abc"),
        ("facebook/xnli", "de", "test", "def"),
        ("facebook/xnli", "fr", "test", "def"),
    ]
    assert train["label"] == [2, 0, 1] and test["label"] == [2, 0, 1, 2, 0, 1]
    assert data["note"] is None and data["test"]["revision"] == "def"


def test_squad_trains_and_xquad_tests(monkeypatch):
    def loaded(name):
        side = "squad" if name == "plain_text" else name
        answers = {"text": ["cat"], "answer_start": [0]}
        rows = [{"id": side, "title": "t", "context": f"cat {side}", "question": "q", "answers": answers}]
        return datasets.Dataset.from_list(rows)

    asked = fake_hub(monkeypatch, loaded)
    train, test, _ = load_rows(XQUAD, DataChoice(languages=("zh",)), finetuning_settings(XQUAD), 1)
    assert asked == [
        ("rajpurkar/squad", "plain_text", "train", None),
        ("google/xquad", "xquad.zh", "validation", None),
    ]
    assert train["language"] == ["en"] and test["context"] == ["cat xquad.zh"]


def test_a_hub_dataset_without_the_columns_is_refused(monkeypatch):
    fake_hub(monkeypatch, lambda name: datasets.Dataset.from_dict({"text": ["x"]}))
    with pytest.raises(InputError, match="facebook/xnli/en has no column 'premise'"):
        read_hub_split(XNLI, XNLI.train, ["en"])


def test_what_cannot_be_is_refused_before_anything_is_read(table):
    settings = finetuning_settings(XQUAD)
    for choice, message in (
        (DataChoice(languages=("ja",)), "no test set in 'ja'"),
        (DataChoice(train_language="de"), "rajpurkar/squad has no training rows in 'de'"),
        (DataChoice(held_out=0.5), "--held-out"),
        (DataChoice(train=table, test=table, held_out=0.5), "--held-out"),
        (DataChoice(train=table, held_out=1.5), "between 0 and 1"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            load_rows(XQUAD, choice, settings, 1)
    with pytest.raises(ConfigurationError, match=r"'xqad'.*did you mean 'xquad'"):
        find_task("xqad")


def test_held_out_rows_share_no_id_and_no_paragraph_with_training_rows(table):
    rows = read_table(XQUAD, table)
    groups = groups_of(rows)
    assert len(set(groups)) == 4
    # A paragraph's questions in both languages are one group.
    assert all(len(set(groups[[i, i + 1, i + 8, i + 9]])) == 1 for i in (0, 2, 4, 6))
    train, test = held_out_split(rows, 0.25, seed=3)
    assert (len(train), len(test)) == (12, 4)
    assert not set(train["id"]) & set(test["id"]) and not set(train["context"]) & set(test["context"])
    assert shared_rows(train, test) == 0
    assert set(held_out_split(rows, 0.25, seed=3)[1]["id"]) == set(test["id"])
    assert len({tuple(held_out_split(rows, 0.25, seed=seed)[1]["id"]) for seed in range(12)}) > 1


def test_a_few_shot_split_says_so_and_trains_on_one_language(table):
    train, test, data = load_rows(XQUAD, DataChoice(train=table, held_out=0.5), finetuning_settings(XQUAD), 1)
    assert set(train["language"]) == {"en"} and len(train) == 4
    assert set(test["language"]) == {"en", "de"} and len(test) == 8
    assert data["note"] == (
        "Few-shot split of XQuAD: training and test rows are of one file; not comparable with published figures."
    )


def test_training_rows_among_the_test_rows_are_refused(table):
    with pytest.raises(InputError, match="16 test rows have an id or a text"):
        load_rows(XQUAD, DataChoice(train=table, test=table), finetuning_settings(XQUAD), 1)


def test_an_id_alone_tells_that_a_translated_question_was_trained_on(tmp_path):
    train = questions(tmp_path / "train.tsv", [("en", "q7", "where", "cat", "the cat")])
    test = questions(tmp_path / "test.tsv", [("de", "q7", "wo", "Katze", "die Katze"), ("de", "q8", "wo", "x", "x y")])
    with pytest.raises(InputError, match="1 test rows have an id"):
        load_rows(XQUAD, DataChoice(train=train, test=test), finetuning_settings(XQUAD), 1)


def test_rows_without_ids_are_not_taken_for_each_other(tmp_path):
    for name, context in (("train", "the cat"), ("test", "one cat")):
        (tmp_path / f"{name}.tsv").write_text(f"lang\tquestion\tanswer\tcontext\nen\twhere\tcat\t{context}\n")
    choice = DataChoice(train=tmp_path / "train.tsv", test=tmp_path / "test.tsv")
    train, test, data = load_rows(XQUAD, choice, finetuning_settings(XQUAD), 1)
    assert (len(train), len(test), data["test"]["shared_with_train"]) == (1, 1, 0)


def test_samples_have_the_same_ids_in_all_languages(table):
    rows = sample_rows(read_table(XQUAD, table), 3, seed=0)
    of = {code: {r["id"] for r in rows if r["language"] == code} for code in ("en", "de")}
    assert of["en"] == of["de"] and len(of["en"]) == 3


def test_a_file_of_one_paragraph_cannot_be_split(tmp_path):
    path = questions(tmp_path / "one.tsv", [("en", "1", "q", "a", "a b"), ("en", "2", "r", "b", "a b")])
    with pytest.raises(InputError, match="none can be held out"):
        load_rows(XQUAD, DataChoice(train=path, held_out=0.5), finetuning_settings(XQUAD), 1)


def test_settings_are_the_tasks_own_with_overrides_on_top():
    plain, changed = (
        finetuning_settings(XQUAD, given)
        for given in ((), ("max_length=256", "training.learning_rate=1e-4", "training.max_steps=7"))
    )
    assert plain.training["learning_rate"] == 3e-5 and plain.training["num_train_epochs"] == 3
    assert (plain.max_length, plain.doc_stride, plain.max_question_length) == (384, 128, 64)
    assert changed.max_length == 256 and changed.training["learning_rate"] == 1e-4
    assert changed.training["num_train_epochs"] == 3 and changed.training["max_steps"] == 7
    assert finetuning_settings(XNLI).training["learning_rate"] == 2e-5 and finetuning_settings(XNLI).max_length == 128


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "learning_rate"),
        ("max_len=3", "max_len: no such key"),
        ("doc_stride=320", "doc_stride 320 is not below the 316"),
        ("max_question_length=380", "leaves no room"),
        ("dropout=2", "dropout"),
        ("nonsense", "not an override"),
    ],
)
def test_wrong_settings_are_named(override, message):
    with pytest.raises(ConfigurationError, match=message):
        finetuning_settings(XQUAD, [override])


def test_hub_rows_may_share_texts_and_the_count_is_told(monkeypatch):
    def loaded(language):
        return datasets.Dataset.from_dict({"premise": ["p", "q"], "hypothesis": ["h", language], "label": [0, 1]})

    fake_hub(monkeypatch, loaded)
    task = replace(XNLI, languages=("en",))
    assert (
        load_rows(task, DataChoice(languages=("en",)), finetuning_settings(task), 1)[2]["test"]["shared_with_train"]
        == 2
    )
