"""python export/to_onnx.py plain.safetensors: write a plain net as ONNX."""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import sha256, write_whole
from common.progress import make_console, make_table, progress
from common.refusal import Refusal
from common.spec import DatasetName
from fold.lowerings import Lowering

if TYPE_CHECKING:
    import onnx
    from rich.console import Console

    from export.eight_bits.quantize import Candidate, Drop
    from fold.plain import Plain

EXAMPLES = (
    "python export/to_onnx.py plain.safetensors             # writes plain.onnx beside it",
    "python export/to_onnx.py plain.safetensors --lowering auto --batch-sizes 1 8 32",
    "python export/to_onnx.py plain.safetensors --precision int8 --out plain-int8.onnx",
    "python export/to_onnx.py plain.safetensors --precision int8 --target tensorrt --out for-trt.onnx",
)
EIGHT_BITS = ("int8", "fp8")
DEFAULT_LOWERING = "shared"  # of the forms with one convolution per layer the fastest on CPUs

Made = tuple["onnx.ModelProto", dict[str, Any], bool]  # a graph, what it says of itself, whether accuracy is kept


@dataclass(frozen=True)
class ToOnnxConfig:
    plain: Annotated[Path, "a plain net of fold/run.py"]
    out: Annotated[Path | None, "file to write (default: the same name with .onnx)"] = None
    precision: Annotated[Literal["fp32", "fp16", "int8", "fp8"], "eight bits: calibrated on training images"] = "fp32"
    lowering: Annotated[
        Literal["auto", Lowering] | None,
        "how NCReLU and convolution are written; auto: the fastest in ONNX Runtime on this machine "
        "(default: shared; in eight bits the one of skip and concat that loses least)",
    ] = None
    batch_sizes: Annotated[tuple[int, ...], "with --lowering auto: the batches to be fast at"] = (1, 8, 32)
    target: Annotated[Literal["onnxruntime", "tensorrt"], "with int8: who runs it; fp8 is for tensorrt"] = "onnxruntime"
    dataset: Annotated[DatasetName | None, "eight bits: calibrate and test on it (default: what the net learnt)"] = None
    data_dir: Annotated[Path | None, "where the data set lies"] = None
    calibration_images: Annotated[int, "training images whose activations set the ranges"] = 512
    allow_drop: Annotated[bool, "exit 0 even if eight bits lose 0.3 points of accuracy or 2 % of the classes"] = False
    json: Annotated[bool, "print the result as JSON on stdout"] = False

    def __post_init__(self) -> None:
        if self.calibration_images < 1 or min(self.batch_sizes, default=0) < 1:
            raise Refusal("--calibration-images and --batch-sizes must be at least 1")
        if self.precision == "fp8" and self.target != "tensorrt":
            raise Refusal("--precision fp8 is for TensorRT: add --target tensorrt")
        if self.precision in EIGHT_BITS and self.lowering == "auto":
            raise Refusal("--lowering auto compares speed; leave it out to have eight bits chosen by what they lose")
        if self.precision not in EIGHT_BITS and (self.target, self.dataset) != ("onnxruntime", None):
            raise Refusal(f"--target and --dataset go with int8 and fp8, not with {self.precision}")


def command(config: ToOnnxConfig) -> int:
    """Write a plain net as ONNX: uint8 images in, logits out, its spec in the metadata."""
    from export.eight_bits.quantize import answerer
    from export.graphs.graph import OPSET, set_provenance
    from export.model_file.probe import probe_images, record_probe
    from export.runtimes.saturation import may_saturate
    from fold.plain import load_plain

    console = make_console(json=config.json)
    plain = load_plain(config.plain)
    model, record, kept = (_eight_bits if config.precision in EIGHT_BITS else _floats)(plain, config, console)
    record = {"plain_sha256": plain.sha256, "precision": config.precision, "opset": OPSET, **record}
    if config.precision == "int8":  # a note for people: readers compute it from the weights
        record["cannot_saturate"] = not may_saturate(config.plain, model.SerializeToString())
    probe = record_probe(answerer(model)(probe_images(plain.spec.image)))
    set_provenance(model, {**plain.provenance, "export": {**record, "probe": probe}})
    content = model.SerializeToString()
    out = write_whole(config.out or config.plain.with_suffix(".onnx"), content)
    what = f"{plain.spec.name}, {config.precision}, {record['lowering']}, opset {OPSET}"
    console.print(f"wrote {out}: {what}, {len(content) / 1e6:.2f} MB")
    if config.json:
        print(json.dumps({"out": str(out), "sha256": sha256(content), "bytes": len(content), **record}))
    return int(not kept and not config.allow_drop)


def _floats(plain: "Plain", config: ToOnnxConfig, console: "Console") -> Made:
    """In fp16, refuses a graph one of whose nodes leaves float16's range on random, extreme or real images."""
    from export.eight_bits.calibrate import first_overflow
    from export.graphs.graph import to_onnx
    from fold.image_sets import extreme_images, random_images, real_images
    from fold.lower import lower

    lowering, image = config.lowering or DEFAULT_LOWERING, plain.spec.image
    record = _fastest(plain, config, console) if lowering == "auto" else {"lowering": lowering}
    model = to_onnx(lower(plain.net, record["lowering"]), plain.spec, {}, precision=config.precision)
    if config.precision == "fp32":
        return model, record, True
    training = plain.provenance.get("training", {})
    num, beside = config.calibration_images, config.plain.parent
    real, _ = real_images(image, training, num=num, data_dir=config.data_dir, beside=beside)
    sets = {"extreme": extreme_images(image), "random": random_images(image), "real": real}
    for kind, images in sets.items():
        if images is not None and (node := first_overflow(model, images)):
            where = f"the output of {node} is beyond 65,504 on {kind} images"
            raise Refusal(f"{config.plain} overflows in float16: {where}; export it with --precision fp32")
    return model, record, True


def _fastest(plain: "Plain", config: ToOnnxConfig, console: "Console") -> dict[str, Any]:
    """Time every lowering here; the record says what was chosen, and all that was measured."""
    from common.environment import num_cores
    from export.eight_bits.quantize import answerer
    from export.graphs.graph import to_onnx
    from export.runtimes.onnx_session import ort
    from export.timing import ROUNDS, geometric_means, time_answers
    from fold.lower import distinct_lowerings, lower

    answers = {
        lowering: answerer(to_onnx(lower(plain.net, lowering), plain.spec, {}, precision=config.precision))
        for lowering in distinct_lowerings(plain.net)
    }
    with progress(console, "timing lowerings", ROUNDS * len(config.batch_sizes)) as advance:
        rows = time_answers(answers, plain.spec.image, config.batch_sizes, advance=advance)
    table = make_table("lowering", *(f"batch {size}, ms" for size in config.batch_sizes))
    for lowering in answers:
        of_it = [row for row in rows if row.name == lowering]
        table.add_row(lowering, *(f"{row.median_ms:.2f} ({row.min_ms:.2f} to {row.max_ms:.2f})" for row in of_it))
    console.print(table)
    return {
        "lowering": next(iter(geometric_means(rows))),
        "timings": [asdict(row) for row in rows],
        "timed_on": f"ONNX Runtime {ort.__version__}, CPU, {num_cores()} cores",
    }


def _eight_bits(plain: "Plain", config: ToOnnxConfig, console: "Console") -> Made:
    """The candidate that loses least on training images; the record says what it costs on the test images."""
    import numpy as np

    from export.compare import ALLOWED_DROP, INT8_AGREEMENT
    from export.eight_bits.escalation import answer_both, measure
    from export.eight_bits.quantize import TRIED, answerer, measure_drop, num_images_run, quantize
    from export.graphs.graph import to_onnx
    from export.runtimes.cascade import RECORD
    from fold.lower import distinct_lowerings

    observed, chosen_by, set_aside, test = _images(plain, config, console)
    possible = distinct_lowerings(plain.net)
    lowerings = (config.lowering,) if config.lowering else tuple(name for name in TRIED if name in possible)
    with progress(console, "calibrating", num_images_run(lowerings, len(observed), len(chosen_by))) as advance:
        images = {"observed": observed, "chosen_by": chosen_by}
        how: dict[str, Any] = {"precision": config.precision, "target": config.target, "lowerings": lowerings}
        model, candidates = quantize(plain.net, plain.spec, **how, **images, advance=advance)
    forms = answerer(to_onnx(plain.net, plain.spec, {})), answerer(model)
    with progress(console, "testing", sum(map(len, (test, *set_aside)))) as advance:
        tested = answer_both(*forms, [test], advance)
        evidence = measure(answer_both(*forms, set_aside, advance), tested) if set_aside else None
    if missing := len(test) - len(tested[0]):
        raise Refusal(f"{missing} of {len(test)} test images cannot be read: repair them")
    drop = measure_drop(*tested, np.asarray(test.targets))
    _print(console, candidates, drop)
    if evidence:
        console.print(f"as a cascade: {evidence}")
    if not drop:
        lost = f"more than {100 * ALLOWED_DROP:.1f} points of test accuracy are lost"
        changed = f"fewer than {100 * INT8_AGREEMENT:.0f} % of the images keep their class"
        status = "" if config.allow_drop else ": exit status 1; --allow-drop accepts it"
        print(f"{lost}, or {changed}{status}", file=sys.stderr)
    tried = [asdict(candidate) for candidate in candidates]
    record = {
        "lowering": candidates[0].lowering,
        "target": config.target,
        "calibration": {"images": len(observed), "chosen_by": len(chosen_by), "candidates": tried},
        "test": asdict(drop),
        **({RECORD: evidence.to_dict()} if evidence else {}),
    }
    return model, record, bool(drop)


def _images(plain: "Plain", config: ToOnnxConfig, console: "Console") -> tuple[Any, Any, Any, Any]:
    """Training images to observe, training images to choose by, parts to choose a threshold by, and the test split."""
    import numpy as np

    from export.eight_bits.escalation import images_to_choose_by, mixed
    from train.data import datasets

    training, image = plain.provenance.get("training", {}), plain.spec.image
    learnt = training.get("dataset")
    name = config.dataset or learnt or ("folder" if config.data_dir else None)
    if name is None:
        raise Refusal(f"{config.plain} records no data set: name images to calibrate on by --dataset or --data-dir")
    if config.dataset or not learnt:
        dataset = datasets.load(name, data_dir=config.data_dir, image=image)
    else:
        dataset = datasets.load_as_trained(training, data_dir=config.data_dir, beside=config.plain.parent, image=image)
    found, needed = len(dataset.info.labels), len(plain.spec.labels)
    if found != needed:
        raise Refusal(f"{name} has {found} classes, and {plain.spec.name} has {needed}: calibrate on images of these")
    num = min(config.calibration_images, max(1, len(dataset.train) // 3))  # one third sets ranges, the rest chooses
    if num < config.calibration_images:
        console.print(f"{len(dataset.train)} training images: ranges are set by {num}, not {config.calibration_images}")
    order = mixed(dataset.train)
    observed, chosen_by = (dataset.train.take(part) for part in (order[:num], order[num : 3 * num]))
    set_aside = images_to_choose_by(dataset, num) if config.precision == "int8" else []
    test, labels = dataset.test, plain.spec.labels
    if {*labels} == {*dataset.info.labels}:  # of a net of your own perhaps in another order
        places = np.array([labels.index(label) for label in dataset.info.labels])
        test = replace(test, targets=places[np.asarray(test.targets)])
    return observed.first(len(observed)), chosen_by.first(len(chosen_by)), set_aside, test


def _print(console: "Console", candidates: "list[Candidate]", drop: "Drop") -> None:
    from export.compare import ALLOWED_DROP

    table = make_table("lowering", "ranges", "logit error", "top-1 agreement")
    for row in candidates:
        shares = (f"{100 * share:.2f} %" for share in (row.relative_error, row.top1_agreement))
        table.add_row(row.lowering, row.method, *shares)
    console.print(table)
    console.print(
        f"test accuracy {100 * drop.accuracy:.2f} %, float32 {100 * drop.float32_accuracy:.2f} %, "
        f"same class on {100 * drop.top1_agreement:.2f} % of {drop.num_images:,} images"
    )
    lost = drop.float32_accuracy - drop.accuracy
    console.print(
        f"lost: {100 * lost:.2f} points, with 95 % certainty {100 * drop.lost_low:.2f} to {100 * drop.lost_high:.2f}; "
        f"one image is {100 / drop.num_images:.2g} points"
    )
    if drop and drop.lost_high > ALLOWED_DROP:
        console.print(f"so few images cannot show that no more than {100 * ALLOWED_DROP:.1f} points are lost")


if __name__ == "__main__":
    sys.exit(run_command(command, ToOnnxConfig, examples=EXAMPLES))
