"""python serve/demo.py plain.onnx --images held-out: start a server and show it images whose label is known."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 10
RUN = Path(__file__).with_name("run.py")
EXAMPLES = (
    "python serve/demo.py plain.onnx --images held-out      # files named LABEL_NUMBER, as train/held_out.py writes",
    "python serve/demo.py plain.onnx --stop",
)


@dataclass(frozen=True)
class DemoConfig:
    model: Annotated[Path, "plain.onnx or plain.engine"]
    images: Annotated[Path, "folder of files named LABEL_NUMBER.png, or another photograph format"] = Path("held-out")
    port: Annotated[int, "port to listen on"] = 8000
    stop: Annotated[bool, "stop the server that was started for this model"] = False


def command(config: DemoConfig) -> int:
    """Start a server that keeps running, post held-out images and print its answers beside the truth."""
    stopped = stop(config.model)
    if config.stop:
        print(f"stopped the server of {config.model}" if stopped else f"no server of {config.model} is running")
        return 0
    files = find_held_out(config.images)
    url = f"http://127.0.0.1:{config.port}"
    start(config.model, config.port, url)
    num_right = sum(_show(url, file) for file in files)
    print(f"{num_right} of {len(files)} right")
    print(f"server still running at {url}: open it in a browser; make stop ends it")
    return 0


def find_held_out(folder: Path) -> list[Path]:
    """Files named LABEL_NUMBER in a format that the server reads, ordered by number."""
    from common.image import SUFFIXES

    files = [path for path in folder.glob("*_*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        kinds = ", ".join(SUFFIXES)
        raise Refusal(f"no LABEL_NUMBER file in {folder} ({kinds}); write some with train/held_out.py")
    return sorted(files, key=_number)


def start(model: Path, port: int, url: str) -> None:
    """Start serve/run.py and wait until it is ready. Refuses a port on which another server would answer for it."""
    import httpx

    from serve.run import listen

    listen("127.0.0.1", port).close()
    log = model.with_name("server.log")
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [sys.executable, str(RUN), str(model), "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C here does not stop the server
        )
    _pid_file(model).write_text(str(server.pid))
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            _pid_file(model).unlink()
            lines = log.read_text().strip().splitlines() or [f"{log} is empty"]
            raise Refusal(f"the server did not start: {lines[-1].removeprefix('error: ')}")
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    stop(model)
    raise Refusal(f"the server was not ready within {START_TIMEOUT_S} s; see {log}")


def stop(model: Path) -> bool:
    """Stop the server that was started for `model`; whether there was one."""
    try:
        pid = int(_pid_file(model).read_text())
    except (OSError, ValueError):
        return False
    _pid_file(model).unlink()
    if not _is_ours(pid):
        return False
    deadline = time.monotonic() + STOP_TIMEOUT_S
    with suppress(ProcessLookupError):  # it may end at any time
        os.kill(pid, signal.SIGTERM)
        while _is_ours(pid):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
    return True


def _pid_file(model: Path) -> Path:
    return model.with_name("server.pid")


def _is_ours(pid: int) -> bool:
    """Whether `pid` is a server of this project: process ids are reused."""
    if Path("/proc").is_dir():
        try:
            return str(RUN) in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            return False
    done = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True)
    return str(RUN) in done.stdout


def _show(url: str, file: Path) -> bool:
    """Post one image and print the answer; whether it is correct."""
    import httpx

    from serve.client import KEY_VARIABLE

    # The server detects the format, and needs the key if there is one in the environment.
    headers = {"Content-Type": "application/octet-stream", "X-Api-Key": os.environ.get(KEY_VARIABLE, "").strip()}
    response = httpx.post(f"{url}/predict", content=file.read_bytes(), headers=headers, trust_env=False)
    answer = response.json()
    if response.status_code != 200:
        raise Refusal(f"{file}: {answer['detail']}")
    truth, best = file.stem.rpartition("_")[0], answer["results"][0]
    is_right = best["label"].replace("/", "-") == truth
    mark = "✓" if is_right else "✗"
    print(f"{file.name:20} truth {truth:12} answer {best['label']:12} {best['probability']:6.1%}  {mark}")
    return is_right


def _number(file: Path) -> tuple[int, str]:
    number = file.stem.rpartition("_")[2]
    return (int(number) if number.isdecimal() else 0, file.name)


if __name__ == "__main__":
    sys.exit(run_command(command, DemoConfig, examples=EXAMPLES))
