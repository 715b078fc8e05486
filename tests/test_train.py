"""train.py: its pure parts, and the real script: killed, resumed, in two processes, with weights of another run."""

import csv
import json
import math
import resource
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

import data
import evaluate
import models
import train

SHORT = ("--no-pretrained", "--img-size", "32", "--batch-size", "16", "--warmup-epochs", "0.5", "--threshold", "youden")


def start(*arguments, cwd) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    # What a shell starts in the background ignores SIGINT, and would hand that down.
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=cwd, **options)


def wait_for_epoch(process, epoch):
    for line in process.stdout:
        if line.strip().startswith(f"{epoch} "):
            return


def state_of(folder):
    return models.load(folder / "last.pt", train.LAST_FORMAT, train.STATE)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def splits_of(folder):
    with open(folder / "splits.csv", newline="") as f:
        return list(csv.DictReader(f))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_times(folder) -> dict:
    """metrics.json but for what a clock decides."""
    metrics = metrics_of(folder)
    for entry in [metrics, *metrics["epochs"]]:
        del entry["seconds"]
        del entry["images_per_second"]
    return metrics


# --- pure parts ---


def test_learning_rate_is_a_warm_up_and_a_cosine():
    rates = [train.learning_rate(s, 100, 10, 2.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] < 0.001 and rates[9:] == sorted(rates[9:], reverse=True)
    assert train.learning_rate(0, 10, 0, 1.0) == 1.0


@pytest.mark.parametrize(
    ("aurocs", "selected", "since_best"),
    [
        ([0.9], True, 0),
        ([0.90, 0.95, 0.951], True, 0),
        ([0.90, 0.95, 0.951, 0.60], False, 1),
        ([0.90, 0.95, 0.951, 0.60, 0.949], True, 2),  # within a standard error of the best: the longer trained
        ([0.90, 0.95, 0.951, 0.60, 0.949, 0.944], False, 3),
        ([0.9, 0.9], True, 1),
    ],
)
def test_whether_an_epoch_is_selected_and_how_long_ago_the_best_was(monkeypatch, aurocs, selected, since_best):
    monkeypatch.setattr(data, "auroc_error", lambda auroc, positives, negatives: 0.005)
    history = [{"val_auroc": auroc} for auroc in aurocs]
    assert train.is_selected(history, 10, 10) == selected
    assert train.epochs_since_best(history) == since_best


def test_the_history_tells_the_best_epoch_and_the_seconds():
    epochs = [
        {"epoch": 1, "selected": True, "seconds": 2.5, "images_per_second": 10.0},
        {"epoch": 2, "selected": True, "seconds": 1.5, "images_per_second": 30.0},
        {"epoch": 3, "selected": False, "seconds": 1.0, "images_per_second": 20.0},
    ]
    assert train.summarize(epochs) == {"best_epoch": 2, "seconds": 5.0, "images_per_second": 20.0}


def test_the_loss_counts_classes_the_same_in_every_batch():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
    labels = torch.tensor([0, 1, 1])
    each = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(0.5))]
    loss = train.weighted_loss(logits, labels, torch.tensor([2.0, 0.5]), 0.0)
    assert float(loss) == pytest.approx((2 * each[0] + 0.5 * each[1] + 0.5 * each[2]) / 3)


def test_layers_keep_their_own_share_of_the_rate():
    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight], "lr_scale": 0.1}, {"params": [model.bias]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    ema = train.ModelEmaV3(model, decay=0.0)
    learner = train.Learner(model, model, ema, optimizer, torch.amp.GradScaler("cpu", enabled=False), False)
    loader = [(torch.ones(1, 2), torch.tensor([0]))]
    train.train_epoch(learner, torch.nn.functional.cross_entropy, loader, [0.5], 0, torch.float32)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.5]


# --- what a run writes ---


def test_what_a_run_writes(run_folder, demo):
    metrics = metrics_of(run_folder)
    assert metrics["finished"] and [e["epoch"] for e in metrics["epochs"]] == [1, 2]
    assert metrics["arguments"]["epochs"] == 2 and metrics["data"]["demo"] is True
    assert metrics["weights"]["source"] == "random"
    rows = splits_of(run_folder)
    assert list(rows[0]) == ["path", "class", "patient", "subtype", "split", "demo"]
    assert len(rows) == sum(metrics["data"]["images"].values())
    assert not any("test/" in r["path"] for r in rows)
    ckpt = models.load(run_folder / "ckpt.pt")
    best = metrics["epochs"][metrics["best_epoch"] - 1]
    assert ckpt["epoch"] == metrics["best_epoch"] and ckpt["finished"] and ckpt["epochs"] == 2
    assert ckpt["validation"]["val_auroc"] == best["val_auroc"]
    assert 0 < ckpt["threshold"]["value"] < 1
    assert ckpt["data"]["demo"] and ckpt["data"]["fingerprint"] == metrics["data"]["fingerprint"]
    held_out = [r["patient"] for r in rows if r["split"] == "val"]
    assert set(ckpt["data"]["val_patients"]) == set(held_out) and len(ckpt["data"]["val_pixels"]) == len(held_out) > 0
    assert {r["patient"] for r in rows if r["split"] == "train"} == set(ckpt["data"]["patients"])


def test_the_split_is_a_function_of_folds_and_fold_alone(demo, tmp_path):
    held_out = []
    for name, options in (("a", ("--seed", 1)), ("b", ("--seed", 2)), ("c", ("--fold", 1))):
        options = (*options, "--folds", 5, "--epochs", 1, "--output", name)
        done = run_script("train.py", "--data", demo, *SHORT, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        held_out.append({r["path"] for r in splits_of(tmp_path / name) if r["split"] == "val"})
    assert held_out[0] == held_out[1] and not held_out[0] & held_out[2]
    assert not same(models.load(tmp_path / "a")["state_dict"], models.load(tmp_path / "b")["state_dict"])


def test_the_positive_class_is_said_and_can_be_set(tmp_path):
    for label in ("NEUMONIA", "NORMAL"):
        (tmp_path / "d" / "train" / label).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "d" / "train" / label / f"{i}.png")
    common = ("train.py", "--data", "d", *SHORT, "--folds", 3, "--epochs", 1, "--output")
    guessed = run_script(*common, "guessed", cwd=tmp_path)
    assert "positive class: NORMAL" in guessed.stdout and "is a guess: NORMAL" in guessed.stderr
    asked = run_script(*common, "asked", "--positive", "NEUMONIA", cwd=tmp_path)
    assert "positive class: NEUMONIA" in asked.stdout and "guess" not in asked.stderr
    assert models.load(tmp_path / "asked")["positive"] == "NEUMONIA"


def test_a_run_from_anothers_weights_knows_what_that_one_saw(run_folder, demo, tmp_path):
    common = ("train.py", "--data", demo, *SHORT[1:], "--img-size", 64, "--epochs", 1, "--weights", run_folder)
    same_split = run_script(*common, "--output", "same", cwd=tmp_path)
    assert same_split.returncode == 0 and "LEAK" not in same_split.stderr, same_split.stderr
    other = run_script(*common, "--fold", 3, "--output", "other", cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    held_out = [r for r in splits_of(tmp_path / "other") if r["split"] == "val"]
    (leak,) = [line for line in other.stderr.splitlines() if "LEAK" in line]
    assert f"{len(held_out)} of the {len(held_out)} validation images" in leak
    # A third generation still knows the patients of the first.
    seen = set(models.load(tmp_path / "other")["data"]["patients"])
    assert seen == {r["patient"] for r in splits_of(tmp_path / "other")}
    assert len(models.load(tmp_path / "other")["data"]["pixels"]) == len(splits_of(tmp_path / "other"))


def moved(demo, tmp_path, *options):
    """How far each weight of a vision transformer moved in one epoch from a run's first state, and its first state."""
    arguments = ["--model", "vit_tiny_patch16_224", *SHORT[1:], "--epochs", 1, "--ema-decay", 0, *options]
    torch.manual_seed(0)
    first = models.build("vit_tiny_patch16_224", 2, 32)
    torch.save(first.state_dict(), tmp_path / "first.pt")
    done = run_script("train.py", "--data", demo, "--weights", "first.pt", *arguments, "--output", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = state_of(tmp_path / "r")["model"]
    return {k: float((after[k] - v).abs().mean()) for k, v in first.state_dict().items()}


def test_a_frozen_backbone_does_not_move(demo, tmp_path):
    change = moved(demo, tmp_path, "--freeze")
    assert change.pop("head.weight") > 0 and change.pop("head.bias") > 0
    assert set(change.values()) == {0.0}


def test_a_frozen_backbone_keeps_its_statistics(demo, tmp_path):
    done = run_script("train.py", "--data", demo, *SHORT, "--epochs", 1, "--freeze", "--output", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state = state_of(tmp_path / "r")["model"]
    assert all(v.eq(0).all() for k, v in state.items() if k.endswith("running_mean"))
    assert state["classifier.bias"].ne(0).any()


def test_lower_layers_move_less_with_layer_decay(demo, tmp_path):
    change = moved(demo, tmp_path, "--layer-decay", 0.5)
    # AdamW moves a weight by about its rate: block 3 lies 8 layers under block 11.
    assert change["blocks.11.attn.qkv.weight"] / change["blocks.3.attn.qkv.weight"] == pytest.approx(2**8, rel=0.5)


def test_copies_in_training_and_validation_are_said(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "d")
    for i, path in enumerate(sorted((tmp_path / "d" / "train").rglob("*.jpeg"))):
        shutil.copy(path, path.with_name(f"copy{i}.jpeg"))
    done = run_script("train.py", "--data", "d", *SHORT, "--folds", 4, "--epochs", 1, "--output", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (leak,) = [line for line in done.stderr.splitlines() if "LEAK" in line]
    assert "have the same pixels as training images" in leak
    assert int(leak.split("LEAK: ")[1].split()[0]) > 10


# --- interruption and resume ---


def test_a_killed_run_ends_as_one_that_was_not(demo, tmp_path):
    """SIGKILL while training; then --resume: the same bits everywhere, as of a run with the same arguments."""
    arguments = ("--data", demo, *SHORT, "--epochs", 4)
    done = run_script("train.py", *arguments, "--output", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    process = start(*arguments, "--output", "cut", cwd=tmp_path)
    wait_for_epoch(process, 2)
    in_use = run_script("train.py", "--resume", "cut", cwd=tmp_path)
    assert in_use.returncode == 2 and "another process is training in cut" in in_use.stderr
    process.kill()
    process.communicate()
    # As if killed while saving: half a file under its temporary name, and a checkpoint newer than the state.
    (tmp_path / "cut" / ".last.pt.1.tmp").write_bytes(b"half")
    assert len(metrics_of(tmp_path / "cut")["epochs"]) < 4
    assert models.load(tmp_path / "cut")["finished"] is False
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for _ in range(2):  # a run that is finished stays as it is
        done = run_script("train.py", "--resume", "cut", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert without_times(whole) == without_times(cut)
    for name in ("ckpt.pt", "splits.csv"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    for key in ("model", "ema"):
        assert same(state_of(whole)[key], state_of(cut)[key])


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_run_whose_checkpoint_is_lost_does_not_go_on(run_folder, tmp_path, damage):
    shutil.copytree(run_folder, tmp_path / "run")
    ckpt = tmp_path / "run" / "ckpt.pt"
    ckpt.unlink() if damage == "missing" else ckpt.write_bytes(ckpt.read_bytes()[:1000])
    before = (tmp_path / "run" / "last.pt").read_bytes()
    done = run_script("train.py", "--resume", "run", "--epochs", 3, cwd=tmp_path)
    assert done.returncode == 2
    assert ("ckpt.pt does not exist" if damage == "missing" else "ckpt.pt is damaged") in done.stderr.splitlines()[-1]
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def drop_a_key(state):
    del state["epochs"][0]["selected"]


def shorten_the_history(state):
    state["epochs"].pop(0)


def reshape_a_weight(state):
    state["ema"]["classifier.bias"] = torch.zeros(7)


def reshape_a_moment(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)


def empty_the_optimizer(state):
    state["optimizer"] = {}


@pytest.mark.parametrize(
    "alter", [drop_a_key, shorten_the_history, reshape_a_weight, reshape_a_moment, empty_the_optimizer]
)
def test_an_altered_state_is_one_line(run_folder, tmp_path, alter):
    shutil.copytree(run_folder, tmp_path / "run")
    state = state_of(run_folder)
    alter(state)
    models.save(state, tmp_path / "run" / "last.pt")
    done = run_script("train.py", "--resume", "run", "--epochs", 3, cwd=tmp_path)
    assert done.returncode == 2 and "damaged" in done.stderr.splitlines()[-1]


def change_an_image(root):
    path = next((root / "train" / "NORMAL").iterdir())
    Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)


def another_patient(root):
    names = sorted(p.relative_to(root).as_posix() for p in (root / "train").rglob("*.jpeg"))
    rows = [f"{name},p{i // 3}" for i, name in enumerate(names)]
    (root / "metadata.csv").write_text("\n".join(["file_name,patient", *rows]))


def checkpoint_of_another_seed(root):
    path = root.parent / "run" / "ckpt.pt"
    checkpoint = models.load(path)
    checkpoint["arguments"]["seed"] = 1
    models.save(checkpoint, path)


def older_checkpoint(root):
    path = root.parent / "run" / "ckpt.pt"
    models.save(models.load(path) | {"epoch": 0}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_an_image, "not those that the run"),
        (another_patient, "not those that the run"),
        (older_checkpoint, "ckpt.pt is older than"),
        (checkpoint_of_another_seed, "ckpt.pt is of another run than last.pt"),
    ],
)
def test_a_run_goes_on_with_its_own_data_and_state_alone(run_folder, demo, tmp_path, change, message):
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.copytree(demo, tmp_path / "moved")
    common = ("train.py", "--resume", "run", "--data", "moved", "--epochs", 3)
    change(tmp_path / "moved")
    refused = run_script(*common, cwd=tmp_path)
    assert refused.returncode == 2 and message in refused.stderr, refused.stderr


def test_resume_takes_the_runs_arguments_and_moved_data(run_folder, demo, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.copytree(demo, tmp_path / "moved")
    for contradiction in (("--seed", "5"), ("--batch-size", "8"), ("--model", "resnet18"), ("--no-balance",)):
        done = run_script("train.py", "--resume", "run", *contradiction, cwd=tmp_path)
        assert done.returncode == 2 and contradiction[0].removeprefix("--no-") in done.stderr
        assert len(done.stderr.splitlines()) == 1
    fewer = run_script("train.py", "--resume", "run", "--epochs", "1", "--data", "moved", cwd=tmp_path)
    assert fewer.returncode == 2 and "has made 2 epochs already" in fewer.stderr
    done = run_script("train.py", "--resume", "run", "--epochs", "3", "--data", "moved", cwd=tmp_path)
    assert done.returncode == 0 and "another number of epochs" in done.stderr, done.stderr
    assert len(metrics_of(tmp_path / "run")["epochs"]) == 3
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    done = run_script("train.py", "--data", demo, *SHORT, "--output", "run", cwd=tmp_path)
    assert done.returncode == 2 and "--resume run" in done.stderr
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


def test_a_run_of_another_version_is_said(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    state = state_of(run_folder)
    del state["arguments"]["margin"]
    models.save(state, tmp_path / "run" / "last.pt")
    done = run_script("train.py", "--resume", "run", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.endswith("is of another version of this code: margin")


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 0), ("folds", 1), ("lr", "x"), ("augment", "odd"), ("threshold", 3), ("img_size", 1)]
)
def test_stored_arguments_are_checked_like_those_of_a_command_line(run_folder, tmp_path, name, value):
    shutil.copytree(run_folder, tmp_path / "run")
    state = state_of(run_folder)
    state["arguments"][name] = value
    models.save(state, tmp_path / "run" / "last.pt")
    done = run_script("train.py", "--resume", "run", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "last.pt is damaged" in line and name.replace("_", "-") in line


def test_an_interrupted_extension_goes_on_by_itself(run_folder, demo, tmp_path, monkeypatch):
    """More epochs, asked for once, are known from then on; metrics.json is written and never read."""
    shutil.copytree(run_folder, tmp_path / "run")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", interrupt)
        done = run_script("train.py", "--resume", "run", "--epochs", 3, cwd=tmp_path)
    assert done.returncode == 130 and done.stderr.endswith("go on with: python train.py --resume run\n")
    assert metrics_of(tmp_path / "run")["finished"] is False
    (tmp_path / "run" / "metrics.json").write_text("{}")
    done = run_script("train.py", "--resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(tmp_path / "run")["epochs"]) == 3 and metrics_of(tmp_path / "run")["finished"]


def test_an_interruption_says_how_to_go_on(demo, tmp_path):
    process = start("--data", demo, *SHORT, "--epochs", 500, "--output", "a run", cwd=tmp_path)
    wait_for_epoch(process, 1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert (
        err.splitlines()[-1] == "interrupted; go on with: python train.py --resume 'a run'" and "Traceback" not in err
    )


def test_two_runs_in_one_second_get_two_folders(demo, tmp_path, monkeypatch):
    times = iter([0, 0, 0, 1])  # the second run asks until the next second has come

    class Clock(train.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 1, second=next(times))

    monkeypatch.setattr(train, "datetime", Clock)
    for _ in range(2):
        done = run_script("train.py", "--data", demo, *SHORT, "--epochs", 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    found = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert found == [f"20260101-00000{second}-mobilenetv3_small_050" for second in (0, 1)]


def test_patience_ends_a_run_that_counts_as_finished(demo, tmp_path, monkeypatch):
    aurocs = iter([0.9, 0.8, 0.7, 0.6])
    monkeypatch.setattr(evaluate, "macro_auroc", lambda *_: next(aurocs))
    done = run_script("train.py", "--data", demo, *SHORT, "--epochs", 9, "--patience", 2, "--output", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(tmp_path / "r")["epochs"]) == 3 and metrics_of(tmp_path / "r")["finished"]
    assert "no better validation AUROC in 2 epochs" in done.stdout


def test_a_full_disk_loses_nothing(run_folder, tmp_path):
    """A limit on the size of files stands in for a full disk: what was saved before is still there and goes on."""
    shutil.copytree(run_folder, tmp_path / "r")
    before = (tmp_path / "r" / "last.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        done = run_script("train.py", "--resume", "r", "--epochs", 3, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert done.returncode == 2 and "go on with: python train.py --resume r" in done.stderr.splitlines()[-1]
    assert (tmp_path / "r" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "r").glob(".*.tmp"))


def test_a_compiler_that_fails_is_one_line(demo, tmp_path, monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda net: Broken())
    done = run_script("train.py", "--data", demo, *SHORT, "--compile", "--output", "r", cwd=tmp_path)
    assert done.returncode == 2
    assert "--compile does not work here (no C++ compiler); leave it out" in done.stderr.splitlines()[-1]


def test_a_loss_that_is_not_finite_is_named(demo, tmp_path):
    done = run_script("train.py", "--data", demo, *SHORT, "--lr", "1e30", "--output", "r", cwd=tmp_path)
    assert done.returncode == 2
    assert "not finite in step" in done.stderr and "Traceback" not in done.stderr
    assert state_of(tmp_path / "r")["epochs"] == []


# --- several processes ---


def launch(*arguments, port):
    """The command that starts train.py in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    return [*command, str(ROOT / "train.py"), *map(str, arguments)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_see_what_one_sees(demo, tmp_path):
    """One image more or less would change the losses; gradients that are not shared would change the weights."""
    # A model whose output for an image does not depend on the others of its batch: the losses must agree closely.
    arguments = ["--model", "convnext_atto", "--no-pretrained", "--augment", "none", "--device", "cpu"]
    arguments += [
        "--data",
        demo,
        "--img-size",
        32,
        "--epochs",
        1,
        "--threshold",
        0.5,
        "--warmup-epochs",
        0,
        "--lr",
        1e-4,
    ]
    one = run_script("train.py", *arguments, "--batch-size", 16, "--output", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    command = launch(*arguments, "--batch-size", 8, "--output", "two", port=free_port())
    two = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert two.returncode == 0, two.stderr
    a, b = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert a["data"] == b["data"]
    assert (tmp_path / "one" / "splits.csv").read_bytes() == (tmp_path / "two" / "splits.csv").read_bytes()
    for loss in ("val_loss", "train_loss"):
        assert math.isclose(a["epochs"][0][loss], b["epochs"][0][loss], rel_tol=1e-5)
    one, two = state_of(tmp_path / "one")["model"], state_of(tmp_path / "two")["model"]
    # Every step moves each weight by about the rate, 1e-4, where it is not the same gradient in another direction.
    apart = torch.cat([(one[k] - two[k]).abs().flatten() for k in one])
    assert apart.mean() < 2e-6
    done = run_script("train.py", "--resume", "two", cwd=tmp_path)
    assert done.returncode == 2 and "was started with 2 processes, not 1" in done.stderr


def test_help_is_grouped_and_short():
    parser = train.make_parser()
    flags = [a for a in parser._actions if a.option_strings]
    assert len(flags) <= 31
    assert all(a.type is not bool for a in flags)
    assert parser.parse_args([]).patience == 0  # a cosine that is cut off never reaches its low rates
    text = parser.format_help()
    assert all(f"\n{group}:" in text for group in ("data", "model", "recipe", "run")) and "(default: 64)" in text
