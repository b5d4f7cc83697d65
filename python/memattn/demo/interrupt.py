"""Ctrl-C and SIGTERM as a request that the demo honours between two units of work, so that nothing is half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Stopped(Exception):
    """The user asked to stop; `code` is the exit status a shell expects."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by {signal.Signals(code - 128).name}")
        self.code = code


class StopRequest:
    """Inside `with`, the first signal is remembered until `check()`; a second one ends the work at once."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._receive) for number in self._SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise KeyboardInterrupt
        self._received = number

    def check(self) -> None:
        if self._received is not None:
            raise Stopped(128 + self._received)
