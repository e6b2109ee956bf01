"""The losses of layer_accuracy_analysis.py: on a text, or on an lm-eval task.

Each is called with a part of the data, "ranking" or "held back", and returns one number for each
sequence or document.
"""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tasks
from cli import UserError
from engine import NOT_FINITE
from eval import Evaluator, lm_eval
from files import read_text
from model import Transformer, TransformerBlock
from tokenizer import Tokenizer

TOP = 1024  # tokens of a reference distribution that are kept; the rest is lumped together
BATCH_TOKENS, BATCH_LOGITS = 2048, 2**28  # limits of a batch
Losses = Callable[[str, int], Tensor]  # (part, first block that has changed) -> losses

# ------------------------------------------------------------------------------------------------
# Losses on text


class TextLosses:
    """Losses on sequences of a text, one number a sequence: KL or negative log probability.

    Called with the first block that has changed since the last `remember`.
    """

    def __init__(self, model: Transformer, parts: dict[str, Tensor], metric: str):
        """`parts` `[N, T + 1]` are token ids; the last one of a row is only predicted.

        The reference is the model in its current state. Only the `TOP` likeliest tokens of each of
        its distributions are kept; lumping the rest lowers the divergence by that of the tail.
        """
        self.model, self.metric = model, metric
        length = next(iter(parts.values())).shape[1] - 1
        rows = max(1, min(BATCH_TOKENS // length, BATCH_LOGITS // length // model.args.vocab_size))
        self.batches = {name: part.split(rows) for name, part in parts.items()}
        self.states: dict[str, list[list[Tensor]]] = {name: [] for name in parts}
        self.reference: dict[str, list] = {name: [] for name in parts}
        if metric == "kl":
            for name, batches in self.batches.items():
                for batch in batches:
                    logits = self.logits(batch)
                    tops = [likeliest(row) for row in logits]
                    self.reference[name].append([torch.stack(x) for x in zip(*tops, strict=True)])

    def logits(
        self,
        batch: Tensor,
        start: int = 0,
        states: list[Tensor] | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits `[B, T, V]` of a batch; `states` holds the inputs of the blocks up to `start`."""
        model, (rows, length) = self.model, (batch.shape[0], batch.shape[1] - 1)
        cache = model.layers[0].attention.kv_cache
        if cache is None or cache.k_cache.shape[0] != rows:
            model.setup_caches(rows, length)
        places = itertools.count()

        def block(layer: TransformerBlock, x: Tensor, *rest: Tensor) -> Tensor:
            if next(places) < start:
                return states[start]
            y = TransformerBlock.forward(layer, x, *rest)
            if record is not None:
                record.extend([x, y] if not record else [y])
            return y

        positions = torch.arange(length, device=batch.device).expand(rows, -1)
        logits = model(batch[:, :-1], positions, length, block=block).logits
        if not logits.isfinite().all():
            raise UserError(NOT_FINITE)
        return logits

    def remember(self, part: str) -> None:
        """Keep the inputs of every block, so that later runs can start at any block."""
        self.states[part] = [[] for _ in self.batches[part]]
        for batch, record in zip(self.batches[part], self.states[part], strict=True):
            self.logits(batch, record=record)

    def __call__(self, part: str, start: int = 0) -> Tensor:
        """Mean loss of each sequence of a part, float64 `[N]`."""
        losses = []
        for i, batch in enumerate(self.batches[part]):
            logits = self.logits(batch, start, self.states[part][i] if start else None)
            for row, one in enumerate(logits):
                if self.metric == "kl":
                    reference = [values[row] for values in self.reference[part][i]]
                    losses.append(divergence(one, *reference))
                else:
                    log_probs = one.float().log_softmax(-1)
                    losses.append(-log_probs.gather(-1, batch[row, 1:].unsqueeze(-1)).mean())
        return torch.stack(losses).double().cpu()


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The TOP tokens of logits `[T, V]` and their log probabilities, `[T, K]` each."""
    log_probs = logits.float().log_softmax(-1)
    values, tokens = log_probs.topk(min(TOP, logits.shape[-1]))
    return tokens, values


def divergence(logits: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
    """Mean KL divergence, in nats, of logits `[T, V]` from a reference by `likeliest`; 0 if equal.

    All tokens outside the reference's `tokens` count as a single event.
    """
    log_probs = logits.float().log_softmax(-1).gather(-1, tokens)  # [T, K]
    probs = reference.exp()
    rest, other = (
        (1 - p.sum(-1)).clamp(min=1e-6) for p in (probs, log_probs.exp())
    )  # the resolution of float32
    told = (probs * (reference - log_probs)).sum(-1)
    return (told + rest * (rest / other).log()).mean()


def read_parts(args: Namespace, tokenizer: Tokenizer, device: torch.device) -> dict[str, Tensor]:
    """Cut the text into sequences: the first half ranks, the second is held back."""
    ids = tokenizer.encode(read_text(args.text), bos=False)
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    length = args.max_seq_length + 1 - len(first)  # of a sequence, plus the last target
    half = min(args.limit, len(ids) // length // 2)
    if half < 2:
        raise UserError(
            f"--text {args.text} has {len(ids)} tokens and {4 * length} are needed, for two "
            "sequences to rank by and two to confirm; pass more text or lower --max_seq_length"
        )
    middle = len(ids) // 2
    parts = {"ranking": ids[:middle], "held back": ids[middle:]}
    return {
        name: torch.tensor(
            [first + part[i * length : (i + 1) * length] for i in range(half)], device=device
        )
        for name, part in parts.items()
    }


# ------------------------------------------------------------------------------------------------
# Losses on a task of lm-eval


class TaskLosses:
    """Losses on documents of an lm-eval task, one number a document.

    The loss is the task's first metric that all documents have, negated if higher is better. The
    first --limit documents rank, the next --limit are held back.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, args: Namespace):
        self.name = args.metric
        manager, names = tasks.find([self.name], args.include_path)
        with tasks.explaining(names):
            self.loaded = manager.load(names)
            self.task = next(iter(self.loaded["tasks"].values()))
            count = len(self.task.eval_docs)
        if len(self.loaded["tasks"]) != 1 or count < 4:
            raise UserError(f"--metric {self.name} should be one task with four documents or more")
        (self.name,) = self.loaded["tasks"]  # where --metric is a glob or a tag
        if self.task.get_config("num_fewshot") is None:
            self.task.set_config(key="num_fewshot", value=0)
        half = min(args.limit, count // 2)
        documents = {"ranking": range(half), "held back": range(half, 2 * half)}
        self.documents = {part: list(numbers) for part, numbers in documents.items()}
        self.evaluator = Evaluator(model, tokenizer, 8, args.max_seq_length)

    def remember(self, part: str) -> None:
        """Does nothing: a task always runs in full."""

    def __call__(self, part: str, start: int = 0) -> Tensor:
        self.task.set_fewshot_seed(seed=1234)  # lm-eval's default: the same examples every time
        with tasks.explaining([self.name]):
            results = lm_eval.evaluate(  # simple_evaluate collects system information each time
                self.evaluator,
                self.loaded,
                samples={self.name: self.documents[part]},
                log_samples=True,
                bootstrap_iters=0,
            )
        samples = sorted(results["samples"][self.name], key=lambda sample: sample["doc_id"])
        for metric, higher in results["higher_is_better"][self.name].items():
            values = [sample.get(metric) for sample in samples]
            if all(isinstance(value, int | float) for value in values) and higher is not None:
                return torch.tensor(values, dtype=torch.float64) * (-1 if higher else 1)
        raise UserError(f"--metric {self.name}: it has no metric with a number for each document")
