"""How the processes of a job agree, and what a job says when they cannot."""

import json
import socket
import subprocess
import sys

import pytest
from distillation_worker import environment, launcher

from distillabse import processes

WORKER = """
import sys, time
from distillabse import processes
seen = [processes.agreed(lambda: {"rank": processes.rank(), "n": n}) for n in range(3)]
if processes.is_main():
    time.sleep(1)
    open(sys.argv[1] + "/main", "w").close()
processes.wait_for_main()
import os, json
there = os.path.exists(sys.argv[1] + "/main")
open(f"{sys.argv[1]}/{processes.rank()}.json", "w").write(json.dumps([processes.count(), seen, there]))
"""


def test_a_process_alone_decides_for_itself(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.rank(), processes.count(), processes.is_main()) == (0, 1, True)
    assert processes.agreed(lambda: ["anything", object]) == ["anything", object]


def test_all_get_what_the_main_process_decides_and_wait_for_it(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    subprocess.run([*launcher(2), str(script), str(tmp_path)], env=environment(), check=True, capture_output=True)
    for rank in range(2):
        count, seen, there = json.loads((tmp_path / f"{rank}.json").read_text())
        assert count == 2 and there
        assert seen == [{"rank": 0, "n": n} for n in range(3)]


@pytest.mark.parametrize("command", [["distill"], ["run", "--until", "distill"]])
def test_a_port_in_use_is_named_with_the_remedy(command, tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        words = [sys.executable, "-m", "distillabse", *command, "quickstart", f"output={tmp_path}"]
        done = subprocess.run(words, env=environment() | alone, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    message = " ".join(done.stderr.split())
    assert f"Process 0 of 2 does not reach the others at localhost:{port}" in message and "--master_port" in message


@pytest.mark.parametrize("command", ["corpus", "vocabulary", "export", "verify", "bench", "report"])
def test_only_the_main_process_does_what_is_not_training(command, tmp_path):
    other = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "distillabse", "--local_rank=1", command, "quickstart", f"output={tmp_path}"],
        env=environment() | other, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", [])
