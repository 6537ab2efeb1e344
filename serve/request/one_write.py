"""The `send` of a request, which writes status, headers and body to the socket at once."""

from starlette.types import Message

from serve.request.uvicorn_internals import STATUS_LINE, RequestResponseCycle


class OneWrite:
    """Sends an answer whose body is one piece of announced length in one write; leaves any other to uvicorn."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._start: Message | None = None  # waits for the body

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        start, self._start = self._start, None
        if start is None:
            await self._send(message)  # type: ignore[arg-type]
        elif not self._write_whole(start["status"], start["headers"], message):
            await self._send(start)  # type: ignore[arg-type]
            await self._send(message)  # type: ignore[arg-type]

    def _write_whole(self, status: int, headers: list[tuple[bytes, bytes]], message: Message) -> bool:
        """Whether `message` completes the answer, which is then written."""
        cycle, body = self._cycle, message.get("body", b"")
        fields = dict(headers)
        is_whole = (
            fields.get(b"content-length") == b"%d" % len(body)
            and not (message.get("more_body") or cycle.disconnected or cycle.flow.write_paused)
            and cycle.scope["method"] != "HEAD"
        )
        is_last = b"connection" in fields or not cycle.keep_alive
        if not is_whole or (is_last and not cycle.more_body):
            return False
        lines = [b"%b: %b\r\n" % field for field in (*cycle.default_headers, *headers)]
        if is_last and b"connection" not in fields:
            lines.append(b"connection: close\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise ValueError("a header of the answer holds a line break")
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], head, body))
        if is_last:  # the request is still coming: a closed socket would take the answer back with a reset
            cycle.keep_alive = False
            cycle.transport.write_eof()
        cycle.message_event.set()
        cycle.on_response()
        return True
