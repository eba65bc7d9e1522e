"""Upload of an export: to a server on this machine that answers as the hub does."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import dive
from dive.api import reconstruct
from dive.errors import UserError
from dive.hub import card_data, whole_export
from dive.push import PushConfig, published_card, push
from tests.conftest import Build
from tests.workplace import environment

CONFIGURED = "\n## Configuration\n\n```json\n{}\n```\n"
CARD = "---\nlibrary_name: transformers\n---\n\n# A model\n"
ONLINE = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test"}
FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def original(
    build: Build, tokens: Any, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    model = build("llama")
    statistics = dive.collect_statistics(model, {"a": tokens(2, 16), "b": tokens(2, 16, seed=1)})
    moe = reconstruct(model, list(statistics.values()), ratio=0.5, router_init="random")
    return dive.save(moe, tokenizer, tmp_path_factory.mktemp("push") / "checkpoint", card=CARD)


@pytest.fixture
def export(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


class Hub(ThreadingHTTPServer):
    """Answers the requests of an upload, and keeps what was committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, bool] = {}
        """{repository: whether it is private}"""
        self.cards: dict[str, dict[str, Any]] = {}
        """{repository: metadata of its card}"""
        self.faults: list[str] = []
        """What is said of the card that comes."""
        self.committed: dict[str, bytes] = {}
        self.summary = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def reply(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("/revision")[0]
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.reply({"error": "Invalid username or password."}, status=401)
        elif name not in self.server.repositories:
            self.reply({"error": "not found"}, status=404)
        else:
            found = {"id": name, "private": self.server.repositories[name], "sha": "0" * 40, "siblings": []}
            self.reply(found | {"cardData": self.server.cards.get(name)})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b"".join(self.chunks())
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.reply({"error": "Invalid username or password."}, status=401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, asked.get("visibility") == "private")
            self.reply({"url": f"{self.server.address}/{name}"})
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]
            self.reply({"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.committed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                if entry["key"] == "header":
                    self.server.summary = entry["value"]["summary"]
            self.reply({"commitUrl": f"{self.server.address}/me/moe/commit/1", "commitOid": "1", "hookOutput": ""})
        else:  # of the card's metadata
            faults = [{"message": said} for said in self.server.faults]
            self.reply({"warnings": [], "errors": faults}, status=400 if faults else 200)

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def command(*arguments: str, directory: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run ``python -m dive.push`` in a process of its own: huggingface_hub reads its variables when it is imported."""
    line = [sys.executable, "-m", "dive.push", *arguments]
    settings = environment() | {"HF_HOME": str(directory / "home"), "HF_HUB_DISABLE_XET": "1"} | variables
    return subprocess.run(line, cwd=directory, env=settings, capture_output=True, text=True, timeout=300)


def test_the_whole_export_arrives_in_a_private_repository(export: Path, hub: Hub, tmp_path: Path) -> None:
    (export / "notes.pt").write_bytes(b"not for others")
    done = command(f"checkpoint={export}", "repo=me/moe", directory=tmp_path, HF_ENDPOINT=hub.address, **ONLINE)
    assert done.returncode == 0, done.stderr
    assert hub.repositories == {"me/moe": True}
    assert hub.summary == "Upload MixtralForCausalLM"
    assert sorted(hub.committed) == FILES
    assert all(hub.committed[name] == (export / name).read_bytes() for name in FILES if name != "README.md")
    assert (export / "README.md").read_text() == CARD
    published = ModelCard(hub.committed["README.md"].decode())
    assert published.data.to_dict() == {"library_name": "transformers"}
    assert published.text.startswith("\n# A model\n\n## Serving\n")
    assert "vllm serve me/moe\n" in published.text
    assert "left out: notes.pt" in done.stdout
    assert f"{hub.address}/me/moe/commit/1" in done.stdout


def test_the_card_gets_the_base_models_licence_and_what_engines_made_of_it(
    export: Path, hub: Hub, tmp_path: Path
) -> None:
    (export / "README.md").write_text(f"---\nbase_model: o/base\ntags: [mine]\n---\n\n# A model\n{CONFIGURED}")
    engine = {
        "engine": "vllm",
        "verdict": "equal",
        "version": "0.32.0",
        "difference": 1e-6,
        "perplexity": 9.5,
        "equal": 8,
    }
    said = {"checkpoint": str(export), "model": "MixtralForCausalLM", "texts": "test texts", "predicted": 100}
    said |= {"continuations": 8, "tokens": 16, "tolerance": 1e-3, "date": "2026-11-27", "engines": [engine]}
    (export.parent / "verify.json").write_text(json.dumps(said))
    hub.repositories["o/base"] = False
    hub.cards["o/base"] = {"license": "llama3.2", "language": ["en"], "tags": ["theirs"]}
    done = command(f"checkpoint={export}", "repo=me/moe", directory=tmp_path, HF_ENDPOINT=hub.address, **ONLINE)
    assert done.returncode == 0, done.stderr
    card = ModelCard(hub.committed["README.md"].decode())
    data = {"base_model": "o/base", "tags": ["mine"], "license": "llama3.2", "language": ["en"]}
    assert card.data.to_dict() == data
    assert "| vllm | 0.32.0 | 1.0e-06 | 9.5000 | 8 of 8 | equal |\n" in card.text
    assert card.text.index("## Serving") < card.text.index("## In other engines") < card.text.index("## Configuration")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("README.md: ")]
    assert set(line.removeprefix("README.md: ").split(", ")) == set(data)


def test_a_card_that_the_hub_finds_fault_with_is_one_line(export: Path, hub: Hub, tmp_path: Path) -> None:
    hub.faults = ['"license" must be one of [apache-2.0]']
    done = command(f"checkpoint={export}", "repo=me/moe", directory=tmp_path, HF_ENDPOINT=hub.address, **ONLINE)
    assert done.returncode == 1
    assert '- "license" must be one of [apache-2.0]; mend README.md' in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert hub.committed == {}


@pytest.mark.parametrize("header", ["a: [", "- a\n- b", "model-index: 3"])
def test_a_header_that_is_no_metadata_is_one_line(export: Path, header: str) -> None:
    (export / "README.md").write_text(f"---\n{header}\n---\n\n# A model\n")
    with pytest.raises(UserError, match=r"the header of README\.md is no metadata \(.*\); mend it, or export again$"):
        published_card(export, "me/moe")


def test_a_base_models_card_is_read_where_it_lies(tmp_path: Path) -> None:
    found = card_data("embedded")
    assert found is not None
    assert found.license == "apache-2.0"
    for text in ("---\na: [\n---\n", "---\n- a\n---\n"):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "README.md").write_text(text)
        assert card_data(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("# No metadata")
    plain = card_data(str(tmp_path))
    assert plain is not None
    assert plain.license is None
    assert [card_data(path) for path in (str(tmp_path / "gone"), "nobody/nothing")] == [None, None]


def test_engines_that_do_not_serve_it_are_left_out(export: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    (export / "config.json").write_text(json.dumps(config))
    text = published_card(export, "me/moe").text
    assert "vllm serve me/moe" in text
    assert "sglang" not in text


def test_another_exports_engines_are_not_this_ones(export: Path) -> None:
    other = Path(shutil.copytree(export, export.parent / "other"))
    said = {"checkpoint": str(other), "model": "MixtralForCausalLM", "texts": "t", "predicted": 1, "continuations": 1}
    said |= {"tokens": 1, "tolerance": 1e-3, "date": "2026-11-27", "engines": []}
    (export.parent / "verify.json").write_text(json.dumps(said))
    assert "## In other engines" not in published_card(export, "me/moe").text
    assert "## In other engines" in published_card(other, "me/moe").text


@pytest.mark.parametrize(
    ("token", "public", "message"),
    [
        ("hf_other", False, "error: repo=me/moe: the hub refuses (401: Invalid username or password.)"),
        ("hf_test", True, "error: repo=me/moe is there and public; set private=false"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    export: Path, hub: Hub, tmp_path: Path, token: str, public: bool, message: str
) -> None:
    if public:
        hub.repositories["me/moe"] = False
    online = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    done = command(f"checkpoint={export}", "repo=me/moe", directory=tmp_path, **online)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
    assert hub.committed == {}


def test_without_network_it_is_one_line(export: Path, tmp_path: Path) -> None:
    done = command(f"checkpoint={export}", "repo=me/moe", directory=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: repo=me/moe: ")
    assert "does not answer; dry_run=true" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_dry_run_lists_files_sizes_and_message(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(PushConfig(checkpoint=str(export), repo="me/moe", message="First", private=False, dry_run=True))
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()[: len(FILES)]]
    assert [line[-1] for line in lines] == FILES
    size = (export / "README.md").stat().st_size
    assert lines[0][:-1] == [str(size), "B"]
    assert "6 files, " in out
    assert 'to me/moe (public, main): "First"' in out
    assert out.splitlines()[-1] == "dry_run=true: nothing uploaded"


def variant(export: Path, scheme: str, **parts: Any) -> Path:
    """A copy of the export that seems to be quantised."""
    directory = Path(shutil.copytree(export, export.parent / f"checkpoint-{scheme}"))
    found = {"checkpoint": str(export), "model": "M", "scheme": scheme, "stored": "small", "tool": "llm_compressor"}
    (directory / "quantised.json").write_text(json.dumps(found | {"version": "1"} | parts))
    return directory


def test_what_was_quantised_goes_to_repositories_of_its_own(export: Path, hub: Hub, tmp_path: Path) -> None:
    variant(export, "fp8")
    variant(export, "int8", checkpoint="/elsewhere")
    gguf = variant(export, "q8_0", tool="llama_cpp")
    for file in gguf.iterdir():
        if file.name not in ("README.md", "quantised.json"):
            file.unlink()
    (gguf / "model-q8_0.gguf").write_bytes(b"GGUF")
    line = (f"checkpoint={export}", "repo=me/moe", "quantised=true")
    done = command(*line, directory=tmp_path, HF_ENDPOINT=hub.address, **ONLINE)
    assert done.returncode == 0, done.stderr
    assert hub.repositories == {"me/moe": True, "me/moe-fp8": True, "me/moe-q8_0": True}
    assert hub.committed["model-q8_0.gguf"] == b"GGUF"
    card = ModelCard(hub.committed["README.md"].decode())  # of the last
    assert card.data.to_dict()["base_model"] == "me/moe"
    assert "llama-server -m moe-q8_0/model-q8_0.gguf" in card.text
    assert hub.summary == "Upload MixtralForCausalLM, checkpoint-q8_0"


def test_nothing_quantised_is_said(export: Path) -> None:
    with pytest.raises(
        UserError, match=r"^quantised=true: nothing was quantised from .*; run python -m dive\.quantise first"
    ):
        push(PushConfig(checkpoint=str(export), repo="me/moe", quantised=True, dry_run=True))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def shards(directory: Path, *, absent: bool) -> None:
    """Two files and their index; the index names a tensor too many if ``absent``."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    places = {name: file for file, part in parts.items() for name in part}
    index = {"weight_map": places | ({"zero": "b.safetensors"} if absent else {})}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), "no such directory"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text("{}"), "config.json names no class"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda d: cut(d / "model.safetensors"), "model.safetensors is damaged"),
        (lambda d: shards(d, absent=True), r"b.safetensors lacks 1 tensors of the index \(first: zero\)"),
        (lambda d: (shards(d, absent=False), (d / "b.safetensors").unlink()), "no b.safetensors"),
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda d: (d / "tokenizer_config.json").unlink(), "no tokenizer_config.json"),
        (lambda d: (d / "README.md").unlink(), "README.md is not a model card"),
        (lambda d: (d / "README.md").write_text("# A model"), "README.md is not a model card"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(export: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(export)
    with pytest.raises(UserError, match=message):
        whole_export(export)


def test_shards_are_whole_too(export: Path) -> None:
    shards(export, absent=False)
    files, left_out = whole_export(export)
    assert {"a.safetensors", "b.safetensors", "model.safetensors.index.json"} < {file.name for file in files}
    assert left_out == []


@pytest.mark.parametrize("repo", ["moe", "me/moe/2", "https://x/y"])
def test_a_repository_needs_a_user_and_a_name(repo: str) -> None:
    with pytest.raises(UserError, match="is not of the form user/name"):
        PushConfig(checkpoint="x", repo=repo)


@pytest.mark.parametrize(
    "repo", ["../x", "me/..", "/moe", "me/", "me/mo e", "me/mo--e", "me/moe.git", f"me/{'x' * 97}"]
)
def test_a_repository_is_named_by_the_hubs_rules(repo: str) -> None:
    with pytest.raises(UserError, match=r"^repo \(.*; set repo=USER/NAME$"):
        PushConfig(checkpoint="x", repo=repo)
