"""Texts from files: what is read, and what is said when it cannot be."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from dive.calibration_domains.local import (
    domain_directories,
    passed_over,
    printable,
    read_documents,
    split_file,
    text_files,
)
from dive.errors import UserError
from dive.model.chat import Conversation, conversation
from tests.workplace import environment

WHERE = "calibration_domains"


def read(file: Path, field: str = "text") -> list[str]:
    return read_documents(file, field=field, where=WHERE)


def parquet(file: Path, columns: dict[str, list[object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def jsonl(file: Path, *rows: object) -> Path:
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


def test_jsonl_has_a_document_a_line(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "one\ntwo", "id": 1}, {"text": "  "}, {"text": "drei ½"})
    assert read(file) == ["one\ntwo", "drei ½"]
    file.write_text(file.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")  # blank lines do no harm
    assert read(file) == ["one\ntwo", "drei ½"]


def test_txt_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo ½\n", encoding="utf-8")
    assert read(tmp_path / "a.txt") == ["one\n\ntwo ½\n"]


def test_parquet_has_a_document_a_row(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["one", None, " ", "two ½"], "n": [1, 2, 3, 4]})
    assert read(file) == ["one", "two ½"]


def test_another_column(tmp_path: Path) -> None:
    assert read(jsonl(tmp_path / "a.jsonl", {"body": "x", "text": "y"}), "body") == ["x"]
    assert read(parquet(tmp_path / "a.parquet", {"body": ["x"], "text": ["y"]}), "body") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xffabc", r"is not UTF-8 text \(byte 0\)"),
        ("a.jsonl", b'{"text": "\xc3\x28"}', "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', r"a\.jsonl:3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["a"]', r"a\.jsonl:2 has no text column 'text' \(it has list\)"),
        ("a.jsonl", b'{"id": 1, "body": "a"}', r"a\.jsonl:1 has no text column 'text' \(it has \['body', 'id'\]\)"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl:1 has no text column"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.parquet", b"PAR1 not really", "is not a readable parquet file"),
        ("a.parquet", b"", "is not a readable parquet file"),
        ("a.csv", b"text\na", r"is none of \.jsonl, \.txt, \.parquet"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(file)
    assert str(caught.value).startswith(f"{WHERE}: {file}") or str(file) in str(caught.value)


def test_parquet_without_the_column_or_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no column 'text' \(it has \['body'\]\)"):
        read(parquet(tmp_path / "a.parquet", {"body": ["x"]}))
    with pytest.raises(UserError, match=r"column 'text' of .* is not text"):
        read(parquet(tmp_path / "b.parquet", {"text": [1, 2]}))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for suffix in ("txt", "jsonl", "parquet"):
        with pytest.raises(UserError, match=r"cannot be read \(.*No such file"):
            read(tmp_path / f"missing.{suffix}")


def test_the_file_of_a_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train\.jsonl, train\.txt or train\.parquet in"):
        split_file(tmp_path, "train", where=WHERE)
    (tmp_path / "train.txt").write_text("x")
    assert split_file(tmp_path, "train", where=WHERE) == tmp_path / "train.txt"
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(UserError, match="more than one train"):
        split_file(tmp_path, "train", where=WHERE)


def test_domain_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^calibration_domains\.path=.*: no <domain>/train"):
        domain_directories(str(tmp_path), None, where=WHERE)
    for name in ("law", "code", "notes"):
        (tmp_path / name).mkdir()
    for name in ("law", "code"):
        (tmp_path / name / "train.txt").write_text("x")
    assert list(domain_directories(str(tmp_path), None, where=WHERE)) == ["code", "law"]
    assert domain_directories(str(tmp_path), ["law", "code"], where=WHERE) == {
        "law": tmp_path / "law",
        "code": tmp_path / "code",
    }
    with pytest.raises(UserError, match=r"^calibration_domains\.domains: \['notes'\] not among \['code', 'law'\]"):
        domain_directories(str(tmp_path), ["law", "notes"], where=WHERE)
    with pytest.raises(UserError, match="no such directory"):
        domain_directories(str(tmp_path / "nowhere"), None, where=WHERE)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({"text": "½"}) if name == "a.jsonl" else "½", encoding="utf-8-sig")
    assert read(tmp_path / name) == ["½"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} is not a file"):
            read(tmp_path / name)


def domain(folder: Path, file: str = "train.txt") -> Path:
    folder.mkdir()
    (folder / file).write_text("x")
    return folder


def test_a_misnamed_file_is_named(tmp_path: Path) -> None:
    domain(tmp_path / "code")
    domain(tmp_path / "law", "Train.jsonl")
    with pytest.raises(UserError, match=r"^calibration_domains\.path=.*law/Train\.jsonl must be named train\.jsonl$"):
        domain_directories(str(tmp_path), None, where=WHERE)
    assert list(domain_directories(str(tmp_path), ["code"], where=WHERE)) == ["code"]


def test_folders_that_are_no_domains_are_listed(tmp_path: Path) -> None:
    domain(tmp_path / "code")
    domain(tmp_path / "law", "test.jsonl")
    for name in ("notes", ".git"):
        (tmp_path / name).mkdir()
    assert passed_over(str(tmp_path)) == ["law", "notes"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    domain(tmp_path / "code")
    (tmp_path / "law").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"^calibration_domains\.path=.*/law is a link to nothing"):
        domain_directories(str(tmp_path), None, where=WHERE)


def test_a_name_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    domain(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(UserError, match=r"the name of .*/caf\\xe9 is not UTF-8; rename") as caught:
        domain_directories(str(tmp_path), None, where=WHERE)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # logs are UTF-8
    assert printable(tmp_path / "café") == str(tmp_path / "café")


UNREADABLE = """
import os, sys
from pathlib import Path
from dive.calibration_domains.local import domain_directories, split_file, text_files
from dive.errors import UserError
os.setgroups([]); os.setgid(65534); os.setuid(65534)  # after the imports: Python itself may be root's
root = sys.argv[1]
for read in (
    lambda: domain_directories(root, None, where="calibration_domains"),
    lambda: domain_directories(root + "/law", None, where="calibration_domains"),
    lambda: domain_directories(root + "/law/below", None, where="calibration_domains"),
    lambda: split_file(Path(root, "law"), "train", where="calibration_domains"),
    lambda: text_files(root, where="retrain.corpus.path"),
):
    try:
        print("read", read())
    except UserError as error:
        print(error)
"""


def test_what_cannot_be_read_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes the user's rights away, which root alone can")
    root = tmp_path / "domains"
    root.mkdir()
    domain(root / "code")
    domain(root / "law").chmod(0o700)
    for folder in (root, *root.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    command = [sys.executable, "-c", UNREADABLE, str(root)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(found) == 5, found
    for line, where in zip(found, [*["calibration_domains"] * 4, "retrain.corpus.path"], strict=True):
        assert line.startswith(where), line
        assert "/law" in line
        assert "cannot be read (Permission denied)" in line, line


def test_text_files_of_a_folder(tmp_path: Path) -> None:
    below = domain(tmp_path / "a.txt", "b.txt")  # a folder's name does not matter
    (tmp_path / "c.md").write_text("x")
    assert text_files(str(tmp_path), where=WHERE) == [below / "b.txt"]
    assert text_files(str(below / "b.txt"), where=WHERE) == [below / "b.txt"]
    assert text_files(str(tmp_path / "nothing"), where=WHERE) == []


def test_a_column_of_conversations(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = partial(conversation, chat_tokenizer)
    said: list[object] = [{"role": "user", "content": "hi ½"}, {"role": "assistant", "content": "the cat"}]
    rows: list[object] = [{"talk": said}, {"talk": []}, {"talk": "plain"}]
    files = [
        jsonl(tmp_path / "a.jsonl", *rows),
        parquet(tmp_path / "a.parquet", {"talk": [said, None, []]}),
    ]
    for file in files:
        first, *others = read_documents(file, field="talk", where=WHERE, chat=chat)
        assert first == "<s>user: hi ½</s>assistant: the cat</s>"
        assert isinstance(first, Conversation)
        assert others == (["plain"] if file.suffix == ".jsonl" else [])
        with pytest.raises(UserError, match=r"no text column 'talk'|is not text"):
            read(file, "talk")


def test_the_row_of_a_malformed_conversation_is_named(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = partial(conversation, chat_tokenizer)
    rows: list[list[object]] = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": None}]]
    file = jsonl(tmp_path / "a.jsonl", *({"text": row} for row in rows))
    with pytest.raises(UserError, match=rf"^{WHERE}: {file}:2: message 1 needs"):
        read_documents(file, field="text", where=WHERE, chat=chat)
    file = parquet(tmp_path / "a.parquet", {"text": rows})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=rf"^{WHERE}: {file}, row 2: message 1 needs"):
        read_documents(file, field="text", where=WHERE, chat=chat)
    file = jsonl(tmp_path / "b.jsonl")
    file.write_text('{"text": [{"role": "user", "content": "\\ud800"}]}')
    with pytest.raises(UserError, match="half a surrogate pair"):
        read_documents(file, field="text", where=WHERE, chat=chat)
