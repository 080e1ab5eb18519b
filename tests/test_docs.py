"""The documentation is true: its code runs, its links lead somewhere, its data parses.

How a page is run, in one process of its own, from top to bottom:

- A Python block runs in a namespace of its own. One whose first line is ``# name.py`` is written to
  that file and imported, so that later blocks and commands can name it. An app that it has as
  `app` or `application` is asked for an item and for its metrics.
- A command that starts a server is not run, but the app it names must be there by then.

Run by hand: ``python tests/test_docs.py docs/how-to/flask.md``.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

from opsguard.testing import Request, call_asgi, call_wsgi

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|work|mnt|build)/[\w.]|\b[A-Z]:\\")
FROM_INDEX = re.compile(
    r"\b(?:pip[x3]?|uv|poetry|pdm|conda)\b[^\n`]*\b(?:install|add)\b[^\n`]*[\s\"']opsguard[^\n`]*"
)
FIRST_PAGES = ("fastapi", "flask", "django", "asgi", "wsgi")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and the line of the page it begins at."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that the first line names, as ``# shop/settings.py``."""
        named = re.match(r"# ([\w/]+\.py)\n", self.text)
        return named[1] if named else None


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of these languages, all without any."""
    return [
        Block(language, token.content, token.map[0] + 1 if token.map else 0)
        for token in MarkdownIt().parse(page.read_text("utf-8"))
        if token.type == "fence"
        for language in [token.info.split(" ")[0]]
        if not languages or language in languages
    ]


def links(page: Path) -> Iterator[str]:
    """The targets of all links and images."""
    tokens = MarkdownIt().enable("table").parse(page.read_text("utf-8"))
    for inline in tokens:
        for token in inline.children or ():
            for attribute in ("href", "src"):
                target = token.attrs.get(attribute)
                if target is not None:
                    yield str(target)


def anchors(page: Path) -> set[str]:
    """What a link may have behind ``#``, as GitHub names headings."""
    tokens = MarkdownIt().parse(page.read_text("utf-8"))
    titles = [
        "".join([part.content for part in following.children or ()])
        for token, following in itertools.pairwise(tokens)
        if token.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


HAS_CODE = [name for name, page in zip(NAMES, PAGES, strict=True) if blocks(page, "python")]


@pytest.mark.parametrize("name", HAS_CODE)
def test_the_code_of_a_page_runs(name: str, tmp_path: Path) -> None:
    """Every Python block runs without a warning; every app that a command names is there."""
    command = [sys.executable, "-P", __file__, str(ROOT / name)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OPSGUARD_", "DJANGO_"))}

    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, f"{done.stderr}\n{done.stdout[-2000:]}"


@pytest.mark.parametrize("name", NAMES)
def test_data_on_a_page_parses(name: str) -> None:
    """TOML blocks are TOML; JSON blocks are one JSON text or one on each line."""
    for block in blocks(ROOT / name, "toml"):
        tomllib.loads(block.text)
    for block in blocks(ROOT / name, "json"):
        try:
            json.loads(block.text)
        except ValueError:
            assert [json.loads(line) for line in block.text.splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    """A link within the project names a file that is there, and a heading in it."""
    page = ROOT / name
    lost = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path) if path else page
        found = _in_checkout(target)
        if not found or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            lost.append(link)

    assert not lost


def test_every_page_can_be_found() -> None:
    """Each page under docs/ is linked from docs/index.md."""
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}

    unlinked = [page for page in PAGES if page.is_relative_to(index.parent) and page != index]

    assert [page.name for page in unlinked if page.resolve() not in linked] == []


@pytest.mark.parametrize("name", NAMES)
def test_nobody_is_sent_to_an_index(name: str) -> None:
    """The package is installed from the checkout: what an index has under `opsguard` is another
    project's.
    """
    assert not FROM_INDEX.findall((ROOT / name).read_text("utf-8"))


@pytest.mark.parametrize(
    ("pattern", "text", "wrong"),
    [
        (MACHINE_PATH, "see /home/alice/app.py", True),
        (MACHINE_PATH, "C:\\Users\\alice", True),
        (MACHINE_PATH, "(/root/.venv/bin)", True),
        (MACHINE_PATH, "docs/home/page.md", False),
        (MACHINE_PATH, "/dev/shm and /metrics", False),
        (FROM_INDEX, "pip install opsguard", True),
        (FROM_INDEX, 'python3 -m pip install -U "opsguard-toolkit[flask]"', True),
        (FROM_INDEX, "uv add opsguard_flask", True),
        (FROM_INDEX, 'pip install ".[flask]"', False),
        (FROM_INDEX, "pip install .     # opsguard", True),
        (FROM_INDEX, "poetry install, then import opsguard", True),
        (FROM_INDEX, "installed by pip; what an index calls opsguard is another", False),
    ],
)
def test_what_pages_must_not_say_is_recognised(
    pattern: re.Pattern[str], text: str, wrong: bool
) -> None:
    """The patterns find what they should; in doubt they find too much."""
    assert bool(pattern.search(text)) is wrong


@pytest.mark.parametrize("name", NAMES)
def test_no_page_names_a_path_of_a_machine(name: str) -> None:
    """What was pasted from somebody's terminal is cleaned first."""
    assert not MACHINE_PATH.findall((ROOT / name).read_text("utf-8"))


def test_the_changelog_is_kept() -> None:
    """As keepachangelog.com has it: an Unreleased section at the top, known kinds of change."""
    headings = re.findall(r"^(##+) (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    versions = [title for level, title in headings if level == "##"]
    kinds = {title for level, title in headings if level == "###"}

    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", one) for one in versions[1:])
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize(
    "package",
    ["opsguard", *(f"opsguard_{framework}" for framework in FIRST_PAGES)],
)
def test_the_reference_names_every_public_name(package: str) -> None:
    """docs/reference/api.md has each name that a package exports."""
    page = (ROOT / "docs" / "reference" / "api.md").read_text("utf-8")
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    exported = importlib.import_module(package).__all__

    missing = [name for name in exported if f"`{name}" not in sections[package]]

    assert missing == []


@pytest.mark.parametrize("framework", FIRST_PAGES)
def test_the_readme_has_a_first_page_for_each_framework(framework: str) -> None:
    """A reader of any framework finds their code on the first page, and a page to go on with."""
    readme = ROOT / "README.md"

    assert f"from opsguard_{framework} import" in "".join(b.text for b in blocks(readme, "python"))
    assert f"docs/how-to/{framework}.md" in list(links(readme))


def _in_checkout(target: Path) -> bool:
    """Whether a file is there: beside the page, or, under nox, in the checkout that the pages were
    copied from without the packages.
    """
    if target.exists():
        return True
    checkout = os.environ.get("TESTED_CHECKOUT")
    return checkout is not None and (checkout / target.resolve().relative_to(ROOT)).exists()


# What follows runs in the process of one page. ---------------------------------------------------


def run_page(page: Path) -> None:
    """Run the page's blocks in their order, in the working directory, which should be empty."""
    sys.path.insert(0, str(Path.cwd()))
    for block in blocks(page):
        if block.language == "python" and block.file:
            serve_once(write_and_import(block), page.name == "README.md")
        elif block.language == "python":
            source = "\n" * block.line + block.text  # so that tracebacks have the page's lines
            exec(compile(source, str(page), "exec"), {"__name__": f"block_{block.line}"})
        elif block.language in ("console", "sh", "bash"):
            check_commands(block.text)


def write_and_import(block: Block) -> Any:
    """The module of a block that names its file; one of that name on the page before it is gone."""
    assert block.file is not None
    path = Path(block.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, "utf-8")
    name = ".".join(path.with_suffix("").parts)
    if path.name == "settings.py":
        os.environ["DJANGO_SETTINGS_MODULE"] = name
    for known in [known for known in sys.modules if known == name]:
        del sys.modules[known]
    importlib.invalidate_caches()
    return importlib.import_module(name)


def check_commands(text: str) -> None:
    """What a server is told to serve can be imported; a factory is called."""
    for line in re.findall(r"^(?:\$ )?((?:uvicorn|gunicorn|granian|hypercorn) .*)$", text, re.M):
        module, attribute = re.findall(r"(?<=[\s\"])([\w.]+):(\w+)", line)[-1]
        found = getattr(importlib.import_module(module), attribute)
        if "--factory" in line or f"{attribute}()" in line:
            found = found()
        assert callable(found), line


def serve_once(module: Any, strictly: bool) -> None:
    """Ask the module's app, if it has one, for an item and for its metrics.

    `strictly`: the item must be there, and be named by its template.
    """
    app = getattr(module, "app", None) or getattr(module, "application", None)
    if app is None:
        return
    call = call_asgi if takes_asgi(app) else call_wsgi
    item, metrics = call(app, Request("/items/3")), call(app, Request("/metrics"))
    assert re.fullmatch("[0-9a-f]{32}", *item.header("x-request-id")), item
    assert metrics.status == 200, metrics
    if strictly:
        assert item.status == 200, item
        assert b'endpoint="/items/{item_id}",status="200"} 1.0' in metrics.body, metrics.body


def takes_asgi(app: Any) -> bool:
    """Whether it is to be called as ASGI has it."""
    return any(map(inspect.iscoroutinefunction, (app, type(app).__call__)))


if __name__ == "__main__":
    # Under -W error the interpreter's own start would count; from here on every warning is one.
    warnings.simplefilter("error")
    # Starlette's test client would like another client library than the one that is installed.
    warnings.filterwarnings("ignore", message=r"Using `httpx` with")
    where = Path(sys.argv[1]).resolve()
    if any(Path.cwd().iterdir()):
        os.chdir(tempfile.mkdtemp())
    run_page(where)
