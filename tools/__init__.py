"""What you do with a run or with data: python -m tools.NAME."""

import common  # noqa: F401, before anything that may be missing
