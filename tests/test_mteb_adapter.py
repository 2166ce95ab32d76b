"""Tasks of mteb through the adapter: scores that can be worked out without it."""

import io
import json
import sys

import datasets
import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr
from tiny import tiny_bundle, tiny_encoder, tiny_job

from distillabse import cli
from distillabse.encoder import Encoder
from distillabse.errors import ConfigurationError, InputError
from distillabse.models.teacher import load_encoder

pytest.importorskip("mteb")

from mteb import TaskMetadata
from mteb.abstasks import AbsTaskBitextMining, AbsTaskRetrieval, AbsTaskSTS
from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol

from distillabse.mteb_adapter import BundleEncoder, evaluate_task, find_tasks, mteb_table

PAIRS = {
    "en-de": [("the cat", "cat the"), ("where is the house", "is where the house"), ("no", "never")],
    "en-fr": [("the cat", "the cat"), ("good night", "good night"), ("hello", "hello"), ("one book", "one book")],
}
SCORED = [("the cat", "the dog", 4.0), ("no", "where is the station", 0.5), ("good night", "good day", 3.0),
          ("red car", "red car", 5.0), ("friend", "book and train", 1.0)]  # fmt: skip


def metadata(name, kind, score, languages):
    return TaskMetadata(
        name=name, description="-", type=kind, category="t2t", modalities=["text"], eval_splits=["test"],
        eval_langs=languages, main_score=score, dataset={"path": "in/memory", "revision": "1"},
        reference=None, date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None,
        dialect=None, sample_creation=None, bibtex_citation=None,
    )  # fmt: skip


class TinyBitext(AbsTaskBitextMining):
    metadata = metadata(
        "TinyBitext", "BitextMining", "f1", {"en-de": ["eng-Latn", "deu-Latn"], "en-fr": ["eng-Latn", "fra-Latn"]}
    )

    def load_data(self, num_proc=None, **kwargs):
        self.dataset = {
            subset: {"test": datasets.Dataset.from_dict(dict(zip(("sentence1", "sentence2"), zip(*p, strict=True))))}  # noqa: B905
            for subset, p in PAIRS.items()
        }
        self.data_loaded = True


class TinySTS(AbsTaskSTS):
    metadata = metadata("TinySTS", "STS", "cosine_spearman", ["eng-Latn"])

    def load_data(self, num_proc=None, **kwargs):
        first, second, score = zip(*SCORED, strict=True)
        rows = {"sentence1": first, "sentence2": second, "score": score}
        self.dataset = {"default": {"test": datasets.Dataset.from_dict(rows)}}
        self.data_loaded = True


class Unreachable(TinySTS):
    metadata = metadata("Unreachable", "STS", "cosine_spearman", ["eng-Latn"])

    def load_data(self, num_proc=None, **kwargs):
        raise ConnectionError("no route to huggingface.co\nmore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    teacher = tiny_encoder(tmp_path_factory.mktemp("teacher"), seed=1)
    student = tiny_encoder(tmp_path_factory.mktemp("student"), pooling="cls", dense=True)
    return teacher, tiny_bundle(tmp_path_factory.mktemp("bundle"), student)


@pytest.fixture(scope="module")
def models(folders):
    teacher, bundle = folders
    return {"teacher": load_encoder(str(teacher)), "model": BundleEncoder(Encoder(bundle), "model")}


def vectors_of(model, texts):
    encoder = model._encoder if isinstance(model, BundleEncoder) else model
    return encoder.encode(list(texts))


def test_the_adapter_is_what_mteb_takes_for_an_encoder(models):
    adapter = models["model"]
    assert isinstance(adapter, EncoderProtocol) and not isinstance(adapter, CrossEncoderProtocol)
    assert adapter.mteb_model_meta.name == "distillabse/model" and adapter.mteb_model_meta.embed_dim == 32


def test_sts_is_spearmans_correlation_of_the_cosines(models):
    result = evaluate_task(TinySTS(), models)
    first, second, gold = zip(*SCORED, strict=True)
    for name, model in models.items():
        cosines = (vectors_of(model, first) * vectors_of(model, second)).sum(axis=1)
        expected = spearmanr(cosines, gold).statistic
        assert result["models"][name]["main_score"] == pytest.approx(expected, abs=1e-6)
        assert result["models"][name]["scores"]["test"]["default"]["cosine_spearman"] == pytest.approx(expected)
    assert result["models"]["teacher"]["main_score"] != result["models"]["model"]["main_score"]
    assert (result["metric"], result["type"]) == ("cosine_spearman", "STS")


def test_bitext_mining_is_f1_of_nearest_neighbours_in_every_pair_of_languages(models):
    result = evaluate_task(TinyBitext(), models)
    for name, model in models.items():
        scores = result["models"][name]["scores"]["test"]
        # The translations of en-fr are the texts themselves, so every nearest neighbour is the right one.
        assert scores["en-fr"]["main_score"] == pytest.approx(1)
        first, second = zip(*PAIRS["en-de"], strict=True)
        nearest = (vectors_of(model, first) @ vectors_of(model, second).T).argmax(axis=1)
        accuracy = float((nearest == np.arange(3)).mean())
        assert scores["en-de"]["accuracy"] == pytest.approx(accuracy)
        expected = (scores["en-de"]["main_score"] + 1) / 2
        assert result["models"][name]["main_score"] == pytest.approx(expected)
    assert scores["en-de"]["languages"] == ["eng-Latn", "deu-Latn"]
    json.dumps(result)
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(mteb_table([result]))
    shown = console.export_text()
    assert "en-fr (test)" in shown and "1.0000" in shown and f"{result['models']['model']['main_score']:.4f}" in shown


def test_unknown_tasks_get_near_matches_and_missing_data_a_remedy(models):
    with pytest.raises(ConfigurationError, match=r"no task 'stsbenchmrk'.*STSBenchmark"):
        find_tasks(["stsbenchmrk"])
    assert find_tasks(["STSBenchmark"])[0].metadata.name == "STSBenchmark"
    with pytest.raises(ConfigurationError, match="not about texts alone"):
        find_tasks(["Flickr30kI2TRetrieval"])
    with pytest.raises(InputError, match=r"'Unreachable' cannot be had .*no route to huggingface.co\).*check the net"):
        evaluate_task(Unreachable(), models)


def test_without_mteb_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'distillabse\[eval\]'"):
        find_tasks(["STSBenchmark"])


def call(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distillabse", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code or 0


def test_bench_evaluates_a_jobs_bundle_and_a_bundle_folder_alike(folders, tmp_path, monkeypatch, capsys):
    import shutil

    import mteb

    teacher, bundle = folders
    registry = {"TinySTS": TinySTS, "TinyBitext": TinyBitext}
    monkeypatch.setattr(mteb, "get_task", lambda name: registry[name]())
    values = tiny_job(tmp_path, "job", teacher={"model": str(teacher)})
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(values))
    assert call("bench", config, "--mteb", "TinySTS", monkeypatch=monkeypatch) == 2
    assert "holds no bundle" in capsys.readouterr().err
    run = tmp_path / "runs" / "job"
    shutil.copytree(bundle, run / "bundle")
    assert call("bench", config, "--mteb", "TinySTS", "--mteb", "TinyBitext", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "TinySTS" in printed and "en-de (test)" in printed
    written = json.loads((run / "mteb" / "TinySTS.json").read_text())
    assert set(written["models"]) == {"teacher", "model"} and written["environment"]["versions"]["mteb"]
    assert written["teacher"] == str(teacher)

    assert call("bench", run / "bundle", "--mteb", "TinySTS", monkeypatch=monkeypatch) == 2
    assert "distillabse.json" in capsys.readouterr().err.replace("\n", "")
    (run / "bundle" / "distillabse.json").write_text(json.dumps({"config": values}))
    assert call("bench", run / "bundle", "--mteb", "TinySTS", monkeypatch=monkeypatch) == 0
    again = json.loads((run / "mteb" / "TinySTS.json").read_text())
    assert again["models"]["model"]["scores"] == written["models"]["model"]["scores"]
    assert call("bench", run / "bundle", "seed=1", "--mteb", "TinySTS", monkeypatch=monkeypatch) == 2


def test_retrieval_goes_through_mtebs_own_search(models):
    class TinyRetrieval(AbsTaskRetrieval):
        pass

    documents = ["the cat", "where is the station", "good night", "one red book"]
    TinyRetrieval.metadata = metadata("TinyRetrieval", "Retrieval", "ndcg_at_10", ["eng-Latn"])

    def load_data(self, num_proc=None, **kwargs):
        test = {
            "corpus": datasets.Dataset.from_list(
                [{"id": f"d{i}", "text": text, "title": ""} for i, text in enumerate(documents)]
            ),
            "queries": datasets.Dataset.from_list([{"id": "q", "text": "good night"}]),
            "relevant_docs": {"q": {"d2": 1}},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": test}}
        self.data_loaded = True

    TinyRetrieval.load_data = load_data
    result = evaluate_task(TinyRetrieval(), models)
    # The query is the document itself, so it is found first.
    assert [result["models"][name]["main_score"] for name in models] == [1, 1]
