"""Files of nets: the checkpoint, which resumes a run bit for bit and starts the fold, and plain.safetensors as read."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from common.files import read_whole, sha256, write_whole
from common.progress import printable
from common.refusal import Refusal, one_line
from common.spec import Spec
from train.families import build

FORMAT = "diracnet-checkpoint-1"
PLAIN_FORMAT = "diracnet-plain-1"  # the spec says what the layers are
GRAPH_FORMAT = "diracnet-graph-1"  # the graph is in the header
# Of a run's config, in all artefacts made of it.
KEPT = (
    *("command", "dataset", "recipe", "init_sha256", "unfold", "qat", "flip", "seed", "epochs", "batch_size", "lr"),
    *("momentum", "weight_decay", "schedule", "validation", "ema", "skip_unreadable", "split", "authors_sha256"),
)


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run is at one moment. `epoch` and `step` name the next batch to train on.

    Batches and augmentation are keyed by (seed, epoch, step), so these three restore them.
    """

    spec: Spec
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]  # of the loss, in fp16 training
    config: dict[str, Any]  # the command's config, with paths as text
    epoch: int
    step: int
    totals: dict[str, float]  # of the epoch under way
    history: list[dict[str, Any]]  # one row per finished epoch
    rng_state: torch.Tensor  # torch's global generator
    test_accuracy: float | None = None  # read once, after the last epoch
    average: dict[str, torch.Tensor] = field(default_factory=dict)  # of the weights, where the run keeps one
    calibration: dict[str, Any] = field(default_factory=dict)  # the `Fit` of the spec's temperature; empty before it
    sha256: str = ""  # of the file it came from

    @classmethod
    def fresh(cls, spec: Spec, model: dict[str, torch.Tensor], config: dict[str, Any], **moment: Any) -> Self:
        """A net that has no training behind it; `moment` is what it has of the rest."""
        start = {"optimizer": {}, "scaler": {}, "epoch": 0, "step": 0, "totals": {}, "history": []}
        return cls(spec=spec, model=model, config=config, rng_state=torch.get_rng_state(), **start | moment)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that are judged, folded and fine-tuned: the average if the run keeps one."""
        return self.average or self.model

    def training_record(self) -> dict[str, Any]:
        """The part of this run's record that later artefacts keep."""
        folder = self.config.get("data_dir") if self.config.get("dataset") == "folder" else None
        return {
            **{key: self.config[key] for key in KEPT if key in self.config},
            **({"folder": printable(Path(folder).name)} if folder else {}),  # its own name: the rest is this machine's
            "epochs_done": self.epoch,
            "test_accuracy": self.test_accuracy,
            **({"calibration": self.calibration} if self.calibration else {}),
        }


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Written whole: an interrupted save leaves the earlier file."""
    content = {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__ if name != "sha256"}
    file = io.BytesIO()
    torch.save({"format": FORMAT, **content, "spec": checkpoint.spec.to_dict()}, file)
    write_whole(path, file.getvalue())


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads without executing anything in the file; refuses what is not a whole checkpoint of this project."""
    content = read_whole(path)
    fields = read_pickle(content, lambda kind: f"{path} is not a checkpoint, or is cut short ({kind})")
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise Refusal(f"{path} is not a {FORMAT} file; train one with train/run.py")
    kinds = {"model": dict, "config": dict, "history": list}
    if wrong := [name for name, kind in kinds.items() if not isinstance(fields.get(name, kind()), kind)]:
        raise Refusal(f"{path} is damaged: {', '.join(wrong)} is not what a checkpoint holds; train the net again")
    try:
        fields["spec"] = Spec.from_dict(fields["spec"])
        return Checkpoint(**fields, sha256=sha256(content))
    except (KeyError, TypeError) as error:
        raise Refusal(f"{path} lacks a part of a checkpoint: {error}") from error


def read_pickle(content: bytes, refusal: Callable[[str], str]) -> Any:
    """What `torch.save` wrote, without executing anything; `refusal` has the message for an error of a given kind."""
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises half a dozen unrelated kinds
        raise Refusal(refusal(type(error).__name__)) from error


def load_net(checkpoint: Checkpoint) -> nn.Sequential:
    """The Dirac net of a checkpoint, in evaluation mode."""
    net = build(checkpoint.spec)
    try:
        net.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        name = checkpoint.spec.name
        raise Refusal(f"the checkpoint's weights do not fit its spec {name}: {one_line(error)}") from error
    return net.eval()


@dataclass(frozen=True)
class PlainFile:
    """A whole plain file with finite weights; whether they fit its spec is not looked at."""

    path: Path
    weights: dict[str, Tensor]
    spec: Spec
    metadata: Mapping[str, str]
    sha256: str


def read_safetensors(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except SafetensorError as error:
        raise Refusal(f"{path} is not a valid safetensors file, or is cut short: {error}") from error


def read_plain_file(path: Path) -> PlainFile:
    """Refuses a file that is not a whole plain file of this project, or holds NaN or Inf."""
    content = read_whole(path)
    weights = read_safetensors(path, content)
    size = int.from_bytes(content[:8], "little")  # of the header, JSON that `load` has checked
    metadata: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    if metadata.get("format") not in (PLAIN_FORMAT, GRAPH_FORMAT):
        raise Refusal(f"{path} is not a {PLAIN_FORMAT} file; make one with fold/run.py")
    spec = Spec.from_json(metadata.get("spec", ""))
    if bad := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise Refusal(f"{path} holds NaN or infinite values in {', '.join(bad)}: the training diverged")
    return PlainFile(path, weights, spec, metadata, sha256(content))


def misfits(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A clause for each tensor that is missing, of another shape or too many; [1] is accepted for []."""
    wrong: list[str] = []
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found is None:
            wrong.append(f"{name} is missing")
        elif found != shape and (found, shape) != ((1,), ()):
            wrong.append(f"{name} is {list(found)}, must be {list(shape)}")
    return wrong + [f"{name} is not part of it" for name in sorted(tensors.keys() - shapes.keys())]
