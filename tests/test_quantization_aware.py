"""Quantisation-aware distillation: gradients of scales, what is learnt and exported, the stage and its refusals."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training import corpus
from tiny import tiny_encoder, tiny_job

from distillabse import layout
from distillabse.config import JobConfig, TeacherConfig
from distillabse.errors import ConfigurationError
from distillabse.layout import RunFolder
from distillabse.models.teacher import load_encoder, load_teacher, transformer_of
from distillabse.pipeline import is_current, run_job, run_stage, stages_of
from distillabse.quantization import calibrate, load_quantized_linears, save_quantized_linears
from distillabse.quantization.fake import SCALE_RATE, FakeQuantization, learned_step, quantized_forward, take_weights
from distillabse.quantization.statistics import linear_layers, shared_inputs
from distillabse.quantization.texts import calibration_texts
from distillabse.settings import training_arguments, validate
from distillabse.training.data import tokenised_sentences
from distillabse.training.distillation import held_out_fidelity
from distillabse.training.quantization_aware import quantization_aware_distill


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tiny_encoder(tmp_path_factory.mktemp("quantised") / "student", hidden=64)
    return load_teacher(TeacherConfig(model=str(folder)))


@pytest.fixture(scope="module")
def calibrated(student):
    return calibrate(student, corpus(64, seed=5), static=True)


def job(**training):
    return JobConfig.model_validate(
        {
            "name": "tiny",
            "teacher": {"model": "unused"},
            "corpus": {"sources": [{"kind": "phrasebook"}]},
            "objectives": [{"kind": "cosine"}, {"kind": "hidden"}],
            "training": {
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-4,
                "max_steps": 40,
                "logging_steps": 5,
                "eval_steps": 20,
                "save_steps": 20,
                "weight_decay": 0.0,
                "bf16": False,
                "report_to": [],
                **training,
            },
        }
    )


def train(student, calibrated, output, checkpoint=None, largest=127, held_out=None, **training):
    config = job(**training)
    arguments = training_arguments(config, output)
    text = tokenised_sentences(student, corpus(200))
    held_out = held_out or held_out_fidelity(student, corpus(40, seed=1))
    return quantization_aware_distill(
        config, student, copy.deepcopy(student), calibrated, text, held_out, arguments, checkpoint, largest
    )


def rounded_vectors(encoder, linears, texts):
    with quantized_forward(encoder, linears):
        return encoder.encode(texts)


def mean_cosine(student, encoder, linears, texts):
    return float((student.encode(texts) * rounded_vectors(encoder, linears, texts)).sum(axis=1).mean())


def test_gradients_of_lsq_by_hand():
    # Steps of 0.5 from -2 to 3 of them: v = -3 (below), -1.6, 0.6, 2.2, 4 (above).
    values = torch.tensor([-1.5, -0.8, 0.3, 1.1, 2.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    result = learned_step(values, scale, -2, 3)
    assert result.tolist() == [-1.0, -1.0, 0.5, 1.0, 1.5]
    result.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    assert values.grad.tolist() == [0, 10, 100, 1000, 0]
    by_scale = 1 * -2 + 10 * (-2 + 1.6) + 100 * (1 - 0.6) + 1000 * (2 - 2.2) + 10000 * 3
    assert scale.grad.item() == pytest.approx(by_scale / (5 * 3) ** 0.5, rel=1e-5)


def test_gradients_of_one_scale_for_each_output():
    weight = torch.tensor([[0.5, -1.2], [0.26, 0.1]], requires_grad=True)
    scales = torch.tensor([[0.5], [0.1]], requires_grad=True)
    learned_step(weight, scales, -2, 2).sum().backward()
    # v = 1, -2.4 (below) and 2.6 (above), 1.
    assert weight.grad.tolist() == [[1, 0], [0, 1]]
    expected = torch.tensor([[0.0 - 2.0], [2.0 + 0.0]]) / (2 * 2) ** 0.5
    torch.testing.assert_close(scales.grad, expected, atol=1e-5, rtol=0)


def test_attached_encoder_starts_as_what_was_calibrated(student, calibrated, sentences):
    encoder = copy.deepcopy(student)
    take_weights(encoder, calibrated)
    quantization = FakeQuantization(calibrated, shared_inputs(encoder))
    with quantization.attached(encoder):
        attached = encoder.encode(sentences)
    np.testing.assert_allclose(attached, rounded_vectors(student, calibrated, sentences), atol=2e-6)
    assert np.abs(attached - student.encode(sentences)).max() > 1e-3  # it is rounded
    # The floats are the same network but for the rounding of weights: attention averages what was moved.
    np.testing.assert_allclose(encoder.encode(sentences), student.encode(sentences), atol=0.05)
    same = quantization.linears(encoder)
    assert set(same) == set(calibrated)
    for name, linear in calibrated.items():
        assert torch.equal(same[name].weight, linear.weight)
        assert same[name].input_scale == pytest.approx(linear.input_scale, rel=1e-6)


def test_layers_that_share_inputs_share_a_scale_and_exported_layers_compute_the_same(student, calibrated, sentences):
    encoder = copy.deepcopy(student)
    take_weights(encoder, calibrated)
    quantization = FakeQuantization(calibrated, shared_inputs(encoder))
    with torch.no_grad():
        for number, parameter in enumerate(quantization.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
        for layer in linear_layers(encoder).values():
            layer.weight.mul_(1.03)
            layer.bias.add_(0.01)
    linears = quantization.linears(encoder)
    prefix = "encoder.layer.0.attention.self."
    scales = {linears[f"{prefix}{part}"].input_scale for part in ("query", "key", "value")}
    assert len(scales) == 1
    assert scales != {calibrated[f"{prefix}query"].input_scale}
    with quantization.attached(encoder):
        attached = encoder.encode(sentences)
    np.testing.assert_allclose(attached, rounded_vectors(encoder, linears, sentences), atol=1e-4)
    assert np.abs(attached - rounded_vectors(student, calibrated, sentences)).max() > 1e-3


def test_attaching_leaves_no_trace(student, calibrated, sentences):
    encoder = copy.deepcopy(student)
    before = encoder.encode(sentences)
    with quantized_forward(encoder, calibrated), quantized_forward(encoder, calibrated):
        pass
    assert np.array_equal(encoder.encode(sentences), before)
    assert not any("forward" in layer.__dict__ for layer in linear_layers(encoder).values())


def test_learning_rate_zero_gives_what_was_calibrated(student, calibrated, tmp_path, sentences):
    encoder, linears, _ = train(student, calibrated, tmp_path, learning_rate=0.0, max_steps=20)
    for name, linear in calibrated.items():
        assert torch.equal(linears[name].weight, linear.weight)
        assert linears[name].input_scale == pytest.approx(linear.input_scale, rel=1e-6)
    np.testing.assert_allclose(
        rounded_vectors(encoder, linears, sentences), rounded_vectors(student, calibrated, sentences), atol=1e-5
    )


def test_training_brings_rounded_vectors_nearer(student, tmp_path):
    calibrated = calibrate(student, corpus(64, seed=5), static=True, largest=7)  # four bits, so that there is a loss
    encoder, linears, history = train(
        student, calibrated, tmp_path, largest=7, max_steps=120, save_steps=60, eval_steps=60
    )
    unseen = corpus(100, seed=9)
    start = mean_cosine(student, student, calibrated, unseen)
    end = mean_cosine(student, encoder, linears, unseen)
    assert 1 - end < 0.92 * (1 - start)
    measured = [entry["eval_cosine"] for entry in history["log"] if "eval_cosine" in entry]
    assert max(measured) == pytest.approx(mean_cosine(student, encoder, linears, corpus(40, seed=1)), abs=1e-5)
    ratios = [linears[name].input_scale / calibrated[name].input_scale for name in linears if "pooler" not in name]
    assert all(abs(ratio - 1) > 1e-5 for ratio in ratios)
    assert all(linear.weight.abs().max() <= 7 for linear in linears.values())
    table = transformer_of(encoder).get_input_embeddings().weight
    assert torch.equal(table, transformer_of(student).get_input_embeddings().weight)


def test_scales_stay_positive_however_they_are_pulled(student, calibrated):
    quantization = FakeQuantization(calibrated, shared_inputs(student))
    with torch.no_grad():
        for parameter in quantization.parameters():
            parameter.fill_(-0.3)
    linears = quantization.linears(student)
    for name, linear in linears.items():
        assert 0 < linear.input_scale < calibrated[name].input_scale
        assert (linear.scale > 0).all()


def test_resume_equals_no_interruption(student, calibrated, tmp_path):
    whole, expected, _ = train(student, calibrated, tmp_path / "whole", load_best_model_at_end=False)
    checkpoint = str(tmp_path / "whole" / "checkpoint-20")
    learnt = load_file(f"{checkpoint}/{layout.OBJECTIVES}")
    assert any(tensor.abs().max() > 0 for name, tensor in learnt.items() if name.startswith("quantization.inputs"))
    again, linears, _ = train(student, calibrated, tmp_path / "again", checkpoint, load_best_model_at_end=False)
    for name, linear in expected.items():
        assert torch.equal(linears[name].weight, linear.weight)
        assert linears[name].input_scale == linear.input_scale
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def test_best_checkpoint_brings_its_scales(student, calibrated, tmp_path):
    measured = []

    def worse_and_worse(encoder):
        measured.append(encoder.encode(corpus(20)))
        return {"skill": -float(len(measured))}

    encoder, linears, _ = train(student, calibrated, tmp_path, held_out=worse_and_worse, learning_rate=1e-3)
    assert len(measured) == 2
    learnt = load_file(tmp_path / "checkpoint-20" / layout.OBJECTIVES)
    name = "encoder.layer.0.attention.self.query"
    expected = calibrated[name].input_scale * np.exp(SCALE_RATE * learnt["quantization.inputs.0.offset"].item())
    assert expected != pytest.approx(calibrated[name].input_scale, rel=1e-3)
    assert linears[name].input_scale == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(rounded_vectors(encoder, linears, corpus(20)), measured[0], atol=1e-5)
    assert np.abs(measured[1] - measured[0]).max() > 1e-3


def test_weight_decay_leaves_scales_alone(student, calibrated, tmp_path):
    from distillabse.training.distiller import Distiller
    from distillabse.training.trainer import DistillationTrainer

    config = job(weight_decay=0.1)
    quantization = FakeQuantization(calibrated, shared_inputs(student))
    distiller = Distiller(copy.deepcopy(student), student, config.objectives, quantization=quantization)
    trainer = DistillationTrainer(
        distiller, training_arguments(config, tmp_path), tokenised_sentences(student, corpus(40)), lambda _: {}
    )
    scales = {id(parameter) for parameter in quantization.parameters()}
    decayed = [group for group in trainer.create_optimizer().param_groups if group["weight_decay"] > 0]
    assert decayed
    assert not any(id(parameter) in scales for group in decayed for parameter in group["params"])


def test_saved_layers_are_the_same(student, calibrated, tmp_path):
    save_quantized_linears(calibrated, tmp_path / "layers.safetensors")
    loaded = load_quantized_linears(tmp_path / "layers.safetensors")
    for name, linear in calibrated.items():
        assert loaded[name].input_scale == np.float32(linear.input_scale)
        assert loaded[name].zero_point == linear.zero_point
        assert torch.equal(loaded[name].weight, linear.weight)


def test_layers_with_a_scale_for_each_token_are_refused(student):
    per_token = calibrate(student, corpus(16), static=False)
    with pytest.raises(ConfigurationError, match="static=True"):
        FakeQuantization(per_token, shared_inputs(student))


def quantized_job(folder, name, **quantization):
    block = {
        "kind": "static",
        "calibration_sentences": 50,
        "training": {"training": {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "report_to": []}},
        **quantization,
    }
    return tiny_job(folder, name, export={"quantization": block})


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


def test_the_stage_runs_once_and_its_product_is_exact(jobs):
    config = validate(quantized_job(jobs, "stage"))
    run = run_job(config, until="quantize")
    linears = load_quantized_linears(run.quantized / layout.QUANTIZED_LINEARS)
    encoder, start = load_encoder(str(run.quantized)), load_encoder(str(run.student))
    texts = corpus(20)
    assert mean_cosine(start, encoder, linears, texts) > 0.98
    history = run.quantized / run.training_history.name
    assert history.is_file()
    assert not (run.quantize_checkpoints / layout.TRAINING_DATA).exists()
    finished = run.stamp("quantize").read_text()
    run_job(config, until="quantize")
    assert run.stamp("quantize").read_text() == finished
    other = validate(quantized_job(jobs, "stage", embeddings=False))
    assert is_current("quantize", other, run)  # what it does not read
    assert not is_current("quantize", validate(quantized_job(jobs, "stage", calibration_sentences=60)), run)
    # Interrupted after its first checkpoint, it comes to the same.
    last = run.quantize_checkpoints / "checkpoint-4"
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    last.rmdir()
    run.stamp("quantize").unlink()
    run_stage("quantize", config, run, resume=True)
    again = load_quantized_linears(run.quantized / layout.QUANTIZED_LINEARS)
    assert all(torch.equal(again[name].weight, linear.weight) for name, linear in linears.items())
    assert all(again[name].input_scale == linear.input_scale for name, linear in linears.items())


def test_the_teacher_may_be_the_target(jobs):
    training = {"target": "teacher", "training": {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "report_to": []}}
    run = run_job(validate(quantized_job(jobs, "teacher-target", training=training)), until="quantize")
    assert (run.quantized / layout.QUANTIZED_LINEARS).is_file()


def test_jobs_without_the_block_have_no_such_stage(jobs):
    config = validate(tiny_job(jobs, "none"))
    assert "quantize" not in stages_of(config)
    with pytest.raises(ConfigurationError, match=r"export\.quantization\.training"):
        run_stage("quantize", config, RunFolder(config.run_folder))


def test_calibration_texts_are_a_seeded_sample_of_both_sides(tmp_path):
    from distillabse.corpus.records import Record, write_records

    run = RunFolder(tmp_path)
    run.corpus.mkdir()
    records = [Record(f"text {i}", "en", f"Text {i}", "de") if i % 2 else Record(f"text {i}", "en") for i in range(500)]
    write_records(run.split("train"), records)
    block = {"quantization": {"kind": "static", "calibration_sentences": 40}}
    config = validate(tiny_job(tmp_path, "texts", export=block))
    texts = calibration_texts(config, run)
    assert len(set(texts)) == 40
    assert any(text.startswith("Text") for text in texts)
    assert any(text.startswith("text") for text in texts)
    assert calibration_texts(config, run) == texts
    assert calibration_texts(config.model_copy(update={"seed": 1}), run) != texts
    everything = validate(tiny_job(tmp_path, "texts", export={"quantization": {"calibration_sentences": 9999}}))
    assert len(calibration_texts(everything, run)) == 750


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"kind": "per_token"}, "Set kind: static"),
        ({"training": {"objectives": []}}, "at least one must have a weight"),
        ({"training": {"objectives": [{"kind": "multilingual"}]}}, "translation pairs"),
        ({"training": {"training": {"learning_rat": 1}}}, r"export\.quantization\.training\.training\.learning_rat"),
    ],
)
def test_clear_refusals(tmp_path, blocks, message):
    with pytest.raises(ConfigurationError, match=message):
        validate(quantized_job(tmp_path, "refused", **blocks))


def test_switch_students_are_refused(tmp_path):
    values = quantized_job(tmp_path, "switch")
    values["student"] = {"kind": "switch", "layers": 2, "experts": 2}
    values["objectives"].append({"kind": "routing"})
    with pytest.raises(ConfigurationError, match="dense students"):
        validate(values)
