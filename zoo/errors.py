"""Errors that a user can act on."""

from __future__ import annotations


class ZooError(Exception):
    """A mistake in what the user gave: shown as its message alone, without a traceback; the exit code is 2."""

    exit_code = 2


class RunError(ZooError):
    """A run that had to stop for a reason which is not a wrong argument (full disk, diverged loss): exit code 1."""

    exit_code = 1
