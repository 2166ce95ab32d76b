"""The process of one engine: `python -m distillabse.evaluation.latency_worker`, started by `workers.Worker`.

The first line on stdin is the engine; each further line is a question, answered with one line on stdout:

* {"texts": [...]} with {"tokens": [...]}, their lengths;
* {"batches": [[...], ...], "seconds": s} with {"seconds": [...]}, the time of every batch, and "wall_seconds" where the
  first are a GPU's;
* {"encode": [[...], ...], "file": f} with {"rows": n}: vectors of exactly these batches, written to f as .npy;
* {"bulk": [...], "file": f or absent} with {"seconds": s}: all texts in the engine's own batches;
* {"first": [...]} with {"finished": t}, when their vectors were there by `time.monotonic`;
* {"memory": true} with {"loaded_bytes": n, "peak_bytes": n, "gpu_peak_bytes": n or null}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distillabse.evaluation.engines import LoadedEngine, clocks_of, load

LONGEST_REST = 1.0
STATUS = Path("/proc/self/status")


def time_batches(
    encode: Callable[[list[str]], Any],
    batches: list[list[str]],
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[float]:
    """Encode the whole list of batches once, and again until `seconds` are used up; the seconds of every call."""
    return timed_batches(encode, batches, seconds, [clock])[0]


def timed_batches(
    encode: Callable[[list[str]], Any], batches: list[list[str]], seconds: float, clocks: Sequence[Callable[[], int]]
) -> list[list[float]]:
    """As `time_batches`, for several clocks of nanoseconds: a list for each. The first says when time is used up."""
    spent: list[list[float]] = [[] for _ in clocks]
    while not spent[0] or sum(spent[0]) < seconds:
        for batch in batches:
            starts = [clock() for clock in clocks]
            encode(batch)
            for times, clock, start in zip(spent, clocks, starts, strict=True):
                times.append((clock() - start) / 1e9)
    return spent


def come_to_rest() -> None:
    """Wait until this process uses no CPU time: ONNX Runtime's threads spin for some 40 ms after their work is done.

    Otherwise they would take a core from the engine whose turn is next.
    """
    give_up = time.monotonic() + LONGEST_REST
    used = -1.0
    while time.process_time() - used > 0.001 and time.monotonic() < give_up:
        used = time.process_time()
        time.sleep(0.01)


def memory_bytes() -> tuple[int, int]:
    """Bytes of memory that this process holds, and held at most.

    From /proc, whose peak belongs to this program alone: `getrusage` counts what the process held before it became this
    program, which is a copy of its parent.
    """
    try:
        lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines())
        return 1024 * int(lines["VmRSS"].split()[0]), 1024 * int(lines["VmHWM"].split()[0])
    except (OSError, KeyError, ValueError):
        import resource

        import psutil

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return int(psutil.Process().memory_info().rss), int(peak)


def answer_to(question: dict[str, Any], engine: LoadedEngine, loaded_bytes: int) -> dict[str, Any]:
    """What the module's docstring promises for one question."""
    if "texts" in question:
        return {"tokens": engine.tokens(question["texts"])}
    if "memory" in question:
        peak_of_gpu = getattr(engine, "gpu_peak_bytes", lambda: None)()
        return {"loaded_bytes": loaded_bytes, "peak_bytes": memory_bytes()[1], "gpu_peak_bytes": peak_of_gpu}
    if "first" in question:
        engine.encode(question["first"])
        return {"finished": time.monotonic()}
    if "encode" in question:
        return {"rows": _write(question["file"], [engine.encode(batch) for batch in question["encode"]])}
    clocks = clocks_of(engine)
    if "bulk" in question:
        found: list[Any] = []
        seconds = timed_batches(lambda texts: found.append(engine.bulk(texts)), [question["bulk"]], 0, clocks)[0][0]
        if "file" in question:
            _write(question["file"], found)
        return {"seconds": seconds}
    times = timed_batches(engine.encode, question["batches"], question["seconds"], clocks)
    return {"seconds": times[0], **({"wall_seconds": times[1]} if len(times) > 1 else {})}


def serve(load: Callable[..., LoadedEngine]) -> None:
    """Answer the lines on stdin until it is closed, with the engine that `load` makes of the first line's values."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not an answer
    settings = json.loads(sys.stdin.readline())
    # Before anything starts threads: they stay where their process is.
    if cpus := settings.pop("cpus", None):
        os.sched_setaffinity(0, cpus)
    engine = load(**settings)
    loaded_bytes = memory_bytes()[0]
    for line in sys.stdin:
        answer = answer_to(json.loads(line), engine, loaded_bytes)
        come_to_rest()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _write(file: str, parts: list[Any]) -> int:
    import numpy as np

    vectors = np.concatenate(parts).astype(np.float32)
    np.save(file, vectors, allow_pickle=False)
    return len(vectors)


if __name__ == "__main__":
    serve(load)
