"""Benchmarks and stress tests: python -m studies.NAME."""

import common  # noqa: F401, before anything that may be missing
