"""The lowerings by name, for command lines, which know no torch; fold/lower.py says what each is."""

from typing import Literal, get_args

Lowering = Literal["concat", "shared", "shared-split", "split", "mirror", "skip"]
LOWERINGS: tuple[Lowering, ...] = get_args(Lowering)
