"""Word alignment by eflomal: a Bayesian hidden Markov model with fertilities, estimated by sampling.

Östling and Tiedemann 2016, "Efficient word alignment with Markov Chain Monte Carlo".
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distillabse.alignment.words import Words
from distillabse.errors import ConfigurationError, DistillabseError


def require_eflomal() -> Path:
    """The script that aligns.

    Raises:
        ConfigurationError: eflomal is not installed.
    """
    try:
        files = metadata.files("eflomal") or []
    except metadata.PackageNotFoundError:
        files = []
    script = next((Path(str(file.locate())).resolve() for file in files if file.name == "eflomal-align"), None)
    if script is None or not script.is_file():
        raise ConfigurationError(
            "aligner: eflomal is not installed. Install it with `pip install 'distillabse[align]'`, which builds it "
            "with a C compiler and make, or set aligner: ibm1, which needs nothing."
        )
    return script


def align(source: Words, translation: Words) -> NDArray[np.int64]:
    """The links that eflomal finds in both directions. It samples, so two runs differ in a few.

    It runs as a program of its own and reads the numbers of the words.

    Args:
        source, translation: sentences of one language, and their translations into one other, in the same order.

    Returns:
        int64 [links, 2]: places in `source.ids` and in `translation.ids`, in the order of the source.

    Raises:
        ConfigurationError: eflomal is not installed.
        DistillabseError: it failed; the message is its own.
    """
    script = require_eflomal()
    pairs = np.flatnonzero((source.lengths > 0) & (translation.lengths > 0))
    if not len(pairs):
        return np.empty((0, 2), np.int64)
    with tempfile.TemporaryDirectory() as folder:
        texts, directions = ([Path(folder) / name for name in names] for names in (("s", "t"), ("f", "r")))
        for words, text in zip((source, translation), texts, strict=True):
            _write(words, pairs, text)
        options = zip(("-s", "-t", "-f", "-r"), (*texts, *directions), strict=True)
        command = [sys.executable, str(script), *(str(part) for option in options for part in option)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise DistillabseError(
                f"eflomal failed: {finished.stderr.strip()[-1000:]} Set aligner: ibm1 to do without."
            )
        forward, backward = (_read(file, source, translation, pairs) for file in directions)
    # One number for each cell: what both directions hold is linked.
    base = len(translation.ids)
    both = np.intersect1d(forward @ [base, 1], backward @ [base, 1])
    return np.stack(np.divmod(both, base), axis=1)


def _write(words: Words, pairs: NDArray[np.int64], file: Path) -> None:
    with file.open("w", encoding="ascii") as text:
        for pair in pairs:
            ids = words.ids[words.starts[pair] : words.starts[pair + 1]]
            text.write(" ".join(map(str, ids.tolist())) + "\n")


def _read(file: Path, source: Words, translation: Words, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Links of lines such as "0-0 2-1", as places: int64 [links, 2]."""
    lines = file.read_text(encoding="ascii").splitlines()
    counts = np.fromiter((line.count("-") for line in lines), np.int64, len(pairs))
    inside = np.array(" ".join(lines).replace("-", " ").split(), np.int64).reshape(-1, 2)
    pair = np.repeat(pairs, counts)
    return inside + np.stack([source.starts[pair], translation.starts[pair]], axis=1)
