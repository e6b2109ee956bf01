"""A conversation on the terminal: line editing, commands, and reuse of the KV cache."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

from cli import UserError, replaced
from prompts import check_prompt, initial_messages, read_stdin, tokenize, user_message

HELP = """/retry          answer the last message again
/system TEXT    set the system prompt, or remove it if TEXT is empty
/reset          start a new conversation
/quit, Ctrl-D   quit
Ctrl-C          stop an answer
A line that begins with a space is never a command."""
COMMAND = re.compile(r"/(\w*)(?:\s+(.*))?", re.DOTALL)
TTY_LINE = 4095  # bytes: without readline, Linux drops the rest of a longer line
NEARLY_FULL = 0.8  # of the cache: from here on each turn reports its use


def edits_lines() -> bool:
    """Whether `input` has line editing and unlimited lines, by `readline`.

    GNU's takes a paste of several lines as one line; editline, on macOS, does not.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        import readline
    except ImportError:
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    return True


def read_line() -> str:
    """The next line that the user types; /quit at the end of input, "" after Ctrl-C."""
    whole = edits_lines() or not sys.stdin.isatty()
    try:
        if sys.stdin.isatty():
            text = input("> ")
        else:
            print("> ", end="", flush=True)
            text = read_stdin(sys.stdin.readline) or "/quit"
    except EOFError:
        return "/quit"
    except KeyboardInterrupt:
        print()
        return ""
    if not whole and len(text.encode(errors="replace")) >= TTY_LINE:
        cut = f"the terminal may have cut this line at {TTY_LINE} bytes, so it is ignored"
        print(f"{cut}; pipe the text in, or do not redirect standard output", file=sys.stderr)
        return ""
    return text.rstrip()


def say(text: str) -> None:
    print(text, file=sys.stderr)


class Conversation:
    """The messages so far, and the tokens that the KV cache holds.

    `session` is generate.py's: it has an engine, a tokenizer and the flags, and prints answers.
    """

    def __init__(self, session: Any):
        self.session, self.args = session, session.args
        self.reset()

    def reset(self) -> None:
        self.messages, self.cached = initial_messages(self.args), []

    def answer(self, messages: list[dict]) -> None:
        """Print the answer to the last message; only tokens that the cache lacks are prefilled."""
        session, model = self.session, self.session.engine.model
        try:
            prompt = tokenize(session.tokenizer, messages, self.args.chat)
            check_prompt(prompt, model)
        except UserError as error:
            return say(f"{error}, or /reset")
        known = os.path.commonprefix([self.cached, prompt[:-1]])  # it takes lists as well as paths
        known = known[: session.engine.rewind(len(known))]
        (reply,) = session.generate_and_print([prompt], len(known))
        # The last token was not fed to the model.
        self.cached = prompt + reply.ids[:-1] if reply.ids else known
        self.messages = [*messages, {"role": "assistant", "content": reply.text}]
        used, size = len(prompt) + len(reply.ids), model.max_seq_length
        if used > NEARLY_FULL * size:
            say(f"[context: {min(used, size)} of {size} positions in use; /reset clears it]")

    def retry(self) -> None:
        """Answer the last message again, with the next seed."""
        if self.messages[-1:] and self.messages[-1]["role"] == "assistant":
            self.answer(self.messages[:-1])
        else:
            say("there is no answer yet to retry")

    def set_system(self, text: str) -> None:
        """Replace the system prompt of the conversation."""
        if not self.args.chat:
            return say("plain text has no system prompt; leave --no-chat out")
        self.args = replaced(self.args, system_prompt=text)
        said = [message for message in self.messages if message["role"] != "system"]
        self.messages = initial_messages(self.args) + said
        say("the system prompt is set" if text else "there is no system prompt now")

    def command(self, name: str, text: str) -> None:
        """Run a command."""
        if name == "reset":
            self.reset()
        elif name == "retry":
            self.retry()
        elif name == "system":
            self.set_system(text)
        elif name == "help":
            say(HELP)
        else:
            say(f"there is no command /{name}; /help lists them")


def converse(session: Any, agree: Callable[[Callable[[], str]], str]) -> None:
    """Chat until /quit or the end of input; `agree` broadcasts what rank 0 reads."""
    conversation = Conversation(session)
    say("/help lists the commands, Ctrl-C stops an answer")
    while True:
        text = agree(read_line)
        match = COMMAND.fullmatch(text)
        if match and match[1] == "quit":
            return
        if match:
            conversation.command(match[1], match[2] or "")
        elif text.strip():
            conversation.answer([*conversation.messages, user_message(text.strip())])
