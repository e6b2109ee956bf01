"""What the scripts say of their flags."""

import importlib
import shlex

import pytest

from conftest import ROOT

SCRIPTS = ["generate", "eval", "quantize", "scripts.benchmark", "scripts.gpu_check"]
SCRIPTS += ["scripts.convert_gguf", "scripts.convert_hf_checkpoint", "scripts.download"]
SCRIPTS += ["scripts.prefill_cache_experiment", "profiler_scripts.layer_accuracy_analysis"]
SCRIPTS += ["profiler_scripts.layer_identification", "profiler_scripts.profiler_analysis"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag_in_a_group_and_ends_with_an_example(name):
    parser = importlib.import_module(name).make_parser()
    grouped = set()
    for group in parser._action_groups[2:]:  # after "positional arguments" and "options"
        assert group.title and group._group_actions
        grouped |= {*group._group_actions}
    for action in parser._actions[1:]:  # the first is --help
        assert action in grouped and action.help, action.option_strings
    path = f"{name.replace('.', '/')}.py"
    *_, heading, example = parser.format_help().partition("\nexamples:\n")
    assert heading and example.startswith(f"  python {path} ") and (ROOT / path).exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_of_the_help_is_a_valid_command_line(name):
    parser = importlib.import_module(name).make_parser()
    for line in parser.epilog.splitlines()[1:]:
        parser.parse_args(shlex.split(line)[2:])
