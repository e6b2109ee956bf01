"""A conversation: its commands, a context that fills up, statistics that stay out of the way."""

import json
import re

import pytest

from chat import COMMAND
from test_generate import command

FLAGS = ("--interactive", "--max_new_tokens", 6)


@pytest.fixture
def talk(monkeypatch, capsys, checkpoint):
    """Say these lines; the answers and what is on standard error."""
    common = ("--checkpoint_path", checkpoint, "--device", "cpu", "--precision", "float32")

    def talk(*lines, flags=()) -> tuple[list[str], str]:
        stdin = "\n".join(lines) + "\n"
        code, out, err = command(monkeypatch, capsys, *common, *FLAGS, *flags, stdin=stdin)
        assert code == 0
        return [text.removesuffix("\n") for text in out.split("> ")[1:-1]], err

    return talk


def answers(texts: list[str]) -> list[str]:
    return [text for text in texts if text]


def test_retry_answers_the_same_message_with_another_seed(talk, tmp_path):
    file = tmp_path / "figures.json"
    texts, _ = talk("hello", "/retry", "/retry", "and", flags=("--json", file))
    first, second, third, _ = answers(texts)
    assert len({first, second, third}) == 3
    sizes = [each["prompt_tokens"][0] for each in json.loads(file.read_text())["samples"]]
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3]  # the answers did not pile up
    texts, _ = talk("hello", "/retry", flags=("--temperature", 0))
    assert texts[0] == texts[1] != ""
    assert "no answer yet" in talk("/retry")[1]
    assert "no answer yet" in talk("hello", "/reset", "/retry")[1]


def test_a_retried_conversation_goes_on_as_if_the_last_answer_were_the_only_one(talk):
    flags = ("--temperature", 0)
    once, _ = talk("hello", "and then?", flags=flags)
    again, _ = talk("hello", "/retry", "/retry", "and then?", flags=flags)
    assert once[-1] == again[-1]


def test_the_system_prompt_can_be_set_changed_and_dropped(talk):
    flags = ("--temperature", 0)
    (plain,), _ = talk("hello", flags=flags)
    (expected,), _ = talk("hello", flags=(*flags, "--system_prompt", "Be brief."))
    texts, err = talk("/system Be brief.", "hello", flags=flags)
    assert answers(texts) == [expected] != [plain] and "system prompt is set" in err
    texts, _ = talk("/system Other", "/reset", "/system Be brief.", "hello", flags=flags)
    assert answers(texts) == [expected]
    texts, err = talk("/system", "hello", flags=(*flags, "--system_prompt", "Be brief."))
    assert answers(texts) == [plain] and "no system prompt now" in err
    later, _ = talk("hello", "/system Be brief.", "/retry", flags=flags)
    assert later[-1] == expected  # what was said stays
    assert "leave --no-chat out" in talk("/system x", flags=("--no-chat",))[1]


def test_commands_are_listed_and_unknown_ones_answered(talk):
    texts, err = talk("/help", "/what now", "/", "/quit now", "hello")
    assert answers(texts) == []
    for name in ("/retry", "/system TEXT", "/reset", "/quit", "Ctrl-C"):
        assert name in err
    assert err.count("there is no command") == 2 and "/what; /help lists them" in err


def test_a_path_or_a_line_after_a_space_is_no_command(talk):
    assert not any(COMMAND.fullmatch(line) for line in ("/usr/bin", " /reset", "a /reset", "//"))
    texts, err = talk("/usr/bin?", " /reset")
    assert len(answers(texts)) == 2 and "no command" not in err


def test_the_use_of_the_context_is_shown_when_it_nears_its_end(talk):
    use = re.compile(r"context: (\d+) of 100 positions")
    assert not use.search(talk("hi", flags=("--max_seq_length", 100))[1])
    _, err = talk("hi" * 32, flags=("--max_seq_length", 100))
    assert 80 < int(use.search(err)[1]) <= 100


def test_quiet_prints_no_statistics(talk):
    loud, quiet = (talk("hello", flags=flags)[1] for flags in ((), ("--quiet",)))
    assert "tokens/s" in loud and "peak memory" in loud and "\033" not in loud
    assert quiet.splitlines() == [line for line in loud.splitlines() if "[" not in line]


def test_statistics_are_dim_on_a_terminal(talk, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _, err = talk("hello")
    assert "\033[2m[" in err and "GB/s]\033[0m\n" in err
