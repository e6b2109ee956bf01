"""eval.py --against: what makes two checkpoints differ is found, and nothing else is."""

import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import compare
import eval as evaluation
from cli import UserError
from conftest import CONFIG, write_checkpoint, write_tokenizer
from engine import load_model
from linear import Linear
from quantize import quantize
from scripts.convert_hf_checkpoint import convert
from test_model import hf_model
from tokenizer import Tokenizer

TEXT = "It rained for days. Nobody went out, and the river rose above its banks. " * 4
NOISE = 1e-10  # nats: what float32 in another order costs a tiny model, at most


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A published folder of a random Qwen2, with the model.pth made of it."""
    folder = tmp_path_factory.mktemp("published")
    hf_model("Qwen2", dict(vocab_size=300, rms_norm_eps=1e-6)).save_pretrained(folder)
    write_tokenizer(folder)
    convert(folder, torch.float32)
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    """Compare a checkpoint and a reference on TEXT; the figures, what was printed, and the code."""

    def run(path, reference, *flags):
        text, output, code = tmp_path / "text.txt", tmp_path / "figures.json", 0
        text.write_text(TEXT)
        flags = ["--checkpoint_path", path, "--against", reference, "--perplexity", text, *flags]
        flags += ["--device", "cpu", "--output_path", output]
        flags += [] if "--precision" in flags else ["--precision", "float32"]
        try:
            evaluation.main(evaluation.make_parser().parse_args([*map(str, flags)]))
        except SystemExit as exit:
            code = exit.code
        return json.loads(output.read_text()), capsys.readouterr().out, code

    return run


def edited(folder, target, change=lambda state: None, **config):
    """A copy of a checkpoint folder with another state dict and config.json; its model.pth."""
    shutil.copytree(folder, target)
    state = torch.load(target / "model.pth")
    change(state)
    torch.save(state, target / "model.pth")
    settings = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(settings))
    return target / "model.pth"


# ---- Errors of a conversion --------------------------------------------------------------------


def test_a_right_conversion_is_within_rounding_of_the_published_model(hf, run):
    figures, output, code = run(hf / "model.pth", hf, "--max_kl", NOISE)
    assert code == 0 and figures["kl"] <= NOISE, figures
    assert figures["greedy_agreement"] == 1 and figures["texts_part_at"] is None
    assert figures["perplexity"] == pytest.approx(figures["reference_perplexity"], rel=1e-5)
    assert 0 < figures["largest_logit_difference"] < 1e-3
    assert output.splitlines()[-1].startswith("verdict: within the bound")


def halves(state):
    """Put q and k of a layer back into the rotary order of Hugging Face."""
    rows = state["layers.1.attention.wqkv.weight"][:96]  # 4 + 2 heads of 16
    rows.copy_(rows.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2).clone())


@pytest.mark.parametrize(
    "change, config",
    [
        (halves, {}),
        (lambda state: state["layers.0.attention.wqkv.bias"].zero_(), {}),
        (lambda state: None, {"rms_norm_eps": 1e-5}),
    ],
    ids=["rotary order", "dropped bias", "norm eps"],
)
def test_a_planted_error_is_found(change, config, hf, run, tmp_path):
    path = edited(hf, tmp_path / "copy", change, **config)
    figures, output, code = run(path, hf, "--max_kl", NOISE)
    assert code == 1 and figures["kl"] > 10 * NOISE, figures
    assert output.splitlines()[-1].startswith("verdict: over the bound")


def test_a_folder_that_lacks_a_tensor_is_an_error(hf, run, tmp_path):
    shutil.copytree(hf, tmp_path / "copy")
    state = load_file(hf / "model.safetensors")
    del state["model.layers.1.self_attn.k_proj.bias"]
    save_file(state, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks the tensor model.layers.1.self_attn.k_proj.bias"):
        run(hf / "model.pth", tmp_path / "copy")


def test_a_folder_that_transformers_cannot_run_is_an_error(hf, run, tmp_path):
    """Its exceptions share no class, and some come only with the first text."""
    settings = json.loads((hf / "config.json").read_text())
    for i, (key, value, words) in enumerate(
        (
            ("hidden_act", [1], "Error: "),
            ("num_attention_heads", 0, "ZeroDivisionError: "),
            ("num_hidden_layers", -1, "Error: "),
            ("sliding_window", "x", "sliding_window"),
        )
    ):
        folder = tmp_path / str(i)
        shutil.copytree(hf, folder)
        (folder / "config.json").write_text(json.dumps(settings | {key: value}))
        with pytest.raises(UserError, match=f"transformers cannot run .*{words}") as error:
            run(hf / "model.pth", folder)
        assert "\n" not in str(error.value)


# ---- The cost of a scheme ----------------------------------------------------------------------


def quantized(folder, scheme):
    """The model.pth of a folder with every Linear stored in a scheme."""
    model, state = load_model(folder / "model.pth", "cpu", torch.float32), {}
    for name, tensor in model.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Linear) and name.endswith(".weight"):
            tensors = quantize(tensor, scheme, 32)
            state |= {f"{name.removesuffix('weight')}{key}": t for key, t in tensors.items()}
        else:
            state[name] = tensor
    path = folder / f"model_{scheme}.pth"
    torch.save(state, path)
    return path


def logits_of(path, ids):
    model = load_model(path, "cpu", torch.float32)
    model.setup_caches(1, len(ids))
    last = torch.arange(len(ids))[None]
    return model(torch.tensor([ids]), last, len(ids), last).logits[0, :, :259].double()


def test_the_cost_of_a_scheme_is_that_of_a_plain_computation(hf, run):
    """In two passes with different contexts, and over several chunks."""
    ids, cost = [256, *Tokenizer.from_folder(hf).encode(TEXT)], {}
    flags = ["--max_seq_length", "250", "--stride", "100"]
    for scheme in ("int8", "int4"):
        path = quantized(hf, scheme)
        figures, _, code = run(path, hf / "model.pth", *flags)
        parts = []
        for part, scored in ((ids[:250], 0), (ids[len(ids) - 251 : -1], 501 - len(ids))):
            other, mine = (logits_of(file, part)[scored:] for file in (hf / "model.pth", path))
            parts.append((mine, other))
        mine, other = (torch.cat(x) for x in zip(*parts, strict=True))
        p, q = other.softmax(-1), mine.softmax(-1)
        expected = (p * (p / q).log()).sum(-1)
        targets = torch.tensor(ids[1:])[:, None]
        assert len(expected) == figures["tokens"] == len(TEXT)
        assert figures["kl"] == pytest.approx(expected.mean().item(), rel=5e-3)
        assert figures["largest_logit_difference"] == pytest.approx(
            (mine - other).abs().max().item(), rel=5e-3
        )
        agreement = (mine.argmax(-1) == other.argmax(-1)).double().mean().item()
        assert figures["greedy_agreement"] == pytest.approx(agreement, abs=0.01)
        for probs, name in ((q, "perplexity"), (p, "reference_perplexity")):
            nats = -probs.gather(-1, targets).log().mean().item()
            assert figures[name] == pytest.approx(math.exp(nats), rel=1e-3)
        assert code == 0 and 0 < figures["kl_standard_error"] < figures["kl"]
        cost[scheme] = figures["kl"]
    assert 0 < 5 * cost["int8"] < cost["int4"]


def test_the_divergence_is_what_coding_by_the_checkpoint_costs_if_the_reference_is_true():
    """Not the other way round."""
    checkpoint, reference = (torch.tensor([p]).double().log() for p in ([0.9, 0.1], [0.5, 0.5]))
    found = compare.measure(checkpoint + 3, reference, torch.tensor([1]))
    assert found.kl.item() == pytest.approx(math.log(0.5 / 0.9) / 2 + math.log(0.5 / 0.1) / 2)
    assert found.nats.item() == pytest.approx(-math.log(0.1))
    assert found.reference_nats.item() == pytest.approx(-math.log(0.5))


def test_the_precision_of_the_reference_is_a_flag(hf, run):
    path = hf / "model.pth"
    figures, _, _ = run(path, path, "--precision", "bfloat16", "--against_precision", "float32")
    assert NOISE < figures["kl"] < 0.1


def test_the_standard_error_is_that_of_the_means_of_blocks():
    values = torch.randn(10 * compare.BLOCK, dtype=torch.float64) + 3
    means = values.view(10, -1).mean(1)
    expected = means.std().item() / math.sqrt(10)
    assert compare.standard_error(values) == pytest.approx(expected)
    # A value repeated is no more evidence.
    alike = values[::10].repeat_interleave(10)
    assert compare.standard_error(alike) > 2 * compare.standard_error(values[:-1]) > 0
    assert compare.standard_error(values[: compare.BLOCK]) is None


# ---- What is the same --------------------------------------------------------------------------


def test_a_checkpoint_is_equal_to_itself_without_transformers(checkpoint, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    figures, output, code = run(checkpoint, checkpoint, "--max_kl", 0)
    assert (code, figures["kl"], figures["largest_logit_difference"]) == (0, 0, 0)
    assert output.endswith("verdict: the same, every logit is equal\n")
    with pytest.raises(UserError, match="needs the package transformers; pip install"):
        run(checkpoint, checkpoint.parent)


def test_padding_of_the_vocabulary_is_ignored(checkpoint, run, tmp_path):
    def pad(state):
        for name in ("tok_embeddings.weight", "output.weight"):
            rows = state[name][:259]  # those of the tokenizer
            state[name] = torch.cat([rows, 9 * torch.ones(61, rows.shape[1])])

    path = edited(checkpoint.parent, tmp_path / "copy", pad, vocab_size=320)
    for pair in ((path, checkpoint), (checkpoint, path)):
        figures, _, _ = run(*pair)
        assert figures["kl"] < NOISE and figures["texts_part_at"] is None, figures


def test_chunks_do_not_change_the_figures(hf, run, monkeypatch):
    whole, _, _ = run(hf / "model.pth", hf)
    monkeypatch.setattr(compare, "CHUNK", 50)
    monkeypatch.setattr(compare, "ROWS", 7)
    cut, _, _ = run(hf / "model.pth", hf)
    for name in ("perplexity", "reference_perplexity", "greedy_agreement", "tokens"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-6), name
    assert cut["kl"] < NOISE


# ---- Greedy texts ------------------------------------------------------------------------------


def test_greedy_texts_part_where_plain_decoding_says(hf, run, tmp_path):
    path = edited(hf, tmp_path / "copy", lambda state: state["norm.weight"][:8].mul_(1.2))
    prompt, texts = Tokenizer.from_folder(hf).encode("The river"), []
    for file in (path, hf / "model.pth"):
        texts.append([*prompt])
        for _ in range(40):
            texts[-1].append(logits_of(file, texts[-1])[-1].argmax().item())
    part = next(i for i, pair in enumerate(zip(*texts, strict=True)) if len({*pair}) > 1)
    flags = ["--prompt", "The river", "--max_new_tokens", "40"]
    for reference in (hf / "model.pth", hf):
        figures, output, _ = run(path, reference, *flags)
        assert figures["texts_part_at"] == part - len(prompt)
        assert f"greedy texts part at new token {part - len(prompt)}, " in output


# ---- Mistakes ----------------------------------------------------------------------------------


def test_another_vocabulary_is_an_error_of_one_sentence(checkpoint, run, tmp_path):
    def rows(state):
        for name in ("tok_embeddings.weight", "output.weight"):
            state[name] = state[name][:258]

    renamed = edited(checkpoint.parent, tmp_path / "renamed").parent
    file = renamed / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|start|>"))
    shorter = edited(checkpoint.parent, tmp_path / "shorter", rows, vocab_size=258)
    cut = edited(checkpoint.parent, tmp_path / "cut").parent
    tokenizer = json.loads((cut / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (cut / "tokenizer.json").write_text(json.dumps(tokenizer))
    for path, words in (
        (renamed / "model.pth", "token 257 is '<|im_start|>' in .* and '<|start|>' in "),
        (shorter, "has logits for 259 tokens and .* for 258"),
        (cut / "model.pth", "cut the text into different tokens"),
    ):
        with pytest.raises(UserError, match=words) as error:
            run(checkpoint, path)
        assert "\n" not in str(error.value)


def test_wrong_flags_are_one_sentence(checkpoint, run, tmp_path):
    assert CONFIG["max_position_embeddings"] == 512
    short = write_checkpoint(tmp_path / "short", CONFIG | {"max_position_embeddings": 100})
    (tmp_path / "empty").mkdir()
    write_tokenizer(tmp_path / "empty")
    for reference, flags, words in (
        (tmp_path / "none.pth", [], "there is no checkpoint .*none.pth"),
        (tmp_path / "empty", [], "transformers cannot run the folder .*model.pth"),
        (checkpoint, ["--against_device", "abacus"], "device 'abacus' cannot be used here"),
        (checkpoint, ["--max_new_tokens", 500], "over the context of .*, 512; lower either"),
        (short, ["--max_seq_length", 101], "over the context of .*, 100; lower it"),
    ):
        with pytest.raises(UserError, match=words) as error:
            run(checkpoint, reference, *flags)
        assert "\n" not in str(error.value)
    assert run(checkpoint, short)[0]["window"] == 100
    for flags, words in (
        (["--tasks", "x", "--against", checkpoint], "--against needs a text"),
        (["--perplexity", "x", "--max_kl", "1"], "--max_kl goes with --against"),
    ):
        with pytest.raises(UserError, match=words):
            evaluation.main(evaluation.make_parser().parse_args([*map(str, flags)]))
