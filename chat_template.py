"""Chat templates, rendered in a separate process.

A template is a Jinja program that comes with the checkpoint: untrusted code. Jinja's sandbox keeps
it away from Python but bounds neither memory nor time; the operating system does, for a process. So
this file is also a script: it reads a request, one line of JSON, and answers with one line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import subprocess
import sys
import time

CPU_SECONDS = 2
MEMORY = 2**30  # bytes of address space; macOS does not enforce the limit
MAX_CHARS = 2**23  # of a prompt: a context of a million tokens fits
TOO_MUCH = f"it needs more than {CPU_SECONDS} seconds or {MEMORY >> 20} MB"

# The chat formats of Llama 3 and Llama 2, for checkpoints without a template.
LLAMA3_CHAT = r"""<|begin_of_text|>{% for message in messages + [{"role": "assistant"}] %}
{{- "<|start_header_id|>" ~ message.role ~ "<|end_header_id|>\n\n" }}
{{- message.content | trim ~ "<|eot_id|>" if not loop.last }}{% endfor %}"""
LLAMA2_CHAT = r"""{% set system = messages[0].content if messages[0].role == "system" %}
{%- for message in messages if message.role != "system" %}
{%- set lead = "<<SYS>>\n" ~ system ~ "\n<</SYS>>\n\n" if system and loop.first %}
{{- "<s>[INST] " ~ (lead ~ message.content) | trim ~ " [/INST]" if message.role == "user"
    else " " ~ message.content | trim ~ " </s>" }}{% endfor %}"""
BUILT_IN = {"<|start_header_id|>": LLAMA3_CHAT, "</s>": LLAMA2_CHAT}  # by a token they use


class Renderer:
    """Renders templates in a process that starts with the first one and is then reused."""

    def __init__(self):
        self.process = None

    def render(self, template: str, variables: dict) -> str:
        """The rendered text; `ValueError` says why it failed."""
        # Reuse a process only once it has answered: an interrupted one would answer late.
        process, self.process = self.process or start(), None
        try:
            process.stdin.write(json.dumps([template, variables]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            self.process = process if answer else None
        except BrokenPipeError:
            answer = ""
        finally:
            if not self.process:
                process.kill()
                process.communicate()
        text, error = json.loads(answer or json.dumps(["", TOO_MUCH]))
        if error:
            raise ValueError(error)
        return text


def start() -> subprocess.Popen:
    """Start this file as a script, in a session that Ctrl-C does not reach."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, __file__], **pipes, start_new_session=True)


# ---- In the process ----------------------------------------------------------------------------


@functools.cache
def compiled(source: str):
    """A template, compiled in the Jinja environment of Hugging Face's transformers."""
    import jinja2.ext
    import jinja2.sandbox

    def fail(message: str):
        raise jinja2.TemplateError(message)

    class Generation(jinja2.ext.Extension):
        """A block that marks, for training, what the model wrote: here it is its body."""

        tags = {"generation"}

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    sandbox.globals |= {"raise_exception": fail, "strftime_now": time.strftime}
    sandbox.filters["tojson"] = lambda x, **k: json.dumps(x, **({"ensure_ascii": False} | k))
    return sandbox.from_string(source)


def limit(kind: int, value: int) -> None:
    """Set a soft resource limit of this process, at most to the hard one."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # a system without this limit
        resource.setrlimit(kind, (value, hard))


def answer(template: str, variables: dict) -> tuple[str, str]:
    """The rendered text and "", or "" and the error."""
    try:
        text = compiled(template).render(**variables)
        if len(text) > MAX_CHARS:
            return "", f"it writes more than {MAX_CHARS} characters"
        return text.encode("utf-8", "replace").decode(), ""
    except MemoryError:
        return "", TOO_MUCH
    except Exception as error:  # a template is a program: it can fail in any way
        return "", " ".join(str(error)[:500].split()) or type(error).__name__


def serve() -> None:
    """Answer requests until the end of input."""
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, MEMORY)
    with contextlib.suppress(MemoryError):  # of a long request: no answer says TOO_MUCH, too
        for line in sys.stdin:
            limit(resource.RLIMIT_CPU, int(time.process_time()) + CPU_SECONDS)
            print(json.dumps(answer(*json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
