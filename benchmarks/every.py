"""Make every result again that this machine can, one command after the other.

    python benchmarks/every.py             # the comparison and its page, and what takes minutes
    python benchmarks/every.py --long      # what takes hours, too
    python benchmarks/every.py --list      # what there is, and what each needs

What a benchmark needs and is not there is said, and that one is left out. One that fails does not stop the others; the
exit status is 1 then. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT, TASKS = "data/mono_train/en.tsv.gz", "data/eval/tatoeba_test.tsv.gz"
MINILM = "runs/engines/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Benchmark:
    """One command.

    Attributes:
        command: script and arguments, after `python benchmarks/`.
        needs: files and folders, from the root of the repository, and programs, as "program:npm".
        long: whether it takes more than about twenty minutes on two cores.
    """

    command: str
    needs: tuple[str, ...] = (TEXT, TASKS)
    long: bool = False


BENCHMARKS = (
    Benchmark("comparison.py train"),
    Benchmark("comparison.py judge"),
    Benchmark("comparison.py measure"),
    Benchmark("comparison.py measure --output runs/comparison-again.json"),
    Benchmark("agreement.py benchmarks/results/comparison.json runs/comparison-again.json"),
    Benchmark("open_text.py", ("program:apt-get",), long=True),
    Benchmark("best_students.py prepare", (TEXT, "data/open_text"), long=True),
    Benchmark("best_students.py train", ("data/broad/test.txt", "runs/multilingual-minilm/student"), long=True),
    Benchmark("best_students.py measure", ("runs/best-3x384-longer/bundle", "runs/best-multilingual-1x256-256/bundle")),
    Benchmark("benchmarks_page.py --write", ()),
    Benchmark("student_shapes.py"),
    Benchmark(f"session_settings.py {MINILM}", (MINILM,)),
    Benchmark("int8.py packaged:all-MiniLM-L6-v2", (TEXT,), long=True),
    Benchmark(f"encode_throughput.py {MINILM}", (TEXT, MINILM)),
    Benchmark(f"engines.py {MINILM}", (TEXT, MINILM), long=True),
    Benchmark(f"consumers/run.py {MINILM}", (TEXT, MINILM, "program:npm", "program:chromium")),
    Benchmark("shipping_tables.py --write", ()),
    Benchmark("quantization_aware.py packaged:all-MiniLM-L6-v2", (TEXT,), long=True),
    Benchmark("real_text.py", long=True),
    Benchmark("small_students.py", long=True),
    Benchmark("switch.py"),
    Benchmark("switch_fidelity.py", long=True),
    Benchmark("teacher_cache.py", long=True),
    Benchmark("pair_tricks.py", long=True),
    Benchmark("mmkd_levels.py", long=True),
    Benchmark("word_alignment.py", (TEXT, "program:eflomal")),
    Benchmark("multilingual.py floor", ("runs/multilingual-minilm/student",), long=True),
    Benchmark("multilingual.py curve", long=True),
    Benchmark("multilingual.py tasks", ("runs/multilingual-minilm/bundle", TASKS), long=True),
    Benchmark("streaming_corpus.py", (), long=True),
    Benchmark("training_throughput.py", (TEXT, "runs/peers/textbrewer"), long=True),
    Benchmark("fault_injection.py", (), long=True),
    Benchmark("zero_memory.py", (), long=True),
    Benchmark("zero_paper.py", ()),
)


def main() -> None:
    """Run what can be run, then say how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    ended = []
    for benchmark in BENCHMARKS:
        why = left_out(benchmark, arguments.long)
        if arguments.list or why:
            ended.append((benchmark.command, why or "can run"))
            continue
        print(f"\n== {benchmark.command}", flush=True)
        started = time.monotonic()
        script, *rest = benchmark.command.split()
        status = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *rest], cwd=ROOT).returncode
        minutes = (time.monotonic() - started) / 60
        ended.append((benchmark.command, f"{'done' if status == 0 else f'FAILED ({status})'} in {minutes:.1f} minutes"))
    report(ended)
    raise SystemExit(any(how.startswith("FAILED") for _, how in ended))


def left_out(benchmark: Benchmark, long: bool) -> str:
    """Why a benchmark is not run; empty where it is."""
    if missing := [need for need in benchmark.needs if not is_there(need)]:
        return f"left out: needs {', '.join(missing)}"
    return "left out: takes long, give --long" if benchmark.long and not long else ""


def is_there(need: str) -> bool:
    """Whether a file, a folder or a program is at hand."""
    program = need.removeprefix("program:")
    return shutil.which(program) is not None if program != need else (ROOT / need).exists()


def report(ended: Sequence[tuple[str, str]]) -> None:
    """How each ended, as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("benchmark", "", title="benchmarks/every.py")
    for row in ended:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
