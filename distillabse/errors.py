"""Every error that a user can cause or mend, each with the exit status that the command line returns for it."""

from __future__ import annotations


class DistillabseError(Exception):
    """An error whose message names the thing that is wrong and the remedy."""

    exit_code = 3


class ConfigurationError(DistillabseError):
    """The configuration or the command line asks for something that cannot be."""

    exit_code = 2


class InputError(DistillabseError):
    """A file, a folder or a hub name that was given cannot be used."""

    exit_code = 2


class TrainingError(DistillabseError):
    """Training cannot go on, for instance because the loss is no longer a number."""


class Interrupted(DistillabseError):
    """A signal stopped the job in good order; it goes on where it was when it is started again."""

    exit_code = 143  # what a shell says of a process that SIGTERM ended


class StorageError(DistillabseError):
    """Something could not be written; what was there before is intact."""


class GateFailed(DistillabseError):
    """A gate of `verify` was not met."""

    exit_code = 1


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
