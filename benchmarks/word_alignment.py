"""How far the two word aligners agree, and what they make of words that are spelt alike in both languages.

    pip install 'distillabse[align]'
    python benchmarks/word_alignment.py --data data

There are no hand-made links to compare with. Names and numbers that stand once on either side of a pair should be
linked with each other: that is a small truth that needs no annotator. eflomal samples, so it is compared with itself,
too.
Writes benchmarks/results/word_alignment.json and prints the table of docs/pair-objectives.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from scaling_tables import markdown

RESULT = Path(__file__).parent / "results" / "word_alignment.json"
LANGUAGES = {"de": "German", "fr": "French", "zh": "Chinese"}
PAIRS = 20_000
_SHORTEST_NAME = 4


def main() -> None:
    """Align, compare, write, print."""
    import numpy as np

    from distillabse.alignment import align_pairs
    from distillabse.config import FileSource
    from distillabse.corpus.records import Record
    from distillabse.corpus.sources import read_source
    from distillabse.environment import describe_environment
    from distillabse.storage import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    languages: dict[str, Any] = {}
    for language in LANGUAGES:
        source = FileSource(
            path=str(arguments.data / "parallel_train" / f"{language}.tsv.gz"),
            text="en", language="en", translation="xx", translation_language=language,
        )  # fmt: skip
        rows = [row for row in read_source(source, 0) if isinstance(row, Record)]
        chosen = np.random.default_rng(0).permutation(len(rows))[:PAIRS]
        pairs = [(rows[number].text, str(rows[number].translation)) for number in chosen]
        labels = [language] * len(pairs)
        started = time.process_time()
        ibm1 = align_pairs(pairs, "ibm1", labels)
        seconds = time.process_time() - started
        eflomal, again = (align_pairs(pairs, "eflomal", labels) for _ in range(2))
        found, wanted, repeated = (set(map(tuple, links.tolist())) for links in (ibm1, eflomal, again))
        languages[language] = {
            "ibm1_links": len(found),
            "eflomal_links": len(wanted),
            "ibm1_in_eflomal": len(found & wanted) / len(found),
            "eflomal_in_ibm1": len(found & wanted) / len(wanted),
            "eflomal_in_second_run": len(wanted & repeated) / len(wanted),
            "spelt_alike": spelt_alike(pairs, ibm1),
            "ibm1_cpu_seconds": round(seconds, 1),
        }
        print(language, languages[language], flush=True)
    command = f"python benchmarks/word_alignment.py --data {arguments.data}"
    write_json(
        RESULT, {"command": command, "pairs": PAIRS, "languages": languages, "environment": describe_environment()}
    )
    print(alignment_table())


def spelt_alike(pairs: list[tuple[str, str]], links: Any) -> dict[str, int]:
    """What becomes of words that stand once on either side: linked right, linked wrong, or not linked."""
    from distillabse.alignment.words import words_of

    linked = {(pair, start, end): (first, last) for pair, start, end, first, last in links.tolist()}
    counts: Counter[str] = Counter()
    for number, sides in enumerate(pairs):
        source, translation = (words_of(side) for side in sides)
        often = [Counter(word.text for word in side) for side in (source, translation)]
        place = {word.text: (word.start, word.end) for word in translation}
        for word in source:
            is_name = word.text[0].isdigit() or len(word.text) >= _SHORTEST_NAME
            if is_name and often[0][word.text] == often[1][word.text] == 1:
                got = linked.get((number, word.start, word.end))
                counts["none" if got is None else "right" if got == place[word.text] else "wrong"] += 1
    return {name: counts[name] for name in ("right", "wrong", "none")}


def alignment_table() -> str:
    """The table of the documents."""
    measured = json.loads(RESULT.read_text(encoding="utf-8"))["languages"]
    names = [LANGUAGES[language] for language in measured]

    def row(label: str, value: Any) -> list[str]:
        return [label, *(f"{100 * value(figures):.1f} %" for figures in measured.values())]

    def right(figures: Any) -> float:
        alike = figures["spelt_alike"]
        return float(alike["right"] / (alike["right"] + alike["wrong"]))

    def covered(figures: Any) -> float:
        alike = figures["spelt_alike"]
        return float(1 - alike["none"] / sum(alike.values()))

    return markdown(
        ["", *names],
        [
            row("`ibm1` links that eflomal has, too", lambda figures: figures["ibm1_in_eflomal"]),
            row("eflomal's links that `ibm1` has, too", lambda figures: figures["eflomal_in_ibm1"]),
            row("eflomal's links that its second run has, too", lambda figures: figures["eflomal_in_second_run"]),
            row("links of words spelt alike (names, numbers) that are right", right),
            row("... of these words that have a link", covered),
        ],
    )


if __name__ == "__main__":
    main()
