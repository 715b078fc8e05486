"""train.py: its pure parts, and the real script: killed, resumed, in two processes, misused."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_script

import evaluate
import models
import train

SHORT = ("--no-pretrained", "--img-size", "32", "--batch-size", "16", "--warmup-epochs", "0.5", "--threshold", "youden")


def start(*arguments, cwd) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # What a shell starts in the background ignores SIGINT, and would hand that down.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=cwd, text=True, **options)


def weights_of(folder, name="ckpt.pt", key="state_dict"):
    return models.load(folder / name, models.FORMAT if name == "ckpt.pt" else train.LAST_FORMAT)[key]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_times(folder) -> dict:
    """metrics.json but for what a clock or the folder's name decides."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for entry in [metrics, *metrics["epochs"]]:
        entry.pop("seconds", None), entry.pop("images_per_second", None)
    return metrics


def test_learning_rate_is_a_warm_up_and_a_cosine():
    rates = [train.learning_rate(s, 100, 10, 2.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] < 0.001 and rates[9:] == sorted(rates[9:], reverse=True)
    assert train.learning_rate(0, 10, 0, 1.0) == 1.0


def test_class_weights_make_classes_count_the_same():
    labels = torch.tensor([0, 1, 1, 1])
    weights = train.class_weights(labels, 2, True)
    assert weights.tolist() == pytest.approx([2.0, 2 / 3])
    assert float(weights[labels].mean()) == pytest.approx(1)
    assert train.class_weights(labels, 2, False).tolist() == [1.0, 1.0]


def test_what_a_run_writes(run_folder, demo):
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["finished"] and [e["epoch"] for e in metrics["epochs"]] == [1, 2]
    assert metrics["arguments"]["epochs"] == 2 and metrics["data"]["demo"] is True
    assert metrics["weights"]["source"] == "random"
    lines = (run_folder / "splits.csv").read_text().splitlines()
    assert lines[0] == "path,class,patient,subtype,split,demo"
    assert len(lines) - 1 == sum(metrics["data"]["images"].values())
    assert not any("test/" in line for line in lines)
    ckpt = models.load(run_folder / "ckpt.pt")
    best = metrics["epochs"][metrics["best_epoch"] - 1]
    assert ckpt["epoch"] == metrics["best_epoch"]
    top = max(e["val_auroc"] for e in metrics["epochs"])
    ill = sum(",val," in line and "PNEUMONIA" in line for line in lines)
    error = evaluate.auroc_error(top, ill, metrics["data"]["images"]["val"] - ill)
    assert ckpt["epoch"] == max(e["epoch"] for e in metrics["epochs"] if e["val_auroc"] >= top - error)
    assert ckpt["validation"]["val_auroc"] == best["val_auroc"]
    assert 0 < ckpt["threshold"]["value"] < 1 and "stressed" in ckpt["threshold"]["from"]
    assert ckpt["data"]["demo"] and ckpt["data"]["fingerprint"] == metrics["data"]["fingerprint"]
    held_out = {line.split(",")[0] for line in lines if line.endswith(",val,phantom")}
    assert set(ckpt["data"]["val"]) == held_out and held_out


def test_the_longest_trained_of_equally_good_epochs_is_selected(demo, tmp_path, monkeypatch):
    """2 and 3 lie within an error of the best, which 3 itself raises; 4 lies far below; patience counts from 3."""
    areas = iter([0.90, 0.95, 0.951, 0.60, 0.949, 0.94, 0.93, 0.92])
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda *args: validate(*args) | {"val_auroc": next(areas)})
    monkeypatch.setattr(evaluate, "auroc_error", lambda area, *sides: 0.005)
    arguments = ("--data", demo, *SHORT, "--epochs", 8, "--output", "r")
    done = run_script("train.py", *arguments, "--patience", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert (len(metrics["epochs"]), metrics["best_epoch"]) == (7, 5)
    assert models.load(tmp_path / "r" / "ckpt.pt")["epoch"] == 5


def test_repeatable_to_the_bit_and_seeds_differ(demo, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = run_script(
            "train.py", "--data", demo, *SHORT, "--epochs", 1, "--seed", seed, "--output", name, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    a, b, c = (tmp_path / n for n in "abc")
    assert same(weights_of(a), weights_of(b)) and without_times(a) == without_times(b)
    assert (a / "ckpt.pt").read_bytes() == (b / "ckpt.pt").read_bytes()
    assert not same(weights_of(a), weights_of(c))


def test_a_killed_run_ends_as_one_that_was_not(demo, tmp_path):
    """SIGKILL at several moments, the first seconds and a save included; then --resume: the same bits everywhere."""
    arguments = ("--data", demo, *SHORT, "--epochs", 4)
    done = run_script("train.py", *arguments, "--output", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    process = start(*arguments, "--output", "cut", cwd=tmp_path)
    for line in process.stdout:
        if line.strip().startswith("2 "):
            break
    process.kill()
    process.communicate()
    # As if killed while saving: half a file under its temporary name, and a checkpoint newer than the state.
    (tmp_path / "cut" / ".last.pt.1.tmp").write_bytes(b"half")
    assert len(json.loads((tmp_path / "cut" / "metrics.json").read_text())["epochs"]) in (1, 2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for _ in range(2):  # a run that is finished stays as it is
        done = run_script("train.py", "--resume", "cut", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert without_times(whole) == without_times(cut)
    assert (whole / "ckpt.pt").read_bytes() == (cut / "ckpt.pt").read_bytes()
    assert (whole / "splits.csv").read_bytes() == (cut / "splits.csv").read_bytes()
    for key in ("model", "ema"):
        assert same(weights_of(whole, "last.pt", key), weights_of(cut, "last.pt", key))
    assert weights_of(whole, "last.pt", "best") == weights_of(cut, "last.pt", "best")


def test_a_run_killed_before_its_first_state_starts_again(run_folder, tmp_path):
    """metrics.json comes first and holds the arguments: that is enough to resume. The default threshold rule."""
    shutil.copytree(run_folder, tmp_path / "run")
    for name in ("last.pt", "ckpt.pt", "splits.csv"):
        (tmp_path / "run" / name).unlink()
    for _ in range(2):
        done = run_script("train.py", "--resume", "run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / "ckpt.pt").read_bytes() == (run_folder / "ckpt.pt").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_run_whose_checkpoint_is_lost_does_not_go_on(run_folder, tmp_path, damage):
    shutil.copytree(run_folder, tmp_path / "run")
    ckpt = tmp_path / "run" / "ckpt.pt"
    ckpt.unlink() if damage == "missing" else ckpt.write_bytes(ckpt.read_bytes()[:1000])
    before = (tmp_path / "run" / "last.pt").read_bytes()
    done = run_script("train.py", "--resume", "run", "--epochs", 3, cwd=tmp_path)
    assert done.returncode == 2 and "start a new one" in done.stderr.splitlines()[-1]
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_damaged_arguments_are_no_run(run_folder, tmp_path):
    for arguments in ({}, [], {"epochs": 3}):
        (tmp_path / "metrics.json").write_text(json.dumps({"arguments": arguments}))
        done = run_script("train.py", "--resume", ".", cwd=tmp_path)
        assert done.returncode == 2 and "holds no run" in done.stderr and len(done.stderr.splitlines()) == 1


def test_interruption_says_how_to_go_on(demo, tmp_path):
    process = start("--data", demo, *SHORT, "--epochs", 50, "--output", "r", cwd=tmp_path)
    for line in process.stdout:
        if line.strip().startswith("1 "):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "python train.py --resume r" in err and "Traceback" not in err


def test_resume_takes_the_runs_arguments(run_folder, demo, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    for contradiction in (("--seed", "5"), ("--batch-size", "8"), ("--model", "resnet18"), ("--no-balance",)):
        done = run_script("train.py", "--resume", "run", *contradiction, cwd=tmp_path)
        assert done.returncode == 2 and contradiction[0].removeprefix("--no-") in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = run_script("train.py", "--resume", "run", "--epochs", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"]) == 3
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    done = run_script("train.py", "--data", demo, *SHORT, "--output", "run", cwd=tmp_path)
    assert done.returncode == 2 and "--resume run" in done.stderr
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


def test_two_processes_see_what_one_sees(demo, tmp_path):
    """One image more or less would change the losses; gradients that are not shared would change the weights."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = ["--data", demo, "--no-pretrained", "--img-size", 32, "--epochs", 1, "--threshold", "0.5"]
    # A model whose output for an image does not depend on the others of its batch: the losses must agree closely.
    arguments += [
        "--model",
        "convnext_atto",
        "--augment",
        "none",
        "--device",
        "cpu",
        "--warmup-epochs",
        0,
        "--lr",
        1e-4,
    ]
    one = run_script("train.py", *arguments, "--batch-size", 16, "--output", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command += [str(ROOT / "train.py"), *map(str, arguments), "--batch-size", "8", "--output", "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert two.returncode == 0, two.stderr
    assert len(list(tmp_path.iterdir())) == 2
    a, b = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two"))
    assert a["data"] == b["data"]
    assert (tmp_path / "one" / "splits.csv").read_bytes() == (tmp_path / "two" / "splits.csv").read_bytes()
    assert math.isclose(a["epochs"][0]["val_loss"], b["epochs"][0]["val_loss"], rel_tol=1e-5)
    assert math.isclose(a["epochs"][0]["train_loss"], b["epochs"][0]["train_loss"], rel_tol=1e-5)
    one, two = (weights_of(tmp_path / n, "last.pt", "model") for n in ("one", "two"))
    # Every step moves each weight by about the rate, 1e-4, where it is not the same gradient in another direction.
    apart = torch.cat([(one[k] - two[k]).abs().flatten() for k in one])
    assert apart.mean() < 2e-6
    done = run_script("train.py", "--resume", "two", cwd=tmp_path)
    assert done.returncode == 2 and "was started with 2 processes, not 1" in done.stderr


def test_a_rank_that_dies_ends_the_run(demo, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    command += [str(ROOT / "train.py"), "--data", str(demo), *SHORT, "--epochs", "500", "--output", "r"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "r" / "ckpt.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    children = [int(p) for p, parent in (x.split() for x in listing.splitlines()[1:]) if int(parent) == process.pid]
    os.kill(max(children), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--epochs", "0"], "--epochs: 0 is not in [1, inf]"),
        (["--epochs", "x"], "invalid int value"),
        (["--model", "mobilenetv3_smal_050", "--no-pretrained"], "mobilenetv3_small_050"),
        (["--device", "cuda:77", "--no-pretrained"], "--device cuda:77"),
        (["--weights", "none.pt"], "weights file none.pt does not exist"),
        (["--weights", "x.pt", "--pretrained"], "not allowed with argument"),
        (["--threshold", "best"], "--threshold"),
        (["--threshold", "sensitivity=youden"], "--threshold"),
        (["--seed", "-1"], "--seed"),
        (["--model", "convnext_atto", "--no-pretrained", "--img-size", "4"], "does not take 4 x 4 pixels"),
        (["--lr", "-1"], "--lr: -1 is not in"),
        (["--resume", "nowhere"], "holds no run"),
        (["--pretrained"], "no pretrained weights"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(arguments, message, demo, tmp_path):
    where = [] if "--data" in arguments else ["--data", demo]
    done = run_script("train.py", *where, "--img-size", 32, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING: DEMO")]
    assert len(errors) == 1 and message in errors[0], done.stderr


def test_a_loss_that_is_not_finite_is_named(demo, tmp_path):
    done = run_script("train.py", "--data", demo, *SHORT, "--lr", "1e30", "--output", "r", cwd=tmp_path)
    assert done.returncode == 2
    assert "not finite in epoch 1" in done.stderr and "Traceback" not in done.stderr
    assert models.load(tmp_path / "r" / "last.pt", train.LAST_FORMAT)["history"] == []


def test_a_full_disk_loses_nothing(demo, tmp_path):
    """A limit on the size of files stands in for a full disk: what was saved before is still there and goes on."""
    done = run_script("train.py", "--data", demo, *SHORT, "--epochs", 1, "--output", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "r" / "last.pt").read_bytes()
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['train.py', '--resume', 'r', '--epochs', '2'];"
        "import train; train.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "go on with --resume r" in done.stderr.splitlines()[-1]
    assert (tmp_path / "r" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "r").glob(".*.tmp"))


def test_help_is_grouped_and_short():
    parser = train.make_parser()
    flags = [a for a in parser._actions if a.option_strings]
    assert len(flags) <= 31
    assert all(a.type is not bool for a in flags)
    assert parser.parse_args([]).patience == 0  # a cosine that is cut off never reaches its low rates
    text = parser.format_help()
    assert all(f"\n{group}:" in text for group in ("data", "model", "recipe", "run")) and "(default: 64)" in text
