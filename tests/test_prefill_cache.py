"""A prefilled context saves time and changes nothing else, whatever lies on the disk."""

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import prefill_cache
from commands import python, run_script
from conftest import CONFIG, ROOT, random_model, write_checkpoint
from engine import Engine, load_model
from linear import Linear
from model import Transformer
from prefill_cache import PrefillCache
from quantize import quantize
from test_generate import command, run_rows

SHAPE = CONFIG | {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
CONTEXT = [(i * 37 + i * i) % 250 for i in range(70)]
OTHER = [7, *CONTEXT[1:]]
PROMPTS = [CONTEXT + tail for tail in ([5, 9, 200], [3], [8] * 40)]
ROOM = 2**30


def make_model(kind="float32", batch_size=1, length=256, folder: Path | None = None) -> Transformer:
    """A tiny model: of a float dtype, or in bf16 with all matrices in int8 or int4."""
    if hasattr(torch, kind) and getattr(torch, kind).is_floating_point:
        model = random_model(SHAPE, getattr(torch, kind))
    else:
        path = write_checkpoint(folder / kind, SHAPE, torch.bfloat16)
        state = torch.load(path)
        for name, module in random_model(SHAPE).named_modules():
            if isinstance(module, Linear):
                tensors = quantize(state.pop(f"{name}.weight"), kind, 32)
                state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        torch.save(state, path)
        model = load_model(path, "cpu")
    model.setup_caches(batch_size, length)
    return model


def remember(cache: PrefillCache, model: Transformer, context=CONTEXT) -> int:
    return cache.prefill_context(context, model, Engine(model, None).prefill)


def text_with(cache: PrefillCache, model: Transformer, prompts=PROMPTS[:1]) -> tuple[int, list]:
    """How many tokens of CONTEXT were prefilled, and greedy text after each prompt."""
    engine = Engine(model, None)
    engine.cache = cache
    done = remember(cache, model)
    for layer in model.layers:  # what a load forgets to write must be missed
        layer.attention.kv_cache.k_cache.zero_()
        layer.attention.kv_cache.v_cache.zero_()
    rows = run_rows(engine, prompts)
    assert engine.cached_tokens == len(CONTEXT)
    return done, rows


def text_without(model: Transformer, prompt=PROMPTS[0]) -> list:
    """The same shapes and no cache: the context is prefilled, then the prompt."""
    engine = Engine(model, None)
    engine.prefill([CONTEXT])
    return run_rows(engine, [prompt], start=len(CONTEXT))


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# ---- The text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["float32", "bfloat16", "float16", "int8", "int8-activation", "int4"]
)
def test_greedy_text_with_the_cache_is_exactly_that_without(kind, tmp_path):
    expected = text_without(make_model(kind, folder=tmp_path))
    cache = PrefillCache(ROOM, tmp_path / "cache")
    assert text_with(cache, make_model(kind, folder=tmp_path)) == (len(CONTEXT), expected)
    in_memory = PrefillCache(ROOM)
    model = make_model(kind, folder=tmp_path)
    assert text_with(in_memory, model) == (len(CONTEXT), expected)
    assert text_with(in_memory, model) == (0, expected)
    new_process = PrefillCache(ROOM, tmp_path / "cache")
    assert text_with(new_process, make_model(kind, folder=tmp_path)) == (0, expected)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_what_is_loaded_is_bit_for_bit_what_was_stored(kind, tmp_path):
    first, second = make_model(kind), make_model(kind, length=300)
    remember(PrefillCache(ROOM, tmp_path), first)
    entry = PrefillCache(ROOM, tmp_path).lookup(CONTEXT + [1], second)
    assert entry.length == len(CONTEXT)
    entry.load_into(second)
    n = len(CONTEXT)
    for a, b in zip(first.layers, second.layers, strict=True):
        for name in ("k_cache", "v_cache"):
            old, new = (getattr(x.attention.kv_cache, name) for x in (a, b))
            assert old[:, :, :n].equal(new[:, :, :n]) and old[:, :, :n].abs().max() > 0
            assert not new[:, :, n:].any()


def test_a_batch_of_different_prompts_shares_one_context(tmp_path):
    expected = [text_without(make_model(), prompt)[0] for prompt in PROMPTS]
    cache = PrefillCache(ROOM)
    assert text_with(cache, make_model(batch_size=3), PROMPTS) == (len(CONTEXT), expected)


BOUNDS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1, "int8": 0.2, "int4": 0.2}


@pytest.mark.parametrize("kind", BOUNDS)
def test_another_chunking_changes_rounding_and_no_more(kind, tmp_path):
    """The bound that docs/prefill_cache.md states, in standard deviations of the logits."""
    whole, parts = (Engine(make_model(kind, folder=tmp_path), None) for _ in range(2))
    parts.cache = PrefillCache(ROOM)
    remember(parts.cache, parts.model)
    for prompt in PROMPTS:
        a, b = (engine.prefill([prompt]).float() for engine in (whole, parts))
        assert parts.cached_tokens == len(CONTEXT)
        assert (a - b).abs().max() < BOUNDS[kind] * a.std()


@pytest.mark.slow
def test_nothing_is_compiled_for_the_cache():
    torch.compiler.reset()
    engine = Engine(make_model(batch_size=3), "block")
    engine.warm_up(3)
    engine.cache = PrefillCache(ROOM)
    expected = [text_without(make_model(), prompt)[0] for prompt in PROMPTS]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert remember(engine.cache, engine.model) == len(CONTEXT)
        assert run_rows(engine, PROMPTS) == expected
    assert engine.cached_tokens == len(CONTEXT)


# ---- What is found -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_longest_common_prefix_of_an_entry_serves(place, tmp_path):
    model = make_model()
    cache = PrefillCache(ROOM, tmp_path)
    for tokens in (CONTEXT[:20], CONTEXT):
        remember(cache, model, tokens)
    if place == "disk":
        cache = PrefillCache(ROOM, tmp_path)

    def found(tokens, **options) -> int:
        entry = cache.lookup(tokens, model, **options)
        return entry.length if entry else 0

    assert found(CONTEXT[:50] + [251, 252]) == 50
    assert found(CONTEXT + [1, 2, 3]) == len(CONTEXT)
    assert found(CONTEXT) == len(CONTEXT) - 1  # one is left to be fed
    assert found(CONTEXT, leave=0) == len(CONTEXT)
    assert found(CONTEXT[:10]) == 9
    assert found(OTHER) == found([]) == found([7]) == 0

    cut = CONTEXT[:50] + [251, 252, 253]
    plain, engine = Engine(make_model(), None), Engine(make_model(), None)
    plain.prefill([CONTEXT])  # the same shapes: a longer text, then another from token 50 on
    engine.cache = cache
    assert run_rows(engine, [cut]) == run_rows(plain, [cut], start=50)
    assert engine.cached_tokens == 50


def test_a_context_that_extends_another_prefills_the_difference():
    model, cache = make_model(), PrefillCache(ROOM)
    assert remember(cache, model, CONTEXT[:40]) == 40
    assert remember(cache, model, CONTEXT) == 30
    assert remember(cache, model, CONTEXT[:55]) == 0


def test_the_models_of_a_cache_are_kept_apart(tmp_path, capsys):
    target, draft = make_model(), make_model("bfloat16")
    cache = PrefillCache(ROOM, tmp_path)
    assert remember(cache, target) == remember(cache, draft) == len(CONTEXT)
    assert remember(cache, target) == remember(cache, draft) == 0
    assert len(files_in(tmp_path)) == 2
    assert cache.lookup(CONTEXT, draft).kv.dtype == torch.bfloat16
    new = PrefillCache(ROOM, tmp_path)
    assert remember(new, draft) == remember(new, target) == 0
    assert capsys.readouterr().err == ""


def test_the_last_slot_of_the_cache_is_never_stored():
    model = make_model(length=len(CONTEXT))
    cache = PrefillCache(ROOM)
    remember(cache, model)
    assert cache.lookup(CONTEXT, model).kv.shape[3] == len(CONTEXT)
    with pytest.raises(ValueError):
        cache.store(CONTEXT + [1], model)


# ---- The budget --------------------------------------------------------------------------------


def entry_bytes(folder: Path) -> int:
    remember(PrefillCache(ROOM, folder), make_model())
    (file,) = files_in(folder)
    return file.stat().st_size


def test_memory_holds_max_bytes_and_the_least_recently_used_goes_first():
    model = make_model()
    contexts = [[i] * 70 for i in range(4)]
    size = 2 * 2 * 2 * 70 * 16 * 4  # layers, k and v, KV heads, positions, head_dim, float32
    cache = PrefillCache(3 * size + 1)
    for context in contexts[:3]:
        remember(cache, model, context)
    assert cache.lookup(contexts[0], model)  # now 1 is the oldest
    remember(cache, model, contexts[3])
    assert [cache.lookup(context, model) is not None for context in contexts] == [1, 0, 1, 1]
    assert sum(entry.kv.nbytes for entry in cache.entries.values()) == 3 * size


def test_the_directory_holds_max_bytes_and_the_least_recently_used_goes_first(tmp_path):
    model, size = make_model(), entry_bytes(tmp_path / "one")
    folder = tmp_path / "cache"
    contexts = [[i + 10] * 70 for i in range(4)]
    budget = 3 * size + 1000  # headers differ by a few digits
    for context in contexts[:3]:
        remember(PrefillCache(budget, folder), model, context)
        time.sleep(0.02)
    foreign = folder / "notes.txt"
    foreign.write_bytes(b"x" * 10 * size)  # not of this format: neither counted nor removed
    assert PrefillCache(budget, folder).lookup(contexts[0], model)
    time.sleep(0.02)
    remember(PrefillCache(budget, folder), model, contexts[3])
    new = PrefillCache(budget, folder)
    assert [new.lookup(context, model) is not None for context in contexts] == [1, 0, 1, 1]
    assert sum(file.stat().st_size for file in files_in(folder)) <= budget
    assert foreign.exists()


def test_a_hit_in_memory_counts_as_a_use_of_the_file(tmp_path):
    cache, model = PrefillCache(ROOM, tmp_path), make_model()
    remember(cache, model)
    (file,) = files_in(tmp_path)
    os.utime(file, (1, 1))
    assert cache.lookup(CONTEXT, model) and file.stat().st_mtime > 1


def test_what_is_larger_than_the_budget_is_not_kept_and_the_text_is_right(tmp_path, capsys):
    engine = Engine(make_model(), None)
    engine.cache = PrefillCache(1000, tmp_path)
    assert remember(engine.cache, engine.model) == len(CONTEXT)
    assert run_rows(engine, PROMPTS[:1]) == run_rows(Engine(make_model(), None), PROMPTS[:1])
    assert engine.cached_tokens == 0 and not files_in(tmp_path)
    assert "not kept" in capsys.readouterr().err


def test_a_file_larger_than_the_budget_removes_no_other(tmp_path, capsys):
    """Of a size between that of the keys and values and that of the file with its header."""
    size, model = entry_bytes(tmp_path), make_model()
    remember(PrefillCache(size - 100, tmp_path), model, OTHER)
    (file,) = files_in(tmp_path)
    assert "not written" in capsys.readouterr().err
    assert PrefillCache(ROOM, tmp_path).lookup(CONTEXT, model)


# ---- Files that are not what they should be ----------------------------------------------------


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def flip_token(file: Path) -> None:
    flip(file, file.read_bytes().index(b'"tokens": "') + 13)


def stored_by(file: Path, model: Transformer) -> None:
    """Put a whole and valid file of another model in its place."""
    folder = file.parent / "other"
    remember(PrefillCache(ROOM, folder), model)
    files_in(folder)[0].rename(file)


def other_weights() -> Transformer:
    model = make_model()
    model.layers[0].attention.wqkv.weight.data *= 1.5
    return model


def other_version(file: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_cache, "FORMAT", "tokenbus prefill cache 0")
        stored_by(file, make_model())


def cut_file(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def foreign(file: Path) -> None:
    safetensors.torch.save_file({"kv": torch.zeros(2, 2, 2, 70, 16)}, file)


def grow(file: Path) -> None:
    os.truncate(file, 2**41)


DAMAGE = {
    "data cut short": lambda file: cut_file(file, -10),
    "header cut short": lambda file: cut_file(file, 100),
    "length cut short": lambda file: cut_file(file, 5),
    "empty": lambda file: cut_file(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "a byte of the data": lambda file: flip(file, -100),
    "a token in the header": flip_token,
    "foreign safetensors": foreign,
    "foreign tensors with metadata": lambda file: safetensors.torch.save_file(
        {"x": torch.zeros(3)}, file, {"format": "pt", "tokens": "1 2"}
    ),
    "no safetensors at all": lambda file: file.write_bytes(b"PK\x03\x04" * 5000),
    "endless": lambda file: (file.write_bytes((2**40).to_bytes(8, "little")), grow(file)),
    "deeply nested": lambda file: file.write_bytes((99999).to_bytes(8, "little") + b"[" * 99999),
    "other weights": lambda file: stored_by(file, other_weights()),
    "other dtype": lambda file: stored_by(file, make_model("bfloat16")),
    "other version": other_version,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a link": lambda file: file.symlink_to(file.rename(file.with_suffix(".moved"))),
    "for all to write": lambda file: file.chmod(0o622),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_does_not_verify_is_ignored_with_one_warning(damage, tmp_path, capsys):
    remember(PrefillCache(ROOM, tmp_path), make_model())
    (file,) = files_in(tmp_path)
    DAMAGE[damage](file)
    cache = PrefillCache(ROOM, tmp_path)
    assert cache.lookup(CONTEXT, make_model()) is None
    assert cache.lookup(CONTEXT, make_model()) is None
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == 1 and warnings.startswith(f"warning: {file} ")

    assert text_with(cache, make_model()) == (len(CONTEXT), text_without(make_model()))
    if damage not in ("a folder", "a pipe", "a link"):  # the damaged file has been replaced
        new = PrefillCache(ROOM, tmp_path)
        assert text_with(new, make_model()) == (0, text_without(make_model()))
        assert capsys.readouterr().err == ""


def test_a_warning_is_one_printable_line_whatever_the_name_of_a_file(tmp_path, capsys):
    remember(PrefillCache(ROOM, tmp_path), make_model())
    (file,) = files_in(tmp_path)
    file.rename(tmp_path / f"a\nb\x1b[2J{file.name}").write_bytes(b"no header")
    assert PrefillCache(ROOM, tmp_path).lookup(CONTEXT, make_model()) is None
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and r"a\nb\x1b[2J" in warning and warning[:-1].isprintable()


def test_no_byte_of_a_file_can_change_unnoticed(tmp_path):
    model = make_model()
    remember(PrefillCache(ROOM, tmp_path), model)
    (file,) = files_in(tmp_path)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(header), *range(header, len(whole), 1999), len(whole) - 1]:
        for bit in (1, 32):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            assert PrefillCache(ROOM, tmp_path).lookup(CONTEXT, model) is None, whole[
                at - 9 : at + 9
            ]
    file.write_bytes(whole)
    assert PrefillCache(ROOM, tmp_path).lookup(CONTEXT, model).length == len(CONTEXT) - 1


def test_models_share_a_folder_without_each_others_files(tmp_path, capsys):
    remember(PrefillCache(ROOM, tmp_path), make_model())
    changed = other_weights()
    done, rows = text_with(PrefillCache(ROOM, tmp_path), changed)
    assert done == len(CONTEXT) and rows == text_without(other_weights())
    assert text_with(PrefillCache(ROOM, tmp_path), changed) == (0, rows)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.tok_embeddings.weight.data.neg_(),
        lambda model: model.norm.weight.data[3:4].add_(1),
        lambda model: setattr(model, "args", dataclasses.replace(model.args, norm_eps=1e-3)),
        lambda model: model.double().setup_caches(1, 64),
    ],
)
def test_a_fingerprint_is_of_the_configuration_and_of_every_tensor(change):
    model, same = make_model(), make_model(batch_size=2, length=99)
    before = PrefillCache(ROOM).fingerprint(model)
    assert before == PrefillCache(ROOM).fingerprint(same)
    change(model)
    assert PrefillCache(ROOM).fingerprint(model) != before


def test_a_foreign_file_in_the_directory_is_left_alone(tmp_path, capsys):
    safetensors.torch.save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    cache = PrefillCache(10**5, tmp_path)
    assert text_with(cache, make_model()) == (len(CONTEXT), text_without(make_model()))
    assert text_with(cache, make_model())[0] == 0
    assert capsys.readouterr().err.count("is not a file of the prefill cache") == 1
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_files_are_whole_safetensors_that_hold_the_filled_positions_only(tmp_path):
    model = make_model("bfloat16")
    remember(PrefillCache(ROOM, tmp_path), model)
    (file,) = files_in(tmp_path)
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata()["tokens"] == " ".join(map(str, CONTEXT))
        kv = opened.get_tensor("kv")
    assert kv.dtype == torch.bfloat16 and kv.shape == (2, 2, 2, len(CONTEXT), 16)
    assert kv[1, 0].equal(model.layers[1].attention.kv_cache.k_cache[0, :, : len(CONTEXT)])


@pytest.mark.parametrize("umask", [0o022, 0])
def test_files_are_readable_by_their_owner_only(umask, tmp_path):
    old = os.umask(umask)
    try:
        remember(PrefillCache(ROOM, tmp_path / "new" / "cache"), make_model())
    finally:
        os.umask(old)
    (file,) = files_in(tmp_path / "new" / "cache")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_disk_that_fails_costs_a_warning_and_not_the_text(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    cache = PrefillCache(ROOM, tmp_path)
    monkeypatch.setattr(os, "replace", full)
    assert text_with(cache, make_model()) == (len(CONTEXT), text_without(make_model()))
    assert "No space left" in capsys.readouterr().err and not [*tmp_path.iterdir()]


# ---- Several processes -------------------------------------------------------------------------

PREAMBLE = f"""
import os, random, signal, sys, time
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import torch
import torch.distributed as dist
from pathlib import Path
from test_prefill_cache import *
folder = Path(sys.argv[1])
"""
RACE = """
model, seed = make_model(length=80), int(sys.argv[2])
chosen, hits = random.Random(seed), 0
for turn in range(60):
    cache = PrefillCache(int(sys.argv[3]), folder)
    tokens = [chosen.randrange(8)] * 70
    entry = cache.lookup(tokens, model, leave=0)
    if entry:
        hits += 1
        assert entry.length == 70 and entry.kv.eq(tokens[0]).all(), tokens[0]
    else:
        for layer in model.layers:
            layer.attention.kv_cache.k_cache.fill_(tokens[0])
            layer.attention.kv_cache.v_cache.fill_(tokens[0])
        cache.store(tokens, model)
print(hits)
"""
KILLED = """
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
remember(PrefillCache(ROOM, folder), make_model())
"""
RANKS = """
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model, cache = make_model(), PrefillCache(ROOM, folder / "cache")
Engine(model, None).prefill([CONTEXT])
cache.store(CONTEXT if rank else CONTEXT[:30], model)
new = PrefillCache(ROOM, folder / "cache")
print(new.lookup(CONTEXT, model).length)
if rank:
    new.entries.clear()
    for file in (folder / "cache").glob("*-1of2-*"):
        file.unlink()
print(new.lookup(CONTEXT, model))
dist.barrier()
dist.destroy_process_group()
"""


def start(code: str, *arguments) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*python(), "-c", PREAMBLE + code, *map(str, arguments)], **pipes)


def test_two_processes_may_store_and_evict_in_one_directory(tmp_path):
    budget = 3 * entry_bytes(tmp_path / "one") + 1000
    folder = tmp_path / "cache"
    processes = [start(RACE, folder, seed, budget) for seed in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == "", err
        assert 0 < int(out) < 60
    assert 0 < sum(file.stat().st_size for file in folder.iterdir()) <= budget


def test_a_file_that_another_process_has_just_removed_is_no_warning(tmp_path, capsys):
    model = make_model()
    remember(PrefillCache(ROOM, tmp_path), model)
    names = os.listdir(tmp_path)
    (tmp_path / names[0]).unlink()
    cache = PrefillCache(ROOM, tmp_path)
    cache.folder.listing = lambda: names  # as seen a moment ago
    assert cache.lookup(CONTEXT, model) is None and remember(cache, model) == len(CONTEXT)
    assert capsys.readouterr().err == ""


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path, capsys):
    process = start(KILLED, tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".") and left.stat().st_size > 10000
    assert stat.S_IMODE(left.stat().st_mode) == 0o600
    expected = len(CONTEXT), text_without(make_model())
    assert text_with(PrefillCache(ROOM, tmp_path), make_model()) == expected
    assert capsys.readouterr().err == "" and not left.exists()  # its writer held a lock
    old = tmp_path / left.name.replace("0of1", "1of2")  # of a context that is not asked for again
    old.touch()
    os.utime(old, (1, 1))
    remember(PrefillCache(ROOM, tmp_path), make_model(), OTHER)
    assert not old.exists() and len(files_in(tmp_path)) == 2


def test_the_ranks_of_tensor_parallelism_agree_on_what_they_have(tmp_path):
    """Rank 0 has 30 tokens and rank 1 has 70; then rank 1 has lost its file."""
    processes = [start(RANKS, tmp_path, rank) for rank in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.split() == ["30", "None"] and "warning" not in err


# ---- The command line --------------------------------------------------------------------------


@pytest.fixture
def run_cli(monkeypatch, capsys, checkpoint, tmp_path):
    """Run generate.py: its exit code, output, messages and the figures of --json."""
    figures = tmp_path / "figures.json"
    common = ("--checkpoint_path", checkpoint, "--device", "cpu", "--precision", "float32")
    common += ("--temperature", "0", "--max_new_tokens", "8", "--json", figures)

    def run(*flags, stdin=""):
        figures.unlink(missing_ok=True)
        result = command(monkeypatch, capsys, *common, *flags, stdin=stdin)
        return *result, json.loads(figures.read_text()) if figures.exists() else None

    return run


TEXT = "Llamas hum to each other, and carry a quarter of their weight. "  # 63 tokens


def test_a_context_from_a_file_is_prefilled_once_for_every_process(run_cli, tmp_path):
    (tmp_path / "context.txt").write_text(TEXT)
    flags = ("--prefill_context", f"@{tmp_path}/context.txt", "--prefill_cache", tmp_path / "cache")
    _, whole, _, _ = run_cli("--prompt", TEXT + "Why?")
    for prefilled in (63, 0):
        code, out, err, figures = run_cli(*flags, "--prompt", "Why?")
        assert code == 0 and TEXT + out == whole
        assert figures["context_prefilled_tokens"] == prefilled
        assert figures["context_tokens"] == 63 and figures["context_s"] > 0
        (sample,) = figures["samples"]
        assert sample["prompt_tokens"] == [67] and sample["prefilled_tokens"] == 4
        assert f"63 tokens, {prefilled} prefilled" in err
    _, out, _, figures = run_cli(*flags, "--prompt", "5")
    assert figures["samples"][0]["prefilled_tokens"] == 5  # random tokens, too
    _, out, _, figures = run_cli(*flags, "--prompt", "")
    assert figures["samples"][0]["prefilled_tokens"] == 1


def test_samples_and_rows_of_a_file_share_one_prefill(run_cli, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\na longer prompt\nthree\n")
    alone = [run_cli("--prompt", TEXT + p)[1] for p in ("one", "a longer prompt", "three")]
    expected = "".join(f"--- {i}\n{text.removeprefix(TEXT)}" for i, text in enumerate(alone))
    flags = ("--prefill_context", TEXT, "--prompts_file", file)
    for batch, prefilled in (((), [23]), (("--batch_size", "2"), [18, 5])):
        code, out, _, figures = run_cli(*flags, *batch)
        assert code == 0 and out == expected and figures["context_prefilled_tokens"] == 63
        assert [sample["prefilled_tokens"] for sample in figures["samples"]] == prefilled
    flags = ("--prefill_context", TEXT, "--prompt", "one", "--num_samples", "3")
    _, out, _, figures = run_cli(*flags)
    assert out == alone[0].removeprefix(TEXT) * 3
    assert [sample["prefilled_tokens"] for sample in figures["samples"]] == [3, 3, 3]


def test_a_conversation_keeps_its_context_when_it_is_reset(run_cli, tmp_path):
    turns = "Why?\nAnd then?\n/reset\nWhy?\n/quit\n"
    flags = ("--interactive", "--prefill_context", TEXT)
    code, out, _, figures = run_cli(*flags, "--prefill_cache", tmp_path / "cache", stdin=turns)
    assert code == 0
    shared = figures["context_tokens"]
    assert shared > 63 and figures["context_prefilled_tokens"] == shared
    first, second, third = figures["samples"]
    for sample in (first, third):
        assert sample["prefilled_tokens"] == sample["prompt_tokens"][0] - shared
    assert second["prefilled_tokens"] <= second["prompt_tokens"][0] - first["prompt_tokens"][0]
    assert run_cli("--interactive", "--system_prompt", TEXT, stdin=turns)[1] == out
    again = run_cli(*flags, "--prefill_cache", tmp_path / "cache", stdin=turns)
    assert again[1] == out and again[3]["context_prefilled_tokens"] == 0


def test_in_a_chat_the_context_stands_before_the_system_prompt(run_cli):
    flags = ("--chat", "--prompt", "Why?")
    with_context = run_cli(*flags, "--prefill_context", "A text.", "--system_prompt", "Be brief.")
    assert with_context[0] == 0
    assert with_context[1] == run_cli(*flags, "--system_prompt", "A text.\n\nBe brief.")[1]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--prefill_context", "@nowhere.txt"], "nowhere.txt"),
        (["--prefill_context", "@."], "cannot read . ("),
        (["--prefill_context", f"@{sys.executable}"], "pass a UTF-8 text file"),
        (["--prefill_context", ""], "context is empty"),
        (["--prefill_context", "x" * 600], "the context has 600 tokens and the cache 512"),
        (["--prefill_context", "x" * 90, "--max_seq_length", "80"], "the context has 90 tokens"),
        (["--prefill_context", TEXT, "--prefill_cache", "/dev/null/x"], "cannot make"),
        (["--prefill_context", TEXT, "--prefill_cache", f"{ROOT}/README.md"], "README.md"),
        (["--prefill_context", TEXT, "--prefill_cache_gb", "nan"], "--prefill_cache_gb"),
        (["--prefill_cache", "cache"], "add it"),
        (["--prefill_cache_gb", "0"], "add it"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run_cli, flags, named):
    code, out, err, _ = run_cli(*flags)
    assert code == 2 and named in err and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_directory_without_permission_is_a_mistake(tmp_path, run_cli, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the owner of this process may be root
    flags = ("--prefill_context", TEXT, "--prefill_cache", tmp_path / "cache")
    code, _, err, _ = run_cli(*flags)
    assert code == 2 and "cannot be written" in err and err.count("\n") == 1


def test_the_experiment_prints_and_saves_its_table(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[:20])
    flags = ["--checkpoint_path", checkpoint, "--device", "cpu", "--precision", "float32"]
    flags += ["--runs", "2", "--max_new_tokens", "4", "--output", tmp_path / "table.md"]
    flags += ["--contexts", tmp_path / "a.txt", tmp_path / "b.txt"]
    done = run_script("scripts/prefill_cache_experiment.py", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() == done.stdout
    head, _, *rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if "|" in line]
    assert [row[0].strip() for row in rows] == ["20", "63"]
    assert all(len(row) == len(head) for row in rows) and "20: yes, 63: yes" in done.stdout
