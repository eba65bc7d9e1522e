"""Names that options had once."""

import re

import pytest

from dive.cli import composed
from dive.errors import UserError
from dive.renamed import RENAMED


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_end_in_a_line_with_the_new_one(old: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(old)} is no more: .*(moe=|affinity=|moe\.\w+|retrain\.\w+)"):
        composed([f"{old}=1"])


def test_what_stands_below_an_old_name_moved_with_it() -> None:
    with pytest.raises(UserError, match=r"^moe\.refinement\.rounds is no more: write moe\.refined\.rounds$"):
        composed(["moe.refinement.rounds=3"])
