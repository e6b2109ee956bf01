"""Converts a checkpoint from the Hugging Face hub to a single file, `model.pth`.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/org/model

With `--mode int4` or another mode, it writes the quantized file directly, as quantize.py would.

Three things change: names become Meta's, q, k and v are fused into one matrix, and the rows of q
and k are permuted to Meta's rotary order. Hugging Face rotates dimension i of a head together with
i + head_dim/2 (`rotate_half`), Meta rotates neighbours: row 2i here is row i there, and row 2i + 1
is row i + head_dim/2. Rows that are not rotated stay in place.

families.py says how families differ: names, rotary order, norms stored as w for 1 + w. Fused
tensors are split, and tensors outside the text model are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import StateFile, check_finite, is_plain
from cli import PRECISIONS, Parser, UserError, named_path
from families import find_family, from_config
from files import check_outputs, read_json, replacing
from keys import AGAIN, Keys
from kinds import MAX_EXPERTS, MAX_LAYERS
from model import LayerKind, ModelArgs, Transformer
from process import run
from quantize import (
    GROUP_SIZES,
    check_groups,
    choose_schemes,
    file_name,
    quantize,
    stored_layout,
    write_linear,
)
from scripts.fp8 import dequantize, find_block, take_scales
from scripts.random_weights import linears

MODES = ("int8", "int8-activation", "int4", "hybrid")  # of quantize.py, without calibration
GROUPED = ("int4", "hybrid")  # those with a group size
ROUNDED_AT_ONCE = 2**20  # values: bounds the memory of rounding beside the tensor itself

# ------------------------------------------------------------------------------------------------
# Names and places of the tensors

# Hugging Face's name of each tensor; names within a layer follow `layer`. Other names, and those of
# norms that Llama lacks, are in families.py.
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
    "router": "mlp.gate",
    "expert_w1": "mlp.experts.{}.gate_proj",
    "expert_w2": "mlp.experts.{}.down_proj",
    "expert_w3": "mlp.experts.{}.up_proj",
    "shared_w1": "mlp.shared_expert.gate_proj",
    "shared_w2": "mlp.shared_expert.down_proj",
    "shared_w3": "mlp.shared_expert.up_proj",
    "shared_gate": "mlp.shared_expert_gate",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Tensors outside the text model: a vision tower, draft (MTP) layers.
BESIDE = re.compile(r"(model\.)?(vision_tower|vision_encoder|multi_modal_projector|mtp)\.")


@dataclasses.dataclass(frozen=True)
class Part:
    """The destination of a published tensor: the rows of tensor `name` from `start` on."""

    name: str
    shape: tuple[int, ...]
    start: int = 0
    halves: int = 0  # rows in each half of a head's rotated part, to be interleaved
    head_dim: int = 0
    fixed: int = 0  # rows at the end that are not interleaved
    offset: float = 0.0  # added in float32
    expert: int | None = None  # its index in a stack of experts

    def arrange(self, tensor: Tensor) -> Tensor:
        """The published tensor in the network's row order, with the offset added."""
        if self.halves:
            rows = torch.arange(len(tensor))
            heads = rows[: len(rows) - self.fixed].unflatten(0, (-1, self.head_dim))  # [H, D]
            rotated = heads[:, : 2 * self.halves]
            rotated.copy_(rotated.unflatten(1, (2, -1)).transpose(1, 2).flatten(1))  # in place
            tensor = tensor[rows]
        return tensor.float() + self.offset if self.offset else tensor


def ffn_parts(args: ModelArgs, layer: int) -> dict[str, Part]:
    """The weights of a layer's FFN or mixture of experts, by the keys of `HF_NAMES`.

    A key that ends in a number belongs to the expert with that index.
    """

    def matrices(key: str, place: str, width: int, expert: int | None = None) -> dict[str, Part]:
        shapes = {"w1": (width, args.dim), "w2": (args.dim, width), "w3": (width, args.dim)}
        return {
            key.format(name): Part(f"feed_forward.{place}{name}", shape, expert=expert)
            for name, shape in shapes.items()
        }

    mixture = args.mixture
    if mixture is None or layer in mixture.dense_layers:
        return matrices("{}", "", args.intermediate_size)
    table = {"router": Part("feed_forward.router", (mixture.experts, args.dim))}
    if mixture.shared:
        table |= matrices("shared_{}", "shared.", mixture.shared)
    if mixture.shared_gate:
        table["shared_gate"] = Part("feed_forward.shared_gate", (1, args.dim))
    for i in range(mixture.experts):
        table |= matrices(f"expert_{{}} {i}", "", mixture.width, i)
    return table


def layer_parts(args: ModelArgs, kind: LayerKind, interleave: bool) -> dict[str, Part]:
    """The weights of a layer of this kind except its FFN, by the keys of `HF_NAMES`."""
    dim = args.dim
    q, kv = kind.n_head * kind.head_dim, kind.n_local_heads * kind.head_dim
    order = (sum(map(bool, kind.rope)) if interleave else 0, kind.head_dim)
    table = {
        "wq": Part("attention.wqkv", (q, dim), 0, *order),
        "wk": Part("attention.wqkv", (kv, dim), q, *order),
        "wv": Part("attention.wqkv", (kv, dim), q + kv),
        "wqkv": Part("attention.wqkv", (q + 2 * kv, dim), 0, *order, fixed=kv),
        "wo": Part("attention.wo", (dim, q)),
    }
    norms = {"pre": ("norm",), "post": ("post_norm",), "both": ("norm", "post_norm")}[args.norms]
    for name in (f"{layer}_{norm}" for layer in ("attention", "ffn") for norm in norms):
        table[name] = Part(name, (dim,))
    if args.qk_norm == "head":
        for name in ("q_norm", "k_norm"):
            table[name] = Part(f"attention.{name}", (kind.head_dim,), 0, *order)
    if args.qk_norm == "flat":
        table["q_norm"] = Part("attention.flat_norm.q", (q,), 0, *order)
        table["k_norm"] = Part("attention.flat_norm.k", (kv,), 0, *order)
    return table


def parts(
    args: ModelArgs, names: dict[str, str], interleave: bool = True, norm_offset: float = 0.0
) -> dict[str, Part]:
    """Every tensor that a checkpoint with these `names` must hold, and its destination.

    `interleave`: q and k are in Hugging Face's rotary order; `norm_offset` is added to norms.
    """
    table = {
        names["tok_embeddings"]: Part("tok_embeddings", (args.vocab_size, args.dim)),
        names["norm"]: Part("norm", (args.dim,), offset=norm_offset),
    }
    if not args.tied:
        table[names["output"]] = Part("output", (args.vocab_size, args.dim))
    absent = ("wq", "wk", "wv") if "wqkv" in names else ("wqkv",)
    for i, kind in enumerate(args.layers):
        found = layer_parts(args, args.kinds[kind], interleave) | ffn_parts(args, i)
        for key, part in found.items():
            if key in absent:
                continue
            key, _, expert = key.partition(" ")
            source = names["layer"].format(i) + names[key].format(expert)
            offset = norm_offset if key.endswith("norm") else 0.0
            name = f"layers.{i}.{part.name}"
            table[source] = dataclasses.replace(part, name=name, offset=offset)
    result = {}
    for source, part in table.items():
        result[f"{source}.weight"] = dataclasses.replace(part, name=f"{part.name}.weight")
        chooses = part.name.endswith(".router") and args.mixture.biased
        if chooses or part.name.split(".")[-1] in args.biases and part.expert is None:
            bias = dataclasses.replace(part, name=f"{part.name}.bias", shape=part.shape[:1])
            result[f"{source}.bias"] = bias
    return result


def check_tensors(where: Path, found: dict[str, tuple[int, ...]], table: dict[str, Part]) -> None:
    """Raise a `UserError` unless exactly the tensors of `table` are there, in the shapes it has.

    Checked before allocation, so a configuration cannot ask for more memory than the files hold.
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


# ------------------------------------------------------------------------------------------------
# Writing the state dict


@dataclasses.dataclass(frozen=True)
class Target:
    """The output: floats of `dtype`, or Linears quantized in a `mode` of quantize.py."""

    dtype: torch.dtype = torch.bfloat16
    mode: str | None = None
    groupsize: int = 32

    def __post_init__(self):
        if self.mode and self.dtype != torch.bfloat16:
            raise UserError(f"--mode {self.mode} quantizes bfloat16; leave out --precision")

    @property
    def file_name(self) -> str:
        return file_name(self.mode, self.groupsize) if self.mode else "model.pth"

    def layout(self, args: ModelArgs, tied: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict on the meta device, and the schemes of the Linears to quantize."""
        with torch.device("meta"):
            model = Transformer(args).to(self.dtype)
        if not self.mode:
            state = model.state_dict()
            if tied:
                del state["output.weight"]
            return state, {}
        layers = linears(model)
        schemes = choose_schemes([*layers], self.mode)
        check_groups(layers, schemes, self.groupsize)
        return stored_layout(model, schemes, self.groupsize), schemes


def write_rows(
    state: StateFile, part: Part, where: slice, rows: Tensor, schemes: dict[str, str], group: int
) -> None:
    """Write rows of a part, quantized if it is the weight of a Linear with a scheme."""
    linear = part.name.removesuffix(".weight")
    if linear in schemes:
        write_linear(state, linear, quantize(rows, schemes[linear], group), where, part.expert)
    else:
        place = state.places[part.name]
        place = place if part.expert is None else place[part.expert]
        state.write(place[where], rows)


def write_state(
    path: Path,
    args: ModelArgs,
    table: dict[str, Part],
    tensors: Iterable[tuple[Path, str, Tensor]],
    target: Target,
) -> None:
    """Write `(file, name, tensor)` triples to their places in a state dict at `path`.

    Each tensor is dropped before the next is read, and rounded a few rows at a time: rows are
    independent in every scheme. So memory holds one published tensor and little more.
    """
    tied = all(part.name != "output.weight" for part in table.values())
    layout, schemes = target.layout(args, tied)
    dtypes = {n: t.dtype if t.is_floating_point() else target.dtype for n, t in layout.items()}
    options = dict(unit="tensor", disable=None)  # no bar unless stderr is a terminal
    with (
        StateFile(path, layout) as state,
        tqdm(tensors, "converting", len(table), **options) as bar,
    ):
        for file, name, tensor in bar:
            part = table[name]
            plain = is_plain(tensor) and tensor.is_floating_point()
            if not plain or tensor.itemsize == 1:  # fp8 without its scales
                raise UserError(
                    f"{file}: {name} is {tensor.dtype}, no plain floats; fetch the files again"
                )
            tensor = part.arrange(tensor)
            start, options = part.start, (schemes, target.groupsize)
            for rows in tensor.split(max(1, ROUNDED_AT_ONCE // tensor[0].numel())):
                rows, where = rows.to(dtypes[part.name]), slice(start, start + len(rows))
                check_finite(file, name, rows)
                write_rows(state, part, where, rows, *options)
                if schemes and tied and part.name == "tok_embeddings.weight":
                    output = dataclasses.replace(part, name="output.weight")
                    write_rows(state, output, where, rows, *options)
                start = where.stop


# ------------------------------------------------------------------------------------------------
# Reading the published files


def find_shards(folder: Path) -> list[Path]:
    """The weight files: a single one, those of an index, or all there are."""
    for single, pattern in (
        ("model.safetensors", "*.safetensors"),
        ("pytorch_model.bin", "pytorch_model*.bin"),
    ):
        if os.path.lexists(folder / single):
            return [folder / single]
        index = folder / f"{single}.index.json"
        if os.path.lexists(index):
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
                if not os.path.lexists(shard):
                    raise UserError(f"{shard}, named in {index.name}, is missing; download again")
                with open_file(shard) as (held, _):
                    placed = {name for name, file in weight_map.items() if file == shard.name}
                    if lost := placed - held.keys():
                        what = f"{shard} lacks {min(lost)}, which {index.name} places there"
                        raise UserError(f"{what}; {AGAIN}")
            return shards
        # Meta's own copy of the weights, `consolidated`, has the same suffix.
        shards = [file for file in folder.glob(pattern) if not file.match("consolidated*")]
        if shards:
            return sorted(shards)
    raise UserError(f"{folder} has no *.safetensors and no pytorch_model*.bin; download it again")


Source = tuple[tuple[int, ...], Callable[[], Tensor], str]  # shape, how to read it, published name


def add(found: dict[str, Source], name: str, *source) -> None:
    """Add a tensor of a file; UserError if another one of it is the same part of the model."""
    if name in found:
        raise UserError(f"{found[name][-1]} and {source[-1]} of one file are both {name}; {AGAIN}")
    found[name] = source


def text_model(shapes: dict, get_tensor: Callable) -> tuple[dict[str, tuple], Callable]:
    """Shapes and tensors by the names that they have in a text-only checkpoint.

    Checkpoints with a vision tower keep the text model under `language_model`. Phi and GLM fuse
    gate and up in one tensor, here its two halves.
    """
    found: dict[str, Source] = {}
    for source, shape in shapes.items():
        name = re.sub(r"^model\.language_model\.", "model.", source)
        name = name.removeprefix("language_model.")
        name = name.replace(".gate.e_score_correction_bias", ".gate.bias")
        name = name.replace(".shared_experts.", ".shared_expert.")
        add(found, name, tuple(shape), functools.partial(get_tensor, source), source)
    for name in [name for name in found if ".gate_up_proj." in name]:
        shape, whole, source = found[name]
        if not shape or shape[0] % 2:
            continue  # cannot be halved
        del found[name]
        for i, half in enumerate(("gate_proj", "up_proj")):
            part, rows = name.replace("gate_up_proj", half), (shape[0] // 2, *shape[1:])
            add(found, part, rows, lambda whole=whole, i=i: whole().chunk(2)[i], source)
    for name in [name for name in found if STACKED.search(name)]:
        split_experts(name, found)
    return {name: shape for name, (shape, *_) in found.items()}, lambda name: found[name][1]()


# A stack of all experts `[experts, out, in]`, gate and up fused, as in transformers and as Granite
# is published.
STACKED = re.compile(
    r"(\.experts\.(gate_up|down)_proj|block_sparse_moe\.(input|output)_linear\.weight)$"
)


def split_experts(name: str, found: dict[str, Source]) -> None:
    """Replace a stack of experts by the tensors of each expert."""
    shape, whole, source = found[name]
    if len(shape) != 3 or shape[0] > MAX_EXPERTS:
        return
    del found[name]
    experts, rows, columns = shape
    prefix = STACKED.sub("", name)
    prefix += "mlp" if prefix.endswith(".") else ""
    halves = ("down_proj",) if "down" in name or "output" in name else ("gate_proj", "up_proj")
    for expert, (i, half) in itertools.product(range(experts), enumerate(halves)):
        add(
            found,
            f"{prefix}.experts.{expert}.{half}.weight",
            (rows // len(halves), columns),
            lambda expert=expert, i=i: whole()[expert].chunk(len(halves))[i],
            source,
        )


@contextlib.contextmanager
def open_file(file: Path) -> Iterator[tuple[dict[str, tuple], Callable[[str], Tensor]]]:
    """Map a file; yield the shapes in it by name, and a function from a name to its tensor."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise UserError(f"{file} is not a regular file; download it again")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                yield {n: shard.get_slice(n).get_shape() for n in shard.keys()}, shard.get_tensor
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about kinds of tensors that are refused below
                shard = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            values = shard.values() if isinstance(shard, dict) else [None]
            if not all(isinstance(value, Tensor) for value in values):
                raise UserError(f"{file} is no state dict of tensors alone; download it again")
            yield {str(name): t.shape for name, t in shard.items()}, shard.__getitem__
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{file} holds more than tensors, or is not whole; download it") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).split("\n")[0]
        raise UserError(f"{file} is not whole ({reason}); download it again") from None


@contextlib.contextmanager
def open_shard(file: Path) -> Iterator[tuple[dict[str, tuple], Callable[[str], Tensor]]]:
    """As `open_file`, with the names of a text-only checkpoint, and gate and up split."""
    with open_file(file) as (shapes, get_tensor):
        yield text_model(shapes, get_tensor)


def read_tensors(shards: list[Path], wanted: dict[str, Part]) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield `(file, name, tensor)` of the `wanted` tensors."""
    for file in shards:
        with open_shard(file) as (shapes, _):
            names = [name for name in shapes if name in wanted]
        for name in names:
            # A file is mapped anew for every tensor: pages read count as memory until they are
            # unmapped, and a file may hold the whole model.
            with open_shard(file) as (_, get_tensor):
                tensor = get_tensor(name)
            yield file, name, tensor
            del tensor


def equal_tensors(shards: list[Path], names: tuple[str, str]) -> bool:
    """Whether the files hold the same values under both names."""
    first, second = (tensor for _, _, tensor in read_tensors(shards, dict.fromkeys(names)))
    return torch.equal(first, second)


def beside(config: Keys, found: Iterable[str]) -> set[str]:
    """The tensors outside the text model; draft layers come after its own."""
    layers = config.count("num_hidden_layers", MAX_LAYERS)
    drafts = config.count("num_nextn_predict_layers", MAX_LAYERS, default=0, least=0)
    drafts = tuple(f"model.layers.{i}." for i in range(layers, layers + drafts))
    return {name for name in found if BESIDE.match(name) or name.startswith(drafts)}


def text_tensors(
    args: ModelArgs, shards: list[Path], found: dict[str, tuple], names: dict[str, str]
) -> tuple[ModelArgs, dict[str, tuple]]:
    """The used shapes among those `found`, and the model's args corrected by what the files hold.

    Old checkpoints hold the rotary table, some tied ones the embedding twice. An output matrix that
    differs from the embedding is not tied, whatever the configuration says.
    """
    used = {n: shape for n, shape in found.items() if not n.endswith("rotary_emb.inv_freq")}
    pair = (f"{names['tok_embeddings']}.weight", f"{names['output']}.weight")
    if args.tied and used.keys() >= {*pair}:
        if equal_tensors(shards, pair):
            del used[pair[1]]
        else:
            args = dataclasses.replace(args, tied=False)
    return args, used


def notices(args: ModelArgs, config: Keys, unused: set[str]) -> Iterator[str]:
    """Notes on what the converted model lacks."""
    length = config.count("max_position_embeddings")
    if unused:
        yield f"{len(unused)} tensors that are not of the text model are left out"
    if args.block_size < length:
        yield f"the context is {args.block_size} positions, not {length}: longrope ends there"


def dequantized(
    tensors: Iterable[tuple[Path, str, Tensor]],
    files: dict[str, Path],
    block: tuple[int, int],
    dtype: torch.dtype,
) -> Iterator[tuple[Path, str, Tensor]]:
    """The same tensors, with fp8 ones dequantized by their scales in these `files`."""
    for file, name, tensor in tensors:
        if name in files:
            with open_shard(files[name]) as (_, get_tensor):
                scales = get_tensor(f"{name}_scale_inv")
            if tensor.dtype != torch.float8_e4m3fn or not scales.is_floating_point():
                raise UserError(
                    f"{file}: {name} is {tensor.dtype} and its scales {scales.dtype}, no fp8 with "
                    "float scales; download the original model"
                )
            tensor = dequantize(tensor, scales, block, dtype)
        yield file, name, tensor
        del tensor


# ------------------------------------------------------------------------------------------------
# The conversion


def convert(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    mode: str | None = None,
    groupsize: int = 32,
) -> Path:
    """Convert the published files in `folder` to model.pth, or to the file of a `mode`.

    Returns the path of the new file.
    """
    target = Target(dtype, mode, groupsize)
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}; make one with scripts/download.py")
    config = read_json(folder / "config.json")
    args, (keys, family) = from_config(config), find_family(config)
    names, block = HF_NAMES | family.names, find_block(Keys(config))
    shards = find_shards(folder)
    found, files = {}, {}
    for file in shards:
        with open_shard(file) as (shapes, _):
            if twice := found.keys() & shapes.keys():
                raise UserError(f"{min(twice)} is in {file} and in {files[min(twice)]}; {AGAIN}")
            found |= shapes
            files |= dict.fromkeys(shapes, file)
    unused = beside(keys, found)
    found = {name: shape for name, shape in found.items() if name not in unused}
    args, used = text_tensors(args, shards, found, names)
    table = parts(args, names, not family.interleaved, family.norm_offset)
    shapes = {name: part.shape for name, part in table.items()}
    scaled = take_scales(folder, used, shapes, block) if block else []
    check_tensors(folder, used, table)
    tensors = read_tensors(shards, table)
    if scaled:
        scales = {name: files[f"{name}_scale_inv"] for name in scaled}
        tensors = dequantized(tensors, scales, block, dtype)
    output = folder / target.file_name
    check_outputs([output], [], [folder])
    with replacing(output) as temporary:
        write_state(temporary, args, table, tensors, target)
    for notice in notices(args, keys, unused):
        print(f"[{notice}]", file=sys.stderr)
    return output


# ------------------------------------------------------------------------------------------------
# The command line


def add_target_flags(parser: Parser) -> None:
    """Declare the output flags of both converters."""
    add = parser.group("output")
    about = "of unquantized weights (default: bfloat16)"
    add("--precision", choices=PRECISIONS, default="bfloat16", help=about)
    add("--mode", choices=MODES, help="quantize as quantize.py does, and write only that file")
    text = "columns that share a grid (default: 32)"
    add("--groupsize", type=int, choices=GROUP_SIZES, help=text)


def target_of(args: argparse.Namespace) -> tuple[torch.dtype, str | None, int]:
    """The precision, mode and group size that the flags of both converters ask for."""
    if args.groupsize and args.mode not in GROUPED:
        raise UserError(f"--groupsize is for --mode {' or '.join(GROUPED)}; leave it out")
    return getattr(torch, args.precision), args.mode, args.groupsize or 32


def main(args: argparse.Namespace) -> None:
    print(convert(args.checkpoint_dir, *target_of(args)))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    about = "a folder that download.py made"
    parser.group("checkpoint")("--checkpoint_dir", type=named_path, required=True, help=about)
    add_target_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, make_parser())
