"""The DeepSpeed files, as transformers fills them in and as DeepSpeed reads them."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

FOLDER = Path(__file__).parents[1] / "configs" / "deepspeed"
STAGES = (0, 1, 2, 3)


def content(stage):
    return json.loads((FOLDER / f"zero{stage}.json").read_text())


def leaves(values):
    for value in values.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_transformers_fills_in_every_auto(stage, precision, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=24, gradient_accumulation_steps=3, max_grad_norm=0.7,
        use_cpu=True, report_to=[],
    )  # fmt: skip
    arguments.bf16, arguments.fp16 = precision == "bf16", precision == "fp16"
    filled = HfTrainerDeepSpeedConfig(str(FOLDER / f"zero{stage}.json"))
    filled.trainer_config_process(arguments)
    # A model without `config.hidden_size`, as the distiller is: "auto" bucket sizes would be refused here.
    filled.trainer_config_finalize(arguments, torch.nn.Linear(2, 2), num_training_steps=100)
    assert "auto" not in leaves(filled.config)
    assert filled.config["train_batch_size"] == 24 * 3 * arguments.world_size
    assert filled.config["train_micro_batch_size_per_gpu"] == 24
    assert filled.config["gradient_accumulation_steps"] == 3
    assert filled.config["gradient_clipping"] == 0.7
    assert filled.config["bf16"]["enabled"] is (precision == "bf16")
    assert filled.config["fp16"]["enabled"] is (precision == "fp16")
    assert filled.is_zero3() is (stage == 3)


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_knows_every_key_of_its_zero_block(stage):
    block = content(stage)["zero_optimization"]
    read = DeepSpeedZeroConfig(**block)  # refuses keys that it does not have
    assert read.stage == stage
    if stage:
        assert read.overlap_comm and read.contiguous_gradients and read.reduce_bucket_size == 5_000_000
    if stage == 3:
        assert read.gather_16bit_weights_on_model_save
        assert read.param_persistence_threshold == 1_000_000 and read.prefetch_bucket_size == 5_000_000
    elif stage:
        assert read.allgather_bucket_size == 50_000_000


def test_the_stages_differ_in_nothing_but_the_zero_block():
    outside = [{key: value for key, value in content(stage).items() if key != "zero_optimization"} for stage in STAGES]
    assert all(other == outside[0] for other in outside)
    # The Trainer's own AdamW and schedule: blocks of DeepSpeed's would train another student.
    assert not {"optimizer", "scheduler"} & outside[0].keys()
    assert outside[0]["zero_allow_untested_optimizer"] is True
