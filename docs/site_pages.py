"""What the site has from outside docs/, for mkdocs.yml: two pages, and the pictures and files that pages link to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}  # in the repository, and on the site
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)\)")  # text and path; none to an anchor or another site
ROLE = re.compile(r":(?:func|class|meth|mod):(?=<code>)")  # Sphinx's marks in docstrings


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages from outside docs/, and what all pages link to."""
    outside = dict(PAGES)
    for source in [*(ROOT / path for path in PAGES), *(ROOT / "docs").glob("*.md")]:
        outside |= {path: path for path in linked_files(source) if not path.startswith("docs/") and path not in PAGES}
    for path, site_path in outside.items():
        files.append(File.generated(config, site_path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository, as links of the site. A folder has no page: its name stays, as text."""
    from_outside = page.file.src_uri in PAGES.values()
    folder = ROOT if from_outside else ROOT / "docs"

    def on_site(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = in_repository(folder / target)
        if path is None:
            return link[0]
        return text if (ROOT / path).is_dir() else f"[{text}]({PAGES.get(path, path.removeprefix('docs/'))})"

    return LINK.sub(on_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names in docstrings as code, without Sphinx's marks."""
    return ROLE.sub("", html)


def linked_files(source: Path) -> Iterator[str]:
    """The repository's files that a page links to, by their paths in it."""
    for _text, target in LINK.findall(source.read_text()):
        path = in_repository(source.parent / target)
        if path is not None and (ROOT / path).is_file():
            yield path


def in_repository(path: Path) -> str | None:
    """The path from the root of the repository; None if nothing is there."""
    resolved = path.resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.exists() and resolved.is_relative_to(ROOT) else None
