"""quantize.py writes what was asked for, and what it writes runs like any other checkpoint."""

import json
import sys

import pytest
import torch

import process
import quantize as cli_quantize
from cli import UserError
from conftest import CONFIG, random_model, write_checkpoint
from engine import load_model
from linear import Int4Linear, Int8ActivationLinear, Int8Linear, Linear
from tokenizer import Tokenizer

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
QWEN = CONFIG | SHAPE | {"model_type": "qwen2", "tie_word_embeddings": True}
ROLES = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
NAMES = [f"layers.{i}.{role}" for i in range(2) for role in ROLES] + ["output"]
CLASSES = {
    "bf16": Linear,
    "int8": Int8Linear,
    "int8-activation": Int8ActivationLinear,
    "int4": Int4Linear,
}
HYBRID = {name: "int8" if name.endswith(("wo", "w1", "output")) else "int4" for name in NAMES}


@pytest.fixture
def path(tmp_path):
    return write_checkpoint(tmp_path / "model", QWEN, torch.bfloat16)


@pytest.fixture
def run(monkeypatch, capsys, path):
    def run(*flags, checkpoint=path):
        argv = ["quantize.py", "--checkpoint_path", checkpoint, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        code = 0
        try:
            process.run(cli_quantize.main, cli_quantize.make_parser())
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 30)
    return file


def outputs_moved(path, made, tmp_path) -> float:
    """The squared error of the first matrices' outputs on the text of `text_file`."""
    ids = Tokenizer.from_folder(path.parent).encode(text_file(tmp_path).read_text())[:500]
    old, new = (load_model(file, "cpu", torch.float32) for file in (path, made))
    x = old.layers[0].attention_norm(old.embed(torch.tensor(ids)))
    weights = [model.layers[0].attention.wqkv.dequantize() for model in (old, new)]
    return (x @ (weights[1] - weights[0]).T).square().sum().item()


def schemes_of(model) -> dict[str, str]:
    scheme_of = {scheme_class: name for name, scheme_class in CLASSES.items()}
    modules = model.named_modules()
    return {name: scheme_of[type(m)] for name, m in modules if isinstance(m, Linear)}


@pytest.mark.parametrize(
    "flags, name, schemes",
    [
        (["--mode", "int8"], "model_int8.pth", dict.fromkeys(NAMES, "int8")),
        (
            ["--mode", "int8-activation"],
            "model_int8-activation.pth",
            dict.fromkeys(NAMES, "int8-activation"),
        ),
        (["--mode", "int4"], "model_int4.g32.pth", dict.fromkeys(NAMES, "int4")),
        (
            ["--mode", "int4", "--groupsize", "64", "--label", ".mine_"],
            "model.mine_int4.g64.pth",
            dict.fromkeys(NAMES, "int4"),
        ),
        (["--mode", "hybrid"], "model_hybrid_int8_int4.g32.pth", HYBRID),
        (
            ["--mode", "hybrid", "--critical_layers", "layers.*.w2", "layers.1.attention.wo"],
            "model_custom_hybrid_int8_int4.g32.pth",
            {n: "int8" if "w2" in n or n == "layers.1.attention.wo" else "int4" for n in NAMES},
        ),
        (
            ["--mode", "int4-gptq", "--calibration_seq_length", "64"],
            "model_int4-gptq.g32.pth",
            dict.fromkeys(NAMES, "int4"),
        ),
        (
            ["--mode", "hybrid", "--gptq", "--calibration_seq_length", "64"],
            "model_hybrid_int8_int4.g32.pth",
            HYBRID,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mode_makes_its_file(run, path, tmp_path, flags, name, schemes):
    gptq = any("gptq" in flag for flag in flags)
    code, out, err = run(*flags, *(["--calibration_file", text_file(tmp_path)] if gptq else []))
    assert code == 0, err
    made = path.with_name(name)
    assert str(made) in out and "bits a weight" in out and "mean squared error" in out
    assert made.stat().st_size < path.stat().st_size

    elsewhere = path.with_name("renamed.pth")  # the name says nothing to the loader
    made.rename(elsewhere)
    model = load_model(elsewhere, "cpu")
    assert schemes_of(model) == schemes
    source = torch.load(path)
    assert model.tok_embeddings.weight.equal(source["tok_embeddings.weight"])
    for layer, block in enumerate(model.layers):
        assert block.attention.wqkv.bias.equal(source[f"layers.{layer}.attention.wqkv.bias"])
    for weight_name in NAMES:
        original = source.get(f"{weight_name}.weight", source["tok_embeddings.weight"]).float()
        change = model.get_submodule(weight_name).float().dequantize() - original
        bound = {"int8": 0.01, "int8-activation": 0.01, "int4": 0.15}[schemes[weight_name]]
        assert change.norm() / original.norm() < bound, weight_name


def test_gptq_calibrates_on_a_task_of_lm_eval(run, path, tmp_path, monkeypatch, few_tasks):
    monkeypatch.chdir(tmp_path)  # data_files of a task are relative to the working directory
    pages = [{"page": f"{i} is a number and so is {i + 1}, they say. " * 5} for i in range(8)]
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, pages)))
    (tmp_path / "pages.yaml").write_text(
        "task: some_pages\ndataset_path: json\ntest_split: test\n"
        "dataset_kwargs:\n  data_files:\n    test: pages.jsonl\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\n"
        "metric_list:\n  - metric: word_perplexity\n"
    )
    flags = ["--calibration_tasks", "some_pages", "--include_path", tmp_path]
    code, _, err = run("--mode", "int4-gptq", *flags, "--calibration_seq_length", "50")
    assert code == 0, err
    model = load_model(path.with_name("model_int4-gptq.g32.pth"), "cpu")
    assert set(schemes_of(model).values()) == {"int4"}


@pytest.mark.parametrize("mode", ["int4", "hybrid"])
def test_with_a_text_int4_keeps_the_outputs_better(run, path, tmp_path, mode):
    flags = ["--mode", mode]
    text = ["--calibration_file", text_file(tmp_path), "--calibration_seq_length", "64"]
    errors = []
    by_gptq = [*text, *(["--gptq"] if mode == "hybrid" else ["--mode", "int4-gptq"])]
    for extra in ([], text, by_gptq):
        code, out, err = run(*flags, *extra, "--label", f"{len(errors)}_")
        assert code == 0, err
        assert ("error of outputs" in out) == bool(extra)
        (made,) = path.parent.glob(f"model{len(errors)}_*.pth")
        errors.append(outputs_moved(path, made, tmp_path))
    assert errors[1] < 0.95 * errors[0] and errors[2] < 0.8 * errors[1], errors


@pytest.mark.parametrize("mode", ["int8", "int8-activation", "int4", "hybrid"])
def test_logits_are_those_of_the_dequantized_weights(run, path, mode):
    run("--mode", mode)
    (made,) = path.parent.glob("model_*.pth")
    model = load_model(made, "cpu", torch.float32)
    reference = random_model(QWEN, torch.bfloat16).float()
    for name in NAMES:
        weight = model.get_submodule(name).dequantize()
        reference.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
    reference.tok_embeddings.weight = model.tok_embeddings.weight
    tokens, positions = torch.randint(300, (1, 100)), torch.arange(100).unsqueeze(0)
    logits = []
    for either in (model, reference):
        either.setup_caches(1, 128)
        logits.append(either(tokens, positions, 128).logits)
        one = either(tokens[:, :1], positions[:, :1], 64).logits  # few rows: another kernel
        logits[-1] = torch.cat((logits[-1], one), 1)
    difference = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert difference < (0.1 if mode == "int8-activation" else 1e-5)


def test_too_little_text_is_said(run, tmp_path):
    flags = ["--calibration_file", text_file(tmp_path), "--calibration_seq_length", "64"]
    code, _, err = run("--mode", "int4", *flags)
    assert code == 0 and "29 sequences, 1856 tokens: there is no text for the 128" in err
    code, _, err = run("--mode", "int4", *flags, "--calibration_limit", "10")
    assert code == 0 and "there is no text" not in err


@pytest.mark.parametrize("mode", ["int8", "int4", "hybrid"])
def test_the_same_input_gives_the_same_bytes(run, path, mode):
    files = []
    for _ in range(2):
        run("--mode", mode)
        (made,) = path.parent.glob("model_*.pth")
        files.append(made.read_bytes())
        made.unlink()
    assert files[0] == files[1]


def test_a_critical_layer_may_have_smaller_groups(run, path):
    layers = ["output", "layers.*.feed_forward.w?=int4.g32", "layers.1.feed_forward.w3"]
    code, out, err = run("--mode", "hybrid", "--groupsize", "64", "--critical_layers", *layers)
    assert code == 0, err
    model = load_model(path.with_name("model_custom_hybrid_int8_int4.g64.pth"), "cpu")
    groups = {name: getattr(model.get_submodule(name), "groupsize", 0) for name in NAMES}
    assert groups == {
        name: 0 if name in (layers[0], layers[2]) else 32 if "feed_forward" in name else 64
        for name in NAMES
    }
    assert "int4.g32: 5 matrices" in out and "int4: 4 matrices" in out


def test_critical_layers_from_a_file(run, path, tmp_path):
    (tmp_path / "layers.txt").write_text("layers.0.feed_forward.w3.weight\noutput\n")
    code, _, err = run("--mode", "hybrid", "--critical_layers", f"@{tmp_path / 'layers.txt'}")
    assert code == 0, err
    model = load_model(path.with_name("model_custom_hybrid_int8_int4.g32.pth"), "cpu")
    int8 = [name for name, scheme in schemes_of(model).items() if scheme == "int8"]
    assert int8 == ["layers.0.feed_forward.w3", "output"]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--mode", "int4", "--groupsize", "128"], "does not divide the 64 columns"),
        (["--mode", "int4", "--groupsize", "128"], "--groupsize 32 or 64 fits"),
        (["--mode", "int4", "--groupsize", "48"], "48"),
        (["--mode", "int3"], "int3"),
        (
            ["--mode", "hybrid", "--critical_layers", "layers.0.attention.w0"],
            "near ones: layers.0.attention.wo",
        ),
        (["--mode", "hybrid", "--critical_layers", "@nowhere.txt"], "nowhere.txt"),
        (["--mode", "hybrid", "--critical_layers", "output=int5"], "int8 or int4.g32"),
        (["--mode", "hybrid", "--critical_layers", "output=int4.g128"], "its 64 columns"),
        (["--mode", "int4", "--critical_layers", "output"], "--mode hybrid"),
        (["--mode", "int4", "--gptq", "--calibration_file", "x"], "--mode int4-gptq"),
        (["--mode", "int4-gptq"], "--calibration_file or --calibration_tasks"),
        (["--mode", "int4-gptq", "--calibration_file", "nowhere.txt"], "nowhere.txt"),
        (["--mode", "int8", "--calibration_file", "x"], "--calibration_file goes with int4"),
        (["--mode", "int4-gptq", "--calibration_tasks", "no_such_task"], "no_such_task"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(run, path, few_tasks, flags, named):
    code, out, err = run(*flags)
    assert code == 2 and named in err and err.count("\n") == 1 and out == ""
    assert [file.name for file in path.parent.glob("*.pth")] == ["model.pth"]


@pytest.mark.parametrize("mode", ["int8", "int4-gptq"])
@pytest.mark.parametrize("name", ["layers.1.feed_forward.w2.weight", "layers.0.ffn_norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(run, path, tmp_path, name, value, mode):
    state = torch.load(path)
    state[name].view(-1)[7] = value
    torch.save(state, path)
    gptq = ["--calibration_seq_length", "64", "--calibration_file", text_file(tmp_path)]
    code, out, err = run("--mode", mode, *(gptq if "gptq" in mode else []))
    assert code == 2 and f"{name} has values that are NaN or infinite" in err and out == ""
    assert [file.name for file in path.parent.glob("*.pth")] == ["model.pth"]


@pytest.mark.parametrize("flags", [["int4"], ["int4-gptq"], ["hybrid"]])
def test_inputs_that_overflow_on_the_calibration_text_are_named(run, path, tmp_path, flags):
    """Finite weights, of another precision than the one they were trained in."""
    state = torch.load(path)
    state["layers.1.ffn_norm.weight"].fill_(3e38)
    torch.save(state, path)
    flags = ["--mode", *flags, "--calibration_seq_length", "64"]
    code, out, err = run(*flags, "--calibration_file", text_file(tmp_path))
    assert code == 2 and out == ""
    assert "inputs of layers.1.feed_forward.w1 are NaN or infinite" in err
    assert [file.name for file in path.parent.glob("*.pth")] == ["model.pth"]


def test_a_quantized_checkpoint_is_not_quantized_again(run, path):
    run("--mode", "int8")
    code, _, err = run("--mode", "int4", checkpoint=path.with_name("model_int8.pth"))
    assert code == 2 and "already" in err


def test_an_interrupted_write_leaves_the_old_file(run, path, monkeypatch):
    old = path.with_name("model_int8.pth")
    old.write_text("old")

    def broken(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", broken)
    assert run("--mode", "int8")[0] == 130
    assert old.read_text() == "old"
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    "name, change, named",
    [
        ("output.scales", lambda t: t[:-1], r"output.scales is float \[299\], not float \[300\]"),
        ("output.weight", lambda t: t.float(), "output.weight is float .* not int8"),
        ("layers.0.attention.wo.weight", lambda t: t[:, :8], "layers.0.attention.wo.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(run, path, name, change, named):
    run("--mode", "int8")
    made = path.with_name("model_int8.pth")
    state = torch.load(made)
    torch.save(state | {name: change(state[name])}, made)
    with pytest.raises(UserError, match=named):
        load_model(made, "cpu")


def test_int4_groups_that_do_not_fit_are_named(run, path):
    run("--mode", "int4")
    made = path.with_name("model_int4.g32.pth")
    state = torch.load(made)
    grid = state["output.scales_and_zeros"]
    torch.save(state | {"output.scales_and_zeros": torch.cat((grid, grid[:1]))}, made)
    with pytest.raises(UserError, match="output.scales_and_zeros"):
        load_model(made, "cpu")
