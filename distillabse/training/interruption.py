"""Stopping in good order when a scheduler asks for it."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def leave_signals_to_trainer(worker: int) -> None:
    """For the processes of a DataLoader, as `worker_init_fn`: they end with training, not at a signal to stop it.

    Schedulers send signals to all processes of a job. torch has a worker end at SIGTERM, and training would break
    before it has saved. Only what comes from the parent, which so ends its workers, is obeyed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def forget_workers() -> None:
    """For a training that ends because a worker is gone: torch would say so again, whatever the process does then."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class StopOnSignal(TrainerCallback):
    """After SIGTERM or SIGUSR1, finish the step, save a checkpoint and stop training in all processes.

    transformers' own `enable_jit_checkpoint` saves in the process that got the signal alone, while the others wait in
    the next step: here they agree, after every step, whether one of them was asked to stop.

    Attributes:
        requested: whether training was stopped by a signal.
    """

    def __init__(self) -> None:
        self.requested = False
        self._received = False
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen from now on."""
        if args.world_size > 1:
            # Agreement is among the hosts: it must not wait for a GPU to finish its work.
            self._group = distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to save and stop, in all processes after the same step."""
        if not self.requested and self._any_received():
            self.requested = control.should_save = control.should_training_stop = True

    def stop_listening(self) -> None:
        """Leave signals to whoever listened before; the Trainer calls this however training ends."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True

    def _any_received(self) -> bool:
        if self._group is None:
            return self._received
        received = torch.tensor(int(self._received))
        distributed.all_reduce(received, distributed.ReduceOp.MAX, self._group)
        return bool(received)


def _obey(parent: int) -> None:
    while signal.sigwaitinfo(_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
