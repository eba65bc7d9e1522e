"""The layout, as README's section on it says: nothing imports what stands above it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import dive

PACKAGE = Path(dive.__file__).parent
ORDER = (
    ("errors", "units", "connection", "preemption"),
    ("bounds",),
    ("config", "progress"),
    ("ranks", "store"),
    ("together",),
    ("results",),
    ("model",),
    ("calibration_domains",),
    ("eval",),
    ("pruning",),
    ("affinity",),
    ("moe",),
    ("trainer", "logger"),
    ("retrain",),
    ("export", "hub", "engines"),
    ("plan",),
    ("report",),
    ("inputs",),
    ("run",),
    ("pipeline",),
)
"""From the bottom to the top."""
ENTRY_POINTS = {
    *(
        "__main__",
        "api",
        "budgets",
        "cli",
        "dashboard",
        "evaluate",
        "generate",
        "help",
        "prune",
        "push",
        "quantise",
        "renamed",
        "train",
        "verify",
    ),
    *("plan.__main__", "report.__main__", "report.callback", "model.tiny.pretrain"),
}
"""Parse, call, print: they stand above everything."""
README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")


def modules() -> Iterator[tuple[str, ast.Module]]:
    """(dotted name below the package, syntax tree) of every module."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(file.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules of ours that a module imports, wherever it does, but where it is run as a command."""
    nodes = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    for node in (below for top in nodes for below in ast.walk(top)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dive":
            if node.module == "dive":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.removeprefix("dive.")


def level(module: str) -> int:
    """Of a module in the order; entry points are above all."""
    if module in ENTRY_POINTS:
        return len(ORDER)
    return next(number for number, names in enumerate(ORDER) if module.split(".")[0] in names)


def test_nothing_imports_what_stands_above_it() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules()
        if name
        for other in imported(tree)
        if level(other) > level(name)
    ]
    assert not wrong


def test_readme_says_the_same_order() -> None:
    (said,) = re.findall(r"`errors.*?`pipeline`", README, flags=re.DOTALL)
    assert re.findall(r"`([\w ,]+)`", said) == [", ".join(names) for names in ORDER]


def test_the_main_function_is_read_in_one_look() -> None:
    lines = (PACKAGE / "pipeline.py").read_text(encoding="utf-8")
    assert len(lines.splitlines()) < 200
    functions = {node.name: node for node in ast.parse(lines).body if isinstance(node, ast.FunctionDef)}
    length = (functions["train"].end_lineno or 0) - functions["train"].lineno
    assert length < 60
