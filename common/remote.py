"""Files on the network: every scheme that fsspec knows (https, s3, gs, hf, ...), and datasets of the Hugging Face hub.

They are streamed: nothing is written to disk.
"""

import functools
import io
import os
import time

from common.options import UserError

READ_AHEAD = 2**24  # bytes per request
WAITS = (1, 2, 4, 8, 8)  # seconds before the second and each further try, as huggingface_hub does it
# What file systems call the thing that changes with a file's contents, the surest first.
VERSIONS = ("ETag", "etag", "blob_id", "Last-Modified", "LastModified", "last_modified", "mtime", "created")


def is_remote(path):
    return "://" in path


def connect(url):
    """(fsspec's file system, what it calls the file). Raises: UserError, also where a package is missing."""
    import fsspec  # slow to import, and rarely needed

    scheme = url.partition("://")[0]
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {error} (pip install 'fsspec[{scheme.replace('https', 'http')}]')") from None
    except ValueError as error:
        raise UserError(f"{url}: {error} (expected https://, s3://, gs:// or another scheme of fsspec)") from None


def list_remote(url):
    """(whether it is a directory, URLs) of a file, a directory, or a pattern with *; a directory inside ends with /.

    On the web the page of a directory, which ends with /, links to its files; others list all that is below.
    """
    fs, path = connect(url)
    try:
        fs.invalidate_cache()
        if "*" in path:
            is_directory, found = False, with_retries(url, fs.glob, path, detail=True).values()
        elif is_directory := url.startswith("http") and url.endswith("/"):
            found = with_retries(url, fs.ls, path, detail=True)
        elif is_directory := not url.startswith("http") and fs.isdir(path):
            found = fs.find(path, detail=True).values()
        else:
            return False, [url]
    except Exception as error:  # whatever the scheme's package raises
        raise network_error(url, error, "check the address, or try again") from None
    names = [item["name"].rstrip("/") + "/" * (item["type"] == "directory") for item in found]
    return is_directory, sorted(map(fs.unstrip_protocol, names))


def size_and_version(url, again=False):
    """(bytes, what changes with the contents, or "") of a remote file. again: ask, even if it is known. Raises: UserError."""
    fs, path = connect(url)
    try:
        if again:
            fs.invalidate_cache()
        info = with_retries(url, fs.info, path)
    except Exception as error:
        raise network_error(url, error, "check the address, or try again") from None
    if info["size"] is None:
        raise UserError(f"{url}: the server does not say how long it is (download it)")
    return info["size"], next((str(info[name]) for name in VERSIONS if info.get(name)), "")


def open_remote(url):
    """The bytes of a remote file; of a hub dataset's, with HF_HUB_OFFLINE=1, those of the downloaded copy."""
    if url.startswith("hf://"):
        from huggingface_hub import constants, hf_hub_download

        if constants.HF_HUB_OFFLINE:
            repo, _, rest = url.removeprefix("hf://datasets/").partition("@")
            commit, _, name = rest.partition("/")
            return open(hf_hub_download(repo, name, repo_type="dataset", revision=commit, local_files_only=True), "rb")
    fs, path = connect(url)
    file = with_retries(url, fs.open, path, "rb", block_size=READ_AHEAD)
    if url.startswith("http"):
        file.cache.fetcher = functools.partial(with_retries, url, file.cache.fetcher)
    return io.BufferedReader(file)


def with_retries(url, call, *arguments, **options):
    """call(...), again if the network fails. Only on the web: the packages of the other schemes try again themselves."""
    for seconds in WAITS if url.startswith("http") else ():
        try:
            return call(*arguments, **options)
        except Exception as error:
            error = cause(error)
            status = getattr(error, "status", 500)
            if isinstance(error, (FileNotFoundError, ValueError)) or status < 500 and status != 429:
                raise
            time.sleep(seconds)
    return call(*arguments, **options)


def cause(error):
    """fsspec reports whatever goes wrong on the web as a FileNotFoundError."""
    return error.__cause__ or error if type(error) is FileNotFoundError else error


def network_error(what, error, hint="the same command resumes"):
    """A UserError for anything that fsspec, the hub's libraries, or the network below them raised."""
    if isinstance(error, UserError):
        return error
    error = cause(error)
    reason = f"{type(error).__name__}: {error}".partition("\n\n")[0][:250]
    offline = "; HF_HUB_OFFLINE=1 reads a downloaded copy" if not is_remote(what) or what.startswith("hf://") else ""
    return UserError(f"{what}: cannot be read: {reason} ({hint}{offline})")


def list_hub(repo, config, names):
    """(commit, {file: split}, {file: bytes}) of a dataset on the hub, or of its local copy with HF_HUB_OFFLINE=1."""
    from huggingface_hub import HfApi, HfFileSystem, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        root = snapshot_download(repo, repo_type="dataset", local_files_only=True)
        path, commit, revision, size_of = root, os.path.basename(root), None, os.path.getsize
    else:
        commit = revision = HfApi().dataset_info(repo).sha
        path, root, size_of = repo, f"hf://datasets/{repo}@{commit}", HfFileSystem().size
    if names is None:
        from datasets import load_dataset_builder

        files = load_dataset_builder(path, config or None, revision=revision).config.data_files
        if "train" not in files:
            raise ValueError(f"no split named train (found: {', '.join(files)})")
        names = {file.removeprefix(f"{root}/"): "" for file in files["train"]}
    return commit, names, {name: size_of(f"{root}/{name}") for name in names}
