"""What of `training.deepspeed` is refused before anything is loaded, and what is taken from it."""

import importlib.util
import json
import os
import sys

import pytest

from distillabse.config import JobConfig
from distillabse.errors import ConfigurationError
from distillabse.settings import shipped_deepspeed_settings, training_arguments, validate
from distillabse.training import deepspeed

pytest.importorskip("deepspeed")


def arguments(tmp_path, deepspeed, **training):
    config = validate(
        {
            "name": "tiny",
            "teacher": {"model": "nowhere"},
            "corpus": {"sources": [{"kind": "phrasebook"}]},
            "objectives": [{"kind": "cosine"}],
            "training": {"report_to": [], "deepspeed": deepspeed, **training},
        }
    )
    return training_arguments(config, tmp_path)


def written(tmp_path, **settings):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    return str(path)


def test_the_shipped_files_go_by_name():
    assert list(shipped_deepspeed_settings()) == ["zero0", "zero1", "zero2", "zero3"]
    for name, path in shipped_deepspeed_settings().items():
        assert deepspeed.zero_stage(json.loads(path.read_text())) == int(name[-1])


def test_a_name_a_path_and_settings_mean_the_same(tmp_path):
    path = shipped_deepspeed_settings()["zero2"]
    settings = json.loads(path.read_text())
    for value in ("zero2", str(path), settings):
        assert deepspeed.read_settings(value, shipped_deepspeed_settings()) == settings
        assert arguments(tmp_path, value, bf16=False).hf_deepspeed_config.config["zero_optimization"]["stage"] == 2


def test_what_is_auto_is_filled_in_from_the_training_block(tmp_path):
    made = arguments(tmp_path, "zero2", per_device_train_batch_size=24, gradient_accumulation_steps=2, bf16=True)
    config = made.hf_deepspeed_config.config
    assert config["train_micro_batch_size_per_gpu"] == 24 and config["train_batch_size"] == 48
    assert config["bf16"]["enabled"] is True and config["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("settings", "training", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, {}, r"stage is 4\. Accepted: 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": "two"}}, {}, r"stage is 'two'"),
        (
            {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 16, "gradient_clipping": 5.0},
            {"per_device_train_batch_size": 64},
            r"contradicts .*\n  ds train_micro_batch_size_per_gpu=16, training block: per_device_train_batch_size=64"
            r"\n  ds gradient_clipping=5\.0, training block: max_grad_norm=1\.0\nWrite \"auto\"",
        ),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, {"bf16": False}, r"ds bf16\.enabled=True"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": "auto"}}, {"bf16": True}, r"stage 0.*zero1 or higher"),
        ({"bf16": {"enabled": True}}, {}, r"zero_optimization\.stage is None\. Accepted: 0, 1, 2, 3"),
    ],
)
def test_contradictions_are_refused(tmp_path, settings, training, message):
    with pytest.raises(ConfigurationError, match=message):
        arguments(tmp_path, written(tmp_path, **settings), **training)


def test_bf16_follows_the_settings_where_the_training_block_is_silent(tmp_path):
    stage_2 = {"zero_optimization": {"stage": 2}}
    assert arguments(tmp_path, {**stage_2, "bf16": {"enabled": True}}).bf16
    assert not arguments(tmp_path, {**stage_2, "bf16": {"enabled": False}}).bf16
    assert not arguments(tmp_path, "zero0").bf16
    assert deepspeed.default_bf16(stage_2, fast=True) and not deepspeed.default_bf16(stage_2, fast=False)


def test_a_file_that_is_not_there_or_no_json_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"'zero5' is neither a file nor one of zero0, zero1, zero2, zero3"):
        arguments(tmp_path, "zero5")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"broken\.json is not JSON"):
        arguments(tmp_path, str(tmp_path / "broken.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigurationError, match=r"list\.json holds no DeepSpeed settings"):
        arguments(tmp_path, str(tmp_path / "list.json"))


def test_without_deepspeed_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'distillabse\[deepspeed\]'"):
        deepspeed.read_settings("zero2", {})


def test_operators_are_built_with_ninja_of_this_environment_and_in_a_folder_of_its_own(monkeypatch):
    for name in ("TORCH_EXTENSIONS_DIR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    deepspeed.prepare_environment()
    assert os.environ["PATH"].endswith(":/usr/bin:/bin") and os.environ["PATH"].startswith(sys.prefix)
    assert os.environ["TORCH_EXTENSIONS_DIR"].startswith(sys.prefix)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1") and int(os.environ["MASTER_PORT"]) > 0


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"training": {}}, "set training.deepspeed"),
        ({"training": {"deepspeed": "zero2"}, "teacher_cache": True}, "set only one"),
    ],
)
def test_a_sharded_teacher_needs_deepspeed_and_no_cache(block, message):
    with pytest.raises(ValueError, match=message):
        JobConfig.model_validate(
            {
                "name": "tiny",
                "teacher": {"model": "nowhere"},
                "corpus": {"sources": [{"kind": "phrasebook"}]},
                "objectives": [{"kind": "cosine"}],
                "shard_teacher": True,
                **block,
            }
        )
