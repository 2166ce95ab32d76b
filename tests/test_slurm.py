"""The Slurm script with commands in the place of Slurm's that write down how they were called."""

import argparse
import base64
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from deepspeed.launcher import launch
from torch.distributed.run import get_args_parser

SCRIPT = Path(__file__).parents[1] / "configs" / "slurm" / "distill.sbatch"
ONE = "srun --nodes=1 --ntasks=1 env CUDA_VISIBLE_DEVICES=0 distillabse"
ALL = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1"
JOB = "my.yaml training.max_steps=10 training.deepspeed=zero2"

RECORD = '#!/bin/bash\n{ printf "%q " "${0##*/}" "$@"; echo; } >>"$CALLS"\n'
# A training step fails, or goes on until it is signalled, where a test says so.
SRUN = """
case "$*" in *"--module distillabse"*)
    if [ "$TRAINING" = fails ]; then exit 1; fi
    if [ "$TRAINING" = waits ]; then echo $$ >"$CALLS.pid"; trap 'exit 143' TERM; while :; do sleep 0.05; done; fi
esac
"""
SCONTROL = """
if [ "$1 $2" = "show hostnames" ]; then [ "$3" = "node[7-8]" ] && printf "node7\\nnode8\\n"; fi
"""
SCANCEL = """
kill -TERM "$(cat "$CALLS.pid")"
"""


class Cluster:
    """Two nodes with four GPUs, as the batch script sees them."""

    def __init__(self, folder):
        self.folder, self.calls = folder, folder / "calls"
        for name, body in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
            (folder / name).write_text(RECORD + body)
            (folder / name).chmod(0o755)

    def start(self, *arguments, **variables):
        """The running batch script."""
        self.calls.write_text("")
        inherited = {"PATH": f"{self.folder}:/usr/bin:/bin", "CALLS": str(self.calls), "TRAINING": "ends"}
        job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "distillabse", "SLURM_SUBMIT_DIR": str(self.folder)}
        nodes = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments], env={**inherited, **job, **nodes, **variables}, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments, **variables):
        """Exit status of the batch script."""
        process = self.start(*arguments, **variables)
        self.printed = "".join(process.communicate(timeout=60))
        return process.returncode

    def commands(self):
        """Every call, in its order, as a command line."""
        return [shlex.join(shlex.split(line)) for line in self.calls.read_text().splitlines()]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def torchrun(restart=0):
    return (
        f"{ALL} torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=node7:23456 "
        f"--rdzv-id=123456.{restart} --shutdown-timeout=120 --module distillabse run --until distill {JOB}"
    )


def test_the_job_trains_with_torchrun_on_every_gpu_and_does_the_rest_in_one_process(cluster):
    assert cluster.run("my.yaml", "training.max_steps=10") == 0, cluster.printed
    assert cluster.commands() == [
        f"{ONE} run --until vocabulary {JOB}",
        "scontrol show hostnames 'node[7-8]'",
        torchrun(),
        f"{ONE} export {JOB}",
        f"{ONE} run {JOB}",
    ]
    assert sorted(path.name for path in cluster.folder.iterdir()) == ["calls", "scancel", "scontrol", "srun"]


def test_torchrun_understands_its_command_line(cluster):
    cluster.run("my.yaml", "training.max_steps=10")
    line = next(shlex.split(command) for command in cluster.commands() if "torchrun" in command)
    read = get_args_parser().parse_args(line[line.index("torchrun") + 1 :])
    assert (read.nnodes, read.nproc_per_node, read.rdzv_backend, read.shutdown_timeout) == ("2", "4", "c10d", 120)
    assert read.module and read.training_script == "distillabse"
    assert read.training_script_args == ["run", "--until", "distill", *JOB.split()]


def test_the_deepspeed_launcher_runs_the_same_training_on_every_node(cluster, monkeypatch):
    assert cluster.run("my.yaml", "training.max_steps=10", LAUNCHER="deepspeed") == 0, cluster.printed
    line = shlex.split(next(command for command in cluster.commands() if command.startswith(ALL)))
    start = line.index("bash")
    assert shlex.join(line[:start]) == ALL
    # What bash makes of it on the second node.
    echoed = [*line[start : start + 2], line[start + 2].replace("exec ", 'printf "%s\\n" '), *line[start + 3 :]]
    environment = {**os.environ, "SLURM_NODEID": "1"}
    words = subprocess.run(echoed, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert words[:3] == ["python", "-m", launch.__name__]
    monkeypatch.setattr("sys.argv", words[2:])
    read = launch.parse_args()
    assert (read.node_rank, read.master_addr, read.master_port) == (1, "node7", 23456)
    assert read.no_local_rank and read.module and read.training_script == "distillabse"
    assert read.training_script_args == ["run", "--until", "distill", *JOB.split()]
    slots = [0, 1, 2, 3]
    assert json.loads(base64.urlsafe_b64decode(read.world_info)) == {"node7": slots, "node8": slots}


def test_a_training_that_fails_ends_the_job_and_does_not_come_back(cluster):
    assert cluster.run("my.yaml", "training.max_steps=10", TRAINING="fails") == 1
    assert cluster.commands()[-1] == torchrun()


def test_near_the_time_limit_the_job_is_stopped_requeued_and_goes_on(cluster):
    process = cluster.start("my.yaml", "training.max_steps=10", TRAINING="waits")
    deadline = time.monotonic() + 30
    while not (pid := cluster.folder / "calls.pid").exists() or not pid.read_text().endswith("\n"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert cluster.commands()[-3:] == [torchrun(), "scancel --signal=TERM 123456", "scontrol requeue 123456"]
    # The same job number again. Only the rendezvous has another name: `run` finds out itself what is done.
    assert cluster.run("my.yaml", "training.max_steps=10", SLURM_RESTART_COUNT="1") == 0
    assert cluster.commands() == [
        f"{ONE} run --until vocabulary {JOB}",
        "scontrol show hostnames 'node[7-8]'",
        torchrun(restart=1),
        f"{ONE} export {JOB}",
        f"{ONE} run {JOB}",
    ]


def test_a_container_goes_before_every_command_and_an_empty_deepspeed_means_ddp(cluster):
    words = {"SRUN_OPTIONS": "--container-image=d.sqsh", "WRAPPER": "apptainer exec --nv d.sif", "DEEPSPEED": ""}
    assert cluster.run("my.yaml", **words) == 0
    steps = [command for command in cluster.commands() if command.startswith("srun ")]
    assert len(steps) == 4
    assert all(step.startswith("srun --container-image=d.sqsh --nodes=") for step in steps)
    wrapped = [step.split("apptainer exec --nv d.sif ")[1].split()[0] for step in steps]
    assert wrapped == ["env", "torchrun", "env", "env"]
    assert not [step for step in steps if "deepspeed" in step]


@pytest.mark.parametrize(("arguments", "variables"), [((), {}), (("my.yaml",), {"LAUNCHER": "mpirun"})])
def test_wrong_use_is_refused(cluster, arguments, variables):
    assert cluster.run(*arguments, **variables) == 2
    assert "usage: sbatch" in cluster.printed or "torchrun or deepspeed is wanted" in cluster.printed


def test_sbatch_reads_the_options_before_the_first_command():
    lines = SCRIPT.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(options) < first_command
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("exclusive", "requeue"):
        parser.add_argument(f"--{flag}", action="store_true")
    for number in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"):
        parser.add_argument(f"--{number}", type=int)
    for text in ("job-name", "output", "open-mode", "time", "signal"):
        parser.add_argument(f"--{text}")
    read = parser.parse_args([word for number in options for word in shlex.split(lines[number])[1:]])
    assert (read.nodes, read.ntasks_per_node, read.gpus_per_node, read.requeue) == (2, 1, 4, True)
    assert read.open_mode == "append" and "%j" in read.output  # the log of a job that comes back goes on
    receiver, name, seconds = re.fullmatch(r"(B:)(\w+)@(\d+)", read.signal).groups()
    assert (receiver, name) == ("B:", "USR1") and "trap stop USR1" in lines
    given = int(re.search(r"--shutdown-timeout=(\d+)", SCRIPT.read_text())[1])
    assert int(seconds) > given  # torchrun must be done with its workers before Slurm is with the job
