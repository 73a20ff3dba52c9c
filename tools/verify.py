"""Check token shards: every digest, every offset, every token.

    python -m tools.verify --data_dir=data/mine,data/c4

Opening a directory checks headers and sizes, and every token of a small corpus; this reads everything. Run it after you
copied a directory: a token that became another one has no other trace.
"""

import os
from dataclasses import dataclass

from common.options import UserError, command, split_argv
from data import verify


@dataclass
class VerifyConfig:
    data_dir: str = ""  # shard directory or its manifest.json, or several, comma-separated; also without --data_dir=


@command
def main(argv):
    words, options = split_argv(VerifyConfig, argv)
    directories = [name.strip() for word in [*words, *options.values()] for name in word.split(",") if name.strip()]
    if not directories:
        raise UserError("--data_dir: not given (a directory made by prepare_c4.py)")
    for directory in directories:
        if os.path.basename(directory) == "manifest.json":
            directory = os.path.dirname(directory) or "."
        print(f"{directory}: {verify(directory)} shards, all digests, offsets and tokens are right")


if __name__ == "__main__":
    main()
