"""Does memory stay flat, and the cost of a sentence too, when the corpus grows?

    python benchmarks/streaming_corpus.py [--millions 1 10 50] [--corpus-only] [--folder FOLDER]

Writes made-up sentences in four languages as one .tsv file, builds the corpus from it with corpus.streaming, tokenises
ten million sentences of the train split at most and reads the first two million of an epoch as batches. For every size
each of the two has a process of its own, whose peak memory is the operating system's figure; a row is a sentence. Needs
up to 300 bytes of disk per row, and writes benchmarks/results/streaming_corpus.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
LANGUAGES = ("de", "en", "fr", "sv")
DUPLICATES = 0.01  # share of rows that repeat an earlier row of their block, exactly or in upper case
BLOCK = 100_000
BATCH = 64
TOKENISED = 10_000_000  # sentences at most
READ = 2_000_000  # sentences of an epoch, which come from all over the file
SEED = 0


def main() -> None:
    """Measure every size, print a table, write the result."""
    from rich.console import Console
    from rich.table import Table

    from distillabse.environment import describe_environment
    from distillabse.storage import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 50])
    parser.add_argument("--corpus-only", action="store_true", help="neither tokenise nor read batches")
    parser.add_argument("--folder", type=Path, help="where to put the text; by default the system's temporary folder")
    arguments = parser.parse_args()
    rows = []
    for millions in arguments.millions:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            text = Path(folder) / "text.tsv"
            write_sentences(text, round(millions * 1e6))
            row = {"millions": millions, "text_bytes": text.stat().st_size, "corpus": apart(build, text, Path(folder))}
            if not arguments.corpus_only:
                row["training"] = apart(tokenise_and_read, Path(folder))
        rows.append(row)
        Console().print(json.dumps(row))
        write_json(
            RESULTS / "streaming_corpus.json",
            {
                "command": f"python benchmarks/streaming_corpus.py {' '.join(sys.argv[1:])}".rstrip(),
                "languages": LANGUAGES,
                "duplicates": DUPLICATES,
                "rows": sorted(rows, key=lambda row: row["millions"]),
                "environment": describe_environment(),
            },
        )
    headings = ["million rows", "reading rows/s", "writing rows/s", "peak MB"]
    if not arguments.corpus_only:
        headings += ["tokenising sentences/s", "batches: sentences/s", "peak MB"]
    table = Table(*headings)
    for row in rows:
        steps = [row["corpus"], row["training"]] if "training" in row else [row["corpus"]]
        cells = [f"{value:,.0f}" for step in steps for value in (*step["rows_per_second"].values(), step["peak_mb"])]
        table.add_row(f"{row['millions']:g}", *cells)
    Console().print(table)


def write_sentences(path: Path, rows: int) -> None:
    """Sentences of 2 to 10 words, as subtitles have, from 50,000 words of each language, the frequent ones short."""
    generator = np.random.default_rng(SEED)
    words = {language: vocabulary(generator) for language in LANGUAGES}
    with path.open("w", encoding="utf-8") as file:
        file.write("text\tlanguage\n")
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            lengths = generator.integers(2, 11, size=count)
            ranks = (generator.zipf(1.1, size=int(lengths.sum())) - 1) % 50_000
            languages = generator.integers(len(LANGUAGES), size=count)
            repeated = generator.random(count) < DUPLICATES
            lines: list[str] = []
            position = 0
            for row in range(count):
                language = LANGUAGES[languages[row]]
                end = position + lengths[row]
                sentence = " ".join([words[language][rank] for rank in ranks[position:end]])
                position = end
                line = f"{sentence} {start + row:x}.\t{language}"  # the number makes it distinct
                if repeated[row] and lines:
                    text, language = lines[row // 2].split("\t")
                    line = f"{text.upper() if row % 2 else text}\t{language}"
                lines.append(line)
            file.write("\n".join(lines) + "\n")


def vocabulary(generator: np.random.Generator) -> list[str]:
    """50,000 made-up words of 2 to 12 letters, the more frequent the shorter; one letter in ten has an accent."""
    letters = np.array(list("aeioubcdfghjklmnprstvz" * 2 + "äöéß"))
    lengths = np.sort(generator.integers(2, 13, size=50_000))
    return ["".join(generator.choice(letters, size=length)) for length in lengths]


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of a function that ran in a fresh process, with that process's peak memory as `peak_mb`."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(with_peak_memory, (function, *arguments))


def with_peak_memory(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function returns, its CPU time, the resident memory before it and the most of it in MB of 10^6 bytes."""
    import psutil
    import pyarrow.parquet  # noqa: F401 - what every step imports is no memory of the step

    before, started = psutil.Process().memory_info().rss, time.process_time()
    result = function(*arguments)
    cpu_seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB on Linux
    memory = {"peak_mb": round(peak / 1e6, 1), "before_mb": round(before / 1e6, 1)}
    return {**result, "cpu_seconds": round(cpu_seconds, 2), **memory}


def build(text: Path, folder: Path) -> dict[str, Any]:
    """Build the corpus; rows read per second of each pass, and what came out."""
    from distillabse.config import CorpusConfig
    from distillabse.corpus.streaming import stream_corpus

    source = {"kind": "files", "path": str(text), "language_column": "language"}
    config = CorpusConfig(sources=[source], streaming=True)
    paths = {name: folder / f"{name}.parquet" for name in ("train", "dev", "test")}
    corpus = stream_corpus(config, SEED, paths)
    rows = corpus.counts["sources"][0]["read"]
    return {
        "rows": rows,
        "seconds": {name: round(seconds, 2) for name, seconds in corpus.seconds.items()},
        "seconds_per_million": round(sum(corpus.seconds.values()) * 1e6 / rows, 2),
        "rows_per_second": {name: round(rows / seconds) for name, seconds in corpus.seconds.items()},
        "train_rows": corpus.counts["splits"]["train"]["rows"],
        "duplicates": corpus.counts["duplicates"],
    }


def tokenise_and_read(folder: Path) -> dict[str, Any]:
    """Tokenise the train split and read an epoch's first padded batches; sentences per second of both."""
    from distillabse.config import TeacherConfig
    from distillabse.corpus.records import training_texts
    from distillabse.models.teacher import load_teacher
    from distillabse.training.batches import SentenceBatches, SentenceLoader
    from distillabse.training.data import PaddingCollator, tokenise_corpus

    encoder = load_teacher(TeacherConfig(model="packaged:all-MiniLM-L6-v2"), "cpu")
    started = time.perf_counter()
    texts = islice(training_texts(folder / "train.parquet", distinct=False), TOKENISED)
    sentences = tokenise_corpus(encoder, texts, folder / "tokens")
    tokenised = time.perf_counter()
    sampler = SentenceBatches(
        sentences, batch_size=BATCH, accumulation=1, rank=0, processes=1, seed=SEED, by_length=True
    )
    loader = SentenceLoader(
        sentences, batch_sampler=sampler, collate_fn=PaddingCollator(encoder.tokenizer.pad_token_id)
    )
    read = sum(len(batch["input_ids"]) for batch in islice(loader, READ // BATCH))
    finished = time.perf_counter()
    seconds = {"tokenising": tokenised - started, "batches": finished - tokenised}
    return {
        "sentences": len(sentences),
        "read": read,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seconds_per_million": round((seconds["tokenising"] / len(sentences) + seconds["batches"] / read) * 1e6, 2),
        "rows_per_second": {
            "tokenising": round(len(sentences) / seconds["tokenising"]),
            "batches": round(read / seconds["batches"]),
        },
    }


if __name__ == "__main__":
    main()
