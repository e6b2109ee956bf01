"""A mixture of experts reads the chosen experts alone, in every scheme and whoever runs it."""

import dataclasses
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gptq
import model as model_module
import process
import quantize as cli_quantize
from cli import UserError
from conftest import CONFIG, random_model, write_checkpoint, write_tokenizer
from engine import Engine, Sampling, generate, load_model
from families import from_config
from linear import Linear, linear_for
from mixture import MixtureOfExperts
from model import Mixture, Transformer
from profiler_scripts.layer_accuracy_analysis import make_variants
from profiler_scripts.layer_identification import list_linears
from quantize import quantize
from scripts.convert_hf_checkpoint import convert
from speculate import row_cost, step_cost

SCHEMES = ("bf16", "int8", "int8-activation", "int4")
OPTIONS = Mixture(experts=8, chosen=3, width=64, shared=0, renormalize=True)
DIM, ROWS = 64, 5
CONFIG = CONFIG | {"hidden_size": 64, "num_attention_heads": 4, "model_type": "qwen3_moe"}
CONFIG |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIG |= {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": True}


def store(module: torch.nn.Module, scheme: str) -> None:
    """Quantize all Linears of a module."""
    for name, linear in list(module.named_modules()):
        if isinstance(linear, Linear) and scheme != "bf16":
            tensors = quantize(linear.weight, scheme, 32)
            stored = linear_for(linear, tensors)
            stored.load_state_dict(tensors, assign=True)
            module.set_submodule(name, stored.requires_grad_(False).float())


def random_mixture(scheme: str = "bf16", options: Mixture = OPTIONS) -> MixtureOfExperts:
    mixture = MixtureOfExperts(DIM, options, torch.nn.functional.silu, None)
    generator = torch.Generator().manual_seed(0)
    for parameter in mixture.requires_grad_(False).parameters():
        parameter.normal_(0, 0.2, generator=generator)
    store(mixture, scheme)
    return mixture


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, ROWS, DIM, generator=torch.Generator().manual_seed(1))


def reference(mixture: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Every token through every expert, with a share of 0 for those not chosen."""
    scores = (x[0] @ mixture.router.weight.T).softmax(-1)
    shares = scores * (scores >= scores.topk(OPTIONS.chosen).values[:, -1:])
    shares = shares / shares.sum(-1, keepdim=True)
    w1, w3, w2 = (linear.dequantize() for linear in (mixture.w1, mixture.w3, mixture.w2))
    h = torch.nn.functional.silu(x @ w1.mT) * (x @ w3.mT)  # [E, N, width]
    return ((h @ w2.mT) * shares.T.unsqueeze(-1)).sum(0, keepdim=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_go_through_their_experts_in_a_prefill_while_decoding_and_by_number(
    scheme, packed, x
):
    mixture = random_mixture(scheme)
    if packed:
        for linear in (mixture.w1, mixture.w3, mixture.w2):
            linear.pack_weights()
    expected, few = reference(mixture, x), 0.05 if scheme == "int8-activation" else 1e-4
    near = dict(rtol=few, atol=few * expected.abs().max().item())
    assert torch.allclose(mixture(x, True), expected, **near)
    assert torch.allclose(mixture(x, False), expected, **near)
    chosen, shares = mixture.router(x[0], False)
    numbered = mixture.by_row(x[0], chosen, shares)
    assert torch.allclose(numbered, mixture(x, False)[0], rtol=1e-4, atol=1e-4)


def test_no_other_expert_is_read(x):
    mixture = random_mixture()
    expected = mixture(x[:, :1], False)
    chosen, shares = mixture.router(x[0, :1], False)
    others = [i for i in range(OPTIONS.experts) if i not in chosen]
    for linear in (mixture.w1, mixture.w3, mixture.w2):
        linear.weight[others] = float("nan")
    assert mixture(x[:, :1], False).equal(expected) and mixture(x[:, :1], True).isfinite().all()
    assert mixture.by_row(x[0, :1], chosen, shares).isfinite().all()


def test_a_token_alone_gives_what_it_gives_in_a_batch(x):
    mixture = random_mixture()
    together = mixture(x, False)
    for row in range(ROWS):
        alone = mixture(x[:, row : row + 1], False)
        assert torch.allclose(alone[0, 0], together[0, row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoding_compiles_to_one_graph(scheme):
    mixture, x = random_mixture(scheme), torch.linspace(-1, 1, ROWS * DIM).view(ROWS, 1, DIM)
    torch.compiler.reset()
    compiled = torch.compile(mixture, fullgraph=True, dynamic=True, backend="eager")
    compiled(x, False)
    with torch.compiler.set_stance("fail_on_recompile"):
        few = x[:3]
        assert torch.allclose(compiled(few, False), mixture(few, False), atol=1e-4)


def test_a_prefill_is_not_compiled():
    model = random_model(CONFIG)
    model.setup_caches(1, 64)
    with pytest.raises(UserError, match="--compile_prefill takes no mixture of experts"):
        Engine(model, compile_prefill=True)


def test_a_step_reads_the_chosen_experts_alone():
    model = random_model(CONFIG)
    model.setup_caches(1, 64)
    every = dataclasses.replace(model.args.mixture, chosen=6)
    whole = Transformer(dataclasses.replace(model.args, mixture=every))
    whole.setup_caches(1, 64)
    expert = 3 * 64 * 64 * 4  # bytes
    assert whole.bytes_per_step(0) - model.bytes_per_step(0) == 2 * 4 * expert


@pytest.mark.parametrize("scheme", ["int8", "int8-activation", "int4"])
def test_experts_that_no_kernel_multiplies_cost_speculation_what_floats_do(scheme):
    exact, stored = random_model(CONFIG), random_model(CONFIG)
    for module in stored.layers:
        store(module, scheme)
    for model in (exact, stored):
        model.setup_caches(1, 64)
    assert stored.bytes_per_step(0) < 0.8 * exact.bytes_per_step(0)
    assert step_cost(stored) == pytest.approx(step_cost(exact), rel=1e-6)
    assert row_cost(stored) == row_cost(exact)
    assert 0.9 < row_cost(exact) / (step_cost(exact) / 32) < 1  # a bit of 32; norms have the rest


def test_without_its_file_a_mixture_says_so_and_a_dense_model_runs(monkeypatch):
    absent = {"mixture"}
    found = model_module.optional
    monkeypatch.setattr(
        model_module, "optional", lambda name, *rest: None if name in absent else found(name, *rest)
    )
    with pytest.raises(UserError, match="needs mixture.py"):
        Transformer(from_config(CONFIG))
    Transformer(from_config(CONFIG | {"model_type": "qwen3", "num_experts": None}))


# ------------------------------------------------------------------------------------------------
# A quantized checkpoint


def greedy(model: Transformer) -> list[int]:
    model.setup_caches(1, 64)
    options = dict(until=lambda _row, _id: False, seeds=[0])
    steps = generate(Engine(model), [[5, 6, 7, 8]], Sampling(temperature=0), 12, **options)
    return [token.id for (token,) in steps]


@pytest.mark.parametrize("mode", ["int8", "int8-activation", "int4", "hybrid"])
def test_a_quantized_checkpoint_runs_and_is_that_of_its_rounded_weights(
    mode, tmp_path, monkeypatch, capsys
):
    path = write_checkpoint(tmp_path, CONFIG, torch.bfloat16)
    flags = ["--checkpoint_path", path, "--mode", mode, "--device", "cpu"]
    if mode == "hybrid":
        flags += ["--critical_layers", "layers.0.feed_forward.w?", "*.attention.wo"]
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, flags)])
    process.run(cli_quantize.main, cli_quantize.make_parser())
    (output,) = tmp_path.glob("model_*.pth")
    model = load_model(output, "cpu", torch.float32)
    exact = load_model(path, "cpu", torch.float32)
    kinds = set()
    for name, linear in model.named_modules():
        if isinstance(linear, Linear):
            kinds.add(type(linear).__name__)
            exact.get_submodule(name).weight = torch.nn.Parameter(linear.dequantize(), False)
    assert len(kinds) == (2 if mode == "hybrid" else 1) and "Linear" not in kinds
    assert model.layers[0].feed_forward.w1.weight.shape[0] == 6
    if mode != "int8-activation":  # which rounds its inputs, too
        assert greedy(model) == greedy(exact)
    assert len(greedy(model)) == 12


@pytest.mark.parametrize("length", [400, 30])
def test_gptq_goes_by_the_tokens_of_each_expert(length):
    """And leaves an expert to plain rounding that few tokens reach."""
    model, seen, entered = random_model(CONFIG), {}, []
    ids = torch.randint(300, (length,), generator=torch.Generator().manual_seed(2))

    def keep(name: str, weight: torch.Tensor, hessian) -> torch.Tensor:
        seen[name] = hessian
        return weight

    gptq.quantize_blocks(model, [ids], keep)
    ffn = model.layers[0].feed_forward
    ffn.register_forward_pre_hook(lambda _, args: entered.append(args[0][0]))
    model.setup_caches(1, 512)
    model(ids[None], torch.arange(length)[None], 512)
    x = entered[0]
    chosen = (x @ ffn.router.weight.T).topk(2).indices
    counts = [int((chosen == i).sum()) for i in range(6)]
    assert max(counts) >= 64 if length == 400 else min(counts) < 64
    for i, count in enumerate(counts):
        found = [seen[f"layers.0.feed_forward.{name}"][i] for name in ("w1", "w3", "w2")]
        if count < 64:
            assert found == [None] * 3
            continue
        own = x[(chosen == i).any(-1)]
        h = torch.nn.functional.silu(own @ ffn.w1.weight[i].T) * (own @ ffn.w3.weight[i].T)
        for hessian, inputs in zip(found, (own, own, h), strict=True):
            expected = 2 * inputs.T @ inputs / length
            torch.testing.assert_close(hessian, expected, rtol=1e-4, atol=1e-4)


def test_gptq_says_how_many_experts_had_few_tokens(tmp_path, capsys):
    path = write_checkpoint(tmp_path, CONFIG, torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 9)
    flags = ["--checkpoint_path", path, "--mode", "int4-gptq", "--calibration_file", text]
    flags += ["--calibration_seq_length", 8, "--calibration_limit", 1, "--device", "cpu"]
    cli_quantize.main(cli_quantize.make_parser().parse_args([*map(str, flags)]))
    assert "[36 matrices of experts were rounded without data: fewer" in capsys.readouterr().err
    model = load_model(tmp_path / "model_int4-gptq.g32.pth", "cpu", torch.float32)
    assert len(greedy(model)) == 12


def test_the_layer_analysis_takes_the_experts_of_a_matrix_as_one(capsys):
    model = random_model(CONFIG).bfloat16()
    variants = make_variants(model, 32)
    name = "layers.0.feed_forward.w1"
    assert variants.nbytes["bf16"][name] == 6 * 64 * 64 * 2
    rows = {row["layer"]: row for row in list_linears(model)}
    assert rows[name]["shape"] == "6 x 64 x 64" and rows[name]["parameters"] == 6 * 64 * 64
    model.setup_caches(1, 64)
    ids, places = torch.arange(20)[None], torch.arange(20)[None]
    logits = {}
    for scheme in ("int4", "int8"):
        variants.use(dict.fromkeys(variants.modules["bf16"], "int4") | {name: scheme})
        logits[scheme] = model(ids, places, 64).logits
        assert logits[scheme].isfinite().all()
    assert not torch.equal(*logits.values())


def test_experts_published_as_one_tensor_are_those_published_one_by_one(tmp_path):
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**CONFIG))
    hf.save_pretrained(tmp_path)
    expected = torch.load(convert(tmp_path, torch.float32))
    (tmp_path / "model.pth").unlink()
    stacked = {n: t.contiguous() for n, t in hf.state_dict().items()}
    assert stacked["model.layers.0.mlp.experts.gate_up_proj"].shape == (6, 128, 64)
    save_file(stacked, tmp_path / "model.safetensors")
    found = torch.load(convert(tmp_path, torch.float32))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("mode", ["int8", "int8-activation", "int4", "hybrid"])
def test_converting_with_a_mode_gives_the_file_of_quantize(mode, tmp_path):
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**CONFIG))
    hf.bfloat16().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    directly = torch.load(convert(tmp_path, torch.bfloat16, mode))
    path = str(convert(tmp_path, torch.bfloat16))
    flags = ["--checkpoint_path", path, "--mode", mode, "--device", "cpu", "--label", "_after_"]
    cli_quantize.main(cli_quantize.make_parser().parse_args(flags))
    (output,) = tmp_path.glob("model_after_*.pth")
    afterwards = torch.load(output)
    assert directly.keys() == afterwards.keys()
    assert all(directly[name].equal(afterwards[name]) for name in directly)


def test_the_bias_for_choosing_stays_float32(tmp_path):
    """Published biases are large beside the scores: in bf16 other experts would be chosen."""
    config = CONFIG | {"model_type": "glm4_moe", "num_experts": None, "n_routed_experts": 6}
    config |= {"first_k_dense_replace": 1, "use_qk_norm": True, "num_nextn_predict_layers": 1}
    hf = transformers.AutoModelForCausalLM.from_config(
        transformers.Glm4MoeConfig(**config), dtype=torch.bfloat16
    )
    biases = torch.linspace(7, 7.01, 6)
    for name, buffer in hf.named_buffers():
        if "correction_bias" in name:
            buffer.data = biases.clone()
    hf.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    draft = {"model.layers.3.eh_proj.weight": torch.ones(2, 2)}  # a layer after the model's own
    save_file(tensors | draft, tmp_path / "model.safetensors")
    for mode in (None, "int4"):
        path = convert(tmp_path, torch.bfloat16, mode)
        router = load_model(path, "cpu", torch.bfloat16).layers[1].feed_forward.router
        assert router.bias.dtype == torch.float32 and router.bias.equal(biases)
        assert router.weight.dtype == torch.bfloat16
