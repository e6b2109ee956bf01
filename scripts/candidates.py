"""The candidates of benchmark.py: models in every scheme, and other programs on the same weights.

Each candidate decodes greedily (`tokens`) and runs several tokens at once (`forward`), on a cache
whose first positions `hold` fills.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import UserError
from engine import Engine, Sampling, Token, generate, load_model
from families import preset, read_config
from files import temporary_folder
from linear import Linear
from model import LayerKind, ModelArgs, Transformer
from quantize import check_groups, quantize
from scripts.convert_hf_checkpoint import HF_NAMES, parts
from scripts.gguf_config import GGUF_NAMES
from scripts.random_weights import empty_model, fill, linears, noise, pack

GGUF_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
GREEDY = Sampling(temperature=0)

# ------------------------------------------------------------------------------------------------
# Models in every scheme


@dataclasses.dataclass
class Case:
    """A model to measure, described so that it can be passed to another process.

    Its shape comes from a preset or a checkpoint. Its weights are random with `random`; scheme "as
    stored" is that of the file.
    """

    scheme: str
    groupsize: int
    preset: str | None = None
    checkpoint: str | None = None
    random: bool = False

    @property
    def args(self) -> ModelArgs:
        return preset(self.preset) if self.preset else read_config(Path(self.checkpoint).parent)

    @property
    def made(self) -> bool:
        """Whether its weights are generated or quantized here, not read as they are."""
        return self.random or self.scheme not in ("bf16", "as stored")


def skeleton(case: Case) -> Transformer:
    """The model on the meta device; `UserError` if the group size does not fit."""
    if not case.made:
        return load_model(Path(case.checkpoint), "meta")
    with torch.device("meta"):
        layers = linears(Transformer(case.args))
    check_groups(layers, dict.fromkeys(layers, case.scheme), case.groupsize)
    return empty_model(case.args, case.scheme, case.groupsize)


def quantized(source: Transformer, model: Transformer, case: Case) -> Transformer:
    """Fill a skeleton with the weights of `source`, quantized."""
    state = source.state_dict()
    for name, linear in linears(source).items():
        del state[f"{name}.weight"]
        tensors = quantize(linear.weight, case.scheme, case.groupsize)
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def make(case: Case, device: torch.device, length: int, packed: bool = False) -> Transformer:
    """The model, with a cache of `length` positions filled with random keys and values.

    Random weights may be `packed`: kept only in the kernels' layout, unusable by compiled code.
    """
    if not case.made:
        model = load_model(Path(case.checkpoint), device)
    elif case.random:
        model = fill(skeleton(case), device, symmetric=True)
        model = pack(model) if packed else model
    else:
        source = load_model(Path(case.checkpoint), device)
        model = quantized(source, skeleton(case), case)
    model.setup_caches(1, length)
    for layer in model.layers:
        for cache in layer.attention.kv_cache.buffers():
            noise(cache, lambda x: x.normal_())
    return model


# ------------------------------------------------------------------------------------------------
# Our engine and other programs


def greedy(engine: Engine, prompt: list[int], n: int, start: int = 0) -> Iterator[list[Token]]:
    """n greedy tokens after a prompt, ignoring end of text."""
    options = {"until": lambda row, token: False, "seeds": [0]}
    return generate(engine, [prompt], GREEDY, n, start=start, **options)


class Ours:
    """A model of this project in one scheme."""

    def __init__(self, model: Transformer, args: Namespace):
        self.model, self.bytes_per_step, self.kv_steps = model, model.bytes_per_step, model.kv_steps
        self.engine = Engine(model, args.compile, args.compile_prefill)
        if args.compile or args.compile_prefill:
            self.engine.warm_up(1, 8)

    def hold(self, start: int) -> None:
        """Does nothing: the cache is full of random values."""

    def forward(self, ids: list[int], start: int) -> list[int]:
        """The greedy token after each of `ids`, fed from position `start` on."""
        idx = torch.tensor([ids], device=self.model.device)
        input_pos = torch.arange(start, start + len(ids), device=idx.device)[None]
        output = self.engine.decode(idx, input_pos, self.model.kv_steps(start + len(ids)))
        return output.logits[0].argmax(-1).tolist()

    def tokens(self, prompt: list[int], n: int, start: int) -> Iterator:
        return greedy(self.engine, prompt, n, start)


class Peer:
    """Base of the other libraries; bytes are those of their own tensors.

    They run models with one kind of layer. RoPE scaling is left out: it does not affect speed.
    """

    shape: ModelArgs
    weight_bytes: int

    @property
    def kind(self) -> LayerKind:
        (kind,) = self.shape.kinds
        return kind

    def kv_steps(self, length: int) -> int:
        return length

    def bytes_per_step(self, kv_len: float) -> float:
        values = 2 * self.kind.n_local_heads * self.kind.head_dim  # keys and values
        per_position = 2 * self.shape.n_layer * values  # 2 bytes each
        return self.weight_bytes + per_position * kv_len

    def tokens(self, prompt: list[int], n: int, start: int) -> Iterator[int]:
        """The loop of `engine.generate`, for one row."""
        self.hold(start)
        ids = prompt[start:]
        for _ in range(n):
            (token,) = self.forward(ids, start, last=True)
            yield token
            start, ids = start + len(ids), [token]


def rope_base(kind: LayerKind) -> float:
    """The RoPE base that unscaled frequencies were computed from, to five digits."""
    return float(f"{kind.rope[1] ** (-kind.head_dim / 2):.5g}")  # float32 has no more


def plain_shape(shape: ModelArgs) -> ModelArgs:
    """A llama of the same sizes, without any property that peers do not get."""
    kind = shape.kinds[0]
    heads = LayerKind(kind.n_head, kind.n_local_heads, kind.head_dim, rope=kind.rope)
    sizes = (shape.dim, shape.n_layer, shape.vocab_size, shape.block_size, shape.intermediate_size)
    kinds = dict(kinds=(heads,), layers=(0,) * shape.n_layer)
    return ModelArgs(*sizes, **kinds, norm_eps=shape.norm_eps, tied=shape.tied)


def gguf_architecture(shape: ModelArgs) -> str | None:
    """llama.cpp's architecture for this shape: a llama or a plain mixture, else None."""
    plain, mixture = plain_shape(shape), shape.mixture
    if shape == plain:
        return "llama"
    experts = dataclasses.replace(plain, mixture=mixture, qk_norm=shape.qk_norm)
    if shape != experts or not mixture or mixture.shared or mixture.dense_layers:
        return None
    return {"flat": "olmoe", "head": "qwen3moe"}.get(shape.qk_norm)


def write_gguf(path: Path, model: Transformer, kind: str) -> int:
    """Write a model's weights for llama.cpp in type `kind`; returns the bytes a token reads."""
    import gguf
    import numpy as np

    shape, (layer,), types = model.args, model.args.kinds, gguf.GGMLQuantizationType
    writer, mixture = gguf.GGUFWriter(path, gguf_architecture(shape)), shape.mixture
    writer.add_context_length(shape.block_size)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(layer.n_head)
    writer.add_head_count_kv(layer.n_local_heads)
    writer.add_key_length(layer.head_dim)
    writer.add_value_length(layer.head_dim)
    writer.add_rope_dimension_count(layer.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(rope_base(layer))
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if mixture:
        writer.add_expert_count(mixture.experts)
        writer.add_expert_used_count(mixture.chosen)
        writer.add_expert_feed_forward_length(mixture.width)
    total = 0
    # q and k rows stay in Meta's order, which llama.cpp uses for llamas.
    for name, part in parts(dataclasses.replace(shape, tied=False), GGUF_NAMES, False).items():
        if part.expert:  # the first expert stands for the stack
            continue
        name = name if part.expert is None else name.replace(".0.weight", ".weight")
        module = model.get_submodule(part.name.rpartition(".")[0])
        weight = module.dequantize() if isinstance(module, Linear) else module.weight
        rows = slice(part.start, part.start + part.shape[0]) if part.expert is None else slice(None)
        floats = weight[rows].float().cpu().numpy()
        stored = types[kind] if floats.ndim > 1 and "ffn_gate_inp" not in name else types.F32
        if name == "token_embd.weight":
            stored = types.BF16
        data = gguf.quantize(np.ascontiguousarray(floats), stored)
        writer.add_tensor(name, data, raw_dtype=stored)
        read = data.nbytes if part.expert is None else data.nbytes * mixture.chosen // len(data)
        total += read if name != "token_embd.weight" else 0
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


class LlamaCpp(Peer):
    """llama.cpp through llama-cpp-python's C functions, on a file with the same weights."""

    def __init__(self, model: Transformer, kind: str, device: torch.device, length: int):
        import llama_cpp

        self.lib, self.shape = llama_cpp, model.args
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # referenced, as C calls it
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0 if device.type == "cpu" else 10_000
        options.use_mmap = False  # the file is deleted
        with temporary_folder() as folder:
            path = folder / "model.gguf"
            self.weight_bytes = write_gguf(path, model, kind)
            self.model = llama_cpp.llama_model_load_from_file(bytes(path), options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = length
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = self.model and llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise UserError(f"llama.cpp cannot load this shape in {kind}; leave it out of --peers")
        self.saved: dict[int, ctypes.Array] = {}  # state by number of filled positions

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def hold(self, start: int) -> None:
        lib = self.lib
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        if start and start not in self.saved:
            self.forward([1] * start, 0, last=True)
            self.saved[start] = (ctypes.c_uint8 * lib.llama_state_seq_get_size(self.context, 0))()
            state = self.saved[start]
            lib.llama_state_seq_get_data(self.context, state, len(state), 0)
        elif start:
            lib.llama_state_seq_set_data(self.context, self.saved[start], len(self.saved[start]), 0)

    def forward(self, ids: list[int], start: int, last: bool = False) -> list[int]:
        lib, n = self.lib, len(ids)
        tokens, wanted = (lib.llama_token * n)(*ids), (ctypes.c_int8 * n)(*[1] * n)
        batch = lib.llama_batch_get_one(tokens, n)  # it points to them without a reference
        if not last:
            batch.logits = wanted
        if lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed on {n} tokens at {start}")
        rows = [-1] if last else range(n)
        shape = (self.shape.vocab_size,)
        logits = (lib.llama_get_logits_ith(self.context, row) for row in rows)
        return [int(np_array(row, shape).argmax()) for row in logits]


def np_array(pointer, shape: tuple[int, ...]):
    import numpy as np

    return np.ctypeslib.as_array(pointer, shape)


class HuggingFace(Peer):
    """transformers' LlamaForCausalLM of the same shape: bf16, not compiled, default cache."""

    def __init__(self, source: Transformer, device: torch.device):
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.shape, self.device = source.args, device
        shape, kind = self.shape, self.kind
        config = LlamaConfig(
            hidden_size=shape.dim,
            num_hidden_layers=shape.n_layer,
            num_attention_heads=kind.n_head,
            num_key_value_heads=kind.n_local_heads,
            head_dim=kind.head_dim,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
            max_position_embeddings=shape.block_size,
            rms_norm_eps=shape.norm_eps,
            rope_theta=rope_base(kind),
            tie_word_embeddings=shape.tied,
        )
        with torch.device("meta"):
            self.model = LlamaForCausalLM(config).to(torch.bfloat16)
        self.model.to_empty(device=self.device).tie_weights()
        self.model.model.rotary_emb = LlamaRotaryEmbedding(config).to(self.device)
        state = self.model.state_dict()
        for name, part in parts(shape, HF_NAMES).items():
            rows = source.get_parameter(part.name)[part.start : part.start + part.shape[0]]
            if part.halves:  # interleaved pairs -> halves of a head
                heads = rows.unflatten(0, (-1, part.halves, 2))
                rows = heads.transpose(1, 2).flatten(0, 2)
            state[name].copy_(rows)
        sizes = {name: tensor.nbytes for name, tensor in self.model.named_parameters()}
        embedding = 0 if shape.tied else sizes["model.embed_tokens.weight"]
        self.weight_bytes = sum(sizes.values()) - embedding
        self.model.requires_grad_(False).eval()

    def hold(self, start: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        shape = (1, self.kind.n_local_heads, start, self.kind.head_dim)
        for layer in range(self.shape.n_layer if start else 0):
            keys = torch.randn(shape, dtype=torch.bfloat16, device=self.device)
            self.cache.update(keys, keys.clone(), layer)

    @torch.inference_mode()
    def forward(self, ids: list[int], start: int, last: bool = False) -> list[int]:
        idx = torch.tensor([ids], device=self.device)
        options = {"past_key_values": self.cache, "logits_to_keep": 1 if last else 0}
        return self.model(idx, **options).logits[0].argmax(-1).tolist()
