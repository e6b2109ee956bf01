"""Prints, as JSON, what Inductor makes of one compiled block for an H100; no GPU is needed.

Run it in a process of its own, with the project on PYTHONPATH: it makes torch believe in a card, by
its properties and by a driver that names the target. The block is traced on the meta device and
compiled for `cuda`; the code that Inductor writes is read, not run.
"""

import contextlib
import json
import re
import sys
import types

import torch
import triton.runtime
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

import operators  # noqa: F401
from families import from_config
from model import Transformer, TransformerBlock
from scripts.random_weights import empty_model, linears

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=80 << 30, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, warp_size=32, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="", uuid="",
)  # fmt: skip


def pretend(written: list[str]) -> None:
    """Have torch believe in an H100, and Inductor put its code into `written` and stop."""
    for lazy in (joint_graph, post_grad):
        lazy.lazy_init(torch.device("cpu"))
        lazy.lazy_init = lambda *_: None
    answers = {
        "is_available": True, "current_device": 0, "device_count": 1, "is_initialized": False,
        "get_device_properties": H100, "get_device_capability": (9, 0), "_is_compiled": True,
        "is_bf16_supported": True, "synchronize": None, "set_device": None, "_lazy_init": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "current_stream": types.SimpleNamespace(cuda_stream=0), "device": contextlib.nullcontext(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    answers |= {"get_compute_capability": 90, "is_triton_capable": True}
    answers |= {"raise_if_triton_unavailable": None, "is_dtype_supported": True}
    for name, answer in answers.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer, **__: answer))
        setattr(CudaInterface.Worker, name, staticmethod(lambda *_, answer=answer, **__: answer))
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    torch.version.cuda = "13.0"
    torch.Tensor.copy_ = lambda to, source, *_: torch.ops.aten.copy_.default(to, source)
    target = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda"),
    )  # fmt: skip
    triton.runtime.driver.set_active(target)

    def write(graph):
        code = graph.codegen()[0]
        written.append(getattr(code, "value", code))
        raise RuntimeError("the code is only read")

    GraphLowering.compile_to_module = GraphLowering._compile_to_module = write


def block_on_meta(scheme: str) -> tuple[Transformer, list[torch.Tensor]]:
    """A model of one layer whose Linears and caches the operators take."""
    config = dict(
        model_type="qwen3", hidden_size=4096, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, intermediate_size=14336, vocab_size=512,
        max_position_embeddings=8192, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = empty_model(from_config(config), scheme, 32).bfloat16().requires_grad_(False)
    with torch.device("meta"):
        model.setup_caches(1, 2048)
    model.layers[0].attention.kv_cache.has_kernels = True
    for linear in linears(model).values():
        grids = [t for name, t in linear.named_parameters() if name.startswith("scales")]
        linear.tiles, linear.grid = linear.weight.data, grids[0] if grids else None
    return model


def compile_block(scheme: str) -> None:
    """Have Inductor write the code of a block in decoding."""
    model = block_on_meta(scheme)
    layer = model.layers[0]
    state = dict(layer.named_parameters()) | dict(layer.named_buffers())
    names, tensors = list(state), list(state.values())

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, input_pos):
            return TransformerBlock.forward(self.layer, x, input_pos, None, False)

    def function(*inputs):
        state = {f"layer.{name}": t for name, t in zip(names, inputs, strict=False)}
        return (torch.func.functional_call(Block(), state, inputs[len(names) :]),)

    x = torch.zeros(1, 1, 4096, dtype=torch.bfloat16, device="meta")
    inputs = [*tensors, x, torch.zeros(1, 1, dtype=torch.int64, device="meta")]
    traced = make_fx(function)(*inputs)
    for node in traced.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": torch.device("cuda", 0)}
    traced.recompile()
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        shapes = [(t.shape, t.stride(), t.dtype) for t in inputs]
        inputs = [torch.empty_strided(a, b, dtype=c, device="cuda") for a, b, c in shapes]
    with fakes, torch.no_grad():
        compile_fx.compile_fx(traced, inputs)


def main() -> None:
    config.force_disable_caches, config.compile_threads = True, 1
    written: list[str] = []
    pretend(written)
    found = {}
    for scheme in sys.argv[1:]:
        with contextlib.suppress(RuntimeError):
            compile_block(scheme)
        code = written.pop()
        call = code[code.index("def call(") :]
        call = call[: call.index("\n\n")]
        found[scheme] = {
            "triton": len(re.findall(r"\.run\(", call)),
            "operators": re.findall(r"torch\.ops\.tokenbus\.(\w+)\.default\(\w", call),
            "library": re.findall(r"extern_kernels\.(\w+)", call),
            "allocated": re.findall(r"empty_strided_cuda\(\((.*?)\)", call),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
