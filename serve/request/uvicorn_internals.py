"""Everything that the server takes from uvicorn beyond its documented interface (0.51 and later).

`Connection` (serve/request/connection.py) subclasses the protocol that uvicorn runs on httptools, and starts and ends
requests itself. `OneWrite` (serve/request/one_write.py) writes an answer in place of `RequestResponseCycle.send`. The
supervisor ends its workers with uvicorn's own status. tests/serve/request/test_uvicorn_internals.py names what is
missing after an upgrade.
"""

from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.supervisors.multiprocess import Process

__all__ = ["STARTUP_FAILURE", "STATUS_LINE", "HttpToolsProtocol", "Process", "RequestResponseCycle"]

# Attributes that are read, set, called or overridden.
OF_CONNECTION = """
    _start_asgi_task _unset_keepalive_if_required app_state cycle flow headers loop on_body on_header
    on_headers_complete on_message_begin on_message_complete on_response_complete parser pause_writing pipeline scope
    transport url
""".split()
OF_CYCLE = """
    default_headers disconnected flow keep_alive message_event more_body on_response response_complete response_started
    scope send transport waiting_for_100_continue
""".split()
OF_FLOW = ("read_paused", "resume_reading", "write_paused")
