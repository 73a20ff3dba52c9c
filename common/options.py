"""The options of a script: a dataclass, a config file of plain assignments, and flags: --name=value or --name value.

A script declares its options as a dataclass with a trailing comment on each field, which is also its text in --help:

    @dataclass
    class TrainConfig:
        # Data
        data_dir: str = ""  # directory of token shards
        mask_prob: float = 0.3  # share of tokens to predict

    @command
    def main(argv):
        cfg = load_config(TrainConfig, argv)

Precedence is default < config file < flag, in any order on the line; the last of a repeated flag counts.
Types are int, float, bool, str and Literal[...]. A config file is Python and runs with your rights: read it first.
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import functools
import inspect
import math
import os
import re
import signal
import sys
import time
import traceback
from typing import Literal, get_args, get_origin


class UserError(Exception):
    """A mistake that the user can fix. Its text is `FILE[:LINE]: REASON (HINT)`, without the file where there is none.

    Under torchrun only rank 0 prints it, unless `this_rank_only`: the other ranks don't know of it.
    """

    def __init__(self, text, this_rank_only=False):
        super().__init__(" ".join(str(text).split()))  # always one line
        self.this_rank_only = this_rank_only


def say(text, file=None):
    """Print a line. That nobody reads it any more, as when Ctrl-C has also ended a `tee`, must not end what has work to save."""
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # or Python fails again when it exits
    except OSError:  # a full disk, say
        pass


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does. See stoppable."""


def command(main):
    """Decorate a script's main(argv): a UserError or OSError becomes one `error: ...` line and exit status 2.

    Ctrl-C becomes one line and status 130, and Terminated 143; a KeyboardInterrupt's own text says what the same command
    would resume.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        argv = sys.argv[1:] if argv is None else list(argv)
        try:
            return main([arg for arg in argv if arg != "--debug"])
        except (UserError, OSError) as error:
            if "--debug" in argv:
                raise
            raise SystemExit(report(error)) from None
        except KeyboardInterrupt as stopped:
            if "--debug" in argv:
                raise
            say("; ".join(["stopped", *map(str, stopped.args)]), sys.stderr)
            number = signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT
            raise SystemExit(128 + number) from None

    return wrapped


@contextlib.contextmanager
def stoppable(kept):
    """Work that Ctrl-C or SIGTERM ends. kept(): text about what it leaves, for the line that `command` prints."""

    def terminate(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise type(stopped)(kept()) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def report(error, anyway=False):
    """Print what ended this process; returns its exit status: 2 after one line (UserError, OSError), 1 after a traceback.

    Errors common to all ranks are printed by rank 0, and the others end a little later, since torchrun kills all when one
    ends. anyway: print it on any rank.
    """
    if not isinstance(error, (UserError, OSError)) or "--debug" in sys.argv:
        say("".join(traceback.format_exception(error)).rstrip("\n"), sys.stderr)
        return 1
    if isinstance(error, OSError):  # the machine's: a full disk, a missing permission
        file = f"{error.filename}: " if error.filename else ""
        error = UserError(f"{file}{error.strerror or error} ({hint_for(error)})", True)
    if anyway or error.this_rank_only or int(os.environ.get("RANK", 0)) == 0:
        say(f"error: {error}", sys.stderr)
    else:
        time.sleep(2)
    return 2


def hint_for(error, otherwise="rerun the same command"):
    """What to do about an OSError. otherwise: where trying again may help, as with a network disk."""
    path = error.filename if isinstance(error.filename, str) else ""
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return f"a link to {os.readlink(path)}, which is missing"
    if isinstance(error, FileNotFoundError) and path and (near := similar(path)):
        return f"did you mean {near}?"
    hints = {
        FileNotFoundError: "check the path",
        FileExistsError: "a file; choose another path",
        NotADirectoryError: "the path, or a part of it, is a file; choose another",
        IsADirectoryError: "a directory; choose another path",
        PermissionError: "choose another path, or change its permissions",
    }
    if error.errno == errno.EROFS:  # a read-only file system
        return hints[PermissionError]
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"free some space; {otherwise}"
    return hints.get(type(error), otherwise)


def load_config(cls, argv):
    """An instance of the dataclass `cls`, from its defaults, at most one config file, and flags: see split_argv.

    --help prints every option and exits. Raises: UserError for anything that is not an option of `cls` with a value of its
    type.
    """
    files, flags = split_argv(cls, argv)
    files += [flags.pop("config")] if "config" in flags else []
    if len(files) > 1:
        raise UserError(f"{files[1]}: a second config file (one at most; {QUOTES})")
    return cls(**{**(read_config_file(files[0], cls) if files else {}), **flags})


def split_argv(cls, argv):
    """(words that belong to no option, {option: value}), of a command line for the dataclass `cls`.

    --max-steps is --max_steps; a value follows `=` or is the next word. A bool needs none: of the next words only true and
    false are its value. Raises: UserError.
    """
    types = {"config": str} | {field.name: field.type for field in dataclasses.fields(cls)}
    words, flags, rest = [], {}, list(argv)
    while rest:
        typed, equals, value = rest.pop(0).partition("=")
        if not typed.startswith("-"):
            words.append(typed + equals + value)
            continue
        name = typed.lstrip("-").replace("-", "_")
        if name in ("help", "h"):
            print_help(cls)
            raise SystemExit(0)
        if name != "config":
            known_option(name, cls, typed)
        if not equals and types[name] is bool:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals and not rest:
            raise UserError(f"{typed}: no value given (write {typed}=VALUE)")
        elif not equals:
            value = rest.pop(0)
            if re.match("--|-[A-Za-z]", value):  # -1 is a value
                hint = f"if it is the value, write {typed}={value}"
                raise UserError(f"{typed}: no value given, as {value} looks like an option ({hint})")
        if name in flags and os.environ.get("RANK", "0") == "0":
            print(f"{typed}: given twice; the last one, {value}, counts", flush=True)
        flags[name] = convert(value, types[name], typed)
    return words, flags


QUOTES = "options are written --name=value, and a value with blanks or * in quotes"


def read_config_file(path, cls):
    """The options of `cls` that a config file assigns: {name: value}. Names with a leading underscore are the file's own."""
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, UnicodeDecodeError) as error:
        near = similar(path) if isinstance(error, FileNotFoundError) else None
        hint = f"did you mean {near}?" if near else f"expected a config file; {QUOTES}"
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error} ({hint})") from None
    except (SyntaxError, ValueError) as error:
        hint = "a config is Python" if path.endswith(".py") else "a config is Python; is it one of several values? Write a,b"
        raise UserError(f"{path}:{getattr(error, 'lineno', None) or 1}: {error.args[0]} ({hint})") from None
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
            known_option(name, cls, f"{where}: {name}")
            values[name] = convert(namespace[name], types[name], f"{where}: {name}")
    return values


def similar(path):
    """The path beside `path` whose name is most like it, for a hint; None without one."""
    parent, name = os.path.split(os.fspath(path).rstrip("/"))
    names = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    near = difflib.get_close_matches(name, [other for other in names if other != name], n=1)
    return os.path.join(parent, near[0]) if near else None


def require(cfg, names, holds, text):
    """Check options. names: theirs, with blanks between them. holds(value): whether it can be. text: what is wrong if not.

    Raises: UserError for the first that cannot be.
    """
    for name in names.split():
        if not holds(value := getattr(cfg, name)):
            raise UserError(f"{name}={value}: {text}")


def known_option(name, cls, where):
    """Raises: UserError with the nearest name, or an option whose description has the words of the unknown one."""
    names = [field.name for field in dataclasses.fields(cls)]
    if name in names:
        return
    words = re.findall("[a-z]+", name.lower())
    texts = {option: text.lower() for base in cls.__mro__ for option, _, _, text in described(base) if option}
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    nearest = nearest or [option for option, text in texts.items() if words and all(word in text for word in words)]
    nearest = nearest or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the options"
    raise UserError(f"{where}: unknown option ({hint})")


def convert(value, kind, where):
    """`value`, a string from the command line or an object from a config file, as an int, float, bool, str or choice."""
    wrong = UserError(f"{where}: {value!r} is not {type_name(kind)}")
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            nearest = difflib.get_close_matches({"gpu": "cuda"}.get(value, str(value)), get_args(kind), n=1)
            raise UserError(f"{wrong} (did you mean {nearest[0]}?)" if nearest else str(wrong))
        return value
    if kind is str:
        if not isinstance(value, str) or "\0" in value:
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


def described(cls):
    """Yield (name, type, default, text) of each option that the source of a dataclass declares, and (None, None, None,
    heading) for its headings: comments on a line of their own."""
    for line in inspect.getsource(cls).splitlines() if dataclasses.is_dataclass(cls) else ():
        if option := re.fullmatch(r"    (\w+): (.+?) = (.+?)  # (.+)", line):
            name, kind, _, text = option.groups()
            kind = "|".join(re.findall(r'"(.*?)"', kind)) if kind.startswith("Literal") else kind
            yield name, kind, getattr(cls, name), text
        elif heading := re.fullmatch(r"    # (.+)", line):
            yield None, None, None, heading[1]


def print_help(cls):
    """Print every option with its type, default, and the comment beside it in the source."""
    module = sys.modules[cls.__module__]
    name = getattr(module.__spec__, "name", cls.__module__)  # run as `python train.py` it has no __spec__
    script = f"-m {name}" if "." in name else os.path.relpath(module.__file__)
    lines = [(inspect.getdoc(module) or "").partition("\n\n")[0]]
    also = "also --name value, --help, and --debug for tracebacks"
    lines.append(f"\nusage: python {script} [CONFIG.py] [--name=value ...]   ({also})")
    for base in reversed(cls.__mro__):
        for name, kind, default, text in described(base):
            lines.append(f"  --{name}={kind}  {text}  [{default!r}]" if name else f"\n{text}")
    say("\n".join(lines))
