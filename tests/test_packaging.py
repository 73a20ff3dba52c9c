"""pyproject.toml and the Dockerfile install what the requirements files say."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(name):
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    "listed, name",
    [
        (PYPROJECT["project"]["dependencies"], "requirements.txt"),
        (PYPROJECT["project"]["optional-dependencies"]["dev"], "requirements-dev.txt"),
        (PYPROJECT["project"]["optional-dependencies"]["slow"], "requirements-slow.txt"),
        (PYPROJECT["tool"]["uv"]["constraint-dependencies"], "constraints.txt"),
    ],
)
def test_pyproject_lists_the_requirements(listed, name):
    assert listed == requirements(name) and listed


def test_pythons_agree():
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text()
    assert f"FROM python:{oldest}\n" in (ROOT / "Dockerfile").read_text()


def test_the_image_installs_as_make_does():
    dockerfile, makefile = ((ROOT / name).read_text() for name in ("Dockerfile", "Makefile"))
    install = "-r requirements.txt -c constraints.txt\n"
    assert install in dockerfile and install in makefile
    (copied,) = re.findall(r"^COPY (.*) \./$", dockerfile, re.MULTILINE)
    assert copied.split() == ["requirements.txt", "constraints.txt"]
