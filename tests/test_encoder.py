from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny import VOCABULARY, tiny_bundle, tiny_encoder

from distillabse import encoder as module
from distillabse import layout
from distillabse.batching import WINDOWS_AHEAD, micro_batches, overlapped, windows
from distillabse.encoder import Encoder
from distillabse.errors import ConfigurationError, InputError
from distillabse.tokenization import whole_characters

TEXTS = ["the cat", "Where is the house? " * 3, "", "hello world 123", "über", "no " * 300]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("student"), pooling="cls", dense=True)


@pytest.fixture(scope="module")
def bundle(student, tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle"), student)


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def change(file, **settings):
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_vectors_are_those_of_sentence_transformers_in_the_order_of_the_texts(student, bundle):
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(student), device="cpu").encode(TEXTS)
    vectors = Encoder(bundle).encode(TEXTS, batch_size=2)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors @ vectors.T - np.eye(len(TEXTS))).max() < 0.99  # no two texts have the same vector


def many(count):
    """Distinct texts whose lengths go up and down."""
    words = VOCABULARY[-80:]
    return [" ".join([words[number % 80]] * (1 + number * 7 % 23)) + f" {number}" for number in range(count)]


def test_micro_batches_hold_rows_of_like_length_within_the_budget():
    batches = [batch.tolist() for batch in micro_batches([3, 9, 4, 2, 30, 4], batch_size=None, token_budget=12)]
    # 30 tokens are more than the budget and go alone; 9 would take two rows to 18; 3 rows of 4 are 12.
    assert batches == [[4], [1], [2, 5, 0], [3]]
    assert [batch.tolist() for batch in micro_batches([3, 9, 4], batch_size=2, token_budget=1)] == [[1, 2], [0]]
    assert micro_batches([], None, 12) == []


def test_windows_end_by_number_and_by_size():
    assert list(windows(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(windows(["aaa", "bb", "c", "dddd"], 9, characters=4)) == [["aaa", "bb"], ["c", "dddd"]]


@pytest.mark.parametrize("threads", [1, 2])
def test_no_vector_depends_on_how_texts_are_cut_into_batches(bundle, threads):
    encoder, texts = Encoder(bundle, threads=threads), many(150)
    alone = np.concatenate([encoder.run(encoder.tokenize([text])) for text in texts])
    assert (alone[:-1] * alone[1:]).sum(axis=1).max() < 0.999  # a shifted order would be seen
    for settings in ({}, {"token_budget": 40}, {"batch_size": 7}, {"batch_size": 1}):
        vectors = encoder.encode(texts, **settings)
        assert (vectors * alone).sum(axis=1).min() > 0.99999, settings
        streamed = list(encoder.encode_stream(iter(texts), window=40, **settings))
        assert [len(part) for part in streamed] == [40, 40, 40, 30]
        assert (np.concatenate(streamed) * alone).sum(axis=1).min() > 0.99999, settings


def test_anything_that_gives_texts_is_encoded(bundle):
    pandas = pytest.importorskip("pandas")
    encoder, texts = Encoder(bundle), many(40)
    expected = encoder.encode(texts)
    for given in (tuple(texts), (text for text in texts), np.array(texts), pandas.Series(texts, index=range(7, 47)),
                  dict.fromkeys(texts), [np.str_(text) for text in texts]):  # fmt: skip
        np.testing.assert_allclose(encoder.encode(given), expected, atol=1e-6)
    vector = encoder.encode(texts[3])
    assert vector.shape == (32,)
    np.testing.assert_allclose(vector, expected[3], atol=1e-6)


def test_memory_does_not_grow_with_an_iterator_without_end(bundle):
    read = 0

    def endless():
        nonlocal read
        for number in itertools.count():
            read += 1
            yield f"cat {number % 1000}"

    encoder = Encoder(bundle, threads=2)
    stream = encoder.encode_stream(endless(), window=50)
    for window in range(1, 21):
        assert next(stream).shape == (50, 32)
        assert read <= (window + WINDOWS_AHEAD) * 50
    threads = threading.active_count()
    stream.close()
    assert threading.active_count() <= threads - 2  # the workers have gone


def test_a_failing_source_ends_the_stream_with_its_own_error(bundle):
    def failing():
        yield from many(100)
        raise OSError("the line is dead")

    before = threading.active_count()
    with pytest.raises(OSError, match="the line is dead"):
        Encoder(bundle, threads=2).encode(failing())
    assert threading.active_count() == before


def test_the_next_item_is_prepared_while_one_runs():
    """The first item's task ends only when the second has been prepared; without overlap it would wait for ever."""
    prepared = {number: threading.Event() for number in range(3)}

    def prepare(number):
        prepared[number].set()
        return [lambda: prepared[min(number + 1, 2)].wait(timeout=30)]

    assert list(overlapped(range(3), prepare, workers=1)) == [[True], [True], [True]]


def test_micro_batches_run_side_by_side():
    """Two tasks meet at a barrier, which only tasks that run at the same time can pass."""
    barrier = threading.Barrier(2, timeout=30)
    assert len(next(overlapped([0], lambda _: [barrier.wait, barrier.wait], workers=2))) == 2


def test_several_threads_may_encode_at_once(bundle):
    encoder, texts = Encoder(bundle, threads=2), many(120)
    expected = encoder.encode(texts)
    fresh = Encoder(bundle, threads=2)
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(lambda _: fresh.encode(texts, token_budget=60), range(8)):
            np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_no_texts_give_no_rows(bundle):
    encoder = Encoder(bundle)
    assert encoder.encode([]).shape == encoder.encode(iter(())).shape == (0, 32)
    assert encoder.encode([], truncate_dim=5, dtype="float16").shape == (0, 5)
    assert encoder.encode([], dtype="float16").dtype == encoder.encode([], dtype=np.float16).dtype == np.float16


def test_truncated_vectors_have_length_1_unless_that_is_not_wanted(bundle):
    encoder = Encoder(bundle)
    for texts in (TEXTS, many(40)):  # few and many
        whole = encoder.encode(texts)
        cut = encoder.encode(texts, truncate_dim=8, normalize=False)
        np.testing.assert_allclose(cut, whole[:, :8], atol=1e-6)
        unit = encoder.encode(texts, truncate_dim=8)
        np.testing.assert_allclose(unit, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
        half = encoder.encode(texts, truncate_dim=8, dtype="float16")
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, unit.astype(np.float16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"token_budget": -1}, "token_budget must be at least 1, not -1"),
        ({"truncate_dim": 0}, "between 1 and the dimension 32, not 0"),
        ({"truncate_dim": 33}, "between 1 and the dimension 32, not 33"),
        ({"dtype": "int8"}, "'float32' or 'float16', not 'int8'"),
        ({"dtype": "half float"}, "'float32' or 'float16', not 'half float'"),
        ({"window": 0}, "window must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_refused_before_the_first_vector(bundle, settings, message):
    with pytest.raises(ValueError, match=message):
        Encoder(bundle).encode_stream(["the"], **settings)
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        Encoder(bundle, threads=0)


def test_strange_texts_have_vectors(bundle):
    texts = ["", "a\0b", "\U0001f600", "cat " * 2500, "x" * 10_000, "\u2028", "a \ud800 b"]
    vectors = Encoder(bundle).encode(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_halves_of_surrogate_pairs_are_joined_or_replaced(bundle):
    tokenizer = Encoder(bundle)
    ids = [tokenizer.tokenize([text])["input_ids"].tolist() for text in ("the \ud800 cat", "the \ufffd cat")]
    assert ids[0] == ids[1]
    assert whole_characters("\ud83d\ude00 \udc00 \u00fc") == "\U0001f600 \ufffd \u00fc"


def test_the_bar_shows_texts_and_their_rate(bundle, capsys):
    Encoder(bundle, threads=2).encode(many(100), show_progress=True)
    error = capsys.readouterr().err
    assert "100/100" in error and "texts/s" in error
    Encoder(bundle).encode(many(100))
    assert capsys.readouterr() == ("", "")


def test_inputs_are_int64_padded_on_the_right(bundle):
    inputs = Encoder(bundle).tokenize(["the cat", "the"], pad_to=6)
    pad, cls, sep = (VOCABULARY.index(token) for token in ("[PAD]", "[CLS]", "[SEP]"))
    the, cat = VOCABULARY.index("the"), VOCABULARY.index("cat")
    assert inputs["input_ids"].tolist() == [[cls, the, cat, sep, pad, pad], [cls, the, sep, pad, pad, pad]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert set(inputs) == {"input_ids", "attention_mask"}  # the graph declares no token_type_ids
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == np.int64


def test_padding_does_not_change_a_vector(bundle):
    encoder = Encoder(bundle)
    alone, padded = (encoder.run(encoder.tokenize(["hello world"], pad_to=width)) for width in (None, 40))
    np.testing.assert_allclose(alone, padded, atol=1e-6)


def test_long_texts_are_cut_at_max_seq_length(copy):
    change(copy / layout.TRANSFORMER_SETTINGS, max_seq_length=5)
    assert Encoder(copy).tokenize(["the cat is very old"])["input_ids"].shape == (1, 5)


def test_lower_case_follows_the_settings(copy):
    the = VOCABULARY.index("the")
    assert the not in Encoder(copy).tokenize(["THE"])["input_ids"]
    change(copy / layout.TRANSFORMER_SETTINGS, do_lower_case=True)
    assert the in Encoder(copy).tokenize(["THE"])["input_ids"]


def test_padding_token_may_be_spelled_as_an_object_and_must_exist(copy):
    change(copy / layout.TOKENIZER_SETTINGS, pad_token={"content": "[MASK]"})
    inputs = Encoder(copy).tokenize(["the"], pad_to=4)
    assert inputs["input_ids"][0, -1] == VOCABULARY.index("[MASK]")
    change(copy / layout.TOKENIZER_SETTINGS, pad_token="<pad>")
    with pytest.raises(InputError, match=r"tokenizer_config\.json names no `pad_token`"):
        Encoder(copy)


def token_type_graph(path):
    """A graph whose vector is (sum of ids, sum of token_type_ids)."""
    import onnx
    from onnx import TensorProto, helper

    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in names]
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", 2])
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ids", "axis"], ["first"], keepdims=1),
        helper.make_node("ReduceSum", ["types", "axis"], ["second"], keepdims=1),
        helper.make_node("Concat", ["first", "second"], ["sentence_embedding"], axis=1),
    ]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "sums", inputs, [output], [axis])
    path.parent.mkdir(exist_ok=True)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)


def test_int8_graph_is_the_default_on_a_cpu_and_declared_inputs_are_fed(copy):
    token_type_graph(copy / layout.ONNX_INT8["avx2"])
    assert Encoder(copy, file=layout.ONNX_FP32).dimension == 32
    encoder = Encoder(copy, threads=1)
    assert encoder.dimension == 2
    ids = sum(VOCABULARY.index(token) for token in ("[CLS]", "the", "[SEP]"))
    assert encoder.encode(["the"]).tolist() == [[ids, 0]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "text 1 is None, not a string: drop it, or convert it with str"),
        (float("nan"), "text 1 is nan, not a string"),
        (b"cat", r"text 1 is b'cat', not a string: drop it, or decode it with \.decode\('utf-8'\)"),
        ([0] * 1000, r"\.\.\. \(list\), not a string"),
    ],
)
def test_what_is_no_text_is_refused_by_number_with_a_remedy(bundle, wrong, message):
    encoder = Encoder(bundle)
    with pytest.raises(TypeError, match=message):
        encoder.encode(["the cat", wrong])
    with pytest.raises(TypeError, match="text 1500 is"):  # counted from the start, not from its window
        list(encoder.encode_stream(iter(["cat"] * 1500 + [wrong]), window=1000))


def test_one_text_is_no_stream(bundle):
    with pytest.raises(TypeError, match=r"not one str: give \[text\]"):
        Encoder(bundle).encode_stream("the cat")
    with pytest.raises(TypeError, match=r"not one bytes: give \[text\]"):
        Encoder(bundle).encode(b"the cat")


@pytest.mark.parametrize(
    "file", [layout.ONNX_FP32, layout.TOKENIZER, layout.TOKENIZER_SETTINGS, layout.TRANSFORMER_SETTINGS]
)
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    with pytest.raises(InputError, match=file):
        Encoder(copy)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (layout.ONNX_FP32, r"ONNX Runtime cannot load .*onnx/model\.onnx"),
        (layout.TRANSFORMER_SETTINGS, r"sentence_bert_config\.json does not say `max_seq_length`"),
        (layout.TOKENIZER, r"tokenizer\.json is not a tokenizer"),
    ],
)
def test_a_file_without_its_content_is_named(copy, file, message):
    (copy / file).write_text("{}")
    with pytest.raises(InputError, match=message):
        Encoder(copy)


def test_a_wrong_folder_or_device_is_named(bundle, tmp_path):
    with pytest.raises(InputError, match=r"There is no bundle .*nowhere"):
        Encoder(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="'gpu' is not a device: choose 'cpu', 'cuda' or 'tensorrt'"):
        Encoder(bundle, device="gpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ir_version": 99}, r"model\.onnx has IR version 99, and ONNX Runtime .* knows those up to \d+\. .*opset=18"),
        ({"opset": 99}, r"model\.onnx has opset 99, and ONNX Runtime .* knows those up to \d+\. .*opset=18"),
        ({"rename": "words"}, r"has no input 'input_ids', only attention_mask, token_type_ids, words"),
        ({"rename": "words", "name": "token_type_ids"}, r"has an input 'words' that no bundle has"),
    ],
)
def test_a_graph_that_is_not_ours_or_too_new_is_refused(copy, changes, message):
    import onnx

    file = copy / layout.ONNX_FP32
    token_type_graph(file)
    model = onnx.load(file)
    model.ir_version = changes.get("ir_version", model.ir_version)
    model.opset_import[0].version = changes.get("opset", model.opset_import[0].version)
    if "rename" in changes:
        old = changes.get("name", "input_ids")
        next(node for node in model.graph.input if node.name == old).name = changes["rename"]
        for node in model.graph.node:
            node.input[:] = [changes["rename"] if name == old else name for name in node.input]
    onnx.save(model, file)
    with pytest.raises(InputError, match=message):
        Encoder(copy)


def test_missing_weights_beside_the_graph_are_named(copy):
    import onnx

    file = copy / layout.ONNX_FP32
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="model.onnx_data", size_threshold=512)
    assert Encoder(copy).dimension == 32
    (file.parent / "model.onnx_data").unlink()
    with pytest.raises(InputError, match=r"model\.onnx_data"):
        Encoder(copy)


def test_a_graph_without_sentence_vectors_is_refused(copy):
    import onnx

    model = onnx.load(copy / layout.ONNX_FP32)
    del model.graph.output[1]
    onnx.save(model, copy / layout.ONNX_FP32)
    with pytest.raises(InputError, match="no output 'sentence_embedding'"):
        Encoder(copy)


def test_a_gpu_that_is_not_used_is_an_error(bundle, monkeypatch):
    """onnxruntime-gpu falls back to the CPU in silence; the test does so on every machine."""
    monkeypatch.setitem(module.PROVIDERS, "cuda", ["CUDAExecutionProvider"])
    runtime = module.import_onnxruntime()
    real = runtime.InferenceSession
    monkeypatch.setattr(
        runtime, "InferenceSession", lambda path, options, providers: real(path, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(ConfigurationError, match="ONNX Runtime uses CPUExecutionProvider"):
        Encoder(bundle, device="cuda")


def test_missing_onnxruntime_names_the_extras(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'distillabse\[cpu\]'"):
        Encoder(bundle)


def test_sessions_run_on_the_threads_that_were_asked_for():
    options = module.session_options(threads=3)
    assert options.intra_op_num_threads == 3


def test_an_unknown_engine_or_a_gpu_with_openvino_is_refused(bundle):
    with pytest.raises(ConfigurationError, match="'tensorrt' is not an engine: choose 'onnxruntime' or 'openvino'"):
        Encoder(bundle, engine="tensorrt")
    with pytest.raises(ConfigurationError, match="OpenVINO runs on the CPU here, not on 'cuda'"):
        Encoder(bundle, engine="openvino", device="cuda")


def test_missing_openvino_names_the_extra(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'distillabse\[openvino\]'"):
        Encoder(bundle, engine="openvino")


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_gives_the_same_vectors(bundle, threads):
    pytest.importorskip("openvino")
    texts = many(80)
    encoder = Encoder(bundle, engine="openvino", threads=threads)
    expected = Encoder(bundle).encode(texts)
    assert encoder.dimension == 32
    np.testing.assert_allclose(encoder.encode(texts, token_budget=60), expected, atol=1e-4)
    np.testing.assert_allclose(encoder.encode(texts[:5]), expected[:5], atol=1e-4)


def test_openvino_names_a_graph_that_it_cannot_read(copy):
    pytest.importorskip("openvino")
    (copy / layout.ONNX_FP32).write_text("{}")
    with pytest.raises(InputError, match=r"OpenVINO cannot load .*model\.onnx"):
        Encoder(copy, engine="openvino")
    token_type_graph(copy / layout.ONNX_FP32)
    assert Encoder(copy, engine="openvino").encode("the")[1] == 0


def test_openvino_takes_the_fp32_graph_and_names_one_that_it_cannot_run(copy):
    pytest.importorskip("openvino")
    import onnx
    from onnx import helper

    file = copy / layout.ONNX_INT8["avx2"]
    token_type_graph(file)
    assert Encoder(copy, engine="openvino").dimension == 32
    model = onnx.load(file)
    shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [2], [7, 3])  # of no batch
    model.graph.initializer.append(shape)
    model.graph.node.insert(0, helper.make_node("Reshape", ["input_ids", "shape"], ["reshaped"]))
    model.graph.node[1].input[0] = "reshaped"
    onnx.save(model, file)
    with pytest.raises(InputError, match=r"OpenVINO cannot run .*quint8_avx2\.onnx .*file='onnx/model\.onnx'"):
        Encoder(copy, engine="openvino", file=layout.ONNX_INT8["avx2"])


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1)])
def test_the_default_number_of_threads_keeps_to_the_container(monkeypatch, tmp_path, quota, cores):
    from distillabse import cores as counted

    monkeypatch.setattr(counted.psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(counted.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(counted, "CPU_QUOTA", tmp_path / "cpu.max")
    assert counted.usable_cores() == cores


def test_nothing_heavy_is_imported(bundle):
    """What a service pays for at its start: not torch and its like, and no bar that is not shown."""
    heavy = "torch transformers sentence_transformers pydantic scipy sklearn pandas openvino onnx typer rich".split()
    code = (
        "import sys; from distillabse import Encoder\n"
        f"print(Encoder({str(bundle)!r}).encode(['the cat'] * 50).shape, set({heavy!r}) & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(50, 32) set()"


def test_the_package_gives_encoder_and_version():
    import distillabse

    assert distillabse.Encoder is Encoder
    assert distillabse.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'Decoder'"):
        distillabse.Decoder  # noqa: B018
