"""Check token shards: every digest, every offset, every token.

    python -m tools.verify --data_dir=data/mine

Opening a directory checks headers and sizes, and every token of a small corpus; this reads everything.
"""

from dataclasses import dataclass

from common.options import UserError, command, load_config
from data import verify


@dataclass
class VerifyConfig:
    data_dir: str = ""  # shard directory, or several, comma-separated


@command
def main(argv):
    cfg = load_config(VerifyConfig, argv)
    if not cfg.data_dir:
        raise UserError("--data_dir: not given (a directory made by prepare_c4.py)")
    for directory in cfg.data_dir.split(","):
        directory = directory.strip()
        print(f"{directory}: {verify(directory)} shards, all digests, offsets and tokens are right")


if __name__ == "__main__":
    main()
