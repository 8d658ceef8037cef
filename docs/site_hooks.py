"""Hooks of MkDocs: pages of the site whose files are at the root of the repository."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# File at the root, and its place in the site.
_AT_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "CITATION.cff",
}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files that GitHub expects at the root of the repository."""
    root = Path(config.config_file_path).parent
    for name, place in _AT_ROOT.items():
        files.append(File.generated(config, place, content=(root / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links from the root into `docs/`, and links to files at the root, at their places in the site."""
    if page.file.src_uri in _AT_ROOT.values():
        markdown = markdown.replace("](docs/", "](").replace('src="docs/', 'src="')
        links = _AT_ROOT
    else:
        links = {f"../{name}": place for name, place in _AT_ROOT.items()}
    for name, place in links.items():
        markdown = markdown.replace(f"]({name}", f"]({place}")
    return markdown
