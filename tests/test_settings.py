"""Configurations: what is accepted, and how clearly the rest is refused."""

import copy

import pytest
import yaml

from distillabse.config import JobConfig
from distillabse.errors import ConfigurationError
from distillabse.settings import config_hash, load_config, shipped_configs, training_arguments, validate

BASE = {
    "name": "job",
    "teacher": {"model": "folder"},
    "corpus": {"sources": [{"kind": "phrasebook"}]},
    "objectives": [{"kind": "cosine"}],
}


def changed(path, value):
    values = copy.deepcopy(BASE)
    *parents, last = path
    place = values
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    place[last] = value
    return values


SHIPPED = ["quickstart", "minilm-english", "labse-opensubtitles", "labse-small", "labse-trimmed"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_is_valid(name, tmp_path):
    config = load_config(name)
    assert config.name == name
    training_arguments(config, tmp_path)
    # Written out and read again it is the same job.
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert config_hash(load_config(tmp_path / "again.yaml")) == config_hash(config)


def test_shipped_configurations_are_all_tested():
    assert set(shipped_configs()) == set(SHIPPED)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (changed(["techer"], 1), "techer: no such key (did you mean 'teacher'?)"),
        (changed(["teacher", "modle"], 1), "teacher.modle: no such key (did you mean 'model'?)"),
        (changed(["corpus", "sources", 0, "langages"], []), "(did you mean 'languages'?)"),
        (
            changed(["corpus", "sources", 0, "kind"], "phrasebok"),
            "sources.0.kind: got 'phrasebok' (did you mean 'phrasebook'?)",
        ),
        (changed(["objectives", 0, "kind"], "cosin"), "Accepted: minilm, minilm_v2, hidden, cosine, mse"),
        (changed(["objectives", 0], {"weight": 1}), "objectives.0.kind: say which kind this is"),
        (changed(["objectives", 0, "weight"], -1), "objectives.0.weight: Input should be greater than 0 (got -1)"),
        (changed(["training"], {"learnin_rate": 1}), "training.learnin_rate: no such field"),
        (changed(["training"], {"learnin_rate": 1}), "(did you mean 'learning_rate'?)"),
        (changed(["training"], {"output_dir": "x"}), "set the job's own `output` instead"),
        (changed(["corpus", "temperature"], 2), "set corpus.max_sentences too"),
        (changed(["student"], {"layers": [1, 1]}), "listed twice"),
        (changed(["student"], {"layers": 0}), "at least 1"),
        (changed(["name"], "../x"), "name:"),
    ],
)
def test_refusals_name_the_key_what_it_got_and_the_nearest_name(values, words):
    with pytest.raises(ConfigurationError) as error:
        validate(values)
    assert words in str(error.value)


def test_every_problem_is_listed_at_once():
    values = changed(["techer"], 1)
    values["objectives"][0]["weight"] = 0
    with pytest.raises(ConfigurationError) as error:
        validate(values)
    assert "techer" in str(error.value) and "objectives.0.weight" in str(error.value)


def test_overrides(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(BASE))
    config = load_config(path, ["training.learning_rate=1e-4", "student.layers=[0,2]", "corpus.max_sentences=7"])
    assert config.training == {"learning_rate": 1e-4}
    assert config.student.layers == [0, 2] and config.corpus.max_sentences == 7
    assert config_hash(config) != config_hash(load_config(path))
    with pytest.raises(ConfigurationError, match="key=value"):
        load_config(path, ["training.learning_rate"])


@pytest.mark.parametrize(("text", "words"), [("a: [1", "YAML"), ("", "holds no keys"), ("- a", "YAML|keys")])
def test_a_file_that_is_no_configuration(tmp_path, text, words):
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        load_config(tmp_path / "job.yaml")


def test_an_unknown_name_suggests_a_shipped_one():
    with pytest.raises(ConfigurationError, match="did you mean 'quickstart'"):
        load_config("quickstrt")


def test_training_block_is_training_arguments(tmp_path):
    config = JobConfig.model_validate(changed(["training"], {"weight_decay": 0.5, "bf16": False, "max_steps": 3}))
    arguments = training_arguments(config, tmp_path)
    assert arguments.weight_decay == 0.5 and arguments.max_steps == 3 and arguments.seed == config.seed
    assert arguments.train_sampling_strategy == "group_by_length" and not arguments.bf16
    with pytest.raises(ConfigurationError, match=r"training: .*nope"):
        training_arguments(JobConfig.model_validate(changed(["training"], {"lr_scheduler_type": "nope"})), tmp_path)
