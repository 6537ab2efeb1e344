"""python tests/floors.py: the lowest versions that pyproject.toml allows on this machine, as requirements for pip.

PyTorch is left out, several GB: `make gpu-versions` tests with its lowest version, 2.11, and torchvision's.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement


def floors() -> list[str]:
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    required = [Requirement(line) for line in project["dependencies"]]
    return [
        f"{one.name}{'[' + ','.join(sorted(one.extras)) + ']' if one.extras else ''}=={_lowest(one)}"
        for one in required
        if not one.name.startswith("torch") and (one.marker is None or one.marker.evaluate())
    ]


def _lowest(requirement: Requirement) -> str:
    (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return bound


if __name__ == "__main__":
    print(*floors(), sep="\n")
