"""sentence-transformers on PyTorch."""

from job import answer


def load(folder, job):
    # snippet
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(folder)
    # end
    return lambda texts: encoder.encode(texts, batch_size=len(texts), show_progress_bar=False)


answer(load, ["sentence-transformers", "transformers", "torch"])
