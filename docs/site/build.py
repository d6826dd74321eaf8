"""The documentation as a site, in build/site: `make docs`. Another directory can be named.

    docs/*.md                  as they are; links to files of the tree lead to pages of the site
    reference/configuration    from the JSON Schema and conf/relay.yaml
    reference/commands         from what `--help` says
    reference/http             from the OpenAPI document
    reference/metrics          from what /metrics tells
    reference/delivery-log     from events that the log's dictionary composes, and the page about it

The pages are put together in site-pages beside it, and Zensical makes the site of them. A link that
leads nowhere ends the build, and so does a field of the delivery log that no page explains.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from reference import commands, configuration, delivery_log, http, metrics

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

MOVED = {
    "README.md": "pages.md",
    "../README.md": "index.md",
    "../CHANGELOG.md": "changelog.md",
    "../SECURITY.md": "reporting.md",
    "../conf/relay.yaml": "reference/configuration.md",
}
"""What the pages of docs/ link to by its place in the tree, and where it is in the site."""

TOP = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "reporting.md"}
"""Pages of the tree's top, which link to the others as docs/…"""


def main() -> None:
    build = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build"
    pages = build / "site-pages"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("site", "__pycache__"))
    for page in pages.glob("*.md"):
        _write(page, _moved(_read(page), MOVED))
    (pages / "README.md").rename(pages / "pages.md")
    for name, page_name in TOP.items():
        text = _read(ROOT / name).replace("](docs/", "](")
        _write(pages / page_name, _moved(text, TOP))
    reference = {
        "configuration": configuration(_read(ROOT / "conf/relay.yaml")),
        "commands": commands(),
        "http": http(),
        "metrics": metrics(),
        "delivery-log": delivery_log(_read(DOCS / "reading-the-delivery-log.md")),
    }
    for name, text in reference.items():
        _write(pages / "reference" / f"{name}.md", text)
    # Zensical works beside its settings: copied, they leave nothing in docs/.
    shutil.copy(DOCS / "site/zensical.toml", build)
    command = (str(Path(sys.executable).parent / "zensical"), "build", "--clean", "--strict")
    done = subprocess.run([*command, "--config-file", "zensical.toml"], cwd=build, check=False)
    sys.exit(done.returncode)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _moved(text: str, places: Mapping[str, str]) -> str:
    """The text with its links leading to where the site has the same."""

    def moved(link: re.Match[str]) -> str:
        path, mark, anchor = link[1].partition("#")
        return f"]({places.get(path, path)}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, text)


if __name__ == "__main__":
    main()
