"""The paper's equations once more, in NumPy float64 and plain loops: what the code under test is held against."""

import numpy as np


def delta(shape, form="repeated"):
    """Eq. 2, 7 and 8 entry by entry; `first` has ones on the first channels alone, as `torch.nn.init.dirac_`."""
    num_out, num_in, *kernel = shape
    square = min(num_out, num_in)
    result = np.zeros(shape)
    for i in range(num_out):
        for j in range(num_in):
            if (i % square == j % square) if form == "repeated" else i == j:
                result[(i, j, *(size // 2 for size in kernel))] = 1
    return result


def folded_weight(a, b, weight, epsilon=1e-12, form="repeated"):
    """Eq. 4 and 5, filter by filter; `a` and `b` are numbers or lists with one for each filter.

    Without `b` eq. 3, without `a` and `b` eq. 14.
    """
    scaled = []
    for index, v in enumerate(weight):
        factor = 1 if b is None else np.broadcast_to(b, len(weight))[index] / max(np.sqrt((v**2).sum()), epsilon)
        identity = 1 if a is None else np.broadcast_to(a, len(weight))[index]
        scaled.append(identity * delta(weight.shape, form)[index] + factor * v)
    return np.stack(scaled)


def convolve(x, weight, padding):
    """y[n, i] = sum over j of weight[i, j] correlated with x[n, j], stride 1, any number of dimensions, tap by tap."""
    x = np.pad(x, [(0, 0), (0, 0)] + [(padding, padding)] * (x.ndim - 2))
    sizes = [side - taps + 1 for side, taps in zip(x.shape[2:], weight.shape[2:], strict=True)]
    y = np.zeros((len(weight), len(x), *sizes))
    for tap in np.ndindex(*weight.shape[2:]):
        seen = tuple(slice(start, start + size) for start, size in zip(tap, sizes, strict=True))
        y += np.tensordot(weight[(..., *tap)], x[(..., *seen)], axes=(1, 1))
    return np.moveaxis(y, 0, 1)


def ncrelu(x):
    """Eq. 9."""
    return np.concatenate([np.maximum(x, 0), -np.maximum(-x, 0)], axis=1)


def batch_norm(x, gamma, beta, mean, var, epsilon):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    gamma, beta, mean, var = (part.reshape(shape) for part in (gamma, beta, mean, var))
    return gamma * (x - mean) / np.sqrt(var + epsilon) + beta


def max_pool(x, size, padding=0):
    """Stride 2, as everywhere in the paper."""
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)], constant_values=-np.inf)
    height, width = ((side - size) // 2 + 1 for side in x.shape[2:])
    cuts = [x[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2] for i in range(size) for j in range(size)]
    return np.max([cut[:, :, :height, :width] for cut in cuts], axis=0)


def softmax(logits, temperature=1.0):
    """Row by row; the largest logit is taken off first."""
    rows = []
    for row in np.asarray(logits, np.float64):
        powers = np.exp([(value - max(row)) / temperature for value in row])
        rows.append(powers / np.sum(powers))
    return np.stack(rows)


def excess(logits, targets, temperature):
    """Sum over images of the logit expected under softmax(logits / T), less that of the truth: 0 at the best T."""
    expected = (softmax(logits, temperature) * logits).sum(axis=1)
    return sum(mean - row[target] for mean, row, target in zip(expected, logits, targets, strict=True))


class Net:
    """Table 1 and its relatives from a state dict of NumPy float64 arrays: images uint8 [N, H, W, C] → logits."""

    def __init__(self, state, spec):
        self.state, self.spec = state, spec

    def __call__(self, images):
        mean, std = np.array(self.spec.image.mean), np.array(self.spec.image.std)
        x = self.stem(((images / 255 - mean) / std).transpose(0, 3, 1, 2))
        for group in range(4 if self.spec.family.startswith("imagenet") else 3):
            if group and self.spec.family != "wrn":
                x = max_pool(x, 2)
            num_blocks = len({name.split(".")[1] for name in self.state if name.startswith(f"group{group}.")})
            for block in range(num_blocks):
                name = f"group{group}.block{block}"
                if self.spec.family == "wrn":
                    x = self.residual(x, name, stride=2 if group and not block else 1)
                else:
                    x = ncrelu(x) if self.spec.nonlinearity == "ncrelu" else np.maximum(x, 0)
                    x = self.normalize(convolve(x, self.weight(f"{name}.conv"), 1), f"{name}.bn")
        if self.spec.family == "wrn":
            x = self.normalize(x, "bn")
        if self.spec.family == "wrn" or self.spec.parameterization in ("per-output-b", "per-channel"):
            x = np.maximum(x, 0)
        return x.mean(axis=(2, 3)) @ self.state["fc.weight"].T + self.state["fc.bias"]

    def stem(self, x):
        if self.spec.family.startswith("imagenet"):
            x = convolve(x, self.state["stem.conv.weight"], 3)[:, :, ::2, ::2]
            return max_pool(self.normalize(x, "stem.bn"), 3, padding=1)
        x = convolve(x, self.state["stem.conv.weight"], 1)
        if self.spec.family == "wrn":
            return x
        x = np.maximum(self.normalize(x, "stem.bn"), 0)
        return max_pool(x, 2) if self.spec.family == "pooled" else x

    def residual(self, x, name, stride):
        """Wide ResNet's block; the shortcut reads x itself, or the activations where it has a weight."""
        where = name if f"{name}.bn0.weight" in self.state else f"{name}.sum.body"
        activations = np.maximum(self.normalize(x, f"{where}.bn0"), 0)
        y = convolve(activations, self.weight(f"{name}.sum.body.conv0"), 1)[:, :, ::stride, ::stride]
        y = np.maximum(self.normalize(y, f"{name}.sum.body.bn1"), 0)
        y = convolve(y, self.weight(f"{name}.sum.body.conv1"), 1)
        if where == name:
            shortcut = self.state[f"{name}.sum.shortcut.conv.weight"]
            x = convolve(activations, shortcut, 0)[:, :, ::stride, ::stride]
        return x + y

    def weight(self, name):
        weight = self.state[f"{name}.weight"]
        if self.spec.parameterization in ("plain", "initialised"):
            return weight
        return folded_weight(self.state.get(f"{name}.a"), self.state.get(f"{name}.b"), weight, form=self.spec.delta)

    def normalize(self, x, name):
        parts = (self.state[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
        return batch_norm(x, *parts, 1e-5)


class AuthorsNet:
    """The authors' nets by the names in their files, float64: images uint8 [N, H, W, 3] → logits.

    `numbers` is `params` and `stats` together, or the convolutions of a folded net. `release` is "first" for the
    training code of v1, "notebook" for what v1 published (a b for every output, a last ReLU) and "second" for v2
    (ReLU in place of NCReLU, a and b for every output, δ without repetition, a last ReLU).
    """

    def __init__(self, numbers, release):
        self.numbers = {name: np.asarray(value, np.float64) for name, value in numbers.items()}
        self.release, self.folded = release, "conv.weight" in numbers

    def __call__(self, images):
        stem = self.numbers["conv.weight" if self.folded else "conv"]
        imagenet = stem.shape[-1] == 7
        mean = [0.485, 0.456, 0.406] if imagenet else [125.3 / 255, 123.0 / 255, 113.9 / 255]
        std = [0.229, 0.224, 0.225] if imagenet else [63.0 / 255, 62.1 / 255, 66.7 / 255]
        x = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
        if imagenet:
            x = max_pool(self.normalize(convolve(x, stem, 3)[:, :, ::2, ::2], "conv", "bn"), 3, padding=1)
        else:
            x = np.maximum(self.normalize(convolve(x, stem, 1), "conv", "bn"), 0)
        places = [name.split(".")[:2] for name in self.numbers if name.startswith("group")]
        for group in sorted({at for at, _ in places}):
            x = x if group == "group0" else max_pool(x, 2)
            for block in sorted({block for at, block in places if at == group}, key=lambda name: int(name[5:])):
                x = ncrelu(x) if self.release != "second" else np.maximum(x, 0)
                where = f"{group}.{block}"
                x = self.normalize(convolve(x, self.weight(where), 1), f"{where}.conv", f"{where}.bn")
        x = x if self.release == "first" else np.maximum(x, 0)
        return x.mean(axis=(2, 3)) @ self.numbers["fc.weight"].T + self.numbers["fc.bias"]

    def weight(self, block):
        if self.folded:
            return self.numbers[f"{block}.conv.weight"]
        a, b = ("conv.gamma", "conv.beta") if self.release == "notebook" else ("alpha", "beta")
        form = "first" if self.release == "second" else "repeated"
        a, b = self.numbers[f"{block}.{a}"], self.numbers[f"{block}.{b}"]
        return folded_weight(a, b, self.numbers[f"{block}.conv"], form=form)

    def normalize(self, x, convolution, name):
        """Batch normalisation, or the bias that it left in a folded convolution."""
        if self.folded:
            return x + self.numbers[f"{convolution}.bias"].reshape(-1, 1, 1)
        parts = (self.numbers[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
        return batch_norm(x, *parts, 1e-5)


def authors_fold(numbers, release):
    """The convolutions with biases that their notebooks make of `params` and `stats`, by the names they have there."""
    net = AuthorsNet(numbers, release)
    folded = {"fc.weight": net.numbers["fc.weight"], "fc.bias": net.numbers["fc.bias"]}
    for name in [name for name in numbers if name == "conv" or name.endswith(".conv")]:
        block = name.removesuffix("conv").removesuffix(".")
        weight = net.weight(block) if block else net.numbers["conv"]
        gamma, beta, mean, var = (
            net.numbers[f"{block}.bn.{part}".removeprefix(".")]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(var + 1e-5)
        folded[f"{name}.weight"] = weight * scale.reshape(-1, 1, 1, 1)
        folded[f"{name}.bias"] = beta - mean * scale
    return folded
