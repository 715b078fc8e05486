"""How close the suite comes to the machine's limit; run by hand, not by pytest.

    python tests/bench.py    # speed relative to the bare model; 1 is the limit

Speeds are ratios of two things measured in turn in the same process. Prints one table and one line of JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import models
import train

NAME, SIZE, BATCH, STEPS, ROUNDS = "mobilenetv3_small_050", 224, 64, 6, 5
CPU, PREPROCESSING = torch.device("cpu"), {"mean": 0.45, "std": 0.23}


def seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def ratio(limit, real) -> float:
    """Median over rounds of limit's time divided by real's, called alternately; 1: as fast as the limit."""
    limit(), real()
    return float(np.median([seconds(limit) / seconds(real) for _ in range(ROUNDS)]))


def set_up(count: int):
    """A model, count random images, and a function that trains one epoch on them."""
    torch.manual_seed(0)
    model = models.build(NAME, 2, SIZE)
    args = train.make_parser().parse_args(f"--batch-size {BATCH} --lr 0.001 --precision fp32".split())
    learner = train.Learner(model, args, CPU)
    images = torch.randint(0, 256, (count, SIZE, SIZE), dtype=torch.uint8)
    labels, everything = torch.randint(0, 2, (count,)), torch.arange(count)
    dataset = train.TrainingSet(Path(), None, images, labels, everything, everything, ["A", "B"])
    operations = data.preset(args.augment, SIZE)
    steps = count // BATCH

    def epoch() -> None:
        order = data.shuffle(count, seed=0, epoch=1)[: steps * BATCH].view(steps, BATCH)
        numbers = data.draw_numbers(operations, count, seed=0, epoch=1)
        loader = train.batches(dataset, order, operations, numbers, PREPROCESSING, CPU)
        train.train_epoch(learner, torch.ones(2), loader, steps * [args.lr], 0)

    return model, images, epoch


def training() -> dict:
    """The real loop relative to forward, backward and optimizer step on one batch of the same size in memory."""
    _, _, epoch = set_up(STEPS * BATCH)
    bare = models.build(NAME, 2, SIZE).to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(bare, opt="adamw", lr=1e-3, weight_decay=0.05, foreach=True)
    x = torch.randn(BATCH, 1, SIZE, SIZE).to(memory_format=torch.channels_last)
    y = torch.randint(0, 2, (BATCH,))

    def limit() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(bare(x), y).backward()
            optimizer.step()

    return {"training / forward-backward-optimizer": ratio(limit, epoch)}


def evaluation() -> dict:
    model, images, _ = set_up(16 * BATCH)
    model.eval()
    batch = torch.randn(BATCH, 1, SIZE, SIZE).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def limit() -> None:
        for _ in range(16):
            model(batch)

    def real() -> None:
        for part in torch.arange(len(images)).split(BATCH):
            models.infer(model, images[part], PREPROCESSING)

    return {"evaluation / forward": ratio(limit, real)}


def main() -> None:
    result = training() | evaluation()
    for name, value in result.items():
        print(f"{name:40}{value:.3f}")
    print(json.dumps({"cores": data.CORES, "torch": str(torch.__version__), **result}))


if __name__ == "__main__":
    main()
