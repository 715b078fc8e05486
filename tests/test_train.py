"""train.py: its pure parts, and the real script: what it learns from, killed, resumed, in two processes."""

import csv
import json
import math
import resource
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

import data
import evaluate
import models
import train

SHORT = ("--no-pretrained", "--img-size", "32", "--batch-size", "16", "--warmup-epochs", "0.5")


def run_train(folder, *arguments, code=0):
    """train.py in this process; its output as a whole and its last line on stderr."""
    done = run_script("train.py", *arguments, cwd=folder)
    assert done.returncode == code, done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr, last=(done.stderr.splitlines() or [""])[-1])


def start(*arguments, cwd) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    # What a shell starts in the background ignores SIGINT, and would pass that on.
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=cwd, **options)


def wait_for_epoch(process, epoch):
    for line in process.stdout:
        if line.strip().startswith(f"{epoch} "):
            return


def state_of(folder):
    return models.load(folder / "last.pt", train.STATE_FORMAT)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def are_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_times(folder) -> dict:
    """metrics.json without what a clock decides."""
    metrics = metrics_of(folder)
    del metrics["seconds"]
    for epoch_log in metrics["epochs"]:
        del epoch_log["seconds"], epoch_log["images_per_second"]
    return metrics


# --- pure parts ---


def test_learning_rate_is_a_warm_up_and_a_cosine():
    rates = [train.learning_rate(s, 100, 10, 2.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] < 0.001 and rates[9:] == sorted(rates[9:], reverse=True)
    assert train.learning_rate(0, 10, 0, 1.0) == 1.0


@pytest.mark.parametrize(
    ("aurocs", "selected"),
    [
        ([], 0),
        ([0.9], 1),
        ([0.90, 0.95, 0.951], 3),
        ([0.90, 0.95, 0.951, 0.60], 3),
        ([0.90, 0.95, 0.951, 0.60, 0.949], 5),  # within a standard error of the best: the longer trained
        ([0.90, 0.95, 0.951, 0.60, 0.949, 0.944], 5),
    ],
)
def test_selected_is_the_latest_epoch_within_a_standard_error_of_the_best(monkeypatch, aurocs, selected):
    monkeypatch.setattr(data, "auroc_error", lambda auroc, n_positive, n_negative: 0.005)
    history = [{"epoch": i, "val_auroc": auroc} for i, auroc in enumerate(aurocs, 1)]
    assert train.selected_epoch(history, 10, 10) == selected


def test_the_loss_counts_classes_the_same_in_every_batch():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
    labels = torch.tensor([0, 1, 1])
    each = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(0.5))]
    loss = train.weighted_loss(logits, labels, torch.tensor([2.0, 0.5]))
    assert float(loss) == pytest.approx((2 * each[0] + 0.5 * each[1] + 0.5 * each[2]) / 3)


def learner_of(model, **options):
    args = train.make_parser().parse_args([])
    return train.make_learner(model, SimpleNamespace(**{**vars(args), **options}), torch.device("cpu"))


def test_layers_keep_their_own_share_of_the_rate():
    learner = learner_of(models.build("vit_tiny_patch16_224", 2, 32), layer_decay=0.5)
    loader = [(torch.ones(2, 1, 32, 32), torch.tensor([0, 1]))]
    train.train_epoch(learner, torch.ones(2), loader, [0.5], 0, torch.float32)
    rates = {group["lr"] for group in learner.optimizer.param_groups}
    assert max(rates) == 0.5 and min(rates) == pytest.approx(0.5 * 0.5**13)


def test_weights_decay_and_norms_and_biases_do_not():
    learner = learner_of(models.build("mobilenetv3_small_050", 2, 32))
    decays = {}
    for group in learner.optimizer.param_groups:
        for parameter in group["params"]:
            decays.setdefault(parameter.ndim > 1, set()).add(group["weight_decay"])
    assert decays == {True: {0.05}, False: {0.0}}


def test_the_cpu_computes_in_float32_unless_asked():
    cpu = torch.device("cpu")
    assert train.pick_dtype("auto", cpu) == torch.float32
    assert train.pick_dtype("bf16", cpu) == torch.bfloat16


# --- operating point ---


def test_the_border_tells_nothing_of_the_class_after_weighting():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3000)
    border = rng.normal(labels * 2.0)
    weights, how = train.image_weights(labels, border)
    assert "tercile" in how
    terciles = np.searchsorted(np.quantile(border, (1 / 3, 2 / 3)), border)
    share = [weights[(terciles == t) & (labels == 1)].sum() / weights[terciles == t].sum() for t in range(3)]
    assert share == pytest.approx([0.5, 0.5, 0.5])
    separated, how = train.image_weights(labels, labels * 10.0)  # a tercile lacks a class
    assert "tercile" not in how
    assert separated[labels == 0].sum() == pytest.approx(separated[labels == 1].sum())


def operating_point(z, labels, border=None, rule="0.5"):
    """Of one logit an image, [copies, n]."""
    z = np.atleast_2d(z)
    return train.fit_operating_point(np.stack([-z / 2, z / 2], 2), np.asarray(labels), border, rule)


def test_platt_finds_slope_and_intercept_at_equal_prevalence():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2, 60_000)
    labels = (rng.random(60_000) < 1 / (1 + np.exp(-truth))).astype(int)
    rare = np.flatnonzero((labels == 0) | (rng.random(60_000) < 0.25))  # the prevalence falls: the weights undo it
    found = operating_point(3 * truth[rare] + 1, labels[rare])
    assert found["slope"] == pytest.approx(1 / 3, abs=0.01) and found["intercept"] == pytest.approx(-1 / 3, abs=0.05)
    assert found["threshold"]["logit"] == 0 and found["threshold"]["value"] == 0.5


def test_separated_classes_get_a_finite_slope_and_no_better_than_chance_a_small_one(capsys):
    labels = np.repeat([0, 1], 20)
    assert 0 < operating_point(labels * 2.0 - 1, labels)["slope"] < 10
    assert operating_point(1 - labels * 2.0, labels)["slope"] == train.LEAST_SLOPE
    assert "train longer" in capsys.readouterr().err


def test_a_steep_calibration_keeps_its_cut():
    """The threshold is on the calibrated logit: as a probability it would be 1."""
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 50)
    z = np.where(labels, 1000.0, 990.0) + rng.normal(0, 0.1, 100)
    found = operating_point(z, labels, rule="youden")
    checkpoint = {**found, "slope": 10.0, "intercept": -9000.0}
    checkpoint["threshold"] = {**found["threshold"], "logit": 950.0}
    logits = torch.tensor([[-497.0, 497.0], [-498.0, 498.0]], dtype=torch.float64)
    assert models.decide(logits, checkpoint).predicted.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rule", "cut"),
    [("0.2", math.log(0.25)), ("youden", 1.5), ("sensitivity=0.75", 1.5), ("sensitivity=1", -0.5)],
)
def test_a_threshold_rule_chooses_half_way_between_two_images(rule, cut):
    z, labels = np.array([-2.0, -1, 0, 1, 2, 3, 4]), np.array([0, 0, 1, 0, 1, 1, 1])
    assert train.choose_cut(rule, labels == 1, z, np.ones(7)) == pytest.approx(cut)


def test_three_classes_get_a_slope_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (20_000, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((20_000, 1)) > p.cumsum(1)).sum(1)
    found = train.fit_operating_point(4 * logits[None], labels, None, "0.5")
    assert found["slope"] == pytest.approx(0.25, abs=0.02) and found["intercept"] == 0
    assert found["threshold"]["value"] is None


# --- what it learns from ---


@pytest.fixture(scope="module")
def watched(demo, tmp_path_factory):
    """Two epochs in the same order, and what went into each step: images, labels, class weights, rates."""
    folder = tmp_path_factory.mktemp("watched")
    seen = SimpleNamespace(x=[], y=[], class_weights=[], rates=[], folder=folder / "r")
    train_epoch, loss = train.train_epoch, train.weighted_loss

    def watch_epoch(learner, class_weights, loader, rates, *rest):
        seen.rates += rates
        batches = list(loader)
        seen.x.append(torch.cat([x for x, _ in batches]))
        seen.y.append(torch.cat([y for _, y in batches]))
        return train_epoch(learner, class_weights, batches, rates, *rest)

    def watch_loss(logits, labels, class_weights):
        seen.class_weights.append(class_weights)
        return loss(logits, labels, class_weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", watch_epoch)
        patch.setattr(train, "weighted_loss", watch_loss)
        patch.setattr(data, "shuffle", lambda count, seed, epoch: torch.arange(count))
        run_train(folder, "--data", demo, *SHORT, "--img-size", 64, "--epochs", 2, "--output", "r")
    return seen


def test_each_epoch_sees_each_image_changed_in_another_way(watched):
    first, second = watched.x
    assert first.shape[1:] == (1, 32, 32) or first.shape[1:] == (1, 64, 64)
    assert first.shape[-1] == 32 * round(64 * 0.75 / 32)  # training at 3/4 of the size
    assert all((a - b).abs().mean() > 0.02 for a, b in zip(first, second))


def test_labels_are_the_folders_and_the_positive_class_is_the_last(watched):
    rows = [r for r in rows_of(watched.folder / "splits.csv") if r["split"] == "train"]
    expected = [int(r["class"] == "PNEUMONIA") for r in rows]
    assert watched.y[0].tolist() == expected[: len(watched.y[0])] == watched.y[1].tolist()
    assert models.load(watched.folder)["classes"] == ["NORMAL", "PNEUMONIA"]


def test_the_loss_gets_weights_that_make_the_classes_equal(watched):
    rows = [r for r in rows_of(watched.folder / "splits.csv") if r["split"] == "train"]
    n_positive = sum(r["class"] == "PNEUMONIA" for r in rows)
    expected = [len(rows) / 2 / (len(rows) - n_positive), len(rows) / 2 / n_positive]
    assert watched.class_weights[0].tolist() == pytest.approx(expected) and expected[0] > 1.5 * expected[1]


def test_the_rate_warms_up_to_its_peak_and_falls_to_almost_nothing(watched):
    rates = watched.rates
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.003) and 0 < peak < len(rates) / 2
    assert rates[0] <= 0.5 * max(rates) and rates[-1] < 0.1 * max(rates)


def test_validated_and_kept_are_the_averaged_weights(watched):
    state, checkpoint = state_of(watched.folder), models.load(watched.folder)
    assert checkpoint["epoch"] == 2 and are_equal(checkpoint["state_dict"], state["average"])
    moved = [(state["average"][k] - v).abs().mean() for k, v in state["model"].items() if v.is_floating_point()]
    assert max(moved) > 1e-4  # the average lags behind
    start = models.build("mobilenetv3_small_050", 2, 64).state_dict()
    assert not torch.equal(state["average"]["bn1.running_mean"], start["bn1.running_mean"])
    scores = evaluate_val(watched.folder)
    assert scores["metrics"]["auroc"]["value"] == pytest.approx(state["history"][-1]["val_auroc"], abs=1e-12)


def evaluate_val(folder):
    done = run_script("evaluate.py", folder, "--split", "val", "--bootstrap", 0, "--json", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_augmentation_training_sees_what_evaluation_sees(demo, tmp_path, monkeypatch):
    seen = []
    train_epoch = train.train_epoch

    def watch(learner, class_weights, loader, *rest):
        batches = list(loader)
        seen.extend(x for x, _ in batches)
        return train_epoch(learner, class_weights, batches, *rest)

    monkeypatch.setattr(train, "train_epoch", watch)
    monkeypatch.setattr(data, "shuffle", lambda count, seed, epoch: torch.arange(count))
    run_train(tmp_path, "--data", demo, *SHORT, "--augment", "none", "--epochs", 1, "--output", "r")
    checkpoint = models.load(tmp_path / "r")
    for row, x in zip([r for r in rows_of(tmp_path / "r" / "splits.csv") if r["split"] == "train"], torch.cat(seen)):
        image, _ = data.read_image(demo / row["path"], 32)
        torch.testing.assert_close(data.normalise(data.to_float(torch.from_numpy(image)[None]), checkpoint)[0], x)


def test_it_learns_and_what_it_learnt_is_found_by_evaluation(tmp_path):
    """Labels inverted or shuffled anywhere between the folders and the report would show here."""
    data.draw_demo(tmp_path / "d", images=400, seed=1)
    recipe = ("--model", "resnet10t", "--no-pretrained", "--img-size", 64, "--batch-size", 16, "--epochs", 5)
    recipe += ("--lr", 0.006)
    run_train(tmp_path, "--data", "d", *recipe, "--output", "r")
    done = run_script("evaluate.py", "r", "--bootstrap", 0, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["auroc"]["value"] > 0.9 and metrics["balanced_accuracy"]["value"] > 0.75


def test_an_epoch_that_is_worse_is_not_kept(demo, tmp_path, monkeypatch):
    aurocs = iter([0.6, 0.95, 0.5])
    monkeypatch.setattr(evaluate, "macro_auroc", lambda *_: next(aurocs))
    done = run_train(tmp_path, "--data", demo, *SHORT, "--epochs", 3, "--output", "r")
    checkpoint, metrics = models.load(tmp_path / "r"), metrics_of(tmp_path / "r")
    assert checkpoint["epoch"] == metrics["best_epoch"] == 2 and checkpoint["epochs"] == 3
    assert checkpoint["validation"]["val_auroc"] == 0.95 and "selected: epoch 2 of 3" in done.out
    assert not are_equal(checkpoint["state_dict"], state_of(tmp_path / "r")["average"])


def test_the_operating_point_rests_on_stressed_copies(demo, tmp_path, monkeypatch):
    arguments = ("--data", demo, *SHORT, "--epochs", 1, "--output")
    run_train(tmp_path, *arguments, "plain")
    ask = evaluate.ask

    def right_under_stress(model, folder, index, *rest, **options):
        logits, border = ask(model, folder, index, *rest, **options)
        z = np.array([4.0 if folder.records[i].label == "PNEUMONIA" else -2.0 for i in index.tolist()])
        return {**dict.fromkeys(logits, np.stack([-z / 2, z / 2], 1)), "clean": logits["clean"]}, border

    monkeypatch.setattr(evaluate, "ask", right_under_stress)
    run_train(tmp_path, *arguments, "right")
    plain, right = models.load(tmp_path / "plain"), models.load(tmp_path / "right")
    assert are_equal(plain["state_dict"], right["state_dict"])
    assert abs(math.log(right["slope"] / plain["slope"])) > 1
    assert "18 stressed copies" in plain["threshold"]["from"]


# --- what a run writes ---


def test_what_a_run_writes(run_folder):
    metrics = metrics_of(run_folder)
    assert metrics["finished"] and [e["epoch"] for e in metrics["epochs"]] == [1, 2]
    assert metrics["arguments"]["epochs"] == 2 and metrics["data"]["demo"] is True
    assert metrics["origin"]["source"] == "random" and metrics["lengths"] == [2]
    rows = rows_of(run_folder / "splits.csv")
    assert list(rows[0]) == ["path", "class", "patient", "subtype", "split", "demo"]
    assert len(rows) == sum(metrics["data"]["images"].values())
    assert not any("test/" in r["path"] for r in rows)
    checkpoint = models.load(run_folder / "ckpt.pt")
    best = metrics["epochs"][metrics["best_epoch"] - 1]
    assert checkpoint["epoch"] == metrics["best_epoch"] and checkpoint["finished"] and checkpoint["epochs"] == 2
    assert checkpoint["validation"]["val_auroc"] == best["val_auroc"]
    assert checkpoint["data"] == metrics["data"] and metrics["data"]["demo"]
    for key, split in (("trained_on", "train"), ("chosen_on", "val")):
        patients = [r["patient"] for r in rows if r["split"] == split]
        traces = checkpoint[key]
        assert set(traces["patients"]) == set(patients) and len(traces["hashes"]) == len(patients) > 0


def test_the_split_depends_on_folds_and_fold_alone(demo, tmp_path):
    held_out = []
    for name, options in (("a", ("--seed", 1)), ("b", ("--seed", 2)), ("c", ("--fold", 1))):
        run_train(tmp_path, "--data", demo, *SHORT, *options, "--folds", 5, "--epochs", 1, "--output", name)
        held_out.append({r["path"] for r in rows_of(tmp_path / name / "splits.csv") if r["split"] == "val"})
    assert held_out[0] == held_out[1] and not held_out[0] & held_out[2]
    assert not are_equal(models.load(tmp_path / "a")["state_dict"], models.load(tmp_path / "b")["state_dict"])


def test_the_positive_class_is_said_and_can_be_set(tmp_path):
    for label in ("COVID", "NEUMONIA"):
        (tmp_path / "d" / "train" / label).mkdir(parents=True)
        for i in range(12):
            image = np.random.default_rng([i, len(label)]).integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "d" / "train" / label / f"{i}.png")
    common = ("--data", "d", *SHORT, "--folds", 3, "--epochs", 1, "--output")
    guessed = run_train(tmp_path, *common, "guessed")
    assert "positive class: NEUMONIA" in guessed.out and "guess" in guessed.err
    asked = run_train(tmp_path, *common, "asked", "--positive", "COVID")
    assert "positive class: COVID" in asked.out and "guess" not in asked.err
    assert models.load(tmp_path / "asked")["classes"] == ["NEUMONIA", "COVID"]


def test_an_unfinished_run_of_three_classes_has_no_threshold(tmp_path, monkeypatch):
    for label in "ABC":
        (tmp_path / "d" / "train" / label).mkdir(parents=True)
        for i in range(12):
            image = np.random.default_rng([i, ord(label)]).integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "d" / "train" / label / f"{i}.png")
    monkeypatch.setattr(train, "finish_checkpoint", lambda *_: None)  # as if it were killed before
    run_train(tmp_path, "--data", "d", *SHORT, "--folds", 3, "--epochs", 1, "--output", "r")
    assert models.load(tmp_path / "r")["threshold"]["value"] is None
    done = run_script("predict.py", "--ckpt", "r", "--cam", "maps", "d/train/A/0.png", cwd=tmp_path)
    assert done.returncode == 0 and "P(label)" in done.stdout, done.stderr


def test_a_run_from_anothers_weights_knows_what_that_one_saw(run_folder, demo, tmp_path):
    common = ("--data", demo, *SHORT[1:], "--img-size", 64, "--epochs", 1, "--weights", run_folder)
    assert "LEAK" not in run_train(tmp_path, *common, "--output", "same").err
    other = run_train(tmp_path, *common, "--fold", 3, "--output", "other")
    rows = rows_of(tmp_path / "other" / "splits.csv")
    n_val = sum(r["split"] == "val" for r in rows)
    (leak,) = [line for line in other.err.splitlines() if "LEAK" in line]
    assert f"{n_val} of the {n_val} validation images" in leak
    # A third generation still knows the patients of the first.
    traces = models.load(tmp_path / "other")["trained_on"]
    assert set(traces["patients"]) == {r["patient"] for r in rows} and len(traces["hashes"]) == len(rows)


def test_a_frozen_backbone_does_not_move_nor_do_its_statistics(demo, tmp_path):
    run_train(tmp_path, "--data", demo, *SHORT, "--epochs", 1, "--freeze", "--output", "r")
    state = state_of(tmp_path / "r")["model"]
    torch.manual_seed(0)
    first = models.build("mobilenetv3_small_050", 2, 32).state_dict()
    changed = {name for name, value in state.items() if not torch.equal(value, first[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_copies_of_training_images_in_an_own_validation_folder_are_said(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "d")
    for i, path in enumerate(sorted((tmp_path / "d" / "train").rglob("*.jpeg"))):
        for j in range(2):
            copy = tmp_path / "d" / "val" / path.parent.name / f"copy{i}-{j}.jpeg"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes() + bytes(j + 1))  # other bytes, the same radiograph
    done = run_train(tmp_path, "--data", "d", *SHORT, "--epochs", 1, "--output", "r")
    (leak,) = [line for line in done.err.splitlines() if "LEAK" in line]
    assert "this run is trained on 192 of the 192 validation images" in leak


def test_two_runs_in_one_second_get_two_folders(demo, tmp_path, monkeypatch):
    class Clock(train.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 1)

    monkeypatch.setattr(train, "datetime", Clock)
    for _ in range(2):
        run_train(tmp_path, "--data", demo, *SHORT, "--epochs", 1)
    found = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert found == ["20260101-000000-mobilenetv3_small_050", "20260101-000000-mobilenetv3_small_050-2"]


# --- interruption and resume ---


def test_a_killed_run_ends_like_one_that_was_not(demo, tmp_path):
    """SIGKILL while training; then --resume: the same bits everywhere as a run with the same arguments."""
    arguments = ("--data", demo, *SHORT, "--epochs", 4)
    run_train(tmp_path, *arguments, "--output", "whole")
    process = start(*arguments, "--output", "cut", cwd=tmp_path)
    wait_for_epoch(process, 2)
    in_use = run_train(tmp_path, "--resume", "cut", code=2)
    assert "another process is training in cut" in in_use.last
    process.kill()
    process.communicate()
    (tmp_path / "cut" / ".last.pt.1.tmp").write_bytes(b"half")  # as if killed while saving
    assert len(metrics_of(tmp_path / "cut")["epochs"]) < 4
    assert models.load(tmp_path / "cut")["finished"] is False
    (tmp_path / "cut" / "report.md").write_text("of the half-trained model")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_train(tmp_path, "--resume", "cut")
    again = run_train(tmp_path, "--resume", "cut")  # a finished run stays as it is
    assert "cut is finished; --epochs N" in again.out
    assert without_times(whole) == without_times(cut)
    for name in ("ckpt.pt", "splits.csv"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert are_equal(state_of(whole)["model"], state_of(cut)["model"])
    assert not list(cut.glob(".*.tmp")) and not (cut / "report.md").exists()
    assert (cut / "report.md.old").read_text() == "of the half-trained model"


def change_an_image(root):
    path = next((root / "train" / "NORMAL").iterdir())
    Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)


def alter_the_checkpoint(**fields):
    def alter(root):
        path = root.parent / "run" / "ckpt.pt"
        checkpoint = models.load(path)
        arguments = {**checkpoint["arguments"], **fields.pop("arguments", {})}
        models.save({**checkpoint, "arguments": arguments, **fields}, path)

    return alter


def truncate_the_checkpoint(root):
    path = root.parent / "run" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:1000])


def alter_the_state(root):
    path = root.parent / "run" / "last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_an_image, "not those that the run"),
        (alter_the_checkpoint(epoch=0), "does not belong to"),
        (alter_the_checkpoint(arguments={"seed": 1}), "does not belong to"),
        (truncate_the_checkpoint, "ckpt.pt is damaged"),
        (lambda root: (root.parent / "run" / "ckpt.pt").unlink(), "ckpt.pt does not exist"),
        (alter_the_state, "last.pt is damaged"),
    ],
)
def test_a_run_continues_with_its_own_data_and_files_alone(run_folder, demo, tmp_path, change, message):
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.copytree(demo, tmp_path / "moved")
    change(tmp_path / "moved")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    refused = run_train(tmp_path, "--resume", "run", "--data", "moved", "--epochs", 3, code=2)
    assert message in refused.last and (tmp_path / "run" / "last.pt").read_bytes() == before


def test_resume_has_the_runs_arguments_and_takes_moved_data_and_more_epochs(run_folder, demo, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.copytree(demo, tmp_path / "moved")
    for contradiction in (("--seed", "5"), ("--batch-size", "8"), ("--model", "resnet18"), ("--no-balance",)):
        refused = run_train(tmp_path, "--resume", "run", *contradiction, code=2)
        assert contradiction[0].removeprefix("--no-") in refused.last and len(refused.err.splitlines()) == 1
    fewer = run_train(tmp_path, "--resume", "run", "--epochs", "1", "--data", "moved", code=2)
    assert "has made 2 epochs already" in fewer.last
    done = run_train(tmp_path, "--resume", "run", "--epochs", "3", "--data", "moved")
    assert "follow the schedule of the new length" in done.err
    assert metrics_of(tmp_path / "run")["lengths"] == [2, 3] == models.load(tmp_path / "run")["lengths"]
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    refused = run_train(tmp_path, "--data", demo, *SHORT, "--output", "run", code=2)
    assert "--resume run" in refused.last and (tmp_path / "run" / "ckpt.pt").read_bytes() == before


def test_an_interrupted_extension_continues_by_itself(run_folder, tmp_path, monkeypatch):
    """More epochs, asked for once, are known from then on; metrics.json is written and never read."""
    shutil.copytree(run_folder, tmp_path / "run")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", interrupt)
        done = run_train(tmp_path, "--resume", "run", "--epochs", 3, code=130)
    assert done.last == "interrupted; continue with: python train.py --resume run"
    assert metrics_of(tmp_path / "run")["finished"] is False
    (tmp_path / "run" / "metrics.json").write_text("{}")
    run_train(tmp_path, "--resume", "run")
    assert len(metrics_of(tmp_path / "run")["epochs"]) == 3 and metrics_of(tmp_path / "run")["finished"]


def test_a_terminated_run_says_how_to_continue(demo, tmp_path):
    process = start("--data", demo, *SHORT, "--epochs", 500, "--output", "a run", cwd=tmp_path)
    wait_for_epoch(process, 1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted; continue with: python train.py --resume 'a run'"


def test_a_full_disk_loses_nothing(run_folder, tmp_path):
    """A limit on the size of files replaces a full disk: what was saved before is still there and continues."""
    shutil.copytree(run_folder, tmp_path / "r")
    before = (tmp_path / "r" / "last.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        done = run_train(tmp_path, "--resume", "r", "--epochs", 3, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "continue with: python train.py --resume r" in done.last
    assert (tmp_path / "r" / "last.pt").read_bytes() == before and not list((tmp_path / "r").glob(".*.tmp"))


def test_a_loss_that_is_not_finite_is_named(demo, tmp_path):
    done = run_train(tmp_path, "--data", demo, *SHORT, "--lr", "1e30", "--output", "r", code=2)
    assert "not finite in step" in done.last and "Traceback" not in done.err
    assert state_of(tmp_path / "r")["history"] == []


# --- several processes ---


def test_two_processes_see_what_one_sees(demo, tmp_path):
    """One image more or less would change the losses; gradients that are not shared would change the weights."""
    # A model whose output for an image does not depend on the others of its batch: the losses must agree closely.
    arguments = ["--data", demo, "--model", "convnext_atto", "--no-pretrained", "--augment", "none", "--device", "cpu"]
    arguments += ["--img-size", 32, "--epochs", 1, "--warmup-epochs", 0, "--lr", 1e-4]
    run_train(tmp_path, *arguments, "--batch-size", 16, "--output", "one")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command += map(str, [ROOT / "train.py", *arguments, "--batch-size", 8, "--output", "two"])
    two = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert two.returncode == 0, two.stderr
    a, b = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert a["data"] == b["data"]
    assert (tmp_path / "one" / "splits.csv").read_bytes() == (tmp_path / "two" / "splits.csv").read_bytes()
    for loss in ("val_loss", "train_loss"):
        assert math.isclose(a["epochs"][0][loss], b["epochs"][0][loss], rel_tol=1e-5)
    one, two = state_of(tmp_path / "one")["model"], state_of(tmp_path / "two")["model"]
    # Every step moves each weight by about the rate, 1e-4, unless the gradient has another direction.
    apart = torch.cat([(one[k] - two[k]).abs().flatten() for k in one])
    assert apart.mean() < 2e-6
    refused = run_train(tmp_path, "--resume", "two", code=2)
    assert "was started with 2 processes, not 1" in refused.last


def test_help_is_grouped_and_short():
    parser = train.make_parser()
    flags = [a for a in parser._actions if a.option_strings]
    assert len(flags) <= 28 and all(a.type is not bool for a in flags)
    text = parser.format_help()
    assert all(f"\n{group}:" in text for group in ("data", "model", "recipe", "run")) and "(default: 64)" in text
