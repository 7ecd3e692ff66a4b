"""Benchmarks go on after a failure: time limits for one call, errors in one line, a look at the device after each."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch

from zoo.errors import ZooError
from zoo.tools._timing import sync


@contextlib.contextmanager
def time_limit(seconds: float, option: str) -> Iterator[None]:
    """Interrupt what takes longer, where the platform can: in the main thread on POSIX.

    Args:
        seconds: how long.
        option: the command-line option that sets it, for the message.

    Raises:
        TimeoutError: inside the block, when the time is over.
    """
    if not hasattr(signal, 'SIGALRM') or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f'no result in {seconds:g} s ({option})')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_words(error: BaseException) -> str:
    """Type and first line of an error.

    Args:
        error: what was raised.
    """
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:300]}' if lines else type(error).__name__


def recover(device: str, error: Exception) -> None:
    """Free what a failed call left behind.

    Args:
        device: where it ran.
        error: what it raised.

    Raises:
        ZooError: if nothing runs on the device any more in this process, as after an illegal access.
    """
    try:
        sync(device)
    except RuntimeError:
        raise ZooError(f'the device is lost for this process after: {in_words(error)}') from error
    if device.startswith('cuda'):
        torch.cuda.empty_cache()
