"""Weights of somebody's own net: read without executing anything in the file, and put where they belong."""

import io
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from common.files import read_whole, sha256
from common.refusal import Refusal

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts keep weights
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
COUNTER = "num_batches_tracked"  # of batch norm; nothing reads it in evaluation mode
MOST_NAMED = 3

State = dict[str, Tensor]


def read_state(path: Path, content: bytes) -> State:
    """The tensors of a safetensors file, or of a state dict that `torch.save` wrote, by name."""
    if path.suffix == ".safetensors":
        try:
            return _without_prefixes(load(content))
        except SafetensorError as error:
            raise Refusal(f"{path} is not a safetensors file, or is cut short: {error}") from error
    try:
        found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises half a dozen unrelated kinds
        raise Refusal(
            f"{path} cannot be read as weights alone ({type(error).__name__}); "
            "save them with torch.save(net.state_dict(), FILE) or as safetensors"
        ) from error
    return _without_prefixes(_unwrapped(path, found))


def load_weights(net: nn.Module, path: Path) -> str:
    """Put the weights of a file into `net`, all of them; gives the file's sha256. Refuses what does not fit."""
    content = read_whole(path)
    state = read_state(path, content)
    own = net.state_dict()
    faults = [
        *_listed("misses", [name for name in own if name not in state and not name.endswith(COUNTER)]),
        *_listed(
            "has, and the net has not,", [name for name in state if name not in own and not name.endswith(COUNTER)]
        ),
        *_listed(
            "has in another shape",
            [
                f"{name} {list(state[name].shape)}, in the net {list(own[name].shape)}"
                for name in own
                if name in state and state[name].shape != own[name].shape
            ],
        ),
    ]
    if faults:
        raise Refusal(f"{path} does not fit the net: it {'; it '.join(faults)}; name the weights of this very net")
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise Refusal(f"{path} holds NaN or infinite values in {', '.join(bad[:MOST_NAMED])}: the training diverged")
    net.load_state_dict(state, strict=False)
    return sha256(content)


def _unwrapped(path: Path, found: Any) -> State:
    while isinstance(found, dict):
        entries = cast("dict[Any, Any]", found)
        if entries and all(isinstance(value, Tensor) for value in entries.values()):
            return {str(key): value for key, value in entries.items()}
        inner = next((entries[key] for key in WRAPPERS if isinstance(entries.get(key), dict)), None)
        if inner is None:
            keys = ", ".join(str(key) for key in list(entries)[:5]) or "nothing"
            raise Refusal(
                f"{path} holds {keys}, and no state dict under {', '.join(WRAPPERS)}; "
                "save it with torch.save(net.state_dict(), FILE)"
            )
        found = inner
    raise Refusal(f"{path} holds a {type(found).__name__}, not a state dict; save net.state_dict()")


def _without_prefixes(state: State) -> State:
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return _without_prefixes({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state


def _listed(what: str, names: list[str]) -> list[str]:
    """A clause that names the first few; none where there is nothing to name."""
    rest = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return [f"{what} {', '.join(names[:MOST_NAMED])}{rest}"] if names else []
