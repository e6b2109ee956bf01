"""A Llama-family transformer with a static KV cache, and how it is read from a checkpoint.

Architecture: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288) with the rotary embeddings of
Su et al. 2021 (arXiv 2104.09864) in Meta's interleaved order and the grouped-query attention of
Ainslie et al. 2023 (arXiv 2305.13245). Biases, q/k norms, windows and scales are options.

Shapes: B rows, T new positions a row, L cached positions visible, S positions a cache holds,
D = head_dim, and G query heads for each KV head.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import check_layers, check_state, join_qkv, load_state, upload
from cli import UserError, optional
from linear import Linear, kernels_for, linear_for

# ------------------------------------------------------------------------------------------------
# Configuration


NOT_YET = {"mixer", "sinks", "values_from_keys", "value_norm"}


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The attention of a layer; a model has one kind or a few, each shared by many layers."""

    n_head: int
    n_local_heads: int  # KV heads
    head_dim: int
    window: int = 0  # 0: sees all positions before; else pos - window + 1 .. pos
    rope: tuple[float, ...] = ()  # head_dim / 2 frequencies, radians a position; 0 does not rotate
    rope_scale: float = 1.0  # of cos and sin of rotated pairs (yarn)
    scale: float = 0.0  # of scores; 0: head_dim ** -0.5
    query_scale: tuple[float, float] = (0.0, 1.0)  # (b, n): q times 1 + b * ln(1 + pos // n)
    mixer: str = "attention"
    sinks: bool = False
    values_from_keys: bool = False
    value_norm: bool = False


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of experts in place of the FFN; see mixture.py."""

    experts: int
    chosen: int  # for each token
    width: int  # hidden units of an expert
    shared: int = 0  # hidden units of the expert for all tokens; 0: none
    shared_gate: bool = False  # its output has a sigmoid gate
    score: str = "softmax"  # softmax | sigmoid
    renormalize: bool = False  # scale the chosen experts' scores to a sum of 1
    factor: float = 1.0  # of the sum of the chosen experts
    biased: bool = False  # a router bias that affects only the choice
    dense_layers: tuple[int, ...] = ()  # those that keep their FFN


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """The shape of a model; families.py makes it of a published config.json.

    `layers` gives the kind of each layer, as an index into `kinds`; `block_size` is the context.
    """

    dim: int
    n_layer: int
    vocab_size: int
    block_size: int
    intermediate_size: int
    kinds: tuple[LayerKind, ...]
    layers: tuple[int, ...]
    norm_eps: float = 1e-5
    norms: str = "pre"  # pre | post | both: around attention and around the FFN
    qk_norm: str = ""  # "" | head | flat: of each head, or of all heads of q and of k together
    act: str = "silu"  # silu | gelu_tanh
    tied: bool = False  # the output matrix is the embedding
    biases: tuple[str, ...] = ()  # the Linears that have a bias
    mixture: Mixture | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and FFN add
    logit_scale: float = 1.0
    logit_cap: float = 0.0  # c: logits become c * tanh(logits / c); 0: no cap

    def __post_init__(self):
        """Refuse what the network below does not do yet, rather than ignore it."""
        for part in (self, *self.kinds):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                if field.name in NOT_YET and value != field.default:
                    raise UserError(f"{field.name} {value!r} is not supported; use another model")

    def share(self, world: int) -> ModelArgs:
        """The shape of one rank's part of `world`: fewer heads and hidden units, of equal size."""
        heads = [(kind, kind.n_head // world, kind.n_local_heads // world) for kind in self.kinds]
        kinds = [dataclasses.replace(k, n_head=n, n_local_heads=kv) for k, n, kv in heads]
        parts = {"kinds": tuple(kinds), "intermediate_size": self.intermediate_size // world}
        if self.mixture:
            width, shared = self.mixture.width // world, self.mixture.shared // world
            parts["mixture"] = dataclasses.replace(self.mixture, width=width, shared=shared)
        return dataclasses.replace(self, **parts)


# ------------------------------------------------------------------------------------------------
# The network


class Output(NamedTuple):
    """What a forward pass gives for each position asked for."""

    logits: Tensor  # [B, N|T, vocab_size]
    hidden: Tensor  # [B, N|T, dim], after the last norm


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019, arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def mean_square(self, x32: Tensor) -> Tensor:
        return x32.square().mean(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(self.mean_square(x32) + self.eps)
        return x32.type_as(x) * self.weight


class AllHeadsNorm(RMSNorm):
    """A norm over all heads together (OLMo); a rank holds part of them."""

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps)
        self.mean = nn.Identity()  # tp.py averages over the ranks here

    def mean_square(self, x32: Tensor) -> Tensor:
        return self.mean(super().mean_square(x32))


class FlatNorm(nn.Module):
    """Norms of q and k, each over all its heads, on the fused output of wqkv."""

    def __init__(self, kind: LayerKind, eps: float):
        super().__init__()
        q, kv = kind.n_head * kind.head_dim, kind.n_local_heads * kind.head_dim
        self.sizes = (q, kv, kv)
        self.q, self.k = AllHeadsNorm(q, eps), AllHeadsNorm(kv, eps)

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.split(self.sizes, dim=-1)
        return torch.cat((self.q(q), self.k(k), v), dim=-1)


def rotations(kind: LayerKind, length: int) -> Tensor:
    """cos and sin of each pair of dimensions at each position: float32 `[length, D/2, 2]`."""
    positions = torch.arange(length, dtype=torch.float32)
    freqs = torch.tensor(kind.rope, dtype=torch.float32)
    angles = torch.outer(positions, freqs)  # [length, D/2]
    scale = torch.where(freqs == 0, 1.0, kind.rope_scale)  # what is not rotated keeps its length
    # Not cos() and sin(): the first call of MKL's vector math in a process may be off by 1e-4 where
    # threads share it (https://github.com/pytorch/pytorch/issues/188792).
    return torch.view_as_real(torch.polar(scale.expand_as(angles), angles))


def query_scales(kind: LayerKind, length: int, device: torch.device) -> Tensor | None:
    """The factor of q at each position (Llama 4, Ministral 3): float32 `[length, 1, 1]`."""
    growth, period = kind.query_scale
    if not growth:
        return None
    steps = (torch.arange(length, device=device) / period).floor()
    # PyTorch has a log1p of its own; log() would be MKL's, as in `rotations`.
    return (1 + growth * torch.log1p(steps))[:, None, None]


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x `[B, T, H, D]` by freqs_cis `[B, T, D/2, 2]` (cos, sin)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, H, D/2] each
    cos, sin = freqs_cis.unsqueeze(2).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).type_as(x)


class RotaryEmbedding(nn.Module):
    """`apply_rotary_emb` as a module, so that a profile can tell it by a hook."""

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        return apply_rotary_emb(x, freqs_cis)


class Mask(NamedTuple):
    """Mask and rotary factors of a pass, shared by all layers of one kind."""

    hidden: Tensor  # [B, 1, T*G, kv_len]: -inf where they must not look, else 0
    freqs_cis: Tensor  # [B, T, D/2, 2]


class KVCache(nn.Module):
    """Keys and values of one layer; the last slot receives padding and is never read."""

    def __init__(self, batch_size: int, kind: LayerKind, length: int, like: Tensor):
        super().__init__()
        shape = (batch_size, kind.n_local_heads, length + 1, kind.head_dim)
        self.register_buffer("k_cache", like.new_zeros(shape), persistent=False)
        self.register_buffer("v_cache", like.new_zeros(shape), persistent=False)
        kernels = kernels_for(like.device.type)
        # Whether the operators read and write it.
        self.has_kernels = kernels is not None and kernels.take_cache(self.k_cache)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor, length: int) -> tuple:
        """Write k, v `[B, T, H, D]` at input_pos `[B, T]`; return the first `length` positions."""
        rows = torch.arange(len(k), device=k.device).unsqueeze(1)
        self.k_cache[rows, :, input_pos] = k
        self.v_cache[rows, :, input_pos] = v
        return self.k_cache[: len(k), :, :length], self.v_cache[: len(k), :, :length]


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, kind: LayerKind):
        super().__init__()
        self.kind, self.eps = kind, args.norm_eps
        self.heads = (kind.n_head, kind.n_local_heads, kind.n_local_heads)  # of q, k and v
        self.wqkv = Linear(args.dim, sum(self.heads) * kind.head_dim, "wqkv" in args.biases)
        self.wo = Linear(kind.n_head * kind.head_dim, args.dim, "wo" in args.biases)
        self.flat_norm = FlatNorm(kind, args.norm_eps) if args.qk_norm == "flat" else None
        norm = RMSNorm if args.qk_norm == "head" else nn.Identity
        self.q_norm = norm(kind.head_dim, args.norm_eps)
        self.k_norm = norm(kind.head_dim, args.norm_eps)
        self.rope = RotaryEmbedding()
        self.register_buffer("freqs_cis", None, persistent=False)  # [S + 1, D/2, 2]
        self.register_buffer("query_scales", None, persistent=False)  # [S + 1, 1, 1]
        self.kv_cache: KVCache | None = None

    def mask(self, input_pos: Tensor, kv_len: int, dtype: torch.dtype) -> Mask | None:
        """The `Mask` of a pass with queries at input_pos `[B, T]`, for all layers of this kind.

        None if the operators run attention: they need only input_pos.
        """
        if self.kv_cache.has_kernels:
            return None
        groups = self.kind.n_head // self.kind.n_local_heads
        visible_to = input_pos.repeat_interleave(groups, dim=1)[:, None, :, None]  # [B, 1, T*G, 1]
        places = torch.arange(kv_len, device=input_pos.device)
        masked = places > visible_to  # [B, 1, T*G, L]
        if self.kind.window:
            masked = masked | (places <= visible_to - self.kind.window)
        hidden = torch.zeros_like(masked, dtype=dtype).masked_fill_(masked, -math.inf)
        return Mask(hidden, self.freqs_cis[input_pos])

    def forward(self, x: Tensor, input_pos: Tensor, mask: Mask | None, prefill: bool) -> Tensor:
        qkv = self.wqkv(x, prefill)
        if self.flat_norm is not None:
            qkv = self.flat_norm(qkv)
        qkv = qkv.unflatten(-1, (-1, self.kind.head_dim))
        attend = self.attend if mask is not None else self.attend_by_operators
        return self.wo(attend(qkv, input_pos, mask), prefill)  # [B, T, H*G*D] -> [B, T, dim]

    def scale_query(self, q: Tensor, input_pos: Tensor) -> Tensor:
        """q `[B, T, H, D]`, by its position where the family says so."""
        return q if self.query_scales is None else q * self.query_scales[input_pos].type_as(q)

    def attend(self, qkv: Tensor, input_pos: Tensor, mask: Mask) -> Tensor:
        """Attention of qkv `[B, T, heads, D]` by PyTorch's own operations."""
        q, k, v = qkv.split(self.heads, dim=2)
        q = self.rope(self.q_norm(q), mask.freqs_cis)
        k = self.rope(self.k_norm(k), mask.freqs_cis)
        k, v = self.kv_cache.update(input_pos, k, v, mask.hidden.shape[-1])  # [B, H, L, D]
        q = self.scale_query(q, input_pos).unflatten(2, (k.shape[1], -1))  # [B, T, H, G, D]
        # The G query heads of a KV head become rows, so that the cache is never repeated.
        q = q.transpose(1, 2).flatten(2, 3)  # -> [B, H, T*G, D]
        scale = self.kind.scale or None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.hidden, scale=scale)
        return y.unflatten(2, (input_pos.shape[1], -1)).transpose(1, 2).flatten(2)  # [B, T, H*G*D]

    def attend_by_operators(self, qkv: Tensor, input_pos: Tensor, _mask: None) -> Tensor:
        """The same by this project's operators, which need no mask."""
        kind, cache, ops = self.kind, self.kv_cache, torch.ops.tokenbus
        norms = [getattr(norm, "weight", None) for norm in (self.q_norm, self.k_norm)]
        caches = cache.k_cache, cache.v_cache
        q = ops.rotate_write(qkv, input_pos, self.freqs_cis, *norms, self.eps, *caches)
        q = self.scale_query(q, input_pos)
        scale = kind.scale or kind.head_dim**-0.5
        return ops.attend(q, *caches, input_pos, scale, kind.window, None)


ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.act = ACTIVATIONS[args.act]
        self.w1 = Linear(args.dim, args.intermediate_size, "w1" in args.biases)
        self.w3 = Linear(args.dim, args.intermediate_size, "w3" in args.biases)
        self.w2 = Linear(args.intermediate_size, args.dim, "w2" in args.biases)

    def forward(self, x: Tensor, prefill: bool) -> Tensor:
        return self.w2(self.act(self.w1(x, prefill)) * self.w3(x, prefill), prefill)


def feed_forward(args: ModelArgs, layer: int) -> nn.Module:
    """The FFN of a layer, or the mixture of experts in its place."""
    options = args.mixture
    if options is None or layer in options.dense_layers:
        return FeedForward(args)
    mixture = optional("mixture")
    if mixture is None:
        raise UserError("a mixture of experts needs mixture.py; put it beside model.py")
    shared = dataclasses.replace(args, intermediate_size=options.shared)
    shared = FeedForward(shared) if options.shared else None
    return mixture.MixtureOfExperts(args.dim, options, ACTIVATIONS[args.act], shared)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.attention = Attention(args, args.kinds[args.layers[layer]])
        self.feed_forward = feed_forward(args, layer)
        pre = nn.Identity if args.norms == "post" else RMSNorm
        post = nn.Identity if args.norms == "pre" else RMSNorm
        self.attention_norm = pre(args.dim, args.norm_eps)
        self.attention_post_norm = post(args.dim, args.norm_eps)
        self.ffn_norm = pre(args.dim, args.norm_eps)
        self.ffn_post_norm = post(args.dim, args.norm_eps)
        self.scale = args.residual_scale

    def forward(self, x: Tensor, input_pos: Tensor, mask: Mask | None, prefill: bool) -> Tensor:
        y = self.attention(self.attention_norm(x), input_pos, mask, prefill)
        x = torch.add(x, self.attention_post_norm(y), alpha=self.scale)
        y = self.feed_forward(self.ffn_norm(x), prefill)
        return torch.add(x, self.ffn_post_norm(y), alpha=self.scale)


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(args.vocab_size, args.dim))
        self.layers = nn.ModuleList(TransformerBlock(args, i) for i in range(len(args.layers)))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size)
        self.max_seq_length = 0

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def setup_caches(self, batch_size: int, max_seq_length: int) -> None:
        """Allocate the KV cache of every layer and the RoPE tables."""
        length = max_seq_length + 1
        tables = [rotations(kind, length).to(self.device) for kind in self.args.kinds]
        scales = [query_scales(kind, length, self.device) for kind in self.args.kinds]
        for layer, kind in zip(self.layers, self.args.layers, strict=True):
            attention = layer.attention
            attention.kv_cache = None  # the old one goes first
            attention.freqs_cis = tables[kind]
            attention.query_scales = scales[kind]
            shape = (batch_size, attention.kind, max_seq_length)
            attention.kv_cache = KVCache(*shape, like=self.norm.weight)
        self.max_seq_length = max_seq_length

    def pack_weights(self) -> None:
        """Pack the weights for this device's kernels, once; they must not change afterwards."""
        for module in self.modules():
            if getattr(module, "tiles", module) is None:
                module.pack_weights()

    def embed(self, idx: Tensor) -> Tensor:
        """Embeddings, scaled by a factor in their dtype if the family has one, as trained."""
        x, scale = self.tok_embeddings(idx), self.args.embed_scale
        return x if scale == 1 else x * torch.full((), scale, dtype=x.dtype, device=x.device)

    def forward(
        self,
        idx: Tensor,
        input_pos: Tensor,
        kv_len: int,
        last: Tensor | None = None,
        block: Callable = TransformerBlock.forward,
    ) -> Output:
        """Run tokens idx `[B, T]` at positions input_pos `[B, T]`.

        Only the first `kv_len` cache positions are visible; it exceeds every position in use, see
        `kv_steps`. Padding has position `max_seq_length`. A pass with `last` `[B, N]` is a prefill:
        it returns logits only for these N indices of T, and every matmul uses the arithmetic of
        prefill, however few the rows. `block` runs each layer, so that one compiled block can serve
        all.
        """
        prefill = last is not None
        x = self.embed(idx)  # [B, T] -> [B, T, dim]
        masks: dict[int, Mask | None] = {}
        for layer, kind in zip(self.layers, self.args.layers, strict=True):
            if kind not in masks:
                masks[kind] = layer.attention.mask(input_pos, kv_len, x.dtype)
            x = block(layer, x, input_pos, masks[kind], prefill)
        if prefill:
            x = x.take_along_dim(last.unsqueeze(-1), 1)
        hidden = self.norm(x)
        return Output(self.shape_logits(self.output(hidden, prefill)), hidden)

    def shape_logits(self, logits: Tensor) -> Tensor:
        """Logits scaled and softly capped, where the family says so."""
        scale, cap = self.args.logit_scale, self.args.logit_cap
        logits = logits if scale == 1 else logits * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    def kv_steps(self, length: int) -> int:
        """The number of cache positions to look at when the first `length` are filled.

        Rounded up to one of eight steps an octave, 64 at least: few enough shapes for CUDA graphs,
        and at most an eighth (or 63) more than needed.
        """
        step = max(64, 1 << max(0, length.bit_length() - 4))
        return min(-(-length // step) * step, self.max_seq_length)

    def bytes_per_step(self, kv_len: int) -> int:
        """Bytes that decoding one token reads: every weight once, and `kv_len` cached positions.

        Of a mixture, the chosen experts alone.
        """
        weights, mixture = self.state_dict(keep_vars=True), self.args.mixture
        stacks = {n for n, module in self.named_modules() if getattr(module, "experts", 0)}
        sizes = {n: t.nbytes for n, t in weights.items() if n != "tok_embeddings.weight"}
        for name in sizes:
            if name.rpartition(".")[0] in stacks:
                sizes[name] = sizes[name] * mixture.chosen // mixture.experts
        read = sum(sizes.values())
        positions = [
            (layer.attention.kv_cache.k_cache[:, :, 0].nbytes, layer.attention.kind.window)
            for layer in self.layers
        ]
        return read + sum(2 * size * min(kv_len, window or kv_len) for size, window in positions)

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        args: ModelArgs,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        shard: Any = None,
    ) -> Transformer:
        """Build the model of this shape in the file `path`, memory-mapped.

        `shard`, a `tp.Shard`, takes one rank's part of it.
        """
        state = load_state(path)
        check_layers(path, state, args.n_layer)
        with torch.device("meta"):
            model = cls(args)
        tied = args.tied and "output.weight" not in state
        if tied:
            state["output.weight"] = state.get("tok_embeddings.weight")
        if shard:
            model = shard.slice_state(model, state, path)
        join_qkv(path, state, model.layers)
        linears = [name for name, module in model.named_modules() if isinstance(module, Linear)]
        for name in linears:
            found = {
                key[len(name) + 1 :]: t for key, t in state.items() if key.startswith(name + ".")
            }
            model.set_submodule(name, linear_for(model.get_submodule(name), found))
        check_state(path, state, model.state_dict())
        if torch.device(device).type == "cuda":
            upload(state, torch.device(device))
        model.load_state_dict(state, assign=True)
        if tied and not shard:
            model.output.weight = model.tok_embeddings.weight  # one tensor, also where it is copied
        model.requires_grad_(False).eval().to(device=device, dtype=dtype)
        if shard:
            shard.add_collectives(model, tied)
        return model
