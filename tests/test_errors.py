"""What a user can do wrong, for all scripts in one table: one line on stderr, exit code 2, no traceback."""

import shlex
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

TRAIN = [
    ("--data nowhere", "nowhere does not exist"),
    ("--epochs 0", "--epochs: 0 is not in [1, inf]"),
    ("--model mobilenetv3_smal_050 --no-pretrained", "mobilenetv3_small_050"),
    ("--weights x.pt --pretrained", "not allowed with argument"),
    ("--device cuda:77 --no-pretrained", "--device cuda:77"),
    ("--weights none.pt", "none.pt does not exist"),
    ("--threshold best", "--threshold"),
    ("--model convnext_atto --no-pretrained --img-size 8", "does not take 8 x 8 pixels"),
    ("--resume nowhere", "no run to continue"),
    ("--resume other --output x", "leave out --output"),
    (f"--resume {'y' * 300}", "start a new one"),
    (f"--no-pretrained --output {'y' * 300}", "File name too long"),
    ("--no-pretrained --output moved", "moved already has a run"),
    ("--pretrained", "no pretrained weights"),
    ("--folds 5 --fold 5", "--fold 5: the last of 5 folds is 4"),
    ("--folds 1000 --fold 999", "no usable image in val: use more patients or, without val/, other folds"),
    ("--positive COVID --no-pretrained", "positive class COVID is not one of the classes NORMAL, PNEUMONIA"),
    ("--epoch 1", "unrecognized arguments: --epoch 1; did you mean --epochs?"),
    ("''", "unrecognized arguments:"),
    ("--output=", "--output: must not be empty"),
    ("--weights other/metrics.json", "is not a .safetensors or torch weights file"),
    ("--model mobilenetv3_small --no-pretrained", "nearest: mobilenetv3_small_050"),
    ("--model hf-hub:nobody/nothing --no-pretrained", "can't be looked up"),
]
DATA = [
    ("check nowhere", "nowhere does not exist"),
    ("check empty", "has no images in train/"),
    ("demo other", "not an empty folder"),
]
EVALUATE = [
    ("", "no runs/*/ckpt.pt found"),
    ("nowhere.pt", "nowhere.pt does not exist"),
    ("empty", "ckpt.pt does not exist"),
    ("missing.csv", "No such file or directory: 'missing.csv'"),
    ("missing.csv --threshold 1.5", "--threshold: 1.5 is not in"),
]
PREDICT = [
    ("", "required: PATH"),
    ("x.png", "train a model first"),
    ("--ckpt none.pt x.png", "none.pt does not exist"),
    ("--ckpt= x.png", "--ckpt: must not be empty"),
    ("--ckpt other/metrics.json x.png", "is damaged, or not a file of this suite"),
]
CASES = []
for script, cases in (("train.py", TRAIN), ("data.py", DATA), ("evaluate.py", EVALUATE), ("predict.py", PREDICT)):
    CASES += [(script, *case) for case in cases]


@pytest.fixture
def folder(tmp_path):
    """A folder with things to stumble over."""
    for name, text in (("empty", None), ("other", '{"arguments": {"epochs": 3}}')):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "metrics.json").write_text(text)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "last.pt").touch()
    return tmp_path


@pytest.mark.parametrize(("script", "arguments", "message"), CASES)
def test_user_errors_are_one_line_and_exit_code_2(script, arguments, message, demo, folder):
    words = shlex.split(arguments)
    if script == "train.py" and "--data" not in words:
        words = ["--data", demo, "--img-size", 32, *words]
    done = run_script(script, *words, cwd=folder)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING:")]
    assert message in errors[-1] and len(errors[-1]) < 330, done.stderr
    assert ("did you mean" in message) == ("did you mean" in errors[-1])
    usage = [line for line in errors[:-1] if not line.startswith(("usage:", " "))]
    assert not usage, done.stderr


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py", "data.py"])
def test_interrupted_imports_print_no_traceback(tmp_path, script):
    """In a process of its own, whose import of numpy is interrupted."""
    (tmp_path / "numpy.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # the background of a shell ignores it
    command, path = [sys.executable, ROOT / script], {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=path, capture_output=True, check=False, preexec_fn=listen)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
