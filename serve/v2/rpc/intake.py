"""Bounds the messages that are received at once: gRPC shows only complete ones, so each may be the longest."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from serve.request.limits import Limits
from serve.request.problems import DEADLINE, OVERLOADED, TIMEOUT, Problem

PATIENCE_S = 1.0  # for a message while others wait
_RETRY = {"Retry-After": "1"}


class Intake:
    """Places for as many messages of the longest kind as may be held. A call without one waits, unread."""

    patience_s = PATIENCE_S

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(limits.max_held_bytes // limits.max_body_bytes)
        self._started: dict[asyncio.Timeout, float] = {}  # for each call with a place, the time when it got it
        self._num_waiting = 0

    async def receive(self, read: Callable[[], Awaitable[Any]], deadline: float) -> Any:
        """Awaits `read` until the loop's time `deadline`, or for `patience_s` if others wait for the place."""
        if self._num_waiting >= self._limits.max_queue:
            raise Problem(OVERLOADED, f"{self._num_waiting} messages wait to be received; ask again in 1 s", _RETRY)
        if self._places.locked():
            await self._wait_for_place(deadline)
        else:
            await self._places.acquire()  # at once
        timeout = asyncio.timeout_at(deadline)
        try:
            async with timeout:
                self._started[timeout] = asyncio.get_running_loop().time()
                if self._num_waiting:
                    self._hurry()
                return await read()
        except TimeoutError:
            if timeout.when() == deadline:  # no other call waited
                raise Problem(TIMEOUT, "the message was not complete within its deadline; send less") from None
            detail = f"the message was not complete within {self.patience_s:g} s while others waited; ask again in 1 s"
            raise Problem(OVERLOADED, detail, _RETRY) from None
        finally:
            del self._started[timeout]
            self._places.release()

    async def _wait_for_place(self, deadline: float) -> None:
        self._num_waiting += 1
        self._hurry()
        try:
            async with asyncio.timeout_at(deadline):
                await self._places.acquire()
        except TimeoutError:
            raise Problem(DEADLINE, "other messages were received until the deadline; ask again later") from None
        finally:
            self._num_waiting -= 1

    def _hurry(self) -> None:
        """Limit every call that has a place to `patience_s`."""
        now = asyncio.get_running_loop().time()
        for timeout, start in self._started.items():
            until = max(now, start + self.patience_s)
            if not timeout.expired() and timeout.when() > until:  # type: ignore[operator]
                timeout.reschedule(until)
