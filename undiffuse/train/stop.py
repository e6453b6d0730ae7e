"""Stopping on request: SIGTERM and Ctrl-C end a run after the step at hand, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Preempted(RuntimeError):
    """The run was asked to end, and its state was saved: the same command goes on."""


class Signals:
    """While entered, notes SIGTERM and the first Ctrl-C instead of ending the process; a second Ctrl-C interrupts.

    `asked` is the signal's number, or 0. Outside the main thread, where Python delivers no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
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
