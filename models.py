"""What a model is: build it with timm, take pretrained weights, save it, load it, explain it, know its inputs.

Every model has one grey input channel and one logit per class.
"""

import argparse
import contextlib
import difflib
import http.client
import io
import json
import sys
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import UserError, warn

FORMAT = "chest radiograph classifier"
FORMAT_VERSION = 3


def pick_device(name: str) -> torch.device:
    """The device for auto, cpu, cuda, cuda:1, mps ...: auto takes CUDA, then MPS, then the CPU."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"--device {name} can't be used here ({reason}); try --device auto") from None
    torch.backends.cudnn.allow_tf32 = False  # or a probability would depend on the batch that an image stood in
    return device


# --- build ---


def pretrained_config(name: str) -> timm.models.PretrainedCfg:
    """What timm knows of a model's weights: their input, and where they are, if there are any.

    Raises:
        UserError: timm has no such model, or none with such a tag; names the nearest.
    """
    try:
        if timm.is_model(name) and "." not in name:
            return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()  # timm's old names have none
        return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        nearest = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5))
        raise UserError(f"timm has no model {name!r}; nearest: {nearest or 'none'}") from None


def preprocessing(name: str, size: int | None) -> dict:
    """Input size, and mean and std of grey levels in [0, 1] as timm's weights expect them.

    Where size is None, it is 160 pixels, or the model's own if it takes one size alone.
    """
    config = pretrained_config(name)
    if size is None:
        size = config.input_size[-1] if takes_one_size(name) else 160
    return {"input_size": size, "mean": float(np.mean(config.mean)), "std": float(np.mean(config.std))}


def takes_one_size(name: str) -> bool:
    """Whether the architecture is built for one input size, as models of tokens are for their position table."""
    return bool(pretrained_config(name).fixed_input_size)


def build(name: str, classes: int, size: int, **kwargs) -> nn.Module:
    """A timm model with one input channel and classes logits; kwargs go to timm.create_model.

    Raises:
        UserError: unknown name, or an input size that the architecture does not take.
    """
    if takes_one_size(name):
        kwargs["img_size"] = size
    try:
        model = timm.create_model(name, in_chans=1, num_classes=classes, **kwargs)
    except AssertionError as e:
        raise UserError(f"{name} can't be built for {size} x {size} pixels ({e}); try another size") from None
    if not kwargs.get("pretrained"):
        # timm scales some heads by the number of classes: with two, logits would start 20 times too large.
        model.reset_classifier(classes)
    return model


def check_size(model: nn.Module, size: int) -> None:
    """Raise UserError where the model, in evaluation mode from then on, can't take size x size pixels."""
    x = torch.zeros(2, 1, size, size, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model.eval()(x)
    except (RuntimeError, AssertionError, ValueError) as e:
        raise UserError(f"the model does not take {size} x {size} pixels ({e}); try another size") from None


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """channels_last, the faster one, but where it crashes or does not fit; images of one channel are in both."""
    if device.type == "mps":  # batch norms go wrong there in the backward pass (PyTorch issue 175189)
        return torch.contiguous_format
    if any(parameter.ndim == 5 for parameter in model.parameters()):
        return torch.contiguous_format
    for layer in model.modules():
        # In the backward pass of such a layer oneDNN writes where it must not (its issue 6035).
        if device.type == "cpu" and isinstance(layer, nn.Conv2d):
            shape = layer.kernel_size, layer.stride
            if shape == ((1, 1), (2, 2)) and layer.in_channels < 16:
                return torch.contiguous_format
    return torch.channels_last


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- pretrained weights ---

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "network", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


def build_pretrained(
    name: str, classes: list[str], size: int, weights: str | None, insist: bool
) -> tuple[nn.Module, dict, dict | None]:
    """A model with weights from a file, or else timm's own from the hub or its cache.

    Args:
        weights: path of a .safetensors file, of a state dict saved by torch, or of a run of this suite; None for timm's
            pretrained ones.
        insist: raise where there are none; otherwise the model keeps its random weights.

    Returns:
        the model; where its weights come from: source (a file, hub or random), note (what was taken and what was not,
        one line) and failed (why there are none); and of a checkpoint of this suite what it has seen: patients and
        pixels, as in its data.
    """
    if weights is not None:
        return from_file(name, classes, size, weights)
    config = pretrained_config(name)
    failed = f"timm has no pretrained weights for {name}"
    if config.has_weights:
        model, reason = from_hub(name, size)
        if model is not None:
            model.reset_classifier(len(classes))
            note = f"timm's pretrained weights ({config.hf_hub_id or config.url}); stem summed to 1 channel; new head"
            return model, {"source": "hub", "note": note, "failed": ""}, None
        failed = f"no pretrained weights for {name}: {reason}"
    if insist:
        raise UserError(f"{failed}; use --weights FILE or --no-pretrained")
    model = build(name, len(classes), size)
    return model, {"source": "random", "note": "random weights", "failed": failed}, None


def from_hub(name: str, size: int) -> tuple[nn.Module | None, str]:
    """timm's pretrained model with its own head, or None and the reason."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        # Offline the hub's library takes its cache at once; otherwise it would try for minutes.
        constants.HF_HUB_OFFLINE = offline or not answers(constants.ENDPOINT)
        return build(name, pretrained_config(name).num_classes, size, pretrained=True), ""
    except UserError:
        raise
    except Exception as e:  # noqa: BLE001, the hub, the network and the cache fail in many ways
        sentence = data.one_line(e).partition(". ")[0].rstrip(".")
        return None, sentence or type(e).__name__
    finally:
        constants.HF_HUB_OFFLINE = offline


def answers(address: str) -> bool:
    """Whether a server answers within a few seconds; looking up its name would know no limit."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        data.call_within(6, urllib.request.urlopen, request, None, 4)
    except (OSError, http.client.HTTPException) as e:
        return isinstance(e, urllib.error.HTTPError)  # an answer too
    return True


def from_file(name: str, classes: list[str], size: int, weights: str) -> tuple[nn.Module, dict, dict | None]:
    """build_pretrained with weights of a file: every tensor must fit. The head is new, but where the classes are known.

    Raises:
        UserError: missing, damaged, weights of another architecture, or not finite.
    """
    path = in_run_folder(weights)
    content = read_weights(path)
    seen = None
    known_classes = []
    if "format" in content:
        content = load(path)
        known_classes = content["classes"]
        seen = {key: content["data"][key] for key in ("patients", "pixels")}
        if content["input_size"] != size:
            warn(
                f"{path} is of images of {content['input_size']} px, not {size}: whether it was trained on those that "
                "validate it now is told by their patients alone"
            )
    state = unwrap(content, path)
    config = pretrained_config(name)
    stem, head = first_name(config.first_conv), first_name(config.classifier)
    keeps_head = set(classes) <= set(known_classes)
    try:
        if keeps_head:
            rows = [known_classes.index(c) for c in classes]
            for key in {f"{head}.weight", f"{head}.bias"} & state.keys():
                state[key] = state[key][rows]
        count = len(state.get(f"{head}.weight", ()))
        channels = state[f"{stem}.weight"].shape[1] if f"{stem}.weight" in state else 3
        overlay = {"state_dict": state, "num_classes": count, "input_size": (channels, size, size)}
        # Strict: one tensor too many, too few or of another shape is another architecture.
        model = build(name, count, size, pretrained=True, pretrained_cfg_overlay=overlay)
    except UserError:
        raise
    except Exception as e:  # noqa: BLE001, timm's filters stumble over foreign tensors in many ways
        raise UserError(f"{path} does not hold weights of {name}: {data.one_line(e)}") from None
    note = f"{len(state)} tensors of {path} taken"
    if channels != 1:
        note += f"; {stem}: {channels} input channels summed to 1"
    if keeps_head:
        note += f"; head of its classes {', '.join(classes)} taken"
    else:
        model.reset_classifier(len(classes))
        note += "; new head"
    return model, {"source": str(path), "note": note, "failed": ""}, seen


def first_name(names: str | tuple | None) -> str:
    """timm names one layer, or several of which the first counts, or none."""
    return names[0] if isinstance(names, tuple) else names or ""


def in_run_folder(path: str | Path) -> Path:
    """A run's folder stands for its checkpoint."""
    path = Path(path)
    return path / "ckpt.pt" if path.is_dir() else path


def read_weights(path: Path) -> dict:
    """Whatever dict a .safetensors file, or a file saved by torch, holds."""
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # beside the weights of timm's own train.py
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001, unpicklers fail in any way, and name options that are none of ours
        raise UserError(f"{path} can't be read as weights: no .safetensors file, nor tensors saved by torch") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a state dict of tensors")
    return content


def unwrap(content: dict, path: Path) -> dict[str, Tensor]:
    """The state dict in what a training program saved: under another key, or with a prefix before every name."""
    state = content
    for key in WRAPPERS * 3:  # deep enough for what is known, in any order
        if isinstance(state.get(key), dict):
            state = state[key]
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path} does not hold a state dict of tensors")
    for prefix in PREFIXES * 2:  # they come in any order too, one within another
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    for key, value in state.items():
        if not is_sound(value):
            raise UserError(f"{path} holds NaN, infinite, sparse or quantized weights: {key}")
    return state


def is_sound(value: Tensor) -> bool:
    """Of finite numbers, neither sparse nor quantized nor without data."""
    plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return plain and bool(value.isfinite().all())


# --- save and load ---

CELLS, FINE_CELLS = 16, 4  # along a side, see image_features
FEATURES = CELLS**2 + FINE_CELLS**2 + 2
BORDER_FEATURES = 348  # see data.border_features


@dataclass(frozen=True)
class Field:
    """What may stand under one key of a checkpoint."""

    kind: type  # float takes whole numbers too
    low: float = -1e30  # for numbers, which are never NaN or infinite
    high: float = 1e30
    shape: tuple[int, ...] | None = None  # for tensors, which must be finite
    dtype: torch.dtype = torch.float32
    of: type | None = None  # what a list holds
    keys: dict | None = None  # fields that a dict must have
    optional: bool = False  # it may be None


TEXT, COUNT, SHARE = Field(str), Field(int, 0), Field(float, 0, 1)
BORDER = Field(Tensor, shape=(BORDER_FEATURES,), dtype=torch.float64)
FIELDS = {
    "model": TEXT,
    "state_dict": Field(dict),
    "classes": Field(list, of=str),
    "positive": TEXT,
    "input_size": Field(int, 1, 10_000),
    "mean": Field(float, -10, 10),
    "std": Field(float, 0.001, 10),
    "margin": Field(float, 0, 0.4),
    "temperature": Field(float, 0.001, 1000),
    "threshold": Field(dict, keys={"value": Field(float, 0, 1, optional=True), "rule": TEXT, "from": TEXT}),
    "validation": Field(dict, keys={"val_loss": Field(float, 0), "val_auroc": SHARE, "val_accuracy": SHARE}),
    "epoch": COUNT,
    "epochs": COUNT,
    "finished": Field(bool),
    "data": Field(
        dict,
        keys={
            "root": TEXT,
            "demo": Field(bool),
            "fingerprint": TEXT,
            "images": COUNT,
            "patients": Field(list, of=str),
            "pixels": Field(Tensor, dtype=torch.int64),
            "val_patients": Field(list, of=str),
            "val_pixels": Field(Tensor, dtype=torch.int64),
        },
    ),
    "arguments": Field(dict, keys={"epochs": Field(int, 1), "folds": Field(int, 2, 1000), "fold": Field(int, 0, 999)}),
    "environment": Field(dict),
    "weights": Field(dict, keys={"source": TEXT, "note": TEXT, "failed": TEXT}),
    "input_check": Field(
        dict,
        keys={
            "mean": Field(Tensor, shape=(FEATURES,)),
            "whiten": Field(Tensor, shape=(FEATURES, FEATURES)),
            "cut": Field(float, 1e-6),
        },
    ),
    "border": Field(
        dict, optional=True, keys={"mean": BORDER, "scale": BORDER, "weight": BORDER, "bias": Field(float)}
    ),
}


def faults(content: dict, fields: dict[str, Field], prefix: str = ""):
    """Yield what is wrong with the values of a checkpoint, in a few words each."""
    for key, field in fields.items():
        name = f"{prefix}{key}"
        value = content.get(key)
        kind = (int, float) if field.kind is float else field.kind
        if key not in content:
            yield f"it holds no {name}"
        elif value is None and field.optional:
            continue
        elif not isinstance(value, kind) or isinstance(value, bool) != (field.kind is bool):
            yield f"{name} is no {field.kind.__name__}"
        elif field.kind in (int, float) and not field.low <= value <= field.high:
            yield f"{name} is {value:.6g}, not in [{field.low:g}, {field.high:g}]"
        elif field.kind is Tensor and not fits(value, field):
            yield f"{name} is another tensor than was saved"
        elif field.of and not all(isinstance(member, field.of) for member in value):
            yield f"{name} holds what does not belong there"
        elif field.keys:
            yield from faults(value, field.keys, f"{name}.")


def fits(value: Tensor, field: Field) -> bool:
    same_shape = field.shape is None or field.shape == value.shape
    return same_shape and value.dtype == field.dtype and is_sound(value)


def save(checkpoint: dict, path: Path) -> None:
    """Write a dict of plain types and tensors; no reader ever sees half of it."""
    buffer = io.BytesIO()  # torch.save on a full disk raises RuntimeError, writing to a file OSError
    torch.save(canonical(checkpoint), buffer)
    with data.replacing(path) as f:
        f.write(buffer.getbuffer())


def canonical(x):
    """The same, with equal strings being one object: a pickle tells them apart, equal runs shall not."""
    if isinstance(x, dict):
        return {canonical(k): canonical(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [canonical(v) for v in x]
    return sys.intern(str(x)) if isinstance(x, str) else x


def load(path: str | Path, kind: str = FORMAT, fields: dict[str, Field] = FIELDS) -> dict:
    """Read a checkpoint onto the CPU and check it; a run's folder stands for the one in it.

    Args:
        kind: which format it must have; fields: what such a file holds.

    Raises:
        UserError: missing, damaged, no checkpoint of this suite, or of a later format version.
    """
    path = in_run_folder(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as z:
            if z.testzip():  # torch would not notice
                raise ValueError("a checksum does not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001, a damaged file makes unpicklers fail in any way
        raise UserError(f"{path} is damaged or no checkpoint of this suite") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != kind:
        raise UserError(f"{path} is not a {kind} of this suite")
    version = checkpoint.get("format_version")
    if not isinstance(version, int):
        raise UserError(f"{path} has no format version: it is damaged")
    if version > FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this code reads up to {FORMAT_VERSION}: update the code")
    if kind == FORMAT and version < FORMAT_VERSION:
        checkpoint = upgrade(checkpoint)
    found = list(faults(checkpoint, fields))
    if kind == FORMAT and not found:
        found = list(contradictions(checkpoint))
    if found:
        raise UserError(f"{path} is damaged: {found[0]}")
    return checkpoint


def upgrade(checkpoint: dict) -> dict:
    """A checkpoint of an earlier version with what it lacked; a run of version 1 had ended, as far as it knew."""
    upgraded = {
        "finished": True,
        "epochs": checkpoint.get("epoch"),
        "border": None,
        "margin": 0.0,
        "weights": {"source": "unknown", "note": "", "failed": ""},
        **checkpoint,
    }
    with contextlib.suppress(TypeError, KeyError):  # faults says what is wrong
        upgraded["arguments"] = {"folds": 10, "fold": 0, **checkpoint["arguments"]}
        about = checkpoint["data"]
        upgraded["data"] = {
            "images": len(about["pixels"]),
            "val_patients": [],
            "val_pixels": torch.zeros(len(about["val"]), dtype=torch.int64),  # so many; which ones is not known
            **about,
        }
    return upgraded


def contradictions(checkpoint: dict):
    """Yield where fields, each right by itself, contradict each other, or could not be written in reports."""
    classes = checkpoint["classes"]
    if len(set(classes)) != len(classes) or len(classes) < 2 or checkpoint["positive"] not in classes:
        yield f"its classes are {classes}, the positive one {checkpoint['positive']}"
    if (len(classes) == 2) != (checkpoint["threshold"]["value"] is not None):
        yield "two classes have a threshold, more have none"
    try:
        json.dumps([checkpoint["arguments"], checkpoint["environment"]], allow_nan=False, sort_keys=True)
    except (TypeError, ValueError):
        yield "its arguments or environment are no JSON"


def from_checkpoint(checkpoint: dict, device: torch.device) -> nn.Module:
    """The model of a checkpoint, in evaluation mode.

    Raises:
        UserError: weights that are not finite, or are not those of this version of timm's model.
    """
    name, state = checkpoint["model"], checkpoint["state_dict"]
    model = build(name, len(checkpoint["classes"]), checkpoint["input_size"])
    finite = {key: value.isfinite() for key, value in model.state_dict().items()}  # but for limits that are infinite
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError) as e:  # such as a key that is no text
        raise UserError(f"the weights do not fit this version of timm's {name}: {data.one_line(e)}") from None
    for key, value in model.state_dict().items():
        if not value[finite[key]].isfinite().all():
            raise UserError(f"the checkpoint has NaN or infinite weights: {key}; train again")
    check_size(model, checkpoint["input_size"])
    return model.eval().to(device, memory_format=memory_format(model, device))


def newest_checkpoint() -> Path:
    """The ckpt.pt of the newest run under runs/ that has ended, else of the newest one."""
    found = list(Path("runs").glob("*/ckpt.pt"))
    if not found:
        raise UserError("there is no runs/*/ckpt.pt; train a model first (python train.py) or name a checkpoint")
    return max(found, key=lambda path: (is_finished(path.parent), path.stat().st_mtime))


def is_finished(folder: Path) -> bool:
    """What a run's metrics.json says; reading that of each run takes less time than their checkpoints."""
    try:
        return json.loads((folder / "metrics.json").read_text())["finished"] is True
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@torch.inference_mode()
def infer(model: nn.Module, batches, pre: dict) -> Tensor:
    """Logits, float64 [images, classes] on the CPU, of an iterable of uint8 batches [batch, side, side]; computed in
    float32 throughout.

    pre: see data.to_input.
    """
    device = next(model.parameters()).device
    inputs = (data.to_input(batch.to(device, non_blocking=True), pre) for batch in batches)
    logits = [model(x).float() for x in inputs]
    return torch.cat(logits).cpu().double()


def in_batches(images: Tensor, index: Tensor, size: int = 64):
    """Yield uint8 batches of the images at index."""
    for part in index.split(size):
        yield images[part]


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Calibrated probabilities, float64 [n, classes], from logits like them (temperature: Guo et al. 2017)."""
    return F.softmax(logits / temperature, dim=1)


# --- explain ---

STRIDE = 8  # of the feature map that is shown: 20 x 20 cells at 160 pixels
MOST_PREFIX_TOKENS = 8  # class token, distillation token, registers
NO_MAP = "this model has no feature map that could be shown as a heat map"


def heat_map(model: nn.Module, x: Tensor, target: int) -> Tensor:
    """HiResCAM (Draelos and Carin 2020): the sum over channels of feature times gradient.

    The gradient is that of the logit of class target less the mean of all: what raises all alike changes
    no probability.
    The features are those of the last stage of stride 8 or less, or the finest there is: cells of 32 pixels, as most
    last stages have them, are too coarse for an opacity. Where a model reads a class token alone, the last block's
    other tokens count for nothing: the block before is taken.

    Args:
        model: in evaluation mode. x: normalised images [n, 1, side, side].

    Returns:
        float32 [n, side, side] in [0, 1], each map divided by its own maximum; zero where nothing speaks for the class.

    Raises:
        UserError: timm names no such stage of this model, or its output is no map of the image.
    """
    kept = []
    size = x.shape[-1]
    with torch.enable_grad(), contextlib.ExitStack() as hooks:
        for layer, side in shown_stages(model, size):
            keep = lambda layer, inputs, output, side=side: kept.append((output, side))
            hooks.enter_context(layer.register_forward_hook(keep))
        logits = model(x)
        score = (logits[:, target] - logits.mean(1)).sum()
    if not kept:
        raise UserError(NO_MAP)
    for output, side in reversed(kept):
        features = find_map(output, side, len(x))
        (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
        contribution = to_grid(features.detach() * gradient, side)
        heat = F.relu(contribution.sum(1, keepdim=True)).float()
        if contribution.any():
            break
    heat = F.interpolate(heat, (size, size), mode="bilinear", align_corners=False)[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)


def shown_stages(model: nn.Module, size: int) -> list[tuple[nn.Module, int]]:
    """The last two layers whose output a heat map may show, each with the cells along a side of images of that size."""
    if hasattr(model, "reroll"):  # its tokens stand in another order than the cells of the image (Hiera)
        raise UserError(NO_MAP)
    try:
        finest = min(info["reduction"] for info in model.feature_info)
        stages = [info for info in model.feature_info if info["reduction"] <= max(STRIDE, finest)]
        return [(model.get_submodule(info["module"]), round(size / info["reduction"])) for info in stages[-2:]]
    except (AttributeError, LookupError, TypeError):
        raise UserError(NO_MAP) from None


def find_map(output, side: int, count: int) -> Tensor:
    """The tensor of a layer's output, or of several outputs, that is a map of count images."""
    for tensor in output if isinstance(output, list | tuple) else [output]:
        if isinstance(tensor, Tensor) and len(tensor) == count and to_grid(tensor, side) is not None:
            return tensor
    raise UserError(NO_MAP)


def to_grid(t: Tensor, side: int) -> Tensor | None:
    """Features as [n, channels, height, width], whatever their layout, which their shape tells; else None.

    That, or channels last, with about side cells along a side (convolutions without padding lose some); or tokens in
    rows, behind those that stand for no cell.
    """
    if t.ndim == 3 and 0 <= t.shape[1] - side**2 <= MOST_PREFIX_TOKENS:
        return t[:, -(side**2) :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if t.ndim != 4:
        return None
    for grid in (t, t.permute(0, 3, 1, 2)):
        height, width = grid.shape[2:]
        if height == width and abs(height - side) <= 2:
            return grid
    return None


# --- know what it has not seen ---


def image_features(images: Tensor) -> Tensor:
    """What an image looks like at a glance, float32 [n, FEATURES], from uint8 [n, side, side].

    Standardised grey levels on a coarse grid, the fine structure on a coarser one, contrast and brightness. On the CPU,
    wherever the images are, so that the check is one and the same for every device.
    """
    x = images.cpu().unsqueeze(1).float()
    coarse = F.adaptive_avg_pool2d(x, CELLS).flatten(1)
    across = F.adaptive_avg_pool2d(x.diff(dim=3).abs_(), FINE_CELLS)
    down = F.adaptive_avg_pool2d(x.diff(dim=2).abs_(), FINE_CELLS)
    fine = (across + down).flatten(1) / 2
    mean = coarse.mean(1, keepdim=True)
    std = coarse.std(1, keepdim=True)
    return torch.cat([(coarse - mean) / (std + 4), (fine + 0.5).log(), (std + 1).log(), mean / 64], 1)


def fit_input_check(train_batches, val_batches) -> dict[str, Tensor | float]:
    """Mean and whitening of the training images' features, and the cut that flags 1 % of the validation images.

    A Mahalanobis distance as in Lee et al. 2018, on plain features instead of a network's: what one learnt for a
    diagnosis ignores much of what makes an image a frontal radiograph. Batches are uint8 [n, side, side].
    """
    count, total, outer = 0, 0.0, 0.0
    for batch in train_batches:
        both = torch.cat([batch, batch.flip(2)])  # mirrored is as good: an augmentation
        features = image_features(both).double()
        count += len(features)
        total = total + features.sum(0)
        outer = outer + features.T @ features
    mean = total / count
    covariance = outer / count - torch.outer(mean, mean)
    scale = covariance.diagonal().clamp(min=1e-8).sqrt()
    # Shrunk to the identity: few images must not make it singular.
    correlation = 0.9 * covariance / torch.outer(scale, scale) + 0.1 * torch.eye(FEATURES, dtype=torch.float64)
    whiten = torch.linalg.inv(torch.linalg.cholesky(correlation)).T / scale[:, None]
    check = {"mean": mean.float(), "whiten": whiten.float(), "cut": 1.0}
    scores = torch.cat([unlikeness(check, batch) for batch in val_batches])
    check["cut"] = float(scores.quantile(0.99))
    return check


def unlikeness(check: dict, images: Tensor) -> Tensor:
    """float32 [n]; above check["cut"] an image is unlike the training images.

    The distance of the features, weighed against that of the image turned upside down: where that one is the nearer,
    something stands on its head.
    """
    here = distance(check, images)
    turned = distance(check, images.flip(1))
    return here * (here / turned.clamp(min=1e-6)).clamp(min=1)


def distance(check: dict, images: Tensor) -> Tensor:
    return ((image_features(images) - check["mean"]) @ check["whiten"]).norm(dim=1)


def fit_border(features: Tensor, positive: np.ndarray) -> dict[str, Tensor | float]:
    """A logistic regression that tells the class from the border alone: a warning, if it can.

    Args:
        features: float32 [n, BORDER_FEATURES] from data.border_features. positive: bool [n].

    Returns:
        mean, scale and weight of the standardised features, float64 [BORDER_FEATURES], and bias.
    """
    from sklearn.linear_model import LogisticRegression  # here, since prediction does without scikit-learn

    features = features.double()
    mean = features.mean(0)
    scale = features.std(0).clamp(min=1e-3)  # a black edge does not vary
    fitted = LogisticRegression(C=0.1, max_iter=1000).fit(((features - mean) / scale).numpy(), positive)
    weight = torch.from_numpy(fitted.coef_[0])
    return {"mean": mean, "scale": scale, "weight": weight, "bias": float(fitted.intercept_[0])}


def border_logit(border: dict, images: Tensor) -> np.ndarray:
    """Logit of the positive class from the border alone, float64 [n], of uint8 images [n, side, side]."""
    standardised = (data.border_features(images).double() - border["mean"]) / border["scale"]
    return (standardised @ border["weight"] + border["bias"]).numpy()
