"""The nets that tests take in turn."""

# One row of each family and parameterization, with the smallest images that it takes.
ROWS = {
    "ncrelu": {},
    "relu": {"nonlinearity": "relu"},
    "unnormalized": {"parameterization": "unnormalized"},
    "unnormalized-relu": {"nonlinearity": "relu", "parameterization": "unnormalized"},
    "plain": {"parameterization": "plain"},
    "plain-relu": {"nonlinearity": "relu", "parameterization": "plain"},
    "initialised": {"parameterization": "initialised"},
    "delta": {"parameterization": "delta"},
    "per-channel": {"nonlinearity": "relu", "parameterization": "per-channel"},
    "pooled": {"family": "pooled", "size": 13},
    "imagenet-18": {"family": "imagenet", "depth": 18, "width": 1 / 16, "size": 32},
    "imagenet-18-per-channel": {
        "family": "imagenet",
        "depth": 18,
        "width": 1 / 16,
        "size": 32,
        "nonlinearity": "relu",
        "parameterization": "per-channel",
    },
    "imagenet-34": {"family": "imagenet", "depth": 34, "width": 1 / 32, "size": 32},
    "imagenet-table3": {"family": "imagenet-table3", "depth": 34, "width": 1 / 32, "size": 32},
    "wrn": {"family": "wrn", "width": 1.0, "nonlinearity": "relu", "parameterization": "plain"},
    "wrn-wide": {"family": "wrn", "width": 1.5, "nonlinearity": "relu", "parameterization": "plain"},
    "wrn-delta": {"family": "wrn", "width": 1.0, "nonlinearity": "relu", "parameterization": "delta"},
    "per-output-b": {"parameterization": "per-output-b"},
    "first-delta": {"nonlinearity": "relu", "parameterization": "per-channel", "delta": "first"},
}
# A second or more in most tests; a smaller row of their family stays among the fast ones.
SLOW = ("imagenet-18-per-channel", "imagenet-34", "imagenet-table3", "wrn-wide", "wrn-delta")
