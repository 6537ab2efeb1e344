"""Access: an API key, and the web pages of other origins."""

import hmac
import logging
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.files import read_whole
from common.refusal import Refusal
from serve.request.problems import UNAUTHORIZED, Problem

_log = logging.getLogger(__name__)

KEY_VARIABLE = "DIRACNET_API_KEY"
# Probes and browsers that open a page send no key. These paths reveal nothing about the model.
_OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})


@dataclass(frozen=True)
class Access:
    """Open to every client, unless there is a key."""

    api_key: bytes | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Refuses a request without the key that its path needs."""
        if self.api_key is None or path in _OPEN_PATHS:
            return
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not hmac.compare_digest(given, self.api_key):  # takes as long for a nearly right key as for a wrong one
            detail = "send the server's key as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'"
            raise Problem(UNAUTHORIZED, detail, {"WWW-Authenticate": "Bearer"})


EVERYBODY = Access()


def read_api_key(file: Path | None, environment: Mapping[str, str]) -> bytes | None:
    """The key of `file`, else of DIRACNET_API_KEY, else none. Not an argument, which every user can see."""
    if file is None and KEY_VARIABLE not in environment:
        return None
    key = read_whole(file).strip() if file else environment[KEY_VARIABLE].strip().encode()
    if not key or not all(33 <= byte <= 126 for byte in key):
        raise Refusal(f"{file or KEY_VARIABLE} must hold one key of printable characters without spaces")
    if file and file.stat().st_mode & stat.S_IROTH:
        _log.warning("every user of this machine can read %s, which holds the server's key: chmod o-r it", file.name)
    return key
