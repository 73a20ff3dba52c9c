"""Provenance of a result: the commit of this code, and package versions. Every log starts with them."""

import os
import platform
import subprocess
import sys

import numpy as np
import torch


def versions():
    """{"commit", "uncommitted_changes", "versions"}."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*arguments):
        try:
            result = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    packages = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if "triton" in sys.modules:
        packages["triton"] = sys.modules["triton"].__version__
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(changes), "versions": packages}
