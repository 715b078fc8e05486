"""Fixtures that the test files share: the scripts on the path, a small demo set, one short run of the real script."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Set before torch is imported: tests must not reach a hub, and small models gain nothing from threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "extra(package): needs an optional package, and is skipped without it")


def pytest_runtest_setup(item):
    for mark in item.iter_markers("extra"):
        pytest.importorskip(*mark.args)


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """No test writes into the user's cache, goes through a proxy, or inherits a distributed run's rank."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("RANK", raising=False)


def run_script(script, *arguments, cwd, input="") -> subprocess.CompletedProcess:
    """Run one of the scripts in this process: importing torch and timm takes longer than most of what is tested."""
    module = importlib.import_module(script.removesuffix(".py"))
    importlib.import_module("data").read_folder.cache_clear()  # as in a new process
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(input))
        patch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                module.main()
            except SystemExit as e:
                code = e.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A demo set of 120 phantoms; tests that change files must copy it."""
    import data

    folder = tmp_path_factory.mktemp("data") / "demo"
    data.draw_demo(folder, images=120, seed=0)
    return folder


@pytest.fixture(scope="session")
def run_folder(demo, tmp_path_factory) -> Path:
    """A finished run of the real training script on the demo set: two epochs at 64 pixels."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = ("--data", demo, "--no-pretrained", "--epochs", "2", "--img-size", "64", "--batch-size", "16")
    done = run_script("train.py", *arguments, "--output", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder
