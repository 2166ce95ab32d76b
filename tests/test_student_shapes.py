"""Students of other widths than the teacher's: shapes, first weights, heads, reduced teachers."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import RobertaConfig, RobertaModel

from distillabse.config import DenseStudentConfig, TeacherConfig
from distillabse.encoder import Encoder
from distillabse.errors import ConfigurationError
from distillabse.export.graph import export_graph
from distillabse.models.folder import save_encoder
from distillabse.models.initialisation import _factorise, initialise_from_teacher
from distillabse.models.projection import projection_basis
from distillabse.models.reduction import fit_reduction, load_reduction, reduced, save_reduction
from distillabse.models.shape import TransformerShape, choose_layers, resolve_shape, transformer_shape
from distillabse.models.student import _new_model, build_student
from distillabse.models.teacher import encoder_settings, load_encoder, load_teacher, transformer_of

LABSE = TransformerShape(layers=12, hidden_size=768, intermediate_size=3072, attention_heads=12, embedding_size=768)


@pytest.fixture
def teacher(encoder_folder):
    """4 layers, hidden size 32, 4 heads, intermediate size 64, mean pooling."""
    return load_teacher(TeacherConfig(model=str(encoder_folder)))


@pytest.fixture
def labse(labse_folder):
    """The same with CLS pooling and a Dense head with tanh."""
    return load_teacher(TeacherConfig(model=str(labse_folder)))


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({}, (3, 768, 3072, 12, 768)),
        ({"layers": 6, "hidden_size": 384}, (6, 384, 1536, 12, 384)),  # the teacher's heads and proportion
        ({"layers": [2, 5], "hidden_size": 256}, (2, 256, 1024, 4, 256)),  # 12 do not divide 256: heads of 64
        ({"hidden_size": 384, "embedding_size": 128, "intermediate_size": 512}, (3, 384, 512, 12, 128)),
        ({"layers": 24, "hidden_size": 128, "attention_heads": 8, "initialisation": "random"}, (24, 128, 512, 8, 128)),
    ],
)
def test_widths_that_are_not_given_follow_from_the_teacher(student, expected):
    shape, layers = resolve_shape(DenseStudentConfig(**student), LABSE)
    assert (shape.layers, shape.hidden_size, shape.intermediate_size, shape.attention_heads, shape.embedding_size) == (
        expected
    )
    assert len(layers) == (0 if student.get("initialisation") else expected[0])


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"attention_heads": 7}, r"7 heads do not divide the hidden size 768; choose one of \[1, 2, 3, 4, 6, 8, 12,"),
        ({"embedding_size": 1024}, r"embedding_size: 1024 is wider than the hidden size 768"),
        ({"hidden_size": 1536}, r"wider than the teacher's 768.*initialisation: random"),
        ({"layers": 13}, r"the teacher has only 12.*initialisation: embeddings or random"),
        ({"layers": [11, 12]}, r"no layer 12"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_remedy(student, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve_shape(DenseStudentConfig(**student), LABSE)


def test_heads_and_embeddings_are_checked_in_the_configuration_where_they_can_be():
    with pytest.raises(ValueError, match=r"7 attention_heads do not divide hidden_size 384; choose one of"):
        DenseStudentConfig(hidden_size=384, attention_heads=7)
    with pytest.raises(ValueError, match="embedding_size 512 is wider than hidden_size 384"):
        DenseStudentConfig(hidden_size=384, embedding_size=512)


def test_the_last_layers_can_be_chosen():
    assert choose_layers(3, 12, "last") == [9, 10, 11]
    assert resolve_shape(DenseStudentConfig(layers=2, layer_choice="last"), LABSE)[1] == [10, 11]


def test_a_config_that_is_not_of_a_bert_is_refused():
    with pytest.raises(ConfigurationError, match=r"distilbert.*num_hidden_layers.*BERT, RoBERTa"):
        transformer_shape({"model_type": "distilbert", "dim": 768, "n_layers": 6})


def test_settings_are_read_without_the_weights(encoder_folder, tmp_path):
    assert transformer_shape(encoder_settings(TeacherConfig(model=str(encoder_folder)))).layers == 4
    assert encoder_settings(TeacherConfig(model=str(tmp_path))) is None


def test_basis_of_the_weighted_table_is_its_truncated_svd():
    random = np.random.default_rng(0)
    rows, counts = random.standard_normal((200, 12)).astype(np.float32), random.integers(0, 50, 200)
    basis = projection_basis(rows, 5, "svd", counts)
    _, _, right = np.linalg.svd(np.sqrt(counts)[:, None] * rows, full_matrices=False)
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(basis.T * right[:5], axis=1)), 1, atol=1e-4)
    assert np.all(basis[np.abs(basis).argmax(axis=0), range(5)] > 0)


def test_counts_decide_what_the_basis_keeps():
    rows = np.diag([3.0, 2.0, 1.0]).astype(np.float32)
    np.testing.assert_allclose(projection_basis(rows, 1, "svd", np.array([1, 1, 100])).ravel(), [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(projection_basis(rows, 1, "svd").ravel(), [1, 0, 0], atol=1e-6)


def test_basis_of_pca_leaves_out_the_mean():
    rows = np.array([[10, 1], [10, -1], [10, 2], [10, -2]], dtype=np.float32)
    np.testing.assert_allclose(projection_basis(rows, 1, "pca").ravel(), [0, 1], atol=1e-5)
    np.testing.assert_allclose(projection_basis(rows, 1, "svd").ravel(), [1, 0], atol=1e-5)


def test_random_basis_is_orthonormal_and_seeded():
    one, again, other = (projection_basis(np.ones((3, 8), np.float32), 4, "random", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_allclose(one.T @ one, np.eye(4), atol=1e-6)
    assert np.array_equal(one, again) and not np.allclose(one, other)


def test_factorise_is_the_best_product_of_its_rank():
    torch.manual_seed(0)
    left, right = torch.randn(6, 9), torch.randn(6, 11)
    product = left.T @ right
    u, singular, v = torch.linalg.svd(product)
    for rank in (2, 6):
        a, b = _factorise(left, right, rank)
        torch.testing.assert_close(a.T @ b, (u[:, :rank] * singular[:rank]) @ v[:rank], atol=1e-4, rtol=1e-4)


def test_equal_widths_carry_over_unchanged(teacher, sentences):
    model = transformer_of(teacher)
    student = _new_model(model, transformer_shape(model.config.to_dict()), DenseStudentConfig())
    basis = initialise_from_teacher(student, model, [0, 1, 2, 3], DenseStudentConfig(), None)
    assert torch.equal(basis, torch.eye(32))
    batch = teacher.preprocess(sentences)
    with torch.no_grad():
        expected = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        output = student(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_silent_heads_and_dead_neurons_are_what_is_left_out(teacher, sentences):
    """A teacher of which half says nothing, and a student with room for the other half: the same vectors."""
    with torch.no_grad():
        for layer in transformer_of(teacher).encoder.layer:
            layer.attention.output.dense.weight[:, 8:24] = 0  # heads 1 and 2 of 4
            layer.output.dense.weight[:, ::2] = 0  # every other neuron
    student = build_student(teacher, DenseStudentConfig(layers=4, attention_heads=2, intermediate_size=32)).eval()
    assert transformer_of(student).config.num_attention_heads == 2
    np.testing.assert_allclose(student.encode(sentences), teacher.encode(sentences), atol=1e-4)


def test_roberta_positions_become_those_of_bert(tmp_path, teacher, sentences):
    """RoBERTa's first token has position padding row + 1; a BertModel counts from 0."""
    torch.manual_seed(1)
    settings = RobertaConfig(
        vocab_size=len(teacher.tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=66, pad_token_id=0, type_vocab_size=1, initializer_range=0.2,
    )  # fmt: skip
    RobertaModel(settings, add_pooling_layer=False).save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    roberta = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(32)], device="cpu").eval()
    roberta.max_seq_length = 64
    with torch.no_grad():
        for layer in transformer_of(roberta).encoder.layer:
            layer.output.dense.weight[:, 48:] = 0
    student = build_student(roberta, DenseStudentConfig(layers=2, intermediate_size=48)).eval()
    assert type(transformer_of(student)).__name__ == "BertModel"
    assert transformer_of(student).config.max_position_embeddings == 65
    np.testing.assert_allclose(
        student.encode(sentences), roberta.encode(sentences, normalize_embeddings=True), atol=3e-3
    )


def test_embeddings_are_the_projected_rows(teacher):
    counts = np.arange(len(teacher.tokenizer))
    whole_blocks = DenseStudentConfig(layers=2, hidden_size=16, intermediate_size=64, projection="svd")
    student = build_student(teacher, whole_blocks, counts)
    rows = transformer_of(teacher).embeddings.word_embeddings.weight.numpy()
    basis = projection_basis(rows, 16, "svd", counts)
    own = transformer_of(student).embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_allclose(own, rows @ basis, atol=1e-5)
    weight = transformer_of(student).encoder.layer[1].output.dense.bias.detach().numpy()
    np.testing.assert_allclose(
        weight, transformer_of(teacher).encoder.layer[3].output.dense.bias.numpy() @ basis, atol=1e-5
    )


def test_projecting_starts_nearer_to_the_teacher_than_a_random_start(labse, sentences):
    def similarity(**student):
        torch.manual_seed(0)
        own = build_student(labse, DenseStudentConfig(layers=4, head="dense", **student)).eval().encode(sentences)
        return float((own * labse.encode(sentences)).sum(axis=1).mean())

    narrow = {"hidden_size": 24, "attention_heads": 4}
    assert similarity(**narrow) > similarity(**narrow, initialisation="random") + 0.1
    assert similarity(embedding_size=24) > similarity(embedding_size=24, initialisation="random") + 0.1


@pytest.mark.parametrize(
    ("widths", "name", "dimension"),
    [
        ({"hidden_size": 16, "head": "dense"}, "BertModel", 32),
        ({"hidden_size": 16}, "BertModel", 16),
        ({"hidden_size": 24, "embedding_size": 8, "head": "dense"}, "ElectraModel", 32),
        ({"embedding_size": 8}, "ElectraModel", 32),
    ],
)
def test_every_shape_is_stock_saved_and_exported(labse, widths, name, dimension, tmp_path, sentences):
    student = build_student(labse, DenseStudentConfig(layers=2, **widths)).eval()
    assert type(transformer_of(student)).__name__ == name
    vectors = student.encode(sentences)
    assert vectors.shape == (len(sentences), dimension)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    save_encoder(student, tmp_path)
    assert (tmp_path / "2_Dense").is_dir() == ("head" in widths)
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path), device="cpu").encode(sentences), vectors, atol=1e-6)
    export_graph(student, tmp_path / "onnx" / "model.onnx")
    np.testing.assert_allclose(Encoder(tmp_path, file="onnx/model.onnx").encode(sentences), vectors, atol=1e-5)


def test_a_student_loads_without_a_warning(teacher, tmp_path, caplog):
    save_encoder(build_student(teacher, DenseStudentConfig(layers=2, hidden_size=16)), tmp_path)
    load_encoder(str(tmp_path))
    assert "MISSING" not in caplog.text and "newly initialized" not in caplog.text


def test_dense_head_reads_the_teachers_head_through_the_basis(labse):
    counts = np.ones(len(labse.tokenizer), dtype=np.int64)
    student = build_student(labse, DenseStudentConfig(layers=2, hidden_size=16, head="dense", projection="svd"), counts)
    basis = projection_basis(transformer_of(labse).embeddings.word_embeddings.weight.numpy(), 16, "svd", counts)
    np.testing.assert_allclose(
        student[2].linear.weight.detach().numpy(), labse[2].linear.weight.numpy() @ basis, atol=1e-5
    )
    assert torch.equal(student[2].linear.bias, labse[2].linear.bias)
    assert isinstance(student[2].activation_function, torch.nn.Tanh)


def test_the_teacher_keeps_its_weights(teacher, sentences):
    before = teacher.encode(sentences)
    student = build_student(teacher, DenseStudentConfig(layers=2, hidden_size=16, embedding_size=8))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    np.testing.assert_array_equal(teacher.encode(sentences), before)


def test_a_reduced_teacher_keeps_the_principal_directions(teacher, sentences, tmp_path):
    vectors = teacher.encode(sentences, normalize_embeddings=True)
    matrix = fit_reduction(teacher, sentences, 6)
    _, _, right = np.linalg.svd(vectors, full_matrices=False)
    np.testing.assert_allclose(np.abs(np.sum(matrix.T * right[:6], axis=1)), 1, atol=1e-3)
    expected = vectors @ matrix
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(reduced(teacher, matrix).encode(sentences), expected, atol=1e-5)
    save_reduction(matrix, tmp_path)
    np.testing.assert_array_equal(load_reduction(tmp_path), matrix)
    assert load_reduction(tmp_path / "elsewhere") is None
