"""Options from defaults, config files and flags: what is accepted, and the one-line errors for the rest."""

import errno
import os
from dataclasses import dataclass
from typing import Literal

import pytest

from common import options
from common.options import UserError, command, load_config


@dataclass
class Options:
    # First heading
    lr: float = 0.1  # peak rate
    steps: int = 5  # how many
    fast: bool = False  # whether
    name: str = "x"  # what to call it
    kind: Literal["red", "green"] = "red"  # colour
    two_words: int = 1  # how many words


def load(*argv):
    return load_config(Options, argv)


def refused(*argv):
    with pytest.raises(UserError) as error:
        load(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_precedence_is_default_file_flag_in_any_order(tmp_path):
    file = tmp_path / "a.py"
    file.write_text('"""Doc."""\nimport math\n_two = 2\nlr = _two / 4  # a comment\nsteps = 7\n')
    assert load() == Options()
    assert load(str(file)) == Options(lr=0.5, steps=7)
    assert load("--steps=9", str(file)) == load(str(file), "--steps=9") == Options(lr=0.5, steps=9)
    assert load("--steps=9", "--steps=8").steps == 8
    assert load(f"--config={file}", "--steps=9") == load("--config", str(file), "--steps=9") == Options(lr=0.5, steps=9)
    assert "second config file" in refused(str(file), f"--config={file}")


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--lr 1 --steps 7", {"lr": 1.0, "steps": 7}), ("--lr -.5 --name -5", {"lr": -0.5, "name": "-5"}),
        ("--two-words 3 --two_words=4", {"two_words": 4}), ("--two-words=3", {"two_words": 3}),
        ("--fast true --lr 1", {"fast": True, "lr": 1.0}), ("--fast False", {"fast": False}), ("--name true", {"name": "true"}),
        ("--fast --lr 1", {"fast": True, "lr": 1.0}), ("--name=--lr", {"name": "--lr"}),
        ("--name - --fast", {"name": "-", "fast": True}), ("--steps 1 --steps 2", {"steps": 2}),
    ],
)  # fmt: skip
def test_values_may_be_words_of_their_own(line, expected):
    assert load(*line.split()) == Options(**expected)


@pytest.mark.parametrize(
    "line, says",
    [
        ("--name --lr=1", "--name: no value given, as --lr=1 looks like an option (if it is the value, write --name=--lr=1)"),
        ("--two-words", "--two-words: no value given (write --two-words=VALUE)"),
        ("--steps two", "--steps: 'two' is not a whole number"),
        ("--two-word 3", "--two-word: unknown option (did you mean two_words?)"), ("--lr -x", "-x looks like an option"),
        ("--fast maybe", "maybe: No such file or directory (expected a config file; options are written --name=value, and a value with blanks or * in quotes)"),
    ],
)  # fmt: skip
def test_refused_words(line, says):
    assert says in refused(*line.split())


def test_a_bool_before_the_config_file(tmp_path):
    (tmp_path / "a.py").write_text("steps = 7\n")
    assert load("--fast", str(tmp_path / "a.py")) == Options(fast=True, steps=7)


@pytest.mark.parametrize(
    "argument, field, value",
    [
        ("--lr=1", "lr", 1.0), ("--lr=5e-4", "lr", 5e-4), ("--steps=1e4", "steps", 10000), ("--fast=true", "fast", True),
        ("--fast", "fast", True), ("--fast=False", "fast", False), ("--name=a=b", "name", "a=b"), ("--name=123", "name", "123"),
        ("--name=", "name", ""), ("--kind=green", "kind", "green"), ("--steps=12345678901234567", "steps", 12345678901234567),
    ],
)  # fmt: skip
def test_accepted(argument, field, value):
    assert getattr(load(argument), field) == value
    assert type(getattr(load(argument), field)) is type(value)


@pytest.mark.parametrize(
    "argument, says",
    [
        ("--lr=high", "--lr: 'high' is not a number"), ("--lr=inf", "not a number"), ("--lr=", "not a number"),
        ("--lr", "no value given"), ("--steps=2.5", "'2.5' is not a whole number"), ("--fast=maybe", "true or false"),
        ("--kind=blue", "one of red, green"), ("--kind=gren", "did you mean green?"), ("--stpes=3", "did you mean steps?"),
        ("--zzz=3", "--help lists"), ("-", "unknown option"), ("--", "unknown option"),
    ],
)  # fmt: skip
def test_refused_flags(argument, says):
    assert says in refused(argument)


@pytest.mark.parametrize(
    "text, says",
    [
        ("lr = 'a'", ":1: lr: 'a' is not a number"), ("\nlrate = 1", ":2: lrate: unknown option (did you mean lr?)"),
        ("steps = True", ":1: steps: True is not a whole number"), ("fast = 1", "1 is not a bool"), ("name = 3", "not a string"),
        ("lr = 0.1\nlr =", ":2: invalid syntax"), ("lr = 1 / 0", ":1: ZeroDivisionError"), ("print(1)", "not a plain assignment"),
        ("import nothing_of_this_name", ":1: ModuleNotFoundError"), ("for i in []:\n  pass", "not a plain assignment"),
        ("lr = \0", ":1: "), ("lr, steps = 1, 2", "one name = value a line"), ("lr: float = 1", "not a plain assignment"),
        ("lr = 1\nlr += 1", ":2: not a plain"), ("steps = None", "None is not a whole number"),
    ],
)  # fmt: skip
def test_refused_files(tmp_path, text, says):
    file = tmp_path / "bad.py"
    file.write_text(text)
    line = refused(str(file))
    assert line.startswith(str(file)) and says in line


def test_refused_paths(tmp_path):
    assert "No such file" in refused(str(tmp_path / "none.py"))
    assert "expected a config file; options are written --name=value" in refused(str(tmp_path))
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    assert "binary.py" in refused(str(tmp_path / "binary.py"))
    (tmp_path / "a.py").write_text("")
    assert "second config file" in refused(str(tmp_path / "a.py"), str(tmp_path / "a.py"))
    (tmp_path / "small.py").write_text("")
    assert f"(did you mean {tmp_path / 'small.py'}?)" in refused(str(tmp_path / "smal.py"))


def test_help_is_made_of_the_comments(capsys):
    with pytest.raises(SystemExit):
        load("--help")
    printed = capsys.readouterr().out
    assert "usage: python -m tests.test_options [CONFIG.py] [--name=value ...]" in printed
    assert "First heading" in printed and "--lr=float  peak rate  [0.1]" in printed and "--kind=red|green  colour" in printed


def test_command_prints_one_line_and_exits_with_2(capsys, monkeypatch):
    @command
    def main(argv):
        raise UserError("file:3: two\nlines (hint)")

    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: file:3: two lines (hint)\n"
    with pytest.raises(UserError):
        main(["--debug"])

    @command
    def interrupted(argv):
        raise KeyboardInterrupt(*argv)

    for argv, says in (([], "stopped\n"), (["the same command resumes"], "stopped; the same command resumes\n")):
        with pytest.raises(SystemExit) as stopped:
            interrupted(argv)
        assert stopped.value.code == 130 and capsys.readouterr().err == says
    monkeypatch.setenv("RANK", "1")  # leaves it to rank 0, and gives it time
    slept = []
    monkeypatch.setattr(options.time, "sleep", slept.append)
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err == "" and slept == [2]


NOT_A_DIRECTORY = "the path, or a part of it, is a file; choose another"


def test_only_what_may_pass_is_to_be_tried_again(tmp_path, capsys):
    """A file in the way, or a link to nothing, had the hint (rerun the same command)."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to("nowhere")

    def fail(number):
        raise OSError(number, os.strerror(number), str(file))

    for act, says in (
        (lambda _: os.makedirs(file, exist_ok=True), f"{file}: File exists (a file; choose another path)"),
        (lambda _: os.makedirs(file / "a"), f"{file}/a: Not a directory ({NOT_A_DIRECTORY})"),
        (lambda _: open(tmp_path, "w"), f"{tmp_path}: Is a directory (a directory; choose another path)"),
        (lambda _: open(tmp_path / "a/b"), f"{tmp_path}/a/b: No such file or directory (check the path)"),
        (lambda _: os.path.getsize(link), f"{link}: No such file or directory (a link to nowhere, which is missing)"),
        (lambda _: fail(errno.EACCES), f"{file}: Permission denied (choose another path, or change its permissions)"),
        (lambda _: fail(errno.EROFS), f"{file}: Read-only file system (choose another path, or change its permissions)"),
        (lambda _: fail(errno.EIO), f"{file}: Input/output error (rerun the same command)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command(act)([])
        assert stopped.value.code == 2 and capsys.readouterr().err == f"error: {says}\n"


def test_an_option_given_twice_is_said(capsys):
    assert load_config(Options, ["--steps=1", "--steps", "2"]).steps == 2
    assert capsys.readouterr().out == "--steps: given twice; the last one, 2, counts\n"


def test_a_misspelt_file_gets_the_one_beside_it(tmp_path):
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(FileNotFoundError) as missing:
        open(tmp_path / "trian.csv")
    missing.value.filename = str(tmp_path / "trian.csv")
    assert options.hint_for(missing.value) == f"did you mean {tmp_path}/train.csv?"
