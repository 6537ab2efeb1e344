"""What the operating system tells a server: stop taking work, read the model again."""

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from common.refusal import Refusal


@contextmanager
def heed_signals(*, before_stop: Callable[[], None], reload: Callable[[], Awaitable[Any]] | None) -> Iterator[None]:
    """SIGTERM calls `before_stop` and then whoever had it before (uvicorn); SIGHUP calls `reload`.

    A SIGHUP that `serve/run.py` held back while the model was read is heeded now.
    Signals belong to the main thread: elsewhere, as in tests, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, previous, running = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM), set()

    def stop(number: int, frame: Any) -> None:
        before_stop()
        if callable(previous):
            previous(number, frame)

    def start_reload(reload: Callable[[], Awaitable[Any]]) -> None:
        task = loop.create_task(_reload(reload))
        running.add(task)  # the loop itself would let it be collected
        task.add_done_callback(running.discard)

    signal.signal(signal.SIGTERM, stop)
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
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def hangups_blocked() -> Iterator[None]:
    """SIGHUP waits, here and for good in a process that is started meanwhile, unless it heeds it itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def _reload(reload: Callable[[], Awaitable[Any]]) -> None:
    with suppress(Refusal):  # it stands in the log, and the old model goes on
        await reload()
