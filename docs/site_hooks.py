"""Make pages of documents that lie outside docs/, so that no text stands twice and links work in both places.

MkDocs calls `on_config` first, `on_files` when it has listed docs/, and `on_page_markdown` for the text of each page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {  # page of the site -> document of the repository
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "harness.md": "tests/fixtures/ranks/README.md",
}
DECISIONS = sorted(f"decisions/{path.name}" for path in (ROOT / "decisions").glob("*.md"))
ELSEWHERE.update(zip(DECISIONS, DECISIONS, strict=True))
LINK = re.compile(r"(\]\(|src=\")([^)#:\"\s]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the decisions at the end of the last section."""
    (section,) = config.nav[-1].values()
    section.append({"Decisions": list(DECISIONS)})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents that lie elsewhere."""
    for page, document in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / document)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between documents of the repository into links between pages; a link to code becomes its name."""
    here = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {document: name for name, document in ELSEWHERE.items()}

    def on_the_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[2]))
        name = pages.get(target, target.removeprefix("docs/"))
        return match[1] + posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(on_the_site, markdown)
