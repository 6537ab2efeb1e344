"""Ask a server: `Client` and `AsyncClient` for programs, `python serve/client.py image.png` for people."""

import asyncio
import os
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal
from serve.client_protocol import (
    DEFAULT_BOUNDS,
    DEFAULT_RETRY,
    Bounds,
    Conversation,
    Conversations,
    Image,
    Outcome,
    Result,
    Retry,
    encode,
    encode_all,
    encode_if_readable,
    get_model,
    in_requests,
    predict,
    predict_each,
)

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "DIRACNET_API_KEY"
EXAMPLES = (
    "python serve/client.py image.png",
    "python serve/client.py photos --top-k 1 --json --url http://other:8000",
    "DIRACNET_API_KEY=... python serve/client.py image.png      # a server that asks for a key",
)


@dataclass(eq=False)
class _Server:
    """Where a server is and how to ask it. `api_key` defaults to the environment variable DIRACNET_API_KEY."""

    url: str = DEFAULT_URL
    _: KW_ONLY
    api_key: str | None = field(default=None, repr=False)
    retry: Retry = DEFAULT_RETRY
    timeout_s: float = 30.0

    def _settings(self) -> dict[str, Any]:
        """The arguments of httpx's clients; refuses an invalid address."""
        import httpx

        try:
            address = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise Refusal(f"{self.url!r} is not a valid address ({error}); it looks like {DEFAULT_URL}") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise Refusal(f"{self.url!r} is not a valid address; it looks like {DEFAULT_URL}")
        key = self.api_key or os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return {"base_url": address, "headers": headers, "timeout": self.timeout_s}

    def _many(self, images: Iterable[Image], top_k: int, bounds: Bounds) -> Conversations[Result]:
        requests = in_requests(map(encode, images), bounds)
        return (predict(contents, top_k=top_k, retry=self.retry) for contents in requests)

    def _each(self, images: Iterable[Image], top_k: int, bounds: Bounds) -> Conversations[Result | Refusal]:
        requests = in_requests(map(encode_if_readable, images), bounds)
        return (predict_each(contents, top_k=top_k, retry=self.retry) for contents in requests)


@dataclass(eq=False)
class Client(_Server, AbstractContextManager["Client"]):
    """Predictions from one server, in this thread. `with Client(url) as client: client.predict(["a.png"])`."""

    def __post_init__(self) -> None:
        import httpx

        self._http = httpx.Client(**self._settings())

    def predict(self, images: Iterable[Image], *, top_k: int = 5) -> list[Result]:
        """One request: paths, bytes or pixels uint8 [H, W, C] → one result each, in order."""
        return self._carry_out(predict(encode_all(images), top_k=top_k, retry=self.retry))

    def predict_many(
        self, images: Iterable[Image], *, top_k: int = 5, bounds: Bounds = DEFAULT_BOUNDS
    ) -> Iterator[Result]:
        """Any number of images in several requests; yields in order, and reads files as they are needed."""
        return self._in_flight(self._many(images, top_k, bounds), bounds)

    def predict_each(
        self, images: Iterable[Image], *, top_k: int = 5, bounds: Bounds = DEFAULT_BOUNDS
    ) -> Iterator[Result | Refusal]:
        """`predict_many`, but a bad image ends nothing: in place of its result, it yields the reason."""
        return self._in_flight(self._each(images, top_k, bounds), bounds)

    def _in_flight(self, conversations: Conversations[Outcome], bounds: Bounds) -> Iterator[Outcome]:
        """All results in order. `bounds` limits how many conversations run at once; none is begun early."""
        pending: deque[Future[list[Outcome]]] = deque()
        with ThreadPoolExecutor(bounds.requests_at_once) as pool:
            try:
                for conversation in conversations:
                    if len(pending) == bounds.requests_at_once:
                        yield from pending.popleft().result()
                    pending.append(pool.submit(self._carry_out, conversation))
                while pending:
                    yield from pending.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def model(self) -> dict[str, Any]:
        """The description of the server's model, as `GET /model` gives it."""
        return self._carry_out(get_model(retry=self.retry))

    def close(self) -> None:
        self._http.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _carry_out(self, conversation: Conversation[Outcome]) -> Outcome:
        import httpx

        reply: Any = None  # begins the conversation
        while True:
            try:
                send = conversation.send(reply)
            except StopIteration as end:
                return end.value
            time.sleep(send.after_s)
            try:
                reply = self._http.request(send.method, send.path, **send.body)
            except httpx.TransportError as error:
                reply = error


@dataclass(eq=False)
class AsyncClient(_Server, AbstractAsyncContextManager["AsyncClient"]):
    """`Client` for asyncio: the same arguments, the same results."""

    def __post_init__(self) -> None:
        import httpx

        self._http = httpx.AsyncClient(**self._settings())

    async def predict(self, images: Iterable[Image], *, top_k: int = 5) -> list[Result]:
        contents = await asyncio.to_thread(encode_all, images)
        return await self._carry_out(predict(contents, top_k=top_k, retry=self.retry))

    def predict_many(
        self, images: Iterable[Image], *, top_k: int = 5, bounds: Bounds = DEFAULT_BOUNDS
    ) -> AsyncGenerator[Result]:
        return self._in_flight(self._many(images, top_k, bounds), bounds)

    def predict_each(
        self, images: Iterable[Image], *, top_k: int = 5, bounds: Bounds = DEFAULT_BOUNDS
    ) -> AsyncGenerator[Result | Refusal]:
        return self._in_flight(self._each(images, top_k, bounds), bounds)

    async def _in_flight(self, conversations: Conversations[Outcome], bounds: Bounds) -> AsyncGenerator[Outcome]:
        pending: deque[asyncio.Task[list[Outcome]]] = deque()
        try:
            while conversation := await asyncio.to_thread(next, conversations, None):  # reads files
                if len(pending) == bounds.requests_at_once:
                    for outcome in await pending.popleft():
                        yield outcome
                pending.append(asyncio.create_task(self._carry_out(conversation)))
            while pending:
                for outcome in await pending.popleft():
                    yield outcome
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def model(self) -> dict[str, Any]:
        return await self._carry_out(get_model(retry=self.retry))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _carry_out(self, conversation: Conversation[Outcome]) -> Outcome:
        import httpx

        reply: Any = None
        while True:
            try:
                send = conversation.send(reply)
            except StopIteration as end:
                return end.value
            await asyncio.sleep(send.after_s)
            try:
                reply = await self._http.request(send.method, send.path, **send.body)
            except httpx.TransportError as error:
                reply = error


@dataclass(frozen=True)
class ClientConfig:
    images: Annotated[tuple[Path, ...], "PNG, JPEG, WebP, AVIF, BMP or GIF files, and folders whose images are taken"]
    url: Annotated[str, "where the server is"] = DEFAULT_URL
    top_k: Annotated[int, "classes per image"] = 3
    json: Annotated[bool, "print the results as JSON on stdout"] = False


def command(config: ClientConfig) -> int:
    """Ask a server what it sees in images; exit status 1 if one of them could not be read."""
    import json

    from common.progress import make_console, make_table, printable, track
    from train.data.folder import describe_left_out, find_images

    if not config.images:
        raise Refusal("name one image or more: python serve/client.py image.png")
    console = make_console(json=config.json)
    paths, left_out = find_images(config.images)
    for line in describe_left_out(left_out):
        console.print(line)
    with Client(config.url) as client:
        results = [*track(console, "asking")(client.predict_each(paths, top_k=config.top_k), len(paths))]
    table, rows, problems = make_table("image", "class", "probability", "then"), [], []
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, Refusal):
            rows.append({"image": str(path), "error": str(result)})
            problems.append(f"not answered: {path}: {result}")
            continue
        rows.append({"image": str(path), **asdict(result)})
        best, *rest = result.top
        others = ", ".join(f"{guess.label} {guess.probability:.1%}" for guess in rest)
        table.add_row(*map(printable, (str(path), best.label, f"{best.probability:.1%}", others)))
    if config.json:
        print(json.dumps(rows))
    elif table.row_count:
        console.print(table)
    for problem in problems:
        console.print(printable(problem))
    if problems:
        console.print(f"{len(problems)} of {len(paths)} images were not answered")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_command(command, ClientConfig, examples=EXAMPLES))
