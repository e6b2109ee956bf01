"""Correctness checks of gpu_check.py: operators against float64, logits against float32, texts.

Each check takes a device and the labels of a cell, and returns a row of the report.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import Engine, generate
from linear import FEW_ROWS, Int8ActivationLinear, Linear
from mixture import MixtureOfExperts
from model import KVCache, LayerKind, Mixture, Transformer
from scripts.gpu_models import (
    GREEDY,
    MODES,
    SCHEMES,
    SMALL,
    WARM,
    build,
    endless,
    forward,
    has_kernels,
    runner,
    split_scheme,
    start,
)
from scripts.random_weights import linears, random_linear

# ------------------------------------------------------------------------------------------------
# Every operator alone, against float64 on the same device

PRODUCTS = ("bf16", "int8", "int8-activation", "int4 g32", "int4 g64", "int4 g128", "int4 g256")
WIDTHS, HEIGHTS = (576, 2048, 4096, 14336), (17, 1001, 6144)
ROWS = (*range(1, 33), 40)  # rows of decoding; 40 is a batch's
PREFILLS = (1, 33, 100)
HEAD_SIZES, HEADS = (64, 80, 96, 128, 256, 512), ((8, 2), (6, 1), (4, 4))  # query heads, KV heads
EXPERT = (2048, 768)  # widths of x and of an expert; int8-activation would need another bound
POSITIONS = 300  # of a cache, without the padding slot
# The largest allowed error of an output, in units of its row's RMS. Rounding an output of 4 to 8
# RMS to bf16 costs up to 0.016, to float16 0.002. A missing or wrong term costs more: about 0.05
# for the sparse x at width 14336.
OPERATOR_BOUNDS = {torch.bfloat16: 0.05, torch.float16: 0.01}


def row_error(y: Tensor, expected: Tensor) -> float:
    """The largest error in units of its row's RMS; NaN if there is a NaN."""
    size = expected.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    return ((y.double() - expected).abs() / size).max().item()


def exact_product(x: Tensor, plain: Linear, weight: Tensor) -> Tensor:
    """x `[M, in]` times the float64 weight; for int8-activation, x is rounded as in the layer."""
    if isinstance(plain, Int8ActivationLinear):
        step = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127
        x = (x.float() / step).round().double() * step.double()
    return x.double() @ weight.t()


def inputs(rows: int, width: int, like: Tensor) -> Iterator[Tensor]:
    """Normal x, and sparse x whose rows have disjoint columns, so that each term shows."""
    generator = torch.Generator(like.device).manual_seed(1)
    x = torch.randn(rows, width, device=like.device, generator=generator).to(like.dtype)
    part = torch.arange(width, device=like.device) * rows // width
    yield x
    yield x * (part == torch.arange(rows, device=like.device).unsqueeze(1))


def not_taken(device: torch.device) -> dict:
    """The row of an unsupported case: a failure where there should be kernels."""
    return {
        "status": "failed" if has_kernels(device) else "skipped",
        "note": "no operator takes it",
    }


def operator_verdict(
    dtype: torch.dtype, errors: dict[str, list[float]], unequal: list[str]
) -> dict:
    """The row of an operator: its largest errors, and where bits differ that should be equal."""
    row = {name: torch.tensor(values).max().item() for name, values in errors.items()}
    bound = OPERATOR_BOUNDS[dtype]
    over = [name for name, value in row.items() if not value <= bound]  # NaN counts as over
    notes = [f"over {bound}: {', '.join(over)}"] if over else []
    notes += [f"bits: {'; '.join(unequal[:3])} ({len(unequal)} cases)"] if unequal else []
    row |= {
        "bound": bound,
        "cases": sum(map(len, errors.values())),
        "bits": "differ" if unequal else "equal",
    }
    return row | ({"status": "failed", "note": ", ".join(notes)} if notes else {})


def check_product(device: torch.device, scheme: str, dtype: torch.dtype) -> dict:
    """All widths and heights: errors, and batch invariance of each row."""
    errors, unequal = defaultdict(list), []
    kind, groupsize = split_scheme(scheme)
    like = torch.empty(0, device=device, dtype=dtype)
    for width, height in product(WIDTHS, HEIGHTS):
        if width % groupsize:
            continue
        linear = random_linear((width, height), kind, groupsize, device, dtype)
        weight = copy.deepcopy(linear).double().dequantize()
        linear.pack_weights()
        if linear.tiles is None:
            return not_taken(device)
        for x in inputs(ROWS[-1], width, like):
            y = linear.matmul(x, False)
            errors["error"].append(row_error(y, exact_product(x, linear, weight)))
            for rows in ROWS:
                alike = torch.equal(linear.matmul(x[:rows], False), y[:rows])
                alone = torch.equal(linear.matmul(x[rows - 1 : rows], False), y[rows - 1 : rows])
                if not (alike and alone):
                    unequal.append(f"{width} by {height}, {rows} rows")
        for rows in PREFILLS:
            x = next(inputs(rows, width, like))
            y = linear.matmul(x, True)
            errors["prefill"].append(row_error(y, exact_product(x, linear, weight)))
    return operator_verdict(dtype, errors, unequal)


def places(device: torch.device, tokens: int) -> Tensor:
    """Positions `[2, T]`, distinct in a row: one starts with the edge cases, one is consecutive."""
    special = torch.tensor([0, 1, POSITIONS - 1, POSITIONS])  # the last is the padding slot
    others = torch.randperm(POSITIONS - 3, generator=torch.Generator().manual_seed(tokens)) + 2
    first = torch.cat((special, others))[:tokens]
    return torch.stack((first, POSITIONS - tokens + torch.arange(tokens))).to(device)


def exact_attention(
    q: Tensor, caches: list[Tensor], pos: Tensor, scale: float, window: int, sinks: Tensor | None
) -> Tensor:
    """Attention in float64: q `[B, T, H, D]`, pos `[B, T]` -> `[B, T, H * D]`."""
    heads = q.shape[2] // caches[0].shape[1]
    k, v = (cache[:, :, :-1].double().repeat_interleave(heads, 1) for cache in caches)
    scores = torch.einsum("bthd,bhsd->bhts", q.double(), k) * scale
    slots, visible_to = torch.arange(k.shape[2], device=q.device), pos[:, None, :, None]
    hidden = slots > visible_to
    if window:
        hidden |= slots <= visible_to - window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:  # a logit without a value
        sink = sinks.double()[None, :, None, None].expand_as(scores[..., :1])
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1)[..., : len(slots)]
    return torch.einsum("bhts,bhsd->bthd", weights, v).flatten(2)


def normal_like(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function that draws normal tensors of a given shape, with a fixed seed."""
    options = dict(device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(2)
    return functools.partial(torch.randn, generator=generator, **options)


def caches_like(kv_heads: int, size: int, like: Tensor) -> tuple[KVCache, list[Tensor]]:
    """A layer's cache of two rows, and the random keys and values in it."""
    cache = KVCache(2, LayerKind(kv_heads, kv_heads, size), POSITIONS, like)
    tensors = [cache.k_cache, cache.v_cache]
    for i, tensor in enumerate(tensors):
        tensor.normal_(generator=torch.Generator(like.device).manual_seed(i))
    return cache, tensors


def check_attend(device: torch.device, size: int, dtype: torch.dtype) -> dict:
    """Attention in decoding and prefill: positions, windows, sinks, padding, grouped heads."""
    errors, unequal = defaultdict(list), []
    normal, attend = normal_like(device, dtype), torch.ops.tokenbus.attend
    for (heads, kv_heads), tokens in product(HEADS, (1, 5, 32, 70)):
        cache, tensors = caches_like(kv_heads, size, normal(0))
        if not cache.has_kernels:
            return not_taken(device)
        q, pos, scale = normal(2, tokens, heads, size), places(device, tokens), 1.5 * size**-0.5
        real = pos < POSITIONS
        for window, sinks in product((0, 1, 33), (None, normal(heads))):
            options = (scale, window, sinks)
            y = attend(q, *tensors, pos, *options)
            worst = row_error(y[real], exact_attention(q, tensors, pos, *options)[real])
            finite = y.isfinite().all()  # also at padding
            name = "prefill" if tokens > FEW_ROWS else "error"
            errors[name].append(worst if finite else float("nan"))
            for b, t in product(range(2), range(tokens if tokens == FEW_ROWS else 0)):
                row = [tensor[b : b + 1] for tensor in tensors]
                at = slice(b, b + 1), slice(t, t + 1)
                if real[b, t] and not torch.equal(attend(q[at], *row, pos[at], *options), y[at]):
                    unequal.append(f"{heads}/{kv_heads} heads, window {window}, row {b} {t}")
    return operator_verdict(dtype, errors, unequal)


def exact_rotation(x: Tensor, freqs_cis: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """Norm and rotation in float64: x `[B, T, H, D]`, freqs_cis `[B, T, D/2, 2]`."""
    x = x.double()
    if gain is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.double()
    turns = torch.view_as_complex(freqs_cis.double()).unsqueeze(2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def check_rotate_write(device: torch.device, size: int, dtype: torch.dtype) -> dict:
    """q and the caches afterwards: the right values at the right slots, and no other writes."""
    errors, unequal = defaultdict(list), []
    normal, rotate_write = normal_like(device, dtype), torch.ops.tokenbus.rotate_write
    angles, eps = torch.rand(POSITIONS + 1, size // 2, device=device) * 6, 1e-5
    freqs = torch.view_as_real(torch.polar(torch.ones_like(angles), angles))
    for (heads, kv_heads), tokens, normed in product(HEADS, (1, 5, 70), (False, True)):
        cache, (k_cache, v_cache) = caches_like(kv_heads, size, normal(0))
        if not cache.has_kernels:
            return not_taken(device)
        qkv, pos = normal(2, tokens, heads + 2 * kv_heads, size), places(device, tokens)
        q_norm, k_norm = (1 + 0.1 * normal(size) if normed else None for _ in range(2))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        before, rows = (k_cache.clone(), v_cache.clone()), torch.arange(2, device=device)[:, None]
        k_expected, v_expected = k_cache.double(), v_cache.clone()
        k_expected[rows, :, pos] = exact_rotation(k, freqs[pos], k_norm, eps)
        v_expected[rows, :, pos] = v
        others = torch.ones(2, POSITIONS + 1, device=device, dtype=torch.bool)
        others[rows, pos] = False
        y = rotate_write(qkv, pos, freqs, q_norm, k_norm, eps, k_cache, v_cache)
        errors["error"].append(row_error(y, exact_rotation(q, freqs[pos], q_norm, eps)))
        errors["error"].append(row_error(k_cache[:, :, :-1], k_expected[:, :, :-1]))
        same = torch.equal(v_cache[:, :, :-1], v_expected[:, :, :-1])
        for cache, old in zip((k_cache, v_cache), before, strict=True):
            same &= torch.equal(cache.transpose(1, 2)[others], old.transpose(1, 2)[others])
        at, row = (slice(1, 2), slice(tokens - 1, tokens)), [old[1:] for old in before]
        same &= torch.equal(rotate_write(qkv[at], pos[at], freqs, q_norm, k_norm, eps, *row), y[at])
        if not same:
            unequal.append(f"{heads}/{kv_heads} heads, {tokens} tokens")
    return operator_verdict(dtype, errors, unequal)


def check_experts(device: torch.device, scheme: str, dtype: torch.dtype) -> dict:
    """The FFNs of the chosen experts in decoding: errors, and batch invariance of each row."""
    kind, groupsize = split_scheme(scheme)
    (dim, width), normal, unequal = EXPERT, normal_like(device, dtype), []
    options = Mixture(experts=12, chosen=4, width=width)
    mixture = MixtureOfExperts(dim, options, nn.functional.silu, None)
    for name, shape in (("w1", (dim, width)), ("w3", (dim, width)), ("w2", (width, dim))):
        stored = random_linear(shape, kind, groupsize, device, dtype, options.experts)
        setattr(mixture, name, stored)
    exact = copy.deepcopy(mixture).double()
    for linear in (mixture.w1, mixture.w3, mixture.w2):
        linear.pack_weights()
    x, shares = normal(ROWS[-1], dim), normal(ROWS[-1], options.chosen).float().abs()
    if not mixture.has_operator(False, x.is_cuda):
        return not_taken(device)
    chosen = normal(ROWS[-1], options.experts).topk(options.chosen).indices
    y = mixture.by_operator(x, chosen, shares, False)
    for rows in ROWS:
        for own in (slice(rows), slice(rows - 1, rows)):
            part = mixture.by_operator(x[own], chosen[own], shares[own], False)
            if not torch.equal(part, y[own]):
                unequal.append(f"{rows} rows")
    errors = {"error": [row_error(y, exact.by_row(x.double(), chosen, shares.double()))]}
    return operator_verdict(dtype, errors, unequal)


def check_operator(device: torch.device, operator: str, dtype: str) -> dict:
    name, _, size = operator.partition(" ")
    if name == "experts":
        return check_experts(device, size, getattr(torch, dtype))
    if name == "attend":
        return check_attend(device, int(size), getattr(torch, dtype))
    if name == "rotate_write":
        return check_rotate_write(device, int(size), getattr(torch, dtype))
    return check_product(device, operator, getattr(torch, dtype))


def operator_cells(args: Namespace) -> Iterator[dict]:
    sized = [f"{name} {size}" for size, name in product(HEAD_SIZES, ("attend", "rotate_write"))]
    sized += [f"experts {scheme}" for scheme in ("bf16", "int8", "int4 g32")]
    for dtype, operator in product(("bfloat16", "float16"), (*PRODUCTS, *sized)):
        yield {"operator": operator, "dtype": dtype}


# ------------------------------------------------------------------------------------------------
# Logits against the same model in float32 on the CPU


def float_model(model: Transformer) -> Transformer:
    """The model in float32 on the CPU, with dequantized weights."""
    model = copy.deepcopy(model).cpu().float()
    for name, linear in linears(model).items():
        plain = Linear(linear.in_features, linear.out_features)
        plain.weight, plain.bias = nn.Parameter(linear.dequantize()), linear.bias
        model.set_submodule(name, plain)
    return model.requires_grad_(False)


def float_logits(model: Transformer, text: Tensor) -> Tensor:
    """Reference logits `[B, T, V]` of text `[B, T]`, in one pass."""
    model.setup_caches(*text.shape)
    return model(text, torch.arange(text.shape[1]).expand_as(text), text.shape[1]).logits


def random_text(rows: int, length: int) -> Tensor:
    vocabulary = min(args.vocab_size for args in SMALL.values())
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


# The largest allowed error of a position's logits, ‖logits - reference‖ / ‖reference‖: three times
# that of bf16 on a CPU.
BOUNDS = dict.fromkeys(SCHEMES, 0.03) | {"int8-activation": 0.09}
PROMPT, SHORTER, TEXT = 60, 47, 72  # tokens; decoding crosses 64 positions, where kv_len changes
LENGTH, VERIFIED = 256, 5  # positions of the cache, tokens of a verify pass
REPLAYS = 200


def error(logits: Tensor, expected: Tensor) -> float:
    """The largest relative error over all positions; NaN if there is a NaN."""
    logits = logits.float().cpu()
    return ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def check_logits(device: torch.device, model: str, scheme: str, mode: str) -> dict:
    """The error of each kind of pass: prefill, decoding, verify, and a padded batch."""
    network, text = build(SMALL[model], scheme, device), random_text(2, TEXT)
    expected, bound = float_logits(float_model(network), text), BOUNDS[scheme]
    first, verified = expected[:1], slice(PROMPT, PROMPT + 2 * VERIFIED)
    engine = start(network, mode, 1, LENGTH)
    row = {"ran": runner(engine)}
    errors = {"prefill": error(forward(engine, text, [0], PROMPT), first[:, :PROMPT])}
    forward(engine, text.roll(1, 1), [PROMPT], VERIFIED)  # a rejected draft: decoding overwrites it
    steps = [forward(engine, text, [at], 1) for at in range(PROMPT, TEXT)]
    errors["decode"] = error(torch.cat(steps, 1), first[:, PROMPT:])
    passes = [forward(engine, text, [PROMPT + at], VERIFIED) for at in (0, VERIFIED)]
    errors["verify"] = error(torch.cat(passes, 1), first[:, verified])
    row["replays"] = replays(engine, text) if mode != "torch" else None
    engine = start(network, mode, 2, LENGTH)
    steps = [engine.prefill([text[0, :PROMPT].tolist(), text[1, :SHORTER].tolist()]).clone()]
    for i in range(TEXT - PROMPT):
        steps.append(forward(engine, text, [PROMPT + i, SHORTER + i], 1)[:, 0])
    rows = [row[n - 1 :][: len(steps)] for row, n in zip(expected, (PROMPT, SHORTER), strict=True)]
    errors["batch"] = error(torch.stack(steps, 1), torch.stack(rows))
    over = [name for name, value in errors.items() if not value <= bound]  # NaN counts as over
    notes = [f"over the bound: {', '.join(over)}"] if over else []
    notes += ["a repeated step gives other bits"] if row["replays"] == "differ" else []
    verdict = {"status": "failed", "note": ", ".join(notes)} if notes else {}
    return row | errors | {"bound": bound} | verdict


def replays(engine: Engine, text: Tensor) -> str:
    """Whether a step and a verify pass give the same bits in every repetition."""
    for count in (1, VERIFIED):
        first = forward(engine, text, [PROMPT], count)
        if any(not forward(engine, text, [PROMPT], count).equal(first) for _ in range(REPLAYS)):
            return "differ"
    return f"{REPLAYS} equal"


def logits_cells(args: Namespace) -> Iterator[dict]:
    for mode, model, scheme in product(MODES, SMALL, SCHEMES):
        yield {"model": model, "scheme": scheme, "mode": mode}


# ------------------------------------------------------------------------------------------------
# Greedy text is the same in every mode

# The largest gap of two logits that rounding may swap, in standard deviations of the logits.
TIES = {scheme: 3 * bound for scheme, bound in BOUNDS.items()}
NEW_TOKENS = 48


def greedy(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    steps = generate(engine, prompts, GREEDY, NEW_TOKENS, **endless(len(prompts)))
    return [[token.id for token in row] for row in zip(*steps, strict=True)]


def verified(engine: Engine, prompt: list[int], new: list[int]) -> list[int]:
    """The greedy tokens when `new` is verified, several tokens a pass."""
    picks = engine.prefill([prompt]).argmax(-1).tolist()
    text = torch.tensor([prompt + new])
    for at in range(len(prompt), text.shape[1] - VERIFIED, VERIFIED):
        picks += forward(engine, text, [at], VERIFIED)[0].argmax(-1).tolist()
    return picks


def gaps(reference: Transformer, prompt: list[int], new: list[int]) -> Tensor:
    """How far each new token's float32 logit is below the maximum, in standard deviations."""
    logits = float_logits(reference, torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(new).unsqueeze(1)).squeeze(1)
    return (logits.amax(-1) - chosen) / logits.std(-1)


def difference(
    reference: Transformer, prompt: list[int], expected: list[int], found: list[int]
) -> tuple[str, float]:
    """Describe the first token in which two texts differ; also returns the gap of its logits."""
    pairs = zip(expected, found, strict=False)  # a verified text may be shorter
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return "equal", 0.0
    a, b = (gaps(reference, prompt, text[: at + 1])[at] for text in (expected, found))
    return f"token {at}, gap {abs(a - b):.3f}", abs(a - b).item()


def check_texts(device: torch.device, scheme: str, mode: str) -> dict:
    """PyTorch's text against float32's, the mode's against PyTorch's and its batch and verify.

    PyTorch's text is that of mode `torch`: uncaptured, without our kernels.
    """
    model, tie = build(SMALL["llama"], scheme, device), TIES[scheme]
    reference, text = float_model(model), random_text(2, 40)
    prompts = [text[0].tolist(), text[1, :27].tolist()]
    engine = start(model, "torch", 1, LENGTH)
    plain = [greedy(engine, [prompt])[0] for prompt in prompts]
    engine = start(model, mode, 1, LENGTH)
    alone = [greedy(engine, [prompt])[0] for prompt in prompts]
    verify = [verified(engine, *pair) for pair in zip(prompts, alone, strict=True)]
    row = {"ran": runner(engine), "tie": tie}
    batch = greedy(start(model, mode, 2, LENGTH), prompts)
    off = max(gaps(reference, *pair).max() for pair in zip(prompts, plain, strict=True)).item()
    row, worst = row | {"torch_beside_float32": off}, [off]
    pairs = {"alone_beside_torch": (plain, alone), "batch_beside_alone": (alone, batch)}
    for name, texts in (pairs | {"verify_beside_alone": (alone, verify)}).items():
        found = [difference(reference, *each) for each in zip(prompts, *texts, strict=True)]
        row[name] = "; ".join(dict.fromkeys(words for words, _ in found))
        worst += [gap for _, gap in found]
    if not all(gap <= tie for gap in worst):
        return row | {"status": "failed", "note": "a gap is too wide for a near tie"}
    return row | ({"note": "differs in near ties"} if any(worst[1:]) else {})


def scheme_cells(args: Namespace) -> Iterator[dict]:
    for mode, scheme in product(MODES, SCHEMES):
        yield {"scheme": scheme, "mode": mode}


# ------------------------------------------------------------------------------------------------
# The decoding loop never waits for the device


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise RuntimeError when the host synchronizes with the device.

    `Event.synchronize`, by which the loop reads a token already on its way, is allowed: PyTorch
    does not count it.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_waiting(device: torch.device, scheme: str, mode: str) -> dict:
    """Generate greedy text of one row, and sampled text of two with log probabilities."""
    model, prompts, count = build(SMALL["llama"], scheme, device), random_text(2, 40).tolist(), 0
    for rows, sampling, logprobs in ((1, GREEDY, None), (2, WARM, 3)):
        engine, options = start(model, mode, rows, LENGTH), endless(rows) | {"logprobs": logprobs}
        engine.warm_up(rows)  # capturing synchronizes
        tokens = generate(engine, prompts[:rows], sampling, NEW_TOKENS, **options)
        next(tokens)  # and so does copying a prompt to the device
        with no_waiting(device):
            count += sum(1 for _ in tokens)
    return {"ran": runner(engine), "steps": count}
