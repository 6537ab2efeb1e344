"""Confidence intervals of a share that was counted on a limited number of images."""

import math

Z = 1.959964  # the normal distribution's quantile for an interval of 95 %
Z_TWO = 2.241403  # for 97.5 %, so that two such intervals both hold with 95 %


def interval(num_hits: float, num: int, *, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a share, (low, high), 95 % unless `z` says otherwise; also valid for few images."""
    if num == 0:
        return 0.0, 1.0
    share, denominator = num_hits / num, 1 + z**2 / num
    centre = (share + z**2 / (2 * num)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def percent(ends: tuple[float, float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"


def at_most(num_hits: int, num: int) -> float:
    """The upper bound of Clopper and Pearson: at this share, so few hits have a probability of 5 %.

    Exact for any number of images. Without a hit it is close to 3 / num, the rule of three.
    """
    from scipy.special import betaincinv  # not at the head, as the server counts without it

    return float(betaincinv(num_hits + 1, num - num_hits, 0.95)) if num_hits < num else 1.0
