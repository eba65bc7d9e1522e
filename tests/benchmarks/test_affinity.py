"""All ways to the matrix give the same perplexities; the package's own is the faster one by its rule."""

import pytest

from benchmarks.affinity import main
from tests.benchmarks.tables import read_table


@pytest.mark.parametrize(("batch", "chosen"), [("1", "masked"), ("4", "sliced")])
def test_table(batch: str, chosen: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--domains", "2", "--samples", "4", "--length", "80", "--batch", batch, "--rounds", "1"]
    assert main(["--shape", "tiny", "--ratios", "0.5", *sizes]) == 0
    bare, masked, sliced, whole = read_table(capsys.readouterr().out)
    assert (bare["/ bare"], masked["passes"], sliced["passes"]) == ("1.00", "masked", "sliced")
    assert whole["passes"] == f"cross_domain_perplexity ({chosen})"
    for row in (masked, sliced, whole):
        assert float(row["perplexities differ from masked by"]) < 1e-5
