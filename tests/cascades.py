"""Real files of a cascade: a small net in float32 and in eight bits, and what the second records."""

import json

import onnx

from export.eight_bits.calibrate import observe, ranges
from export.eight_bits.integer import to_integer_onnx
from export.eight_bits.quantize import answerer
from export.graphs.graph import set_provenance, to_onnx
from export.model_file.probe import probe_images, record_probe
from export.runtimes.cascade import Evidence
from fold.graph import fold
from fold.lower import lower

EVIDENCE = Evidence(0.0, 100, 200, 50, 0, 2, 0.0148)


def write_forms(folder, net, spec, pixels, **export):
    """(plain.onnx, plain-int8.onnx), without evidence; `export` is for the records of both."""
    plain = fold(net).float()
    floats = to_onnx(lower(plain, "concat"), spec, {"training": {}})
    integers = to_integer_onnx(
        lower(plain, "concat"), spec, {"training": {}}, ranges(observe(floats, pixels), "min-max")
    )
    paths = []
    for name, precision, model in (("plain.onnx", "fp32", floats), ("plain-int8.onnx", "int8", integers)):
        probe = record_probe(answerer(model)(probe_images(spec.image)))
        record = {"precision": precision, "plain_sha256": "a" * 64, "probe": probe, **export}
        set_provenance(model, {"training": {}, "export": record})
        paths.append(folder / name)
        paths[-1].write_bytes(model.SerializeToString())
    return tuple(paths)


def record(path, **record):
    """Write evidence into an int8 file; `record` takes the place of what is sound."""
    change(path, lambda export: {**export, "cascade": {**EVIDENCE.to_dict(), **record}})


def change(path, export):
    """Give the record of the export to a function, and write what it gives."""
    model = onnx.load(path)
    (entry,) = (entry for entry in model.metadata_props if entry.key == "provenance")
    provenance = json.loads(entry.value)
    set_provenance(model, {**provenance, "export": export(provenance["export"])})
    path.write_bytes(model.SerializeToString())
