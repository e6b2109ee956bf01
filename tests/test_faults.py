"""Faults and bad inputs: each is one sentence, exit code 2, and nothing left behind.

A row of the table is what a shell does first (the fault), a command line, and what its error says.
All run in a child of the warm server, in a folder of their own with a tiny model. A child gives up
what root may do beyond others, so that permissions count whoever runs the tests.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from commands import python
from conftest import CONFIG, ROOT, seldom, selected, write_checkpoint

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
# How a child starts: without capabilities, and with the few lines of Python in $FAULT.
START = """
import ctypes, os, runpy, sys
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
sys.path[:1] = [os.environ["ROOT"]]
exec(os.environ.get("FAULT", ""))
sys.argv.pop(0)
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Spares the reading of lm-eval's thousands of task definitions.
FEW_TASKS = "import functools, lm_eval.tasks as t; "
FEW_TASKS += "t.TaskManager = functools.partial(t.TaskManager, include_defaults=False)"
SHELL = """
run() { local script=$ROOT/$1; shift; $PYTHON -c "$START" $script "$@"; }
tiny() { local script=$1; shift; run $script --checkpoint_path model.pth --device cpu "$@"; }
generate() { tiny generate.py --max_new_tokens 4 "$@"; }
quantize() { tiny quantize.py "$@"; }
gptq() { quantize --mode int4-gptq --calibration_seq_length 64 "$@"; }
evaluate() { tiny eval.py "$@"; }
perplexity() { evaluate --perplexity text.txt "$@"; }
against() { perplexity --against model.pth "$@"; }
tasks() { FAULT=$FEW_TASKS evaluate --include_path tasks --tasks pages "$@"; }
benchmark() { tiny scripts/benchmark.py --runs 1 --gen 2 --prompt 4 --no-cold --schemes bf16 "$@"; }
experiment() { tiny scripts/prefill_cache_experiment.py --runs 1 --max_new_tokens 2 "$@"; }
gpu_check() { run scripts/gpu_check.py --device cpu --shapes tiny --stages environment "$@"; }
download() { run scripts/download.py --repo_id a/b "$@"; }
identify() { run profiler_scripts/layer_identification.py --model_path model.pth "$@"; }
accuracy() {
  run profiler_scripts/layer_accuracy_analysis.py --model_path model.pth --device cpu \
    --limit 2 --max_seq_length 8 --report_file r.md "$@"
}
ranked() { accuracy --text text.txt "$@"; }
profile() { run profiler_scripts/profiler_analysis.py --device cpu --output_file o.md "$@"; }
trace() { profile --trace t.json "$@"; }
event() { # a trace of one event: its name, and what else it has
  echo "{\\"traceEvents\\": [{\\"ph\\": \\"X\\", \\"ts\\": 1, \\"dur\\": 2, \\"name\\": \\"$1\\",
    \\"cat\\": \\"user_annotation\\" $2}]}" > t.json
}
task() { # a task on d.json; each argument is a line of its own, which counts if it stands twice
  mkdir tasks
  printf '%s\\n' 'task: pages' 'dataset_path: json' 'test_split: test' 'doc_to_text: ""' \
    'dataset_kwargs: {data_files: {test: d.json}}' "$@" > tasks/pages.yaml
}
rolling() { task 'output_type: loglikelihood_rolling' 'doc_to_target: "{{page}}"' "$@"; }
ranking() { # a report that ranks all layers by the same two words
  echo '| rank | layer | scheme | saved |'
  for i in 0 1; do for name in attention.wqkv attention.wo feed_forward.w1 feed_forward.w3 \
    feed_forward.w2; do echo "| $1 | layers.$i.$name | int8 | $2 |"; done; done
  echo "| $1 | output | int8 | $2 |"
}
"""
LONG = "x" * 300
READ, FULL, CLOSED = "cannot read", "cannot write standard output", "standard output is closed"

# (what is done first, the command line, what the error says)
ROWS = [
    # ---- quantize.py: flags that contradict, or that nothing would read
    ("", "quantize --mode int8 --label a/b", "--label 'a/b'"),
    ("", f"quantize --mode int8 --label {LONG}", "int8.pth cannot be written"),
    ("", "quantize --mode int8 --groupsize 64", "--groupsize goes with int4"),
    ("", "quantize --mode int4 --act_order", "--act_order goes with GPTQ"),
    ("", "quantize --mode int8 --calibration_file text.txt", "--calibration_file goes with int4"),
    ("", "quantize --mode int8 --calibration_tasks x", "--calibration_tasks goes with int4"),
    ("", "quantize --mode int4 --calibration_limit 3", "--calibration_limit goes with --calib"),
    ("", "quantize --mode int4 --calibration_seq_length 9", "--calibration_seq_length goes with"),
    ("", "quantize --mode int4 --pad_calibration_inputs", "--pad_calibration_inputs goes with"),
    ("", "quantize --mode int4 --percdamp 1", "--percdamp goes with GPTQ"),
    ("", "quantize --mode int4 --blocksize 64", "--blocksize goes with GPTQ"),
    ("", "quantize --mode int4 --include_path .", "--include_path goes with --calibration_tasks"),
    ("", "gptq --calibration_file text.txt --include_path .", "--include_path goes with"),
    ("", "quantize --mode int4 --critical_layers output", "goes with --mode hybrid"),
    ("", "quantize --mode int8 --gptq", "--gptq goes with --mode hybrid"),
    ("", "gptq", "pass --calibration_file or --calibration_tasks"),
    ("", "gptq --calibration_file text.txt --calibration_tasks x", "not allowed with argument"),
    ("", "quantize --mode int3", "invalid choice: 'int3'"),
    ("", "quantize --mode int8 extra", "unrecognized arguments: extra"),
    # ---- quantize.py: values, files and folders
    ("", "gptq --calibration_file text.txt --calibration_seq_length 600", "context, 512; lower it"),
    ("", "gptq --calibration_file text.txt --calibration_seq_length 9999999999999", "context, 512"),
    ("", "gptq --calibration_file text.txt --calibration_limit 99999999999999", "--calibration_l"),
    ("", "gptq --calibration_file text.txt --percdamp nan", "'nan' is not a number from 0 to 100"),
    ("", "gptq --calibration_file text.txt --percdamp inf", "'inf' is not a number from 0 to 100"),
    ("", "gptq --calibration_file text.txt --blocksize 0", "'0' is not a whole number of at least"),
    ("", "gptq --calibration_file nowhere", f"{READ} nowhere"),
    ("", "gptq --calibration_file .", f"{READ} . ([Errno 21] Is a directory"),
    ("", "gptq --calibration_file model.pth", f"{READ} model.pth ('utf-8' codec"),
    (": > empty", "gptq --calibration_file empty", "no calibration text has 64 tokens"),
    ("chmod 0 text.txt", "gptq --calibration_file text.txt", "Permission denied: 'text.txt'"),
    (": > names", "quantize --mode hybrid --critical_layers @names", "@names names no layer"),
    ("", "quantize --mode hybrid --critical_layers @nowhere", f"{READ} nowhere"),
    ("", "quantize --mode hybrid --critical_layers '['", "there is no layer '['"),
    ("mkdir model_int8.pth", "quantize --mode int8", "model_int8.pth cannot be written"),
    ("chmod 555 .", "quantize --mode int8", "model_int8.pth cannot be written"),
    ("chmod 0 .", "quantize --mode int8", f"{READ} model.pth (Permission denied)"),
    ("", "ulimit -f 20; quantize --mode int8", "cannot write model_int8.pth ([Errno 27]"),
    ("", "ulimit -f 100; quantize --mode int8", "cannot write model_int8.pth ([Errno 27]"),
    (
        "",
        "FAULT='import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9, 9, 9)' "
        "quantize --mode int8",
        "make room there",
    ),
    # ---- lm-eval's tasks, for every script that reads them
    ("rolling", "tasks", "d.json"),
    ("rolling; echo '{\"page\": ' > d.json", "tasks", "JSON parse error"),
    ('rolling; echo \'{"other": "a"}\' > d.json', "tasks", "'page' is undefined"),
    (
        "rolling 'test_split: train'; echo '{\"page\": \"a\"}' > d.json",
        "tasks",
        "KeyError: 'train'",
    ),
    (
        'task \'doc_to_target: "{{page"\'; echo \'{"page": "a"}\' > d.json',
        "tasks",
        "end of template",
    ),
    ("task 'output_type: none'", "tasks", "invalid output_type 'none'"),
    ("mkdir tasks; echo 'task: [' > tasks/a.yaml", "tasks", "knows no task 'pages'"),
    ("mkdir tasks", "tasks", "knows no task 'pages'"),
    ("", "tasks", "--include_path tasks is no folder"),
    (": > tasks", "tasks", "--include_path tasks is no folder"),
    ("mkdir -m 0 tasks", "tasks", "--include_path tasks may not be read"),
    (
        "task 'output_type: generate_until' 'doc_to_target: a' "
        "'generation_kwargs: {until: x, top_k: hot}'; echo '{\"page\": \"a\"}' > d.json",
        "tasks",
        "generation_kwargs of a task: top_k: 'hot' is not a whole number",
    ),
    (
        "rolling; echo '{' > d.json",
        "FAULT=$FEW_TASKS gptq --include_path tasks --calibration_tasks pages",
        "JSON parse error",
    ),
    (
        "rolling 'dataset_path: some/pages'",
        "FAULT=$FEW_TASKS HF_HUB_OFFLINE=1 gptq --include_path tasks --calibration_tasks pages",
        "lm-eval cannot run pages",
    ),
    (
        "rolling; echo '{' > d.json",
        "FAULT=$FEW_TASKS accuracy --include_path tasks --metric pages",
        "JSON parse error",
    ),
    (
        "",
        "FAULT='import sys; sys.modules[\"lm_eval.tasks\"] = None' gptq --calibration_tasks x",
        "needs the package lm-eval",
    ),
    # ---- eval.py and compare.py
    ("", "perplexity --limit 3", "--limit goes with --tasks"),
    ("", "perplexity --num_fewshot 0", "--num_fewshot goes with --tasks"),
    ("", "perplexity --include_path .", "--include_path goes with --tasks"),
    ("", "perplexity --max_new_tokens 3", "--max_new_tokens goes with --against"),
    ("", "perplexity --max_kl 3", "--max_kl goes with --against"),
    ("", "perplexity --prompt a", "--prompt goes with --against"),
    ("", "evaluate --tasks x --stride 3", "--stride goes with --perplexity"),
    ("", "evaluate --tasks x --against model.pth", "--against needs a text"),
    ("", "evaluate", "one of the arguments --tasks --perplexity is required"),
    ("", "evaluate --perplexity nowhere", f"{READ} nowhere"),
    ("", "evaluate --perplexity .", f"{READ} . ([Errno 21]"),
    ("", "evaluate --perplexity model.pth", "'utf-8' codec"),
    (": > empty", "evaluate --perplexity empty", "empty is empty"),
    ("chmod 0 text.txt", "perplexity", "Permission denied: 'text.txt'"),
    ("", "perplexity --stride 999999999999999999999", "over the window, 512"),
    ("", "perplexity --max_seq_length 9999", "over the model's context, 512"),
    ("", "perplexity --against nowhere", "no checkpoint nowhere"),
    ("", "perplexity --against text.txt", "not a whole state dict"),
    ("mkdir folder", "perplexity --against folder", "cannot read folder/tokenizer.json"),
    ("", "against --prompt ''", "--prompt is empty"),
    ("", "against --max_kl nan", "'nan' is not a number"),
    ("", "against --max_new_tokens 99999999999999999999", "over the context of model.pth, 512"),
    ("", "against --against_device gpu", "'gpu' cannot be used here"),
    ("", "perplexity --output_path .", "'.' cannot be written"),
    ("", "perplexity --output_path text.txt/x", "'text.txt/x' cannot be written"),
    ("mkdir -m 555 folder", "perplexity --output_path folder/x", "'folder/x' cannot be written"),
    ("", f"perplexity --output_path {LONG}", "cannot be written"),
    ("ln -s a b; ln -s b a", "perplexity --output_path a/x", "'a/x' cannot be written"),
    (
        "",
        "evaluate --perplexity short --output_path /dev/full",
        "cannot write /dev/full ([Errno 28]",
    ),
    ("", "ulimit -f 0; evaluate --perplexity short --output_path o.json", "o.json ([Errno 27]"),
    # ---- benchmark.py
    ("", "benchmark --model tinyllama-1.1b", "leave it or --checkpoint_path out"),
    ("", "benchmark --schemes ''", "'' is none of bf16, int8"),
    ("", "benchmark --schemes bf16,,int8", "'' is none of bf16, int8"),
    ("", "benchmark --depth 1,a", "'a' is not a whole number"),
    ("", "benchmark --depth -1", "'-1' is not a whole number"),
    ("", "benchmark --depth 513", "--depth 513 is beyond the model's context of 512"),
    ("", "benchmark --gen 99999999999999999999999", "'99999999999999999999999' is not a whole"),
    ("", "benchmark --prompt 99999", "--prompt 99999 is beyond the model's context"),
    ("", "benchmark --threads 99999999999999999999", "from 1 to 4096"),
    ("", "benchmark --peers x", "'x' is none of llama.cpp, transformers"),
    ("", "benchmark --draft nowhere", "no checkpoint nowhere"),
    ("", "benchmark --draft .", ". is a folder"),
    ("", "benchmark --schemes int4 --groupsize 128", "--groupsize 32 or 64 fits"),
    ("", "benchmark --json text.txt/x", "'text.txt/x' cannot be written"),
    ("", "benchmark --markdown .", "'.' cannot be written"),
    # ---- prefill_cache_experiment.py, and the folder of the prefill cache
    ("", "experiment --contexts nowhere", "No such file or directory: 'nowhere'"),
    ("", "experiment --contexts model.pth", "'utf-8' codec"),
    (": > empty", "experiment --contexts empty", "is empty"),
    ("", "experiment --contexts text.txt --prompt ''", "--prompt is empty"),
    ("", "experiment --contexts text.txt", "the longest context needs a cache of"),
    ("", "experiment --contexts short --runs 0", "'0' is not a whole number of at least 1"),
    ("", "experiment --contexts short --output .", "'.' cannot be written"),
    ("", "ulimit -f 2; experiment --contexts short", "set TMPDIR to a folder with room"),
    ("", "generate --prefill_context a --prefill_cache text.txt", "File exists: 'text.txt'"),
    ("", "generate --prefill_context a --prefill_cache text.txt/x", "Not a directory"),
    ("mkdir -m 555 c", "generate --prefill_context a --prefill_cache c", "c cannot be written"),
    ("mkdir -m 0 c", "generate --prefill_context a --prefill_cache c", "c cannot be written"),
    # ---- gpu_check.py
    ("", "gpu_check --device cuda", "there is no CUDA device"),
    ("", "gpu_check --device gpu", "'gpu' cannot be used here"),
    ("", "gpu_check --shapes llama-3-8b", "takes hours on a CPU"),
    ("", "gpu_check --shapes x", "'x' is none of"),
    ("", "gpu_check --stages x", "'x' is none of environment"),
    ("", "gpu_check --modes ''", "'' is none of fused"),
    ("", "gpu_check --budget nan", "'nan' is not a number"),
    ("", "gpu_check --before nowhere", "no scripts/gpu_check.py in 'nowhere'"),
    ("", f"gpu_check --before {LONG}", "there is no scripts/gpu_check.py in"),
    ("", "gpu_check --json .", "'.' cannot be written"),
    ("", "gpu_check --markdown /dev/full", "cannot write /dev/full ([Errno 28]"),
    ("", "ulimit -f 0; gpu_check", "set TMPDIR to a folder with room"),
    # ---- download.py
    ("", "download", "cannot reach http://127.0.0.1:9/a/b"),
    ("", "download --repo_id ''", "'' is no model's name"),
    ("", "download --repo_id ../../etc", "'../../etc' is no model's name"),
    ("", f"download --repo_id {LONG}", "is no model's name"),
    ("", "download --hf_token é", "a character that no token has"),
    ("", "HF_HUB_OFFLINE=1 download", "HF_HUB_OFFLINE is set"),
    ("", "HF_ENDPOINT=x download", "cannot reach x/a/b"),
    ("", "HF_ENDPOINT='http://[' download", "huggingface_hub refuses a variable"),
    ("", "HF_ENDPOINT=http://127.0.0.1:99999 download", "huggingface_hub refuses a variable"),
    ("", "HF_HUB_ETAG_TIMEOUT=x download", "HF_HUB_ETAG_TIMEOUT"),
    ("", "HTTP_PROXY=x://y download", "check HF_ENDPOINT, and HTTPS_PROXY"),
    ("", "SSL_CERT_FILE=/nowhere download", "SSL_CERT_FILE"),
    ("", "HF_HOME=text.txt download", "Not a directory: 'text.txt/token'"),
    # ---- profiler_scripts/
    ("", "identify --report_file nowhere", f"{READ} nowhere"),
    (": > r.md", "identify --report_file r.md", "r.md has no ranking of layers"),
    ("ranking 1 word > r.md", "identify --report_file r.md", "'word' by it, which should be"),
    ("ranking 1 nan > r.md", "identify --report_file r.md", "saves nan by it, which should be"),
    ("ranking 1 1e999 > r.md", "identify --report_file r.md", "saves inf by it, which should"),
    ("ranking 1.5 2 > r.md", "identify --report_file r.md", "r.md has no ranking of layers"),
    ("ranking ² 2 > r.md", "identify --report_file r.md", "has no ranking of layers"),
    ("echo row,rank; echo layer,1 > r.csv", "identify --report_file r.csv", "has no ranking"),
    (
        "printf 'row,rank,name,scheme,saved\\nlayer,x,output,int8,1' > r.csv",
        "identify --report_file r.csv",
        "r.csv ranks output 'x'",
    ),
    ("", "ranked --report_file r.doc", "should end in one of .txt, .md, .csv, .png"),
    ("", "ranked --metric none --include_path .", "--text goes with --metric kl"),
    ("", "ranked --include_path .", "--include_path goes with --metric TASK"),
    ("", "ranked --text nowhere", f"{READ} nowhere"),
    ("echo few tokens > few", "ranked --text few", "few has 11 tokens and 32 are needed"),
    ("", "ranked --max_seq_length 999999999", "over the model's context, 512"),
    ("", "ranked --budget nan", "'nan' is not a number from 0 to 16"),
    ("", "ranked --random_choices 99999999999999999", "from 2 to 10000"),
    ("", "ranked --groupsize 128", "--groupsize 32 or 64 fits"),
    ("", "ranked --layers_file r.png", "r.png is read by this run"),
    ("", "ranked --report_file text.txt", "text.txt is read by this run"),
    ("mkdir r.png", "ranked", "r.png cannot be written"),
    ("mkdir r.md.state.json", "ranked", "r.md.state.json cannot be written"),
    ("chmod 555 .", "ranked", "'r.md' cannot be written"),
    ("echo x > r.md.state.json", "ranked", "r.md.state.json as JSON"),
    ("truncate -s 1T r.md.state.json", "ranked", "has 1099511627776 bytes, over the limit"),
    ("echo '{\"of\": 3}' > r.md.state.json", "ranked", "of an interrupted run with another"),
    ("", "FAULT='import sys; sys.modules[\"matplotlib.figure\"] = None' ranked", "need matplotlib"),
    ("", "profile", "pass --model_path with checkpoints, or --trace"),
    ("", "profile --trace a a", "named twice"),
    ("", "profile --trace nowhere", f"{READ} nowhere (No such file or directory); make a trace"),
    ("", "profile --trace /dev/zero", "/dev/zero is not a regular file; make a trace"),
    ("truncate -s 1T t.json", "trace", "t.json has 1099511627776 bytes"),
    ("truncate -s 1T t.json.gz", "profile --trace t.json.gz", "t.json.gz has 1099511627776 bytes"),
    ("", "profile --trace text.txt --output_file o.doc", "should end in one of"),
    ("cp text.txt t.json", "trace", "t.json as a chrome trace (JSONDecodeError"),
    ("echo '[]' > t.json", "trace", "t.json as a chrome trace (TypeError"),
    ("echo '{\"traceEvents\": 5}' > t.json", "trace", "t.json as a chrome trace (TypeError"),
    ("echo '{\"traceEvents\": []}' > t.json", "trace", "t.json has no step of a model in it"),
    ("echo '{\"traceEvents\": [1]}' > t.json", "trace", "t.json as a chrome trace (Attribute"),
    ("$PYTHON -c 'print(\"[\" * 100000)' > t.json", "trace", "RecursionError"),
    ("event 'tokenbus: Decode'", "trace", "no range the name 'tokenbus: Decode'"),
    ("event 'tokenbus: Decode - - x B'", "trace", "no range the name 'tokenbus: Decode - - x B'"),
    ("event 'tokenbus: Lines - - 0 B'", "trace", "no range the name 'tokenbus: Lines"),
    ("event 'tokenbus: Decode - - 0 B' ', \"dur\": -1'", "trace", "an event has the times"),
    ("event 'tokenbus: Decode - - 0 B' ', \"ts\": NaN'", "trace", "an event has the times"),
    ("event 'tokenbus: Decode - - 0 B' ', \"ts\": 1'$(printf %0400d)", "trace", "OverflowError"),
    ("event 'tokenbus: Decode - - 0 B' ', \"dur\": 1.7e308'", "trace", "an event has the times"),
    ('event "tokenbus: Decode - - 1$(printf %05000d) B"', "trace", "no range the name"),
    ('event "tokenbus: Linear int4 layers.0.wo 1$(printf %0400d) B"', "trace", "no range"),
    ("event 'tokenbus: Decode - - 0 B' ', \"args\": 7'", "trace", "TypeError"),
    ("event 'tokenbus: Decode - - 0 B' ', \"name\": 7'", "trace", "TypeError"),
    ("cp text.txt t.json.gz", "profile --trace t.json.gz", "BadGzipFile"),
    (
        "printf '\\x1f\\x8b\\x08\\x00aaaaaaaaaaaaaaaaaaaa' > t.json.gz",
        "profile --trace t.json.gz",
        "t.json.gz as a chrome trace (error",
    ),
    ("", "profile --model_path model.pth --prompt_tokens 9999", "model.pth is 512; lower them"),
    (
        "",
        "ulimit -f 2; profile --model_path model.pth --prompt_tokens 4 --max_new_tokens 2",
        "trace.json (nothing was written)",
    ),
    # ---- Files without an end, and those that would be lost
    ("", "evaluate --perplexity /dev/zero", "/dev/zero has 268435456 characters"),
    ("", "gptq --calibration_file /dev/zero", "/dev/zero has 268435456 characters"),
    ("", "generate --prompts_file /dev/zero", "/dev/zero has 268435456 characters"),
    ("", "generate --prefill_context @/dev/zero", "/dev/zero has 268435456 characters"),
    ("", "ranked --text /dev/zero", "/dev/zero has 268435456 characters"),
    ("", "generate --prompt - < /dev/zero", "standard input is longer than any context"),
    ("", "generate --interactive < /dev/zero", "standard input is longer than any context"),
    ("", "perplexity --output_path text.txt", "text.txt is read by this run"),
    ("", "perplexity --output_path model.pth", "model.pth is read by this run"),
    ("", "experiment --contexts short --output short", "short is read by this run"),
    ("", "experiment --contexts short --output config.json", "config.json is read by this run"),
    ("", "perplexity --output_path config.json", "config.json is read by this run"),
    ("", "ranked --layers_file config.json", "config.json is read by this run"),
    ("", "benchmark --json config.json", "config.json is read by this run"),
    ("", "benchmark --markdown tokenizer.json", "tokenizer.json is read by this run"),
    ("cp model.pth d.pth", "benchmark --draft d.pth --json d.pth", "d.pth is read by this run"),
    (
        "mkdir g; cp *.* g",
        "perplexity --against g/model.pth --output_path g/config.json",
        "g/config.json is read by this run",
    ),
    (
        "mkdir g; cp *.* g",
        "perplexity --against g --output_path g/vocab.json",
        "g/vocab.json is read by this run",
    ),
    (
        "echo output > model_custom_hybrid_int8_int4.g32.pth",
        "quantize --mode hybrid --critical_layers @model_custom_hybrid_int8_int4.g32.pth",
        "is read by this run",
    ),
    # ---- Names that cannot be looked up, or not be written in a report
    ("", f"profile --trace {LONG}", "File name too long"),
    ("mkdir -m 0 d", "profile --trace d/t.json", "Permission denied"),
    ("", f"perplexity --against {LONG}", "File name too long"),
    ("mkdir -m 0 d", "perplexity --against d/x", "cannot read d/x (Permission denied)"),
    ("", f"tasks --include_path {LONG}", "is no folder"),
    ("mkdir -m 0 d", "tasks --include_path d/x", "d/x is no folder"),
    (
        "mkdir -m 0 made",
        "FAULT=$NOWHERE run scripts/default_model.py",
        "made/model.pth can be neither read nor made",
    ),
    ("", "profile --trace $'t\\xff.json'", "is not UTF-8"),
    ("", "ranked --text $'t\\xff'", "is not UTF-8"),
    ("", "benchmark --json $'t\\xff'", "is not UTF-8"),
    ("", "benchmark --draft $'t\\xff'", "is not UTF-8"),
    ("", "benchmark --json o --markdown o", "o is read by this run"),
    ("", "gpu_check --json o --markdown o", "o is read by this run"),
    ("cp short t.md", "profile --trace t.md --output_file t.md", "t.md is read by this run"),
    # ---- What torchrun sets
    ("", "WORLD_SIZE=x generate", "the variable WORLD_SIZE: 'x' is not a whole number"),
    ("", "WORLD_SIZE= generate", "the variable WORLD_SIZE: '' is not a whole number"),
    ("", "WORLD_SIZE=0 quantize --mode int8", "the variable WORLD_SIZE: '0'"),
    ("", "RANK=x perplexity", "the variable RANK: 'x' is not a whole number"),
    ("", "WORLD_SIZE=2 generate", "WORLD_SIZE is set and RANK is not"),
    ("", "WORLD_SIZE=2 RANK=2 generate", "the variable RANK: '2'"),
    ("", "WORLD_SIZE=2 RANK=0 generate", "WORLD_SIZE is set and MASTER_PORT is not"),
    ("", "WORLD_SIZE=2 RANK=0 MASTER_PORT=9 generate", "WORLD_SIZE is set and MASTER_ADDR is not"),
    ("", "WORLD_SIZE=2 RANK=0 MASTER_PORT=x generate", "the variable MASTER_PORT: 'x'"),
    ("", "WORLD_SIZE=2 RANK=0 LOCAL_RANK=x generate", "the variable LOCAL_RANK: 'x'"),
    (
        "",
        "WORLD_SIZE=2 RANK=0 MASTER_PORT=9 MASTER_ADDR=127.0.0.1 TP_TIMEOUT=x generate",
        "the variable TP_TIMEOUT: 'x'",
    ),
    ("", "WORLD_SIZE=2 RANK=0 quantize --mode int8", "this script is of one process"),
    # ---- Standard streams
    *(("", f"{command} >&-", CLOSED) for command in ("generate", "perplexity", "download")),
    *(("", f"{command} >&-", CLOSED) for command in ("quantize --mode int8", "benchmark")),
    *(("", f"{command} >&-", CLOSED) for command in ("identify", "ranked", "profile", "gpu_check")),
    *(("", f"{command} >&-", CLOSED) for command in ("experiment --contexts short",)),
    *(("", f"{command} > /dev/full", FULL) for command in ("generate", "identify", "gpu_check")),
    *(
        ("", f"{command} > /dev/full", FULL)
        for command in ("benchmark", "evaluate --perplexity short")
    ),
    ("", "generate --interactive < text.txt > /dev/full", FULL),
    ("", 'echo \'{"prompt": "a"}\' | generate --jsonl > /dev/full', FULL),
    ("", "PYTHONUNBUFFERED=1 generate > /dev/full", FULL),
    ("", "generate 1< text.txt", f"{FULL} (Bad file descriptor)"),
    ("", "generate --prompt - <&-", "the prompt is empty"),
    ("", "generate --prompt - 0> /dev/null", "the prompt is empty"),
    ("", "generate --json /dev/full", "cannot write /dev/full ([Errno 28]"),
    ("", "generate --profile /dev/full", "cannot write /dev/full ([Errno 28]"),
    ("", "ulimit -f 1; generate --profile o.json", "o.json (nothing was written)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, a text, a short one, and an empty folder for temporary files."""
    folder = write_checkpoint(tmp_path_factory.mktemp("faults"), CONFIG | SHAPE, torch.bfloat16)
    folder = folder.parent
    text = "The quick brown fox jumps over the lazy dog, again and again. " * 30
    (folder / "text.txt").write_text(text)
    (folder / "short").write_text(text[:100])
    (folder / "tmp").mkdir()
    return folder


@pytest.fixture
def home(folder, tmp_path) -> Path:
    """A copy of that folder; the row's own."""
    shutil.copytree(folder, tmp_path / "home")
    yield tmp_path / "home"
    make_removable(tmp_path)


def make_removable(folder: Path) -> None:
    """Open the folders in it that a fault has closed to whoever runs the tests."""
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def environment(home: Path) -> dict:
    ours = ("DEVICE", "WORLD_SIZE", "RANK", "HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"PYTHON": " ".join(python()), "START": START, "ROOT": str(ROOT)}
    env |= {"TMPDIR": str(home / "tmp"), "HF_HOME": str(home.parent / "hf")}
    env |= {"FEW_TASKS": FEW_TASKS, "NOWHERE": NOWHERE}
    return env | {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}


def shell(home: Path, script: str) -> subprocess.CompletedProcess:
    options = dict(cwd=home, env=environment(home), stdin=subprocess.DEVNULL, timeout=120)
    command = ["bash", "-c", SHELL + script]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", **options)


def contents(folder: Path) -> dict[str, str]:
    """What is in a folder: a hash of every file, by its path."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and os.access(path, os.R_OK) and path.stat().st_size < 2**30
        else ""
        for path in paths
    }


def run_row(row: int, folder: Path, base: Path) -> tuple[subprocess.CompletedProcess, bool]:
    """How the command line of a row ended, and whether it left its folder as it was."""
    first, command, _ = ROWS[row]
    shutil.copytree(folder, home := base / str(row))
    shell(home, first)
    before = contents(home)
    done = shell(home, command)
    return done, contents(home) == before


@pytest.fixture(scope="module")
def outcomes(request, folder, tmp_path_factory) -> Iterator[dict[int, Future]]:
    """Those of the selected rows, two at a time."""
    base = tmp_path_factory.mktemp("rows")
    python()  # starts the server
    pool, rows = ThreadPoolExecutor(2), selected(request, "row")
    yield {row: pool.submit(run_row, row, folder, base) for row in rows}
    pool.shutdown(cancel_futures=True)
    make_removable(base)


def name_of(row: int) -> str:
    return f"{row}-{' '.join(ROWS[row][:2])[:70]}"


@pytest.mark.parametrize("row", seldom(range(len(ROWS)), 16, name_of))
def test_a_fault_is_one_sentence_and_leaves_nothing(row, outcomes):
    done, unchanged = outcomes[row].result()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and ROWS[row][2] in last, done.stderr
    assert unchanged


@pytest.mark.parametrize("command", ["generate", "quantize --mode int8", "identify"])
@pytest.mark.parametrize("how", ["2>&-", "2> /dev/full", "<&-"])
def test_a_script_does_its_work_without_standard_error_or_input(home, command, how):
    done, expected = shell(home, f"{command} {how}"), shell(home, command)
    assert done.returncode == 0 and done.stdout == expected.stdout != ""


def test_an_error_begins_on_a_line_of_its_own_below_a_progress_bar(home):
    state = torch.load(home / "model.pth")
    state["layers.1.feed_forward.w2.weight"][0, 0] = float("nan")
    torch.save(state, home / "model.pth")
    done = shell(home, "quantize --mode int8")
    *_, bar, error = done.stderr.splitlines()
    assert done.returncode == 2 and "matrix/s]" in bar
    assert error.startswith("error: model.pth: layers.1.feed_forward.w2.weight has values")


# ---- What a killed process leaves --------------------------------------------------------------

# A quantize.py that stops in the middle of its file.
STUCK = "import checkpoint, time; checkpoint.StateFile.write = lambda *_: time.sleep(60)"
# A default_model.py that stops where pip would run, or where pip has no network.
NOWHERE = "import checkpoint, pathlib, subprocess; "
NOWHERE += "checkpoint.DEFAULT_CHECKPOINT = pathlib.Path('made/model.pth'); "
WAITING = NOWHERE + "import time; subprocess.run = lambda *_, **__: time.sleep(60)"
OFFLINE = NOWHERE + (
    "subprocess.run = lambda *_, **__: subprocess.CompletedProcess((), 1, '', 'ERROR: no network')"
)


@pytest.fixture
def begin(home):
    """Start a script with a fault; return once a temporary file or folder of it is there."""
    processes = []

    def begin(fault: str, pattern: str, script: str, *flags: str) -> subprocess.Popen:
        command = [*python(), "-c", START, ROOT / script, *flags]
        options = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        options |= dict(cwd=home, env=environment(home) | {"FAULT": fault})
        processes.append(process := subprocess.Popen(command, **options))
        while not [*home.glob(pattern)]:
            assert process.poll() is None
            time.sleep(0.02)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()


QUANTIZE = ("--checkpoint_path", "model.pth", "--device", "cpu", "--mode", "int8")
HALFWAY = {
    "quantize": (STUCK, ".*-model_int8.pth", "quantize.py", *QUANTIZE),
    "default_model": (WAITING, "tmp/smollm2-*", "scripts/default_model.py"),
}


@pytest.mark.parametrize("name", HALFWAY)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_script_that_is_told_to_end_leaves_nothing(home, begin, name, number):
    before = contents(home)
    process = begin(*HALFWAY[name])
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    assert contents(home) == before


def test_a_script_that_is_told_to_end_while_it_lays_out_its_file_leaves_nothing(home):
    before = contents(home)
    told = "import checkpoint, io, os\nclass Told(io.FileIO):\n  def write(self, data):\n"
    told += "    self.tell() and os.kill(os.getpid(), 15)\n    return super().write(data)\n"
    done = shell(home, f"FAULT='{told}checkpoint.open = Told' quantize --mode int8")
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
    assert contents(home) == before


def test_the_next_run_removes_what_a_killed_one_left(home, begin):
    before = contents(home)
    for process in [begin(*command) for command in HALFWAY.values()]:
        process.kill()
        process.wait(timeout=30)
    time.sleep(0.5)  # what stands for a child sees it end, and kills it
    assert contents(home) != before
    done = shell(home, f'quantize --mode int8; FAULT="{OFFLINE}" run scripts/default_model.py')
    assert "no network" in done.stderr.splitlines()[-1]
    after = contents(home)
    assert after.pop("model_int8.pth") and after == before


def test_a_run_leaves_alone_what_another_is_writing(home, begin):
    process = begin(*HALFWAY["quantize"])
    (temporary,) = home.glob(".*-model_int8.pth")
    assert shell(home, "quantize --mode int8").returncode == 0
    assert temporary.exists()
    process.terminate()
    process.wait(timeout=30)
    assert not temporary.exists()


def test_the_script_that_fetches_the_default_model_is_told_to_end(home, begin):
    """It removes its own files; who starts it waits for that."""
    script = "#!/bin/sh\ntrap 'rm tmp/there; exit 143' TERM\n: > tmp/there\nsleep 60 & wait\n"
    (home / "python").write_text(script)
    (home / "python").chmod(0o755)
    fault = NOWHERE + "import sys; sys.executable = './python'"
    process = begin(fault, "tmp/there", "generate.py")
    process.terminate()
    assert process.wait(timeout=30) == 143 and not (home / "tmp" / "there").exists()


# ---- Several processes -------------------------------------------------------------------------


def test_the_report_of_torchrun_ends_with_the_sentence(home):
    command = "$PYTHON -m torch.distributed.run --standalone --nproc_per_node=2 --no-python $PYTHON"
    done = shell(home, f"{command} $ROOT/generate.py --checkpoint_path nowhere --device cpu")
    lines = [line for line in done.stderr.splitlines() if "there is no checkpoint nowhere" in line]
    assert lines[0].startswith("error: ")
    assert lines[-1].startswith("  traceback : error: ") and lines[-1] in done.stderr[-400:]


def test_models_that_share_a_prefill_cache_do_not_warn_of_each_other(home):
    (home / "other").mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / file, home / "other")
    state = torch.load(home / "model.pth")
    torch.save({name: tensor * 0.5 for name, tensor in state.items()}, home / "other" / "model.pth")
    flags = "--prefill_context @text.txt --prefill_cache c --max_seq_length 512"
    short = flags.replace("@text.txt", "@short")
    for again in (False, True):
        for path in ("model.pth", "other/model.pth"):
            done = shell(home, f"generate {short} --checkpoint_path {path}")
            assert done.returncode == 0 and "warning" not in done.stderr
            assert f"context: 100 tokens, {0 if again else 100} prefilled" in done.stderr
