"""A server in its own process, this project's or another: started, awaited, watched under load and ended."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from random import SystemRandom
from typing import Any, Self

import httpx

from bench.lab.process import family_bytes, memory_bytes
from common.refusal import Refusal

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "fashion-mnist.onnx"
IMAGE = ROOT / "models" / "held-out" / "Coat_6.png"
START_S, STOP_S = 90.0, 60.0
POLL_S = 0.002


def start(model: Path, *options: Any, program: Sequence[Any] = (ROOT / "serve/run.py",), **settings: Any) -> "Server":
    """`serve/run.py` with ONNX Runtime, which is otherwise compared with other runtimes at every start.

    `program` is what Python runs instead; `settings` are those of `Server`.
    """
    port = free_port()
    argv = [sys.executable, *program, model, "--port", port, "--runtime", "onnxruntime", *options]
    return Server([str(word) for word in argv], port, **settings)


def free_port() -> int:
    """A port that the system gives to no connection before the server has it, as it might one above 32,767."""
    while True:
        port = SystemRandom().randrange(20_000, 32_768)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Server:
    """A started process. `with server` waits until it is ready; at the end, it and its children are stopped.

    It is ready when `probe` gets an answer that is not an error. Its output goes to the file `log`, by default a
    temporary one. `client` opens a connection for each request. `popen` are more arguments of `subprocess.Popen`.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        *,
        probe: Callable[[httpx.Client], httpx.Response] = lambda client: client.get("/readyz"),
        core: int | None = None,
        log: Path | None = None,
        **popen: Any,
    ) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._probe = probe
        self._log = log.open("wb+") if log else tempfile.TemporaryFile()  # noqa: SIM115 – closed in __exit__
        pin = [] if core is None else ["taskset", "-c", str(core)]
        popen = {"stdout": self._log, "stderr": self._log, "start_new_session": True, **popen}
        self._process = subprocess.Popen([*pin, *command], **popen)
        self.client = httpx.Client(base_url=self.url, headers={"Connection": "close"}, timeout=START_S, trust_env=False)

    def __enter__(self) -> Self:
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with closing(self.client), self._log, self._process:  # which closes its pipe
            with suppress(subprocess.TimeoutExpired):
                self.stop()
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < until:
            with suppress(httpx.HTTPError):  # nothing listens yet, or it is not ready
                self._probe(self.client).raise_for_status()
                return
            time.sleep(POLL_S)
        last_line = (self.log() or ["no message"])[-1][:300]
        if self._process.poll() is None:
            raise Refusal(f"is not ready after {START_S:g} s: {last_line}")
        raise Refusal(f"ends with status {self.exit_status}: {last_line}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        return self._process.returncode

    def log(self) -> list[str]:
        """The lines of its output so far."""
        file = self._log.fileno()  # read without moving the position at which the server writes
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace").strip().splitlines()

    def wait_for(self, message: str, *, after: int = 0) -> None:
        """Wait until a line of the log contains `message`; its first `after` lines do not count."""
        until = time.monotonic() + START_S
        while not any(message in line for line in self.log()[after:]):
            if time.monotonic() > until:
                raise RuntimeError(f"the server did not log {message!r} within {START_S:g} s")
            time.sleep(5 * POLL_S)

    def reload(self, message: str) -> None:
        """Send SIGHUP and wait until the server logs `message`."""
        num_lines = len(self.log())
        self._process.send_signal(signal.SIGHUP)
        self.wait_for(message, after=num_lines)

    def stop(self) -> float:
        """Send SIGTERM and wait; the seconds until the process has ended."""
        start = time.monotonic()
        self._process.terminate()
        self._process.wait(STOP_S)
        return time.monotonic() - start

    def workers(self) -> list[int]:
        """The processes that serve under a supervisor, in the order in which they were started; Linux only."""
        found: list[int] = []
        for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with suppress(OSError):  # it has ended
                if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(int(pid))
        return found

    def rss_bytes(self, *, with_children: bool = False) -> int:
        """Resident memory of the process, or also of all that it started and that still run; Linux only."""
        return (family_bytes if with_children else memory_bytes)("VmRSS", self.pid)
