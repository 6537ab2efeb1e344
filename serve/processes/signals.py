"""Signals of a server: stop taking work, read the model again, end with the parent process."""

import asyncio
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from common.refusal import Refusal

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


@contextmanager
def heed_signals(*, before_stop: Callable[[], None], reload: Callable[[], Awaitable[Any]] | None) -> Iterator[None]:
    """SIGTERM and SIGINT call `before_stop` and then the previous handler (uvicorn's); SIGHUP calls `reload`.

    One that is ignored stays ignored. A SIGHUP that `serve/run.py` blocked while the model was loading is delivered
    now. Only the main thread can handle signals; in others, as in tests, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, running = asyncio.get_running_loop(), set()
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, frame: Any) -> None:
        before_stop()
        if callable(previous[number]):
            previous[number](number, frame)

    def start_reload(reload: Callable[[], Awaitable[Any]]) -> None:
        task = loop.create_task(_reload(reload))
        running.add(task)  # the loop itself would let it be collected
        task.add_done_callback(running.discard)

    for number in previous:
        signal.signal(number, stop)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if reload:
        loop.add_signal_handler(signal.SIGHUP, start_reload, reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        if reload:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            loop.remove_signal_handler(signal.SIGHUP)
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_with_parent(number: signal.Signals, parent: int | None) -> None:
    """On Linux, have the process `parent`, which started this one, send it signal `number` when it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), number)


async def _reload(reload: Callable[[], Awaitable[Any]]) -> None:
    with suppress(Refusal):  # it is logged, and the old model keeps serving
        await reload()
