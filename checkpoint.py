"""The files of a checkpoint: the default one, what is wrong with one, and writing a large one."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cli import UserError

DEFAULT_CHECKPOINT = (
    Path(__file__).resolve().parent / "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model.pth"
)

DEVICES = ("cpu", "cuda", "mps", "xpu")

# ------------------------------------------------------------------------------------------------
# The default model, and the device


def default_checkpoint() -> Path:
    """The checkpoint of the default model, fetched and converted by a script if it is not there."""
    script = Path(__file__).resolve().parent / "scripts" / "default_model.py"
    if not os.path.exists(DEFAULT_CHECKPOINT):
        if not os.path.exists(script):
            raise UserError(f"no --checkpoint_path was given, and there is no {script} to make one")
        with subprocess.Popen([sys.executable, str(script)], stdout=2) as process:
            try:
                code = process.wait()
            except BaseException:  # a signal: `run` would kill the script with its files in place
                process.terminate()
                raise
        if code:
            sys.exit(code)  # the script has said why
    return DEFAULT_CHECKPOINT


def find_device(name: str | None) -> torch.device:
    """The device called `name`, else by the variable DEVICE, else CUDA if there is a GPU."""
    source = "" if name is not None else " of the variable DEVICE"
    if name is None:
        name = os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name.split(":")[0] not in DEVICES:
            raise RuntimeError
        device = torch.device(name)
        torch.empty(1, device=device).item()  # an absent GPU has no memory
        return device
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError):
        raise UserError(f"device {name!r}{source} cannot be used here; try --device cpu") from None


# ------------------------------------------------------------------------------------------------
# State dicts

CONVERTERS = {
    ".gguf": "scripts/convert_gguf.py",
    ".safetensors": "scripts/convert_hf_checkpoint.py",
}


def check_path(path: Path) -> None:
    """Raise a UserError unless `path` is a file."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        how = "make one with scripts/prepare.sh <repo>"
        if path.name.startswith("model_"):
            how = "make it with quantize.py from a model.pth"
        raise UserError(f"there is no checkpoint {path}; {how}") from None
    except OSError as error:  # a name too long, a loop of links
        raise UserError(f"cannot read {path} ({error.strerror}); pass a model.pth") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder; pass a file in it, such as {path / 'model.pth'}")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file; pass a model.pth")
    if path.suffix in CONVERTERS:
        raise UserError(f"{path} is no model.pth; make one of it with {CONVERTERS[path.suffix]}")


def is_plain(tensor: Any) -> bool:
    """Whether this is a tensor with values in the ordinary layout: dense, one number an element."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return False
    return not (tensor.is_nested or tensor.is_meta or tensor.is_quantized)


def load_state(path: Path) -> dict[str, Tensor]:
    """Memory-map the state dict of a checkpoint; UserError if the file is not one."""
    check_path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of tensors that are refused below
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except PermissionError:
        raise UserError(f"{path} may not be read by you; change its permissions") from None
    except Exception:  # a damaged pickle can fail in any way
        state = None
    what = f"{path} is not a whole state dict in the zip format of torch.save"
    if not isinstance(state, dict):
        raise UserError(f"{what}; make it again")
    for name, tensor in state.items():
        if not isinstance(name, str) or not is_plain(tensor):
            raise UserError(f"{what} ({name!r:.80} names no dense tensor); make it again")
    state.pop("rope.freqs", None)  # Meta's own files carry this table, which is computed here
    return state


def upload(state: dict[str, Tensor], device: torch.device, stage: int = 64 << 20) -> None:
    """Copy the tensors of a state dict to the device, through two pinned buffers on CUDA.

    While one buffer of `stage` bytes crosses the bus, the other is filled from the file.
    """
    cuda, done = device.type == "cuda", {}
    buffers = [torch.empty(stage, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
    turns = itertools.cycle((buffer, torch.cuda.Event() if cuda else None) for buffer in buffers)
    for name, tensor in state.items():
        if tensor.is_cuda:  # a rank's slice, there already
            continue
        if id(tensor) not in done:
            source = tensor.contiguous()
            done[id(tensor)] = target = torch.empty_like(source, device=device)
            parts = [flat.view(-1).view(torch.uint8).split(stage) for flat in (source, target)]
            for part, place in zip(*parts, strict=True):
                buffer, crossed = next(turns)
                if cuda:
                    crossed.synchronize()  # the last copy from this buffer
                place.copy_(buffer[: len(part)].copy_(part), non_blocking=True)
                if cuda:
                    crossed.record(torch.cuda.current_stream(device))
        state[name] = done[id(tensor)]


ADVICE = "is it of another model than config.json describes? Convert it again"


def join_qkv(path: Path, state: dict[str, Tensor], layers: Iterable) -> None:
    """Make one matrix of the separate wq, wk and wv of Meta's own files, as `layers` have it."""
    for i, attention in enumerate(layer.attention for layer in layers):
        prefix = f"layers.{i}.attention."
        names = [prefix + f"{name}.weight" for name in ("wq", "wk", "wv")]
        sizes = [n * attention.kind.head_dim for n in attention.heads]
        expected = dict(zip(names, attention.wqkv.weight.split(sizes), strict=True))
        if expected.keys() <= state.keys():
            parts = {name: state.pop(name) for name in names}
            check_state(path, parts, expected)
            state[prefix + "wqkv.weight"] = torch.cat([*parts.values()])


def check_layers(path: Path, state: dict[str, Tensor], expected: int) -> None:
    """Raise a UserError unless the file holds so many layers, before that many are made."""
    found = {name.split(".")[1] for name in state if name.startswith("layers.")}
    if len(found) != expected:
        raise UserError(f"{path} holds {len(found)} layers, not {expected}; {ADVICE}")


def check_finite(where: str | Path, name: str, tensor: Tensor) -> None:
    """Raise a UserError if a weight is NaN or infinite."""
    if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{where}: {name} has values that are NaN or infinite in {kind}; "
            "fetch the model again, or convert it to a wider precision"
        )


def check_state(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise a `UserError` that names the first tensor that does not fit the model, and how."""

    def kind(tensor: Tensor) -> str:
        plain = tensor.is_floating_point() and tensor.itemsize > 1  # fp8 and fp4 have scales beside
        dtype = "float" if plain else str(tensor.dtype)
        return f"{dtype.removeprefix('torch.')} {list(tensor.shape)}"

    for name, tensor in expected.items():
        if state.get(name) is None:
            raise UserError(f"{path} lacks the tensor {name}; {ADVICE}")
        if kind(state[name]) != kind(tensor):
            found, wanted = kind(state[name]), kind(tensor)
            raise UserError(f"{path}: {name} is {found}, not {wanted}; {ADVICE}")
    for name in state.keys() - expected.keys():
        raise UserError(f"{path} holds {name}, which this model does not have; {ADVICE}")


# ------------------------------------------------------------------------------------------------
# Writing a state dict tensor by tensor


class StateFile:
    """A file as torch.save writes it, whose tensors get their values one by one, in any order.

    torch.save lays it out without values, torch.load says where each tensor lies, as in
    https://docs.pytorch.org/tutorials/unstable/gpu_direct_storage.html. The zip's checksums stay 0;
    torch.load does not read them. `layout` gives shapes and dtypes. UserError if the disk has no
    room for it.
    """

    def __init__(self, path: Path, layout: dict[str, Tensor]):
        # What is never touched takes no memory.
        empty = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in layout.items()}
        size, free = sum(t.nbytes for t in empty.values()), shutil.disk_usage(path.parent).free
        if size > free:
            raise UserError(
                f"cannot write {size / 1e9:.1f} GB to {path.parent}, where {free / 1e9:.1f} GB are "
                "free; make room there"
            )
        try:
            with torch.serialization.skip_data(), open(path, "wb") as file:
                torch.save(empty, file)  # to an open file: the archive would hold the name
        except RuntimeError as error:  # closing the archive fails, too, after an error or a signal
            raise error.__context__ or error from None
        self.places = torch.load(path, map_location="meta", weights_only=True)
        self.file = open(path, "r+b")

    def write(self, place: Tensor, values: Tensor) -> None:
        """Write `values` to a place: one of `places`, or what indexing it gives."""
        if not place.is_contiguous():
            for piece, value in zip(place, values, strict=True):
                self.write(piece, value)
            return
        offset = place.storage_offset() * place.itemsize
        self.file.seek(place.untyped_storage()._checkpoint_offset + offset)
        self.file.write(values.to(place.dtype).contiguous().view(torch.uint8).numpy())

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *error) -> None:
        self.file.close()
