"""optimum's own class."""

from pathlib import Path

from job import answer


def load(folder, job):
    name, pooling = Path(job["file"]).name, job["pooling"]
    # snippet
    import torch
    from optimum.onnxruntime import ORTModelForFeatureExtraction
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ORTModelForFeatureExtraction.from_pretrained(folder, subfolder="onnx", file_name=name)

    def encode(texts):
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        vectors = (states * mask).sum(1) / mask.sum(1) if pooling == "mean" else states[:, 0]
        return torch.nn.functional.normalize(vectors, dim=-1)

    # end
    return encode


answer(load, ["optimum", "optimum-onnx", "transformers", "onnxruntime"])
