"""python train/run.py: train a DiracNet."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from train.config import TrainConfig

EXAMPLES = (
    "python train/run.py                                    # digits, bundled with scikit-learn",
    "python train/run.py --dataset fashion-mnist --depth 16 --epochs 12",
    "python train/run.py --dataset folder --data-dir photos --image-size 64",
    "python train/run.py --recipe paper --dataset cifar10 --download --depth 34 --width 2",
    "torchrun --nproc-per-node 2 train/run.py --dataset fashion-mnist",
    "python train/run.py --data-dir photos --init runs/large/best.pt --freeze 5       # fine-tune another net",
    "python train/run.py --init plain.safetensors --qat --epochs 3 --lr 0.01 --out runs/eight-bits  # for int8",
    "python train/run.py --resume --out runs/digits-16-1    # continue where it stopped",
    "python train/run.py --describe --json --family cifar --classes 10 --depth 34 --width 2",
)


def command(config: TrainConfig) -> int:
    """Train a DiracNet; writes checkpoint.pt, best.pt, metrics.jsonl and learning_curve.png to --out."""
    from train import training

    return training.describe(config) if config.describe else training.train(config)


if __name__ == "__main__":
    sys.exit(run_command(command, TrainConfig, examples=EXAMPLES))
