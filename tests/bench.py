"""How close the suite comes to the machine's limit; run by hand, not by pytest.

    python tests/bench.py --only training evaluation    # speed relative to the bare model; 1 is the limit
    python tests/bench.py --only scale                  # 5,000 and 50,000 images: linear time, flat memory?

Speeds are ratios of two things measured in turn in the same process. Prints one table and one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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


def draw_noise(folder: Path, count: int) -> Path:
    """A data folder of count different images, two per patient."""
    for label, pattern in (("NORMAL", "IM-{}-{}.jpeg"), ("PNEUMONIA", "person{}_virus_{}.jpeg")):
        target = folder / "train" / label
        target.mkdir(parents=True)
        rng = np.random.default_rng(len(label))
        for i in range(count // 2):
            small = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
            small.resize((SIZE, SIZE), Image.Resampling.BILINEAR).save(target / pattern.format(i // 2, i))
    return folder


def watched(command: list, cwd: Path) -> tuple[float, float]:
    """Run a command to its end: seconds, and peak MB of memory without page cache."""
    start, most = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=out, stderr=out, cwd=cwd)
        while process.poll() is None:
            anonymous = Path(f"/proc/{process.pid}/status").read_text().partition("RssAnon:")[2]
            most = max(most, int((anonymous.split() or [0])[0]))  # a process that has just ended has none
            time.sleep(0.02)
        taken = time.perf_counter() - start
        if process.returncode > ("check" in command):  # 1: the check found a problem
            out.seek(0)
            raise RuntimeError(out.read()[-2000:])
    return taken, most / 1024


def few_steps(root: str, output: str) -> None:
    """Run train.py with a few steps instead of an epoch."""
    original = train.train_epoch

    def replacement(learner, class_weights, loader, rates, *rest) -> dict:
        return original(learner, class_weights, loader, rates[:STEPS], *rest)

    train.train_epoch = replacement
    arguments = ["--data", root, "--no-pretrained", "--img-size", str(SIZE), "--epochs", "1", "--output", output]
    train.run(train.make_parser().parse_args(arguments), None)


def scale(work: Path, counts: list[int]) -> dict:
    """Seconds and MB (without page cache) of whole commands for each number of images."""
    suite, result = Path(data.__file__).parent, defaultdict(list)
    find_bench = f"import sys; sys.path[:0] = [{str(suite / 'tests')!r}]; import bench"
    for count in counts:
        result["scale: images"].append(count)
        root = draw_noise(work / str(count), count)
        runs = [work / f"{count}-first", work / f"{count}-second"]
        commands = {"data.py check": [suite / "data.py", "check", root]}
        for name, run in zip(("first", "second"), runs):
            call = f"bench.few_steps({str(root)!r}, {str(run)!r})"
            commands[f"{name} run, {STEPS} steps"] = ["-c", f"{find_bench}; {call}"]
        commands["predict.py --csv"] = [suite / "predict.py", "--ckpt", runs[1], "--csv", root]
        for name, command in commands.items():
            taken, memory = watched(command, work)
            result[f"{name} (s)"].append(taken)
            result[f"{name} (MB)"].append(memory)
    return result


PARTS = ("training", "evaluation", "scale")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, default=PARTS[:-1], help=" ".join(PARTS))
    parser.add_argument("--images", nargs="+", type=int, default=[5_000, 50_000], help="numbers of images, for scale")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as work:
        parts = {"training": training, "evaluation": evaluation, "scale": lambda: scale(Path(work), args.images)}
        result = {}
        for name in args.only:
            for k, v in parts[name]().items():
                result[k] = np.round(v, 3).tolist()
                print(f"{k:62}", *(f"{x:10.3f}" for x in np.atleast_1d(v)), flush=True)
    print(json.dumps({"cores": data.CORES, "torch": str(torch.__version__), **result}))


if __name__ == "__main__":
    main()
