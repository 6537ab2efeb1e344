"""The answer of `POST /predict`."""

from typing_extensions import TypedDict  # pydantic reads no other one on Python 3.11


class ModelName(TypedDict):
    """Which model answered; `digest` is the sha256 of its file."""

    name: str
    digest: str


class Guess(TypedDict):
    """One class and the probability the model gives it."""

    label: str
    index: int
    probability: float


class Result(Guess):
    """The most probable class of one image, and the best `top_k`, the most probable first."""

    top: list[Guess]


class Prediction(TypedDict):
    """One result per image, in the order of the request."""

    model: ModelName
    results: list[Result]


def result_of(order: list[int], probabilities: list[float], top_k: int, labels: tuple[str, ...]) -> Result:
    """The best classes of one image, the most probable first, and their probabilities → the first `top_k` of them."""
    top: list[Guess] = [
        {"label": labels[index], "index": index, "probability": probability}
        for index, probability in zip(order[:top_k], probabilities, strict=False)
    ]
    return {**top[0], "top": top}
