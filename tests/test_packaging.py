"""What is built and installed: the right files, the right metadata, the right words around it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import opsguard

NAME = "opsguard-toolkit"
PACKAGES = {
    "opsguard": "opsguard",
    "opsguard_asgi": "adapters/opsguard_asgi",
    "opsguard_wsgi": "adapters/opsguard_wsgi",
    "opsguard_fastapi": "adapters/opsguard_fastapi",
    "opsguard_flask": "adapters/opsguard_flask",
    "opsguard_django": "adapters/opsguard_django",
}

COMPILED = {".c", ".h", ".so"}
"""The source is for who builds, the module for whom it could be built."""


@pytest.fixture(scope="module")
def dist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist and the wheel made from it: nox's, or built here."""
    if "TESTED_DIST" in os.environ:
        return Path(os.environ["TESTED_DIST"])
    made = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", made, checkout]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return made


@pytest.fixture(scope="module")
def wheel(dist: Path) -> set[str]:
    """The names of the files in the wheel."""
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(dist: Path) -> Message:
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def pyproject(checkout: Path) -> dict[str, dict[str, object]]:
    return tomllib.loads((checkout / "pyproject.toml").read_text("utf-8"))


def test_the_wheel_installs_the_packages_and_nothing_else(wheel: set[str]) -> None:
    """No `tests`, `benchmarks` or `adapters` lands in site-packages beside the six packages."""
    tops = {name.split("/")[0] for name in wheel}

    assert tops == {*PACKAGES, f"opsguard_toolkit-{opsguard.__version__}.dist-info"}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_has_every_file_of_a_package(
    package: str, checkout: Path, wheel: set[str]
) -> None:
    """Modules, `py.typed` and data files alike: a flat layout would hide that one is missing."""
    home = checkout / PACKAGES[package]
    sources = {
        f"{package}/{path.relative_to(home).as_posix()}"
        for path in home.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in COMPILED
    }
    packed = {name for name in wheel if Path(name).suffix not in COMPILED}

    assert f"{package}/py.typed" in sources
    assert {name for name in packed if name.startswith(f"{package}/")} == sources


def test_the_adapters_folder_is_no_package(checkout: Path) -> None:
    """With an `__init__.py` there, an adapter could be imported twice under two names."""
    assert not (checkout / "adapters" / "__init__.py").exists()


def test_the_sdist_can_test_itself(dist: Path) -> None:
    """Who packages from the sdist has the tests, the tasks and the licence."""
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    wanted = {"LICENSE", "README.md", "noxfile.py", "pyproject.toml", "run.py"}
    assert wanted | {"tests/conftest.py", "adapters/opsguard_asgi/__init__.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".nox")]


def test_the_metadata_says_what_users_rely_on(metadata: Message) -> None:
    assert metadata["Name"] == NAME
    assert metadata["Version"] == opsguard.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_the_core_depends_on_eight_packages(metadata: Message) -> None:
    """A ninth is a decision, not an accident."""
    core = {
        re.split(r"[^\w.-]", requirement)[0].lower()
        for requirement in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in requirement
    }

    assert core == {
        "asgiref",
        "limits",
        "opentelemetry-api",
        "prometheus-client",
        "pydantic",
        "pydantic-settings",
        "python-dotenv",
        "python-json-logger",
    }


def test_the_extra_all_has_every_feature(metadata: Message) -> None:
    """All but `demo`, which adds servers and no feature."""
    needed: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, extra = line.partition("; extra == ")
        needed.setdefault(extra.strip("'\""), set()).add(requirement)

    features = set(metadata.get_all("Provides-Extra", [])) - {"all", "demo"}
    assert features
    assert needed["all"] == set().union(*(needed[feature] for feature in features))


def test_the_installed_version_is_the_one_in_the_source() -> None:
    assert importlib.metadata.version(NAME) == opsguard.__version__


def test_the_command_is_installed() -> None:
    """`opsguard` on the command line is `opsguard.cli:main`."""
    (command,) = importlib.metadata.distribution(NAME).entry_points.select(
        group="console_scripts", name="opsguard"
    )

    assert callable(command.load())


def test_continuous_integration_runs_every_python_we_promise(
    checkout: Path, pyproject: dict[str, dict[str, object]]
) -> None:
    classifiers = pyproject["project"]["classifiers"]
    assert isinstance(classifiers, list)
    promised = {line.split(" :: ")[-1] for line in classifiers if re.search(r":: 3\.\d+$", line)}
    matrix = re.search(r"python: \[(.*)\]", (checkout / ".github/workflows/ci.yml").read_text())

    assert matrix
    assert set(re.findall(r'"([\d.]+t?)"', matrix[1])) == {*promised, "3.14t"}


def test_nobody_is_told_to_install_another_project(checkout: Path) -> None:
    """The name `opsguard` on the public index is not ours; ours is `opsguard-toolkit`."""
    wrong = re.compile(
        r"\b(?:pip3?|pipx|poetry|pdm|uv)\s+(?:install|add)\b[^\n`]*[\s\"']opsguard(?![\w/-])"
    )
    pages = [
        *checkout.glob("*.md"),
        *(checkout / "docs").rglob("*.md"),
        *(checkout / "opsguard").rglob("*.py"),
        *(checkout / "adapters").rglob("*.py"),
    ]

    assert wrong.search("pip install opsguard")
    assert wrong.search('pip install "opsguard[cli]"')
    assert not wrong.search("pip install opsguard-toolkit")
    assert [page.name for page in pages if wrong.search(page.read_text("utf-8"))] == []
