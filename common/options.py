"""Options of a script: a dataclass, a config file of plain assignments, and --name=value flags.

A script declares its options as a dataclass with one trailing comment a field, which is also the text of --help:

    @dataclass
    class TrainConfig:
        # Data
        data_dir: str = ""  # directory of token shards
        mask_prob: float = 0.3  # share of tokens to predict

    @command
    def main(argv):
        cfg = load_config(TrainConfig, argv)

Precedence is default < config file < flag, wherever they stand on the line; of a flag given twice the last counts.
Types are int, float, bool, str and Literal[...]. A config file is Python and runs with your rights: read it first.

Read next: train.py
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import sys
import time
import traceback
from typing import Literal, get_args, get_origin


class UserError(Exception):
    """A mistake the user can mend. Its text is `FILE[:LINE]: REASON (HINT)`, without the file where there is none.

    Under torchrun only rank 0 prints it, unless `this_rank_only` says that the others do not know.
    """

    def __init__(self, text, this_rank_only=False):
        super().__init__(" ".join(str(text).split()))  # always one line
        self.this_rank_only = this_rank_only


def command(main):
    """Decorate a script's main(argv): a UserError or OSError becomes one `error: ...` line and exit status 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        argv = sys.argv[1:] if argv is None else list(argv)
        try:
            return main([arg for arg in argv if arg != "--debug"])
        except (UserError, OSError) as error:
            if "--debug" in argv:
                raise
            raise SystemExit(report(error)) from None

    return wrapped


def report(error, anyway=False):
    """Say what ended this process; returns its exit status: 2 after one line, for a UserError or OSError, 1 after a traceback.

    What all ranks know rank 0 says. The others then end a little later, as torchrun ends all when one ends. anyway: say it
    on any rank.
    """
    if not isinstance(error, (UserError, OSError)) or "--debug" in sys.argv:
        traceback.print_exception(error)
        return 1
    if isinstance(error, OSError):  # of the machine: a full disk, a right that is missing
        file = f"{error.filename}: " if error.filename else ""
        error = UserError(f"{file}{error.strerror or error} (the same command can be given again)", True)
    if anyway or error.this_rank_only or int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)
    return 2


def load_config(cls, argv):
    """An instance of the dataclass `cls`, from its defaults, at most one config file, and --name=value flags.

    A bare --name sets a bool to true; --help prints every option and exits.
    Raises: UserError for anything that is not an option of `cls` with a value of its type.
    """
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    files = [arg for arg in argv if not arg.startswith("-")]
    flags = {}
    for arg in argv:
        if not arg.startswith("-"):
            continue
        name, equals, value = arg.lstrip("-").partition("=")
        if name in ("help", "h"):
            print_help(cls)
            raise SystemExit(0)
        known_option(name, types, f"--{name}")
        if not equals and types[name] is not bool:
            raise UserError(f"--{name}: no value given (write --{name}=VALUE)")
        flags[name] = convert(value if equals else "true", types[name], f"--{name}")
    if len(files) > 1:
        raise UserError(f"{files[1]}: a second config file (one at most; options are written --name=value)")
    return cls(**{**(read_config_file(files[0], types) if files else {}), **flags})


def read_config_file(path, types):
    """The options a config file assigns: {name: value}. Names with a leading underscore are the file's own."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error} (expected a config file)") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}:{getattr(error, 'lineno', None) or 1}: {error.args[0]} (a config is Python)") from None
    values, namespace = {}, {"__name__": "config", "__file__": path}
    for statement in tree.body:
        where = f"{path}:{statement.lineno}"
        docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not docstring and not isinstance(statement, (ast.Assign, ast.Import, ast.ImportFrom)):
            raise UserError(f"{where}: not a plain assignment (a config holds name = value lines and imports)")
        try:
            exec(compile(ast.Module([statement], []), path, "exec"), namespace)
        except Exception as error:
            raise UserError(f"{where}: {type(error).__name__}: {error}") from None
        if not isinstance(statement, ast.Assign):
            continue
        if not all(isinstance(target, ast.Name) for target in statement.targets):
            raise UserError(f"{where}: not a plain assignment (one name = value a line)")
        for name in [target.id for target in statement.targets if target.id[0] != "_"]:
            known_option(name, types, f"{where}: {name}")
            values[name] = convert(namespace[name], types[name], f"{where}: {name}")
    return values


def known_option(name, types, where):
    if name not in types:
        nearest = difflib.get_close_matches(name, types, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the options"
        raise UserError(f"{where}: unknown option ({hint})")


def convert(value, kind, where):
    """`value`, a string off the command line or an object out of a config file, as an int, float, bool, str or choice."""
    wrong = UserError(f"{where}: {value!r} is not {type_name(kind)}")
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            nearest = difflib.get_close_matches(str(value), get_args(kind), n=1)
            raise UserError(f"{wrong} (did you mean {nearest[0]}?)" if nearest else str(wrong))
        return value
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if kind is bool:
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower())
        if not isinstance(value, bool):
            raise UserError(f"{wrong} (true or false)")
        return value
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or (kind is int and not number.is_integer()):
            raise ValueError
        # Through float, 1e4 is an int too; a plain int keeps all its digits.
        return kind(number) if kind is float or "e" in str(value).lower() or "." in str(value) else int(value)
    except ValueError:
        raise wrong from None


def type_name(kind):
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return {int: "a whole number", float: "a number", bool: "a bool", str: "a string"}[kind]


def print_help(cls):
    """Every option with type, default and the comment beside it in the source; own-line comments are headings."""
    print((inspect.getdoc(sys.modules[cls.__module__]) or "").partition("\n\n")[0])
    print("\nusage: python SCRIPT [CONFIG.py] [--name=value ...]   (also --help, and --debug for tracebacks)")
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        for line in inspect.getsource(base).splitlines():
            heading = re.fullmatch(r"    # (.+)", line)
            option = re.fullmatch(r"    (\w+): (.+?) = (.+?)  # (.+)", line)
            if heading:
                print(f"\n{heading[1]}")
            elif option:
                name, kind, default, text = option.groups()
                kind = "|".join(re.findall(r'"(.*?)"', kind)) if kind.startswith("Literal") else kind
                print(f"  --{name}={kind}  {text}  [{default}]")
