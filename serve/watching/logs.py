"""One JSON object per line on stderr: what happens to the server, and what became of each request."""

import asyncio
import atexit
import logging
import os
import sys
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, BinaryIO

import orjson

if TYPE_CHECKING:
    from serve.request.predict import Visit

_GATHER_S = 0.05  # lines that come meanwhile share a write; at 0.005 lone requests took 7 % more processor time
_PATH_LENGTH = 200  # of what a client asked for; the rest says nothing more


def configure(level: str) -> "LogStream":
    """Every library's log goes to stderr as JSON, through the stream that this gives."""
    stream = LogStream(sys.stderr.fileno())
    atexit.register(stream.flush)
    logging.basicConfig(level=level.upper(), handlers=[_Handler(stream)], force=True)
    return stream


class LogStream:
    """A file that takes lines at once, whatever becomes of it: a thread writes them.

    Lines are dropped and counted while `most_bytes` of them wait (nobody reads the pipe), and where writing fails
    (the disk is full). Once lines can be written again, the first one says how many are missing.
    """

    def __init__(self, file: int, *, most_bytes: int = 2**22) -> None:
        self._file, self._most_bytes = file, most_bytes
        self._changed = threading.Condition()
        self._waiting = bytearray()  # one block: small ones that stay keep the pages around them
        self._num_bytes = 0  # that wait or are being written
        self._is_cut = False  # the last line in the file has no end
        self.num_dropped = 0
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def write(self, lines: bytes) -> None:
        """Whole lines. Never blocks and never fails."""
        with self._changed:
            if self._num_bytes + len(lines) > self._most_bytes:
                self.num_dropped += lines.count(b"\n")
                return
            if not self._waiting:
                self._changed.notify_all()
            self._waiting += lines
            self._num_bytes += len(lines)

    def flush(self, seconds: float = 1.0) -> None:
        """Until all that waits is written or dropped, but not for long."""
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
                    self.num_dropped += num_missing + lines.count(b"\n")
                self._num_bytes -= len(lines)
                self._changed.notify_all()

    def _put(self, lines: bytes) -> bool:
        """Whether all could be written. Those of a part that was are counted as dropped too."""
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
        try:
            return orjson.dumps(fields).decode()
        except TypeError:  # half a character, which no file can hold
            fields = {name: value.encode(errors="replace").decode() for name, value in fields.items()}
            return orjson.dumps(fields).decode()


class RequestLog:
    """Call it with every finished request. Lines of one turn of the event loop share a time and one write."""

    def __init__(self, stream: "BinaryIO | LogStream") -> None:
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
        lines, self._lines = self._lines, []
        self._stream.write(b"".join(lines))


def _missing(num: int) -> bytes:
    line = {
        "time": _now(),
        "level": "warning",
        "message": f"{num} lines of the log are missing: they could not be written",
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
