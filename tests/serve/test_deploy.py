"""The image, the compose file and the manifests, where no container engine runs."""

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from serving import read_greeting

from common.cli import parse
from serve.config import ServeConfig
from serve.request.app import make_app
from serve.request.limits import Limits

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = [yaml.safe_load(path.read_text()) for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
REQUIREMENTS = [
    Requirement(line)
    for line in (DEPLOY / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def instructions():
    """The Dockerfile as [(instruction, words after it)], continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in text.splitlines() if line.strip()]


def last(name):
    return [words for instruction, words in instructions() if instruction == name][-1]


def copied():
    """(source, target) for every path of the repository that the last stage copies."""
    words = [shlex.split(words) for name, words in instructions() if name == "COPY" and "--from" not in words]
    model = last("ARG").removeprefix("MODEL=")
    return [(source.replace("${MODEL}", model), paths[-1]) for paths in words[1:] for source in paths[:-1]]


def manifest(kind):
    (found,) = (manifest for manifest in MANIFESTS if manifest["kind"] == kind)
    return found


def test_hadolint_accepts_the_dockerfile():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed here")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_nobody_and_without_a_shell():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last("USER"))
    for words in (last("ENTRYPOINT"), last("CMD"), last("HEALTHCHECK").partition("CMD ")[2]):
        assert all(isinstance(word, str) for word in json.loads(words))


def matches(pattern, name):
    """As in .dockerignore: one star stays within a folder, two pass through any number of them."""
    parts = {"**/": "(?:.*/)?", "*": "[^/]*"}
    return re.fullmatch("".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*)", pattern)), name)


def test_everything_that_is_copied_exists_and_reaches_the_builder():
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert "*" in lines
    for source, _ in [*copied(), ("constraints.txt", ""), ("deploy/requirements.txt", "")]:
        path = ROOT / source
        files = [file for file in path.rglob("*") if file.suffix in (".py", ".html")] if path.is_dir() else [path]
        assert files
        for file in files:
            name = str(file.relative_to(ROOT))
            assert any(matches(pattern, name) for pattern in allowed), name


def test_requirements_are_those_of_the_project_without_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {Requirement(line).name for line in project["dependencies"]} | {
        "uvloop",
        "httptools",
    }  # of uvicorn[standard]
    names = {requirement.name for requirement in REQUIREMENTS}
    assert names <= ours
    assert "torch" not in names
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in constraints}
    assert {requirement.name for requirement in REQUIREMENTS} - pinned == {"onnxruntime"}
    (runtime,) = (line for line in constraints if line.startswith("onnxruntime-gpu=="))
    (requirement,) = (requirement for requirement in REQUIREMENTS if requirement.name == "onnxruntime")
    assert str(requirement) == runtime.replace("-gpu", "")  # one version, built for CPUs


def in_the_image():
    """The distributions that pip installs for the requirements, under the names they have here."""
    found, todo = set(), [requirement.name for requirement in REQUIREMENTS]
    while todo:
        name = {"onnxruntime": "onnxruntime-gpu"}.get(todo[-1], todo[-1]).lower().replace("_", "-")
        todo.pop()
        if name in found:
            continue
        found.add(name)
        needs = map(Requirement, importlib.metadata.requires(name) or ())
        todo += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return found


# Runs a file as Python would in the image: only the copied tree, the standard library and `in_the_image()` are there.
PROGRAM = """
import runpy, sys

sys.modules.update(dict.fromkeys(ABSENT))  # as if they were not installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def image(tmp_path):
    """What the last stage copies, as it lies in /app of the image."""
    for source, target in copied():
        path, into = ROOT / source, tmp_path / target.lstrip("/")
        if path.is_dir():
            shutil.copytree(path, into)
        elif target.endswith("/"):
            into.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, into)
        else:
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, into)
    return tmp_path


@pytest.mark.slow
def test_what_the_image_holds_is_enough_to_serve(image, pixels, encode, port):
    allowed = in_the_image()
    absent = {
        module
        for module, names in importlib.metadata.packages_distributions().items()
        if not allowed & {name.lower().replace("_", "-") for name in names}
    }
    absent = (absent | {"fold", "tests"}) - {"train", "export", "serve"}
    assert {"torch", "onnx", "httpx", "rich"} <= absent
    _, entry = json.loads(last("ENTRYPOINT"))
    model, *rest = json.loads(last("CMD"))
    program = f"ABSENT = {absent!r}\n{PROGRAM}"
    argv = [sys.executable, "-c", program, image / Path(entry).relative_to("/app"), image / model.lstrip("/")]
    server = subprocess.Popen(
        [*argv, *rest, "--port", str(port)], cwd=image, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        read_greeting(server)
        answer = httpx.post(f"http://127.0.0.1:{port}/predict", content=encode(pixels[0]), timeout=60)
        health = last("HEALTHCHECK").partition("CMD ")[2].replace(":8000", f":{port}")
        code = json.loads(health)[1:]
        health_while_up = subprocess.run([sys.executable, *code]).returncode
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert answer.status_code == 200, answer.text
    assert health_while_up == 0
    assert subprocess.run([sys.executable, *code], capture_output=True).returncode == 1


@pytest.mark.parametrize("version", ["1.30", "1.34", "1.37"])
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_manifests_fit_the_schemas_of_kubernetes(manifest, version):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(manifest, version, strict=True)


def test_manifests_name_each_other():
    deployment = manifest("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        manifest("Service")["spec"]["selector"],
        manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert {key: deployment[key] for key in ("apiVersion", "kind")} | {"name": "diracnet-serve"} == target
    assert "replicas" not in deployment["spec"]


def test_probes_ask_what_the_server_answers(runtime):
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    addresses = set(make_app(runtime, Limits()).openapi()["paths"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in addresses
        assert container[probe]["httpGet"]["port"] == container["ports"][0]["name"]
    assert container["ports"][0]["containerPort"] == int(last("EXPOSE"))


def test_a_pod_has_no_more_rights_than_it_needs():
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == last("USER")
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"].keys() == container["resources"]["requests"].keys()


def test_a_pod_has_time_to_finish_what_it_accepted():
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    pause_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause_s + Limits().deadline_s
    assert int(COMPOSE["services"]["serve"]["stop_grace_period"].removesuffix("s")) > Limits().deadline_s


def test_threads_fit_the_limits():
    service, (container,) = (
        COMPOSE["services"]["serve"],
        manifest("Deployment")["spec"]["template"]["spec"]["containers"],
    )
    for argv, limits in (
        (service["command"], service["deploy"]["resources"]["limits"]["cpus"]),
        (container["args"], container["resources"]["limits"]["cpu"]),
    ):
        config = parse(ServeConfig, argv=argv)
        assert argv[: len(json.loads(last("CMD")))] == json.loads(last("CMD"))
        assert config.model_threads == int(limits)
        assert config.drain_seconds < Limits().deadline_s


def test_the_compose_file_fits_its_specification():
    jsonschema = pytest.importorskip("jsonschema")
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas")
    jsonschema.validate(COMPOSE, schemas.get_builtin_schema("vendor.compose-spec"))


def test_the_compose_file_builds_the_image_and_asks_it_the_same():
    service = COMPOSE["services"]["serve"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert service["build"]["args"]["MODEL"] == "${MODEL:-" + last("ARG").removeprefix("MODEL=") + "}"
    assert service["healthcheck"]["test"] == ["CMD", *json.loads(last("HEALTHCHECK").partition("CMD ")[2])]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
