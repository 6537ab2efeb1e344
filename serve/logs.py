"""One JSON object per line on stderr: what happens to the server, and what became of each request."""

import asyncio
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, BinaryIO

import orjson

if TYPE_CHECKING:
    from serve.hot import Visit

_PATH_LENGTH = 200  # of what a client asked for; the rest says nothing more


def configure(level: str) -> None:
    """Every library's log goes to stderr as JSON; `level` is debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class JsonFormatter(logging.Formatter):
    """A log record as one line; a traceback becomes a field."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": _now(), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(fields).decode()


class RequestLog:
    """Call it with every finished request. Lines of one turn of the event loop share a time and one write."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: list[bytes] = []
        self._time = ""

    def __call__(self, visit: "Visit") -> None:
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._write)
            self._time = _now()
        line = {
            "time": self._time,
            "level": "info",
            "message": f"{visit.method} {visit.path[:_PATH_LENGTH]}",
            "id": visit.id.decode(),
            "client": visit.client,
            "status": visit.status,
            "images": visit.num_images,
            "decode_ms": round(1000 * visit.decode_s, 2),
            "queue_ms": round(1000 * visit.queue_s, 2),
            "model_ms": round(1000 * visit.model_s, 2),
            "total_ms": round(1000 * visit.total_s, 2),
        }
        self._lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def _write(self) -> None:
        self._stream.write(b"".join(self._lines))
        self._stream.flush()
        self._lines.clear()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
