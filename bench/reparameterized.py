"""python bench/reparameterized.py: timm's nets folded by algebra, beside timm's own reparameterization."""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.page import describe_machine, fill, machine_table, spread, table, typed_command, write_page
from bench.rounds import Timing, alternate, median_ms
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
PACKAGES = ("torch", "timm", "onnx", "onnxruntime-gpu", "onnxruntime")
EXAMPLES = (
    "python bench/reparameterized.py                               # 13 nets, six minutes on two cores",
    "python bench/reparameterized.py --nets resnet18 repvgg_a0 --out /tmp/figures",
    "python bench/reparameterized.py --quick --out /tmp/figures    # three small nets: under a minute",
)


@dataclass(frozen=True)
class ReparameterizedConfig:
    nets: Annotated[tuple[str, ...], f"names of timm's (default: {' '.join(NETS)})"] = ()
    image_size: Annotated[int, "height and width of the images"] = 224
    rounds: Annotated[int, "rounds in which the forms of a net take turns"] = 9
    round_s: Annotated[float, "seconds of one form in one round"] = 0.2
    quick: Annotated[bool, "three nets, three short rounds"] = False
    out: Annotated[Path, "folder for the page and its JSON"] = Path("docs/benchmarks")

    def __post_init__(self) -> None:
        if min(self.image_size, self.rounds, self.round_s) <= 0:
            raise Refusal("--image-size, --rounds and --round-s must be positive")

    def resolved(self) -> "ReparameterizedConfig":
        if self.quick:
            return replace(self, nets=self.nets or QUICK_NETS, rounds=3, round_s=0.1)
        return replace(self, nets=self.nets or NETS)


def command(config: ReparameterizedConfig) -> int:
    """Count the convolutions of each net as trained, as timm fuses it and folded; prove, export and race them."""
    try:
        import timm
    except ImportError as error:
        raise Refusal("timm is missing: pip install -c constraints.txt -e '.[dev]'") from error

    typed, config = typed_command("bench/reparameterized.py", config), config.resolved()
    if unknown := [name for name in config.nets if not timm.is_model(name)]:
        raise Refusal(f"timm {timm.__version__} has no net {', '.join(unknown)}; timm.list_models() lists them")
    rows: list[dict[str, Any]] = []
    console = make_console()
    with progress(console, "nets", len(config.nets) * (config.rounds + 1)) as advance:
        for name in config.nets:
            advance(1, note=name)
            rows.append({"net": name, **measure(name, config, advance)})
    record = {
        "command": typed,
        "machine": describe_machine(*PACKAGES),
        "image_size": config.image_size,
        "rounds": config.rounds,
        "rows": rows,
    }
    console.print(write_page(config.out, "reparameterized", page(record), record))
    return 0


def measure(name: str, config: ReparameterizedConfig, advance: Any = lambda n: None) -> dict[str, Any]:
    """One net in three forms: layers, error in float64, error and time in ONNX Runtime."""
    import tempfile

    import torch

    size = config.image_size
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forms = make_forms(name, x)
    results: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        expected = forms[TRAINED](x).numpy()
        for form, net in forms.items():
            results[form] = {**count_layers(net), "float64_error": difference(expected, net(x).numpy()).relative}
    with tempfile.TemporaryDirectory() as folder:
        answers: dict[str, Any] = {}
        for form, net in forms.items():
            path = Path(folder) / f"{form}.onnx"
            results[form] |= write_onnx(path, net.float(), x[:1].float())
            answers[form] = make_answer(path)
            results[form]["onnxruntime_error"] = difference(expected, answers[form](x.float().numpy())).relative
        image = x[:1].float().numpy()
        # Processor time: what other programs take of a core does not count.
        racers = {
            form: partial(median_ms, partial(answer, image), config.round_s, clock=time.process_time)
            for form, answer in answers.items()
        }
        timings = alternate(racers, batch_size=1, num_rounds=config.rounds, advance=advance)
    for form, timing in timings.items():
        results[form]["timing"] = timing.to_dict() if isinstance(timing, Timing) else timing.reason
    return results


def make_forms(name: str, x: Any) -> dict[str, Any]:
    """The net of random weights, with its scales and statistics moved away from their start, in its three forms."""
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
    torch.set_default_dtype(torch.float64)  # some of timm's methods make their new layers in the default type
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
        convolutions = [node for node in net.with_tensors().nodes if node.op == "conv"]
        points = [node for node in convolutions if node.tensors["weight"][0].numel() == 1]
        return {"convolutions": len(convolutions), "batch_norms": net.graph.count("affine"), "scalings": len(points)}
    layers = list(net.modules())
    kinds = {"convolutions": nn.modules.conv._ConvNd, "batch_norms": nn.modules.batchnorm._BatchNorm}
    return {name: sum(isinstance(layer, kind) for layer in layers) for name, kind in kinds.items()} | {"scalings": 0}


def write_onnx(path: Path, net: Any, x: Any) -> dict[str, int]:
    """All forms by the same exporter; gives the number of nodes, and of convolutions among them."""
    import warnings

    import onnx
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that there is a newer exporter, and that shapes are taken as fixed
        names = {"input_names": ["x"], "output_names": ["logits"], "dynamic_axes": {"x": {0: "N"}, "logits": {0: "N"}}}
        torch.onnx.export(net, (x,), str(path), dynamo=False, opset_version=17, **names)
    ops = [node.op_type for node in onnx.load(path).graph.node]
    return {"onnx_nodes": len(ops), "onnx_convolutions": ops.count("Conv")}


def make_answer(path: Path) -> Any:
    """A file in ONNX Runtime: x float32 [N, 3, H, W] → logits."""
    from export.runtimes.offline import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # the one that calls
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def page(record: dict[str, Any]) -> str:
    """The page of one record."""
    rows = record["rows"]
    layers = ["net", "as trained", "timm", "folded", "of these scalings", "error of timm", "of folded"]
    speed = ["net", "ms as trained", "timm", "folded", "times faster: timm", "folded", "error: as trained", "folded"]
    return fill(
        "reparameterized",
        **{**record, "machine": machine_table(record["machine"])},
        layers=table(layers, [_layers(row) for row in rows]),
        verdict=_verdict(rows),
        speed=table(speed, [_speed(row) for row in rows]),
    )


def _layers(row: dict[str, Any]) -> list[str]:
    forms = [row[form] for form in FORMS]
    counts = [f"{form['convolutions']} + {form['batch_norms']}" for form in forms]
    errors = [f"{form['float64_error']:.1e}" for form in forms[1:]]
    return [row["net"], *counts, str(row[FOLDED]["scalings"]), *errors]


def _verdict(rows: list[dict[str, Any]]) -> str:
    """Where fold leaves more convolutions than timm, and whether they are scalings that timm keeps as batch norms."""
    more = [row for row in rows if row[FOLDED]["convolutions"] > row[TIMM]["convolutions"]]
    if not more:
        return "No net has more convolutions folded than by timm, and none keeps a batch norm."
    lines = [
        f"{row['net']} has {row[FOLDED]['convolutions'] - row[TIMM]['convolutions']} more convolutions than by timm: "
        f"{row[FOLDED]['scalings']} scalings, for {row[TIMM]['batch_norms']} batch norms that timm keeps."
        for row in more
    ]
    return " ".join([*lines, "No other net has more, and none keeps a batch norm."])


def _speed(row: dict[str, Any]) -> list[str]:
    if failed := [row[form]["timing"] for form in FORMS if isinstance(row[form]["timing"], str)]:
        return [row["net"], failed[0], *[""] * 6]
    timings = [Timing.from_dict(row[form]["timing"]) for form in FORMS]
    times = [spread(timing.round_ms, ".2f") for timing in timings]
    ratios = [spread(timing.ratios_to(timings[0]), ".2f") for timing in timings[1:]]
    return [row["net"], *times, *ratios, *(f"{row[form]['onnxruntime_error']:.1e}" for form in (TRAINED, FOLDED))]


if __name__ == "__main__":
    sys.exit(run_command(command, ReparameterizedConfig, examples=EXAMPLES))
