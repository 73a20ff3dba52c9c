"""Utilities that import nothing from the layers above. Scripts import this package before anything else."""

import importlib.util
import os
import sys

# By default OpenMP's threads spin while they wait, and on a busy machine take the cores from those that work: `make smoke`'s
# model on two busy cores made under 1,000 tokens/s, and 7,600 with threads that sleep. PyTorch reads this when it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if missing := [name for name in ("numpy", "torch", "tokenizers", "safetensors") if not importlib.util.find_spec(name)]:
    hint = "source .venv/bin/activate, or pip install -r requirements.txt -c constraints.txt"
    print(f"error: missing packages: {', '.join(missing)} ({hint})", file=sys.stderr)
    sys.exit(2)


def in_one_line(kind, error, trace, hook=sys.excepthook):
    """Ctrl-C while modules are imported, before a script's `command` handles it."""
    if kind is KeyboardInterrupt and "--debug" not in sys.argv:
        print("stopped", file=sys.stderr)
    else:
        hook(kind, error, trace)


sys.excepthook = in_one_line
