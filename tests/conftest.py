"""What the tests share: the import path, and a tiny checkpoint made from a seed."""

import functools
import gc
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

# Tests run side by side: one thread each, and threads that wait leave their core to others.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# Whoever starts the tests may ignore these, as nohup does; what the tests start must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from families import from_config  # noqa: E402
from model import Transformer  # noqa: E402

CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Begin with the files that take longest, so that the processes end together."""

    def place(item):
        return item.parent.get_closest_marker("slow") is None, -item.path.stat().st_size

    items.sort(key=place)


def pytest_collection_finish():
    """Let garbage collections pass over what imports have made: it is most of all objects."""
    gc.freeze()


def seldom(values: Iterable, each: int, name: Callable = lambda *row: None) -> list:
    """Parameters of which all but every so many are slow; `name` gives their ids."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    marks = itertools.cycle([[], *[[pytest.mark.slow]] * (each - 1)])
    return [pytest.param(*row, id=name(*row), marks=next(marks)) for row in rows]


def selected(request: pytest.FixtureRequest, name: str) -> list:
    """The values of a parameter in the tests of this file that are about to run."""
    items = (item for item in request.session.items if item.fspath == request.node.fspath)
    parameters = (item.callspec.params for item in items if hasattr(item, "callspec"))
    return [values[name] for values in parameters if name in values]


def random_model(config: dict, dtype=torch.float32, scale=0.2) -> Transformer:
    """A model of this config with weights drawn from a seed; norms near 1."""
    with torch.device("meta"):
        model = Transformer(from_config(config))
    model = model.to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        parameter.data.normal_(mean, scale, generator=generator)
    return model.requires_grad_(False)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token a byte and three special ones, ids 256 to 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_checkpoint(folder: Path, config: dict = CONFIG, dtype=torch.float32) -> Path:
    """A whole checkpoint folder; the path of its model.pth."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    torch.save(random_model(config, dtype).state_dict(), folder / "model.pth")
    return folder / "model.pth"


@pytest.fixture
def few_tasks(monkeypatch):
    """Spare the reading of lm-eval's thousands of task definitions."""
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", manager)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))
