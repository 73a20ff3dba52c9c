"""Upload an export to Hugging Face's hub."""

from common.options import UserError


def reason_of(error):
    """The hub's answer, or the library's complaint, in one line."""
    return " ".join(f"{getattr(error, 'server_message', None) or error}".split())[:300]


def check_push(name):
    """Ask the hub, before any work, whether the token is good. Raises: UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise ValueError("expected owner/name")
        HfApi().whoami()
    except Exception as error:  # names, tokens, network and HTTP errors have no common base class
        raise UserError(f"--push={name}: {reason_of(error)}") from None


def push(path, name):
    """Upload a directory to a repository, which is made, private, if it is new. Returns what was done, as text."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        done = HfApi().upload_folder(folder_path=path, repo_id=name, commit_message="Upload of an export")
    except Exception as error:
        raise UserError(f"--push={name}: {reason_of(error)} ({path} is finished and checked; push that)") from None
    return f"{path}: uploaded to {done.commit_url}"
