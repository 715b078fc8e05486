"""How close the suite comes to the machine's limit; run by hand, not by pytest.

    python tests/bench.py                               # a set of noise images, drawn into a temporary folder
    python tests/bench.py --fullres DIR                 # first decode and prediction of the full-size JPEG files in DIR
    python tests/bench.py --only scale                  # 25,000 to 100,000 images: linear time, flat memory?

Every figure but the reported times is a ratio of two things measured in turn in the same process, since absolute times
mean little on shared machines. Prints one table and one line of JSON.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
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

NAME, SIZE, BATCH, STEPS, ROUNDS = "mobilenetv3_small_050", 224, 64, 6, 9
CPU = torch.device("cpu")


def seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def ratio(limit, real) -> float:
    """Median over rounds of the time of limit over the time of real, called in turn; 1 is as fast as the limit."""
    limit(), real()
    return float(np.median([seconds(limit) / seconds(real) for _ in range(ROUNDS)]))


def set_up(count: int, compiled: bool = False):
    """A model, count random images, and a function that trains one epoch on the first n of them."""
    torch.manual_seed(0)
    model = models.build(NAME, 2, SIZE)
    arguments = f"--batch-size {BATCH} --lr 0.001 --precision fp32" + " --compile" * compiled
    args = train.make_parser().parse_args(arguments.split())
    learner = train.make_learner(model, args, CPU)
    images = torch.randint(0, 256, (count, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.randint(0, 2, (count,))
    everything = torch.arange(count)
    d = train.TrainingSet(Path(), [], images, everything, labels, everything, everything, ["A", "B"], 1, [], "")
    criterion = train.make_criterion(d, args, CPU)
    pre = {"mean": 0.45, "std": 0.23, "margin": 0.1}
    feed = train.Feed(data.preset(args.augment, SIZE), pre, 0, BATCH, slice(None), CPU)

    def epoch(n: int = count) -> None:
        d.train = everything[:n]
        rates = n // BATCH * [args.lr]
        train.train_epoch(learner, criterion, train.batches(d, feed, 1), rates, 0, torch.float32)

    return model, images, epoch


def training() -> dict:
    """The real loop over forward, backward and optimizer on one resident batch; the size that is fed is the same."""
    _, _, epoch = set_up(STEPS * BATCH)
    best = 0.0
    for layout in (torch.channels_last, torch.contiguous_format):
        bare = models.build(NAME, 2, SIZE).to(memory_format=layout).train()
        bare_optimizer = create_optimizer_v2(bare, opt="adamw", lr=1e-3, weight_decay=0.05, foreach=True)
        x, y = torch.randn(BATCH, 1, SIZE, SIZE).to(memory_format=layout), torch.randint(0, 2, (BATCH,))

        def limit() -> None:
            for _ in range(STEPS):
                bare_optimizer.zero_grad(set_to_none=True)  # noqa: B023
                F.cross_entropy(bare(x), y).backward()  # noqa: B023
                bare_optimizer.step()  # noqa: B023

        found = ratio(limit, epoch)
        best = found if not best else min(best, found)  # the faster format is the stricter limit
    return {"training / forward-backward-optimizer": best}


def evaluation() -> dict:
    model, images, _ = set_up(16 * BATCH)
    model.eval()
    batch = torch.randn(BATCH, 1, SIZE, SIZE).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def limit() -> None:
        for _ in range(16):
            model(batch)

    index, pre = torch.arange(len(images)), {"mean": 0.45, "std": 0.23, "margin": 0.1}
    real = lambda: models.infer(model, models.in_batches(images, index, BATCH), pre)
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
            for record in records:  # as if the files had changed: nothing in the cache serves
                record.mtime_ns += 1
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
    checkpoint = {
        "model": NAME,
        "classes": ["NORMAL", "PNEUMONIA"],
        "positive": "PNEUMONIA",
        "input_size": 160,
        "mean": 0.45,
        "std": 0.23,
        "margin": 0.1,
        "temperature": 1.0,
        "threshold": {"value": 0.5},
        "input_check": models.fit_input_check(*batches),
        "data": {"demo": False},
    }
    classifier = predict.Classifier(checkpoint, model, CPU, "", threading.Semaphore(data.CORES))
    work = functools.partial(predict.classify, classifier=classifier)

    def limit() -> None:
        with ThreadPoolExecutor(data.CORES) as pool:
            list(pool.map(lambda path: data.read_image(path, 160)[1], files))

    def real() -> None:
        for rows in predict.stream(files, work, data.CORES, predict.BATCH):
            assert all(row.label for row in rows)

    return {f"prediction of {len(files)} files / reading on {data.CORES} cores": ratio(limit, real)}


def repeated(folder: Path, count: int) -> Path:
    """A data folder of count small phantoms, two of a patient: hard links to the first few (systems limit links)."""
    for label, subtype, pattern in (("NORMAL", "", "IM-{}-{}.jpeg"), ("PNEUMONIA", "viral", "person{}_virus_{}.jpeg")):
        target = folder / "train" / label
        target.mkdir(parents=True)
        for i in range(count // 2):
            path = target / pattern.format(i // 2, i)
            if i < 40:
                rng = np.random.default_rng([i, len(label)])
                data._draw_phantom(rng, rng, subtype)[0].resize((SIZE, SIZE)).save(path)
            else:
                os.link(target / pattern.format(i % 40 // 2, i % 40), path)
    return folder


def watched(command: list, cwd: Path, codes: tuple = (0,)) -> tuple[float, float, str]:
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
    if process.returncode not in codes:
        raise RuntimeError(printed[-2000:])
    return taken, most / 1024, printed


def fresh(call: str, cwd: Path) -> tuple[dict, float]:
    """What a function of this module prints as JSON in a process of its own, and that one's memory."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parent)!r}); import bench; bench.{call}"
    _, memory, printed = watched(["-c", code], cwd)
    return json.loads(printed.splitlines()[-1]), memory


class Started(Exception):
    """Raised in the place of all that follows the first steps."""


def one_start(root: str, output: str | None = None) -> None:
    """Run train.py with few steps in the place of an epoch, to its end where there is an output.

    Prints seconds from the first statement to the first step, imports apart, images per second of the steps, and
    seconds from the last step to the end.
    """
    original, start, result = train.train_epoch, time.perf_counter(), {}

    def few_steps(learner, criterion, loader, rates, *rest) -> dict:
        result["start"] = time.perf_counter() - start
        loader = iter(loader)
        original(learner, criterion, loader, rates[:4], *rest)
        taken = seconds(lambda: original(learner, criterion, loader, rates[:STEPS], *rest))
        result["speed"] = STEPS * BATCH / taken
        if output is None:
            raise Started
        result["rest"] = time.perf_counter()
        return {"train_loss": 0.0, "lr": 0.0}

    train.train_epoch = few_steps
    arguments = ["--data", root, "--no-pretrained", "--img-size", str(SIZE), "--epochs", "1", "--threshold", "youden"]
    with contextlib.suppress(Started), tempfile.TemporaryDirectory() as folder:
        train.run(train.make_parser().parse_args([*arguments, "--output", output or f"{folder}/run"]))
        result["rest"] = time.perf_counter() - result["rest"]
    print(json.dumps(result))


def start_and_memory(work: Path) -> dict:
    """Seconds from the first statement to the first step, imports apart; memory at 50,000 over 5,000 images."""
    result, grown = {}, []
    for count in (5_000, 50_000):
        root = repeated(work / f"start{count}", count)
        for _ in range(2):  # the first one decodes
            found, memory = fresh(f"one_start({str(root)!r})", work)
        grown.append(memory)
        result[f"start of a second run, {count} images (s)"] = found["start"]
    return result | {"memory at 50,000 / at 5,000 images, page cache apart": grown[1] / grown[0]}


def read_table(folder: str) -> None:
    print(json.dumps({"seconds": seconds(lambda: data.read_metadata(Path(folder)))}))


def scale(work: Path, counts: list[int]) -> dict:
    """Seconds and MB (page cache apart) of whole commands, and of the parts of a run, at each number of images."""
    suite, columns = Path(data.__file__).parent, []
    for count in counts:
        root, run, table = repeated(work / str(count), count), work / f"run{count}", work / f"table{count}"
        table.mkdir()
        rows = (f"train/{i}.png,{i // 2},{i % 2},F,{i % 90}\n" for i in range(2 * count))
        (table / "metadata.csv").write_text("file_name,patient,label,sex,age\n" + "".join(rows))
        check, check_memory, _ = watched([suite / "data.py", "check", root], work, (0, 1))  # 1: it finds the copies
        first, first_memory = fresh(f"one_start({str(root)!r})", work)
        second, second_memory = fresh(f"one_start({str(root)!r}, {str(run)!r})", work)
        predict, predict_memory, _ = watched([suite / "predict.py", "--ckpt", run, "--csv", root], work)
        metadata, metadata_memory = fresh(f"read_table({str(table)!r})", work)
        columns.append(
            {
                "scale: images": count,
                "data.py check (s)": check,
                "  memory of data.py check (MB)": check_memory,
                "start of a first run, with decoding (s)": first["start"],
                "  memory of a first run (MB)": first_memory,
                "start of a second run (s)": second["start"],
                "training (images/s)": second["speed"],
                "end of an epoch: validation, input check, files (s)": second["rest"],
                "  memory of a second run (MB)": second_memory,
                "predict.py --csv (s)": predict,
                "  memory of predict.py (MB)": predict_memory,
                "metadata.csv with two rows an image (s)": metadata["seconds"],
                "  memory of the table (MB)": metadata_memory,
            }
        )
    return {name: [column[name] for column in columns] for name in columns[0]}


def scaling() -> dict:
    """Seconds of an epoch at 1, 2, 4 and 8 thousand images, and the part that does not grow with them."""
    _, _, epoch = set_up(8192)
    counts = [1024, 2048, 4096, 8192]
    epoch(256)
    times = [seconds(lambda n=n: epoch(n)) for n in counts]
    slope, constant = np.polyfit(counts, times, 1)
    fit = 1 - np.var(times - (slope * np.array(counts) + constant)) / np.var(times)
    each = {f"epoch of {n} images (s)": t for n, t in zip(counts, times)}
    return each | {"constant part of an epoch (s)": float(constant), "linearity (R2)": float(fit)}


def compilation() -> dict:
    _, _, plain = set_up(STEPS * BATCH)
    _, _, compiled = set_up(STEPS * BATCH, compiled=True)
    warm_up = seconds(compiled)
    return {"--compile: warm-up (s)": warm_up, "--compile: speed over plain": ratio(plain, compiled)}


PARTS = ("training", "evaluation", "start", "scaling", "compilation", "decoding", "prediction", "scale")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fullres", type=Path, metavar="DIR", help="folder of full-size JPEG files")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, default=PARTS[:-1], help=" ".join(PARTS))
    parser.add_argument("--images", nargs="+", type=int, default=[25_000, 50_000, 100_000], help="of the part scale")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as work:
        parts = {"training": training, "evaluation": evaluation, "start": lambda: start_and_memory(Path(work))}
        parts |= {"scaling": scaling, "compilation": compilation, "scale": lambda: scale(Path(work), args.images)}
        if args.fullres:
            parts |= {"decoding": lambda: decoding(args.fullres), "prediction": lambda: prediction(args.fullres)}
        result = {}
        for name, part in parts.items():
            if name in args.only:
                for k, v in part().items():
                    result[k] = np.round(v, 3).tolist()
                    print(f"{k:62}", *(f"{x:10.3f}" for x in np.atleast_1d(v)), flush=True)
    print(json.dumps({"cores": data.CORES, "torch": str(torch.__version__), **result}))


if __name__ == "__main__":
    main()
