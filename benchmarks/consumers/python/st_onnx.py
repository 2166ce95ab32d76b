"""sentence-transformers on ONNX Runtime, through optimum."""

from job import answer


def load(folder, job):
    file = job["file"]
    # snippet
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(folder, backend="onnx", model_kwargs={"file_name": file})
    # end
    return lambda texts: encoder.encode(texts, batch_size=len(texts), show_progress_bar=False)


answer(load, ["sentence-transformers", "transformers", "optimum-onnx", "onnxruntime"])
