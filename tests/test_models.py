"""Models: six architectures, weights from files and from a hub, checkpoints, heat maps, and the check of inputs."""

import contextlib
import copy
import json
import math
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data
import models

NAMES = (
    "mobilenetv3_small_050",
    "resnet18",
    "efficientnet_lite0",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
)
SMALL = NAMES[0]
CLASSES = ["NORMAL", "PNEUMONIA"]


def to_checkpoint(name: str, model: nn.Module, size: int = 64) -> dict:
    """All that a checkpoint must hold."""
    return {
        "format": models.FORMAT,
        "format_version": models.FORMAT_VERSION,
        "model": name,
        "state_dict": model.state_dict(),
        "classes": ["NORMAL", "PNEUMONIA"],
        "positive": "PNEUMONIA",
        "input_size": size,
        "mean": 0.45,
        "std": 0.23,
        "margin": 0.1,
        "temperature": 1.0,
        "threshold": {"value": 0.5, "rule": "0.5", "from": "default"},
        "validation": {"val_loss": 0.7, "val_auroc": 0.5, "val_accuracy": 0.5},
        "epoch": 1,
        "epochs": 2,
        "finished": True,
        "data": {
            "root": "x",
            "demo": False,
            "fingerprint": "0",
            "patients": ["IM-1"],
            "images": 2,
            "pixels": torch.tensor([1, 2]),
            "val_patients": ["IM-2"],
            "val_pixels": torch.tensor([3]),
        },
        "arguments": {"seed": 0, "epochs": 1, "folds": 10, "fold": 0},
        "environment": {"torch": "2"},
        "weights": {"source": "random", "note": "", "failed": ""},
        "input_check": {
            "mean": torch.zeros(models.FEATURES),
            "whiten": torch.eye(models.FEATURES),
            "cut": 20.0,
        },
        "border": None,
    }


def write_weights(path: Path, state: dict) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def small():
    torch.manual_seed(1)
    return models.build(SMALL, 2, 64).eval()


class Malicious:
    """What a pickle can do to whoever loads it carelessly: this one creates a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# --- six architectures ---


@pytest.fixture(scope="module", params=NAMES)
def trained(request):
    """(name, weights before, model after two training steps, parameters without a gradient)."""
    torch.manual_seed(0)
    model = models.build(request.param, 2, 64).train()
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # a residual branch that starts at zero passes no gradient on before the second
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(4, 1, 64, 64)), torch.tensor([0, 1, 0, 1]))
        loss.backward()
        without = [k for k, v in model.named_parameters() if v.grad is None or not v.grad.isfinite().all()]
        optimizer.step()
    return request.param, before, model.eval(), without


def test_training_reaches_every_part(trained):
    _, before, model, without = trained
    assert without == []
    changed = [not torch.equal(v, before[k]) for k, v in model.named_parameters()]
    # A few may stand still by right, such as what a layer scale close to zero hides.
    assert sum(changed) > 0.8 * len(changed)
    first, last = next(iter(before)), list(before)[-1]
    parameters = dict(model.named_parameters())
    assert not torch.equal(parameters[last], before[last])
    assert not torch.equal(parameters[first], before[first])


def test_save_and_load_give_the_same_logits(trained, tmp_path):
    name, _, model, _ = trained
    x = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    models.save(to_checkpoint(name, model), tmp_path / "ckpt.pt")
    loaded = models.from_checkpoint(models.load(tmp_path / "ckpt.pt"), torch.device("cpu"))
    assert not loaded.training
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)
    assert expected.shape == (3, 2)
    assert expected.std() > 0


def test_heat_map_of_each_architecture(trained):
    _, _, model, _ = trained
    x = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    # In a network that learnt nothing, all may speak for one and the same class: look at both.
    maps = torch.stack([models.heat_map(model, x.clone(), target) for target in (0, 1)])
    assert maps.shape == (2, 8, 64, 64)
    assert maps.dtype == torch.float32
    assert maps.min() >= 0 and maps.max() <= 1
    assert (maps.amax((0, 2, 3)) > 0.7).sum() > 4
    assert maps.flatten(2).std(2).amax(0).gt(0.01).sum() > 4  # a place, not a plain sheet


class Toy(nn.Module):
    """A stage whose features are the image in cells of 8 pixels, in one of many layouts; logit 1 sums them up."""

    def __init__(self, layout: str):
        super().__init__()
        self.stage = nn.Identity()
        self.feature_info = [{"module": "stage", "reduction": 8}]
        self.layout = layout
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        f = self.gain * nn.functional.avg_pool2d(x, 8).repeat(1, 3, 1, 1)
        tokens = f.flatten(2).transpose(1, 2)
        head = 100 * self.gain * torch.ones(len(x), 9, 3)
        layouts = {
            "NCHW": f,
            "NHWC": f.permute(0, 2, 3, 1),
            "tokens": tokens,
            "class token": torch.cat([head[:, :1], tokens], 1),
            "five tokens": torch.cat([head[:, :5], tokens], 1),
            "nine tokens": torch.cat([head, tokens], 1),
            "beside another": (head, f),
            "no map": f.mean((2, 3)),
        }
        out = self.stage(layouts[self.layout])
        parts = out if isinstance(out, tuple) else (out,)
        score = sum(part.flatten(1).sum(1) for part in parts)
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens", "class token", "five tokens", "beside another"])
def test_a_line_in_the_image_is_a_line_in_the_map(layout):
    """From the upper left down to the middle: a transposed, mirrored or sheared map would show."""
    x = torch.zeros(2, 1, 80, 80)
    cells = [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    for row, column in cells:
        x[:, 0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 1
    heat = models.heat_map(Toy(layout), x, 1)[1, 4::8, 4::8]
    line = [tuple(cell) for cell in (heat > 0.6).nonzero().tolist()]
    assert line == cells
    assert models.heat_map(Toy(layout), x, 0).max() == 0


@pytest.mark.parametrize("layout", ["nine tokens", "no map"])
def test_what_is_no_map_of_the_image_is_refused(layout):
    with pytest.raises(data.UserError, match="no feature map"):
        models.heat_map(Toy(layout), torch.rand(1, 1, 80, 80), 1)


@pytest.mark.parametrize(
    ("name", "size", "shown"),
    [
        ("xcit_nano_12_p16_224", 64, True),  # its class token joins behind the blocks
        ("pit_ti_224", 64, True),  # its stages give a map and tokens
        ("hrnet_w18_small", 64, False),  # timm names stages that it does not have
        ("coat_tiny", 64, False),  # one stage runs under three names
        ("hiera_tiny_224", 224, False),  # tokens in an order of their own
    ],
)
def test_families_of_odd_layout_get_a_map_or_a_line(name, size, shown):
    torch.manual_seed(0)
    model = models.build(name, 2, size).eval()
    x = torch.randn(1, 1, size, size)
    if shown:
        assert models.heat_map(model, x, 1).shape == (1, size, size)
    else:
        with pytest.raises(data.UserError, match="no feature map"):
            models.heat_map(model, x, 1)


# --- memory format ---

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        (SMALL, CPU, torch.channels_last),
        ("repvgg_a0", CPU, torch.contiguous_format),
        ("mobileone_s1", CPU, torch.contiguous_format),
        ("fastvit_t8", CPU, torch.contiguous_format),
        ("repvgg_a0", CUDA, torch.channels_last),
        ("lambda_resnet26t", CUDA, torch.contiguous_format),
        (SMALL, torch.device("mps"), torch.contiguous_format),
    ],
)
def test_models_that_channels_last_crashes_or_does_not_fit_are_contiguous(name, device, expected):
    model = timm.create_model(name, in_chans=1, num_classes=2)
    found = models.memory_format(model, device)
    assert found == expected
    model.to(memory_format=found)


# --- build ---


def test_timms_old_names_are_known():
    assert models.preprocessing("mobilenetv3_large_100_miil", None)["input_size"] == 160


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet19", "resnet18"), ("mobilenetv3_smal_050", SMALL), ("vit_tiny_p16_224", "vit_tiny")]
)
def test_an_unknown_name_lists_the_nearest(name, nearest):
    with pytest.raises(data.UserError, match=f"{name}.*nearest.*{nearest}"):
        models.build(name, 2, 64)


def test_a_name_that_is_near_nothing_is_an_error_too():
    with pytest.raises(data.UserError, match="@@@@@@"):
        models.preprocessing("@@@@@@", None)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [(SMALL, None, 160), ("vit_tiny_patch16_224", None, 224), ("vit_tiny_patch16_224", 64, 64)],
)
def test_input_size_is_the_asked_one_else_what_the_model_takes(name, size, expected):
    assert models.preprocessing(name, size)["input_size"] == expected


def test_mean_and_std_are_those_of_the_weights_in_grey():
    found = models.preprocessing("resnet18", None)
    assert found["mean"] == pytest.approx((0.485 + 0.456 + 0.406) / 3)
    assert found["std"] == pytest.approx((0.229 + 0.224 + 0.225) / 3)


def test_a_device_that_is_not_there_is_an_error():
    for name in ("cuda:99", "no such device"):
        with pytest.raises(data.UserError, match=f"--device {name}.*auto"):
            models.pick_device(name)
    assert models.pick_device("cpu") == torch.device("cpu")


# --- weights from a file ---


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "stem", "head", "classes"),
    [
        (SMALL, "conv_stem.weight", "classifier.weight", 2),
        (SMALL, "conv_stem.weight", "classifier.weight", 5),
        ("resnet18", "conv1.weight", "fc.weight", 2),
        ("vit_tiny_patch16_224", "patch_embed.proj.weight", "head.weight", 2),
    ],
)
def test_weights_of_colour_images_are_adapted(tmp_path, name, stem, head, classes, suffix):
    torch.manual_seed(3)
    state = timm.create_model(name, num_classes=classes).state_dict()
    path = write_weights(tmp_path / f"w{suffix}", state)
    torch.manual_seed(4)
    model, source, seen = models.build_pretrained(name, CLASSES, 64, str(path), insist=False)
    found = model.state_dict()
    assert torch.equal(found[stem], state[stem].sum(1, keepdim=True))
    assert found[head].shape[0] == 2
    assert source["source"] == str(path) and source["failed"] == ""
    assert "3 input channels summed to 1" in source["note"] and "\n" not in source["note"]
    assert not torch.equal(found[head], state[head][:2])  # nobody knows which class is which
    assert "new head" in source["note"] and seen is None
    others = [k for k in state if k not in (stem, head, head.replace("weight", "bias"), "pos_embed")]
    assert [k for k in others if not torch.equal(found[k], state[k])] == []
    assert f"{len(state)} tensors" in source["note"]


def test_weights_of_grey_images_without_a_head(tmp_path):
    state = timm.create_model(SMALL, in_chans=1, num_classes=0).state_dict()
    model, source, _ = models.build_pretrained(
        SMALL, ["A", "B", "C"], 64, str(write_weights(tmp_path / "w.pt", state)), insist=False
    )
    assert torch.equal(model.conv_stem.weight, state["conv_stem.weight"])
    assert model.classifier.weight.shape[0] == 3
    assert "summed" not in source["note"] and "new head" in source["note"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"net": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {f"model.{k}": v for k, v in s.items()},
        lambda s: {f"net._orig_mod.{k}": v for k, v in s.items()},
    ],
)
def test_weights_may_be_wrapped_as_other_programs_do(tmp_path, small, wrap):
    path = write_weights(tmp_path / "w.pt", wrap(small.state_dict()))
    model, _, _ = models.build_pretrained(SMALL, CLASSES, 64, str(path), insist=False)
    assert torch.equal(model.conv_head.weight, small.conv_head.weight)


@pytest.mark.parametrize(
    ("classes", "rows"),
    [(CLASSES, [0, 1]), (["PNEUMONIA", "NORMAL"], [1, 0]), (["NORMAL", "COVID"], None), ([*CLASSES, "X"], None)],
)
def test_a_head_is_taken_from_a_run_and_by_class_name(tmp_path, small, classes, rows):
    """The run's folder stands for its checkpoint, which says what was seen."""
    models.save(to_checkpoint(SMALL, small), tmp_path / "ckpt.pt")
    model, source, seen = models.build_pretrained(SMALL, classes, 64, str(tmp_path), insist=False)
    if rows:
        assert torch.equal(model.classifier.weight, small.classifier.weight[rows])
        assert torch.equal(model.classifier.bias, small.classifier.bias[rows])
    else:
        assert len(model.classifier.weight) == len(classes) and "new head" in source["note"]
    assert torch.equal(model.conv_head.weight, small.conv_head.weight)
    assert seen["patients"] == ["IM-1"] and seen["pixels"].tolist() == [1, 2]


def spoil(kind: str, path: Path, state: dict) -> str:
    """Write a weights file that must be refused; returns what the message must hold."""
    if kind == "other architecture":
        write_weights(path, timm.create_model("resnet18", num_classes=2).state_dict())
        return "does not hold weights of"
    if kind == "one tensor missing":
        del state["blocks.0.0.conv_dw.weight"]
        write_weights(path, state)
        return "blocks.0.0.conv_dw.weight"
    if kind == "one tensor too many":
        write_weights(path, state | {"more.weight": torch.zeros(3)})
        return "more.weight"
    if kind == "one tensor of another shape":
        write_weights(path, state | {"blocks.0.0.conv_dw.weight": torch.zeros(3, 1, 3, 3)})
        return "blocks.0.0.conv_dw.weight"
    if kind in ("nan", "inf"):
        state["conv_head.weight"][0] = float(kind)
        write_weights(path, state)
        return "conv_head.weight"
    if kind == "no tensors":
        torch.save({"a": 1, "b": "text"}, path)
        return "state dict"
    if kind == "garbage":
        path.write_bytes(bytes(range(256)) * 20)
        return "can't be read"
    if kind == "empty":
        path.write_bytes(b"")
        return "can't be read"
    if kind == "truncated":
        write_weights(path, state)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return "can't be read"
    return "does not exist"


KINDS = "other architecture, one tensor missing, one tensor too many, one tensor of another shape, garbage, empty, truncated, nan, inf"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", [*KINDS.split(", "), "missing"])
def test_weights_that_do_not_fit_are_an_error(tmp_path, small, kind, suffix):
    path = tmp_path / f"w{suffix}"
    expected = spoil(kind, path, small.state_dict())
    with pytest.raises(data.UserError) as caught:
        models.build_pretrained(SMALL, CLASSES, 64, str(path), insist=False)
    assert expected in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_training_state_is_no_weights(tmp_path, small):
    """It was trained on images that nobody could tell of."""
    models.save({"format": "training state", "format_version": 2, "model": small.state_dict()}, tmp_path / "last.pt")
    with pytest.raises(data.UserError, match="not a chest radiograph classifier"):
        models.build_pretrained(SMALL, CLASSES, 64, str(tmp_path / "last.pt"), insist=False)


def test_a_file_of_other_things_is_no_weights(tmp_path):
    expected = spoil("no tensors", tmp_path / "w.pt", {})
    with pytest.raises(data.UserError, match=expected):
        models.build_pretrained(SMALL, CLASSES, 64, str(tmp_path / "w.pt"), insist=False)


@pytest.mark.parametrize("read", [lambda p: models.build_pretrained(SMALL, CLASSES, 64, str(p), False), models.load])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, read):
    mark = tmp_path / "ran"
    torch.save({"format": models.FORMAT, "format_version": 1, "state_dict": Malicious(mark)}, tmp_path / "w.pt")
    with pytest.raises(data.UserError, match="w.pt"):
        read(tmp_path / "w.pt")
    assert not mark.exists()


# --- weights from the hub ---


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that refuses connections, and an empty cache."""
    from huggingface_hub import constants

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return constants


def test_without_a_network_training_goes_on_from_random_weights(no_hub):
    model, source, _ = models.build_pretrained(SMALL, CLASSES, 64, None, insist=False)
    assert source["source"] == "random"
    assert SMALL in source["failed"] and "\n" not in source["failed"]
    with torch.inference_mode():
        assert model.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 2)
    assert no_hub.HF_HUB_OFFLINE is False  # as it was before


def test_without_a_network_insisting_is_an_error(no_hub):
    with pytest.raises(data.UserError, match=f"{SMALL}.*--weights.*--no-pretrained") as caught:
        models.build_pretrained(SMALL, CLASSES, 64, None, insist=True)
    assert "\n" not in str(caught.value)


def test_a_model_that_was_never_trained_has_no_pretrained_weights():
    name = next(m for m in timm.list_models("resnet*") if not timm.is_model_pretrained(m))
    with pytest.raises(data.UserError, match=f"no pretrained weights for {name}"):
        models.build_pretrained(name, CLASSES, 64, None, insist=True)


# In a process of its own: the hub's library reads its address from the environment when it is imported.
HUB = """
import hashlib, http.server, json, os, sys, threading
from pathlib import Path

folder = Path(sys.argv[1])
content = (folder / "model.safetensors").read_bytes()
asked = []

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        asked.append(f"{self.command} {self.path}")
        known = self.path.split("?")[0] == "/timm/mobilenetv3_small_050.lamb_in1k/resolve/main/model.safetensors"
        body = content if known else b"not found"
        self.send_response(200 if known else 404)
        if known:
            self.send_header("ETag", '"' + hashlib.sha1(content).hexdigest() + '"')
            self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
    do_HEAD = do_GET
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
os.environ["HF_HOME"] = str(folder / "home")
import models, torch

result = {}
for when in ("served", "cached"):
    torch.manual_seed(len(when))
    model, source, _ = models.build_pretrained("mobilenetv3_small_050", ["A", "B"], 64, None, insist=True)
    torch.save(model.state_dict(), folder / f"{when}.pt")
    result[when] = source | {"asked": list(asked)}
    if when == "served":
        server.shutdown()
        server.server_close()
        asked.clear()
print(json.dumps(result))
"""


def test_weights_from_a_hub_and_again_from_its_cache(tmp_path):
    torch.manual_seed(5)
    state = timm.create_model(SMALL).state_dict()
    write_weights(tmp_path / "model.safetensors", state)
    hidden = ("HF_", "HUGGING", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith(hidden)}
    environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", HUB, str(tmp_path)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert any(line.startswith("GET") and "model.safetensors" in line for line in result["served"]["asked"])
    assert result["cached"]["asked"] == []
    for when in ("served", "cached"):
        assert result[when]["source"] == "hub" and result[when]["failed"] == ""
        assert "timm/mobilenetv3_small_050.lamb_in1k" in result[when]["note"]
        found = torch.load(tmp_path / f"{when}.pt", weights_only=True)
        assert torch.equal(found["conv_stem.weight"], state["conv_stem.weight"].sum(1, keepdim=True))
        assert found["classifier.weight"].shape[0] == 2
        others = [k for k in state if k != "conv_stem.weight" and not k.startswith("classifier.")]
        assert [k for k in others if not torch.equal(found[k], state[k])] == []


# --- checkpoints ---


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "does not exist"),
        ("folder", "does not exist"),
        ("truncated", "damaged"),
        ("random bytes", "damaged"),
        ("empty", "damaged"),
        ("other dict", "not a chest radiograph classifier of this suite"),
        ("tensor", "not a chest radiograph classifier of this suite"),
        ("flipped bits", "damaged"),
        ("no threshold", "damaged: it holds no threshold"),
        ("future", f"version {models.FORMAT_VERSION + 1}.*update"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path, small, kind, expected):
    path = tmp_path / "ckpt.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        models.save(to_checkpoint(SMALL, small), path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "random bytes":
        path.write_bytes(bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0)).tolist()))
    elif kind == "empty":
        path.touch()
    elif kind == "other dict":
        torch.save({"state_dict": small.state_dict()}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "flipped bits":  # in a weight, where nothing but the checksum tells
        models.save(to_checkpoint(SMALL, small), path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "no threshold":
        content = to_checkpoint(SMALL, small)
        del content["threshold"]
        models.save(content, path)
    elif kind == "future":
        models.save(to_checkpoint(SMALL, small) | {"format_version": models.FORMAT_VERSION + 1}, path)
    with pytest.raises(data.UserError, match=expected) as caught:
        models.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_one_kind_of_checkpoint_is_not_taken_for_another(tmp_path, small):
    models.save(to_checkpoint(SMALL, small) | {"format": "training state"}, tmp_path / "last.pt")
    assert models.load(tmp_path / "last.pt", "training state")["model"] == SMALL
    with pytest.raises(data.UserError, match="not a chest radiograph classifier"):
        models.load(tmp_path / "last.pt")


def test_weights_that_do_not_fit_the_model_of_a_checkpoint_are_an_error(small):
    with pytest.raises(data.UserError, match="resnet18"):
        models.from_checkpoint(to_checkpoint("resnet18", small), torch.device("cpu"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_an_error(small, value):
    for name in ("classifier.bias", "bn1.running_var"):
        checkpoint = to_checkpoint(SMALL, small)
        checkpoint["state_dict"] = {k: v.clone() for k, v in checkpoint["state_dict"].items()}
        checkpoint["state_dict"][name][0] = value
        with pytest.raises(data.UserError, match=f"NaN or infinite weights: {name}"):
            models.from_checkpoint(checkpoint, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")  # torch's, that such tensors go out of use
@pytest.mark.parametrize(
    "altered",
    [
        {"conv_head.weight": torch.zeros(1024, 288, 1, 1).to_sparse()},
        {"conv_head.weight": lambda: torch.quantize_per_tensor(torch.zeros(1024, 288, 1, 1), 0.1, 0, torch.qint8)},
        {"conv_head.weight": torch.zeros(1024, 288, 1, 1, device="meta")},
        {"conv_head.weight": "text"},
        {"classifier.weight": torch.zeros(1, 1024)},
        {"more.weight": torch.zeros(3)},
        {5: torch.zeros(3)},
    ],
    ids=["sparse", "quantized", "without data", "text", "another shape", "one too many", "a key that is no text"],
)
def test_altered_weights_are_refused_in_one_line_wherever_they_are_read(tmp_path, small, altered):
    checkpoint = to_checkpoint(SMALL, small)
    for key, value in altered.items():
        checkpoint["state_dict"] = {**checkpoint["state_dict"], key: value() if callable(value) else value}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for read in (
        lambda: models.from_checkpoint(models.load(tmp_path), CPU),
        lambda: models.build_pretrained(SMALL, CLASSES[::-1], 64, str(tmp_path), insist=False),
    ):
        with pytest.raises(data.UserError) as caught:
            read()
        assert "\n" not in str(caught.value)


def spots(content: dict, prefix: tuple = ()) -> list[tuple]:
    """The path of every key in nested dicts."""
    found = []
    for key, value in content.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += spots(value, (*prefix, key))
    return found


def test_altered_checkpoints(tmp_path, small):
    """Each loads and classifies with finite logits, or is refused in one line."""
    original = to_checkpoint(SMALL, small, 32)
    original["border"] = models.fit_border(torch.rand(20, models.BORDER_FEATURES), torch.arange(20).numpy() > 9)
    rng = random.Random(0)
    tensor = torch.zeros(3)
    values = [
        None,
        -1,
        0,
        3,
        10**40,
        -0.5,
        1e39,
        math.nan,
        math.inf,
        -math.inf,
        "",
        "x",
        [],
        {},
        [1],
        {"a": 1},
        True,
        tensor,
    ]
    places = [p for p in spots(original) if p[0] not in ("format", "state_dict")]
    places += [("state_dict",)] + [p for p in spots(original) if p[0] == "state_dict"][::9]
    outcomes = Counter()
    for _ in range(60):  # a thousand by hand
        altered = copy.copy(original)
        place = rng.choice(places)
        inner = altered
        for key in place[:-1]:
            inner[key] = copy.copy(inner[key])
            inner = inner[key]
        if rng.random() < 0.1:
            del inner[place[-1]]
        else:
            inner[place[-1]] = rng.choice(values)
        if altered.get("input_size") == 10_000:
            continue
        torch.save(altered, tmp_path / "ckpt.pt")
        try:
            checkpoint = models.load(tmp_path / "ckpt.pt")
            model = models.from_checkpoint(checkpoint, CPU)
            with torch.inference_mode():
                logits = model(torch.rand(1, 1, checkpoint["input_size"], checkpoint["input_size"]))
            probabilities = models.probabilities(logits, checkpoint["temperature"])
            images = torch.zeros(1, 32, 32, dtype=torch.uint8)
            unlike = models.unlikeness(checkpoint["input_check"], images)
            assert probabilities.isfinite().all() and unlike.isfinite().all(), place
            outcomes["fine"] += 1
        except data.UserError as e:
            assert "\n" not in str(e), place
            outcomes["refused"] += 1
    assert outcomes["refused"] > 30 and outcomes["fine"] > 0


def test_a_checkpoint_of_version_1_still_loads(tmp_path, small):
    content = to_checkpoint(SMALL, small) | {"format_version": 1}
    for key in ("finished", "epochs", "weights", "border", "margin"):
        del content[key]
    for key in ("images", "val_patients", "val_pixels"):
        del content["data"][key]
    for key in ("folds", "fold"):
        del content["arguments"][key]
    content["data"]["val"] = ["a", "b", "c"]
    models.save(content, tmp_path / "ckpt.pt")
    found = models.load(tmp_path)
    assert found["finished"] is True and found["epochs"] == 1 and found["border"] is None
    assert found["margin"] == 0 and found["data"]["images"] == 2 and len(found["data"]["val_pixels"]) == 3
    assert found["arguments"]["folds"] == 10 and found["arguments"]["fold"] == 0


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
def test_a_save_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, small, broken):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(b"the old one")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(broken, fail)
        with pytest.raises(OSError, match="disk full"):
            models.save(to_checkpoint(SMALL, small), path)
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    models.save(to_checkpoint(SMALL, small), path)
    assert models.load(path)["model"] == SMALL
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_the_newest_run_is_found_by_time_and_those_that_ended_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UserError, match="train"):
        models.newest_checkpoint()
    for name, age in (("a", 100), ("b", 900), ("c", 500)):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "ckpt.pt").touch()
        os.utime(Path("runs", name, "ckpt.pt"), (1e9 - age, 1e9 - age))
    assert models.newest_checkpoint() == Path("runs/a/ckpt.pt")
    for name, finished in (("a", "false"), ("b", "true"), ("c", "true")):
        Path("runs", name, "metrics.json").write_text(f'{{"finished": {finished}}}')
    assert models.newest_checkpoint() == Path("runs/c/ckpt.pt")


# --- probabilities ---


@pytest.mark.parametrize(("temperature", "expected"), [(1, 0.75), (2, math.sqrt(3) / (1 + math.sqrt(3))), (0.5, 0.9)])
def test_probabilities_follow_the_temperature(temperature, expected):
    found = models.probabilities(torch.tensor([[0.0, math.log(3)], [5.0, 5.0]]), temperature)
    assert found[:, 1].tolist() == pytest.approx([expected, 0.5], abs=1e-6)
    assert found.sum(1).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_probabilities_of_huge_logits_stay_finite():
    found = models.probabilities(torch.tensor([[1000.0, -1000.0, 0.0]]), 0.05)
    assert found.tolist() == [[1, 0, 0]]


# --- what a model has not seen ---


@pytest.fixture(scope="module")
def phantoms(demo):
    """uint8 images of the demo set at 64 px: training, validation, test."""
    records = data.find_training(demo, 5, 0) + data.scan(demo, "test")
    images = torch.stack([torch.from_numpy(data.read_image(demo / r.path, 64)[0].copy()) for r in records])
    return [images[[i for i, r in enumerate(records) if r.split == s]] for s in ("train", "val", "test")]


@pytest.fixture(scope="module")
def check(phantoms):
    return models.fit_input_check(phantoms[0].split(32), phantoms[1].split(32))


def flagged(check: dict, images: torch.Tensor) -> float:
    return float((models.unlikeness(check, images) > check["cut"]).float().mean())


def test_few_phantoms_are_flagged(check, phantoms):
    assert flagged(check, phantoms[0]) <= 0.1
    assert round(flagged(check, phantoms[1]) * len(phantoms[1])) == 1  # the most unlike one of these few
    assert flagged(check, phantoms[2]) <= 0.25


@pytest.mark.parametrize("kind", ["noise", "inverted", "upside down", "plain grey", "patches of noise"])
def test_what_is_no_upright_radiograph_is_flagged(check, phantoms, kind):
    test = phantoms[2]
    noise = torch.Generator().manual_seed(7)
    images = {
        "noise": torch.randint(0, 256, test.shape, generator=noise, dtype=torch.uint8),
        "inverted": 255 - test,
        "upside down": test.flip(1),
        "plain grey": torch.full_like(test, 128),
        "patches of noise": torch.randint(0, 256, (len(test), 8, 8), generator=noise, dtype=torch.uint8)
        .repeat_interleave(8, 1)
        .repeat_interleave(8, 2),
    }[kind]
    assert flagged(check, images) >= 0.9


def test_the_check_does_not_depend_on_batches_or_mirroring(check, phantoms):
    train, val, test = phantoms
    other = models.fit_input_check([train.flip(2)], val.split(1))
    assert other["cut"] == pytest.approx(check["cut"], rel=1e-3)
    torch.testing.assert_close(models.unlikeness(other, test), models.unlikeness(check, test), rtol=1e-3, atol=1e-2)


def test_the_check_fits_images_that_lie_on_a_gpu():
    """Fake tensors tell what would meet on two devices; no GPU is needed."""
    with FakeTensorMode(), contextlib.suppress(DataDependentOutputException):  # the cut is a number: no fake has one
        images = torch.zeros(40, 64, 64, dtype=torch.uint8, device="cuda")
        models.fit_input_check(images.split(20), images.split(20))


def test_the_cut_flags_one_in_a_hundred_of_the_validation_images():
    g = torch.Generator().manual_seed(8)
    images = nn.functional.interpolate(torch.rand(1200, 1, 6, 6, generator=g) * 255, (32, 32), mode="bicubic")
    images = images[:, 0].clamp(0, 255).to(torch.uint8)
    check = models.fit_input_check([images[:700]], [images[700:]])
    assert flagged(check, images[700:]) == pytest.approx(0.01, abs=0.002)


# --- what the border tells ---


def test_border_logit_is_that_of_scikit_learn():
    g = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (60, 64, 64), generator=g, dtype=torch.uint8)
    positive = np.arange(60) % 2 == 0
    images[positive, :4] //= 2
    features = data.border_features(images)
    border = models.fit_border(features, positive)
    standard = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(
        features.double(), positive
    )
    z = models.border_logit(border, images)
    assert z.dtype == np.float64 and ((z > 0) == positive).all()
    np.testing.assert_allclose(z, standard.decision_function(features.double()), rtol=0.05, atol=0.05)
    images[:, 10:50, 10:50] = 0  # no part of the border
    np.testing.assert_allclose(models.border_logit(border, images), z)
