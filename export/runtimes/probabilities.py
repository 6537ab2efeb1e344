"""From a net's outputs to probabilities: the one place, for the server and for every command."""

import numpy as np


def probabilities(values: np.ndarray, *, temperature: float = 1.0, are_probabilities: bool = False) -> np.ndarray:
    """Finite logits [N, K], or probabilities already, → probabilities, float64 [N, K].

    `temperature` comes from the model's spec; probabilities are returned unchanged.
    """
    return values.astype(np.float64) if are_probabilities else softmax(values, temperature=temperature)


def softmax(logits: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature): [N, K] → float64 [N, K], each row summing to 1."""
    below = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    powers = np.exp(below / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def without_temperature(values: np.ndarray, temperature: float) -> np.ndarray:
    """`values`, probabilities float64 [N, K] with a temperature, as they would be with a temperature of 1."""
    powers = values**temperature  # a row's softmax is exp(z / T) / S, and 1 / S is common to its classes
    return powers / powers.sum(axis=1, keepdims=True)


def best(values: np.ndarray, num: int) -> np.ndarray:
    """int64 [N, num]: the classes of the largest values [N, K], the largest first; of equal ones the lower index."""
    return np.argsort(-values, axis=1, kind="stable")[:, :num]
