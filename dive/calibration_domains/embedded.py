"""Texts that come with every installation: domains for runs that have no network and no data.

The sources are the standard library, the documentation, headers and metadata of the installed
dependencies, and texts generated from a fixed seed. A whole source file goes to either the train or the test
split, by a hash of its name, so the files that two domains share (the standard library's code, docstrings and
bytecode) fall on the same side in both.
"""

import ast
import calendar
import dis
import hashlib
import importlib.util
import io
import os
import random
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, timedelta
from functools import cache
from importlib import metadata
from itertools import islice
from pathlib import Path

from dive.errors import UserError

TRAIN_CHARACTERS = 1_500_000
"""Most characters of a domain's train split."""
TEST_CHARACTERS = 150_000
"""Most characters of a domain's test split."""
DOCUMENT_CHARACTERS = 4000
"""Most characters of a document."""
SHORTEST_DOCUMENT = 200
"""Shorter pieces are left out: headings and empty modules."""
TEST_SHARE = 0.12
"""Share of the source files that go to the test split."""
SMALL_TEST_SHARE = 0.2
"""The same for the domains with the least text."""

RUNTIME = (
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "transformers",
    "datasets",
    "wandb",
    "torchmetrics",
    "scipy",
    "matplotlib",
    "rich",
    "safetensors",
)
"""This package's own dependencies; what else happens to be installed must not change the texts."""
HARDWARE = ("nvidia", "cuda", "triton")
"""Distributions that come with a GPU build of torch alone."""
SPLIT_OFF = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "tkinter",
        "turtledemo",
        "lib2to3",
        "distutils",
        "ensurepip",
        "venv",
        "site-packages",
        "dist-packages",
        "pydoc_data",
        "encodings",
        "__pycache__",
    }
)
"""Standard-library folders that some systems package apart, or that hold tables instead of code."""

Source = tuple[str, str]
"""Name of a source file (stable across machines) and its text."""


# ---------------------------------------------------------------------------------------------------- reading


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on ``name`` alone."""
    return int.from_bytes(hashlib.md5(name.encode(), usedforsecurity=False).digest()[:6], "big") / 2**48


def package(name: str) -> Path | None:
    """Directory of an installed top-level package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def files(
    root: Path | None, suffix: str, skip: frozenset[str] = frozenset(), prefix: str = "", root_name: str = ""
) -> Iterator[Source]:
    """Decodable files below ``root`` in the order of their names' hashes; ``skip`` names folders left out."""
    if root is None:
        return
    found: dict[str, Path] = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in skip and not name.startswith(("config-", "."))]
        for name in names:
            if name.endswith(suffix) and name.startswith(prefix) and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                found[f"{root_name or root.name}/{path.relative_to(root).as_posix()}"] = path
    for name in sorted(found, key=fraction):
        try:
            yield name, found[name].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def merged(*parts: Iterator[Source]) -> Iterator[Source]:
    """The sources of all ``parts``, one of each in turn, so that a cap leaves none of them out."""
    waiting = list(parts)
    while waiting:
        for part in list(waiting):
            try:
                yield next(part)
            except StopIteration:
                waiting.remove(part)


@cache
def distributions() -> tuple[metadata.Distribution, ...]:
    """The installed distributions that this package needs at run time, by name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, metadata.Distribution] = {}
    waiting = list(RUNTIME)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found or name.startswith(HARDWARE):
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return tuple(found[name] for name in sorted(found))


def unrepeated(sources: Iterator[Source], shortest: int = 20) -> Iterator[Source]:
    """The same sources without the paragraphs that an earlier one had: licences quote each other."""
    seen: set[str] = set()
    for name, text in sources:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = re.sub(r"\W+", "", paragraph).lower()
            if len(key) < shortest or key not in seen:
                kept.append(paragraph)
            seen.add(key)
        yield name, "\n\n".join(kept)


def documents(text: str) -> Iterator[str]:
    """Cut ``text`` at line ends into pieces of at most :data:`DOCUMENT_CHARACTERS`."""
    piece: list[str] = []
    held = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), DOCUMENT_CHARACTERS):
            part = line[start : start + DOCUMENT_CHARACTERS]
            if held + len(part) > DOCUMENT_CHARACTERS:
                yield "".join(piece).strip("\n")
                piece, held = [], 0
            piece.append(part)
            held += len(part)
    yield "".join(piece).strip("\n")


def split(
    sources: Iterable[Source], transform: Callable[[str], str] = str, *, test_share: float = TEST_SHARE
) -> tuple[list[str], list[str]]:
    """Train and test documents of a domain: by source file, capped, each text once.

    ``transform`` turns a file's text into the domain's; it is called only where there is still room.
    """
    parts: dict[bool, dict[bytes, str]] = {True: {}, False: {}}
    room = {True: TEST_CHARACTERS, False: TRAIN_CHARACTERS}
    longest = {held_out: characters // DOCUMENT_CHARACTERS // 4 for held_out, characters in room.items()}
    for name, text in sources:
        held_out = fraction(name) < test_share
        if room[held_out] < DOCUMENT_CHARACTERS:
            continue
        # A long file would otherwise be most of its split, hence ``longest``.
        for document in islice(documents(transform(text)), longest[held_out]):
            key = hashlib.md5(document.encode(), usedforsecurity=False).digest()
            new = key not in parts[True] and key not in parts[False]
            if new and SHORTEST_DOCUMENT <= len(document) <= room[held_out]:
                parts[held_out][key] = document
                room[held_out] -= len(document)
    # In the order of the hashes, so that even a few documents are from different files.
    train, test = ([document for _, document in sorted(parts[side].items())] for side in (False, True))
    return train, test


# -------------------------------------------------------------------------------------------- transformations


def without_header(text: str) -> str:
    """Code without the comment block at its top, which is a licence more often than not."""
    return re.sub(r"\A(?:#.*\n|\s*\n)+", "", text)


def docstrings(text: str) -> str:
    """The docstrings of a module under their objects' names and parameters; empty if it does not compile."""
    tree = parsed(text)
    if tree is None:
        return ""
    found = []
    waiting: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while waiting:
        node = waiting.pop()
        inner = [x for x in node.body if isinstance(x, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        waiting.extend(reversed(inner))
        doc = ast.get_docstring(node)
        if doc is None or len(doc) < 40:
            continue
        if isinstance(node, ast.Module):
            found.append(doc)
        elif isinstance(node, ast.ClassDef):
            found.append(f"class {node.name}\n\n{doc}")
        else:
            found.append(f"{node.name}({', '.join(x.arg for x in node.args.args)})\n\n{doc}")
    return "\n\n\n".join(found)


def parsed(text: str) -> ast.Module | None:
    """Syntax tree of a module, or nothing where this Python does not read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None


def disassembly(text: str) -> str:
    """Bytecode of a module as ``dis`` prints it."""
    tree = parsed(text)
    if tree is None:
        return ""
    printed = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dis.dis(compile(tree, "module", "exec", dont_inherit=True), file=printed)
    # Addresses and the order of a frozenset's members differ from one process to the next.
    stable = re.sub(r" at 0x[0-9a-fA-F]+", "", printed.getvalue())
    return re.sub(r"frozenset\(\{.*?\}\)", "frozenset({...})", stable)


# ---------------------------------------------------------------------------------------------------- domains


def standard_library() -> Iterator[Source]:
    """Source files of the standard library that every system ships."""
    return files(Path(sysconfig.get_path("stdlib")), ".py", SPLIT_OFF, root_name="stdlib")


def torch_include(*parts: str) -> Path | None:
    """A folder of torch's C++ headers."""
    root = package("torch")
    return root and root.joinpath("include", *parts)


def language_reference() -> Iterator[Source]:
    """Topics of Python's built-in help; some contain others, hence the check for repeated paragraphs."""
    from pydoc_data import topics

    yield from unrepeated(iter(sorted(topics.topics.items())))


def readmes() -> Iterator[Source]:
    """Long descriptions of the installed dependencies."""
    for distribution in distributions():
        message = distribution.metadata
        text = message["Description"] or message.get_payload()  # type: ignore[attr-defined]
        yield f"readme/{message['Name'].lower()}", str(text or "")


def licences() -> Iterator[Source]:
    """Licence and notice files of the installed dependencies."""
    for distribution in distributions():
        name = distribution.metadata["Name"].lower()
        for path in sorted(distribution.files or (), key=str):
            if ".dist-info" in path.parts[0] and re.search("licen[cs]e|copying|notice", path.name, re.IGNORECASE):
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                yield "/".join(("licence", name, *path.parts[1:])), text


def operator_schemas() -> Iterator[Source]:
    """Declarations of torch's operators and their derivatives; an operator's entries stay together."""
    root = package("torchgen")
    pages: dict[str, list[str]] = {}
    for file in ("ATen/native/native_functions.yaml", "autograd/derivatives.yaml"):
        path = root and root.joinpath("packaged", *file.split("/"))
        if path is None or not path.is_file():
            continue
        for entry in re.split(r"\n(?=- (?:func|name): )", path.read_text(encoding="utf-8")):
            if match := re.match(r"- (?:func|name): _*(\w+?)_?[.(]", entry):
                pages.setdefault(f"operators/{int(fraction(match[1]) * 150):03d}", []).append(entry.strip())
    for name in sorted(pages):
        yield name, "\n\n".join(pages[name])


def unicode_names() -> Iterator[Source]:
    """Characters with code point, category and name, 64 code points a source."""
    for start in range(0, 0x20000, 64):
        lines = []
        for point in range(start, start + 64):
            character = chr(point)
            name = unicodedata.name(character, "")
            if name and not name.startswith("HANGUL SYLLABLE") and not name.endswith(f"-{point:X}"):
                lines.append(f"{character} U+{point:04X} {unicodedata.category(character)} {name}\n")
        if lines:
            yield f"unicode/{start:05X}", "".join(lines)


def arithmetic() -> Iterator[Source]:
    """Generated sums, products and word problems; every equality sign holds."""
    for number in range(1000):
        draw = random.Random(f"arithmetic {number}")
        kinds = (sum_line, product_line, difference_line, division_line, *WORD_PROBLEMS)
        yield f"arithmetic/{number:04d}", "\n".join(draw.choice(kinds)(draw) for _ in range(24)) + "\n"


def sum_line(draw: random.Random) -> str:
    terms = [draw.randint(2, draw.choice((20, 100, 1000))) for _ in range(draw.randint(2, 4))]
    steps = [" + ".join(map(str, (sum(terms[: i + 1]), *terms[i + 1 :]))) for i in range(len(terms))]
    return " = ".join(steps)


def product_line(draw: random.Random) -> str:
    a, b = draw.randint(2, 99), draw.randint(11, 99)
    tens, ones = b - b % 10, b % 10
    if not ones:
        return f"{a} * {b} = {a * b}"
    return f"{a} * {b} = {a} * {tens} + {a} * {ones} = {a * tens} + {a * ones} = {a * b}"


def difference_line(draw: random.Random) -> str:
    a, b = sorted((draw.randint(2, 999), draw.randint(2, 999)), reverse=True)
    return f"{a} - {b} = {a - b}"


def division_line(draw: random.Random) -> str:
    a, b = draw.randint(10, 999), draw.randint(2, 12)
    return f"{a} divided by {b} is {a // b}, remainder {a % b}: {a // b} * {b} + {a % b} = {a}"


PEOPLE = (
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Leo",
    "Mia",
    "Noah",
)
THINGS = ("apples", "books", "coins", "eggs", "flowers", "letters", "marbles", "pencils", "stamps", "tickets")


def shopping(draw: random.Random) -> str:
    name, thing = draw.choice(PEOPLE), draw.choice(THINGS)
    count, price, paid = draw.randint(2, 12), draw.randint(2, 15), draw.choice((200, 250, 300, 500))
    return (
        f"{name} buys {count} {thing} at {price} cents each and pays with {paid} cents. "
        f"The {thing} cost {count} * {price} = {count * price} cents, "
        f"so the change is {paid} - {count * price} = {paid - count * price} cents."
    )


def giving(draw: random.Random) -> str:
    (one, two), thing = draw.sample(PEOPLE, 2), draw.choice(THINGS)
    first, second = draw.randint(20, 90), draw.randint(5, 90)
    given = draw.randint(2, 19)
    return (
        f"{one} has {first} {thing} and {two} has {second}. {one} gives {given} to {two}. "
        f"Now {one} has {first} - {given} = {first - given} {thing} and {two} has "
        f"{second} + {given} = {second + given}; together they still have "
        f"{first} + {second} = {first + second}."
    )


def sharing(draw: random.Random) -> str:
    name, thing = draw.choice(PEOPLE), draw.choice(THINGS)
    friends, each = draw.randint(2, 9), draw.randint(2, 20)
    left = draw.randint(0, friends - 1)
    total = friends * each + left
    return (
        f"{name} shares {total} {thing} evenly among {friends} friends. Each gets {each}, and {left} are "
        f"left over, because {friends} * {each} + {left} = {total}."
    )


WORD_PROBLEMS = (shopping, giving, sharing)
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def long_date(day: date) -> str:
    """Such as ``Friday, 3 March 1995``: in English whatever the locale."""
    return f"{WEEKDAYS[day.weekday()]}, {day.day} {MONTHS[day.month - 1]} {day.year}"


def calendars() -> Iterator[Source]:
    """Generated facts about dates, and pages of a calendar."""
    for number in range(1000):
        draw = random.Random(f"calendar {number}")
        lines = []
        for _ in range(10):
            day = date(draw.randint(1901, 2098), 1, 1) + timedelta(days=draw.randrange(366))
            ahead = draw.randint(2, 60)
            week = day.isocalendar()
            ordinal, leap = day.timetuple().tm_yday, calendar.isleap(day.year)
            later = long_date(day + timedelta(days=ahead))
            lines.append(
                f"{day.isoformat()} was a {WEEKDAYS[day.weekday()]}, day {ordinal} of the year {day.year} "
                f"and in week {week[1]}. {ahead} days after {long_date(day)} came {later}. "
                f"The year {day.year} had {366 if leap else 365} days and "
                f"{'was' if leap else 'was not'} a leap year."
            )
        lines.append(month_page(draw.randint(1901, 2098), draw.randint(1, 12)))
        yield f"calendar/{number:04d}", "\n".join(lines) + "\n"


def month_page(year: int, month: int) -> str:
    """A month as a table, weeks starting on Monday."""
    weeks = calendar.Calendar().monthdayscalendar(year, month)
    rows = [" ".join(f"{day:2d}" if day else "  " for day in week).rstrip() for week in weeks]
    return "\n".join([f"{MONTHS[month - 1]} {year}", " ".join(name[:2] for name in WEEKDAYS), *rows])


TESTS = frozenset({"tests", "test", "testing", "__pycache__"})
GENERATED = frozenset({"ops", "hip", "cuda", "cudnn", "mps", "xpu", "miopen", "metal"})
"""Folders of torch's headers that are generated, or differ between builds."""

READERS: dict[str, Callable[[], tuple[list[str], list[str]]]] = {
    "python_code": lambda: split(standard_library(), without_header),
    "docstrings": lambda: split(standard_library(), docstrings),
    "bytecode": lambda: split(standard_library(), disassembly),
    "language_reference": lambda: split(language_reference(), test_share=SMALL_TEST_SHARE),
    "readmes": lambda: split(unrepeated(readmes())),
    "licences": lambda: split(unrepeated(licences()), test_share=SMALL_TEST_SHARE),
    "c_headers": lambda: split(
        merged(
            files(package("numpy"), ".h", TESTS),
            files(
                torch_include(),
                ".h",
                frozenset({"ATen", "c10", "torch", "caffe2", "pybind11", "fmt", "google"}),
            ),
        )
    ),
    "cpp_headers": lambda: split(
        merged(files(torch_include("ATen"), ".h", GENERATED), files(torch_include("c10"), ".h", GENERATED))
    ),
    "type_stubs": lambda: split(
        merged(*(files(package(name), ".pyi", TESTS) for name in ("torch", "numpy", "matplotlib")))
    ),
    "scientific_docs": lambda: split(
        merged(files(package("numpy"), ".py", TESTS), files(package("scipy"), ".py", TESTS)), docstrings
    ),
    "symbolic_maths": lambda: split(
        merged(files(package("sympy"), ".py", TESTS), files(package("mpmath"), ".py", TESTS)), docstrings
    ),
    "model_code": lambda: split(files(package("transformers"), ".py", TESTS, "modeling_"), without_header),
    "operator_schemas": lambda: split(operator_schemas()),
    "unicode_names": lambda: split(unicode_names()),
    "arithmetic": lambda: split(arithmetic()),
    "calendar": lambda: split(calendars()),
}
DOMAINS = tuple(READERS)
"""Names of the embedded domains."""


@cache
def read(name: str) -> tuple[list[str], list[str]]:
    """Train and test documents of one domain."""
    return READERS[name]()


def embedded_texts(names: Sequence[str] | None = None) -> dict[str, tuple[list[str], list[str]]]:
    """Train and test documents of each domain, all of :data:`DOMAINS` if ``names`` is null.

    Raises:
        UserError: a name is none of them.
    """
    chosen = DOMAINS if names is None else tuple(names)
    unknown = sorted(set(chosen) - set(DOMAINS))
    if unknown:
        raise UserError(f"calibration_domains.domains: {unknown} not among the embedded {', '.join(DOMAINS)}")
    return {name: (list(read(name)[0]), list(read(name)[1])) for name in chosen}
