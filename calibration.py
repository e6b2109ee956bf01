"""Calibration data for quantization: texts cut into sequences of tokens.

Sequences are drawn round-robin from all tasks and all their texts, in an order set by a seed. They
begin with BOS if the model's prompts do.
"""

from __future__ import annotations

import itertools
import random
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import tasks
from cli import Parser, UserError, bounded, named_path
from files import read_text
from tokenizer import Tokenizer


def add_calibration_flags(parser: Parser) -> None:
    group = parser.add_argument_group("calibration")
    add, source = group.add_argument, group.add_mutually_exclusive_group()
    source.add_argument(
        "--calibration_file", type=named_path, help="a text file to calibrate int4 on"
    )
    source.add_argument(
        "--calibration_tasks", nargs="+", metavar="TASK", help="lm-eval tasks to calibrate on"
    )
    add("--include_path", type=named_path, help="a folder with further lm-eval tasks")
    limit = bounded(int, 1, 2**31)
    add("--calibration_limit", type=limit, default=128, help="sequences (default: 128)")
    about = "tokens in each (default: 512, or the model's context)"
    add("--calibration_seq_length", type=bounded(int, 2), metavar="N", help=about)
    add("--pad_calibration_inputs", action="store_true", help="use shorter texts, too")
    add("--calibration_seed", type=int, default=0, help="seed of the draw (default: 0)")


def task_texts(name: str, include_path: Path | None) -> list[str]:
    """The texts of an lm-eval task, or of the tasks of a glob; `UserError` on an unknown one."""
    manager, names = tasks.find([name], include_path)
    requests = []
    with tasks.explaining(names):
        for task in manager.load(names)["tasks"].values():
            task.build_all_requests(rank=0, world_size=1)
            requests += [request.args for request in task.instances]
    return ["".join(part for part in args if isinstance(part, str)) for args in requests]


def in_turn(streams: Iterable[Iterator]) -> Iterator:
    """Round-robin over the streams until all are exhausted."""
    while streams:
        going = []
        for stream in streams:
            for item in itertools.islice(stream, 1):
                yield item
                going.append(stream)
        streams = going


def calibration_sequences(
    sources: list[list[str]],
    tokenizer: Tokenizer,
    length: int,
    limit: int,
    keep_short: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Up to `limit` pieces of `length` tokens, including BOS where prompts have one.

    Each of the `sources` is a list of texts. Pieces are drawn round-robin over sources, and within
    a source over its texts; those of a text are shuffled. The shorter piece at a text's end is kept
    only with `keep_short`. `UserError` if there is no piece at all.
    """
    shuffled = random.Random(seed)
    bos = tokenizer.encode("")

    def pieces(text: str) -> Iterator[Tensor]:
        parts = torch.tensor(tokenizer.encode(text, bos=False)).split(length - len(bos))
        whole = [part for part in parts if len(part) == length - len(bos) or keep_short]
        for part in shuffled.sample(whole, len(whole)):
            if len(part):
                yield torch.cat((torch.tensor(bos, dtype=torch.long), part))

    streams = [in_turn(map(pieces, shuffled.sample(texts, len(texts)))) for texts in sources]
    found = list(itertools.islice(in_turn(streams), limit))
    if not found:
        raise UserError(
            f"no calibration text has {length} tokens; take longer texts, lower "
            "--calibration_seq_length or add --pad_calibration_inputs"
        )
    return found


def read_sequences(args: Namespace, folder: Path, context: int) -> list[Tensor] | None:
    """The sequences that the flags ask for, or None; prints a note if there is too little text."""
    length = args.calibration_seq_length or min(512, context)
    if length > context:
        what = f"--calibration_seq_length {length} is over the model's context"
        raise UserError(f"{what}, {context}; lower it")
    if args.calibration_file:
        sources = [[read_text(args.calibration_file)]]
    elif args.calibration_tasks:
        sources = [task_texts(name, args.include_path) for name in args.calibration_tasks]
    else:
        return None
    sequences = calibration_sequences(
        sources,
        Tokenizer.from_folder(folder),
        length,
        args.calibration_limit,
        args.pad_calibration_inputs,
        args.calibration_seed,
    )
    if len(sequences) < args.calibration_limit:
        print(
            f"[calibrating on {len(sequences)} sequences, {sum(map(len, sequences))} tokens: there "
            f"is no text for the {args.calibration_limit} of --calibration_limit]",
            file=sys.stderr,
        )
    return sequences
