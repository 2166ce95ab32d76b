"""A job that something happens to at a certain step: `python tests/survival_worker.py CONFIG FAULT`.

A process that is asked to stop writes after which step it did into OUTPUT.rank-N.
"""

import os
import signal
import subprocess
import sys

from distillabse.errors import Interrupted
from distillabse.pipeline import run_job
from distillabse.settings import load_config
from distillabse.training import trainer

STEP = 10


def killed_in_commit():
    """kill -9 when the files of the second checkpoint are there, and its list of checksums is not."""
    from distillabse.training import checkpoints

    write = checkpoints.write_checksums

    def write_or_die(folder):
        if folder.name == "checkpoint-16":
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder)

    checkpoints.write_checksums = write_or_die


def group_asked_to_stop():
    """As Slurm does it: the signal comes from outside, and to all processes of this job and no other."""
    group = os.getpgid(0)
    assert group == os.getpid() == os.getsid(0)
    send = f"import os, signal; os.killpg({group}, signal.SIGTERM)"
    at_step(lambda: subprocess.run([sys.executable, "-c", send], start_new_session=True, check=True))


def one_process_asked_to_stop():
    at_step(lambda: os.environ["RANK"] == "1" and os.kill(os.getpid(), signal.SIGTERM))


def at_step(act):
    run = trainer.DistillationTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == STEP:
            act()
        return run(self, *args, **kwargs)

    trainer.DistillationTrainer.training_step = training_step


def main(config, fault):
    globals()[fault]()
    job = load_config(config)
    try:
        run_job(job, until="distill")
    except Interrupted as error:
        with open(f"{job.output}.rank-{os.environ.get('RANK', 0)}", "w") as file:
            file.write(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
