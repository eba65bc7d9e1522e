"""A GGUF file of an export, by llama.cpp's own converter: ``python -m dive.engines.gguf SOURCES CHECKPOINT FILE``."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

CONVERTER = "convert_hf_to_gguf.py"
"""In the directory of llama.cpp's sources."""


def pre_tokenizer(checkpoint: Path) -> str | None:
    """llama.cpp's name for what ``tokenizer.json`` does before BPE, where that can be told from the file alone."""
    settings = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    before = settings["pre_tokenizer"] or {"type": None}
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if settings["normalizer"] is not None or not byte_level.items() <= steps[-1].items():
        return None
    if len(steps) == 1:
        return "gpt-2"
    return "starcoder" if steps[:-1] == [{"type": "Digits", "individual_digits": True}] else None


def convert(llama_cpp: Path, checkpoint: Path, file: Path, *, pre: str | None) -> None:
    """Write ``file`` (its element type is its suffix before ``.gguf``) with the converter in ``llama_cpp``.

    The converter knows BPE tokenizers by a hash of what they make of one text, so a tokenizer trained by yourself is
    unknown to it, however common its rules are. ``pre`` names those rules then; a recognised hash goes first.
    """
    sys.path.insert(0, str(llama_cpp))
    converter: Any = importlib.import_module(CONVERTER.removesuffix(".py"))
    if pre is not None:
        text_model: Any = vars(sys.modules[converter.ModelBase.__module__])["TextModel"]
        by_hash = text_model.get_vocab_base_pre

        def by_hash_or_name(self: Any, tokenizer: Any) -> str:
            try:
                return str(by_hash(self, tokenizer))
            except NotImplementedError:
                return pre

        text_model.get_vocab_base_pre = by_hash_or_name
    arguments = sys.argv
    sys.argv = [CONVERTER, str(checkpoint), "--outfile", str(file), "--outtype", element_type(file)]
    try:
        converter.main()
    finally:
        sys.argv = arguments


def element_type(file: Path) -> str:
    """``model-q4_k_m.gguf`` has ``q4_k_m``."""
    return file.stem.rpartition("-")[2]


if __name__ == "__main__":
    sources, checkpoint, file = map(Path, sys.argv[1:])
    convert(
        sources, checkpoint, file, pre=pre_tokenizer(checkpoint) if (checkpoint / "tokenizer.json").is_file() else None
    )
