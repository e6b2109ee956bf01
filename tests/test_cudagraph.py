"""The captured step and the loop that launches ahead, on a CPU: the same code without a graph.

What only a GPU could show, a wait for the device, is refused here on the meta device, which has no
values to wait for.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import subprocess
import sys
import types
import weakref
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cudagraph
import engine as engine_file
import generate as generate_file
import operators  # noqa: F401
from conftest import CONFIG, ROOT, random_model
from cudagraph import BLOCK, Captured
from engine import Engine, Sampling, generate, sample, send_tokens
from families import from_config
from linear import FEW_ROWS, Linear, linear_for
from model import Output, Transformer
from quantize import quantize
from speculate import PromptLookup, Speculator, speculate

GREEDY, WARM = Sampling(0.0), Sampling(1.0, 20)
THREE = [[1, 2, 3], [9] * 7, [4] * 11]
aten = torch.ops.aten


def make_engine(rows=1, length=64, ahead=True) -> Engine:
    """An Engine as on CUDA, if `ahead`: captured steps, launched before the last one is read."""
    model = random_model(CONFIG)
    model.setup_caches(rows, length)
    engine = Engine(model)
    if ahead:
        captured = Captured(engine.decode_step, model)
        engine.decode_step = lambda *inputs: Output(*captured(*inputs))
        engine.launches_ahead = True
    return engine


def run(engine, prompts, n=40, sampling=GREEDY, eos=(), start=0, stop_at=None):
    """The rows that `generate` makes, and how many decoding steps it launched."""
    launched, step = [0], engine.decode_step

    def counting(*inputs):
        launched[0] += 1
        return step(*inputs)

    engine.decode_step = counting
    rows, options = [[] for _ in prompts], dict(seeds=[5, 6, 7][: len(prompts)], start=start)
    stream = generate(engine, prompts, sampling, n, until=lambda row, t: t in eos, **options)
    for tokens in itertools.islice(stream, stop_at):
        for row, token in zip(rows, tokens, strict=True):
            row += [token.id] if token else []
    stream.close()
    engine.decode_step = step
    return rows, launched[0]


def ends(prompts, sampling, at, row) -> set:
    """The token that a row draws at a step, to end there."""
    return {run(make_engine(len(prompts), ahead=False), prompts, sampling=sampling)[0][row][at]}


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_steps_launched_ahead_give_the_same_text(sampling):
    eos = ends(THREE, sampling, 6, 1) | ends(THREE, sampling, 9, 0)
    cases = [([[1, 2, 3]], 40, ()), ([[1, 2, 3]], 1, ()), ([[7] * 64], 10, ()), (THREE, 200, ())]
    cases += [([[1, 2, 3]], 40, eos), (THREE, 40, eos), (THREE, 200, eos), ([[], [5], []], 9, ())]
    for prompts, n, eos_ids in cases:
        plain, needed = run(make_engine(len(prompts), ahead=False), prompts, n, sampling, eos_ids)
        engine = make_engine(len(prompts))
        for _ in range(2):  # what a step too many of the last text left behind changes nothing
            rows, launched = run(engine, prompts, n, sampling, eos_ids)
            assert rows == plain
        ended = all(row and row[-1] in eos_ids for row in rows)  # else the end is known beforehand
        assert launched - needed == int(ended), (prompts, n, eos_ids)


def test_a_consumer_may_stop_at_any_step_and_go_on():
    engine, plain = make_engine(), make_engine(ahead=False)
    expected, _ = run(plain, [[1, 2, 3]])
    for stop_at in (1, 2, 5):
        rows, _ = run(engine, [[1, 2, 3]], stop_at=stop_at)
        assert rows == [expected[0][:stop_at]]
        # The tokens before the last one stand in the cache, to be continued.
        text = [1, 2, 3, *rows[0], 50]
        assert run(engine, [text], start=len(text) - 2) == run(plain, [text])

    def until(_row, _token):
        raise KeyboardInterrupt

    options = dict(until=until, seeds=[0])
    with pytest.raises(KeyboardInterrupt):
        list(generate(engine, [[1, 2, 3]], GREEDY, 9, **options))
    assert run(engine, [[1, 2, 3]])[0] == expected


def test_the_consumer_sees_each_token_before_the_next_is_drawn():
    """Ahead by one step and no more: a stop is known one step late at most."""
    engine, drawn = make_engine(), []
    step = engine.decode_step
    engine.decode_step = lambda *inputs: (drawn.append(1), step(*inputs))[1]
    options = dict(until=lambda row, token: False, seeds=[0])
    for seen, _ in enumerate(generate(engine, [[1, 2, 3]], GREEDY, 9, **options)):
        assert len(drawn) == min(seen + 1, 8)


def test_logprobs_are_those_of_the_token_although_the_step_after_it_is_launched():
    found = [
        list(
            generate(
                make_engine(3, ahead=ahead), THREE, WARM, 9,
                until=lambda row, token: False, seeds=[1, 2, 3], logprobs=2,
            )
        )
        for ahead in (False, True)
    ]  # fmt: skip
    assert found[0] == found[1]


def test_a_captured_step_gives_what_the_step_gives_for_any_number_of_tokens():
    plain, ahead = make_engine(2, ahead=False), make_engine(2)
    for tokens in (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK):
        idx = torch.arange(2 * tokens).view(2, tokens) % 250
        input_pos = torch.stack((torch.arange(tokens), 20 + torch.arange(tokens)))
        expected = plain.decode(idx, input_pos, 64)
        output = ahead.decode(idx, input_pos, 64)
        for got, want in zip(output, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    caches = [e.model.layers[0].attention.kv_cache.k_cache[:, :, :64] for e in (plain, ahead)]
    torch.testing.assert_close(*caches)  # padding went to the last slot


def test_one_graph_serves_every_length_and_a_prefill_has_none():
    calls, model = [], random_model(CONFIG)
    model.setup_caches(1, 64)

    def step(idx, input_pos, kv_len, last):
        calls.append((*idx.shape, kv_len))
        return model(idx, input_pos, kv_len, last)

    captured = Captured(step, model)
    for tokens, start in ((1, 0), (1, 40), (2, 3), (6, 50), (8, 0), (9, 0)):
        idx, input_pos = torch.ones(1, tokens).long(), torch.arange(start, start + tokens)[None]
        captured(idx, input_pos, model.kv_steps(start + tokens))
    assert set(captured.graphs) == {(1, 1), (1, 8), (1, 16)}
    assert {kv_len for *_, kv_len in calls} == {64}  # all of the cache
    captured(idx, input_pos, 32, torch.zeros(1, 1).long())
    assert calls[-1] == (1, 9, 32) and len(captured.graphs) == 3


@pytest.mark.parametrize("most", [1, 2, 8, 9, 17, 32])
def test_after_the_warm_up_nothing_is_captured_whatever_is_verified(most):
    engine = make_engine()
    graphs = engine.decode_step.__closure__[0].cell_contents.graphs
    engine.warm_up(1, most)
    captured = set(graphs)
    for tokens in range(1, most + 1):
        idx = torch.arange(tokens)[None]
        engine.decode(idx, idx, 64)
    assert set(graphs) == captured and max(width for _, width in captured) < most + BLOCK


def test_a_draft_and_its_model_are_warmed_up_for_all_that_they_may_run(monkeypatch):
    """A model verifies what is proposed and one more; a draft catches up with a text."""
    warmed = []
    monkeypatch.setattr(Engine, "warm_up", lambda engine, *most: warmed.append(most))
    models = [random_model(CONFIG) for _ in range(2)]
    for model in models:
        model.setup_caches(1, 64)
    lookup = ["--compile", "--prompt_lookup", "--speculate_k", "20"]
    for draft, flags in ((models[1], lookup), (None, lookup), (None, ["--compile"])):
        args = generate_file.make_parser().parse_args(flags)
        args = generate_file.with_defaults(args)
        args.batch_size = 1
        generate_file.start_engines(models[0], draft, args)
    assert warmed == [(1, 21), (1, FEW_ROWS), (1, 21), (1, 1)]


def test_a_prefill_is_warmed_up_too(monkeypatch):
    """By a pass of its own for many tokens, whose kernels are compiled in threads before."""
    engine, passes, compiled = make_engine(2), [], []
    model = engine.prefill_step = engine.uncaptured_step = engine.model
    forward = model.forward

    def watched(idx, input_pos, kv_len, last):
        passes.append((idx.shape[1], last is not None))
        return forward(idx, input_pos, kv_len, last)

    def compile_kernels(step, model, rows, tokens, prefill):
        compiled.append((step is model, rows, tokens, prefill))
        assert not passes

    kernels = types.SimpleNamespace(compile_kernels=compile_kernels)
    monkeypatch.setattr(engine_file, "kernels_for", lambda device: kernels)
    monkeypatch.setattr(model, "forward", watched)
    engine.warm_up(2)
    assert compiled == [(True, 2, 1, False), (True, 2, FEW_ROWS + 1, True)]
    assert (FEW_ROWS + 1, True) in passes and (1, False) in passes


def test_all_graphs_of_a_device_are_captured_on_one_stream(monkeypatch):
    """They share a pool, and its memory is only reused on the stream that it was taken on."""
    captures = []

    class Stand(types.SimpleNamespace):  # for a stream and a graph
        def wait_stream(self, _other):
            pass

        def pool(self):
            return "pool"

    def graph(_graph, pool, stream, capture_error_mode):
        captures.append((stream, pool))
        return contextlib.nullcontext()

    cuda = types.SimpleNamespace(CUDAGraph=Stand, graph=graph)
    cuda.Stream = lambda device: Stand(device=device)
    cuda.current_stream, cuda.stream = cuda.Stream, lambda side: contextlib.nullcontext()
    fake = types.SimpleNamespace(cuda=cuda, int64=torch.int64, full_like=torch.full_like)
    fake.zeros = lambda *shape, dtype, device: torch.zeros(*shape, dtype=dtype)
    monkeypatch.setattr(cudagraph, "torch", fake)
    cudagraph.side_stream.cache_clear()
    model = random_model(CONFIG)
    device, other = torch.device("cuda:0"), torch.device("cuda:1")
    for at in (device, other):
        captured = Captured(lambda idx, *_: (idx,), model)
        for width in (1, 8):
            captured.capture(1, width, at)
    streams = [stream for stream, _ in captures]
    assert streams[0] is streams[1] and streams[2] is streams[3] is not streams[0]
    assert [stream.device for stream in streams] == [device] * 2 + [other] * 2
    assert [pool for _, pool in captures] == [None, "pool"] * 2
    cudagraph.side_stream.cache_clear()


def test_speculation_verifies_by_the_captured_step():
    prompt = [[5, 6, 7, 8] * 4]
    options = dict(until=lambda row, token: False, seeds=[3])
    texts = []
    for ahead in (False, True):
        engine = make_engine(ahead=ahead)
        speculator = Speculator(engine, PromptLookup(300, torch.device("cpu")), 5)
        for sampling in (GREEDY, WARM):
            texts.append([t for (t,) in speculate(speculator, prompt, sampling, 30, **options)])
    assert texts[:2] == texts[2:]


# ---- Nothing that is captured, or launched ahead, waits for the device -------------------------

WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal),
    *(aten._unique2, aten.unique_dim, aten.bincount),
}
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}


class NoWaiting(TorchDispatchMode):
    """Refuses operations that, on CUDA, wait for the device or copy between it and the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        repeats = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if func.overloadpacket in WAITING or repeats:
            raise RuntimeError(f"{func} waits for the device")
        indexing = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
        if indexing and any(x.dtype == torch.bool for x in tensors[1:]):
            raise RuntimeError(f"{func} with a mask waits for the device")
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        # A number may come along: a CPU tensor without dimensions.
        if len({x.device.type for x in [x for x in tensors if x.dim()] + made}) > 1:
            raise RuntimeError(f"{func} copies between the devices")
        return result


class NoNumbers(TorchFunctionMode):
    """Refuses tensors made of Python's numbers: copies from pageable memory, which wait."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        listed = func is torch.Tensor.__getitem__ or func is torch.Tensor.__setitem__
        if func in FROM_HOST or listed and isinstance(args[1], list):
            raise RuntimeError(f"{func.__name__} copies from the host")
        return func(*args, **kwargs or {})


def on_meta(scheme: str, by_ours: bool, family: dict) -> Captured:
    """A captured step of a model without values, by this project's operators or by PyTorch's."""
    model = random_model(CONFIG | family).bfloat16()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, Linear) and scheme != "bf16":
            tensors = quantize(linear.weight, scheme, 16)
            new = linear_for(linear, tensors)
            new.load_state_dict(tensors, assign=True)
            model.set_submodule(name, new)
    model = model.bfloat16().to("meta")
    with torch.device("meta"):
        model.setup_caches(2, 64)
    return by_operators(model) if by_ours else Captured(model, model)


def by_operators(model: Transformer) -> Captured:
    """As on a GPU: weights as they are stored, and this project's operators."""
    for module in model.modules():
        if isinstance(module, Linear):
            grids = ("scales", "scales_a8", "scales_and_zeros")
            grid = next((getattr(module, g) for g in grids if hasattr(module, g)), None)
            module.tiles, module.grid = module.weight.data, grid
    for layer in model.layers:
        layer.attention.kv_cache.has_kernels = True
    return Captured(model, model)


class Calls(TorchDispatchMode):
    """Counts the calls of this project's operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **kwargs or {})


EXPERTS = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 32}
EXPERTS |= {"moe_intermediate_size": 64, "norm_topk_prob": True}


@pytest.mark.parametrize("by_ours", [False, True])
@pytest.mark.parametrize("scheme", ["bf16", "int8", "int8-activation", "int4"])
def test_no_step_waits_for_the_device(scheme, by_ours):
    families = {}, {"model_type": "qwen3", "head_dim": 32}, EXPERTS
    for family, tokens in itertools.product(families, (1, 4)):
        captured = on_meta(scheme, by_ours, family)
        idx = torch.zeros(2, tokens, dtype=torch.int64, device="meta")
        with NoWaiting(), NoNumbers(), Calls() as calls:
            logits, hidden = captured(idx, idx, 64)
        assert logits.shape == (2, tokens, 300) and hidden.shape == (2, tokens, 48)
        experts = 2 if by_ours and family is EXPERTS else 0  # one call a layer
        assert calls.counts["tokenbus::experts"] == experts


@pytest.mark.parametrize("by_ours", [False, True])
def test_no_step_of_any_family_waits_for_the_device(by_ours):
    args = from_config(CONFIG)
    kinds = [dataclasses.replace(kind, query_scale=(0.1, 8), window=9) for kind in args.kinds]
    scales = dict(embed_scale=3.0, residual_scale=0.5, logit_scale=0.25, logit_cap=30.0)
    options = dict(norms="both", qk_norm="flat", act="gelu_tanh", kinds=tuple(kinds)) | scales
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(args, **options)).bfloat16()
        model.setup_caches(2, 64)
    captured = by_operators(model) if by_ours else Captured(model, model)
    idx = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    with NoWaiting(), NoNumbers():
        logits, _ = captured(idx, idx, 64)
    assert logits.shape == (2, 3, 300)


@pytest.mark.parametrize("sampling", [GREEDY, WARM, Sampling(0.8, 0, 0.9, 0.1), Sampling(1.0, 0)])
def test_no_draw_waits_for_the_device(sampling):
    logits = torch.zeros(2, 300, device="meta")
    for samplings in ([sampling] * 2, [sampling, Sampling(0.5)]):
        with NoWaiting(), NoNumbers():
            ids = sample(logits, samplings, [None, None])
            send_tokens(ids, logits, 3)
        assert ids.shape == (2,)


PLANTED = {
    "item": lambda x, pos: x * pos.max().item(),
    "tolist": lambda x, pos: x[:, : len(pos.tolist())],
    "if": lambda x, pos: x if (pos > 3).all() else None,
    "cpu": lambda x, pos: x[pos.cpu().to("meta")],
    "list": lambda x, pos: x + torch.tensor([1.0], device="meta"),
    "list as index": lambda x, pos: x[[1, 0]],
    "nonzero": lambda x, pos: x[(pos > 3).nonzero()[:, 0]],
    "mask": lambda x, pos: x[pos[:, 0] > 3],
    "CPU table": lambda x, pos: x + torch.zeros(300).to("meta"),
    "repeats": lambda x, pos: x.repeat_interleave(pos[:, 0], 0),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_step_that_waits_is_found(name):
    idx = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    logits = torch.zeros(2, 1, 300, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)), NoWaiting(), NoNumbers():
        PLANTED[name](logits, idx)


# ---- What Inductor makes of a block for a card -------------------------------------------------


@pytest.mark.slow
def test_a_compiled_block_is_few_launches_and_clones_no_cache():
    """Four of Inductor's kernels, five products, the rotation and attention's two."""
    pytest.importorskip("triton", reason="compiles for a card")
    names = ["bf16", "int8", "int4"]
    script = ROOT / "tests" / "pretended_h100.py"
    options = dict(capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    done = subprocess.run([sys.executable, script, *names], **options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in names:
        linear = f"linear_{name}"
        order = [linear, "rotate_write", "attend", *[linear] * 4]
        assert found[name]["operators"] == order, found[name]
        assert found[name]["triton"] <= 4 and not found[name]["library"], found[name]
        sizes = [eval(size.replace(",", "*")) for size in found[name]["allocated"]]
        assert sizes and max(sizes) <= 14336, found[name]  # activations, no cache


def test_an_engine_can_let_go_of_its_captured_steps_and_still_decodes():
    """NCCL waits at its end for every CUDA graph that it is in."""
    engine = make_engine()
    held, expected = engine.decode_step.__closure__[0].cell_contents, run(engine, [[1, 2, 3]])
    assert isinstance(held, Captured) and held.graphs
    held = weakref.ref(held)
    engine.release()
    gc.collect()
    assert held() is None and run(engine, [[1, 2, 3]]) == expected
