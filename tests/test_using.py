"""docs/using.md answers twenty requests: each command's options parse, and the test that is named runs it."""

import ast
import dataclasses
import importlib
import re

import pytest

from common.options import load_config
from tests.test_docs import commands
from tests.toy import ROOT

ROWS = [line.split(" | ") for line in (ROOT / "docs/using.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]


def test_there_are_twenty():
    assert [row[0] for row in ROWS] == [f"| {i}" for i in range(1, 21)] and {len(row) for row in ROWS} == {5}


def parsed(words):
    """(module, names of the options given) of a command, after its script has read them."""
    path = next((word for word in words[1:] if word.endswith(".py")), None)
    module = words[words.index("-m") + 1] if "-m" in words else path.removesuffix(".py")
    argv = words[words.index(module if "-m" in words else path) + 1 :]
    found = vars(importlib.import_module(module)).values()
    kinds = [kind for kind in found if dataclasses.is_dataclass(kind) and getattr(kind, "__module__", "") == module]
    load_config([kind for kind in kinds if kind.__name__.endswith("Config")][-1], argv)
    return module, {word[2:].partition("=")[0] for word in argv if word.startswith("--")}


@pytest.mark.parametrize("row", ROWS, ids=[row[1] for row in ROWS])
def test_a_request(row):
    shown = [parsed(words) for words in commands(row[2])]
    assert shown or "script" in row[2] and "tasks.md#" in row[3]
    sources = ""
    for name in row[4].removesuffix(" |").split(", "):
        file, function = name.split(".")
        source = (ROOT / f"tests/{file}.py").read_text()
        tests = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert function in tests, name
        sources += source
    for module, options in shown:
        assert re.search(rf"\b{module.rpartition('.')[2]}\b", sources), f"{row[4]} does not run {module}"
        for option in options - {"checkpoint", "data_dir", "out", "out_dir"}:  # the tests' helpers give them
            assert re.search(rf"\b{option}\b", sources), f"{row[4]} does not use --{option}"
