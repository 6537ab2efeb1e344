"""`serve/run.py` as a process of its own, whose log and memory are read while it is under load."""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
START_S = STOP_S = 60.0


class Server:
    """`with Server(model, "--workers", 2) as server`: it listens; what is left of it at the end is killed."""

    def __init__(self, model: Path, *argv: Any, script: str = "serve/run.py") -> None:
        self.argv = ["--runtime", "onnxruntime", *map(str, argv)]  # the choice would be made anew at every start
        command = [sys.executable, str(ROOT / script), str(model), "--port", "0", *self.argv]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout
        greeting = self._process.stdout.readline() + self._process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)", greeting)
        if not match:
            raise RuntimeError(f"the server did not start: {self._process.communicate(timeout=START_S)[1]}")
        self.url, self.port = match.group(), int(match.group(1))
        self.log: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._process:  # which closes its pipes
            self._process.kill()
            self._reader.join()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            with self._news:
                self.log.append(line)
                self._news.notify_all()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait_for(self, message: str, *, after: int = 0, timeout_s: float = START_S) -> None:
        """Until a line of the log holds `message`, its first `after` lines aside."""
        with self._news:
            if not self._news.wait_for(lambda: any(message in line for line in self.log[after:]), timeout_s):
                raise RuntimeError(f"the server did not say {message!r} within {timeout_s:g} s")

    def wait(self) -> int:
        """Until it has left and its log is read; the exit status."""
        status = self._process.wait(STOP_S)
        self._reader.join()
        return status

    def workers(self) -> list[int]:
        """The processes that serve under a supervisor, of Linux."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]

    @property
    def pid(self) -> int:
        return self._process.pid

    def rss_bytes(self) -> int:
        """Resident memory of the process, of Linux."""
        return _rss_bytes(self._process.pid)

    def family_bytes(self) -> int:
        """The same, with all processes that it started and that are there."""
        pid, total = self._process.pid, self.rss_bytes()
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):  # the thread has ended
                for child in children.read_text().split():
                    with suppress(OSError):
                        total += _rss_bytes(int(child))
        return total


def _rss_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
