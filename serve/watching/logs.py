"""The log on stderr, one JSON object per line: events of the server, and every request."""

import asyncio
import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, BinaryIO

import orjson

from serve.request.predict import Visit

_GATHER_S = 0.05  # lines of this time share a write; at 0.005, lone requests took 7 % more processor time
_PATH_LENGTH = 200  # characters of a requested path


def configure(level: str) -> "LogStream":
    """Send the logs of all libraries to stderr as JSON, through the returned stream."""
    stream = LogStream(sys.stderr.fileno())
    atexit.register(stream.flush)
    logging.basicConfig(level=level.upper(), handlers=[_Handler(stream)], force=True)
    return stream


class LogStream:
    """A file whose `write` never blocks: a thread does the writing.

    Lines are dropped and counted while `most_bytes` wait (nobody reads the pipe) and when writing fails (the disk is
    full). The first line that can be written afterwards says how many are missing.
    """

    def __init__(self, file: int, *, most_bytes: int = 2**22) -> None:
        self._file, self._most_bytes = file, most_bytes
        self._changed = threading.Condition()
        self._waiting = bytearray()  # one block, as many small ones would fragment memory
        self._num_bytes = 0  # that wait or are being written
        self._is_cut = False  # the last line in the file has no end
        self.num_dropped = 0  # since the last line that said so
        self.on_drop: Callable[[int], None] = lambda num_lines: None
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def write(self, lines: bytes) -> None:
        """Whole lines. Never blocks and never fails."""
        with self._changed:
            if self._num_bytes + len(lines) > self._most_bytes:
                return self._drop(lines)
            if not self._waiting:
                self._changed.notify_all()
            self._waiting += lines
            self._num_bytes += len(lines)

    def flush(self, seconds: float = 1.0) -> None:
        """Wait, up to `seconds`, until all lines are written or dropped."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_bytes, seconds)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
            time.sleep(_GATHER_S)
            with self._changed:
                lines, self._waiting = bytes(self._waiting), bytearray()
                num_missing, self.num_dropped = self.num_dropped, 0
            is_written = self._put(_missing(num_missing) + lines if num_missing else lines)
            with self._changed:
                if not is_written:
                    self.num_dropped += num_missing
                    self._drop(lines)
                self._num_bytes -= len(lines)
                self._changed.notify_all()

    def _drop(self, lines: bytes) -> None:
        num = lines.count(b"\n")
        self.num_dropped += num
        self.on_drop(num)

    def _put(self, lines: bytes) -> bool:
        """Whether all lines could be written. After a partial write, all count as dropped."""
        rest = memoryview(b"\n" + lines if self._is_cut else lines)
        try:
            while rest:
                num = os.write(self._file, rest)
                self._is_cut = rest[num - 1] != ord("\n")
                rest = rest[num:]
        except OSError:
            return False
        return True


class _Handler(logging.Handler):
    def __init__(self, stream: LogStream) -> None:
        super().__init__()
        self._stream = stream
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self._stream.write(f"{self.format(record)}\n".encode(errors="replace"))


class JsonFormatter(logging.Formatter):
    """A log record as one line; a traceback becomes a field."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": _now(), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        # UTF-8 cannot encode a lone surrogate.
        fields = {name: value.encode(errors="replace").decode() for name, value in fields.items()}
        return orjson.dumps(fields).decode()


class RequestLog:
    """Call it with every finished request. Lines of one turn of the event loop share their time and one write."""

    def __init__(self, stream: "BinaryIO | LogStream") -> None:
        self._stream = stream
        self._lines: list[bytes] = []
        self._time = ""

    def __call__(self, visit: Visit) -> None:
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._write)
            self._time = _now()
        fields = {
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
        self._lines.append(_line(fields))

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        self._stream.write(b"".join(lines))


def _missing(num: int) -> bytes:
    message = f"{num} lines of the log are missing: they could not be written"
    return _line({"time": _now(), "level": "warning", "message": message})


def _line(fields: dict[str, Any]) -> bytes:
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
