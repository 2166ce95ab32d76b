"""More English text than Common Voice, MASSIVE and Tatoeba hold: definitions, quotations, jokes, jargon.

    python benchmarks/open_text.py [--output data/open_text]

Fetches five Debian packages with `apt-get download` (no root needed) and writes one text file each, a sentence a line:
WordNet 3.0 (glosses and example sentences; WordNet licence), GCIDE (definitions and quotations of Webster 1913; GPL-3),
FOLDOC (GFDL-1.2), the Jargon File (public domain), and fortunes (BSD and public domain). What a student learns from
them is the teacher's vector of a sentence, never their content.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SHORTEST, LONGEST = 8, 300
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\u201d\u2019]*\s+(?=[\"'(\u201c\u2018]?[A-Z0-9])")
_GCIDE_NOISE = re.compile(r"\[[^\]]*\]|--[A-Z][^.]{0,40}\.(?:\s[\divxlc., ]+)?|\\[^\\]*\\|\(\?\)")
_ENTRY_NUMBER = re.compile(r"^\s*(?:\d+\.|\([a-z]\)|[nv]\.|adj\.|adv\.|vi\.|vt\.)\s*")


def main() -> None:
    """Fetch, take apart, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/open_text"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for name, take_apart in PACKAGES.items():
            (package,) = folder.glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "-x", str(package), str(folder / name)], check=True)
            texts = list(dict.fromkeys(usable(take_apart(folder / name / "usr/share"))))
            path = arguments.output / f"{name}.txt"
            path.write_text("\n".join(texts) + "\n", encoding="utf-8")
            print(f"{path}: {len(texts):,} texts from {package.name}")


def usable(texts: Iterable[str]) -> Iterator[str]:
    """Texts of one line, neither too short nor too long, made of words."""
    for text in texts:
        one_line = " ".join(text.split())
        letters = sum(character.isalpha() for character in one_line)
        if SHORTEST <= len(one_line) <= LONGEST and letters > 0.6 * len(one_line):
            yield one_line


def sentences(text: str) -> list[str]:
    """Cut where a sentence ends and the next begins with a capital letter or a digit."""
    return _SENTENCE_END.split(" ".join(text.split()))


def wordnet(share: Path) -> Iterator[str]:
    """Glosses: the definition, and each example sentence."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (share / "wordnet" / f"data.{part}").read_text(encoding="utf-8").splitlines():
            _, bar, gloss = line.partition(" | ")
            if bar:
                yield gloss.partition('; "')[0]
                yield from re.findall(r'"([^"]+)"', gloss)


def gcide(share: Path) -> Iterator[str]:
    """Paragraphs of an entry without numbers, sources, pronunciations and links."""
    for paragraph in _paragraphs(share / "dictd/gcide.dict.dz"):
        text = _GCIDE_NOISE.sub(" ", paragraph).replace("{", "").replace("}", "")
        yield from sentences(_ENTRY_NUMBER.sub("", text))


def dictionary(name: str) -> Callable[[Path], Iterator[str]]:
    """Paragraphs of another dictd file."""

    def take_apart(share: Path) -> Iterator[str]:
        for paragraph in _paragraphs(share / f"dictd/{name}.dict.dz"):
            text = re.sub(r"<[^>]*>", " ", paragraph).replace("{", "").replace("}", "")
            yield from sentences(_ENTRY_NUMBER.sub("", text))

    return take_apart


def fortunes(share: Path) -> Iterator[str]:
    """The sentences of every fortune, without who said it."""
    for path in sorted((share / "games/fortunes").rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix not in {".dat", ".u8"}:
            for fortune in path.read_text(encoding="utf-8", errors="ignore").split("\n%\n"):
                yield from sentences(re.sub(r"\n?\s+-- .*", "", fortune, flags=re.DOTALL))


def _paragraphs(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8", errors="ignore") as file:
        return re.split(r"\n\s*\n", file.read())


PACKAGES: dict[str, Callable[[Path], Iterator[str]]] = {
    "wordnet-base": wordnet,
    "dict-gcide": gcide,
    "dict-foldoc": dictionary("foldoc"),
    "dict-jargon": dictionary("jargon"),
    "fortunes": fortunes,
}

if __name__ == "__main__":
    main()
