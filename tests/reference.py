"""The paper's equations once more, in NumPy float64 and plain loops: what the code under test is held against."""

import numpy as np
from scipy import signal


def delta(shape):
    """Eq. 2, 7 and 8 entry by entry."""
    num_out, num_in, *kernel = shape
    square = min(num_out, num_in)
    result = np.zeros(shape)
    for i in range(num_out):
        for j in range(num_in):
            if i % square == j % square:
                result[(i, j, *(size // 2 for size in kernel))] = 1
    return result


def folded_weight(a, b, weight, epsilon=1e-12):
    """Eq. 4 and 5, filter by filter."""
    normalized = np.stack([v / max(np.sqrt((v**2).sum()), epsilon) for v in weight])
    return a * delta(weight.shape) + b * normalized


def convolve(x, weight, padding):
    """y[n, i] = sum over j of weight[i, j] correlated with x[n, j], stride 1, in any number of dimensions."""
    x = np.pad(x, [(0, 0), (0, 0)] + [(padding, padding)] * (x.ndim - 2))
    return np.stack(
        [
            np.stack([sum(signal.correlate(c, w, mode="valid") for c, w in zip(image, v, strict=True)) for v in weight])
            for image in x
        ]
    )


def ncrelu(x):
    """Eq. 9."""
    return np.concatenate([np.maximum(x, 0), -np.maximum(-x, 0)], axis=1)


def batch_norm(x, gamma, beta, mean, var, epsilon):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    gamma, beta, mean, var = (part.reshape(shape) for part in (gamma, beta, mean, var))
    return gamma * (x - mean) / np.sqrt(var + epsilon) + beta


def max_pool2(x):
    n, c, h, w = x.shape
    return x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))


def dirac_net(state, spec, images):
    """Table 1 from a state dict of NumPy float64 arrays: images uint8 [N, H, W, C] → logits."""

    def normalized(x, name):
        parts = (state[f"{name}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
        return batch_norm(x, *parts, 1e-5)

    mean, std = np.array(spec.image.mean), np.array(spec.image.std)
    x = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    x = np.maximum(normalized(convolve(x, state["stem.conv.weight"], 1), "stem"), 0)
    for group in range(3):
        if group:
            x = max_pool2(x)
        for layer in range((spec.depth - 4) // 3):
            name = f"group{group}.block{layer}"
            x = ncrelu(x) if spec.nonlinearity == "ncrelu" else np.maximum(x, 0)
            parts = (state[f"{name}.conv.{part}"] for part in ("a", "b", "weight"))
            x = normalized(convolve(x, folded_weight(*parts), 1), name)
    return x.mean(axis=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]
