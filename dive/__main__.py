"""The commands of this package: ``python -m dive``."""

import ast
from collections.abc import Iterator
from pathlib import Path

import dive

PACKAGE = Path(__file__).parent
ORDER = ("plan", "train", "evaluate", "generate", "report", "verify", "quantise", "push", "dashboard", "store")
"""In which they are met; others come last."""


def commands() -> Iterator[tuple[str, str]]:
    """(module, what it does) of every module that can be run, read off their sources; nothing is imported."""
    found = {}
    for file in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__main__.py")]:
        source = file.read_text(encoding="utf-8")
        if file == Path(__file__) or 'if __name__ == "__main__":' not in source:
            continue
        name = file.parent.name if file.stem == "__main__" else file.stem
        said = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0]
        found[name] = " ".join(said.partition(": ")[0].split()).rstrip(".")
    known = [name for name in ORDER if name in found]
    for name in [*known, *sorted(found.keys() - set(known))]:
        yield f"dive.{name}", found[name]


def main() -> None:
    """Print them."""
    print((dive.__doc__ or "").partition("\n")[0])
    print()
    for module, meaning in commands():
        print(f"  python -m {module:<16} {meaning}")
    print()
    print("--help after any of them shows its options; dive-train is short for python -m dive.train, and so on.")
    print("A first run: python -m dive.train, with the model and the texts of this package, minutes on a CPU.")


if __name__ == "__main__":
    main()
