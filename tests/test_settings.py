"""Configurations: what is accepted, and how clearly the rest is refused."""

import copy

import pytest
import yaml

from distillabse.config import JobConfig, SwitchStudentConfig
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


SHIPPED = [
    "quickstart", "minilm-english", "minilm-broad", "minilm-switch", "minilm-switch-dense", "labse-opensubtitles",
    "labse-small", "labse-trimmed", "multilingual-minilm", "mmkd", "lealla-small", "labse-multilingual",
    "sbert-xlm-roberta",
]  # fmt: skip


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
        (changed(["training"], {"fsdp": "full_shard"}), "training.fsdp: not offered; shard with training.deepspeed"),
        (changed(["training"], {"auto_find_batch_size": True}), "lower per_device_train_batch_size"),
        (changed(["training"], {"train_sampling_strategy": "sequential"}), "Accepted: group_by_length, random"),
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


SWITCH = {"student": {"kind": "switch"}, "objectives": [{"kind": "cosine"}, {"kind": "routing"}]}


@pytest.mark.parametrize(
    ("block", "key", "value", "words"),
    [
        ("student", "experts", 1, "experts: 1 expert is a dense feed-forward block; give at least 2"),
        ("student", "capacity_factor", 0, "capacity_factor: 0.0 leaves no expert room for any token"),
        ("student", "capacity_factor", -1.0, "give 1.0 or more"),
        ("student", "expert_parallel_size", 3, "8 experts cannot be shared evenly by 3 processes; choose one of [1, 2"),
        ("student", "sparse_layers", [3], "sparse_layers: [3] must name layers of the student"),
        ("student", "sparse_layers", [], "must name layers"),
        ("student", "sparse_layer", [1], "student.sparse_layer: no such key (did you mean 'sparse_layers'?)"),
        ("student", "layers", 7, ""),
        ("export", "consumers", ["onnxruntime", "optimum"], "export.consumers: optimum cannot load a Switch student"),
        ("export", "consumers", ["optimun"], "export.consumers.0"),
    ],
)
def test_what_cannot_be_of_a_switch_student_is_refused_before_training(block, key, value, words):
    values = {**changed(["name"], "switch"), **copy.deepcopy(SWITCH)}
    validate(values)
    values.setdefault(block, {})[key] = value
    if not words:
        validate(values)  # left to the teacher's own depth
        return
    with pytest.raises(ConfigurationError) as error:
        validate(values)
    assert words in str(error.value)


def test_consumers_of_a_dense_student_are_not_refused():
    validate(changed(["export"], {"consumers": ["optimum", "text-embeddings-inference"]}))


def test_routing_and_switch_belong_together():
    values = {**changed(["name"], "switch"), **copy.deepcopy(SWITCH)}
    with pytest.raises(ConfigurationError, match="without load balancing"):
        validate({**values, "objectives": [{"kind": "cosine"}]})
    with pytest.raises(ConfigurationError, match="this one is dense"):
        validate({**values, "student": {"layers": 2}})
    assistant = {"student": {"kind": "switch", "layers": 4}, "objectives": [{"kind": "cosine"}]}
    with pytest.raises(ConfigurationError, match=r"assistant\.objectives: a Switch student without"):
        validate({**values, "assistant": assistant})


@pytest.mark.parametrize(
    ("layers", "sparse", "expected"),
    [(6, "every_other", [1, 3, 5]), (3, "every_other", [1]), (1, "every_other", [0]), (3, "all", [0, 1, 2]),
     ([0, 5], [1, 0], [0, 1])],
)  # fmt: skip
def test_which_layers_are_sparse(layers, sparse, expected):
    assert SwitchStudentConfig(layers=layers, sparse_layers=sparse).sparse_layer_indices == expected


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


def test_overrides_reach_into_lists(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**BASE, "objectives": [{"kind": "cosine"}, {"kind": "mse", "weight": 3.0}]}))
    for key in ("objectives.1.weight", "objectives[1].weight"):
        config = load_config(path, [f"{key}=0.5"])
        assert [(objective.kind, objective.weight) for objective in config.objectives] == [("cosine", 1), ("mse", 0.5)]
    assert [o.kind for o in load_config(path, ["objectives=[{kind: mse}]"]).objectives] == ["mse"]
    for wrong in ("objectives.2.weight=1", "objectives.x.weight=1"):
        with pytest.raises(ConfigurationError, match=r"cannot be read as YAML with the given overrides: .*(index|'x')"):
            load_config(path, [wrong])


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
