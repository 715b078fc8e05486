"""train.py: its pure parts, and the real script: what it learns from, killed, resumed, in two processes."""

import csv
import json
import math
import platform
import resource
import shutil
import signal
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


def state_of(folder):
    return models.load(folder / "last.pt", train.STATE_FORMAT)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def rows_of(folder, split):
    with open(folder / "splits.csv", newline="") as f:
        return [row for row in csv.DictReader(f) if row["split"] == split]


def are_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_times(folder) -> dict:
    """metrics.json without timings."""
    metrics = metrics_of(folder)
    del metrics["seconds"]
    for epoch_log in metrics["epochs"]:
        del epoch_log["seconds"], epoch_log["images_per_second"]
    return metrics


# --- pure parts ---


def test_learning_rate_is_a_warm_up_and_a_cosine():
    rates = [train.learning_rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] < 0.001
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize(
    ("aurocs", "selected"),
    [
        ([], 0),
        ([0.90, 0.95, 0.951, 0.60], 3),
        ([0.90, 0.95, 0.951, 0.60, 0.949, 0.944], 5),  # within a standard error of the best: the longer trained
    ],
)
def test_the_latest_epoch_within_a_standard_error_of_the_best_is_selected(monkeypatch, aurocs, selected):
    monkeypatch.setattr(data, "auroc_error", lambda auroc, n_positive, n_negative: 0.005)
    history = [{"epoch": i, "val_auroc": auroc} for i, auroc in enumerate(aurocs, 1)]
    folder, images = SimpleNamespace(patient_index=np.arange(2)), torch.arange(2)
    dataset = train.TrainingSet(None, folder, None, images, images, images, ["A", "B"])
    assert dataset.selected_epoch(history) == selected


def test_the_loss_weights_classes_the_same_in_every_batch():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
    labels = torch.tensor([0, 1, 1])
    each = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(0.5))]
    loss = train.weighted_loss(logits, labels, torch.tensor([2.0, 0.5]))
    assert float(loss) == pytest.approx((2 * each[0] + 0.5 * each[1] + 0.5 * each[2]) / 3)


def learner_of(model, *flags):
    args = train.make_parser().parse_args(flags)
    return train.Learner(model, args, torch.device("cpu"))


def test_each_layer_keeps_its_learning_rate_factor():
    learner = learner_of(models.build("vit_tiny_patch16_224", 2, 32), "--layer-decay", "0.5")
    loader = [(torch.ones(2, 1, 32, 32), torch.tensor([0, 1]))]
    train.train_epoch(learner, torch.ones(2), loader, [0.5], 0)
    rates = {group["lr"] for group in learner.optimizer.param_groups}
    assert max(rates) == 0.5 and min(rates) == pytest.approx(0.5 * 0.5**13)


def test_weights_decay_and_norms_and_biases_do_not():
    learner = learner_of(models.build("mobilenetv3_small_050", 2, 32))
    for group in learner.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0)


def test_the_cpu_computes_in_float32_unless_asked():
    model = models.build("mobilenetv3_small_050", 2, 32)
    assert learner_of(model).dtype == torch.float32
    assert learner_of(model, "--precision", "bf16").dtype == torch.bfloat16


# --- operating point ---


def test_weighting_makes_border_and_class_unrelated():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3000)
    border = rng.normal(labels * 2.0)
    weights, how = train.image_weights(labels, border)
    assert "tercile" in how
    terciles = np.searchsorted(np.quantile(border, (1 / 3, 2 / 3)), border)
    for tercile in range(3):
        here = weights[terciles == tercile]
        positive = weights[(terciles == tercile) & (labels == 1)]
        assert positive.sum() / here.sum() == pytest.approx(0.5)


def test_if_a_tercile_lacks_a_class_only_the_classes_are_weighted():
    labels = np.array([0, 0, 0, 1])
    weights, how = train.image_weights(labels, labels * 10.0)
    assert "tercile" not in how
    assert weights == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])


def operating_point(z, labels):
    """Fitted to one logit per image."""
    logits = np.stack([-z / 2, z / 2], 1)
    return train.fit_operating_point(logits[None], labels, None, "0.5")


def test_platt_finds_slope_and_intercept_at_equal_prevalence():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2, 60_000)
    labels = (rng.random(60_000) < 1 / (1 + np.exp(-truth))).astype(int)
    rare = np.flatnonzero((labels == 0) | (rng.random(60_000) < 0.25))  # the prevalence falls: the weights undo it
    found = operating_point(3 * truth[rare] + 1, labels[rare])
    assert found["slope"] == pytest.approx(1 / 3, abs=0.01)
    assert found["intercept"] == pytest.approx(-1 / 3, abs=0.05)
    assert found["threshold"]["value"] == 0.5


def test_the_slope_is_finite_for_separated_classes_and_small_at_chance_level(capsys):
    labels = np.repeat([0, 1], 20)
    assert 0 < operating_point(labels * 2.0 - 1, labels)["slope"] < 10
    assert operating_point(1 - labels * 2.0, labels)["slope"] == train.LEAST_SLOPE
    assert "train longer" in capsys.readouterr().err


def test_a_steep_calibration_keeps_its_cut():
    """The threshold is on the calibrated logit: as a probability it would be 1."""
    is_positive = np.array([False, False, True, True])
    z = np.array([949.0, 950.0, 951.0, 952.0])
    cut = train.choose_cut("youden", is_positive, z, np.ones(4))
    checkpoint = {"slope": 1.0, "intercept": 0.0, "threshold": {"logit": cut}}
    logits = torch.from_numpy(np.stack([-z / 2, z / 2], 1))
    assert models.decide(logits, checkpoint).predicted.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("rule", "cut"), [("0.2", math.log(0.25)), ("youden", 1.5), ("sensitivity=1", -0.5)])
def test_a_threshold_rule_gives_the_cut_worked_out_by_hand(rule, cut):
    z, labels = np.array([-2.0, -1, 0, 1, 2, 3, 4]), np.array([0, 0, 1, 0, 1, 1, 1])
    assert train.choose_cut(rule, labels == 1, z, np.ones(7)) == pytest.approx(cut)


def test_three_classes_get_only_a_slope():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (20_000, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((20_000, 1)) > p.cumsum(1)).sum(1)
    found = train.fit_operating_point(4 * logits[None], labels, None, "0.5")
    assert found["slope"] == pytest.approx(0.25, abs=0.02) and found["intercept"] == 0
    assert found["threshold"]["value"] is None


# --- what it learns from ---


def train_watched(folder, *arguments):
    """A run without shuffling, and what went into it: images, labels, class weights, rates."""
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
        run_train(folder, *arguments, "--output", "r")
    return seen


@pytest.fixture(scope="module")
def watched(demo, tmp_path_factory):
    return train_watched(tmp_path_factory.mktemp("watched"), "--data", demo, *SHORT, "--img-size", 64, "--epochs", 2)


def test_each_epoch_augments_each_image_differently(watched):
    first, second = watched.x
    assert len(first) == 80
    difference = (first - second).abs().mean((1, 2, 3))
    assert difference.min() > 0.02


def test_labels_come_from_the_folders_and_the_positive_class_is_last(watched):
    expected = [int(row["class"] == "PNEUMONIA") for row in rows_of(watched.folder, "train")]
    assert len(watched.y[0]) == 80
    for labels in watched.y:
        assert labels.tolist() == expected[: len(labels)]
    assert models.load(watched.folder)["classes"] == ["NORMAL", "PNEUMONIA"]


def test_the_loss_gets_weights_that_balance_the_classes(watched):
    classes = [row["class"] for row in rows_of(watched.folder, "train")]
    sizes = torch.tensor([classes.count("NORMAL"), classes.count("PNEUMONIA")])
    assert sizes[1] > 1.5 * sizes[0]
    torch.testing.assert_close(watched.class_weights[0], len(classes) / 2 / sizes)


def test_the_rate_warms_up_to_its_peak_and_falls_to_almost_nothing(watched):
    rates = watched.rates
    assert max(rates) == pytest.approx(0.003)
    assert 0 < rates.index(max(rates)) < len(rates) / 2
    assert rates[0] <= 0.5 * max(rates)
    assert rates[-1] < 0.1 * max(rates)


def test_the_averaged_weights_are_validated_and_kept(watched):
    state, checkpoint = state_of(watched.folder), models.load(watched.folder)
    assert are_equal(checkpoint["state_dict"], state["average"])
    assert not are_equal(state["average"], state["model"])  # the average lags behind
    start = models.build("mobilenetv3_small_050", 2, 64).state_dict()
    assert not torch.equal(state["average"]["bn1.running_mean"], start["bn1.running_mean"])
    found = evaluate_run(watched.folder, "--split", "val")
    assert found["metrics"]["auroc"]["value"] == state["history"][-1]["val_auroc"]
    assert found["calibration"]["before"]["nll"] == pytest.approx(state["history"][-1]["val_loss"], abs=1e-9)


def evaluate_run(folder, *arguments):
    done = run_script("evaluate.py", folder, "--bootstrap", 0, "--json", *arguments, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_augmentation_training_sees_what_evaluation_sees(demo, tmp_path):
    seen = train_watched(tmp_path, "--data", demo, *SHORT, "--augment", "none", "--epochs", 1)
    checkpoint = models.load(seen.folder)
    for row, x in zip(rows_of(seen.folder, "train"), seen.x[0]):
        image, _ = data.read_image(demo / row["path"], 32)
        expected = data.normalise(data.to_float(torch.from_numpy(image)[None]), checkpoint)
        torch.testing.assert_close(expected[0], x)


def test_training_learns_and_evaluation_confirms_it(tmp_path):
    """Labels inverted or shuffled anywhere between the folders and the report would show here."""
    data.draw_demo(tmp_path / "d", images=300, seed=1)
    recipe = ("--model", "test_resnet", "--no-pretrained", "--img-size", 64, "--batch-size", 16, "--lr", 0.006)
    run_train(tmp_path, "--data", "d", *recipe, "--output", "r")
    found = evaluate_run(tmp_path / "r")["metrics"]
    assert found["auroc"]["value"] > 0.9
    assert found["balanced_accuracy"]["value"] > 0.75


def test_an_epoch_that_is_worse_is_not_kept(demo, tmp_path, monkeypatch):
    aurocs = iter(np.repeat([0.6, 0.95, 0.5], 2))  # of either class against the other
    monkeypatch.setattr(evaluate, "measure", lambda *_: next(aurocs))
    done = run_train(tmp_path, "--data", demo, *SHORT, "--epochs", 3, "--output", "r")
    checkpoint, metrics = models.load(tmp_path / "r"), metrics_of(tmp_path / "r")
    assert checkpoint["epoch"] == metrics["best_epoch"] == 2 and len(checkpoint["history"]) == 3
    assert checkpoint["history"][1]["val_auroc"] == 0.95 and "selected: epoch 2 of 3" in done.out
    assert not are_equal(checkpoint["state_dict"], state_of(tmp_path / "r")["average"])


def test_the_operating_point_uses_stressed_copies(run_folder, demo, tmp_path, monkeypatch):
    shutil.copytree(run_folder, tmp_path / "r")
    shutil.copytree(demo, tmp_path / "moved")
    (tmp_path / "r" / "metrics.json").unlink()  # as if killed before calibration: all that is left for --resume
    ask = evaluate.ask

    def ask_better_under_stress(model, folder, index, *rest, **options):
        logits, border = ask(model, folder, index, *rest, **options)
        z = np.array([4.0 if folder.records[i].label == "PNEUMONIA" else -2.0 for i in index.tolist()])
        right = np.stack([-z / 2, z / 2], 1)
        return {**dict.fromkeys(logits, right), "clean": logits["clean"]}, border

    monkeypatch.setattr(evaluate, "ask", ask_better_under_stress)
    run_train(tmp_path, "--resume", "r", "--data", "moved")
    before, after = models.load(run_folder), models.load(tmp_path / "r")
    assert after["data"] == metrics_of(tmp_path / "r")["data"]
    assert abs(math.log(after["slope"] / before["slope"])) > 1
    assert "18 stressed copies" in after["threshold"]["from"]


# --- what a run writes ---


def test_what_a_run_writes(run_folder):
    metrics = metrics_of(run_folder)
    assert metrics["finished"] and metrics["data"]["demo"]
    assert [epoch_log["epoch"] for epoch_log in metrics["epochs"]] == [1, 2]
    checkpoint = models.load(run_folder)
    assert checkpoint["finished"]
    assert checkpoint["data"] == metrics["data"]
    for log, kept in zip(metrics["epochs"], checkpoint["history"], strict=True):
        assert {**log, **kept} == log and log.keys() - kept.keys() == {"seconds", "images_per_second"}
    for key, split in (("trained_on", "train"), ("chosen_on", "val")):
        patients = [row["patient"] for row in rows_of(run_folder, split)]
        assert len(patients) == metrics["data"]["images"][split]
        assert set(checkpoint[key]["patients"]) == set(patients)
        assert len(checkpoint[key]["hashes"]) == len(patients)


def test_a_column_of_metadata_does_not_replace_one_of_splits(tmp_path):
    record = data.Record("a.png", "A", "train", "p", "", "", {"class": "x", "age": "5"})
    folder, one, none = SimpleNamespace(records=[record]), torch.tensor([0]), torch.tensor([])
    (row,) = train.split_rows(train.TrainingSet(tmp_path, folder, None, None, one, none, ["A", "B"]))
    assert row == {"path": "a.png", "class": "A", "patient": "p", "subtype": "", "split": "train", "age": "5"}


def test_the_seed_changes_the_weights_and_not_the_split(demo, tmp_path):
    for seed in (1, 2):  # with a rate of 0 the first weights stay
        options = ("--epochs", 1, "--lr", 0, "--seed", seed, "--output", f"seed{seed}")
        run_train(tmp_path, "--data", demo, *SHORT, *options)
    first, second = tmp_path / "seed1", tmp_path / "seed2"
    assert rows_of(first, "val") == rows_of(second, "val")
    a, b = (models.load(folder)["state_dict"]["conv_stem.weight"] for folder in (first, second))
    assert not torch.equal(a, b)


def test_an_unfinished_run_of_three_classes_has_no_threshold(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for label in "ABC":
        (tmp_path / "d" / "train" / label).mkdir(parents=True)
        for i in range(12):
            image = rng.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "d" / "train" / label / f"{i}.png")
    monkeypatch.setattr(train, "finish_checkpoint", lambda *_: None)  # as if killed before it
    run_train(tmp_path, "--data", "d", *SHORT, "--folds", 3, "--epochs", 1, "--output", "r")
    checkpoint = models.load(tmp_path / "r")
    assert checkpoint["threshold"]["value"] is None
    found = evaluate_run(tmp_path / "r", "--split", "val")
    assert found["metrics"]["auroc"]["value"] == pytest.approx(checkpoint["history"][-1]["val_auroc"], abs=1e-15)
    done = run_script("predict.py", "--ckpt", "r", "--cam", "maps", "d/train/A/0.png", cwd=tmp_path)
    assert done.returncode == 0 and "P(label)" in done.stdout, done.stderr


def test_a_run_knows_what_its_starting_weights_were_trained_on(run_folder, demo, tmp_path):
    common = ("--data", demo, *SHORT[1:], "--img-size", 64, "--epochs", 1, "--weights", run_folder)
    assert "LEAK" not in run_train(tmp_path, *common, "--output", "same").err
    other = run_train(tmp_path, *common, "--fold", 3, "--output", "other")
    validation = rows_of(tmp_path / "other", "val")
    n = len(validation)
    assert f"LEAK: this run or its --weights were trained on validation data ({n} of these images" in other.err
    # A third generation still knows the patients of the first.
    traces = models.load(tmp_path / "other")["trained_on"]
    assert {row["patient"] for row in validation} <= set(traces["patients"])


def test_a_frozen_backbone_does_not_move_nor_do_its_statistics(demo, tmp_path):
    run_train(tmp_path, "--data", demo, *SHORT, "--epochs", 1, "--freeze", "--output", "r")
    state = state_of(tmp_path / "r")["model"]
    torch.manual_seed(0)
    first = models.build("mobilenetv3_small_050", 2, 32).state_dict()
    changed = {name for name, value in state.items() if not torch.equal(value, first[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_copies_of_training_images_in_a_validation_folder_are_reported(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "d")
    for i, path in enumerate(sorted((tmp_path / "d" / "train").rglob("*.jpeg"))):
        for j in range(2):
            copy = tmp_path / "d" / "val" / path.parent.name / f"copy{i}-{j}.jpeg"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes() + bytes(j + 1))  # other bytes, the same radiograph
    done = run_train(tmp_path, "--data", "d", *SHORT, "--epochs", 1, "--output", "r")
    assert "trained on validation data (192 of these images and 0 of these patients)" in done.err


# --- interruption and resume ---


def test_a_killed_run_ends_like_one_that_was_not(demo, tmp_path):
    """SIGKILL while training; then --resume: the same bits everywhere as a run with the same arguments."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ("--data", demo, *SHORT, "--epochs", 3)
    run_train(tmp_path, *arguments, "--output", "whole")
    command = [sys.executable, ROOT / "train.py", *arguments, "--output", "cut"]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip().startswith("1 "):
            break
    process.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
    in_use = run_train(tmp_path, "--resume", "cut", code=2)
    process.kill()
    process.communicate()
    assert "another process is training in cut" in in_use.last
    assert len(metrics_of(cut)["epochs"]) < 3
    assert models.load(cut)["finished"] is False
    (cut / ".last.pt.1.tmp").write_bytes(b"half")  # as if killed while saving
    (cut / "report.md").write_text("of the half-trained model")
    (cut / "test_results.csv").touch()
    run_train(tmp_path, "--resume", "cut")
    assert not list(cut.glob(".*.tmp"))
    assert (cut / "report.md.old").read_text() == "of the half-trained model"
    assert (cut / "test_results.csv").exists()  # not written by evaluate.py
    again = run_train(tmp_path, "--resume", "cut")
    assert "the run in cut is finished; --epochs N trains it longer" in again.out
    assert without_times(whole) == without_times(cut)
    assert (whole / "ckpt.pt").read_bytes() == (cut / "ckpt.pt").read_bytes()
    assert are_equal(state_of(whole)["model"], state_of(cut)["model"])


def change_an_image(checkpoint, root):
    path = next((root / "train" / "NORMAL").iterdir())
    Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)


def change_a_subtype(checkpoint, root):
    path = next((root / "train" / "NORMAL").iterdir()).relative_to(root)
    (root / "metadata.csv").write_text(f"file_name,subtype\n{path},mild\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_an_image, "have changed since the run"),
        (change_a_subtype, "have changed since the run"),
        (lambda checkpoint, root: checkpoint.update(epoch=0), "does not belong to"),
        (lambda checkpoint, root: checkpoint["arguments"].update(seed=1), "does not belong to"),
    ],
)
def test_a_run_continues_only_with_its_own_images_and_checkpoint(run_folder, demo, tmp_path, change, message):
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.copytree(demo, tmp_path / "moved")
    checkpoint = models.load(tmp_path / "run")
    change(checkpoint, tmp_path / "moved")
    models.save(checkpoint, tmp_path / "run" / "ckpt.pt")
    refused = run_train(tmp_path, "--resume", "run", "--data", "moved", "--epochs", 3, code=2)
    assert message in refused.last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume", "run", "--seed", "5"), "--seed 5 contradicts the run in run, which has 0"),
        (("--resume", "run", "--epochs", "1"), "has already done 2 epochs"),
        (("--no-pretrained", "--output", "run"), "use --resume run to continue it"),
    ],
)
def test_a_run_is_neither_changed_nor_overwritten(run_folder, tmp_path, arguments, message):
    shutil.copytree(run_folder, tmp_path / "run")
    refused = run_train(tmp_path, *arguments, code=2)
    assert message in refused.last
    for name in ("last.pt", "ckpt.pt", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run_folder / name).read_bytes()


def test_an_interrupted_extension_continues_by_itself(run_folder, demo, tmp_path, monkeypatch):
    """More epochs and moved data, asked for once, are known from then on; a damaged metrics.json does no harm."""
    shutil.copytree(run_folder, tmp_path / "a run")
    shutil.copytree(demo, tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", lambda *_: signal.raise_signal(signal.SIGTERM))
        patch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun does
        done = run_train(tmp_path, "--resume", "a run", "--epochs", 3, "--data", "moved", code=130)
    assert "follow the schedule of the new length" in done.err
    assert "has changed" not in done.err and "Traceback" not in done.err
    assert done.last == "interrupted; continue with: torchrun --nproc-per-node=2 train.py --resume 'a run'"
    (tmp_path / "a run" / "metrics.json").write_text("{}")
    models.save(state_of(tmp_path / "a run") | {"code": "x"}, tmp_path / "a run" / "last.pt", train.STATE_FORMAT)
    assert "train.py has changed since the run started" in run_train(tmp_path, "--resume", "a run").err
    metrics = metrics_of(tmp_path / "a run")
    assert metrics["finished"] and metrics["code"] == "x"
    assert [epoch_log["planned_epochs"] for epoch_log in models.load(tmp_path / "a run")["history"]] == [2, 2, 3]
    assert metrics["data"]["root"] == str(tmp_path / "moved")


def test_a_full_disk_loses_nothing(run_folder, tmp_path):
    """A limit on the size of files stands in for a full disk: what was saved before is still there."""
    shutil.copytree(run_folder, tmp_path / "r")
    before = (tmp_path / "r" / "last.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        done = run_train(tmp_path, "--resume", "r", "--epochs", 3, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "File too large, 100,000 bytes written" in done.last
    assert "continue with: python train.py --resume r" in done.last
    assert (tmp_path / "r" / "last.pt").read_bytes() == before and not list((tmp_path / "r").glob(".*.tmp"))


FREE_AND_FILL = """
import resource, torch, train
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
train.keep_memory()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    done = subprocess.run([sys.executable, "-c", FREE_AND_FILL], cwd=ROOT, capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert kept < 0.3 * returned


def test_a_loss_that_is_not_finite_is_named(demo, tmp_path):
    done = run_train(tmp_path, "--data", demo, *SHORT, "--lr", "1e30", "--output", "r", code=2)
    assert "not finite in step" in done.last and "Traceback" not in done.err
    assert state_of(tmp_path / "r")["history"] == []


# --- several processes ---


def test_two_processes_see_what_one_sees(demo, tmp_path):
    """One image more or less would change the losses; gradients that are not shared would change the weights."""
    # A model whose output for an image does not depend on the others of its batch: the losses must agree closely.
    arguments = ["--data", demo, "--model", "test_convnext", "--no-pretrained", "--augment", "none", "--device", "cpu"]
    arguments += ["--img-size", 32, "--epochs", 1, "--warmup-epochs", 0, "--lr", 1e-4]
    run_train(tmp_path, *arguments, "--batch-size", 16, "--output", "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [ROOT / "train.py", *arguments, "--batch-size", 8, "--output", "two"]
    subprocess.run([*torchrun, *map(str, arguments)], cwd=tmp_path, timeout=240, check=True)
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "splits.csv").read_bytes() == (two / "splits.csv").read_bytes()
    (expected,), (found,) = metrics_of(one)["epochs"], metrics_of(two)["epochs"]
    for loss in ("val_loss", "train_loss"):
        assert found[loss] == pytest.approx(expected[loss], rel=1e-5)
    # Every step of Adam moves each weight by about the rate, 1e-4: a gradient of the other sign would show.
    a, b = state_of(one)["model"], state_of(two)["model"]
    apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert apart.mean() < 2e-6
    refused = run_train(tmp_path, "--resume", "two", code=2)
    assert "was started with 2 processes, not 1" in refused.last


def test_help_is_grouped_and_short():
    parser = train.make_parser()
    flags = [action for action in parser._actions if action.option_strings]
    assert len(flags) <= 28
    text = parser.format_help()
    assert "(default: 64)" in text
    for group in ("data", "model", "recipe", "run"):
        assert f"\n{group}:" in text
