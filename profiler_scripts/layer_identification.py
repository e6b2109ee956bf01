"""Lists every Linear of a checkpoint: shape, size, scheme, and share of the model.

    python profiler_scripts/layer_identification.py --model_path model.pth --report_file report.md

The names are those of `quantize.py --critical_layers`. With a report of layer_accuracy_analysis.py
(.md, .txt or .csv), each Linear's rank in it is listed as well.
"""

from __future__ import annotations

import csv
import math
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import nn

from cli import Parser, UserError, named_path
from engine import load_model
from files import read_text
from linear import Linear
from model import Transformer
from process import run
from profiler_scripts.profiler_analysis import table
from ranges import scheme_of

RANKING = {"rank": "rank", "layer": "name", "scheme": "scheme", "saved": "saved"}  # md: csv


def unique_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors, counting shared ones once."""
    return sum(tensor.nbytes for tensor in module.parameters())


def list_linears(model: Transformer) -> list[dict]:
    """A row for each Linear, in model order."""
    rows, whole = [], unique_bytes(model)
    for name, linear in model.named_modules():
        if isinstance(linear, Linear):
            experts = f"{linear.experts} x " if linear.experts else ""
            weights = linear.in_features * linear.out_features * max(linear.experts, 1)
            bias = 0 if linear.bias is None else linear.bias.numel()
            size = unique_bytes(linear)
            row = {"layer": name, "shape": f"{experts}{linear.out_features} x {linear.in_features}"}
            row |= {"parameters": weights + bias, "bytes": size, "stored as": scheme_of(linear)}
            rows.append(row | {"share (%)": 100 * size / whole})
    return rows


def read_ranking(path: Path) -> dict[str, dict]:
    """Rank, proposed scheme and saved loss by layer, from a report; `UserError` if it has none."""
    text, found = read_text(path), []
    if path.suffix == ".csv":
        keys = RANKING
        try:
            found = [row for row in csv.DictReader(text.splitlines()) if row.get("row") == "layer"]
        except csv.Error as error:
            raise UserError(f"cannot read {path} ({error}); make the report again") from None
    else:
        keys, titles = {key: key for key in RANKING}, []
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[:2] == ["rank", "layer"]:
                titles = cells
            elif titles and len(cells) == len(titles) and cells[0].isdecimal():
                found.append(dict(zip(titles, cells, strict=True)))
    rows = [{key: row.get(keys[key]) for key in RANKING} for row in found]
    if not rows or not all(row["layer"] for row in rows):
        raise UserError(
            f"{path} has no ranking of layers; make one with layer_accuracy_analysis.py, "
            "as .md, .txt or .csv"
        )
    for row in rows:
        try:
            row |= {"rank": int(row["rank"]), "saved": float(row["saved"])}
            if not math.isfinite(row["saved"]):
                raise ValueError
        except (TypeError, ValueError):
            what = f"{path} ranks {row['layer']} {row['rank']!r} and saves {row['saved']!r} by it"
            raise UserError(f"{what}, which should be numbers; make the report again") from None
    return {row["layer"]: row for row in rows}


def add_ranking(rows: list[dict], path: Path) -> None:
    """Append a report's columns to the rows; `UserError` if it belongs to another model."""
    ranking = read_ranking(path)
    for row in rows:
        if row["layer"] not in ranking:
            raise UserError(f"{path} is of another model: it does not rank {row['layer']}")
        found = ranking[row["layer"]]
        row |= {"rank": found["rank"], "proposed": found["scheme"], "saved by int8": found["saved"]}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.group("checkpoint and report")
    add("--model_path", type=named_path, required=True, help="any checkpoint")
    add("--report_file", type=named_path, help="a report of layer_accuracy_analysis.py, to read")
    return parser


def main(args: Namespace) -> None:
    model = load_model(args.model_path, "cpu")
    rows = list_linears(model)
    if args.report_file:
        add_ranking(rows, args.report_file)
    print(table([*rows[0]], [row.values() for row in rows]))
    parameters = sum(row["parameters"] for row in rows)
    size, whole = sum(row["bytes"] for row in rows), unique_bytes(model)
    print(f"{len(rows)} Linears: {parameters:,} parameters, {size:,} bytes of {whole:,}", end="")
    print(f" ({100 * size / whole:.2f} %), {8 * size / parameters:.4f} bits a parameter")
    if model.output.weight is model.tok_embeddings.weight:
        print("output.weight is the embedding itself: one tensor, counted once in the whole")


if __name__ == "__main__":
    run(main, make_parser())
