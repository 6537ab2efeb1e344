"""Which of two files serves and which one shadows it: as the command line says, until the shadow is promoted."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import write_whole

if TYPE_CHECKING:
    from serve.config import ServeConfig

_SERVES = "serves"  # holds 1 where the shadow of the command line serves; of all workers
_log = logging.getLogger(__name__)


class Roles:
    """`served` and `shadow` are the configs of both as they are now. Workers share what is written in `home`."""

    def __init__(self, config: "ServeConfig", home: Path | None = None) -> None:
        self._files = [config]
        if config.shadow:  # in the first runtime of its kind, which is the one that it is compared in
            self._files.append(replace(config, models=(config.shadow,), runtime="auto"))
        self._state = home / _SERVES if home else None
        self._place = 0

    @property
    def served(self) -> "ServeConfig":
        """What a reload reads."""
        place = self._now()
        if place:
            first, promoted = (config.model_paths[0].name for config in self._files)
            _log.warning("%s is read, as it was promoted; a new start of the server serves %s again", promoted, first)
        return self._files[place]

    @property
    def shadow(self) -> "ServeConfig":
        """What is compared with it."""
        return self._files[1 - self._now()]

    def swap(self) -> None:
        """What shadows serves from now on, for all workers."""
        self._place = 1 - self._now()
        if self._state:
            write_whole(self._state, b"%d" % self._place)

    def _now(self) -> int:
        if self._state and self._state.exists():
            return int(self._state.read_text())
        return self._place
