"""Requests in, records out: another program drives the model, and gets what it would get alone."""

import contextlib
import functools
import json
import random
import re
import shlex
import subprocess
import sys
from queue import SimpleQueue

import pytest
import torch

import generate
import process
from commands import python
from conftest import CONFIG, ROOT, random_model, write_checkpoint
from engine import Engine
from jsonl import waiting
from reuse import CachedRows
from test_generate import command, run_rows

GREEDY = {"temperature": 0, "max_new_tokens": 6}


@pytest.fixture
def run_cli(monkeypatch, capsys, checkpoint):
    common = ("--checkpoint_path", checkpoint, "--device", "cpu", "--precision", "float32")
    return functools.partial(command, monkeypatch, capsys, *common)


@pytest.fixture
def ask(monkeypatch, capsys, checkpoint, tmp_path):
    """Send requests, as objects or as lines, to a generate.py in this process; its records."""

    def ask(requests: list, *flags, end="\n", path=checkpoint) -> list[dict]:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in requests]
        (tmp_path / "requests").write_text("\n".join(lines) + end, errors="surrogateescape")
        common = ["--checkpoint_path", path, "--device", "cpu", "--precision", "float32"]
        argv = ["generate.py", *common, "--jsonl", *flags]
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        with (tmp_path / "requests").open() as stdin, contextlib.suppress(SystemExit):
            monkeypatch.setattr(sys, "stdin", stdin)
            process.run(generate.main, generate.make_parser())
        out, ask.err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()]

    return ask


def last(records: list[dict]) -> dict:
    """The last record of each request, by id."""
    found = [record for record in records if "reason" in record or "error" in record]
    assert len({str(record["id"]) for record in found}) == len(found)
    return {record["id"]: record for record in found}


def texts(records: list[dict]) -> dict:
    """The text of each request; its pieces add up to it."""
    found = {name: record["text"] for name, record in last(records).items() if "text" in record}
    for name, text in found.items():
        assert "".join(r.get("delta", "") for r in records if r["id"] == name) == text
    return found


# ---- Requests ------------------------------------------------------------------------------------


def test_a_request_gets_the_text_that_the_command_line_prints(ask, run_cli):
    flags = ("--max_new_tokens", 12, "--seed", 7, "--top_k", 20, "--temperature", 1.1)
    expected = run_cli("--prompt", "Hello", *flags)[1].removesuffix("\n").removeprefix("Hello")
    values = {"max_new_tokens": 12, "seed": 7, "top_k": 20, "temperature": 1.1}
    found = texts(ask([{"id": "a", "prompt": "Hello"} | values, {"id": 2, "prompt": "Hello"}]))
    assert found["a"] == expected != found[2]
    records = ask([{"id": 1, "prompt": "Hello"}, {"id": 2, "ids": [*b"Hello"]}], *flags)
    assert texts(records)[1] == expected  # what a request does not say, the flags do
    record = last(records)[1]
    assert record["reason"] == "max_new_tokens" and record["seconds"] > 0
    assert (record["prompt_tokens"], record["new_tokens"]) == (5, 12)


def test_messages_are_a_chat_and_a_prompt_is_one_with_the_flag(ask, run_cli):
    flags = ("--temperature", 0, "--max_new_tokens", 8)
    said = {"role": "user", "content": "Hello"}
    system = {"role": "system", "content": "Be brief."}
    expected = [
        run_cli("--chat", "--prompt", "Hello", *flags, *more)[1].removesuffix("\n")
        for more in ((), ("--system_prompt", "Be brief."))
    ]
    requests = [{"id": 1, "messages": [said]}, {"id": 2, "messages": [system, said]}]
    assert texts(ask(requests, *flags)) == {1: expected[0], 2: expected[1]}
    more = ("--chat", "--system_prompt", "Be brief.")
    assert texts(ask([{"id": 3, "prompt": "Hello"}], *flags, *more)) == {3: expected[1]}


def test_stop_texts_biases_and_log_probabilities_are_a_requests_own(ask):
    plain = {"prompt": "ab"} | GREEDY
    text = texts(ask([{"id": 0} | plain]))[0]
    requests = [
        {"id": 1, "stop": [text[3:5]]} | plain,
        {"id": 2, "stop": []} | plain,
        {"id": 3, "logprobs": 2, "prompt_logprobs": True} | plain,
        {"id": 4, "logit_bias": {"65": 100}, "stop": None} | plain,
        {"id": 5, "logprobs": 0} | plain,
    ]
    records = ask(requests, "--batch_size", 3, "--stop", text[1:3])
    assert texts(records) == {1: text[:3], 2: text, 3: text[:1], 4: "b" * 6, 5: text[:1]}
    assert last(records)[1]["reason"] == "stop"
    known = [r for r in records if r["id"] == 3]
    assert [token["text"] for token in known[0]["prompt_logprobs"]] == ["b"]
    tokens = [token for record in known for token in record.get("tokens", [])]
    assert len(tokens) == last(records)[3]["new_tokens"]
    for token in tokens:
        assert token["logprob"] == token["top"][0]["logprob"] and len(token["top"]) == 2
    others = [token for r in records if r["id"] != 3 for token in r.get("tokens", [])]
    assert len(others) == last(records)[5]["new_tokens"] and not any(t["top"] for t in others)


WRONG = [
    ("{", "not a JSON object"),
    ("[1, 2]", "not a JSON object"),
    ("[" * 100000, "not a JSON object"),
    ("\udcff", "not a JSON object"),
    ('{"id": NaN, "prompt": "a"}', "not a JSON object"),  # the id could not be answered
    ('{"id": [1e999], "prompt": "a"}', "not a JSON object"),
    ({"id": 1}, "one of prompt, messages and ids"),
    ({"prompt": "a", "ids": [1]}, "one of prompt, messages and ids"),
    ({"prompt": None}, "one of prompt"),
    ({"prompt": 5}, "one of prompt"),
    ({"ids": "12"}, "one of prompt"),
    ({"ids": [1, True]}, "one of prompt"),
    ({"ids": [1, -1]}, "one of prompt"),
    ({"ids": []}, "the prompt is empty"),
    ({"ids": [1, 300]}, "has token 300"),
    ({"ids": [1] * 513}, "513 tokens and the cache 512 positions"),
    ({"messages": []}, "one of prompt"),
    ({"messages": [{"role": "user"}]}, "one of prompt"),
    ({"messages": [5]}, "one of prompt"),
    ({"prompt": "a", "max_tokens": 5}, "no key 'max_tokens'"),
    ({"prompt": "a", "checkpoint_path": "x"}, "no key 'checkpoint_path'"),
    ({"prompt": "a", "temperature": "1"}, 'temperature: "1" has the wrong type'),
    ({"prompt": "a", "temperature": -1}, "temperature: '-1' is not a number from 0 to 100"),
    ({"prompt": "a", "temperature": float("nan")}, "temperature: 'nan'"),
    ({"prompt": "a", "top_k": 2.5}, "top_k: '2.5' is not a whole number"),
    ({"prompt": "a", "top_k": True}, "top_k: true has the wrong type"),
    ({"prompt": "a", "seed": [1]}, "seed: [1] has the wrong type"),
    ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens: '0'"),
    ({"prompt": "a", "stop": "x"}, 'stop: "x" has the wrong type'),
    ({"prompt": "a", "stop": [1]}, "stop: [1] has the wrong type"),
    ({"prompt": "a", "stop": [""]}, "stop: an empty text"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias: 'x' is not"),
    ({"prompt": "a", "logit_bias": {"300": 1}}, "the model's are 0 to 299"),
    ({"prompt": "a", "logit_bias": [5]}, "logit_bias: [5] has the wrong type"),
    ({"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs: 1 has the wrong type"),
    ({"prompt": "a", "logprobs": 301}, "the model has only 300 tokens"),
]


def test_a_wrong_request_is_a_record_of_one_sentence_and_ends_nothing(ask):
    requests = [each for each, _ in WRONG]
    records = ask([*requests, {"id": "last", "prompt": "a"} | GREEDY], "--batch_size", 4)
    assert "reason" in records.pop() and all(r["id"] == "last" for r in records[len(WRONG) :])
    for record, (request, words) in zip(records, WRONG, strict=False):
        assert words in record["error"] and "\n" not in record["error"], (request, record)
        assert record["id"] == (request.get("id") if isinstance(request, dict) else None)
    assert f"{len(WRONG) + 1} requests, {len(WRONG)} errors" in ask.err


def test_two_hundred_requests_with_wrong_ones_between_get_what_they_get_alone(ask):
    """In groups and one by one, in another order; greedy and sampled, of many lengths."""
    chooser, requests = random.Random(0), []
    for name in range(200):
        request = {"id": name, "prompt": "".join(chooser.choices("abc ", k=chooser.randint(1, 30)))}
        request |= {"max_new_tokens": chooser.randint(1, 6), "seed": chooser.randint(0, 9)}
        request |= {"temperature": chooser.choice([0, 1.2]), "top_k": chooser.choice([0, 9])}
        requests.append(request)
    wrong = [{"id": f"wrong {i}", "prompt": "a", "top_p": 2} for i in range(20)]
    mixed = requests + wrong
    chooser.shuffle(mixed)
    grouped = ask(mixed, "--batch_size", 5, "--max_seq_length", 64)
    assert "220 requests, 20 errors" in ask.err
    assert sum("error" in record for record in grouped) == 20
    alone = ask(requests, "--max_seq_length", 64)
    assert len(texts(alone)) == 200 and texts(alone) == texts(grouped)


def test_logits_that_are_not_finite_are_an_error_of_the_request(ask, tmp_path):
    path = write_checkpoint(tmp_path / "broken")
    state = torch.load(path)
    state["tok_embeddings.weight"][77, 0] = float("nan")
    torch.save(state, path)
    requests = [
        {"id": i, "ids": ids} | GREEDY for i, ids in enumerate(([5, 77, 9], [5, 9], [5, 9]))
    ]
    bias = {"logit_bias": {"77": -100}}
    found = last(ask([requests[0], requests[1] | bias, requests[2] | bias], path=path))
    assert "NaN or infinite" in found[0]["error"] and found[1]["text"] == found[2]["text"] != ""


def test_requests_speculate_one_by_one(ask):
    requests = [
        {"id": i, "prompt": text} | GREEDY for i, text in enumerate(("ab ab ab", "ab a", "x"))
    ]
    assert texts(ask(requests, "--prompt_lookup")) == texts(ask(requests))


def test_requests_that_wait_run_together():
    lines = SimpleQueue()
    for line in ("a", "b", "c", "d", None):
        lines.put(line)
    assert waiting(lines, 3) == ["a", "b", "c"]
    assert waiting(lines, 3) == ["d", None]


def test_a_contradiction_is_one_sentence(run_cli):
    for flags in (["--prompt", "x"], ["--num_samples", "2"], ["--interactive"]):
        code, out, err = run_cli("--jsonl", *flags)
        assert code == 2 and err.count("\n") == 1 and flags[0] in err and not out


# ---- What the cache holds ------------------------------------------------------------------------


def engine_of(model, rows=1, length=128) -> Engine:
    model.setup_caches(rows, length)
    return Engine(model)


def test_rows_are_shared_copied_and_taken_by_those_that_wait_longest():
    engine, fresh = (engine_of(random_model(CONFIG), rows=3) for _ in range(2))
    cached, system = CachedRows(engine, 3), [*range(40, 70)]
    prompts = [[*system, 1, 2], [9, 8, 7], [*system, 5]]

    def run(group: list[list[int]]) -> tuple[list[int], int]:
        rows, start = cached.place(group)
        batch, expected = [[], [], []], [[], [], []]
        for row, prompt in zip(rows, group, strict=True):
            batch[row] = expected[row] = prompt
        texts = run_rows(engine, batch, n=5, start=start)
        assert texts == run_rows(fresh, expected, n=5)
        for row, prompt in zip(rows, group, strict=True):
            cached.keep(row, prompt, texts[row])
        return rows, start

    assert run(prompts[:1]) == ([0], 0)
    assert run(prompts[1:2]) == ([1], 0)  # row 0 still holds the first
    assert run(prompts[2:]) == ([0], 30)
    assert run([prompts[0], prompts[2]]) == ([0, 2], 30)  # one is copied
    assert run([[*prompts[1], 6]]) == ([1], 3)
    assert run([[3, 3]]) == ([0], 0)  # the row used least recently
    assert run([prompts[2], [4]]) == ([2, 1], 0)
    cached.forget()
    assert cached.place(prompts[2:])[1] == 0


def test_a_conversation_prefills_what_is_new_and_what_decoding_wrote(ask):
    """Decoding by PyTorch's own operations may not write the bits of a prefill (docs/jsonl.md)."""
    first = {"id": 1, "prompt": "Once upon a time"} | GREEDY
    text = texts(ask([first]))[1]
    longer = {"id": 2, "prompt": f"Once upon a time{text} there"} | GREEDY
    other = {"id": 3, "prompt": "Once more"} | GREEDY
    found = last(ask([first, longer, other]))
    sizes = {name: record["prompt_tokens"] - 16 for name, record in found.items()}
    assert found[1]["prefilled_tokens"] == 16 and found[2]["prefilled_tokens"] == sizes[2]
    assert found[3]["prefilled_tokens"] == len(" more") - 1  # "Once " is there
    alone = {name: texts(ask([each]))[name] for name, each in ((2, longer), (3, other))}
    assert {name: found[name]["text"] for name in alone} == alone


def test_a_context_comes_from_the_prefill_cache(ask, run_cli):
    context, flags = "It was a dark night. " * 3, ("--temperature", 0, "--max_new_tokens", 5)
    flags += ("--prefill_context", context)
    expected = [run_cli("--prompt", p, *flags)[1][len(p) : -1] for p in ("So", "But")]
    requests = [{"id": 0, "prompt": "So"}, {"id": 1, "ids": [73, 5]}, {"id": 2, "prompt": "But"}]
    found = last(ask(requests, *flags))
    assert [found[0]["text"], found[2]["text"]] == expected
    assert max(found[i]["prefilled_tokens"] for i in (0, 2)) <= 4  # also where "I" alone was shared


# ---- Pipes ---------------------------------------------------------------------------------------


def start(first: tuple[str, ...], checkpoint, *flags) -> subprocess.Popen:
    command = [*first, ROOT / "generate.py", "--checkpoint_path", checkpoint, "--jsonl"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([*command, "--device", "cpu", *flags], **pipes)


def test_a_client_may_wait_write_first_read_late_and_end_within_a_line(checkpoint):
    process = start(python(), checkpoint)
    request = {"id": 0, "prompt": "ab", "max_new_tokens": 2}
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    while "reason" not in json.loads(process.stdout.readline()):
        pass  # it answers before its input ends
    many = b"".join(
        json.dumps({"id": i, "prompt": "a " * 2000}).encode() + b"\n" for i in range(99)
    )
    process.stdin.write(many)  # more than both pipes hold, and nothing has been read
    process.stdin.write(b'{"id": 100, "pro')
    out, err = process.communicate(timeout=60)
    records = [json.loads(line) for line in out.splitlines()]
    assert process.returncode == 0 and len(records) == 100, err
    assert [record["id"] for record in records] == [*range(99), None]
    assert "not a JSON object" in records[-1]["error"]


@pytest.mark.slow
def test_a_client_that_dies_ends_the_process_quietly(checkpoint):
    # A Python of its own: how it ends while a thread still reads is what may go wrong.
    process = start((sys.executable,), checkpoint, "--quiet")
    lines = b'{"id": 1, "prompt": "ab", "max_new_tokens": 400}\n' * 9
    process.stdin.write(lines)
    process.stdin.flush()
    assert b"delta" in process.stdout.readline()
    process.stdout.close()  # standard input stays open
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stdin.close()
    process.stderr.close()


# ---- docs/jsonl.md -------------------------------------------------------------------------------


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/jsonl.md").read_text(), re.DOTALL)


def test_the_commands_of_the_documentation_work(checkpoint):
    """On a tiny model, whose text means nothing."""
    lines = [line for block in examples("bash") for line in block.splitlines()]
    assert len(lines) == 2
    flags = f"--checkpoint_path {checkpoint} --device cpu --max_new_tokens 4"
    for line, count in zip(lines, (1, 3), strict=True):
        line = line.replace("python generate.py", f"{shlex.join(python())} generate.py {flags}")
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
        found = last([json.loads(record) for record in done.stdout.splitlines()])
        assert sorted(found) == [*range(1, count + 1)], done.stderr
        assert all("reason" in record for record in found.values())


def test_the_python_example_of_the_documentation_works(checkpoint):
    (example,) = examples("python")
    more = f'"--checkpoint_path", {str(checkpoint)!r}, "--device", "cpu"'
    example = example.replace('"--jsonl",', f'"--jsonl", {more},')
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr
