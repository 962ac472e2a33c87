"""Signals that ask a run to stop: noted when they come, acted on by whoever asks at a good moment.

A handler that saves would meet other processes in another step and wait for them for ever.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Windows has no SIGUSR1, and no SLURM that would send it.
REQUEUE: signal.Signals = getattr(signal, "SIGUSR1", signal.SIGTERM)
"""Time is nearly up: stop and be started again."""
STOP = signal.SIGTERM
"""Cancelled or preempted: stop; whoever sent it decides about another start."""

_received: list[signal.Signals] = []


class Stopped(Exception):
    """The run was left on purpose, after writing what it goes on from. The exit status is 128 + `signum`."""

    def __init__(self, message: str, signum: signal.Signals) -> None:
        super().__init__(message)
        self.signum = signum


def received() -> signal.Signals | None:
    """The first stop signal this process got, if any: at a time limit SIGTERM may follow SIGUSR1."""
    return _received[0] if _received else None


def listen() -> None:
    """Note stop signals from now on, instead of dying of them or what a library does about them."""
    if threading.current_thread() is threading.main_thread():
        for signum in (REQUEUE, STOP):
            signal.signal(signum, _note)


@contextmanager
def listening() -> Iterator[None]:
    """Note stop signals inside the block; afterwards everything is as before."""
    before = {signum: signal.getsignal(signum) for signum in (REQUEUE, STOP)}
    _received.clear()
    listen()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in before.items():
                signal.signal(signum, handler)
        _received.clear()


def _note(signum: int, frame: Any) -> None:
    _received.append(signal.Signals(signum))
