"""wrk as the client: each of its connections sends the next request as soon as it is answered."""

import json
import shutil
import subprocess
from pathlib import Path

from common.refusal import Refusal

_SCRIPT = Path(__file__).with_name("wrk.lua")
_CORE = "1"  # the servers have core 0


def refuse_without_tools() -> None:
    """Both are Debian packages; no Python package provides them."""
    if missing := [name for name in ("wrk", "taskset") if not shutil.which(name)]:
        raise Refusal(f"{' and '.join(missing)} missing: install the Debian packages wrk and util-linux")


def put_load(
    url: str, path: str, media_type: str, bodies: list[Path], *, num_connections: int, seconds: float
) -> dict[str, float]:
    """Post the files `bodies` in turn for about `seconds`; wrk counts whole ones.

    Returns `requests_per_s`, `p50_ms`, p75, p90, p95, p99 and `p99_9_ms`, and the number of `failures`: statuses above
    399, broken connections and timeouts.
    """
    argv = ["taskset", "-c", _CORE, "wrk", "--threads", "1", "--connections", str(num_connections)]
    argv += ["--duration", f"{max(1, round(seconds))}s", "--timeout", "10s", "--script", str(_SCRIPT), url]
    done = subprocess.run([*argv, "--", media_type, path, *map(str, bodies)], capture_output=True, text=True)
    if done.returncode:
        raise Refusal(f"wrk failed: {(done.stderr or done.stdout).strip()[-200:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return {"requests_per_s": result.pop("requests") / result.pop("seconds"), **result}
