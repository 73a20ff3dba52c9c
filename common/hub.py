"""Files of a model on Hugging Face's hub."""

import os
import re

from common.options import UserError, similar

HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # [owner/]name


def check_hub_id(name, what, hint):
    """Raises: UserError for what is no hub id but a path that does not exist, to a `what` such as "tokenizer"."""
    is_hub_id = HUB_ID.fullmatch(name) and not os.path.isdir(os.path.dirname(name))  # as in out/smok
    near = similar(name)
    if near or not is_hub_id or name.endswith((".json", ".txt")):
        raise UserError(f"{name}: no such {what} ({f'did you mean {near}?' if near else hint})")


def download(name, files, what, hint, revision=""):
    """The local directory with some files of a hub repository, or without a connection those downloaded before.

    files: names, or patterns. Raises: UserError, also as check_hub_id does.
    """
    check_hub_id(name, what, hint)
    from huggingface_hub import HfApi, snapshot_download  # comes with datasets

    reason = ""
    try:
        HfApi().model_info(name, timeout=10)  # one request; a download would retry for half a minute
    except Exception as error:  # network, authentication, HTTP and library errors have no common base class
        reason = f"{type(error).__name__}: {error}"
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=files, local_files_only=bool(reason))
    except Exception as error:
        reason = (reason or f"{type(error).__name__}: {error}").partition("\n")[0][:200]
        raise UserError(f"{name}: no such {what}, and it cannot be read from the hub: {reason} ({hint})") from None
