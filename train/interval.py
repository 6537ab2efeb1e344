"""What a share that was counted on so many images can resolve."""

import math

Z = 1.959964  # the normal distribution's for 95 %
Z_TWO = 2.241403  # for 97.5 %: of two such intervals both hold with 95 %


def interval(num_hits: float, num: int, *, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a share, (low, high), of 95 % unless `z` is another; right for few images too."""
    if num == 0:
        return 0.0, 1.0
    share, denominator = num_hits / num, 1 + z**2 / num
    centre = (share + z**2 / (2 * num)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def percent(ends: tuple[float, float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"
