import pytest
from rpc_calls import tritons


@pytest.fixture
def client(served_rpc):
    """NVIDIA's client of a real server."""
    with tritons(served_rpc.target) as client:
        yield client
