"""Converts a GGUF file to a checkpoint folder: `model.pth`, `config.json` and tokenizer files.

    python scripts/convert_gguf.py --gguf model-Q4_K_M.gguf --checkpoint_dir checkpoints/my/model

GGUF is the format of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Weights
are dequantized and, with `--mode`, quantized as by quantize.py. The metadata hold what the model's
published configuration did; the files written here hold it in the published format.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import struct
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from gguf.gguf_reader import ReaderTensor
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, UserError, named_path
from families import from_config
from files import check_outputs, replacing
from keys import AGAIN
from process import run
from scripts.convert_hf_checkpoint import (
    Target,
    add_target_flags,
    check_tensors,
    parts,
    target_of,
    write_state,
)
from scripts.gguf_config import (
    ARCHITECTURES,
    GGUF_NAMES,
    NUMBERS,
    Metadata,
    build_config,
    pieces,
    shape_of,
    text_shapes,
)
from tokenizer import open_data

# config.json keys that errors of families.py may name -> GGUF keys.
PUBLISHED = {name: key for key, name in NUMBERS.items()} | {
    "num_key_value_heads": "attention.head_count_kv",
    "num_attention_heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}

# ------------------------------------------------------------------------------------------------
# Reading the file


class Reader(GGUFReader):
    """A GGUFReader that ends with the file: its own takes what lies beyond for empty arrays."""

    def _get(self, offset: int, dtype: type, count: int = 1, *order, **named) -> np.ndarray:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"it ends after {len(self.data)} bytes")
        return super()._get(offset, dtype, count, *order, **named)


def open_gguf(path: Path) -> tuple[GGUFReader, Metadata]:
    """Read everything but the weights; `UserError` unless the file is a complete GGUF file."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}; pass a .gguf file to --gguf")
    try:
        reader = Reader(path)
        meta = Metadata(path, reader)
    except Exception as error:  # corrupt lengths and types can raise anything
        raise UserError(
            f"{path} is not a whole GGUF file ({error!s:.300}); download it again"
        ) from None
    if reader.byte_order != "I":
        raise UserError(f"{path} was made for a machine of the other byte order; convert another")
    if meta.get("split.count", 1) not in (0, 1) or re.search(
        r"-\d{5}-of-(?!00001)\d{5}\.gguf$", path.name
    ):
        raise UserError(f"{path} is one part of a model; join them by llama-gguf-split --merge")
    if (arch := meta.text("general.architecture")) not in ARCHITECTURES:
        raise UserError(f"{path} is a {arch} model; use one of {', '.join(ARCHITECTURES)}")
    for tensor in reader.tensors:
        if 0 in tensor.shape or not len(tensor.shape):
            raise UserError(f"{path}: {tensor.name} has no values; download the file again")
    return reader, meta


def read_tensors(
    path: Path, reader: GGUFReader, dtype: torch.dtype, arch: str, wanted: Container[str]
) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield `(file, name, tensor)` of the `wanted` weights, dequantized a few rows at a time."""
    for tensor in reader.tensors:
        for name, place in pieces(arch, tensor).items():
            if name in wanted:
                yield path, name, read_piece(path, tensor, place, dtype)


def read_piece(path: Path, tensor: ReaderTensor, place: int | slice, dtype: torch.dtype) -> Tensor:
    """Rows or one expert of a tensor, dequantized."""
    # Mapped anew, so that pages already read no longer count as memory.
    where = {"offset": tensor.data_offset, "shape": tensor.data.shape}
    rows = np.memmap(path, tensor.data.dtype, "r", **where)[place]  # [out, bytes of a row]
    result = torch.empty(shape_of(tensor, place), dtype=dtype)  # [out, in]
    if result.ndim == 2:
        rows = rows.reshape(len(result), -1)
    step = max(1, 2**18 // result[0].numel())
    for start in range(0, len(rows), step):
        try:
            floats = dequantize(rows[start : start + step], tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: {tensor.name} is {kind}, which is not known") from None
        result[start : start + step] = torch.from_numpy(np.array(floats, np.float32))
    return result


# ------------------------------------------------------------------------------------------------
# The tokenizer

# GGUF's token types are numbered as in SentencePiece.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

GPT2_PRE = ("default", "gpt-2", "olmo")
DIGITS_PRE = ("smollm", "refact", "starcoder")  # the same, with each digit a word
LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
LONG_NUMBERS_PRE = (*LLAMA3_PRE, "dbrx", "smaug-bpe", "chatglm-bpe", "glm4")
QWEN2_PRE = ("qwen2", "deepseek-r1-qwen")

# The two patterns differ in how many digits make a word: up to three, or one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pre_tokenizer(pre: str, meta: Metadata) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that llama.cpp calls `pre`: how text is split into words."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in GPT2_PRE:
        return gpt2
    if pre in DIGITS_PRE:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre in LONG_NUMBERS_PRE + QWEN2_PRE:
        words = Regex(WORDS % ("{1,3}" if pre in LONG_NUMBERS_PRE else ""))
        split = pre_tokenizers.Split(words, behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, to_bytes])
    advice = "take the tokenizer.json of the original model"
    raise meta.refusal("tokenizer.ggml.pre", "which is not supported", advice)


def adds_bos(meta: Metadata) -> bool:
    """Whether a text starts with BOS; without the key, the default is llama.cpp's."""
    sentencepiece = meta.text("tokenizer.ggml.model") == "llama"
    default = sentencepiece or meta.text("tokenizer.ggml.pre", "default") in LLAMA3_PRE
    return meta.flag("tokenizer.ggml.add_bos_token", default)


def byte_level_tokenizer(meta: Metadata) -> bytes:
    """The `tokenizer.json` of a byte-level BPE vocabulary."""
    tokens, pre = meta.tokens, meta.text("tokenizer.ggml.pre", "default")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in meta.items("tokenizer.ggml.merges", str)]
    if odd := [merge for merge in merges if len(merge) != 2]:
        raise UserError(f"{meta.where}: merge {odd[0][0]!r:.60} has no space; {AGAIN}")
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in LLAMA3_PRE))
    except Exception as error:  # the library has no exception class of its own
        raise UserError(
            f"{meta.where} has merges that do not fit its tokens ({error!s:.300}); {AGAIN}"
        ) from None
    if pre in QWEN2_PRE:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(pre, meta)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos(meta):
        if (bos := meta.token_id("bos")) is None:
            raise UserError(f"{meta.where} lacks tokenizer.ggml.bos_token_id; {AGAIN}")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<bos>", "$A"],
            pair=["<bos>", "$A", "$B"],
            special_tokens=[{"id": "<bos>", "ids": [bos], "tokens": [tokens[bos]]}],
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, meta.token_types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer.to_str(pretty=True).encode()


def varint(value: int) -> bytes:
    """A protobuf varint: base 128, least significant digit first."""
    value &= (1 << 64) - 1  # two's complement if negative
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def protobuf(*fields: tuple[int, float | int | str | bytes]) -> bytes:
    """A protobuf message of `(number, value)` fields; a bytes value is a message itself."""
    message = bytearray()
    for number, value in fields:
        if isinstance(value, float):
            message += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            message += varint(number << 3) + varint(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            message += varint(number << 3 | 2) + varint(len(content)) + content
    return bytes(message)


def sentencepiece_model(meta: Metadata) -> bytes:
    """The `tokenizer.model` of a SentencePiece vocabulary.

    The field numbers are those of sentencepiece_model.proto in
    https://github.com/google/sentencepiece.
    """
    tokens, types = meta.tokens, [*meta.token_types]
    scores = meta.items("tokenizer.ggml.scores", float, len(tokens))
    unknown = meta.token_id("unknown") or 0
    types[unknown] = UNKNOWN  # SentencePiece requires one
    pieces = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind == USER_DEFINED:  # llama.cpp keeps these as they stand in the text
            token = token.replace(" ", "\u2581")
        pieces.append((1, protobuf((1, token), (2, float(score)), (3, kind))))
    # 3: byte-pair merges by score, 35: characters that are no token become bytes
    trainer = [(3, 2), (4, len(tokens)), (35, 1), (40, unknown), (45, tokens[unknown])]
    for number, role in ((41, "bos"), (42, "eos"), (43, "padding")):
        token_id = meta.token_id(role)
        trainer += [(number, -1 if token_id is None else token_id)]
        if token_id is not None:
            trainer += [(number + 5, tokens[token_id])]
    prefix = meta.flag("tokenizer.ggml.add_space_prefix", True)
    normalizer = [(1, "identity"), (3, int(prefix)), (4, 0), (5, 1)]
    return protobuf(*pieces, (2, protobuf(*trainer)), (3, protobuf(*normalizer)))


def tokenizer_files(meta: Metadata) -> dict[str, bytes | dict]:
    """The tokenizer files of a published model, by file name."""
    kind = meta.text("tokenizer.ggml.model")
    makers = {
        "gpt2": ("tokenizer.json", byte_level_tokenizer, "PreTrainedTokenizerFast"),
        "llama": ("tokenizer.model", sentencepiece_model, "LlamaTokenizer"),
    }
    if kind not in makers:
        known = f"which is not supported (known: {', '.join(makers)})"
        raise meta.refusal("tokenizer.ggml.model", known, "use another model")
    name, make, tokenizer_class = makers[kind]
    tokens, types = meta.tokens, meta.token_types
    roles = ("bos", "eos", "eot", "eom")  # eot ends a turn, eom a tool call
    ids = {role: i for role in roles if (i := meta.token_id(role)) is not None}
    stops = [ids[role] for role in ("eos", "eot", "eom") if role in ids]
    config = {
        "tokenizer_class": tokenizer_class,
        "add_bos_token": adds_bos(meta),
        "add_eos_token": meta.flag("tokenizer.ggml.add_eos_token"),
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(i): {"content": token, "special": kind == CONTROL}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        },
    }
    config |= {f"{role}_token": tokens[ids[role]] for role in ("bos", "eos") if role in ids}
    if meta.has("tokenizer.chat_template"):
        config["chat_template"] = meta.text("tokenizer.chat_template")
    generation = {"eos_token_id": list(dict.fromkeys(stops))}
    if "bos" in ids:
        generation["bos_token_id"] = ids["bos"]
    content = make(meta)
    open_data(meta.where, name, content)  # fails now, not when the model is used
    return {
        name: content,
        "tokenizer_config.json": config,
        "generation_config.json": generation,
    }


# ------------------------------------------------------------------------------------------------
# The conversion


def convert(
    gguf_path: Path,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    mode: str | None = None,
    groupsize: int = 32,
) -> Path:
    """Convert `gguf_path` to a checkpoint in `folder`; return the path of its weights."""
    target = Target(dtype, mode, groupsize)
    reader, meta = open_gguf(gguf_path)
    config, name = build_config(meta, reader, dtype), meta.text("general.architecture")
    try:
        args = from_config(config)
    except UserError as error:
        words = re.split(r"(\w+)", str(error).removeprefix("config.json"))
        text = "".join(f"{name}.{PUBLISHED[w]}" if w in PUBLISHED else w for w in words)
        raise UserError(f"{gguf_path}{text}") from None
    table = parts(args, GGUF_NAMES | ARCHITECTURES[name].names, not ARCHITECTURES[name].interleaved)
    blocks = meta.count(f"{name}.block_count")
    shapes = text_shapes(meta, reader, range(args.n_layer, blocks))
    check_tensors(gguf_path, shapes, table)
    files = {"config.json": config} | tokenizer_files(meta)
    tensors = read_tensors(gguf_path, reader, dtype, name, table)
    output = folder / target.file_name
    check_outputs([output, *(folder / name for name in files)], [gguf_path])
    with contextlib.ExitStack() as stack:
        # The weights are renamed last: if they are there, so is everything else.
        model, *others = [stack.enter_context(replacing(folder / n)) for n in (output.name, *files)]
        write_state(model, args, table, tensors, target)
        for temporary, content in zip(others, files.values(), strict=True):
            if isinstance(content, dict):
                content = (json.dumps(content, indent=2) + "\n").encode()
            temporary.write_bytes(content)
    return output


def main(args: argparse.Namespace) -> None:
    print(convert(args.gguf, args.checkpoint_dir, *target_of(args)))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.group("checkpoint")
    add("--gguf", type=named_path, required=True, help="the file to convert")
    add("--checkpoint_dir", type=named_path, required=True, help="the folder to create")
    add_target_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, make_parser())
