"""The part of docs/reliability.md about strangers: what was measured, and what is bounded by what."""

from typing import Any

from bench.page import table

BOUNDED = (
    ("bytes of one body, of all bodies", "`--max-body-mb`, `--max-held-mb`", "413, 503"),
    (
        "bytes of requests that are given up",
        "freed at once; those in a decoder count as held until it has finished",
        "503",
    ),
    ("pixels of an image", "64,000,000, by its header", "413"),
    (
        "memory of all decoders at once",
        "`--max-decoded-mb`, by header; each process gets what its image announced",
        "413",
    ),
    ("work in an image", "100 scans or 1,000 segments of a JPEG; chunks of a PNG: 256, and one for each KiB", "422"),
    ("time of an image", "10 s of processor time, then its process is ended and replaced", "422"),
    ("decoded pixels that wait for the model", "`--max-held-mb`, and `--max-queue` images", "503"),
    (
        "values in JSON",
        "1,048,576, of which 131,072 lists and objects; a long body is read in a thread, one at a time",
        "413",
    ),
    (
        "wait behind large images",
        "lighter requests first; each may overtake for 10 s a second of decoding",
        "504 at `--deadline-ms`",
    ),
)


def siege_parts(rounds: list[dict[str, Any]]) -> list[str]:
    """The section's paragraphs and tables, of the record's only round."""
    (result,) = rounds
    rows = [
        (
            attack["name"] + (f", `{' '.join(attack['server'])}`" if attack["server"] else ""),
            f"{attack['body_mb']:.1f} MB",
            ", ".join(f"{count} × {status}" for status, count in attack["answers"].items()),
            f"{1000 * attack['worst_wait_s']:.0f} ms of `{attack['probe']}`",
            ", ".join(f"{attack['mb'][when]:.0f}" for when in ("before", "largest", "after")),
        )
        for attack in result["attacks"]
    ]
    return [
        f"Measured by `{result['command']}` on {result['machine']['device']}, {result['machine']['date']}"
        + (f", at a niceness of {result['niceness']} on a machine that others shared" if result["niceness"] else "")
        + ". Each attack "
        "meets a server of its own with its default limits, unless flags stand beside it. Meanwhile a healthy client "
        "asks 25 times a second for one image of 28x28, or for `/healthz` where the attack is JSON. Memory is that of "
        "the server and the processes that decode for it.",
        table(("attack", "sent", "answers", "longest wait", "MB before, largest, after"), rows),
        "What is bounded of bodies and images:",
        table(("what", "bound", "beyond it"), BOUNDED),
        "An image that is short to decode by its header is decoded in a thread of the server, as that takes 11 µs for "
        "one of 28x28, and 88 µs in a process. Any other is decoded in a process, which is started for the first one, "
        "holds no key, and takes 35 MB at rest. `/readyz` fails while images wait that are past their deadline and no "
        "decoder has finished any since.",
        "Whoever asks without end keeps the decoders of large images busy: small images pass, other large ones wait.",
    ]
