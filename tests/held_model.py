"""Front ends whose model stops at white images: `python -c PROGRAM ROOT plain.onnx FIFO [arguments of serve/run.py]`.

Its process says "holds", and goes on when somebody has written to the FIFO and closed it.
"""

import os
from pathlib import Path

from export.runtimes.onnx_session import OnnxSession

FIFO = "DIRACNET_TEST_FIFO"
PROGRAM = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import held_model
from serve import run
from serve.processes import serving
from common.cli import run_command

def serve(config):
    with run.listen(config.host, config.port) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        return serving.run(config, listener, url, load_on_device=held_model.load)

os.environ[held_model.FIFO] = sys.argv[2]
sys.exit(run_command(serve, run.ServeConfig, argv=sys.argv[3:], examples=()))
"""


class Held(OnnxSession):
    def __call__(self, images):
        if images.min() == 255:
            print("holds", flush=True)
            Path(os.environ[FIFO]).read_bytes()
        return super().__call__(images)


def load(roles, home):
    (path,) = roles.served.model_paths
    return [Held(path)]
