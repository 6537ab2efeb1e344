"""Ask a server: `Client` and `AsyncClient` for programs, `python serve/client.py image.png` for people."""

import asyncio
import os
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal
from serve.client_protocol import (
    DEFAULT_RETRY,
    Answer,
    Content,
    Conversation,
    Image,
    Lost,
    Result,
    Retry,
    Send,
    encode,
    encode_all,
    encode_if_readable,
    in_requests,
    model_card,
    predict,
    predict_each,
)

if TYPE_CHECKING:
    import httpx
    from rich.console import Console

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "DIRACNET_API_KEY"
EXAMPLES = (
    "python serve/client.py image.png",
    "python serve/client.py photos --top-k 1 --json --url http://other:8000",
    "DIRACNET_API_KEY=... python serve/client.py image.png      # a server that asks for a key",
)


@dataclass(frozen=True)
class Bounds:
    """How many images are cut into requests, and how many requests run at once."""

    images_per_request: int = 32
    bytes_per_request: int = 8 * 2**20
    requests_at_once: int = 4


@dataclass(eq=False)
class _Server:
    """Where a server is and how it is asked.

    `api_key` is that of the environment variable DIRACNET_API_KEY unless it is given.
    """

    url: str = DEFAULT_URL
    _: KW_ONLY
    api_key: str | None = field(default=None, repr=False)
    retry: Retry = DEFAULT_RETRY
    timeout_s: float = 30.0

    def _settings(self) -> dict[str, Any]:
        """What httpx's clients are made with; refuses an address that is none."""
        import httpx

        try:
            address = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise Refusal(f"{self.url!r} is no address ({error}); it looks like {DEFAULT_URL}") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise Refusal(f"{self.url!r} is no address; it looks like {DEFAULT_URL}")
        key = self.api_key or os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return {"base_url": address, "headers": headers, "timeout": self.timeout_s}


@dataclass(eq=False)
class Client(_Server):
    """Predictions from one server, in this thread. `with Client(url) as client: client.predict(["a.png"])`."""

    def __post_init__(self) -> None:
        import httpx

        self._http = httpx.Client(**self._settings())

    def predict(self, images: Iterable[Image], *, top_k: int = 5) -> list[Result]:
        """One request: paths, bytes or pixels uint8 [H, W, C] → one result each, in order."""
        return self._carry_out(predict(encode_all(images), top_k=top_k, retry=self.retry))

    def predict_many(
        self,
        images: Iterable[Image],
        *,
        top_k: int = 5,
        bounds: Bounds = Bounds(),
    ) -> Iterator[Result]:
        """Any number of images in several requests; yields in order, and reads files as it goes on."""
        for contents in self._in_flight(
            (predict(contents, top_k=top_k, retry=self.retry) for contents in _requests(map(encode, images), bounds)),
            bounds,
        ):
            yield from contents

    def predict_each(
        self,
        images: Iterable[Image],
        *,
        top_k: int = 5,
        bounds: Bounds = Bounds(),
    ) -> Iterator[Result | Refusal]:
        """`predict_many`, but a bad image ends nothing: the reason stands in the place of its result."""
        contents = map(encode_if_readable, images)
        conversations = (predict_each(group, top_k=top_k, retry=self.retry) for group in _requests(contents, bounds))
        for results in self._in_flight(conversations, bounds):
            yield from results

    def _in_flight(self, conversations: Iterable[Conversation[Answer]], bounds: Bounds) -> Iterator[Answer]:
        """What each comes to, in order; so many at once as `bounds` says, none begun before there is room."""
        pending: deque[Future[Answer]] = deque()
        with ThreadPoolExecutor(bounds.requests_at_once) as pool:
            try:
                for conversation in conversations:
                    if len(pending) == bounds.requests_at_once:
                        yield pending.popleft().result()
                    pending.append(pool.submit(self._carry_out, conversation))
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def model(self) -> dict[str, Any]:
        """The card of the server's model, as `GET /model` gives it."""
        return self._carry_out(model_card(retry=self.retry))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _carry_out(self, conversation: Conversation[Answer]) -> Answer:
        outcome: Any = None  # begins the conversation
        while True:
            try:
                send = conversation.send(outcome)
            except StopIteration as end:
                return end.value
            outcome = self._send(send)

    def _send(self, send: Send) -> "httpx.Response | Lost":
        import httpx

        time.sleep(send.after_s)
        try:
            return self._http.request(send.method, send.path, **send.body)
        except httpx.TransportError as error:
            return _lost(error, self._http.base_url)


@dataclass(eq=False)
class AsyncClient(_Server):
    """`Client` for asyncio: the same arguments, the same results."""

    def __post_init__(self) -> None:
        import httpx

        self._http = httpx.AsyncClient(**self._settings())

    async def predict(self, images: Iterable[Image], *, top_k: int = 5) -> list[Result]:
        contents = await asyncio.to_thread(encode_all, images)
        return await self._carry_out(predict(contents, top_k=top_k, retry=self.retry))

    async def predict_many(
        self,
        images: Iterable[Image],
        *,
        top_k: int = 5,
        bounds: Bounds = Bounds(),
    ) -> AsyncIterator[Result]:
        requests = _requests(map(encode, images), bounds)
        conversations = (predict(contents, top_k=top_k, retry=self.retry) for contents in requests)
        async with aclosing(self._in_flight(conversations, bounds)) as groups:
            async for results in groups:
                for result in results:
                    yield result

    async def predict_each(
        self,
        images: Iterable[Image],
        *,
        top_k: int = 5,
        bounds: Bounds = Bounds(),
    ) -> AsyncIterator[Result | Refusal]:
        requests = _requests(map(encode_if_readable, images), bounds)
        conversations = (predict_each(contents, top_k=top_k, retry=self.retry) for contents in requests)
        async with aclosing(self._in_flight(conversations, bounds)) as groups:
            async for results in groups:
                for result in results:
                    yield result

    async def _in_flight(self, conversations: Iterator[Conversation[Answer]], bounds: Bounds) -> AsyncGenerator[Answer]:
        pending: deque[asyncio.Task[Answer]] = deque()
        try:
            while conversation := await asyncio.to_thread(next, conversations, None):  # which reads files
                if len(pending) == bounds.requests_at_once:
                    yield await pending.popleft()
                pending.append(asyncio.create_task(self._carry_out(conversation)))
            while pending:
                yield await pending.popleft()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def model(self) -> dict[str, Any]:
        return await self._carry_out(model_card(retry=self.retry))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _carry_out(self, conversation: Conversation[Answer]) -> Answer:
        outcome: Any = None  # begins the conversation
        while True:
            try:
                send = conversation.send(outcome)
            except StopIteration as end:
                return end.value
            outcome = await self._send(send)

    async def _send(self, send: Send) -> "httpx.Response | Lost":
        import httpx

        await asyncio.sleep(send.after_s)
        try:
            return await self._http.request(send.method, send.path, **send.body)
        except httpx.TransportError as error:
            return _lost(error, self._http.base_url)


def _requests(contents: Iterable[Content], bounds: Bounds) -> Iterator[list[Content]]:
    return in_requests(contents, max_images=bounds.images_per_request, max_bytes=bounds.bytes_per_request)


def _lost(error: "httpx.TransportError", url: "httpx.URL") -> Lost:
    import httpx

    brief = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)
    return Lost(str(url), str(error) or type(error).__name__, isinstance(error, brief))


@dataclass(frozen=True)
class ClientConfig:
    images: Annotated[tuple[Path, ...], "PNG, JPEG, WebP, AVIF, BMP or GIF files, and folders whose images are taken"]
    url: Annotated[str, "where the server is"] = DEFAULT_URL
    top_k: Annotated[int, "classes per image"] = 3
    json: Annotated[bool, "print the results as JSON on stdout"] = False


def command(config: ClientConfig) -> int:
    """Ask a server what it sees in images; exit status 1 if one of them could not be read."""
    import json

    from common.progress import make_console, printable, track
    from train.data.folder import find_images
    from train.data.survey import describe_left_out

    if not config.images:
        raise Refusal("name one image or more: python serve/client.py image.png")
    console = make_console(json=config.json)
    paths, left_out = find_images(config.images)
    for line in describe_left_out(left_out):
        console.print(printable(line))
    with Client(config.url) as client:
        results = [*track(console, "asking")(client.predict_each(paths, top_k=config.top_k), len(paths))]
    answers = dict(zip(paths, results, strict=True))
    if config.json:
        print(json.dumps([_row(path, result) for path, result in answers.items()]))
    else:
        _print_table(console, answers)
    bad = {path: result for path, result in answers.items() if isinstance(result, Refusal)}
    for path, refusal in bad.items():
        console.print(printable(f"not answered: {path}: {refusal}"))
    if bad:
        console.print(f"{len(bad)} of {len(paths)} images were not answered")
    return 1 if bad else 0


def _row(path: Path, result: Result | Refusal) -> dict[str, Any]:
    fields = {"error": str(result)} if isinstance(result, Refusal) else asdict(result)
    return {"image": str(path), **fields}


def _print_table(console: "Console", answers: dict[Path, Result | Refusal]) -> None:
    from rich.table import Table

    from common.progress import printable

    table = Table("image", "class", "probability", "then")
    for path, result in answers.items():
        if not isinstance(result, Refusal):
            best, *rest = result.top
            others = ", ".join(f"{guess.label} {guess.probability:.1%}" for guess in rest)
            table.add_row(printable(str(path)), best.label, f"{best.probability:.1%}", others)
    if table.row_count:
        console.print(table)


if __name__ == "__main__":
    sys.exit(run_command(command, ClientConfig, examples=EXAMPLES))
