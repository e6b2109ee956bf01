"""What each rank of test_tp.py runs: every case of a JSON file, its results saved by rank.

torchrun --nproc_per_node=2 tests/tp_worker.py cases.json results
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tp  # noqa: E402
from engine import Engine, Sampling, generate, load_model  # noqa: E402

PROMPTS = [[5, 9, 200, 31, 7], [77], list(range(20, 70))]


def run_case(path, rows: int, compile: str | None, shard=None) -> dict:
    """Greedy tokens, the logits of the prefill and of a decoding step, and the model's bytes."""
    model = load_model(Path(path), "cpu", torch.float32, shard)
    model.setup_caches(rows, 128)
    engine = Engine(model, compile)
    prompts = PROMPTS[-rows:]
    options = dict(until=lambda _row, _token: False, seeds=[0] * rows)
    steps = generate(engine, prompts, Sampling(temperature=0), 8, **options)
    tokens = [[token and token.id for token in step] for step in steps]
    prefilled = engine.prefill(prompts)
    idx = torch.tensor([[row[-1]] for row in prompts])
    step = engine.decode(idx, torch.tensor([[len(row)] for row in prompts]), 64).logits[:, 0]
    sizes = {name: t.nbytes for name, t in model.state_dict().items()}
    return {"tokens": tokens, "logits": torch.stack((prefilled, step)), "sizes": sizes}


def main(cases: str, results: str) -> None:
    with tp.joined("cpu") as (_, shard):
        outcomes = []
        for case in json.loads(Path(cases).read_text()):
            began = time.perf_counter()
            outcomes.append(run_case(*case, shard=shard))
            print(*case, f"{time.perf_counter() - began:.1f} s", flush=True)
            torch.compiler.reset()
        torch.save(outcomes, f"{results}.{shard.rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
