"""From what a net gives to probabilities: the one place, for the server and for every command."""

import numpy as np


def probabilities(logits: np.ndarray, *, are_probabilities: bool = False) -> np.ndarray:
    """Finite logits [N, K], or probabilities already, → probabilities, float64 [N, K]."""
    return logits.astype(np.float64) if are_probabilities else softmax(logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """[N, K] → float64 [N, K], each row summing to 1."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def best(values: np.ndarray, num: int) -> np.ndarray:
    """int64 [N, num]: the classes of the largest values [N, K], the largest first; of equal ones the lower index."""
    return np.argsort(-values, axis=1, kind="stable")[:, :num]
