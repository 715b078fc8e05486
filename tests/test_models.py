"""Models: families of architectures, weights from files and a hub, checkpoints, decisions, heat maps, what is unlike."""

import contextlib
import functools
import http.server
import io
import json
import math
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data
import models

SMALL, VIT, SWIN = "mobilenetv3_small_050", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
NAMES = (SMALL, "resnet18", "efficientnet_lite0", "convnext_atto", VIT, SWIN)
DISTILLED = "deit_tiny_distilled_patch16_224"
CLASSES = ["NORMAL", "PNEUMONIA"]
CPU = torch.device("cpu")


def to_checkpoint(name: str, model: nn.Module) -> dict:
    """What this module reads of a checkpoint, and fields of other kinds."""
    return {
        "format": models.FORMAT,
        "format_version": models.FORMAT_VERSION,
        "model": name,
        "model_arguments": {},
        "state_dict": model.state_dict(),
        "classes": CLASSES,
        "input_size": 64,
        "slope": 1.5,
        "finished": True,
        "trained_on": {"patients": ["IM-1"], "hashes": torch.tensor([[1, 2, 3, 4]])},
        "border": None,
    }


def write_weights(path: Path, state: dict) -> Path:
    state = {k: v.contiguous() for k, v in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def load_weights(path: Path, classes=CLASSES, name: str = SMALL) -> tuple:
    return models.build_pretrained(name, classes, 64, str(path), None)


def one_line_error(work, *arguments) -> str:
    """The message of the UserError that work(*arguments) raises."""
    with pytest.raises(data.UserError) as caught:
        work(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def small():
    torch.manual_seed(1)
    return models.build(SMALL, 2, 64).eval()


# --- six architectures ---


@pytest.fixture(scope="module", params=NAMES)
def trained(request):
    """(name, weights before, model after two training steps)."""
    torch.manual_seed(0)
    model = models.build(request.param, 2, 64).train()
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # a residual branch that starts at zero passes no gradient on before the second
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, 1, 64, 64)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
    return request.param, before, model.eval()


def test_training_reaches_every_part(trained):
    _, before, model = trained
    assert [k for k, v in model.named_parameters() if v.grad is None or not v.grad.isfinite().all()] == []
    changed = [not torch.equal(v, before[k]) for k, v in model.named_parameters()]
    # A few may stay as they are, such as what a layer scale close to zero hides.
    assert sum(changed) > 0.8 * len(changed) and changed[0] and changed[-1]


def test_a_saved_model_gives_the_same_logits_and_timm_loads_it(trained, tmp_path):
    name, _, model = trained
    x = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    models.save(to_checkpoint(name, model), tmp_path / "ckpt.pt")
    loaded = models.from_checkpoint(models.load(tmp_path), CPU)
    options = {"in_chans": 1, "num_classes": 2} | ({"img_size": 64} if name in (VIT, SWIN) else {})
    by_timm = timm.create_model(name, checkpoint_path=str(tmp_path / "ckpt.pt"), **options)
    with torch.inference_mode():
        expected = model(x)
        assert expected.shape == (3, 2) and expected.std() > 0
        torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(by_timm.eval()(x), expected, rtol=1e-5, atol=1e-6)


def test_each_architecture_has_a_heat_map_with_places(trained):
    _, _, model = trained
    x = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    # In a network that learnt nothing, everything may speak for the same class: look at both.
    maps = torch.stack([models.heat_map(model, x.clone(), target) for target in (0, 1)])
    assert maps.shape == (2, 8, 64, 64) and maps.dtype == torch.float32 and 0 <= maps.min() and maps.max() <= 1
    assert (maps.amax((0, 2, 3)) > 0.7).sum() > 4
    assert maps.flatten(2).std(2).amax(0).gt(0.01).sum() > 4  # a place, not a plain sheet


# --- heat maps ---


def test_the_map_of_a_trained_model_lies_on_the_planted_opacity():
    """A disc of 7 % of the image, at random places in noise."""
    torch.manual_seed(0)
    grid = torch.arange(64)

    def draw(n: int):
        row, column = torch.randint(12, 52, (2, n, 1, 1))
        disc = (grid[:, None] - row) ** 2 + (grid - column) ** 2 < 100
        labels = torch.arange(n) % 2
        x = 0.3 * torch.randn(n, 1, 64, 64) + (disc & (labels[:, None, None] == 1))[:, None]
        return x, labels, disc

    model = models.build(SMALL, 2, 64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(40):
        x, labels, _ = draw(16)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    x, labels, disc = draw(40)
    peaks = models.heat_map(model.eval(), x[1::2], 1).flatten(1).argmax(1)
    assert disc[1::2].flatten(1)[range(20), peaks].float().mean() > 0.6


class Toy(nn.Module):
    """A stage whose features are the image in cells of 8 pixels, in one of many layouts; logit 1 sums them up."""

    def __init__(self, layout):
        super().__init__()
        self.stage = nn.Identity()
        self.feature_info = [{"module": "stage", "reduction": 8}]
        self.layout = layout
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        features = self.layout(self.gain * nn.functional.avg_pool2d(x, 8).repeat(1, 3, 1, 1))
        out = self.stage(features)
        score = sum(part.flatten(1).sum(1) for part in (out if isinstance(out, tuple) else (out,)))
        return torch.stack([-score, score], 1)


def tokens(f, others: int):
    """Cells as tokens, after others that stand for no cell."""
    return torch.cat([100 * f.mean((2, 3))[:, None].expand(-1, others, -1), f.flatten(2).transpose(1, 2)], 1)


LAYOUTS = {
    "NCHW": lambda f: f,
    "NHWC": lambda f: f.permute(0, 2, 3, 1),
    "tokens": lambda f: tokens(f, 0),
    "class token": lambda f: tokens(f, 1),
    "five tokens": lambda f: tokens(f, 5),
    "beside another": lambda f: (tokens(f, 9), f),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_line_in_the_image_is_a_line_in_the_map(layout):
    """From the upper left down to the middle: a transposed, mirrored or sheared map would show."""
    x = torch.zeros(2, 1, 80, 80)
    cells = [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    for row, column in cells:
        x[:, 0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 1
    heat = models.heat_map(Toy(layout), x, 1)[1, 4::8, 4::8]
    assert [tuple(cell) for cell in (heat > 0.6).nonzero().tolist()] == cells
    assert models.heat_map(Toy(layout), x, 0).max() == 0


def test_features_that_are_not_a_map_of_the_image_are_refused():
    for layout in (lambda f: tokens(f, 9), lambda f: f.mean((2, 3))):
        assert "no feature map" in one_line_error(models.heat_map, Toy(layout), torch.rand(1, 1, 80, 80), 1)


def test_families_of_odd_layout_get_a_map_or_a_line():
    x = torch.randn(1, 1, 224, 224)
    for name in ("xcit_nano_12_p16_224", "pit_ti_224"):  # a class token joins late; stages are maps and tokens
        assert models.heat_map(models.build(name, 2, 224).eval(), x, 1).shape == (1, 224, 224)
    for name in ("hrnet_w18_small", "hiera_tiny_224"):  # timm names stages that are not there; tokens in another order
        model = models.build(name, 2, 224).eval()
        assert "no feature map" in one_line_error(models.heat_map, model, x, 1)


# --- build ---


@pytest.mark.parametrize(
    ("name", "device", "contiguous"),
    [(SMALL, "cpu", 0), (SMALL, "mps", 1), ("repvgg_a0", "cpu", 1), ("repvgg_a0", "cuda", 0)]
    + [("mobileone_s1", "cpu", 1), ("fastvit_t8", "cpu", 1), ("lambda_resnet26t", "cuda", 1)],
)
def test_models_that_channels_last_crashes_or_does_not_fit_are_contiguous(name, device, contiguous):
    model = timm.create_model(name, in_chans=1, num_classes=2)
    found = models.memory_format(model, torch.device(device))
    assert found == (torch.contiguous_format if contiguous else torch.channels_last)
    model.to(memory_format=found)


def test_an_unknown_name_lists_the_nearest():
    for name, nearest in (("resnet19", "resnet18"), ("mobilenetv3_smal_050", SMALL), ("mobilenetv3", SMALL[:12])):
        found = one_line_error(models.build, name, 2, 64)
        assert name in found and nearest in found.partition("nearest")[2]
    assert "no model '@@@@'" in one_line_error(models.build, "@@@@", 2, 64)


def test_input_size_is_the_asked_one_else_what_the_model_takes():
    names = (SMALL, VIT, "mobilenetv3_large_100_miil")  # the last one is an old name of timm
    assert [models.preprocessing(name, None)["input_size"] for name in names] == [160, 224, 160]
    assert models.preprocessing(VIT, 64)["input_size"] == 64


def test_a_model_that_does_not_fit_is_refused(small):
    assert "timm's resnet18" in one_line_error(models.from_checkpoint, to_checkpoint("resnet18", small), CPU)
    model = models.build("convnext_atto", 2, 64)
    assert "does not take 8 x 8 pixels" in one_line_error(models.require_size, model, 2, 8)
    maps = nn.Conv2d(1, 2, 1)  # and no logits
    assert "no classifier that can be replaced" in one_line_error(models.require_size, maps, 2, 64)


def test_a_model_is_taken_from_a_folder_with_its_own_arguments(tmp_path):
    config = {"architecture": SMALL, "num_classes": 3, "model_args": {"drop_rate": 0.4}}
    config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.25] * 3, "first_conv": "conv_stem"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path}"
    assert models.preprocessing(name, None) == {"input_size": 160, "mean": 0.5, "std": 0.25}
    model = models.build(name, 2, 64)
    assert model.drop_rate == 0.4 and model.classifier.out_features == 2
    assert "can't be looked up" in one_line_error(models.build, f"{name}/missing", 2, 64)
    assert "can't be looked up" in one_line_error(models.build, "hf-hub:nobody/nothing", 2, 64)


def test_a_device_that_is_not_there_is_an_error():
    assert "--device cuda:99" in one_line_error(models.pick_device, "cuda:99")
    assert "--device what" in one_line_error(models.pick_device, "what")


# --- weights from a file ---


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", [SMALL, "resnet18", VIT, DISTILLED])
def test_weights_of_colour_images_are_adapted(tmp_path, name, suffix):
    torch.manual_seed(3)
    state = timm.create_model(name, num_classes=5).state_dict()
    path = write_weights(tmp_path / f"w{suffix}", state)
    model, origin, seen = load_weights(path, name=name)
    found = model.state_dict()
    stem = f"{timm.get_pretrained_cfg(name).first_conv}.weight"
    assert torch.equal(found[stem], state[stem].sum(1, keepdim=True))
    for key in state.keys() - {stem, "pos_embed"}:
        is_head = key.startswith(("head", "classifier", "fc"))
        assert len(found[key]) == 2 if is_head else torch.equal(found[key], state[key]), key
    assert origin["source"] == str(path) and origin["sha256"] == data.sha256(path) and origin["failed"] == ""
    assert f"{len(state)} tensors" in origin["note"] and "3 input channels summed to 1; new head" in origin["note"]
    assert "\n" not in origin["note"] and seen is None


@pytest.mark.parametrize(
    ("wrap", "not_used"),
    [
        (lambda s: {"model_state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}, 0),
        (lambda s: {"net": {f"_orig_mod.module.{k}": v for k, v in s.items()}}, 0),
        (lambda s: {"model": {"state_dict": s}, "best": np.float64(0.9), "path": Path("a/b")}, 0),
        (lambda s: {f"backbone.encoder.{k}": v for k, v in s.items()}, 0),
        (lambda s: {"state_dict": s | {"criterion.weight": torch.ones(2), "total_ops": torch.ones(1)}}, 2),
        (lambda s: {f"model.{k}": v for k, v in s.items()} | {"auroc.preds": torch.ones(9)}, 1),
        (lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s}, 244),
    ],
)
def test_weights_may_be_wrapped_as_other_programs_do(tmp_path, small, wrap, not_used):
    """Averaged weights are preferred; what is beside them is passed over and counted."""
    torch.save(wrap(small.state_dict()), tmp_path / "w.pt")
    model, origin, _ = load_weights(tmp_path / "w.pt")
    assert torch.equal(model.conv_head.weight, small.conv_head.weight)
    assert (f"not used: {not_used} other" in origin["note"]) == bool(not_used)


@pytest.mark.parametrize("name", [SMALL, DISTILLED])
def test_a_head_is_taken_from_a_run_of_the_same_classes(tmp_path, name):
    before = models.build(name, 2, 64)
    models.save(to_checkpoint(name, before), tmp_path / "ckpt.pt")
    after, origin, seen = load_weights(tmp_path, CLASSES, name)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in after.state_dict().items())
    assert f"its head for {', '.join(CLASSES)}" in origin["note"]
    assert seen["trained_on"]["patients"] == ["IM-1"] and seen["input_size"] == 64
    for classes in (CLASSES[::-1], ["NORMAL", "COVID"], [*CLASSES, "X"]):
        after, origin, _ = load_weights(tmp_path, classes, name)
        with torch.inference_mode():
            assert after.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, len(classes))
        assert "new head" in origin["note"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("altered", "expected"),
    [
        ({"blocks.0.0.conv_dw.weight": None}, "does not fit"),
        ({"blocks.9.weight": torch.zeros(3)}, "does not fit"),
        ({"blocks.0.0.conv_dw.weight": torch.zeros(3, 1, 3, 3)}, "does not fit"),
        ({"conv_head.weight": torch.full((1024, 288, 1, 1), math.nan)}, "NaN or infinite weights: conv_head.weight"),
        ({"conv_head.bias": torch.full((1024,), math.inf)}, "NaN or infinite weights: conv_head.bias"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(tmp_path, small, altered, expected, suffix):
    state = {k: v for k, v in (small.state_dict() | altered).items() if v is not None}
    path = write_weights(tmp_path / f"w{suffix}", state)
    message = one_line_error(load_weights, path)
    assert expected in message and str(path) in message
    path.write_bytes(path.read_bytes()[:50_000])
    assert "is not a .safetensors or torch weights file" in one_line_error(load_weights, path)


def test_files_that_are_not_weights_of_this_model_are_an_error(tmp_path, small):
    assert "does not exist" in one_line_error(load_weights, tmp_path / "w.pt")
    training_state = {"format": "training state", "format_version": 5, "model": small.state_dict()}
    for content in ({"a": 1}, timm.create_model("resnet18", num_classes=2).state_dict(), training_state):
        torch.save(content, tmp_path / "w.pt")
        assert "w.pt" in one_line_error(load_weights, tmp_path / "w.pt")


@pytest.mark.parametrize(("read", "named"), [(load_weights, "mkdir"), (models.load, "damaged")])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, read, named):
    mark = tmp_path / "ran"
    malicious = type("Malicious", (), {"__reduce__": lambda self: (os.mkdir, (str(mark),))})()
    torch.save({"format": models.FORMAT, "format_version": 5, "state_dict": malicious}, tmp_path / "w.pt")
    message = one_line_error(read, tmp_path / "w.pt")
    assert "w.pt" in message and named in message and not mark.exists()


# --- weights from the hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """(what it was asked for, a call that closes it) of a hub that sends the files of tmp_path; an empty cache."""
    from huggingface_hub import constants

    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            self.send_header("ETag", '"0123456789abcdef"')
            self.send_header("X-Repo-Commit", 4 * "0123456789")
            super().end_headers()

        def log_message(self, *_):
            asked.append(f"{self.command} {self.path}")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def close():
        server.shutdown()
        server.server_close()
        asked.clear()

    yield asked, close
    close()
    assert constants.HF_HUB_OFFLINE is False  # as it was before


def test_weights_from_a_hub_and_again_from_its_cache(hub, tmp_path):
    asked, close = hub
    folder = tmp_path / "timm" / "mobilenetv3_small_050.lamb_in1k" / "resolve" / "main"
    folder.mkdir(parents=True)
    state = timm.create_model(SMALL).state_dict()
    write_weights(folder / "model.safetensors", state)
    for is_served in (True, False):
        model, origin, _ = models.build_pretrained(SMALL, ["A", "B"], 64, None, True)
        assert any("model.safetensors" in line for line in asked) == is_served
        assert origin["source"] == "hub" and "timm/mobilenetv3_small_050.lamb_in1k" in origin["note"]
        found = model.state_dict()
        assert torch.equal(found["conv_stem.weight"], state["conv_stem.weight"].sum(1, keepdim=True))
        assert found["classifier.weight"].shape[0] == 2
        others = [k for k in state if k != "conv_stem.weight" and not k.startswith("classifier.")]
        assert [k for k in others if not torch.equal(found[k], state[k])] == []
        close()


def test_without_a_hub_training_goes_on_from_random_weights_unless_they_are_required(hub):
    _, close = hub
    close()
    model, origin, _ = models.build_pretrained(SMALL, CLASSES, 64, None, None)
    assert origin["source"] == "random" and SMALL in origin["failed"] and "\n" not in origin["failed"]
    assert model.classifier.out_features == 2
    message = one_line_error(models.build_pretrained, SMALL, CLASSES, 64, None, True)
    assert SMALL in message and "--weights FILE or --no-pretrained" in message


# --- save and load ---


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"format": "training state", "format_version": 5}, "is not a chest radiograph classifier of this suite"),
        ({"format": models.FORMAT, "format_version": 4}, "has format version 4, this code reads 5: train again"),
        ({"format": models.FORMAT, "format_version": 6}, "has format version 6, this code reads 5"),
        ({"format": models.FORMAT, "format_version": 5}, "was altered or damaged after it was written"),
        (torch.zeros(3), "is damaged, or not a file of this suite"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_an_error(tmp_path, content, expected):
    torch.save(content, tmp_path / "ckpt.pt")  # without a seal
    assert expected in one_line_error(models.load, tmp_path)
    assert "none.pt does not exist" in one_line_error(models.load, tmp_path / "none.pt")


def test_whatever_byte_is_altered_nothing_else_is_loaded(tmp_path):
    """Only what carries no content, such as the times in an archive, may change unnoticed."""
    path = tmp_path / "file.pt"
    models.save({"format": "x", "format_version": 5, "a": torch.arange(5.0), "b": [1, "text", None]}, path)
    original, n_refused = path.read_bytes(), 0
    for i in range(len(original)):
        path.write_bytes(original[:i] + bytes([original[i] ^ 0x41]) + original[i + 1 :])
        try:
            found = models.load(path, "x")
        except data.UserError as e:
            assert "\n" not in str(e)
            n_refused += 1
        else:
            found["a"] = found["a"].tolist()
            assert found == {"format": "x", "format_version": 5, "a": [0, 1, 2, 3, 4], "b": [1, "text", None]}
    assert n_refused > len(original) / 2
    for size in range(0, len(original), 50):
        path.write_bytes(original[:size])
        one_line_error(models.load, path, "x")


def test_whatever_field_is_altered_is_refused(tmp_path, small):
    path, checkpoint = tmp_path / "ckpt.pt", to_checkpoint(SMALL, small)
    models.save(checkpoint, path)
    assert models.load(path)["trained_on"]["patients"] == ["IM-1"]
    with zipfile.ZipFile(path) as archive:
        (seal,) = [archive.read(name) for name in archive.namelist() if name.endswith("/seal")]
    for key in checkpoint.keys() - {"format", "format_version"}:
        buffer = io.BytesIO()
        torch.save(checkpoint | {key: 1 if checkpoint[key] is None else None}, buffer)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(f"{archive.namelist()[0].split('/')[0]}/seal", seal)
        path.write_bytes(buffer.getvalue())
        assert "was altered or damaged" in one_line_error(models.load, path), key


def test_a_save_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no more disk")

    (tmp_path / "ckpt.pt").write_bytes(b"the old one")
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no more disk"):
        models.save({"format": "x"}, tmp_path / "ckpt.pt")
    assert (tmp_path / "ckpt.pt").read_bytes() == b"the old one" and os.listdir(tmp_path) == ["ckpt.pt"]


def test_the_newest_run_is_found_by_time_and_those_that_ended_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "train a model first" in one_line_error(models.newest_checkpoint)
    for name, time in (("a", 3e8), ("b", 1e8), ("c", 2e8)):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "ckpt.pt").touch()
        os.utime(Path("runs", name, "ckpt.pt"), (time, time))
    assert models.newest_checkpoint() == Path("runs/a/ckpt.pt")
    for name in ("b", "c"):
        Path("runs", name, "metrics.json").write_text('{"finished": true}')
    assert models.newest_checkpoint() == Path("runs/c/ckpt.pt")


# --- ask ---


def test_logits_are_those_of_the_normalised_image_whatever_the_batches(small):
    images = torch.randint(0, 256, (10, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([7, 3, 9, 0])
    found = models.infer(small, models.in_batches(images, index, 3), {"mean": 0.4, "std": 0.2})
    with torch.inference_mode():
        expected = small((images[index][:, None] / 255 - 0.4) / 0.2)
    assert found.dtype == torch.float64 and not found.requires_grad
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-6)


def decide(logits, slope=1.0, intercept=0.0, threshold=0.0) -> models.Decision:
    point = {"slope": slope, "intercept": intercept, "threshold": {"logit": threshold}}
    return models.decide(torch.tensor(logits, dtype=torch.float64), point)


def test_two_classes_are_calibrated_on_their_difference_and_decided_by_the_threshold():
    found = decide([[1.0, 3.0], [2.0, 2.0], [5.0, 1.0]], slope=0.5, intercept=0.25, threshold=0.25)
    assert found.calibrated_logits[:, 1].tolist() == pytest.approx([1.25, 0.25, -1.75])
    assert found.calibrated_logits[:, 0].tolist() == pytest.approx([-1.25, -0.25, 1.75])
    expected = [1 / (1 + math.exp(-z)) for z in (1.25, 0.25, -1.75)]
    assert found.probabilities[:, 1].tolist() == pytest.approx(expected)
    assert found.predicted.tolist() == [1, 1, 0]  # positive from the threshold on
    assert decide([[2.0, 2.0]], 0.5, 0.25, 0.2500001).predicted.tolist() == [0]


def test_of_three_classes_the_largest_is_predicted():
    logits = [[0.0, math.log(2), math.log(5)], [3.0, 1.0, 2.0]]
    found = decide(logits)
    assert found.probabilities[0].tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert found.calibrated_logits[0].tolist() == pytest.approx([math.log(1 / 7), math.log(2 / 6), math.log(5 / 3)])
    assert found.predicted.tolist() == [2, 0]
    assert decide(logits, slope=2.0).probabilities[0].tolist() == pytest.approx([1 / 30, 4 / 30, 25 / 30])


@pytest.mark.parametrize("n_classes", [2, 3])
def test_where_probabilities_saturate_logits_still_rank_and_decide(n_classes):
    logits = [[0.0] * (n_classes - 1) + [z] for z in (100.0, 100.5, 101.0)]
    found = decide(logits, slope=2.0, threshold=201.0)
    assert found.probabilities[:, -1].tolist() == [1, 1, 1]
    assert (found.calibrated_logits[:, -1].diff() > 0.9).all()
    assert found.predicted.tolist() == ([0, 1, 1] if n_classes == 2 else [2, 2, 2])
    assert decide([[1000.0, -1000.0, 0.0]], slope=20.0).probabilities.tolist() == [[1, 0, 0]]


# --- what is unlike ---


@pytest.fixture(scope="module")
def phantoms(demo):
    """uint8 images of the demo set at 64 px: training, validation, test."""
    records = data.find_training(demo) + data.scan(demo, "test")
    images = torch.stack([torch.from_numpy(data.read_image(demo / r.path, 64)[0]) for r in records])
    is_test = torch.tensor([r.split == "test" for r in records])
    return images[~is_test][20:], images[~is_test][:20], images[is_test]


@pytest.fixture(scope="module")
def check(phantoms):
    return models.fit_input_check(phantoms[0].split(32), phantoms[1].split(32))


def flagged(check: dict, images: torch.Tensor) -> float:
    return float((models.unlikeness(check, images) > check["cut"]).float().mean())


@pytest.mark.parametrize("kind", ["noise", "inverted", "upside down", "plain grey", "patches of noise"])
def test_what_is_not_an_upright_radiograph_is_flagged(check, phantoms, kind):
    test = phantoms[2]
    seed = torch.Generator().manual_seed(7)
    patches = torch.randint(0, 256, (len(test), 8, 8), generator=seed, dtype=torch.uint8)
    images = {
        "noise": torch.randint(0, 256, test.shape, generator=seed, dtype=torch.uint8),
        "inverted": 255 - test,
        "upside down": test.flip(1),
        "plain grey": torch.full_like(test, 128),
        "patches of noise": patches.repeat_interleave(8, 1).repeat_interleave(8, 2),
    }
    assert flagged(check, images[kind]) >= 0.9 and flagged(check, test) <= 0.25


def test_the_check_fits_images_that_lie_on_a_gpu():
    # Fake tensors show what would meet on two devices; the cut is a number, which none of them has.
    with FakeTensorMode(), contextlib.suppress(DataDependentOutputException):
        images = torch.zeros(40, 64, 64, dtype=torch.uint8, device="cuda")
        models.fit_input_check(images.split(20), images.split(20))


def test_the_cut_flags_one_in_a_hundred_of_the_validation_images():
    g = torch.Generator().manual_seed(8)
    images = nn.functional.interpolate(torch.rand(1200, 1, 6, 6, generator=g) * 255, (32, 32), mode="bicubic")
    images = images[:, 0].clamp(0, 255).to(torch.uint8)
    check = models.fit_input_check([images[:700]], [images[700:]])
    assert flagged(check, images[700:]) == pytest.approx(0.01, abs=0.002)


def test_border_logit_is_that_of_scikit_learn():
    images = torch.randint(0, 256, (60, 64, 64), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    is_positive = np.arange(60) % 2 == 0
    images[is_positive, :4] //= 2
    features = data.border_features(images)
    border = models.fit_border(features, is_positive)
    standard = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    expected = standard.fit(features.double(), is_positive).decision_function(features.double())
    found = models.border_logit(border, images)
    assert found.dtype == np.float64 and ((found > 0) == is_positive).all()
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)
    images[:, 10:50, 10:50] = 0  # not a part of the border
    np.testing.assert_allclose(models.border_logit(border, images), found)
