"""The layout: no import cycles, pure modules in their contract, every module short enough to be one idea."""

import ast
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
LINES_MAX = 400
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("receiver", "submitter")
    for path in (ROOT / folder).rglob("*.py")
}


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("receiver", "submitter", cache_dir=None)
    assert graph.modules >= set(MODULES)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules of a cycle


def test_modules_that_call_themselves_pure_are_those_in_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (pure,) = (set(one["source_modules"]) for one in contracts if one["name"].startswith("Pure"))
    documented = {
        module
        for module, path in MODULES.items()
        if re.search(r"\bPure\b", ast.get_docstring(ast.parse(path.read_text())) or "")
    }
    assert documented == pure


def test_no_module_is_longer_than_one_idea() -> None:
    paths = [path for folder in ("receiver", "submitter", "tests") for path in (ROOT / folder).rglob("*.py")]
    long = {str(path.relative_to(ROOT)): n for path in paths if (n := len(path.read_text().splitlines())) > LINES_MAX}
    assert long == {}


def test_every_module_says_what_it_is() -> None:
    assert [module for module, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))] == []
