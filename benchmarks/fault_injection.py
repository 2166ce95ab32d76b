"""Whether a training job comes through what happens to jobs: killed, out of disk, damaged, asked to stop, NaN.

    python benchmarks/fault_injection.py [--folder FOLDER] [--parallel 2] [--only kill,disk,damage,signal,worker,nan]

A small job (240 steps, 10 checkpoints, dropout, a Dense head, a DataLoader worker, batches by length) is run once
without a fault through the command line. Then every fault hits a run of its own, and the same command is run again
until it ends. It came through when its student has the weights of the undisturbed one byte for byte, and every figure
logged is the same; when it went on from the newest checkpoint whose SHA256SUMS held at the moment of the fault; and
when no temporary folder and no unfinished checkpoint is left.

Writes benchmarks/results/fault_injection.json, in which --only leaves other kinds of faults as they were; exit status 1
when a fault was not survived. Takes 15 minutes on two cores. Disks that fill up are tmpfs mounts: skipped without root.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from fault_jobs import BATCH, EVERY, STEPS, VARIANTS, Ended, Job, Reference, pages, state, write_config

# Checkpoints that stay, and bytes that the token ids take.
KEPT, TOKENS = 2, 90_000
RESULTS = Path(__file__).parent / "results"
SEED = 20
RANDOM_KILLS = {"live teacher": 8, "teacher cache": 5}
Result = dict[str, Any]
Case = tuple[str, str, Callable[[Reference, Path], Result]]  # fault, variant, what to do


def main() -> None:
    """Run every fault, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the runs; by default a temporary one")
    parser.add_argument("--parallel", type=int, default=2, help="jobs at a time")
    parser.add_argument("--only", default="kill,disk,damage,signal,worker,nan")
    arguments = parser.parse_args()
    from rich.console import Console

    from distillabse.environment import describe_environment
    from distillabse.storage import read_json, write_json

    console = Console(width=180)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        cases = [case for case in all_cases() if case[0].split(":")[0] in arguments.only.split(",")]
        needed = [variant for variant in VARIANTS if any(case[1] == variant for case in cases)]
        for variant in needed:
            write_config(folder, variant)
        with ThreadPoolExecutor(arguments.parallel) as pool:
            references = dict(zip(needed, pool.map(partial(Reference, folder), needed), strict=True))
            for variant, reference in references.items():
                console.print(f"{variant}: {reference.seconds:.0f} s without a fault")
            waiting = [pool.submit(run_case, *case, references[case[1]], folder / f"case-{number}")
                       for number, case in enumerate(cases)]  # fmt: skip
            results = []
            for future in waiting:
                results.append(future.result())
                console.print(f"{len(results)}/{len(cases)} {results[-1]['fault']}: {results[-1]['verdict']}")
    path = RESULTS / "fault_injection.json"
    if path.is_file():
        earlier = read_json(path)["faults"]
        results += [one for one in earlier if one["fault"].split(":")[0] not in arguments.only.split(",")]
    verdicts = [result["verdict"] for result in results]
    write_json(
        path,
        {
            "command": f"python benchmarks/fault_injection.py --parallel {arguments.parallel} --only {arguments.only}",
            "steps": STEPS,
            "steps_between_checkpoints": EVERY,
            **{verdict: verdicts.count(verdict) for verdict in ("survived", "skipped")},
            "not_survived": len(verdicts) - verdicts.count("survived") - verdicts.count("skipped"),
            "faults": results,
            "environment": describe_environment(),
        },
    )
    console.print(table(results))
    sys.exit(0 if set(verdicts) <= {"survived", "skipped"} else 1)


def all_cases() -> Iterator[Case]:
    """Every fault with the variant that it hits; moments are drawn from a seeded generator."""
    draw = random.Random(SEED)
    for variant, number in RANDOM_KILLS.items():
        for _ in range(number):
            share = draw.uniform(0.05, 0.93)
            yield f"kill: at {share:.0%} of the time", variant, partial(kill, at=share)
    # Within checkpoint writing: after each of the files that come one after another.
    for present in ("", "model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "topology.json"):
        step = EVERY * draw.randint(2, STEPS // EVERY)
        moment = partial(unfinished_checkpoint, step=step, present=present)
        yield f"kill: writing checkpoint-{step}, {present or 'empty'}", "live teacher", partial(kill, when=moment)
    for what, pattern, variant in (
        ("tokens are written", "checkpoints/.training-data.*.partial/*", "live teacher"),
        ("the teacher cache is built", "checkpoints/.teacher-cache.*.building/sentence.npy", "teacher cache"),
        ("the student is begun", ".student.*.partial", "live teacher"),
        ("the student is written", ".student.*.partial/2_Dense/*", "teacher cache"),
        ("the student has its name", "student", "live teacher"),
        ("working areas are removed", "checkpoints/.training-data.*.building", "live teacher"),
    ):
        yield f"kill: when {what}", variant, partial(kill, when=partial(there, pattern=pattern))
    # A new checkpoint is written beside two others, but the first beside none.
    for checkpoints in (0.3, 0.8, 2.2, 2.4, 2.6):
        yield f"disk: full at {checkpoints} checkpoints", "live teacher", partial(full_disk, room=checkpoints)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"):
        for how in ("truncated", "one bit flipped"):
            yield f"damage: {name} {how}", "live teacher", partial(damage, name=name, how=how)
    for number, group in ((signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGUSR1, True)):
        whom = "to all its processes" if group else "to the main process"
        step = draw.randint(10, STEPS - 10)
        name = f"signal: {number.name} {whom} at step {step}"
        yield name, "live teacher", partial(asked_to_stop, number=number, group=group, step=step)
    for variant in ("two processes", "two processes, ZeRO stage 2"):
        for rank in (0, 1):
            step = draw.randint(EVERY + 1, STEPS - 10)
            yield f"worker: rank {rank} killed at step {step}", variant, partial(dead_rank, rank=rank, step=step)
    for _ in range(4):
        step = draw.randint(EVERY + 1, STEPS - 10)
        yield f"worker: DataLoader's killed at step {step}", "live teacher", partial(dead_reader, step=step)
    yield "nan: the teacher's vector of one sentence is NaN", "teacher cache", not_a_number


def run_case(
    fault: str, variant: str, hit: Callable[[Reference, Path], Result], reference: Reference, folder: Path
) -> Result:
    """One fault; its folder is removed when it was survived."""
    try:
        result = hit(reference, folder)
    except Exception as error:  # one case that breaks must not hide the others
        result = {"verdict": f"the case broke: {type(error).__name__}: {error}"}
    if result["verdict"] == "survived":
        shutil.rmtree(folder)
    seconds = round(reference.seconds, 1)
    return {"fault": fault, "variant": variant, "seconds_without_a_fault": seconds, **result}


def there(job: Job, pattern: str) -> bool:
    """Whether something in the run folder has such a name."""
    return any(True for _ in job.run.glob(pattern))


def unfinished_checkpoint(job: Job, step: int, present: str) -> bool:
    """Whether a checkpoint is there, with this file and without its list of checksums."""
    folder = job.checkpoints / f"checkpoint-{step}"
    return (folder / present).exists() and not (folder / "SHA256SUMS").exists()


def resumed(reference: Reference, job: Job, ended: Ended, problems: list[str] | None = None, **more: Any) -> Result:
    """Run the job again until it ends, and judge it."""
    left = state(job)
    again = job.finish()
    wrong = (problems or []) + reference.faults(job, again, max(left["whole"], default=0))
    return {
        "moment": f"step {ended.last_step}", "exit_status": ended.status, "seconds_until_it_ended": ended.seconds,
        "left": left, "resumed_from": again.resumed_from, "seconds_again": again.seconds, **more,
        "verdict": "; ".join(wrong) or "survived",
    }  # fmt: skip


def kill(
    reference: Reference, folder: Path, at: float | None = None, when: Callable[[Job], bool] | None = None
) -> Result:
    """Kill -9 of all processes at a share of the undisturbed time, or when something is seen in the run folder."""
    seconds = reference.seconds
    for attempt in range(4):
        job = reference.job_in(folder.with_name(f"{folder.name}-{attempt}") if attempt else folder)
        running = job.start()
        due = running.started + (at or 0) * seconds
        moment = partial(when, job) if when else lambda due=due: time.monotonic() >= due
        hit = running.wait_for(moment, pause=0.001)
        ended = running.kill()
        if hit and not (job.run / "stamps" / "distill.json").is_file():
            return resumed(reference, job, ended, attempts=attempt + 1)
        seconds = time.monotonic() - running.started  # this machine is faster now than it was
    return {"verdict": "the moment was missed four times"}


def full_disk(reference: Reference, folder: Path, room: float) -> Result:
    """A disk with room for so many checkpoints; then a larger one."""
    folder.mkdir()
    size = pages(reference.job.checkpoints / f"checkpoint-{STEPS}")
    kept = pages(reference.job.run) - pages(reference.job.student) - KEPT * size
    limit = kept + TOKENS + round(room * size)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        return {"verdict": "skipped", "why": f"a tmpfs cannot be mounted: {mounted.stderr.strip()}"}
    try:
        job = reference.job_in(folder)
        ended = job.finish()
        said = [line for line in ended.log.splitlines() if line.startswith("Error:")]
        problems = [] if ended.status == 3 else [f"exit status {ended.status} instead of 3"]
        if not said or "No space left on the disk" not in said[-1]:
            problems.append("it does not say that the disk is full")
        if state(job)["unfinished"]:
            problems.append(f"half a checkpoint stayed: {state(job)['unfinished']}")
        subprocess.run(["mount", "-o", "remount,size=200M", str(folder)], check=True)
        return resumed(reference, job, ended, problems, said=said[-1:], bytes=limit, bytes_of_a_checkpoint=size)
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def damage(reference: Reference, folder: Path, name: str, how: str) -> Result:
    """The newest of two checkpoints has a file that is not what was written."""
    source, ended = reference.interrupted()
    shutil.copytree(source.folder, folder)
    job = Job(folder, reference.variant, reference.config)
    newest = job.checkpoints / f"checkpoint-{max(state(job)['whole'])}"
    path = newest / name
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = resumed(reference, job, ended)
    if result["verdict"] == "survived":
        log = sorted(folder.parent.glob(f"{folder.name}.*.log"))[-1].read_text(encoding="utf-8")
        if f"is damaged ({name})" not in log or not (job.checkpoints / f"damaged-{newest.name}").is_dir():
            result["verdict"] = "the damage was not told"
    return result


def asked_to_stop(reference: Reference, folder: Path, number: signal.Signals, group: bool, step: int) -> Result:
    """A signal as schedulers send it: the step's checkpoint must be there, and not one step is lost."""
    job = reference.job_in(folder)
    running = job.start()
    running.wait_for(lambda: running.prints(rf"step {step}/"))
    running.signal(number, group)
    ended = running.ended(120)
    problems = [] if ended.status == 143 else [f"exit status {ended.status} instead of 143"]
    if max(state(job)["whole"], default=0) != ended.last_step:
        problems.append(f"no checkpoint of step {ended.last_step}")
    return resumed(reference, job, ended, problems)


def dead_rank(reference: Reference, folder: Path, rank: int, step: int) -> Result:
    """Kill -9 of one of two processes: the launcher must give up within a minute."""
    job = reference.job_in(folder)
    running = job.start()
    running.wait_for(lambda: running.prints(rf"step {step}/"))
    children = psutil.Process(running.process.pid).children()
    next(child for child in children if child.environ().get("RANK") == str(rank)).kill()
    ended = running.ended(120)
    problems = [] if ended.status and ended.seconds < 60 else [f"status {ended.status} after {ended.seconds} s"]
    return resumed(reference, job, ended, problems)


def dead_reader(reference: Reference, folder: Path, step: int) -> Result:
    """Kill -9 of the process that reads and pads batches."""
    job = reference.job_in(folder)
    running = job.start()
    running.wait_for(lambda: running.prints(rf"step {step}/") and bool(running.children()))
    for child in running.children():
        child.kill()
    ended = running.ended(120)
    problems = [] if ended.status == 3 and ended.seconds < 60 else [f"status {ended.status} after {ended.seconds} s"]
    return resumed(reference, job, ended, problems)


def not_a_number(reference: Reference, folder: Path) -> Result:
    """A teacher cache in which one vector is NaN: training stops there; with the cache mended it goes on."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from distillabse.storage import read_json, sha256_of_file, write_json

    cache = folder / "cache"
    job = reference.job_in(folder, f"teacher_cache={cache}")
    running = job.start()
    running.wait_for(lambda: running.prints("step 1/"))
    running.kill()
    row = _rows_of_step(job, 2 * EVERY + 12)[0]
    shutil.rmtree(job.checkpoints)
    vectors, record = cache / "sentence.npy", cache / "cache.json"
    whole, told = vectors.read_bytes(), record.read_text(encoding="utf-8")
    values = np.load(vectors, allow_pickle=False)
    values[row] = np.nan
    np.save(vectors, values)
    made = read_json(record)
    made["sha256"][vectors.name] = sha256_of_file(vectors)
    write_json(record, made)
    ended = job.finish()
    problems = [] if ended.status == 3 and "no longer a number" in ended.log else [f"exit status {ended.status}"]
    last = job.checkpoints / f"checkpoint-{max(state(job)['whole'], default=0)}"
    if not np.isfinite(SentenceTransformer(str(last), device="cpu").encode(["man woman dog"])).all():
        problems.append(f"{last.name} gives no numbers")
    vectors.write_bytes(whole)
    record.write_text(told, encoding="utf-8")
    return resumed(reference, job, ended, problems)


def table(results: list[Result]) -> Any:
    """What was done, what it left, and how it went on."""
    from rich.table import Table

    shown = Table(title="Faults", title_justify="left")
    for heading in (
        "fault",
        "variant",
        "ended",
        "s",
        "whole checkpoints left",
        "unfinished",
        "went on from",
        "verdict",
    ):
        shown.add_column(heading)
    for result in results:
        left = result.get("left", {})
        shown.add_row(
            result["fault"], result["variant"], f"{result.get('moment', '')}, {result.get('exit_status', '')}",
            str(result.get("seconds_until_it_ended", "")), " ".join(map(str, left.get("whole", []))),
            " ".join(map(str, [*left.get("unfinished", []), *left.get("temporary", [])])),
            str(result.get("resumed_from", "")), result["verdict"],
        )  # fmt: skip
    return shown


def _rows_of_step(job: Job, step: int) -> list[int]:
    """The sentences of a step of the first epoch."""
    from distillabse.settings import load_config
    from distillabse.training.batches import SentenceBatches
    from distillabse.training.data import TokenisedSentences

    sentences = TokenisedSentences.open(job.checkpoints / "training-data")
    batches = SentenceBatches(sentences, BATCH, seed=load_config(job.config).seed)
    return next(islice(batches, step - 1, None))


if __name__ == "__main__":
    main()
