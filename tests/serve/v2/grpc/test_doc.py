"""docs/grpc.md: its example, run as it stands there against a real server, and its table."""

import re
import subprocess
import sys

import pytest
from serving import ROOT

from serve.request import problems
from serve.v2.grpc_messages import MAX_FIELDS
from serve.v2.grpc_server import STATUS_OF_HTTP

PAGE = (ROOT / "docs" / "grpc.md").read_text()


@pytest.mark.slow
def test_the_example_prints_what_is_written(start):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    server = start("--grpc-port", 0)
    program = program.replace("127.0.0.1:8001", re.search(r"gRPC at (\S+)", server.where).group(1))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_the_table_of_statuses_is_that_of_the_server():
    written = re.findall(r"^\| `([a-z-]+)` \| `([A-Z_]+)` \|$", PAGE, flags=re.MULTILINE)
    kinds = {*problems.OF_PREDICTION, problems.NOT_FOUND} - {problems.MEDIA_TYPE_UNKNOWN}  # which is HTTP's own
    assert dict(written) == {kind.name: STATUS_OF_HTTP[kind.status].name for kind in kinds}
    assert f"more than {MAX_FIELDS:,} fields" in PAGE
