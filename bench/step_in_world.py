"""torchrun --nproc-per-node 2 bench/step_in_world.py: a training step shared by processes, as one line of JSON."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal

EXAMPLES = (
    "OMP_NUM_THREADS=2 python bench/step_in_world.py",
    "torchrun --standalone --nproc-per-node 2 bench/step_in_world.py --seconds 5",
)


@dataclass(frozen=True)
class StepConfig:
    depth: Annotated[int, "6N + 4 layers"] = 16
    width: Annotated[float, "width factor k of Table 1"] = 1.0
    side: Annotated[int, "of the images in pixels"] = 28
    batch_size: Annotated[int, "images per step, over all processes"] = 128
    precision: Annotated[Literal["fp32", "bf16"], "of convolutions"] = "fp32"
    steps: Annotated[int, "steps to time, after three that are not"] = 20

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise Refusal("--steps and --batch-size must be at least 1")


def command(config: StepConfig) -> int:
    """Time training steps in this process, or in all that torchrun started; the first one prints the median."""
    import json
    import statistics
    import time

    from bench.forms import Workload, make_step
    from train.distributed import joined
    from train.machine import keep_large_buffers

    keep_large_buffers()
    with joined("cpu") as world:
        workload = Workload(config.depth, config.width, config.side, config.batch_size, config.precision)
        step, times = make_step("Dirac", workload, world), []
        for _ in range(3 + config.steps):
            start = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - start))
        if world.rank == 0:
            print(json.dumps({"processes": world.size, "step_ms": statistics.median(times[3:])}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command, StepConfig, examples=EXAMPLES))
