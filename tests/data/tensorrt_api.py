"""python tests/data/tensorrt_api.py FOLDER: what TensorRT's Python bindings offer, as a part of tensorrt-api.json.

FOLDER is an unpacked wheel of tensorrt-cu12-bindings or tensorrt-cu13-bindings. Its library links three of TensorRT's
own, which the wheel does not contain; to read signatures, empty ones with the same names and symbols are enough.
"""

import importlib
import json
import re
import sys

CLASSES = """Builder INetworkDefinition IBuilderConfig IOptimizationProfile ITimingCache OnnxParser ParserError Runtime
ICudaEngine IExecutionContext EngineInspector ILogger IProgressMonitor BuilderFlag MemoryPoolType ProfilingVerbosity
LayerInformationFormat NetworkDefinitionCreationFlag ExecutionContextAllocationStrategy""".split()


def parameters(member):
    """Names of a method's parameters in each of its overloads; [] of what is no method."""
    signatures = re.findall(r"^(?:\d+\. )?\w+\(self: [^,)]*(?:, )?(.*)\) -> ", member.__doc__ or "", re.MULTILINE)
    return [re.findall(r"(?:^|, )(\w+): ", signature) for signature in signatures]


if __name__ == "__main__":
    sys.path.insert(0, f"{sys.argv[1]}/tensorrt_bindings")
    trt = importlib.import_module("tensorrt")
    offered = {
        name: {part: parameters(getattr(kind, part)) for part in sorted(dir(kind)) if part[0] != "_"}
        for name in CLASSES
        if (kind := getattr(trt, name, None))
    }
    print(json.dumps({"": sorted(part for part in dir(trt) if part[0] != "_"), **offered}))
