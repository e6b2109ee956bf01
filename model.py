"""A Llama-family transformer with a static KV cache, and how it is read from a checkpoint.

Architecture: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288) with the rotary embeddings of
Su et al. 2021 (arXiv 2104.09864) in Meta's interleaved order and the grouped-query attention of
Ainslie et al. 2023 (arXiv 2305.13245). Mistral, Qwen2 (biases) and Qwen3 (q/k norms) are the same.

Shapes: B rows, T new positions a row, L cached positions looked at, D = head_dim, and G query heads
for each KV head.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import UserError, read_json
from linear import FEW_ROWS, Linear, linear_for

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3_BOUNDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_NUMBERS = {"linear": ("factor",), "llama3": ("factor", *LLAMA3_BOUNDS)}  # of rope scaling

# ------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class ModelArgs:
    """The shape of a model. `n_local_heads` counts the KV heads, `block_size` is the context."""

    dim: int
    n_layer: int
    n_head: int
    n_local_heads: int
    intermediate_size: int
    vocab_size: int
    block_size: int
    rope_base: float = 10000.0
    rope_scaling: dict | None = None  # as in a published config.json
    norm_eps: float = 1e-5
    head_dim: int = 0  # 0: dim / n_head
    tied: bool = False  # the output matrix is the embedding
    biases: tuple[str, ...] = ()  # the Linears that have a bias
    qk_norm: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            optional = 0 if field.name == "head_dim" else 1
            if field.type == "int" and not (isinstance(value, int) and value >= optional):
                raise UserError(f"config.json: {field.name} is {value!r}, not a count")
            if field.type == "float" and not isinstance(value, int | float):
                raise UserError(f"config.json: {field.name} is {value!r}, not a number")
        self.head_dim = self.head_dim or self.dim // self.n_head

    @classmethod
    def from_config(cls, config: dict) -> ModelArgs:
        """Read a published Hugging Face `config.json`; `UserError` on what this network is not."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"config.json: model_type {family!r} is not supported; use one of {FAMILIES}"
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise UserError(f"config.json: rope_scaling is {rope!r}, not an object")
        scaling = rope.get("rope_type", rope.get("type", "default"))
        for key in ROPE_NUMBERS.get(scaling, ()):
            if not isinstance(rope.get(key), int | float):
                raise UserError(f"config.json: {scaling} rope scaling lacks the number {key}")
        for key, value, known in (
            ("rope_type", scaling, ("default", *ROPE_NUMBERS)),
            ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
            ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
        ):
            if value not in known:
                raise UserError(f"config.json: {key} {value!r} is not supported; known: {known}")
        # Attention here sees the whole context, which equals a sliding window up to its length.
        sliding = family == "mistral" or config.get("use_sliding_window", False)
        window = config.get("sliding_window") if sliding else None
        limits = [limit for limit in (config.get("max_position_embeddings"), window) if limit]
        biases = ("wqkv",) if family == "qwen2" else ()
        if family != "qwen2" and config.get("attention_bias"):
            biases = ("wqkv", "wo")
        if config.get("mlp_bias"):
            biases += ("w1", "w2", "w3")
        try:
            return cls(
                dim=config["hidden_size"],
                n_layer=config["num_hidden_layers"],
                n_head=config["num_attention_heads"],
                n_local_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
                intermediate_size=config["intermediate_size"],
                vocab_size=config["vocab_size"],
                block_size=min(limits, default=None),
                rope_base=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
                norm_eps=config.get("rms_norm_eps", 1e-6),
                head_dim=config.get("head_dim") or 0,
                rope_scaling=None if scaling == "default" else rope | {"rope_type": scaling},
                tied=config.get("tie_word_embeddings", False),
                biases=biases,
                qk_norm=family == "qwen3",
            )
        except KeyError as error:
            raise UserError(f"config.json lacks {error}; fetch it again") from None

    @classmethod
    def from_folder(cls, folder: Path) -> ModelArgs:
        """Read `folder`/config.json or, where there is none, take the preset the name contains."""
        if (folder / "config.json").exists():
            return cls.from_config(read_json(folder / "config.json"))
        name = folder.resolve().name.lower()
        fitting = [preset for preset in PRESETS if preset in name]
        if not fitting:
            raise UserError(
                f"{folder} has no config.json and its name fits no preset; "
                f"add the config.json, or name the folder after one of: {', '.join(PRESETS)}"
            )
        return PRESETS[max(fitting, key=len)]


def llama3_rope(factor: int) -> dict:
    """The rope scaling of Llama 3.1 (factor 8) and 3.2 (factor 32), as their config.json has it."""
    bounds = dict(zip(LLAMA3_BOUNDS, (1.0, 4.0, 8192), strict=True))
    return {"rope_type": "llama3", "factor": float(factor)} | bounds


# For folders without a config.json and for benchmarks on random weights. The columns are dim,
# layers, heads, KV heads, FFN width, vocabulary, context and rope base of the published files.
PRESETS = {
    "llama-2-7b": ModelArgs(4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": ModelArgs(5120, 40, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": ModelArgs(8192, 80, 64, 8, 28672, 32000, 4096),
    "codellama-7b": ModelArgs(4096, 32, 32, 32, 11008, 32016, 16384, 1e6),
    "codellama-7b-python": ModelArgs(4096, 32, 32, 32, 11008, 32000, 16384, 1e6),
    "codellama-34b": ModelArgs(8192, 48, 64, 8, 22016, 32000, 16384, 1e6),
    "llama-3-8b": ModelArgs(4096, 32, 32, 8, 14336, 128256, 8192, 5e5),
    "llama-3-70b": ModelArgs(8192, 80, 64, 8, 28672, 128256, 8192, 5e5),
    "llama-3.1-8b": ModelArgs(4096, 32, 32, 8, 14336, 128256, 131072, 5e5, llama3_rope(8)),
    "llama-3.1-70b": ModelArgs(8192, 80, 64, 8, 28672, 128256, 131072, 5e5, llama3_rope(8)),
    "llama-3.1-405b": ModelArgs(16384, 126, 128, 8, 53248, 128256, 131072, 5e5, llama3_rope(8)),
    "llama-3.2-1b": ModelArgs(
        2048, 16, 32, 8, 8192, 128256, 131072, 5e5, llama3_rope(32), tied=True
    ),
    "llama-3.2-3b": ModelArgs(
        3072, 28, 24, 8, 8192, 128256, 131072, 5e5, llama3_rope(32), tied=True
    ),
    "mistral-7b": ModelArgs(4096, 32, 32, 8, 14336, 32000, 32768, 1e6),
    "mistral-7b-v0.1": ModelArgs(4096, 32, 32, 8, 14336, 32000, 4096),
    "mistral-7b-instruct-v0.1": ModelArgs(4096, 32, 32, 8, 14336, 32000, 4096),
    "mistral-7b-v0.3": ModelArgs(4096, 32, 32, 8, 14336, 32768, 32768, 1e6),
    "mistral-7b-instruct-v0.3": ModelArgs(4096, 32, 32, 8, 14336, 32768, 32768, 1e6),
    "tinyllama-1.1b": ModelArgs(2048, 22, 32, 4, 5632, 32000, 2048),
    "smollm2-135m": ModelArgs(576, 30, 9, 3, 1536, 49152, 8192, 1e5, tied=True),
    "smollm2-360m": ModelArgs(960, 32, 15, 5, 2560, 49152, 8192, 1e5, tied=True),
    "smollm2-1.7b": ModelArgs(2048, 24, 32, 32, 8192, 49152, 8192, 1.3e5, tied=True),
    "stories15m": ModelArgs(288, 6, 6, 6, 768, 32000, 256, tied=True),
    "stories42m": ModelArgs(512, 8, 8, 8, 1376, 32000, 1024, tied=True),
    "stories110m": ModelArgs(768, 12, 12, 12, 2048, 32000, 1024, tied=True),
    "stories260k": ModelArgs(64, 5, 8, 4, 172, 512, 512, tied=True),
}

# ------------------------------------------------------------------------------------------------
# The network


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019, arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return x32.type_as(x) * self.weight


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Angle per position of each pair of dimensions: float32 `[D/2]`, scaled as the config says."""
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    freqs = 1.0 / args.rope_base**exponents
    scaling = args.rope_scaling
    if not scaling:
        return freqs
    if scaling["rope_type"] == "linear":
        return freqs / scaling["factor"]
    # Llama 3.1: long waves are stretched by `factor`, short ones kept, those between interpolated.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (keep + (1 - keep) / scaling["factor"])


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x `[B, T, H, D]` by freqs_cis `[B, T, D/2, 2]` (cos, sin)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, H, D/2] each
    cos, sin = freqs_cis.unsqueeze(2).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).type_as(x)


class KVCache(nn.Module):
    """Keys and values of one layer; the last slot takes what padding writes and is never read."""

    def __init__(self, batch_size: int, n_heads: int, length: int, head_dim: int, like: Tensor):
        super().__init__()
        shape = (batch_size, n_heads, length + 1, head_dim)
        self.register_buffer("k_cache", like.new_zeros(shape), persistent=False)
        self.register_buffer("v_cache", like.new_zeros(shape), persistent=False)

    def update(
        self, input_pos: Tensor, k: Tensor, v: Tensor, length: int | None
    ) -> tuple[Tensor, Tensor]:
        """Write k, v `[B, T, H, D]` at input_pos `[B, T]`; return the first `length` positions.

        Without `length` it returns all of them.
        """
        rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
        self.k_cache[rows, :, input_pos] = k
        self.v_cache[rows, :, input_pos] = v
        return self.k_cache[:, :, :length], self.v_cache[:, :, :length]  # [B, H, L, D]


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads = (args.n_head, args.n_local_heads, args.n_local_heads)  # of q, k and v
        self.head_dim = args.head_dim
        self.wqkv = Linear(args.dim, sum(self.heads) * args.head_dim, "wqkv" in args.biases)
        self.wo = Linear(args.n_head * args.head_dim, args.dim, "wo" in args.biases)
        norm = RMSNorm if args.qk_norm else nn.Identity
        self.q_norm = norm(args.head_dim, args.norm_eps)
        self.k_norm = norm(args.head_dim, args.norm_eps)
        self.kv_cache: KVCache | None = None

    def forward(
        self, x: Tensor, input_pos: Tensor, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        q = apply_rotary_emb(self.q_norm(q), freqs_cis)
        k = apply_rotary_emb(self.k_norm(k), freqs_cis)
        if mask is None:  # the kernel goes by input_pos
            k, v = self.kv_cache.update(input_pos, k, v, None)
            return self.wo(torch.ops.tokenbus.attend(q, k, v, input_pos))
        k, v = self.kv_cache.update(input_pos, k, v, mask.shape[-1])  # [B, H, L, D]
        q = q.unflatten(2, (k.shape[1], -1))  # [B, T, H, G, D]
        # The G query heads of a KV head become rows, so that the cache is never repeated.
        q = q.transpose(1, 2).flatten(2, 3)  # -> [B, H, T*G, D]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.unflatten(2, (T, -1)).transpose(1, 2).reshape(B, T, -1)  # -> [B, T, H*G*D]
        return self.wo(y)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = Linear(args.dim, args.intermediate_size, "w1" in args.biases)
        self.w3 = Linear(args.dim, args.intermediate_size, "w3" in args.biases)
        self.w2 = Linear(args.intermediate_size, args.dim, "w2" in args.biases)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, x: Tensor, input_pos: Tensor, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        h = x + self.attention(self.attention_norm(x), input_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layer))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size)
        self.max_seq_length = 0
        self.prepared = False
        self.attends = False  # by a kernel that needs no mask, with up to FEW_ROWS positions

    def setup_caches(self, batch_size: int, max_seq_length: int) -> None:
        """Allocate the KV cache of every layer and the table of rotations."""
        args, weight = self.args, self.norm.weight
        for layer in self.layers:
            shape = (batch_size, args.n_local_heads, max_seq_length, args.head_dim)
            layer.attention.kv_cache = KVCache(*shape, like=weight)
        positions = torch.arange(max_seq_length + 1, dtype=torch.float32)
        angles = torch.outer(positions, rope_frequencies(args))  # [S + 1, D/2]
        # Not cos() and sin(): MKL's first vector math call in a process may be off by 1e-4 when
        # threads share it (pytorch #188792), and this table lasts for the whole run.
        table = torch.view_as_real(torch.polar(torch.ones_like(angles), angles))  # [S + 1, D/2, 2]
        self.register_buffer("freqs_cis", table.to(weight.device), persistent=False)
        self.max_seq_length = max_seq_length

    def prepare(self) -> None:
        """Make of the weights, which must not change any more, what the fastest kernels want."""
        if self.prepared:
            return
        self.prepared = True
        for linear in (module for module in self.modules() if isinstance(module, Linear)):
            linear.prepare()
        width, fits = self.args.head_dim, self.output.takes_kernels(self.norm.weight.dtype)
        self.attends = fits and width % 32 == 0 and width <= 256

    def forward(
        self,
        idx: Tensor,
        input_pos: Tensor,
        kv_len: int,
        last: Tensor | None = None,
        block: Callable | None = None,
    ) -> Tensor:
        """Logits after each token of idx `[B, T]` standing at input_pos `[B, T]`.

        Only the first `kv_len` cache positions are looked at: more than every position in use, and
        see `kv_steps`. Padding stands at position `max_seq_length`. `last` `[B, N]` picks indices
        of T a row, whose logits alone are computed. `block` is what runs each layer, so that one
        compiled block can serve all.
        Returns `[B, T, vocab_size]`, or `[B, N, …]` with `last`.
        """
        block = block or TransformerBlock.forward
        x = self.tok_embeddings(idx)  # [B, T] -> [B, T, dim]
        freqs_cis = self.freqs_cis[input_pos]
        mask = None
        if not self.attends or idx.shape[1] > FEW_ROWS:
            groups = self.args.n_head // self.args.n_local_heads
            reach = input_pos.repeat_interleave(groups, dim=1)[:, None, :, None]  # [B, 1, T*G, 1]
            hidden = torch.arange(kv_len, device=idx.device) > reach  # [B, 1, T*G, L]
            mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, -math.inf)
        for layer in self.layers:
            x = block(layer, x, input_pos, freqs_cis, mask)
        if last is not None:
            x = x.take_along_dim(last.unsqueeze(-1), 1)
        return self.output(self.norm(x))

    def kv_steps(self, length: int) -> int:
        """The number of cache positions to look at when the first `length` are filled.

        Rounded up to one of eight steps an octave, 64 at least: few enough shapes for CUDA graphs,
        and at most an eighth (or 63) more than needed.
        """
        step = max(64, 1 << max(0, length.bit_length() - 4))
        return min(-(-length // step) * step, self.max_seq_length)

    def bytes_per_step(self, kv_len: int) -> int:
        """Bytes that decoding one token reads: every weight once, and `kv_len` cached positions."""
        weights = self.state_dict(keep_vars=True)
        read = sum(t.nbytes for name, t in weights.items() if name != "tok_embeddings.weight")
        cache = self.layers[0].attention.kv_cache
        per_position = 2 * cache.k_cache[:, :, 0].nbytes * self.args.n_layer
        return read + per_position * kv_len

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        shard: Any = None,
    ) -> Transformer:
        """Build the model in the file `path`, memory-mapped; its shape comes from the folder.

        `shard`, a `tp.Shard`, takes one rank's part of it.
        """
        state = load_state(path)
        args = ModelArgs.from_folder(path.parent)
        with torch.device("meta"):
            model = cls(args)
        tied = args.tied and "output.weight" not in state
        if tied:
            state["output.weight"] = state.get("tok_embeddings.weight")
        if shard:
            model = shard.split(model, state, path)
        for i in range(args.n_layer):
            prefix = f"layers.{i}.attention."
            parts = [prefix + f"{name}.weight" for name in ("wq", "wk", "wv")]
            if all(part in state and state[part].shape[1:] == (args.dim,) for part in parts):
                state[prefix + "wqkv.weight"] = torch.cat([state.pop(part) for part in parts])
        linears = [name for name, module in model.named_modules() if isinstance(module, Linear)]
        for name in linears:
            found = {
                key[len(name) + 1 :]: t for key, t in state.items() if key.startswith(name + ".")
            }
            model.set_submodule(name, linear_for(model.get_submodule(name), found))
        check_state(path, state, model.state_dict())
        model.load_state_dict(state, assign=True)
        if tied and not shard:
            model.output.weight = model.tok_embeddings.weight  # one tensor, also where it is copied
        model.requires_grad_(False).eval().to(device=device, dtype=dtype)
        if shard:
            shard.join(model, tied)
        return model


# ------------------------------------------------------------------------------------------------
# Reading checkpoints


def load_state(path: Path) -> dict[str, Tensor]:
    """Memory-map the state dict of a checkpoint; `UserError` if the file is not one."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; pass a file in it, such as {path / 'model.pth'}")
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; make one with scripts/prepare.sh <repo>")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError):
        state = None
    tensors = state.values() if isinstance(state, dict) else [None]
    if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors):
        raise UserError(
            f"{path} is not a whole state dict in the zip format of torch.save; make it again"
        )
    state.pop("rope.freqs", None)  # Meta's own files carry this table, which is computed here
    return state


def check_state(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise a `UserError` that names the first tensor that does not fit the model, and how."""
    advice = "is it of another model than config.json describes? Convert it again"

    def kind(tensor: Tensor) -> str:
        dtype = "float" if tensor.is_floating_point() else str(tensor.dtype)
        return f"{dtype.removeprefix('torch.')} {list(tensor.shape)}"

    for name, tensor in expected.items():
        if state.get(name) is None:
            raise UserError(f"{path} lacks the tensor {name}; {advice}")
        if kind(state[name]) != kind(tensor):
            found, wanted = kind(state[name]), kind(tensor)
            raise UserError(f"{path}: {name} is {found}, not {wanted}; {advice}")
    for name in state.keys() - expected.keys():
        raise UserError(f"{path} holds {name}, which this model does not have; {advice}")


def find_device(name: str | None) -> torch.device:
    """The device called `name`, else by the variable DEVICE, else CUDA if there is a GPU."""
    name = name or os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # meta has no values, an absent GPU no memory
        return device
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError):
        raise UserError(f"device {name!r} cannot be used here; try --device cpu") from None
