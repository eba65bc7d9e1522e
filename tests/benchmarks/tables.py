"""Reading the tables that benchmarks print."""


def read_table(printed: str) -> list[dict[str, str]]:
    """The rows of the one markdown table in ``printed``, by column."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(rule) == {"---"}
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row, strict=True)) for row in rows]
