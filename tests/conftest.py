import signal
import sys
from pathlib import Path

import hypothesis
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # for `reference` and `rows`

from rows import ROWS, SLOW

from common.spec import ImageSpec, Spec
from train.families import build

NET_SEED, IMAGES_SEED = 0, 1

# The same examples every time, however long one of them takes on a busy machine.
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job that a script's shell started with &
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or no Ctrl-C of a test would reach anything


@pytest.fixture(scope="session")
def make_spec():
    """A spec with everything small and every field overridable."""

    def make(
        family="cifar",
        depth=10,
        width=0.25,
        nonlinearity="ncrelu",
        parameterization="dirac",
        size=8,
        channels=3,
        num_labels=10,
        delta="repeated",
    ):
        image = ImageSpec(size, size, channels, (0.4,) * channels, (0.3,) * channels, resize=size)
        labels = tuple(f"label {i}" for i in range(num_labels))
        return Spec(family, depth, width, nonlinearity, image, labels, parameterization, delta)

    return make


def pytest_report_header():
    """What a result depends on besides the code."""
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in (torch, np, onnx, onnxruntime))
    return f"{versions}, {torch.get_num_threads()} threads; seeds: nets {NET_SEED}, images {IMAGES_SEED}"


@pytest.fixture(autouse=True)
def same_threads():
    """No test leaves another number of threads behind: what training gives is bit for bit for one number alone."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same ones, whatever has run before it in this process."""
    torch.manual_seed(NET_SEED)


@pytest.fixture(
    params=[pytest.param(row, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, row in ROWS.items()]
)
def row(request):
    """The fields of a spec for each of `ROWS` in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_net(make_spec):
    """A net whose every parameter and statistic lies away from its initial value, negative ones too."""

    def make(seed=NET_SEED, **fields):
        torch.manual_seed(seed)
        net = build(make_spec(**fields))
        for name, tensor in net.state_dict().items():
            leaf = name.rsplit(".", 1)[-1]
            if not tensor.is_floating_point():
                continue
            if leaf == "running_var":
                tensor.uniform_(0.2, 3)
            elif leaf == "a":
                tensor.uniform_(-1, 3)
            elif leaf == "b" or leaf == "running_mean" or "bn" in name:
                tensor.normal_(0.2, 0.8)
        return net.eval()

    return make


@pytest.fixture
def port():
    """A port of 127.0.0.1 that nobody listens on."""
    from bench.lab.server import free_port

    return free_port()


@pytest.fixture(scope="session")
def images():
    """Random uint8 images [N, H, W, C]."""

    def make(num=4, size=8, channels=3):
        return np.random.default_rng(IMAGES_SEED).integers(0, 256, (num, size, size, channels), dtype=np.uint8)

    return make
