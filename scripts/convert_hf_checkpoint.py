"""Turn a checkpoint as published on the Hugging Face hub into the one file `model.pth`.

Three things change: the names become Meta's, the matrices of q, k and v become one, and the rows of
q and k go into Meta's rotary order. Hugging Face turns dimension i of a head together with
dimension i + head_dim/2 (`rotate_half`), Meta turns neighbours: row 2i here is row i there, and row
2i + 1 is row i + head_dim/2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import check_finite
from cli import Parser, UserError, read_json, replacing, run
from families import from_config
from model import LayerKind, ModelArgs

PRECISIONS = ("bfloat16", "float16", "float32")

# ------------------------------------------------------------------------------------------------
# Where every tensor goes

# What Hugging Face calls each tensor; `layer` stands before the names that every layer has.
HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "layer": "model.layers.{}.",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a published tensor goes: to the rows from `start` on of the tensor called `name`."""

    name: str
    shape: tuple[int, ...]
    start: int = 0
    halves: int = 0  # of so many rows each its heads consist, to be interleaved


def layer_parts(args: ModelArgs, kind: LayerKind, interleave: bool) -> dict[str, Part]:
    """The weights of a layer of this kind, by the keys of `HF_NAMES`."""
    dim, ffn = args.dim, args.intermediate_size
    q, kv = kind.n_head * kind.head_dim, kind.n_local_heads * kind.head_dim
    halves = kind.head_dim // 2 if interleave else 0
    table = {
        "wq": Part("attention.wqkv", (q, dim), 0, halves),
        "wk": Part("attention.wqkv", (kv, dim), q, halves),
        "wv": Part("attention.wqkv", (kv, dim), q + kv),
        "wo": Part("attention.wo", (dim, q)),
        "w1": Part("feed_forward.w1", (ffn, dim)),
        "w2": Part("feed_forward.w2", (dim, ffn)),
        "w3": Part("feed_forward.w3", (ffn, dim)),
        "attention_norm": Part("attention_norm", (dim,)),
        "ffn_norm": Part("ffn_norm", (dim,)),
    }
    if args.qk_norm:
        for name in ("q_norm", "k_norm"):
            table[name] = Part(f"attention.{name}", (kind.head_dim,), 0, halves)
    return table


def parts(args: ModelArgs, names: dict[str, str], interleave: bool = True) -> dict[str, Part]:
    """Every tensor that a checkpoint with these `names` must hold, and where it goes.

    `interleave` says that the heads of q and k lie in Hugging Face's order.
    """
    table = {
        names["tok_embeddings"]: Part("tok_embeddings", (args.vocab_size, args.dim)),
        names["norm"]: Part("norm", (args.dim,)),
    }
    if not args.tied:
        table[names["output"]] = Part("output", (args.vocab_size, args.dim))
    for i, kind in enumerate(args.layers):
        for key, part in layer_parts(args, args.kinds[kind], interleave).items():
            source = names["layer"].format(i) + names[key]
            table[source] = dataclasses.replace(part, name=f"layers.{i}.{part.name}")
    result = {}
    for source, part in table.items():
        result[f"{source}.weight"] = dataclasses.replace(part, name=f"{part.name}.weight")
        if part.name.split(".")[-1] in args.biases:
            bias = dataclasses.replace(part, name=f"{part.name}.bias", shape=part.shape[:1])
            result[f"{source}.bias"] = bias
    return result


def check_tensors(where: Path, found: dict[str, tuple[int, ...]], table: dict[str, Part]) -> None:
    """Raise a `UserError` unless exactly the tensors of `table` are there, in the shapes it has.

    Known before memory is asked for, so a configuration cannot ask for more than the files hold.
    """
    names = found.keys()
    for tensors, verb in ((table.keys() - names, "lacks"), (names - table.keys(), "also holds")):
        if tensors:
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            raise UserError(
                f"{where} {verb} {min(tensors)}{more}, unlike the model that its configuration "
                "describes; fetch the files again, or use another model"
            )
    for name, part in table.items():
        if found[name] != part.shape:
            raise UserError(
                f"{where}: {name} is {[*found[name]]}, and the configuration asks for "
                f"{[*part.shape]}; fetch the files again"
            )


def assemble(
    table: dict[str, Part],
    tensors: Iterable[tuple[Path, str, Tensor]],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Copy `(file, name, tensor)` triples to their places; return the state dict.

    Each tensor is dropped before the next is read, so memory holds one copy of the model.
    """
    # Of the parts of one matrix the last counts. Nothing is touched yet: made one by one between
    # what is read and dropped, the tensors would leave holes in memory.
    shapes = {part.name: (part.start + part.shape[0], *part.shape[1:]) for part in table.values()}
    state = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    for file, name, tensor in tqdm(tensors, "converting", len(table), unit="tensor"):
        part = table[name]
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise UserError(
                f"{file}: {name} is {tensor.dtype}, no plain floats; fetch the files again"
            )
        if part.halves:  # [H*D, ...] -> [H, 2, D/2, ...] -> [H, D/2, 2, ...] -> [H*D, ...]
            tensor = tensor.unflatten(0, (-1, 2, part.halves)).transpose(1, 2).flatten(0, 2)
        rows = state[part.name][part.start : part.start + part.shape[0]]
        rows.copy_(tensor)
        check_finite(file, name, rows)
    return state


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict; `UserError` if there is no room for it."""
    try:
        torch.save(state, path)
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"cannot write {path} ({reason}); is the disk full?") from None


# ------------------------------------------------------------------------------------------------
# Reading what was published


def find_shards(folder: Path) -> list[Path]:
    """The files with the weights: one, or those of an index, or simply all there are."""
    for single, pattern in (
        ("model.safetensors", "*.safetensors"),
        ("pytorch_model.bin", "pytorch_model*.bin"),
    ):
        if (folder / single).exists():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index} has no weight_map; fetch the file again")
            for name, file in weight_map.items():
                if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
                    raise UserError(
                        f"{index}: weight_map has {file!r:.60} for {name}, no name of a file "
                        "beside it; fetch the file again"
                    )
            shards = sorted({folder / file for file in weight_map.values()})
            for shard in shards:
                if not shard.exists():
                    raise UserError(f"{shard}, named in {index.name}, is missing; download again")
            return shards
        # Meta's own copy of the weights, `consolidated`, has the same suffix.
        shards = [file for file in folder.glob(pattern) if not file.match("consolidated*")]
        if shards:
            return sorted(shards)
    raise UserError(f"{folder} has no *.safetensors and no pytorch_model*.bin; download it again")


@contextlib.contextmanager
def open_shard(file: Path) -> Iterator[tuple[dict[str, tuple], Callable[[str], Tensor]]]:
    """Map a file; yield the shapes in it by name, and a function from a name to its tensor."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                shapes = {name: shard.get_slice(name).get_shape() for name in shard.keys()}
                yield {name: tuple(shape) for name, shape in shapes.items()}, shard.get_tensor
        else:
            shard = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            yield {str(name): tuple(t.shape) for name, t in shard.items()}, shard.__getitem__
    except (SafetensorError, OSError, RuntimeError, EOFError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{file} is not whole ({reason}); download it again") from None
    except pickle.UnpicklingError:
        raise UserError(f"{file} holds more than tensors, or is not whole; download it") from None


def read_tensors(shards: list[Path], wanted: dict[str, Part]) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield `(file, name, tensor)` of the `wanted` tensors."""
    for file in shards:
        with open_shard(file) as (shapes, _):
            names = [name for name in shapes if name in wanted]
        for name in names:
            # A file is mapped anew for every tensor: what has been read of a mapping counts as
            # memory until the mapping goes, and a file may hold the whole model.
            with open_shard(file) as (_, get_tensor):
                tensor = get_tensor(name)
            yield file, name, tensor
            del tensor


def convert(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write `folder`/model.pth from the published files in `folder`; return its path."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; make one with scripts/download.py")
    config = read_json(folder / "config.json")
    args = from_config(config)
    if "quantization_config" in config:
        raise UserError(f"the weights in {folder} are quantized; download the original model")
    table = parts(args, HF_NAMES)
    shards = find_shards(folder)
    found = {}
    for file in shards:
        with open_shard(file) as (shapes, _):
            found |= shapes
    # Old checkpoints carry the rotary table, and some tied ones the embedding twice.
    found = {name: found[name] for name in found if not name.endswith("rotary_emb.inv_freq")}
    if args.tied:
        found.pop("lm_head.weight", None)
    check_tensors(folder, found, table)
    state = assemble(table, read_tensors(shards, table), dtype)
    with replacing(folder / "model.pth") as temporary:
        save_state(state, temporary)
    return folder / "model.pth"


# ------------------------------------------------------------------------------------------------
# The command line


def main(args: argparse.Namespace) -> None:
    print(convert(args.checkpoint_dir, getattr(torch, args.precision)))


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument(
        "--checkpoint_dir", type=Path, required=True, help="a folder that download.py has made"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    run(main, parser)
