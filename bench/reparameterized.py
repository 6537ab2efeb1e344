"""python bench/reparameterized.py: timm models folded by algebra, compared with timm's own reparameterization."""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.page import Measurement, Record, describe_machine, publish, render
from bench.lab.rounds import alternate, attempt, median_ms, ratios
from common.cli import run_command
from common.difference import difference
from common.progress import make_console, progress
from common.refusal import Refusal

NETS = (
    *("repvgg_a0", "mobileone_s0", "mobileone_s1", "fastvit_t8", "repvit_m0_9", "repghostnet_050"),
    *("ghostnet_050", "mobilenetv3_small_050", "efficientnet_b0", "regnety_002", "resnet18", "resnet50", "densenet121"),
)
QUICK_NETS = ("mobileone_s1", "repghostnet_050", "resnet18")
FORMS = TRAINED, TIMM, FOLDED = "as trained", "timm", "folded"
EXAMPLES = (
    "python bench/reparameterized.py                               # 13 nets, six minutes on two cores",
    "python bench/reparameterized.py --nets resnet18 repvgg_a0 --out /tmp/figures",
    "python bench/reparameterized.py --quick --out /tmp/figures    # three small nets: under a minute",
)


@dataclass(frozen=True)
class ReparameterizedConfig(Measurement):
    nets: Annotated[tuple[str, ...], f"names of timm models (default: {' '.join(NETS)})"] = ()
    image_size: Annotated[int, "height and width of the images"] = 224
    rounds: Annotated[int, "rounds in which the forms of a net take turns"] = 9
    round_s: Annotated[float, "seconds of one form in one round"] = 0.2
    quick: Annotated[bool, "three nets, three short rounds"] = False
    out: Annotated[Path, "folder for the page and its JSON"] = Path("docs/benchmarks")


def command(config: ReparameterizedConfig) -> None:
    """Count the convolutions of each net as trained, as timm fuses it and folded; prove, export and race them."""
    try:
        import timm
    except ImportError as error:
        raise Refusal("timm is missing: pip install -c constraints.txt -e '.[dev]'") from error

    nets, rounds, round_s = (QUICK_NETS, 3, 0.1) if config.quick else (NETS, config.rounds, config.round_s)
    nets = config.nets or nets
    if unknown := [name for name in nets if not timm.is_model(name)]:
        raise Refusal(f"timm {timm.__version__} has no net {', '.join(unknown)}; timm.list_models() lists them")
    rows = []
    with progress(make_console(), "nets", len(nets) * (rounds + 1)) as advance:
        race = partial(alternate, batch_size=1, num_rounds=rounds, advance=advance)
        for name in nets:
            advance(1, note=name)
            rows.append({"net": name, **measure(name, config.image_size, round_s, race)})
    machine, size = describe_machine("torch", "timm", "onnx", "onnxruntime-gpu", "onnxruntime"), config.image_size
    publish(config, "reparameterized", page, machine=machine, image_size=size, rounds=rounds, rows=rows)


def measure(name: str, image_size: int, round_s: float, race: Any) -> dict[str, Any]:
    """One net in three forms: layers, error in float64, error and time in ONNX Runtime."""
    import torch

    from export.runtimes.onnx_session import quiet_session

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, image_size, image_size, dtype=torch.float64, generator=generator)
    forms = make_forms(name, x)
    with torch.no_grad():
        logits = {form: net(x).numpy() for form, net in forms.items()}
    results: dict[str, dict[str, Any]] = {}
    racers = {}
    for form, net in forms.items():
        layers, images = count_layers(net), x.float()
        session = quiet_session(write_onnx(net.float(), images[:1]), intra_op_num_threads=1)
        answer = partial(session.run, None)
        found = {"float64_error": logits[form], "onnxruntime_error": answer({"x": images.numpy()})[0]}
        errors = {name: difference(logits[TRAINED], other).relative for name, other in found.items()}
        results[form] = {**layers, **errors}
        # Processor time, so that other programs do not count.
        one = partial(answer, {"x": images[:1].numpy()})
        racers[form] = partial(attempt, partial(median_ms, one, round_s, clock=time.process_time))
    for form, timing in race(racers).items():
        results[form]["timing"] = timing
    return results


def make_forms(name: str, x: Any) -> dict[str, Any]:
    """The net with random weights in its three forms; scales and statistics differ from their initial values."""
    import timm
    import torch
    from timm.utils.model import reparameterize_model

    from fold.graph import fold

    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False).double().eval().requires_grad_(False)
    for key, tensor in net.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and tensor.dim() < 2:
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    standard = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # some of timm's methods create their layers in it
    try:
        reparameterized = reparameterize_model(net).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(standard)
    try:
        return {TRAINED: net, TIMM: reparameterized, FOLDED: fold(net, x)}
    except TypeError as error:
        raise Refusal(f"{name} {error}") from error


def count_layers(net: Any) -> dict[str, int]:
    """Convolutions, batch norms, and convolutions that are a scale and a shift for each channel."""
    from torch import nn

    from fold.graph import GraphNet

    if isinstance(net, GraphNet):
        convolutions = [node for node in net.graph.nodes if node.op == "conv"]
        points = [node for node in convolutions if node.tensors["weight"][0].numel() == 1]
        return {"convolutions": len(convolutions), "batch_norms": net.graph.count("affine"), "scalings": len(points)}
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    convolutions, batch_norms = (sum(isinstance(layer, kind) for layer in net.modules()) for kind in kinds)
    return {"convolutions": convolutions, "batch_norms": batch_norms, "scalings": 0}


def write_onnx(net: Any, x: Any) -> bytes:
    """The ONNX file of a net, x float32 [N, 3, H, W] → logits, from PyTorch's exporter."""
    import io
    import warnings

    import torch

    file, dynamic = io.BytesIO(), {"x": {0: "N"}, "logits": {0: "N"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the newer exporter, and about fixed shapes
        names = {"input_names": ["x"], "output_names": ["logits"], "dynamic_axes": dynamic}
        torch.onnx.export(net, (x,), file, dynamo=False, opset_version=17, **names)
    return file.getvalue()


def page(record: Record) -> str:
    return render("reparameterized", record, speeds=list(map(_speeds, record["rows"])))


def _speeds(row: Record) -> Record:
    """Times and speedups of a net's forms, or only the reason if one failed."""
    timings = [row[form]["timing"] for form in FORMS]
    if reason := next((timing for timing in timings if isinstance(timing, str)), ""):
        return {"net": row["net"], "ms": [reason.replace("|", "/"), "", ""], "ratios": [""] * 2, "errors": [""] * 2}
    faster = [ratios(timing, to=timings[0]) for timing in timings[1:]]
    errors = [row[form]["onnxruntime_error"] for form in (TRAINED, FOLDED)]
    return {"net": row["net"], "ms": [timing["round_ms"] for timing in timings], "ratios": faster, "errors": errors}


if __name__ == "__main__":
    sys.exit(run_command(command, ReparameterizedConfig, examples=EXAMPLES))
