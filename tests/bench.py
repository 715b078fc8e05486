"""How close the suite comes to the machine's limit; run by hand, not by pytest.

    python tests/bench.py                               # training and evaluation, of noise in memory
    python tests/bench.py --fullres DIR                 # first decode and prediction of the full-size JPEG files in DIR
    python tests/bench.py --only scale                  # 5,000 and 50,000 images: linear time, flat memory?

Every figure but the reported times is a ratio of two things measured in turn in the same process, since absolute times
mean little on shared machines. Prints one table and one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.optim import create_optimizer_v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import models
import predict
import train

NAME, SIZE, BATCH, STEPS, ROUNDS = "mobilenetv3_small_050", 224, 64, 6, 5
CPU = torch.device("cpu")


def seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def ratio(limit, real) -> float:
    """Median over rounds of the time of limit over the time of real, called in turn; 1 is as fast as the limit."""
    limit(), real()
    return float(np.median([seconds(limit) / seconds(real) for _ in range(ROUNDS)]))


PREPROCESSING = {"mean": 0.45, "std": 0.23}


def set_up(count: int):
    """A model, count random images, and a function that trains one epoch on them."""
    torch.manual_seed(0)
    model = models.build(NAME, 2, SIZE)
    args = train.make_parser().parse_args(f"--batch-size {BATCH} --lr 0.001 --precision fp32".split())
    learner = train.make_learner(model, args, CPU)
    images = torch.randint(0, 256, (count, SIZE, SIZE), dtype=torch.uint8)
    everything = torch.arange(count)
    labels, hashes = torch.randint(0, 2, (count,)), np.zeros((count, 4), np.uint64)
    dataset = train.TrainingSet(
        Path(), [], images, hashes, labels, everything.numpy(), everything, everything, ["A", "B"], [], ""
    )
    operations = data.preset(args.augment, SIZE)
    steps = count // BATCH

    def epoch() -> None:
        order = data.shuffle(count, seed=0, epoch=1)[: steps * BATCH].view(steps, BATCH)
        numbers = data.draw_numbers(operations, count, seed=0, epoch=1)
        loader = train.batches(dataset, order, operations, numbers, PREPROCESSING, CPU)
        train.train_epoch(learner, torch.ones(2), loader, steps * [args.lr], 0, torch.float32)

    return model, images, epoch


def training() -> dict:
    """The real loop over forward, backward and optimizer on one resident batch; the size that is fed is the same."""
    _, _, epoch = set_up(STEPS * BATCH)
    found = []
    for layout in (torch.channels_last, torch.contiguous_format):
        bare = models.build(NAME, 2, SIZE).to(memory_format=layout).train()
        bare_optimizer = create_optimizer_v2(bare, opt="adamw", lr=1e-3, weight_decay=0.05, foreach=True)
        x, y = torch.randn(BATCH, 1, SIZE, SIZE).to(memory_format=layout), torch.randint(0, 2, (BATCH,))

        def limit() -> None:
            for _ in range(STEPS):
                bare_optimizer.zero_grad(set_to_none=True)  # noqa: B023
                F.cross_entropy(bare(x), y).backward()  # noqa: B023
                bare_optimizer.step()  # noqa: B023

        found.append(ratio(limit, epoch))
    return {"training / forward-backward-optimizer": min(found)}  # the faster format is the stricter limit


def evaluation() -> dict:
    model, images, _ = set_up(16 * BATCH)
    model.eval()
    batch = torch.randn(BATCH, 1, SIZE, SIZE).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def limit() -> None:
        for _ in range(16):
            model(batch)

    def real() -> None:
        models.infer(model, models.in_batches(images, torch.arange(len(images)), BATCH), PREPROCESSING)

    return {"evaluation / forward": ratio(limit, real)}


def decoding(folder: Path) -> dict:
    """First decode on all cores, cache file included, over cores times Pillow's own draft decode and resize on one."""
    files = sorted(p for p in folder.rglob("*") if data.is_image(p))[:160]

    def limit() -> None:
        pillow_alone(files)

    with tempfile.TemporaryDirectory() as root, ProcessPoolExecutor(data.CORES) as pool:
        for i, path in enumerate(files):
            target = Path(root, "train", "AB"[i % 2], f"{i}.jpeg")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path.resolve(), target)
        records = data.scan(Path(root), "train")

        def real() -> None:
            for record in records:  # as if the files had changed: the cache is built again
                record.stamp += "+"
            data.load_images(Path(root), records, SIZE)

        # Cores share caches and memory: the same Pillow in as many processes is what this machine has to give.
        shares = [files[i :: data.CORES] for i in range(data.CORES)]
        together = ratio(limit, lambda: list(pool.map(pillow_alone, shares)))
        return {
            f"first decode of {len(files)} files / {data.CORES} cores x Pillow": ratio(limit, real) / data.CORES,
            f"  Pillow in {data.CORES} processes / {data.CORES} cores x Pillow": together / data.CORES,
        }


def pillow_alone(files: list[Path]) -> None:
    """Draft decode and resize, in one thread."""
    for path in files:
        with Image.open(path) as image:
            image.draft("L", (2 * SIZE, 2 * SIZE))
            image.convert("L").resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def prediction(folder: Path) -> dict:
    """predict.py's reading and classifying of a folder, over reading alone on all cores; both from the same files."""
    files = 4 * [str(p) for p in sorted(folder.rglob("*")) if data.is_image(p)][:160]
    torch.manual_seed(0)
    model = models.build(NAME, 2, 160).eval().to(memory_format=torch.channels_last)
    batches = [[torch.randint(0, 256, (100, 160, 160), dtype=torch.uint8)]] * 2
    checkpoint = {"model": NAME, "classes": ["NORMAL", "PNEUMONIA"], "input_size": 160, "data": {"demo": False}}
    checkpoint |= {**PREPROCESSING, **train.UNFINISHED, "input_check": models.fit_input_check(*batches)}
    classifier = predict.Classifier(Path(), "", checkpoint, model, CPU, threading.Semaphore(data.CORES))

    def limit() -> None:
        with ThreadPoolExecutor(data.CORES) as pool:
            list(pool.map(lambda path: data.read_image(path, 160)[1], files))

    def real() -> None:
        assert all(row.label for row in predict.classify_all(files, classifier))

    return {f"prediction of {len(files)} files / reading on {data.CORES} cores": ratio(limit, real)}


def draw_noise(folder: Path, count: int) -> Path:
    """A data folder of count different images, two of a patient."""
    for label, pattern in (("NORMAL", "IM-{}-{}.jpeg"), ("PNEUMONIA", "person{}_virus_{}.jpeg")):
        target = folder / "train" / label
        target.mkdir(parents=True)
        rng = np.random.default_rng(len(label))
        for i in range(count // 2):
            small = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
            small.resize((SIZE, SIZE), Image.Resampling.BILINEAR).save(target / pattern.format(i // 2, i))
    return folder


def watched(command: list, cwd: Path) -> tuple[float, float, str]:
    """Run a command to its end: seconds, most MB of memory that is no page cache, and what it printed."""
    start, most = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=out, stderr=out, cwd=cwd)
        while process.poll() is None:
            anonymous = Path(f"/proc/{process.pid}/status").read_text().partition("RssAnon:")[2]
            most = max(most, int((anonymous.split() or [0])[0]))  # a process that has just ended has none
            time.sleep(0.02)
        taken = time.perf_counter() - start
        out.seek(0)
        printed = out.read()
    if process.returncode > ("check" in command):  # 1: the check found a problem
        raise RuntimeError(printed[-2000:])
    return taken, most / 1024, printed


def few_steps(root: str, output: str) -> None:
    """Run train.py with a few steps in the place of an epoch.

    Prints seconds from the first statement to the first step, imports apart; images per second of the steps; and
    seconds from the last step to the end.
    """
    original, begin, result = train.train_epoch, time.perf_counter(), {}

    def replacement(learner, class_weights, loader, rates, *rest) -> dict:
        result["start"] = time.perf_counter() - begin
        loader = iter(loader)
        original(learner, class_weights, loader, rates[:4], *rest)
        taken = seconds(lambda: original(learner, class_weights, loader, rates[:STEPS], *rest))
        result.update(speed=STEPS * BATCH / taken, end=time.perf_counter())
        return {"train_loss": 0.0, "lr": 0.0}

    train.train_epoch = replacement
    arguments = ["--data", root, "--no-pretrained", "--img-size", str(SIZE), "--epochs", "1", "--output", output]
    train.run(train.make_parser().parse_args(arguments), None)
    print(json.dumps(result | {"end": time.perf_counter() - result["end"]}))


def scale(work: Path, counts: list[int]) -> dict:
    """Seconds and MB (page cache apart) of whole commands, and of the parts of a run, at each number of images."""
    suite, result = Path(data.__file__).parent, defaultdict(list)
    find_bench = f"import sys; sys.path[:0] = [{str(suite / 'tests')!r}]; import bench"
    for count in counts:
        root, column = draw_noise(work / str(count), count), {"scale: images": count}
        runs = [work / f"{count}-first", work / f"{count}-second"]
        commands = {"data.py check": [suite / "data.py", "check", root]}
        for name, run in zip(("first", "second"), runs):
            call = f"bench.few_steps({str(root)!r}, {str(run)!r})"
            commands[f"{name} run, {STEPS + 4} steps"] = ["-c", f"{find_bench}; {call}"]
        commands["predict.py --csv"] = [suite / "predict.py", "--ckpt", runs[1], "--csv", root]
        for name, command in commands.items():
            taken, memory, printed = watched(command, work)
            column |= {f"{name} (s)": taken, f"{name} (MB)": memory}
            if name.startswith("second"):
                found = json.loads(printed.splitlines()[-1])
                column["  of it the start (s)"], column["  of it the end (s)"] = found["start"], found["end"]
                column["  its training (images/s)"] = found["speed"]
        for name, value in column.items():
            result[name].append(value)
    return result


PARTS = ("training", "evaluation", "decoding", "prediction", "scale")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fullres", type=Path, metavar="DIR", help="folder of full-size JPEG files")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, default=PARTS[:-1], help=" ".join(PARTS))
    parser.add_argument("--images", nargs="+", type=int, default=[5_000, 50_000], help="of the part scale")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as work:
        parts = {"training": training, "evaluation": evaluation, "scale": lambda: scale(Path(work), args.images)}
        if args.fullres:
            parts |= {"decoding": lambda: decoding(args.fullres), "prediction": lambda: prediction(args.fullres)}
        result = {}
        for name in args.only:
            for k, v in parts[name]().items() if name in parts else ():
                result[k] = np.round(v, 3).tolist()
                print(f"{k:62}", *(f"{x:10.3f}" for x in np.atleast_1d(v)), flush=True)
    print(json.dumps({"cores": data.CORES, "torch": str(torch.__version__), **result}))


if __name__ == "__main__":
    main()
