"""What MkDocs does not do by itself: pages of the options, the root's own pages, and links into the repository."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from options import pages

ROOT = Path(__file__).resolve().parents[1]
FROM_THE_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""{page of the site: file of the repository}"""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not files of ``docs/``."""
    written = {page: (ROOT / file).read_text(encoding="utf-8") for page, file in FROM_THE_ROOT.items()}
    for path, text in (pages() | written).items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Send links to files outside of ``docs/`` to the repository, or leave their text alone where it has no address.

    GitHub wants the bars of code in a table escaped, and Python-Markdown shows the backslash.
    """
    root_page = page.file.src_uri in FROM_THE_ROOT

    def mended(found: "re.Match[str]") -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        here = "" if root_page else posixpath.dirname(f"docs/{page.file.src_uri}")
        path = posixpath.normpath(posixpath.join(here, target))
        if path.startswith("docs/") and not path.endswith(".py"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})" if root_page else found[0]
        if path in FROM_THE_ROOT.values() or not (ROOT / path).exists():
            known = {file: name for name, file in FROM_THE_ROOT.items()}
            return f"[{text}]({known[path]}{anchor})" if path in known else found[0]
        return f"[{text}]({config.repo_url}/blob/main/{path})" if config.repo_url else text

    linked = re.sub(r"(?<!!)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", mended, markdown)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("\\|", "|"), linked)
