"""The bars that the plain net is to reach, and what the record of a race says of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.model_rows import BASELINES, NUM_GEMM
from bench.rounds import Timing


@dataclass(frozen=True)
class Bar:
    precision: str
    batch_size: int
    factor: float  # least speedup over a Dirac net in eager PyTorch
    above_peak: bool = False  # whether direct convolution at the peak of matrix products must be exceeded too


BARS = (Bar("fp32", 1, 5), Bar("fp32", 32, 2.4, above_peak=True), Bar("int8", 1, 14), Bar("int8", 32, 5))


@dataclass(frozen=True)
class Verdict:
    """One bar against one baseline. Shares are of the peak of `bar.precision`, in direct convolution's operations."""

    bar: Bar
    baseline: str
    best: str  # title of the fastest row
    speedup: float
    share: float | None  # of the best row; None where no product was measured
    share_demanded: float | None  # what `bar.factor` times the baseline would be: above 1 no direct convolution does it

    @property
    def is_met(self) -> bool:
        return self.speedup >= self.bar.factor and (not self.bar.above_peak or (self.share or 0) > 1)


def judge(net: Mapping[str, Any], num_threads: int) -> list[Verdict]:
    """All bars of whose rows the record of a net has timings; rows that stray do not count."""
    verdicts = []
    for bar in BARS:
        candidates = {
            title: timing
            for title, timing in timings(net, bar, num_threads).items()
            if title not in BASELINES and not row_of(net, title, bar.precision)["strays"]
        }
        baselines = timings(net, Bar("fp32", bar.batch_size, 0), num_threads)
        if not candidates:
            continue
        best = min(candidates, key=lambda title: candidates[title].median_ms)
        for baseline in BASELINES:
            if baseline in baselines:
                verdicts.append(_verdict(net, bar, num_threads, best, candidates[best], baseline, baselines[baseline]))
    return verdicts


def timings(net: Mapping[str, Any], bar: Bar, num_threads: int) -> dict[str, Timing]:
    """By title: the rows of the race's own net in a bar's precision that have a timing for its batch."""
    found = {}
    for row in net["rows"]:
        record = row["timings"].get(str(num_threads), {}).get(str(bar.batch_size))
        if (row["net"], row["precision"]) == (net["entrants"][0]["name"], bar.precision) and isinstance(record, dict):
            found[row["title"]] = Timing.from_dict(record)
    return found


def row_of(net: Mapping[str, Any], title: str, precision: str) -> Mapping[str, Any]:
    """The row of the race's own net with that title."""
    name = net["entrants"][0]["name"]
    return next(row for row in net["rows"] if (row["net"], row["title"], row["precision"]) == (name, title, precision))


def peak(net: Mapping[str, Any], precision: str, num_threads: int, batch_size: int) -> float | None:
    """Operations per second of the fastest matrix product that ran in the same rounds; None where none ran."""
    times = [
        row["timings"].get(str(num_threads), {}).get(str(batch_size))
        for row in net["rows"]
        if (row["net"], row["precision"]) == ("GEMM", precision)
    ]
    operations = 2 * NUM_GEMM[precision] ** 3
    return max((1000 * operations / time["median_ms"] for time in times if isinstance(time, dict)), default=None)


def _verdict(
    net: Mapping[str, Any], bar: Bar, num_threads: int, best: str, timing: Timing, baseline: str, before: Timing
) -> Verdict:
    limit = peak(net, bar.precision, num_threads, bar.batch_size)
    operations = 2 * net["entrants"][0]["macs"]
    share = operations * timing.images_per_s / limit if limit else None
    demanded = bar.factor * operations * before.images_per_s / limit if limit else None
    return Verdict(bar, baseline, best, timing.speedup_over(before), share, demanded)
