"""Files that are written whole or not at all, and their digests."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import time

from common.options import UserError


@contextlib.contextmanager
def whole_file(path):
    """Open a file to write bytes to, under another name until all of them are on disk.

    The other name is this process's own: one that outlives its killed parent for a moment, or one on another host, whose
    number may be the same, may be writing too.
    """
    partial = f"{path}.{os.getpid()}{time.time_ns()}.tmp"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(partial)  # on a full disk, make room for what was finished
        if error.filename in (None, partial):
            error.filename = path
        raise
    os.replace(partial, path)


def write_text(path, text):
    """Write a text file, the whole of it or nothing."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_once(path, text):
    """Write a text file unless it exists: of several processes, also on several hosts, the first one's stays."""
    own = f"{path}.{os.getpid()}{time.time_ns()}.tmp"
    write_text(own, text)
    with contextlib.suppress(FileExistsError):
        os.link(own, path)
    os.remove(own)


def read_json(path, hint):
    """The JSON object in a file, a dictionary. Raises: UserError with `hint` when it is missing or something else."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} ({hint})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error} ({hint})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected an object ({hint})")
    return value


def read_if_there(path):
    """The JSON object in a file, {} if there is no such file."""
    return read_json(path, "fix or remove it") if os.path.exists(path) else {}


def file_digest(path):
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(strings):
    return hashlib.sha256("\n".join(strings).encode()).hexdigest()


def gigabytes(num_bytes, digits=1):
    """As text: 1,234.5 GB or 0.3 MB."""
    return f"{num_bytes / 1e9:,.{digits}f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.{digits}f} MB"


def without_slash(value):
    """An option's value without the slash that tab completion adds to a directory's name."""
    return re.sub(r"(?<=[^/,])/+(?=,|$)", "", value) if isinstance(value, str) else value


def lock_directory(path, shared=False):
    """Make a directory and hold it against a second live run; os.close of the returned descriptor releases it.

    shared: hold it together with others that share it, and against those that don't.
    The lock ends with the process, however that ends. Raises: UserError.
    """
    try:
        os.makedirs(path, exist_ok=True)
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{path}: in use by a live run (choose another directory)") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (choose another directory)") from None


def write_file(path, data):
    """Write bytes, and wait until they are on disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path):
    """Wait until a directory's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allow_open_files(count):
    """Raise this process's limit of open files by `count`. Raises: UserError where the system does not allow that."""
    needed = count + len(os.listdir("/proc/self/fd")) + 256 if os.path.isdir("/proc/self/fd") else count + 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(f"{count} shards, but only {hard} files may be open (raise ulimit -n, or make larger shards)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
