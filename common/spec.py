"""The description of a model that every artefact carries, from checkpoint to engine. Standard library only."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from common.documents import is_of, read_object
from common.refusal import Refusal

Family = Literal["cifar", "pooled", "imagenet", "imagenet-table3", "wrn"]
Nonlinearity = Literal["ncrelu", "relu"]
# How a convolution's weight is made: eq. 4; eq. 4 with a b for every output channel (the authors' first release, as
# published with its notebook); with an a and a b for each (their second); eq. 3; eq. 14; W alone (the baseline);
# W alone, initialised as eq. 4 (to tell the parameterization's effect from its initial values').
Parameterization = Literal["dirac", "per-output-b", "per-channel", "unnormalized", "delta", "plain", "initialised"]
ORDINARY: tuple[Parameterization, ...] = ("plain", "initialised")  # these learn only W
# The ones of δ where N_i and N_o differ: repeated as in eq. 7 and 8, or only on the first min(N_i, N_o) channels, as
# `torch.nn.init.dirac_` writes them (the authors' second release).
Delta = Literal["repeated", "first"]
Published = Literal["digits", "fashion-mnist", "cifar10", "cifar100"]  # data sets with fixed content and labels
DatasetName = Literal[Published, "folder"]
# Bounds on what is built from an untrusted spec; this project's nets have at most 400 layers.
MAX_DEPTH, MAX_WIDTH, MAX_SIDE = 1000, 1000, 8192
# Below, one class has nearly all of the probability; above, all classes have the same.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the net's input.

    The image is scaled so that its shorter side is `resize` pixels and cropped at the centre to
    `height` x `width`; `resize` of None scales it to exactly `height` x `width` instead.
    `mean` and `std` are per channel, in units of full scale (0 is black, 1 is white).
    """

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise Refusal(f"images must have 1 or 3 channels, got {self.channels}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise Refusal(f"mean and std need {self.channels} values each, got {self.mean} and {self.std}")
        shorter, longer = sorted((self.height, self.width))
        if shorter < 1 or (self.resize or longer) < longer:
            raise Refusal(f"cannot crop {self.height}x{self.width} from images resized to {self.resize}")
        if longer > MAX_SIDE:
            raise Refusal(f"images may be {MAX_SIDE:,} pixels high and wide, got {self.height}x{self.width}")
        if min(self.std) <= 0:
            raise Refusal(f"std must be positive, got {self.std}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, self.channels


@dataclass(frozen=True)
class Spec:
    """One model: its architecture (Table 1), its input and the meaning of its outputs."""

    family: str  # a Family, or "unknown" for a user's own net
    depth: int
    width: float
    nonlinearity: Nonlinearity
    image: ImageSpec
    labels: tuple[str, ...]
    parameterization: Parameterization = "dirac"
    delta: Delta = "repeated"
    net: str = ""  # the name of a user's own net, whose family, depth and width have no meaning
    temperature: float = 1.0  # probabilities are the softmax of logits / temperature; see train/temperature.py

    def __post_init__(self) -> None:
        choices = {"nonlinearity": Nonlinearity, "parameterization": Parameterization, "delta": Delta}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise Refusal(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)}")
        if not (abs(self.depth) <= MAX_DEPTH and abs(self.width) <= MAX_WIDTH):
            raise Refusal(f"depth goes up to {MAX_DEPTH:,} and width to {MAX_WIDTH:,}, got {self.depth}, {self.width}")
        try:
            "".join(self.labels).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            raise Refusal(f"a label holds half a character, {half!a}: name its class folder in UTF-8") from error
        if len(self.labels) < 2:
            raise Refusal(f"a classifier needs two labels or more, got {len(self.labels)}")
        lowest, highest = MIN_TEMPERATURE, MAX_TEMPERATURE
        if not is_of(given := self.temperature, float) or not lowest <= given <= highest:
            raise Refusal(f"a temperature must be a number from {lowest:g} to {highest:g}, got {str(given)[:40]}")

    @classmethod
    def of_net(cls, net: str, image: ImageSpec, labels: tuple[str, ...], temperature: float = 1.0) -> "Spec":
        """The spec of a user's own net: it has a name, and no family, depth or width."""
        return cls("unknown", 0, 0.0, "relu", image, labels, net=net, temperature=temperature)

    @property
    def name(self) -> str:
        if self.net:
            return self.net
        dirac = "Plain" if self.parameterization in ORDINARY else "DiracNet"
        return f"{'WRN' if self.family == 'wrn' else dirac}-{self.depth}-{self.width:g}"

    def to_dict(self) -> dict[str, Any]:
        """A temperature of 1 is left out, so that such files equal those written before temperatures existed."""
        fields = asdict(self)
        if self.temperature == 1:
            del fields["temperature"]
        if self.net:
            return {key: fields[key] for key in ("net", "image", "labels", "temperature") if key in fields}
        return {key: value for key, value in fields.items() if key != "net"}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, fields: Any) -> "Spec":
        """The inverse of `to_dict`; refuses fields that are missing, unknown or of the wrong type."""
        try:
            image = dict(fields["image"])
            image |= {key: _whole(image[key]) for key in ("height", "width", "channels")}
            image |= {key: tuple(float(value) for value in image[key]) for key in ("mean", "std")}
            image["resize"] = None if image["resize"] is None else _whole(image["resize"])
            rest = {key: value for key, value in fields.items() if key != "image"}
            image, labels = ImageSpec(**image), tuple(str(label) for label in rest.pop("labels"))
            if rest.get("net"):
                return cls.of_net(str(rest.pop("net")), image, labels, **rest)
            rest |= {"family": str(rest["family"]), "depth": _whole(rest["depth"]), "width": float(rest["width"])}
            return cls(image=image, labels=labels, **rest)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise Refusal(f"the model's spec is damaged: {error!r}") from error

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        return cls.from_dict(read_object(text, "the model's spec", todo="make the file again"))


def _whole(value: Any) -> int:
    if not is_of(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value
