"""fastembed with a custom model."""

from job import answer


def load(folder, job):
    graph, dimension = job["file"], job["dimension"]
    pooling_type = {"mean": "MEAN", "cls": "CLS", "none": "DISABLED"}[job["pooling"]]
    # snippet
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="my/encoder",
        pooling=PoolingType[pooling_type],  # MEAN or CLS as 1_Pooling says; DISABLED for onnx/model_pooled*.onnx
        normalization=True,
        sources=ModelSource(hf="my/encoder"),
        dim=dimension,
        model_file=graph,
    )
    encoder = TextEmbedding("my/encoder", specific_model_path=folder)
    # end
    return lambda texts: list(encoder.embed(texts, batch_size=len(texts)))


answer(load, ["fastembed", "onnxruntime", "tokenizers"])
