"""The processes of a job that torchrun, the deepspeed launcher or Slurm started, and how they come to agree.

Stages that train run in all processes; the first one alone does everything else, and decides what the others do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from itertools import count as numbers
from typing import Any, TypeVar

from distillabse.errors import ConfigurationError, first_line

T = TypeVar("T")

# The others may wait for a corpus to be read, or for a teacher to run over it: longer than any collective's limit.
_PATIENCE = timedelta(days=7)
_decisions = numbers()


def rank() -> int:
    """Number of this process among all of the job, as its launcher says; 0 where there is no launcher."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """Number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process reads, writes and reports for all."""
    return rank() == 0


def agreed(decide: Callable[[], T]) -> T:
    """What the main process decides; the others wait for it. All must call this in the same order.

    Args:
        decide: runs in the main process alone; gives something that JSON holds.

    Raises:
        ConfigurationError: the processes cannot find each other, for instance because the port is in use.
    """
    if count() == 1:
        return decide()
    key, store = f"decision-{next(_decisions)}", _store()
    if is_main():
        value = decide()
        store.set(key, json.dumps(value))
        return value
    heard: T = json.loads(store.get(key))
    return heard


def wait_for_main() -> None:
    """Return when the main process has come here, too."""
    agreed(lambda: None)


@cache
def _store() -> Any:
    """Key-value store that all processes reach, at the address that the launcher gave."""
    from torch.distributed import DistError, PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    address = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
    except (DistError, ValueError) as error:
        raise ConfigurationError(
            f"Process {rank()} of {count()} does not reach the others at {address} ({first_line(error)}). If the port "
            "is in use, choose another with the launcher's --master_port; check that all nodes see that address."
        ) from error
    store.set_timeout(_PATIENCE)
    return PrefixStore("distillabse", store)
