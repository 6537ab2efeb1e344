import asyncio

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from serve.request.uvicorn_internals import OF_CONNECTION, OF_CYCLE, OF_FLOW, HttpToolsProtocol


@pytest.fixture(scope="module")
def internals():
    """A connection of uvicorn's that has read a request's first line, and the cycle of that request."""

    async def make():
        config = uvicorn.Config(lambda *_: None, log_config=None, ws="none", lifespan="off")
        connection = HttpToolsProtocol(config, ServerState(), {})
        connection.on_message_begin()
        connection.url = b"/"
        connection.on_headers_complete()
        return connection, connection.cycle

    return asyncio.run(make())


def test_uvicorn_has_what_connections_and_answers_rest_on(internals):
    (connection, cycle), flow = internals, FlowControl(asyncio.Transport())
    missing = [f"HttpToolsProtocol.{name}" for name in OF_CONNECTION if not hasattr(connection, name)]
    missing += [f"RequestResponseCycle.{name}" for name in OF_CYCLE if not hasattr(cycle, name)]
    missing += [f"FlowControl.{name}" for name in OF_FLOW if not hasattr(flow, name)]
    assert not missing, (
        f"uvicorn {uvicorn.__version__} has no {', '.join(missing)}; see serve/request/uvicorn_internals.py"
    )
