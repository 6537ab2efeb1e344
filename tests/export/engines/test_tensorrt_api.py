"""Every attribute and keyword of TensorRT that the code uses, held against what its oldest and newest bindings offer.

tests/data/tensorrt-api.json was read off the bindings' own signatures by tests/data/tensorrt_api.py.
"""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
RECORDED = json.loads((ROOT / "tests" / "data" / "tensorrt-api.json").read_text())
SOURCES = ("export/engines/engine.py", "export/runtimes/tensorrt_engine.py")
# What the code calls TensorRT's objects; "" is the module.
CLASSES = {
    "trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "parser": "OnnxParser",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
}
# Ours in tensorrt's own package, not in its library; and tensorrt_rtx's alone.
OF_THE_PACKAGE = {"nptype", "__init__", "__version__", "__name__"}
RTX_ALONE = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}


def uses():
    """(class, attribute, keywords) of every use in `SOURCES`."""
    found = set()
    for source in SOURCES:
        tree = ast.parse((ROOT / source).read_text())
        keywords = {
            id(call.func): tuple(keyword.arg for keyword in call.keywords)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call)
        }
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name)) if name in CLASSES:
                    found.add((CLASSES[name], node.attr, keywords.get(id(node), ())))
                # trt.BuilderFlag.TF32
                case ast.Attribute(value=ast.Attribute(value=ast.Name(id="trt"), attr=kind)):
                    found.add((kind, node.attr, keywords.get(id(node), ())))
    return sorted(use for use in found if not {*use[:2]} & (OF_THE_PACKAGE | RTX_ALONE))


def test_the_uses_are_found():
    assert {
        ("", "Builder", ()),
        ("BuilderFlag", "VERSION_COMPATIBLE", ()),
        ("IBuilderConfig", "set_timing_cache", ("ignore_mismatch",)),
        ("IExecutionContext", "execute_async_v3", ()),
        ("Runtime", "deserialize_cuda_engine", ()),
        ("ICudaEngine", "create_engine_inspector", ()),
    } <= set(uses())
    assert len(uses()) > 35


@pytest.mark.parametrize("version", RECORDED)
def test_both_bindings_offer_what_is_used(version):
    missing = []
    for kind, attribute, keywords in uses():
        offered = RECORDED[version][kind]
        if attribute not in offered:
            missing.append(f"{kind}.{attribute}")
        elif kind and any(not any(keyword in names for names in offered[attribute]) for keyword in keywords):
            missing.append(f"{kind}.{attribute}({', '.join(keywords)})")
    assert not missing


def test_rtx_offers_what_is_used():
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows"
    )
    # RTX has no lean runtime, and its networks are always strongly typed.
    missing = [
        f"{kind}.{attribute}"
        for kind, attribute, _ in uses()
        if not hasattr(getattr(trt, kind) if kind else trt, attribute)
    ]
    assert missing == []


@pytest.mark.parametrize("name", sorted(RTX_ALONE))
def test_what_is_rtx_own_is_asked_of_rtx_alone(name):
    """`configure` returns for tensorrt before it comes to these."""
    assert all(name not in offered for version in RECORDED.values() for offered in version.values())
