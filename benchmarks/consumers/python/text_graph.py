"""The flavor single-file: ONNX Runtime and onnxruntime-extensions, without a tokenizer library."""

from job import answer


def load(folder, job):
    graph = job["file"]
    # snippet
    import numpy as np
    import onnxruntime
    from onnxruntime_extensions import get_library_path

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(get_library_path())
    session = onnxruntime.InferenceSession(f"{folder}/{graph}", options)

    def encode(texts):
        return session.run(["sentence_embedding"], {"text": np.array(texts, dtype=object)})[0]

    # end
    return encode


answer(load, ["onnxruntime", "onnxruntime-extensions"])
