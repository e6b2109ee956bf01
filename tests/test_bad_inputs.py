"""Bad inputs are answered with exit code 2 and one sentence, and leave everything as it was.

A table: how a good input is spoiled, what is run on it, and what the sentence has to name. Each row
runs in a process of its own, without root's rights, in a folder with a tiny model in every format:

    model.pth, config.json and a tokenizer    a checkpoint folder
    hf/                                       the same model as it lies on the hub
    model.gguf                                and as llama.cpp has it
"""

import itertools
import json
import os
import shutil
import stat
import struct
import subprocess
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import python, run_served
from conftest import CONFIG, ROOT, seldom, selected, write_checkpoint, write_tokenizer
from families import from_config
from scripts.convert_gguf import GGUF_NAMES
from scripts.convert_hf_checkpoint import HF_NAMES, parts

GENERATE = ["generate.py", "--checkpoint_path", "model.pth", "--device", "cpu"]
GENERATE += ["--precision", "float32", "--max_new_tokens", "2", "--prompt", "ab"]
CHAT = [*GENERATE, "--chat"]
CONVERT = ["scripts/convert_hf_checkpoint.py", "--checkpoint_dir", "hf"]
GGUF = ["scripts/convert_gguf.py", "--gguf", "model.gguf", "--checkpoint_dir", "made"]

PROMPTS = [*GENERATE[:-2], "--prompts_file", "prompts.txt"]
CONTEXT = [*GENERATE, "--prefill_context", "@context.txt"]
CHECKPOINTS = ("--checkpoint_path", "--draft_checkpoint_path")
OPTIONAL = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")

# Root may read and write everything; a process without capabilities may not, whoever's it is.
AS_A_USER = """
import ctypes, os, runpy, sys
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
sys.argv.pop(0)
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# ------------------------------------------------------------------------------------------------
# The good input


def write_safetensors(folder: Path) -> None:
    """The model as it lies on the hub."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)
    table = parts(from_config(CONFIG), HF_NAMES)
    save_file({name: torch.ones(p.shape) for name, p in table.items()}, folder / WEIGHTS)


def write_gguf(path: Path, changes: dict | None = None, tensors: dict | None = None) -> None:
    """The model as llama.cpp's converter writes it; None leaves out."""
    alphabet = json.loads((path.parent / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(alphabet, key=alphabet.get), "<s>", "</s>", *map("[PAD{}]".format, range(42))]
    values = {
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 48,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 44,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
    }
    values["tokenizer.ggml.tokens"][255] = "ab"
    values |= changes or {}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    kinds = {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}
    for key, value in values.items():
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    shapes = {name: part.shape for name, part in parts(from_config(CONFIG), GGUF_NAMES).items()}
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for name, array in (arrays | (tensors or {})).items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_checkpoint(folder)
    write_safetensors(folder / "hf")
    write_gguf(folder / "model.gguf")
    (folder / "tmp").mkdir()
    return folder


def run_in(folder: Path, command: list[str]) -> subprocess.CompletedProcess:
    """Run a command in the folder, with temporary files in its tmp/; words may set variables."""
    script, *flags = command
    environment = os.environ | {"TMPDIR": "tmp"}
    variables = [flag for flag in flags if flag.startswith("DEVICE=")]
    environment |= dict(variable.split("=") for variable in variables)
    argv = ["-c", AS_A_USER, str(ROOT / script), *(f for f in flags if f not in variables)]
    return run_served(argv, folder, environment)


def state_of(folder: Path) -> dict[str, tuple]:
    """Every file with what changes when it is written."""
    found = {}
    for file in folder.rglob("*"):
        about = file.lstat()
        contents = () if stat.S_ISDIR(about.st_mode) else (about.st_ino, about.st_mtime_ns)
        found[str(file)] = (about.st_mode, *contents)
    return found


# ------------------------------------------------------------------------------------------------
# How it is spoiled

Row = tuple[str, Callable[[Path], object], list[str]]  # needle, spoil, command


def edit_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config(needle: str, **values) -> Row:
    """Keys of config.json."""
    return needle, lambda f: edit_json(f / "config.json", values), GENERATE


def tokens(needle: str, **values) -> Row:
    """Keys of tokenizer_config.json."""
    return needle, lambda f: edit_json(f / "tokenizer_config.json", values), CHAT


def vocabulary(needle: str, **values) -> Row:
    """Keys of tokenizer.json."""
    return needle, lambda f: edit_json(f / "tokenizer.json", values), GENERATE


def template(needle: str, text: str, *flags: str) -> Row:
    return needle, lambda f: (f / "chat_template.jinja").write_text(text), [*CHAT, *flags]


def state(needle: str, change: Callable[[dict], dict], **values) -> Row:
    """A change of the state dict, and of config.json."""

    def spoil(folder: Path):
        whole = torch.load(folder / "model.pth")
        torch.save(change(whole), folder / "model.pth")
        edit_json(folder / "config.json", values)

    return needle, spoil, GENERATE


def published(needle: str, change: Callable[[dict], dict], **values) -> Row:
    """A change of the published weights, and of their config.json."""

    def spoil(folder: Path):
        save_file(change(load_file(folder / "hf" / WEIGHTS)), folder / "hf" / WEIGHTS)
        edit_json(folder / "hf/config.json", values)

    return needle, spoil, CONVERT


def index(needle: str, value) -> Row:
    """The weights in a file called a, named by an index."""

    def spoil(folder: Path):
        (folder / "hf" / WEIGHTS).rename(folder / "hf/a.safetensors")
        (folder / "hf" / f"{WEIGHTS}.index.json").write_text(json.dumps(value))

    return needle, spoil, CONVERT


def meta(needle: str, values: dict, tensors: dict | None = None) -> Row:
    """Metadata and tensors of the GGUF file; None leaves out."""
    return needle, lambda f: write_gguf(f / "model.gguf", values, tensors), GGUF


def content(name: str, data: bytes | str, needle: str, command: list[str] = GENERATE) -> Row:
    """Another content of a file."""
    data = data.encode() if isinstance(data, str) else data
    return needle, lambda f: (f / name).write_bytes(data), command


def endless_array(count: int) -> bytes:
    """A GGUF file of one key, an array of more bytes than the file has."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x"
    return head + struct.pack("<IIQ", 9, 0, count)


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


PLACES = {
    "unreadable": lambda path: (path.touch(), path.chmod(0)),
    "folder": lambda path: (gone(path), path.mkdir()),
    "pipe": lambda path: (gone(path), os.mkfifo(path)),
    "loop": lambda path: (gone(path), path.symlink_to(path.name)),
    "dangling link": lambda path: (gone(path), path.symlink_to("nowhere")),
    "broken disk": lambda path: (gone(path), path.symlink_to("/proc/self/mem")),
}


def unreadable(name: str, place: str, command: list[str], instead_of: str = "") -> Row:
    """A file that is there and cannot be read."""

    def spoil(folder: Path):
        gone(folder / (instead_of or "nothing"))
        PLACES[place](folder / name)

    return name, spoil, command


def endless(name: str, command: list[str]) -> Row:
    """A file of a size that no memory holds, most of it a hole."""

    def spoil(folder: Path):
        if "index" in name:
            gone(folder / "hf" / WEIGHTS)
        (folder / name).touch()
        os.truncate(folder / name, 2**40)

    return f"{name} has 1099511627776 bytes", spoil, command


def missing(name: str, command: list[str]) -> Row:
    needle = {"hf/model.safetensors": "no *.safetensors", "config.json": "has no config.json"}
    return needle.get(name, name), lambda f: gone(f / name), command


def cut(path: Path, count: int) -> None:
    """Take away the last bytes."""
    path.write_bytes(path.read_bytes()[:-count])


def pickled(value, needle: str = "pytorch_model.bin") -> Row:
    """Weights as torch.save writes them in the place of safetensors."""

    def spoil(folder: Path):
        gone(folder / "hf" / WEIGHTS)
        torch.save(value, folder / "hf/pytorch_model.bin")

    return needle, spoil, CONVERT


def twice() -> Row:
    """A tensor in two files of an index."""

    def spoil(folder: Path):
        whole, files = load_file(folder / "hf" / WEIGHTS), ("a.safetensors", "b.safetensors")
        gone(folder / "hf" / WEIGHTS)
        save_file(whole, folder / "hf" / files[0])
        save_file({"lm_head.weight": whole["lm_head.weight"]}, folder / "hf" / files[1])
        places = dict.fromkeys(whole, files[0]) | {"lm_head.weight": files[1]}
        text = json.dumps({"weight_map": places})
        (folder / "hf" / f"{WEIGHTS}.index.json").write_text(text)

    return "lm_head.weight is in", spoil, CONVERT


def resized(vocab_size: int, needle: str) -> Row:
    """A model with another vocabulary than its tokenizer."""

    def spoil(folder: Path):
        edit_json(folder / "config.json", {"vocab_size": vocab_size})
        whole = torch.load(folder / "model.pth")
        for name in ("tok_embeddings.weight", "output.weight"):
            whole[name] = torch.zeros(vocab_size, 48)
        torch.save(whole, folder / "model.pth")

    return needle, spoil, GENERATE


def int4(weight: torch.Tensor) -> dict:
    """The output matrix in int4, but for its grid."""
    return {"output.weight": torch.zeros(len(weight), weight.shape[1] // 2, dtype=torch.uint8)}


def odd_int4(state: dict) -> dict:
    """A w2 of 97 columns in int4, as if of 96, and the w1 and w3 that go with it."""
    ffn = "layers.0.feed_forward."
    state |= {ffn + f"{name}.weight": torch.ones(97, 48) for name in ("w1", "w3")}
    codes, grid = torch.zeros(48, 48, dtype=torch.uint8), torch.ones(1, 48, 2)
    return state | {ffn + "w2.weight": codes, ffn + "w2.scales_and_zeros": grid}


def split(state: dict, **other: Callable) -> dict:
    """wq, wk and wv for themselves, as in Meta's files, but for what is done to the `other`."""
    parts = state.pop("layers.0.attention.wqkv.weight").split([48, 16, 16])
    for name, part in zip(("wq", "wk", "wv"), parts, strict=True):
        part = other.get(name, torch.clone)(part)
        state[f"layers.0.attention.{name}.weight"] = part
    return state


def moved(name: str, place: str) -> Row:
    """The GGUF file in the place of one that is made of it."""

    def spoil(folder: Path):
        (folder / "made").mkdir()
        (folder / "model.gguf").rename(folder / place)

    return "or written twice", spoil, [*GGUF[:1], "--gguf", name, *GGUF[3:]]


def flags(needle: str, *more: str, base: list[str] = GENERATE) -> Row:
    """Flags alone; a later one replaces an earlier one."""
    return needle, lambda f: None, [*base, *more]


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


def nested(key: str, depth: int) -> str:
    """A JSON object with lists within lists."""
    return f'{{"{key}": {deep(depth)}}}'


# ------------------------------------------------------------------------------------------------
# The table

FILES = {  # to be read, by which command
    "model.pth": GENERATE,
    "config.json": GENERATE,
    "tokenizer.json": GENERATE,
    "tokenizer_config.json": GENERATE,
    "generation_config.json": GENERATE,
    "chat_template.jinja": CHAT,
    "prompts.txt": PROMPTS,
    "context.txt": CONTEXT,
    "draft.pth": [*GENERATE, "--draft_checkpoint_path", "draft.pth"],
    "hf/config.json": CONVERT,
    "hf/model.safetensors": CONVERT,
    "model.gguf": GGUF,
}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=4)
ONES = torch.ones(48)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # these are deprecated
    QUANTIZED = torch.quantize_per_tensor(ONES, 1.0, 0, torch.qint8)
GRIDS = [torch.ones(()), ONES, torch.ones(0), torch.ones(2, 300), torch.ones(0, 300, 2)]
GRIDS += [torch.ones(5, 300, 2), torch.ones(1, 1, 1, 1, 2), torch.ones(1, 300, 2, dtype=torch.int8)]
SENTENCEPIECE = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 300}

ROWS = [
    # Files that cannot be read
    *(
        unreadable(name, place, FILES[name])
        for name, place in itertools.product(FILES, PLACES)
        if (name, place) not in (("prompts.txt", "pipe"), ("context.txt", "pipe"))  # welcome there
    ),
    *(unreadable(f"hf/{WEIGHTS}.index.json", place, CONVERT, f"hf/{WEIGHTS}") for place in PLACES),
    *(unreadable("hf/pytorch_model.bin", place, CONVERT, f"hf/{WEIGHTS}") for place in PLACES),
    *(unreadable("tokenizer.model", place, GENERATE, "tokenizer.json") for place in PLACES),
    *(endless(name, FILES[name]) for name in FILES if name.endswith((".json", ".jinja"))),
    endless(f"hf/{WEIGHTS}.index.json", CONVERT),
    *(missing(name, command) for name, command in FILES.items() if name not in OPTIONAL),
    # Names of files
    *(flags("name too long", flag, "x" * 300) for flag in CHECKPOINTS),
    flags("name too long", "--prefill_context", "@" + "x" * 300),
    flags("cannot read nowhere", "--prefill_context", "@nowhere"),
    flags("cannot read . (", "--prefill_context", "@"),
    *(
        flags("is not UTF-8; give it another", flag, "m\udcff", base=command)
        for flag, command in {
            "--checkpoint_path": GENERATE,
            "--json": GENERATE,
            "--prompts_file": GENERATE[:-2],
            "--checkpoint_dir": CONVERT,
            "--gguf": GGUF,
            "--revision": ["scripts/download.py", "--repo_id", "a/b"],
        }.items()
    ),
    flags("name too long", "--prompts_file", "x" * 300, base=GENERATE[:-2]),
    flags("cannot be written", "--json", "x" * 300),
    flags("cannot be written", "--json", "x" * 252),
    flags("cannot be written", "--json", "x" * 5000),
    flags("cannot be written", "--profile", "x" * 300),
    flags("name too long", "--prefill_context", "a", "--prefill_cache", "x" * 300),
    flags("there is no folder xxx", "--checkpoint_dir", "x" * 300, base=CONVERT),
    flags("cannot be written", "--checkpoint_dir", "x" * 300, base=GGUF),
    flags("there is no file xxx", "--gguf", "x" * 300, base=GGUF),
    flags(r"a\nb", "--checkpoint_path", "a\nb"),
    flags(r"a\x1b[2Jb", "--checkpoint_path", "a\x1b[2Jb"),
    flags(r"a\nb", "--gguf", "a\nb", base=GGUF),
    flags(r"a\nb", "--checkpoint_dir", "a\nb", base=CONVERT),
    flags("there is no folder model.pth", "--checkpoint_dir", "model.pth", base=CONVERT),
    flags("cannot be written", "--checkpoint_dir", "model.pth/x", base=GGUF),
    flags("cannot be written", "--checkpoint_dir", "model.pth", base=GGUF),
    flags("cannot be written", "--checkpoint_dir", "/proc/x", base=GGUF),
    flags("there is no checkpoint", "--checkpoint_path", "model.pth/x"),
    flags("the name is empty", "--checkpoint_path", ""),
    flags("the name is empty", "--checkpoint_dir", "", base=GGUF),
    flags("convert_gguf.py", "--checkpoint_path", "model.gguf"),
    flags("convert_hf_checkpoint.py", "--draft_checkpoint_path", f"hf/{WEIGHTS}"),
    flags("is a folder", "--checkpoint_path", "hf"),
    flags("/dev/null is not a regular file", "--checkpoint_path", "/dev/null"),
    flags("quantize.py", "--checkpoint_path", "model_int8.pth"),
    flags("quantize.py", "--checkpoint_path", "model_int4.g32.pth"),
    flags("prepare.sh", "--checkpoint_path", "other/model.pth"),
    ("model.pth", lambda f: (f / "hf/model.pth").mkdir(), CONVERT),
    ("tokenizer.json", lambda f: (f / "made/tokenizer.json").mkdir(parents=True), GGUF),
    ("config.json", lambda f: (f / "made/config.json").mkdir(parents=True), GGUF),
    # config.json: counts and numbers
    *(
        config(f"{key} is {value!r}"[:60], **{key: value})
        for key in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "max_position_embeddings",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
        for value in (0, "48", [48], 48.5, True, 2**70)
    ),
    *(config(f"lacks {key}", **{key: None}) for key in ("hidden_size", "vocab_size", "model_type")),
    *(
        config(f"{key} is", **{key: value})
        for key in ("rms_norm_eps", "rope_theta")
        for value in ("small", 0, -1, float("nan"), float("inf"), [1], {"base": 1}, True)
    ),
    config("holds 2 layers, not 3", num_hidden_layers=3),
    config("num_key_value_heads is 4", num_key_value_heads=4),
    config("head_dim is 7", head_dim=7),
    # config.json: rotations and windows
    *(
        config(f"rope_scaling is {value!r}", rope_scaling=value)
        for value in ("linear", [], ["linear", 2], False, 7)
    ),
    *(
        config(f"rope_scaling.rope_type is {value!r}", rope_scaling={"rope_type": value})
        for value in (["linear"], {"a": 1}, "magic", 7, "")
    ),
    config("rope_scaling.type is ['yarn']", rope_scaling={"type": ["yarn"]}),
    config("rope_parameters is 7", rope_parameters=7),
    config("full_attention is 'x'", rope_parameters={"full_attention": "x"}),
    config("lacks rope_scaling.factor", rope_scaling={"rope_type": "linear"}),
    config("rope_scaling.factor is '2'", rope_scaling={"rope_type": "linear", "factor": "2"}),
    config("rope_scaling.factor is 0", rope_scaling={"rope_type": "linear", "factor": 0}),
    config("low_freq_factor", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    config("max_position_embeddings is 1, not a count from 2", max_position_embeddings=1),
    *(
        config(
            f"original_max_position_embeddings is {length}, fewer than two",
            rope_scaling={"rope_type": kind, "original_max_position_embeddings": length},
        )
        for kind, length in (("yarn", 1e-12), ("longrope", 0.5))
    ),
    config("short_factor", rope_scaling={"rope_type": "longrope", "short_factor": [1.0]}),
    config("beta_fast is 'x'", rope_scaling={"rope_type": "yarn", "factor": 2, "beta_fast": "x"}),
    config("partial_rotary_factor is 0.5", partial_rotary_factor=0.5),
    *(
        config("sliding_window is", model_type="mistral", sliding_window=value)
        for value in ("4096", [4], -1, 0, 4.5, True)
    ),
    *(
        config("layer_types is", model_type="mistral", sliding_window=8, layer_types=value)
        for value in (["full"], "full_attention", [7, 7], [["full_attention"]] * 2, {})
    ),
    # config.json: the rest
    *(config(f"model_type is {value!r}", model_type=value) for value in (7, ["llama"], {}, "gpt2")),
    *(config(f"hidden_act is {value!r}", hidden_act=value) for value in ("relu", ["silu"], 7)),
    config("tie_word_embeddings is 'no'", tie_word_embeddings="no"),
    config("attention_bias is 1", attention_bias=1),
    config("num_local_experts is 8", num_local_experts=8),
    config("num_experts is '4'", model_type="qwen3_moe", **EXPERTS | {"num_experts": "4"}),
    config("mlp_only_layers is [[0]]", model_type="qwen3_moe", **EXPERTS, mlp_only_layers=[[0]]),
    config(
        "n_shared_experts is 16777216",
        model_type="glm4_moe",
        hidden_size=2**24,
        head_dim=8,
        n_shared_experts=2**24,
        **EXPERTS | {"moe_intermediate_size": 2**24},
    ),
    config("first_k_dense_replace", model_type="glm4_moe", **EXPERTS, first_k_dense_replace=2**24),
    config(
        "num_experts_per_tok is 5", model_type="qwen3_moe", **EXPERTS | {"num_experts_per_tok": 5}
    ),
    config("text_config is [1]", model_type="gemma3", text_config=[1]),
    config("lacks text_config", model_type="gemma3"),
    *(
        content("config.json", data, "config.json")
        for data in (
            "",
            "{",
            "[1]",
            "null",
            b"\xff\xfe{",
            "\0" * 100,
            deep(10**5),
            nested("a", 10**5),
            nested("model_type", 500),
            nested("rope_scaling", 900),
            '{"vocab_size": ' + "9" * 5000 + "}",
        )
    ),
    # The state dict
    *(
        state("model.pth is", change)
        for change in (
            lambda s: {1: ONES},
            lambda s: s | {7: ONES},
            lambda s: s | {("a", 1): ONES},
            lambda s: s | {None: ONES},
            lambda s: [*s.values()],
            lambda s: {"state_dict": s},
            lambda s: ONES,
            lambda s: None,
        )
    ),
    *(
        state("norm.weight", lambda s, value=value: s | {"norm.weight": value})
        for value in (
            1.0,
            "text",
            None,
            [1.0],
            torch.ones(()),
            torch.ones(0),
            ONES.to("meta"),
            ONES.to_sparse(),
            ONES.long(),
            ONES.bool(),
            ONES.to(torch.complex64),
            torch.ones(48, 1),
            torch.ones(49),
            QUANTIZED,
            ONES.to(torch.float8_e4m3fn),
            ONES.to(torch.uint8).view(torch.float4_e2m1fn_x2),
        )
    ),
    state("w2.weight is uint8 [48, 48], not float [48, 97]", odd_int4, intermediate_size=97),
    *(
        state(f"wq.weight is {needle}", lambda s, change=change: split(s, wq=change))
        for needle, change in (
            ("bool [48, 48]", lambda wq: wq > 0),
            ("float8_e4m3fn [48, 48]", lambda wq: wq.to(torch.float8_e4m3fn)),
            ("float [24, 48]", lambda wq: wq[:24].clone()),
            ("float []", lambda wq: torch.ones(())),
        )
    ),
    state(
        "wk.weight is float [8589934592, 48]",
        lambda s: split(s, wk=lambda wk: torch.ones(1, 1).expand(2**33, 48)),
    ),
    state("NaN", lambda s: s | {"norm.weight": torch.full((48,), float("nan"))}),
    *(
        state("holds", lambda s, name=name: s | {name: ONES})
        for name in ("extra", "layers", "layers.", "layers.x.y", "a\nb", "a\x1b[2J", "")
    ),
    state("holds 0 layers", lambda s: {}),
    state("lacks", lambda s: {k.replace("layers.1", "layers.7"): t for k, t in s.items()}),
    state("lacks the tensor norm.weight", lambda s: {k: s[k] for k in s if k != "norm.weight"}),
    state(
        "lacks the tensor tok_emb", lambda s: {k: s[k] for k in s if k != "tok_embeddings.weight"}
    ),
    *(
        state(
            "output.scales_and_zeros is",
            lambda s, grid=grid: s | int4(s["output.weight"]) | {"output.scales_and_zeros": grid},
        )
        for grid in GRIDS
    ),
    *(
        state("output.weight is float", lambda s, grid=grid: s | {"output.scales_and_zeros": grid})
        for grid in GRIDS[:3]
    ),
    state("output.weight is float", lambda s: s | {"output.scales": torch.ones(())}),
    state("output.weight is float", lambda s: s | {"output.scales_a8": torch.ones(300)}),
    *(
        content("model.pth", data, "model.pth is not a whole state dict")
        for data in ("", "hello", b"PK\3\4" * 100, b"\x80\x02}q\0." + b"\0" * 99)
    ),
    (
        "not a whole",
        lambda f: torch.save({}, f / "model.pth", _use_new_zipfile_serialization=False),
        GENERATE,
    ),
    ("not a whole", lambda f: cut(f / "model.pth", 3000), GENERATE),
    # The tokenizer
    *(
        content("tokenizer.json", data, "tokenizer from tokenizer.json")
        for data in ("", "{}", "[]", "7", "null", b"\xff", deep(10**5), nested("added_tokens", 900))
    ),
    *(vocabulary("added_tokens", added_tokens=value) for value in (None, "a", {"a": 1}, [1], [[]])),
    *(
        vocabulary("added token", added_tokens=[{"id": 7, "content": "a", "special": True} | value])
        for value in (
            {"id": -7},
            {"id": 2**70},
            {"id": "7"},
            {"content": 7},
            {"content": None},
            {"content": ""},
            {"special": "yes"},
            {"special": None},
        )
    ),
    *(
        vocabulary("tokenizer from tokenizer.json", **value)
        for value in (
            {"model": None},
            {"model": "BPE"},
            {"model": {"type": "Magic"}},
            {"model": {"type": "BPE", "vocab": {}, "merges": []}},
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["ab"]}},
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
            {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
            {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}},
            {"model": {"type": "BPE", "vocab": ["a"], "merges": []}},
            {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}},
            {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
            {"model": {"type": "Unigram", "vocab": [["a", "x"]], "unk_id": None}},
            {"pre_tokenizer": {"type": "Magic"}},
            {"pre_tokenizer": 7},
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "("},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            },
        )
    ),
    vocabulary(
        "no tokens for this text",
        model={"type": "WordLevel", "vocab": {"a": 299}, "unk_token": "<unk>"},
    ),
    vocabulary(
        "no tokens for this text",
        model={"type": "Unigram", "vocab": [["a", 0.0]] * 300, "unk_id": None},
    ),
    resized(49152, "259 tokens and the model 49152"),
    resized(100, "259 tokens and the model 100"),
    *(
        (
            "tokenizer.model",
            lambda f, data=data: (
                gone(f / "tokenizer.json"),
                (f / "tokenizer.model").write_bytes(data),
            ),
            GENERATE,
        )
        for data in (
            b"",
            b"hello",
            b"\0" * 99,
            b"\x0a\x05\x0a\x01a\x15",
            b"YQ== 0\nYQ== 1\n",
            b"!!! 0\n",
            b"YQ== x\n",
            b"YQ== 0 7\n",
            b"YQ== 1\n",
            b"YQ== -1\n",
            b"YQ== " + b"9" * 5000 + b"\n",
        )
    ),
    # What is said about tokens
    *(
        content(f"{kind}_config.json", data, f"{kind}_config.json")
        for kind in ("tokenizer", "generation")
        for data in ("", "{", "[]", '"a"', deep(10**5), nested("chat_template", 900))
    ),
    *(
        content("generation_config.json", json.dumps({"eos_token_id": value}), "eos_token_id is")
        for value in ("2", [[2]], [None], 2.5, {}, True)
    ),
    config("eos_token_id is '2'", eos_token_id="2"),
    *(tokens("bos_token is", bos_token=value) for value in (7, ["a"], {}, {"content": 7}, True)),
    *(tokens("eos_token is", eos_token=value) for value in (7, ["a"], {}, {"content": 7}, False)),
    *(tokens("add_bos_token is", add_bos_token=value) for value in ("no", 1, [])),
    *(
        tokens("chat_template in tokenizer_config.json", chat_template=value)
        for value in (
            ["a", "b"],
            7,
            True,
            {"default": "a"},
            [{"name": "default"}],
            [{"name": "default", "template": 7}],
            [["default", "a"]],
            [None],
        )
    ),
    *(
        tokens("there is no chat template", chat_template=value)
        for value in ([{"name": "tool_use", "template": "a"}], [], "", None)
    ),
    # Chat templates
    *(
        template("the chat template fails", text)
        for text in (
            "{% for %}",
            "{{ 1 / 0 }}",
            "{{ raise_exception('no') }}",
            "{% include 'x' %}",
            "{{ raise_exception('a\\nb') }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ nothing.at.all }}",
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            "{{ 'a' * 10**10 }}",
            "{{ messages.x.y }}",
            "{" * 10**5,
        )
    ),
    template("there is no chat template", ""),
    template("empty", "{{ '' }}"),
    template("5000 tokens", "{{ 'a' * 5000 }}"),
    content("chat_template.jinja", b"\xff\xfe\0a", "chat_template.jinja", CHAT),
    *(
        template("--template_args", "a", "--template_args", value)
        for value in (
            nested("a", 900),
            deep(10**4),
            "7",
            "",
            '{"messages": []}',
            '{"bos_token": ""}',
        )
    ),
    # Published weights
    published("lacks lm_head.weight", lambda s: {k: s[k] for k in s if k != "lm_head.weight"}),
    published("lacks", lambda s: {}),
    *(
        published(f"{first} and {second} of one file", lambda s, more=more: s | more)
        for first, second, more in (
            (
                "language_model.model.norm.weight",
                "model.norm.weight",
                {"language_model.model.norm.weight": ONES.clone()},
            ),
            (
                "model.language_model.norm.weight",
                "model.norm.weight",
                {"model.language_model.norm.weight": ONES.clone()},
            ),
            (
                "layers.0.mlp.gate_proj.weight",
                "model.layers.0.mlp.gate_up_proj.weight",
                {"model.layers.0.mlp.gate_up_proj.weight": torch.ones(192, 48)},
            ),
            (
                "experts.0.down_proj.weight",
                "model.layers.0.mlp.experts.down_proj",
                {
                    "model.layers.0.mlp.experts.down_proj": torch.ones(2, 48, 8),
                    "model.layers.0.mlp.experts.0.down_proj.weight": torch.ones(48, 8),
                },
            ),
        )
    ),
    published("also holds more", lambda s: s | {"more": torch.ones(1)}),
    *(
        published("lm_head.weight is", lambda s, value=value: s | {"lm_head.weight": value})
        for value in (
            torch.ones(300),
            torch.ones(()),
            torch.ones(300, 0),
            torch.ones(301, 48),
            torch.ones(300, 48).long(),
            torch.ones(300, 48).to(torch.float8_e4m3fn),
            torch.ones(300, 48).to(torch.complex64),
        )
    ),
    published("NaN or infinite", lambda s: s | {"model.norm.weight": torch.full((48,), torch.nan)}),
    published("NaN or infinite", lambda s: s | {"model.norm.weight": ONES.double() * 1e39}),
    *(
        published("quantization_config", lambda s: s, quantization_config=value)
        for value in (
            "fp8",
            [1],
            {"quant_method": "awq"},
            {"quant_method": 7},
            {"quant_method": "fp8", "weight_block_size": "128"},
            {"quant_method": "fp8", "weight_block_size": [0, 128]},
            {"quant_method": "fp8"},
        )
    ),
    published("layers.2.", lambda s: s, num_hidden_layers=3),
    published("layers.1.", lambda s: s, num_hidden_layers=1),
    published("num_nextn_predict_layers is '1'", lambda s: s, num_nextn_predict_layers="1"),
    published("num_nextn_predict_layers", lambda s: s, num_nextn_predict_layers=10**9),
    published("vocab_size is 118", lambda s: s, vocab_size=2**70),
    *(
        content(f"hf/{WEIGHTS}", data, f"hf/{WEIGHTS} is not whole", CONVERT)
        for data in (
            b"",
            b"hello",
            b"\xff" * 99,
            b"\x10" + b"\0" * 7 + b'{"a":{"dtype":1}}',
            (9000).to_bytes(8, "little") + deep(4500).encode(),
        )
    ),
    (f"hf/{WEIGHTS} is not whole", lambda f: cut(f / "hf" / WEIGHTS, 100), CONVERT),
    *(
        pickled(value)
        for value in (
            [ONES],
            {"a": 1},
            ONES,
            None,
            {"a": Path("/")},
            {"lm_head.weight": "text"},
        )
    ),
    pickled({1: ONES}, "lacks lm_head.weight"),
    pickled({"lm_head.weight": QUANTIZED}, "lacks model.embed_tokens.weight"),
    *(
        index("weight_map", {"weight_map": value})
        for value in (
            [],
            "a",
            {},
            7,
            {"a": 7},
            {"a": None},
            {"a": [WEIGHTS]},
            {"a": ""},
            {"a": "."},
            {"a": ".."},
            {"a": "../a.safetensors"},
            {"a": "/etc/passwd"},
        )
    ),
    *(
        index("hf/" + repr(value)[1:5], {"weight_map": {"a": value}})
        for value in ("b.safetensors", "x" * 300, "a\0b", "a\nb", "config.json", "tokenizer.json")
    ),
    *(index("index.json", value) for value in ([1], "a", {}, None)),
    index("lacks extra.weight", {"weight_map": {"extra.weight": "a.safetensors"}}),
    twice(),
    # GGUF: the file
    *(
        content("model.gguf", data, "model.gguf is not a whole GGUF file", GGUF)
        for data in (
            b"",
            b"GGUF",
            b"GGUF\3\0\0\0" + b"\xff" * 16,
            b"GGUF\3\0\0\0" + b"\xff" * 99,
            b"GGUF\x09\0\0\0" + b"\0" * 99,
            b"PK\3\4" * 100,
        )
    ),
    *(
        content("model.gguf", endless_array(count), "it ends after 49 bytes", GGUF)
        for count in (2**20, 2**32, 2**62)
    ),
    content("model.gguf", b"GGUF\3\0\0\0" + b"\0" * 16, "lacks general.architecture", GGUF),
    *(
        ("model.gguf", lambda f, count=count: cut(f / "model.gguf", count), GGUF)
        for count in (1, 100, 10**5, 2 * 10**5)
    ),
    # GGUF: sizes
    *(
        meta(f"{key} is {value!r}"[:50], {key: value})
        for key in (
            "llama.attention.head_count",
            "llama.attention.head_count_kv",
            "llama.block_count",
            "llama.embedding_length",
            "llama.feed_forward_length",
            "llama.context_length",
        )
        for value in (0, "4", [4, 4], 1.5)
    ),
    *(
        meta(f"{key} is", {key: value})
        for key in ("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base")
        for value in ("small", 0.0, -1.0, float("nan"), [1.0])
    ),
    meta("lacks llama.block_count", {"llama.block_count": None}),
    meta("llama.attention.head_count_kv is 4", {"llama.attention.head_count_kv": 4}),
    meta("llama.attention.key_length is 7", {"llama.attention.key_length": 7}),
    meta("token_embd", {"llama.embedding_length": 96}),
    meta("blk.0.ffn", {"llama.feed_forward_length": 64}),
    meta("blk.2", {"llama.block_count": 3}),
    meta("blk.1", {"llama.block_count": 1}),
    meta("lacks llama.expert_used_count", {"llama.expert_count": 8}),
    meta("rope.dimension_count is '8'", {"llama.rope.dimension_count": "8"}),
    meta("model; use one of llama", {"general.architecture": "gpt2"}),
    meta("llama-gguf-split", {"split.count": 3}),
    meta(
        "lacks llama.rope.scaling.original_context_length",
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0},
    ),
    meta("scaling.factor is '2'", {"llama.rope.scaling.factor": "2"}),
    meta("scaling.type is 7", {"llama.rope.scaling.type": 7}),
    # GGUF: the tokenizer
    *(meta(f"model is {value!r}", {"tokenizer.ggml.model": value}) for value in ("magic", 7)),
    *(meta(f"pre is {value!r}", {"tokenizer.ggml.pre": value}) for value in ("magic", 7)),
    *(
        meta("tokenizer.ggml.tokens is", {"tokenizer.ggml.tokens": value})
        for value in (
            [1, 2],
            "a",
            ["a"],
            ["a"] * 300,
            [str(i) for i in range(301)],
            [str(i) for i in range(100)],
        )
    ),
    *(
        meta("tokenizer.ggml.token_type is", {"tokenizer.ggml.token_type": value})
        for value in ([1] * 299, [1], ["a"] * 300, [77] * 300, [-1] * 300, 7)
    ),
    *(
        meta(f"lacks {key}", {key: None})
        for key in (
            "tokenizer.ggml.model",
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.token_type",
            "tokenizer.ggml.merges",
        )
    ),
    *(meta("has no space", {"tokenizer.ggml.merges": [value]}) for value in ("ab", "", "a\tb")),
    *(
        meta("merges", {"tokenizer.ggml.merges": value})
        for value in (["a z9"], [" "], ["a c"], [1], "a b")
    ),
    *(
        meta(f"{role}_token_id is", {f"tokenizer.ggml.{role}_token_id": value})
        for role in ("bos", "eos", "eot", "eom")
        for value in (300, "</s>", 2**31, [1], 1.0)
    ),
    meta("add_bos_token is 'yes'", {"tokenizer.ggml.add_bos_token": "yes"}),
    meta("add_eos_token is 7", {"tokenizer.ggml.add_eos_token": 7}),
    *(meta("chat_template is", {"tokenizer.chat_template": value}) for value in (7, ["a"])),
    *(
        meta("tokenizer.ggml.scores", SENTENCEPIECE | {"tokenizer.ggml.scores": value})
        for value in (None, [0.0] * 299, [1] * 300, ["a"] * 300, 1.0)
    ),
    meta(
        "cannot read a tokenizer",
        SENTENCEPIECE | {"tokenizer.ggml.tokens": ["", *map(str, range(299))]},
    ),
    meta("add_space_prefix is", SENTENCEPIECE | {"tokenizer.ggml.add_space_prefix": "no"}),
    # GGUF: the tensors
    *(
        meta("output_norm.weight", {}, {"output_norm.weight": value})
        for value in (
            np.ones(0, "f"),
            np.ones((48, 1), "f"),
            np.ones((), "f"),
            None,
            np.full(48, np.nan, "f"),
            np.ones(48, np.int32),
            np.ones(48, np.int8),
        )
    ),
    *(
        meta("token_embd.weight", {}, {"token_embd.weight": value})
        for value in (None, np.ones((), "f"), np.ones(300, "f"), np.ones((300, 0), "f"))
    ),
    meta("more.weight", {}, {"more.weight": np.ones(3, "f")}),
    meta(
        "blk.0.ffn_gate_inp.bias and blk.0.exp_probs_b.bias are both",
        {},
        {f"blk.0.{name}.bias": np.ones(4, "f") for name in ("ffn_gate_inp", "exp_probs_b")},
    ),
    *(
        meta("rope_freqs", {}, {"rope_freqs.weight": value})
        for value in (
            np.full(5, 2, "f"),
            np.full(4, np.nan, "f"),
            np.full((2, 2), 3, "f"),
            np.full(4, 3, np.int32),
            np.zeros(4, "f"),
            np.array([1, 5, 2, 8], "f"),
        )
    ),
    # Flags of the converters
    flags("--groupsize is for", "--groupsize", "64", base=GGUF),
    flags("--groupsize is for", "--groupsize", "64", "--mode", "int8", base=CONVERT),
    flags("--groupsize: invalid choice", "--groupsize", "48", "--mode", "int4", base=CONVERT),
    flags("48 columns", "--mode", "int4", base=CONVERT),
    flags("--precision", "--mode", "int8", "--precision", "float16", base=CONVERT),
    flags("--mode: invalid choice", "--mode", "int3", base=CONVERT),
    flags("--no_such", "--no_such", base=CONVERT),
    flags("--checkpoint_dir", base=CONVERT[:1]),
    flags("--gguf", base=GGUF[:1]),
    flags("--no_such", "--no_such", base=["scripts/default_model.py"]),
    flags("unrecognized arguments: x", "x", base=["scripts/default_model.py"]),
    # Devices
    *(
        flags("of the variable DEVICE", f"DEVICE={name}", base=GENERATE[:3])
        for name in ("gpu", "cuda:77", "meta")
    ),
    *(
        flags(f"device {name!r} cannot", "--device", name)
        for name in (
            "gpu",
            "cuda:77",
            "cuda",
            "mps",
            "meta",
            "xpu",
            "hpu",
            "cpu:x",
            "cuda:-1",
            "privateuseone",
            "cpu ",
            ":",
            "mkldnn",
            "",
        )
    ),
    # Flags of generate.py
    *(
        flags(flag.removeprefix("--"), flag, value)
        for flag, values in {
            "--temperature": ("-1", "nan", "inf", "x", "", "1e999", "101"),
            "--top_k": ("-1", "1.5", "x", ""),
            "--top_p": ("1.1", "-0.1", "nan"),
            "--min_p": ("2", "nan"),
            "--seed": ("-1", "x", "1e3", "9" * 30, "9" * 5000),
            "--max_new_tokens": ("0", "-5", "1.5", "x"),
            "--min_new_tokens": ("-1", "3", "x"),
            "--max_seq_length": ("1", "513", "0", "9" * 30),
            "--batch_size": ("0", "4097", "x"),
            "--num_samples": ("0", "x", "9" * 30, "9" * 12),
            "--speculate_k": ("0", "99", "3"),
            "--repetition_penalty": ("0", "nan", "x"),
            "--presence_penalty": ("3", "nan"),
            "--logit_bias": ("5", "5=", "=5", "x=1", "5=nan", "-1=5", "300=1", "5=101", "5=1=1"),
            "--logprobs": ("-1", "301", "x"),
            "--stop": ("",),
            "--precision": ("int8", "fp8", ""),
            "--compile": ("all",),
            "--json": ("", ".", "nowhere/../..", "/dev/null/x", "model.pth/x"),
            "--profile": ("", "."),
            "--prefill_cache_gb": ("-1", "nan", "1"),
            "--prefill_cache": ("x",),
            "--prefill_context": ("",),
            "--prompts_file": ("prompts.txt",),
            "--system_prompt": ("a",),
            "--template_args": ('{"a": 1}',),
        }.items()
        for value in values
    ),
    flags("or written twice", "--json", "x.json", "--profile", "x.json"),
    *(
        flags("or written twice", "--json", name)
        for name in ("model.pth", "config.json", "tokenizer.json", "generation_config.json")
    ),
    flags("or written twice", "--profile", "tokenizer_config.json"),
    moved("made/model.pth", "made/model.pth"),
    moved("made/../made/config.json", "made/config.json"),
    (
        "or written twice",
        lambda f: (f / "hf/model.pth").symlink_to("config.json"),
        CONVERT,
    ),
    flags("or written twice", "--json", "context.txt", base=CONTEXT),
    flags("or written twice", "--json", "c", "--prefill_cache", "c", base=CONTEXT),
    flags("or written twice", "--profile", "c", "--prefill_cache", "c/d", base=CONTEXT),
    flags("or written twice", "--profile", "hf/../model.pth"),
    flags("--interactive", "--interactive"),
    flags("--jsonl", "--jsonl"),
    flags("--jsonl", "--jsonl", "--interactive", base=GENERATE[:-2]),
    flags("--num_samples", "--jsonl", "--num_samples", "2", base=GENERATE[:-2]),
    flags("--num_samples", "--interactive", "--num_samples", "2", base=GENERATE[:-2]),
    flags("--batch_size", "--interactive", "--batch_size", "2", base=GENERATE[:-2]),
    flags("--prompt_logprobs", "--interactive", "--prompt_logprobs", base=GENERATE[:-2]),
    flags("drop --chat", "--chat", "--prompt", "7"),
    flags("speculation", "--prompt_lookup", "--batch_size", "2"),
    flags("--profile", "--prompt_lookup", "--profile", "x.json"),
    flags("--draft_checkpoint_path", "--prompt_lookup", "--draft_checkpoint_path", "model.pth"),
    flags("the prompt is empty", "--prompt", ""),
    flags("the prompt is empty", "--prompt", "0"),
    flags("the context has 600 tokens", "--prefill_context", "a" * 600),
    flags("5000 tokens", "--prompt", "a" * 5000),
    flags("tokens and the cache", "--prompt", "9" * 4000),
    flags("6 tokens and the cache 3", "--prompt", "abcdef", "--max_seq_length", "3"),
    *(content("context.txt", data, "context is empty", CONTEXT) for data in ("", b"\xef\xbb\xbf")),
    content("context.txt", b"\xff", "UTF-8", CONTEXT),
    *(
        content("prompts.txt", data, "prompts.txt", PROMPTS)
        for data in ("", " \n\t\n", b"\xff\xfe")
    ),
    content("prompts.txt", "a" * 600, "600 tokens", PROMPTS),
    flags("--no_such", "--no_such"),
    flags("unrecognized arguments: x", "x"),
    flags("expected one argument", "--seed"),
    flags("--max 5", "--max", "5"),
]


def spoil_and_run(row: int, good: Path, folder: Path) -> tuple[subprocess.CompletedProcess, bool]:
    """What a command said to the input of a row, and whether it left the folder as it was."""
    _, spoil, command = ROWS[row]
    shutil.copytree(good, folder, symlinks=True)
    spoil(folder)
    before = state_of(folder)
    done = run_in(folder, command)
    unchanged = state_of(folder) == before
    shutil.rmtree(folder)
    return done, unchanged


@pytest.fixture(scope="module")
def outcomes(request, good, tmp_path_factory) -> Iterator[dict[int, Future]]:
    """Those of the selected rows, two at a time."""
    base = tmp_path_factory.mktemp("rows")
    python()  # starts the server
    pool, rows = ThreadPoolExecutor(2), selected(request, "row")
    yield {row: pool.submit(spoil_and_run, row, good, base / str(row)) for row in rows}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("row", seldom(range(len(ROWS)), 16, lambda i: f"{i}-{ROWS[i][0][:40]}"))
def test_a_bad_input_is_one_sentence(row, outcomes):
    done, unchanged = outcomes[row].result()
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert ROWS[row][0] in done.stderr, done.stderr
    assert len(done.stderr) < 1000 and done.stderr[:-1].isprintable()
    assert unchanged
