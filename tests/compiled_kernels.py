"""The Triton kernels as compiled for GPUs that are not here: registers, loads, loops.

test_kernels_cuda.py runs this in a process of its own, apart from the interpreter.
"""

import re
import shutil
import subprocess
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

import kernels_cuda
import matmul_cuda
from conftest import CONFIG, random_model
from linear import Linear, linear_for
from matmul_cuda import Weight, dequantized, linear, product_of_codes
from model import RMSNorm
from quantize import quantize

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BF16 = torch.bfloat16


def tool(name: str) -> str:
    """A disassembler: Triton's wheels have it, CUDA has it, else the test is skipped."""
    found = str(BIN / name) if (BIN / name).exists() else shutil.which(name)
    return found or pytest.skip(f"{name} is neither in Triton's wheel nor on the PATH")


class Driver:
    """As much of a driver as compiling takes: a target, and no device."""

    def __init__(self, backend: str, arch: int | str, warp: int):
        self.target = GPUTarget(backend, arch, warp)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"{self.target.backend} {self.target.arch}"

    def get_current_stream(self, _device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """`compiled(arch, call)`: the kernels that `call` would launch there, by name."""

    def compile_for(arch: int | str, call) -> dict:
        hip, kernels = isinstance(arch, str), {}
        driver = Driver("hip" if hip else "cuda", arch, 64 if hip else 32)
        triton.runtime.driver.set_active(driver)
        for file in (kernels_cuda, matmul_cuda):
            monkeypatch.setattr(file, "target", lambda device: (driver.target.backend, 132))
        launch = triton.JITFunction.run

        def compile_only(self, *args, warmup=False, **options):
            kernels[self.fn.__name__] = launch(self, *args, warmup=True, **options)

        monkeypatch.setattr(triton.JITFunction, "run", compile_only)
        call()
        monkeypatch.setattr(triton.JITFunction, "run", launch)
        return kernels

    return compile_for


def disassembled(kernel, tmp_path) -> tuple[list[str], int, int]:
    """The opcodes of the longest loop, the registers and the bytes of stack."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    run = dict(capture_output=True, text=True, check=True)
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", file], **run).stdout
    lines = subprocess.run([tool("nvdisasm"), file], **run).stdout.splitlines()
    codes, labels, loops = [], {}, [[]]
    for line in lines:
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(codes)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(.*?);", line):
            codes.append(code[1])
            jump = re.search(r"BRA.*\.(L_x_\d+)", code[1])
            if jump and jump[1] in labels:
                loops.append([code.split()[0] for code in codes[labels[jump[1]] :]])
    figures = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return max(loops, key=len), *figures


def weight(scheme: str, out: int, width: int, dtype=BF16) -> Weight:
    kind, _, group = scheme.partition(" g")
    if kind == "bf16":
        return Weight(kind, torch.empty(out, width, dtype=dtype))
    if kind == "int4":
        grid = torch.empty(width // int(group), out, 2, dtype=dtype)
        return Weight(kind, torch.empty(out, width // 2, dtype=torch.uint8), grid)
    packed = torch.empty(out, width, dtype=torch.int8)
    return Weight(kind, packed, torch.empty(out, dtype=dtype))


def experts(scheme: str, out: int, width: int) -> Weight:
    one = weight(scheme, out, width)
    grid = None if one.grid is None else one.grid.new_empty(128, *one.grid.shape)
    return Weight(one.scheme, one.packed.new_empty(128, *one.packed.shape), grid)


def call(scheme: str, role: str, dtype=BF16):
    """A launch of one product of a Llama-3-8B, as the fused step does it, or of a Qwen3-30B-A3B."""
    x, norm = torch.empty(1, 4096, dtype=dtype), RMSNorm(4096, 1e-5).to(dtype)
    with torch.no_grad():
        if "experts" in role:
            rows, K = (8, 768) if role == "experts' w2" else (1, 2048)
            whole = scheme == "int8-activation"
            x = torch.empty(rows, K, dtype=torch.int8 if whole else dtype)
            options = dict(peaks=torch.empty(rows, 1) if whole else None, dtype=dtype)
            options["experts"] = torch.empty(1, 8, dtype=torch.int64)
            if rows == 1:
                options["gate"] = experts(scheme, 768, K)
            linear(x, experts(scheme, 768 if rows == 1 else 2048, K), **options)
        elif scheme == "int8-activation":
            w = weight(scheme, 4096, 4096, dtype)
            product_of_codes(x, w.packed, w.grid, torch.empty(1, 1))
        elif role == "wo":
            linear(x, weight(scheme, 4096, 4096, dtype), add=x)
        elif role == "wqkv":
            linear(x, weight(scheme, 6144, 4096, dtype), norm=norm)
        else:
            both = weight(scheme, 14336, 4096, dtype), weight(scheme, 14336, 4096, dtype)
            linear(x, both[0], norm=norm, gate=both[1])


PRODUCTS = [(90, "int4 g32", role, BF16) for role in ("wo", "wqkv", "w1 w3")]
PRODUCTS += [(90, "bf16", role, BF16) for role in ("wqkv", "w1 w3")]
PRODUCTS += [(90, "int8", "wqkv", BF16), (90, "int8-activation", "wo", BF16)]
PRODUCTS += [(90, "int4 g128", "w1 w3", torch.float16), (80, "int4 g32", "w1 w3", BF16)]
PRODUCTS += [(80, "int8", "w1 w3", BF16)]
for name in ("experts' w1 w3", "experts' w2"):
    PRODUCTS += [(90, scheme, name, BF16) for scheme in matmul_cuda.SHAPES if scheme != "int4"]
    PRODUCTS += [(90, "int4 g32", name, BF16), (80, "int4 g32", name, BF16)]


@pytest.mark.parametrize("arch, scheme, role, dtype", PRODUCTS)
def test_a_product_loads_16_bytes_and_multiplies_at_once(
    arch, scheme, role, dtype, compiled, tmp_path
):  # fmt: skip
    """Its loop has a tensor core's instructions, no barrier, shared memory or slow conversion."""
    kernel = compiled(arch, lambda: call(scheme, role, dtype))["linear_kernel"]
    loop, registers, stack = disassembled(kernel, tmp_path)
    names = Counter(code.split(".")[0] for code in loop)
    assert stack == 0 and registers <= 128
    assert not names.keys() & {"BAR", "I2F", "I2FP", "LDS", "STS", "LDSM", "SHFL", "LDL", "STL"}
    assert names["HMMA"] + names["IMMA"] >= 4
    loads = [code for code in loop if code.startswith("LDG")]
    assert sum(".128" in load for load in loads) >= 4
    narrow = [load for load in loads if ".128" not in load]
    assert not narrow or "int4" in scheme and len(narrow) * 2 <= len(loads)  # scales and zeros


def test_a_product_is_few_instructions_a_weight(compiled, tmp_path):
    """An H100 issues 9.3 a byte at full bandwidth: 18 of bf16, 9 of int8, 5.8 of int4 g32."""
    for scheme, columns, most in (("bf16", 8, 5), ("int8", 16, 7), ("int4 g32", 32, 5.5)):
        kernel = compiled(90, lambda scheme=scheme: call(scheme, "wqkv"))["linear_kernel"]
        loop, *_ = disassembled(kernel, tmp_path)
        U, R = matmul_cuda.SHAPES[scheme.partition(" ")[0]][3], 2
        assert len(loop) / (columns * U * R) < most, scheme


REASONS = {"": "Failed to find C compiler", "no-such-cc": "No such file or directory: 'no-such-cc'"}
REASONS["false"] = "false fails to build Triton's launcher"


@pytest.mark.parametrize("compiler", REASONS)
def test_without_a_c_compiler_one_line_says_so_and_no_weight_is_served(
    compiler, monkeypatch, tmp_path, capfd
):
    """By Triton's own driver, which builds its launcher before it asks for a device."""
    monkeypatch.setattr(CudaDriver, "is_active", staticmethod(lambda: True))
    (tmp_path / "libcuda.so.1").touch()
    for name in ("TRITON_LIBCUDA_PATH", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    triton.runtime.driver.set_active(None)
    kernels_cuda.can_launch.cache_clear()
    served = types.SimpleNamespace(device=torch.device("cpu"), dtype=BF16, is_cuda=True)
    monkeypatch.setattr(kernels_cuda, "supported", lambda device: True)
    for _ in range(2):
        assert not kernels_cuda.served(served)
    error = capfd.readouterr().err
    assert error.count("slower than it could be") == error.count("\n") == 1
    assert REASONS[compiler] in error and "install gcc" in error


def attend(head_dim: int, tokens: int):
    caches = [torch.empty(1, 8, 4097, head_dim, dtype=BF16) for _ in range(2)]
    q = torch.empty(1, tokens, 32, head_dim, dtype=BF16)
    positions = torch.empty(1, tokens, dtype=torch.int64)
    kernels_cuda.attend(q, *caches, positions, 0.1, 0, torch.empty(32))


SIZES = [(90, 128, 1), (90, 128, 64), (80, 128, 1), (80, 128, 64), (80, 256, 1)]
SIZES += [(90, 512, 1), (80, 512, 64)]


@pytest.mark.parametrize("arch, head_dim, tokens", SIZES)
def test_attention_keeps_to_its_registers(arch, head_dim, tokens, compiled, tmp_path):
    kernels = compiled(arch, lambda: attend(head_dim, tokens))
    assert kernels.keys() == {"attend_kernel"} | ({"merge_kernel"} if tokens == 1 else set())
    for name, kernel in kernels.items():
        loop, registers, stack = disassembled(kernel, tmp_path)
        assert stack == 0 and (registers <= 128 or head_dim > 128)
        assert kernel.metadata.shared <= 99 * 1024  # what an sm_86 or sm_89 has
        copies = [code for code in loop if code.startswith("LDGSTS")]  # ahead, past the registers
        assert name == "merge_kernel" or copies and all(".128" in code for code in copies)


def test_weights_are_loaded_before_the_kernel_ahead_is_done(compiled):
    """With programmatic dependent launch, and x after it."""
    w, x = weight("int4 g32", 4096, 4096), torch.empty(1, 4096, dtype=BF16)
    ptx = compiled(90, lambda: linear(x, w, pdl=True))["linear_kernel"].asm["ptx"]
    before, after = ptx.split("griddepcontrol.wait")
    assert before.count("ld.global") >= 8 and "griddepcontrol.launch_dependents" in before
    assert "ld.global" in after and "st.global" not in before


ROCM = [("int4 g32", "w1 w3"), ("int8-activation", "wo"), ("int4 g32", "experts' w1 w3")]


@pytest.mark.parametrize("scheme, role", ROCM)
def test_rocm_multiplies_on_its_matrix_cores(scheme, role, compiled):
    text = compiled("gfx942", lambda: call(scheme, role))["linear_kernel"].asm["amdgcn"]
    assert "v_mfma" in text and re.search("(global|buffer)_load_dwordx4", text)
    assert int(re.search(r"vgpr_spill_count:\s+(\d+)", text)[1]) == 0


def test_rocm_compiles_attention_and_what_surrounds_the_products(compiled):
    def calls():
        attend(128, 1)
        both, w2 = experts("bf16", 64, 64).packed, experts("bf16", 64, 64).packed
        x, chosen = torch.empty(1, 64, dtype=BF16), torch.empty(1, 6, dtype=torch.int64)
        stacks = both, None, both, None, w2, None
        matmul_cuda.experts(x, chosen, torch.empty(1, 6), *stacks, False, False)
        qkv, caches = torch.empty(1, 1, 6, 64, dtype=BF16), torch.empty(2, 1, 2, 9, 64, dtype=BF16)
        positions, table = torch.empty(1, 1, dtype=torch.int64), torch.empty(9, 32, 2)
        gain = torch.empty(64, dtype=BF16)
        kernels_cuda.rotate_write(qkv, positions, table, gain, gain, 1e-5, *caches)
        dequantized(torch.empty(1, 96, dtype=BF16), weight("int4 g32", 8, 96), range(8))

    names = {"attend_kernel", "merge_kernel", "rotate_kernel", "dequantize_kernel"}
    names |= {"linear_kernel", "sum_experts_kernel"}
    assert compiled("gfx942", calls).keys() == names


@torch.inference_mode()
def test_the_kernels_of_both_passes_are_compiled_in_threads_before_the_first_launch(monkeypatch):
    """Nothing is launched meanwhile: there is no device."""
    triton.runtime.driver.set_active(Driver("cuda", 89, 32))
    for file in (kernels_cuda, matmul_cuda):
        monkeypatch.setattr(file, "target", lambda device: ("cuda", 128))
    monkeypatch.setattr(kernels_cuda, "supported", lambda device: True)
    for file in ("linear", "model"):
        monkeypatch.setattr(f"{file}.kernels_for", lambda device: kernels_cuda)
    kernels_cuda.register("CPU")
    model = random_model(CONFIG, BF16)
    for name, module in [*model.named_modules()]:
        if isinstance(module, Linear) and name != "output":
            tensors = quantize(module.weight, "int8", 0)
            new = linear_for(module, tensors)
            new.load_state_dict(tensors, assign=True)
            model.set_submodule(name, new)
    model.pack_weights()
    model.setup_caches(1, 16)
    kernels = {name: getattr(kernels_cuda, f"{name}_kernel") for name in ("attend", "rotate")}
    kernels |= {name: getattr(matmul_cuda, f"{name}_kernel") for name in ("linear", "dequantize")}

    def ready() -> dict[str, int]:
        found = {name: [*k.device_caches["cuda 89"][0].values()] for name, k in kernels.items()}
        assert all("cubin" in kernel.asm for made in found.values() for kernel in made)
        return {name: len(made) for name, made in found.items()}

    kernels_cuda.compile_kernels(kernels_cuda.fuse(model), model, 1)
    assert ready() == dict(attend=1, rotate=1, linear=4, dequantize=0)
    kernels_cuda.compile_kernels(model, model, 1, 33, prefill=True)
    assert ready() == dict(attend=2, rotate=1, linear=4, dequantize=1)
    assert not any(
        cache.any() for layer in model.layers for cache in layer.attention.kv_cache.buffers()
    )
