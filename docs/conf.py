"""Builds the documents as a site with Sphinx: `make docs` writes build/site, and fails on a warning.

Sphinx and not MkDocs: Material for MkDocs, the usual theme, ends in May 2027. MyST reads the Markdown as it is, for
people read the same files in the repository.
"""

import re
from typing import Any

project = "Preceptor"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "Preceptor"
html_copy_source = False
html_show_sphinx = False
myst_heading_anchors = 4  # so that a link to a heading is checked
nitpicky = True

NAMED = re.compile(r"`((?:docs|examples)/[\w/.-]+\.md|[A-Z]+\.md)`")
FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
ELSEWHERE = {  # file of the repository -> page of the site, which includes it
    "README.md": "index",
    "CONTRIBUTING.md": "site/contributing",
    "CHANGELOG.md": "site/changelog",
    "examples/recipes/README.md": "site/recipes",
    "examples/smollm2/README.md": "site/smollm2",
}


def setup(app: Any) -> None:
    app.connect("source-read", lambda _app, _page, content: rewrite(content))
    app.connect("include-read", lambda _app, _path, _page, content: rewrite(content))


def rewrite(content: list[str]) -> None:
    """Make links of the documents that a page names, but in code blocks; `content` holds the one text."""
    parts = FENCE.split(content[0])
    content[0] = "".join(part if place % 2 else link_documents(part) for place, part in enumerate(parts))


def link_documents(text: str) -> str:
    """Make a link of each `docs/NAME.md`, and of the documents in ELSEWHERE.

    Example:
        >>> link_documents("see `docs/gpu.md`, `README.md` and `docs/figures.png`")
        'see [`docs/gpu.md`](/gpu.md), [`README.md`](/index.md) and `docs/figures.png`'
    """

    def link(match: re.Match[str]) -> str:
        path = match[1]
        page = f"{ELSEWHERE[path]}.md" if path in ELSEWHERE else path.removeprefix("docs/")
        return f"[`{path}`](/{page})" if page != path else match[0]

    return NAMED.sub(link, text)
