"""An export as GGUF: llama.cpp reads the same tokens and gives the same perplexity.

Needs llama-cpp-python, sentencepiece, and llama.cpp's sources in the directory that LLAMA_CPP_SOURCE names.
"""

import os
import sys
from pathlib import Path

import pytest

from benchmarks.gguf_perplexity import TOLERANCE, main


@pytest.mark.slow
def test_llama_cpp_gives_the_same_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("llama_cpp", "sentencepiece"):
        pytest.importorskip(package)
    source = Path(os.environ.get("LLAMA_CPP_SOURCE", "unset"))
    if not (source / "convert_hf_to_gguf.py").is_file():
        pytest.skip("LLAMA_CPP_SOURCE names no directory of llama.cpp's sources")
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ["--llama-cpp", str(source), "--output", str(tmp_path), "--quantise", "q8_0", "q4_k_m"]
    assert main(options) == 0  # within TOLERANCE, every document in the same tokens
    assert TOLERANCE == 0.01
    out = capsys.readouterr().out
    assert out.count("0 of ") == 3
    assert "Q4_K" in out
    sizes = [(tmp_path / f"model-{kind}.gguf").stat().st_size for kind in ("f16", "q8_0", "q4_k_m")]
    assert sizes == sorted(sizes, reverse=True)
