"""The house: imports point down, nothing goes in a circle, and no script imports a script of its own floor."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    ["common"],
    ["kernels"],
    ["model", "optim", "data"],
    ["checkpoint"],
    ["train", "finetune_glue", "prepare_c4"],
    ["tools"],
    ["studies", "tests"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
STRANGERS = {("data", "kernels")}  # below it, and still none of its business


def modules():
    """{name: path} of every module, such as "model" or "common.files"."""
    folders = ("common", "kernels", "tools", "tools/hf", "studies", "tests")
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).glob("*.py"))]
    names = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(source, known):
    """The names in `known` that a source imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known.keys()


def is_script(source):
    return '\nif __name__ == "__main__":' in source


def faults(sources):
    """What is wrong with {module: source}, as a list of sentences."""
    graph = {name: imports(source, sources) - {name} for name, source in sources.items()}
    wrong = []
    for name, imported in graph.items():
        place = name.partition(".")[0]
        for other in imported:
            there = other.partition(".")[0]
            same_floor = FLOOR[place] == FLOOR[there]
            below = FLOOR[there] < FLOOR[place] or there == place or same_floor and place in FLOORS[-1]
            if not below or (place, there) in STRANGERS:
                wrong.append(f"{name} imports {other}, which does not stand below it")
            if same_floor and is_script(sources[name]) and is_script(sources[other]):
                wrong.append(f"{name} imports {other}: a script imports a script")
    left = {name: set(imported) for name, imported in graph.items() if name not in ("kernels", "tests")}  # packages' faces
    while ready := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in ready:
            del left[name]
    return wrong + ([f"a circle among {', '.join(sorted(left))}"] if left else [])


def test_imports_point_down():
    assert not faults({name: path.read_text() for name, path in modules().items()})


def test_at_most_seven_scripts_on_top():
    assert len(list(ROOT.glob("*.py"))) <= 7


SCRIPT = '\nif __name__ == "__main__":\n    main()\n'


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model": "def f():\n    from kernels import geglu"}, None),
        ({"common.files": "import model"}, "common.files imports model, which does not stand below it"),
        ({"data": "def f():\n    from kernels import geglu"}, "data imports kernels"),
        ({"data": "import model"}, "data imports model"),
        ({"train": "from tools import convert_hf"}, "train imports tools.convert_hf"),
        ({"train": "from finetune_glue import Task"}, "train imports finetune_glue"),
        ({"tools.convert_hf": f"import tools.plot{SCRIPT}", "tools.plot": SCRIPT}, "a script imports a script"),
        ({"common.a": "from common import b", "common.b": "import common.a"}, "a circle among common.a, common.b"),
    ],
)
def test_a_wrong_import_is_found(change, says):
    names = ["common.files", "kernels", "model", "data", "train", "finetune_glue", "tools.plot", "tools.convert_hf"]
    found = faults({name: "" for name in names} | change)
    assert [says in text for text in found] == [True] if says else not found
