"""Stopping on request: SIGTERM and Ctrl-C end a run once its state is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Preempted(BaseException):
    """The run was asked to end, and its state was saved; like KeyboardInterrupt, `except Exception` lets it pass."""


class Signals:
    """While entered, notes SIGTERM and the first Ctrl-C instead of ending the process; a second Ctrl-C interrupts.

    `asked` is the signal's number, or 0. With `at_once`, for work whose state is always saved, the first one raises
    Preempted or KeyboardInterrupt. Outside the main thread, where Python delivers no signals, nothing changes.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once, self.asked = at_once, 0
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.at_once or (self.asked and number == signal.SIGINT):
            raise end(number)
        self.asked = number

    def __call__(self) -> int:
        return self.asked

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def end(number: int) -> BaseException:
    """What to raise for a signal once the state is saved."""
    return KeyboardInterrupt() if number == signal.SIGINT else Preempted(f"asked to end by signal {number}; saved")
