"""The notebook in examples/: clean as it is committed, and right from the first cell to the last."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from transformers import AutoModelForCausalLM, AutoTokenizer

from dive.cli import PACKAGE
from tests.workplace import environment

FILE = PACKAGE.parent / "examples/dive.ipynb"
FOUND = """
import json

found = {"perplexities": list(perplexities.values()), "domains": domains, "groups": groups}
print(json.dumps(found | {"chosen": chosen, "pieces": pieces}))
"""
"""A cell that says what the others found."""


def notebook() -> NotebookNode:
    """As it is committed."""
    return nbformat.read(FILE, as_version=4)


def test_it_is_committed_without_what_a_machine_left_in_it() -> None:
    found = notebook()
    nbformat.validate(found)
    assert found.metadata.keys() == {"kernelspec", "language_info"}
    for cell in found.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_what_it_links_is_there() -> None:
    text = "\n".join(cell.source for cell in notebook().cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\((.*?)\)", text)
    assert targets
    assert [target for target in targets if not (FILE.parent / target).is_file()] == []


def outputs(done: NotebookNode, kind: str) -> list[Any]:
    """Data of a MIME type in the outputs, in the order of the cells."""
    shown = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path: Path) -> None:
    running = notebook()
    running.cells.append(nbformat.v4.new_code_cell(FOUND))
    client = NotebookClient(running, timeout=1800, resources={"metadata": {"path": str(tmp_path)}})
    done = client.execute(env=environment())

    found = json.loads(done.cells[-1].outputs[0].text)
    dense, pruned, moe = found["perplexities"]
    assert 1 < dense < moe < pruned
    assert sorted(domain for group in found["groups"] for domain in group) == sorted(found["domains"])
    assert len(found["groups"]) == 4

    figures = [base64.b64decode(figure) for figure in outputs(done, "image/png")]
    assert len(figures) == 2
    assert all(figure.startswith(b"\x89PNG") for figure in figures)
    (coloured,) = outputs(done, "text/html")
    assert "radius &lt; 0 &amp;" in re.sub("<[^>]*>", "", coloured)
    assert len(set(found["chosen"])) > 1
    assert len(found["chosen"]) == len(found["pieces"]) == len(re.findall("<span", coloured)) - 4

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert type(model).__name__ == "MixtralForCausalLM"
    inputs = tokenizer("Monday, 3", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=5).shape[1] > inputs["input_ids"].shape[1]
