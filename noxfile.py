"""The tasks of the project, each usable alone: ``python3 run.py <task>`` or ``nox -s <task>``.

Python versions and dependency groups are read from pyproject.toml and stated nowhere else.
Environments are kept; one is filled again when pyproject.toml changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "types", "lint", "docs"]

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PROJECT = PYPROJECT["project"]
CORE = PROJECT["dependencies"]
EXTRAS = [
    requirement
    for requirements in PROJECT["optional-dependencies"].values()
    for requirement in requirements
    if not requirement.startswith(PROJECT["name"])  # an extra that names other extras
]
PYTHONS = nox.project.python_versions(PYPROJECT)
FAST = "not full and not browser"
TWIN = (
    *("tests/contract", "tests/properties/test_bad_input.py", "tests/test_asgi.py"),
    *("tests/test_fastapi.py", "tests/test_guard.py", "tests/test_wsgi.py", "tests/test_ids.py"),
    *("tests/test_families.py", "tests/test_logging_batches.py"),
)
"""What tests the request path, for a second run without the accelerator."""
IN_C = (
    *TWIN,
    *("tests/test_accelerator.py", "tests/test_calls.py", "tests/test_django.py"),
    *("tests/test_exposition.py", "tests/test_flask.py", "tests/test_limiter_workers.py"),
    *("tests/test_limits_in_c.py", "tests/test_store.py", "tests/test_workers_numbers.py"),
)
"""What runs most of the C."""


@nox.session
def tests(session: nox.Session) -> None:
    """The fast tests against the built wheel, outside the checkout; branch coverage >= 95 %.

    Arguments go to pytest; with any, coverage is not asked for.
    """
    check_wheel(session, "-m", FAST, coverage=not session.posargs)


@nox.session(python=PYTHONS, default=False)
def versions(session: nox.Session) -> None:
    """The fast tests on every supported Python that this machine has."""
    check_wheel(session, "-m", FAST)


@nox.session(default=False)
def full(session: nox.Session) -> None:
    """Every test: the whole server matrix, soak and fault tests."""
    check_wheel(session, "--timeout", "900", profile="full")


@nox.session(default=False)
def sanitized(session: nox.Session) -> None:
    """What runs the C, with GCC's sanitizers in it: an access beyond what is ours, or one whose
    outcome C leaves open, ends the process with a report.
    """
    library = str(session.run("gcc", "-print-file-name=libasan.so", external=True, silent=True))
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
    instrumented = {
        "CFLAGS": flags,
        "LD_PRELOAD": library.strip(),
        "PYTHONMALLOC": "malloc",  # else each object is a part of a block, whose edges nobody sees
        # CPython keeps some memory to its end, and SIGBUS has a handler of ours.
        "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    check_wheel(session, "-m", FAST, "--timeout", "600", *IN_C, environ=instrumented)


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict and pyright over the library, the adapters and the typing samples."""
    fill(session, *group("types"), *CORE, *EXTRAS)
    session.run("mypy")
    session.run("pyright", "--pythonpath", str(Path(session.bin, "python")))


@nox.session
def lint(session: nox.Session) -> None:
    """ruff check and ruff format --check; with `--fix` it repairs instead."""
    fill(session, *group("lint"))
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []))
    session.run("ruff", "format", *([] if fix else ["--check"]))


@nox.session
def docs(session: nox.Session) -> None:
    """Run the code blocks of the README and of docs/ against the built wheel."""
    check_wheel(session, "tests/test_docs.py", packages=group("docs"))


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """The overhead gate and the comparisons; `--quick` is the gate of continuous integration."""
    fill(session, *group("bench"), *fast(session), "--editable", str(ROOT))
    session.run("python", "-m", "benchmarks", *session.posargs, interrupt_timeout=10)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """A real service with everything on, real traffic, and what came out; ends on Ctrl-C."""
    fill(session, *fast(session), "--editable", f"{ROOT}[demo]")
    # On Ctrl-C the demo stops its server by itself; nox would kill it after half a second.
    session.run("opsguard", "demo", *session.posargs, interrupt_timeout=20)


def check_wheel(
    session: nox.Session,
    *arguments: str,
    packages: Sequence[str] = (),
    profile: str = "default",
    coverage: bool = False,
    environ: Mapping[str, str] | None = None,
) -> None:
    """Build sdist and wheel, install the wheel, run pytest where the checkout is out of reach.
    `environ` is added to the environment of all but pip.
    """
    fill(session, *(packages or group("tests")), *fast(session), *CORE)
    place = Path(session.virtualenv.location, "run").resolve()
    dist = place / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    build = ("python", "-m", "build", "--no-isolation", "--outdir", str(dist), str(ROOT))
    session.run(*build, silent=True, env=environ)
    (wheel,) = dist.glob("*.whl")
    session.install("--no-deps", "--force-reinstall", str(wheel))

    stage(place / "stage")
    session.chdir(place / "stage")
    environment = {
        **(environ or {}),
        "COVERAGE_FILE": str(place / "coverage"),
        "HYPOTHESIS_PROFILE": profile,
        "TESTED_CHECKOUT": str(ROOT),
        "TESTED_DIST": str(dist),
        "PYTHONPATH": None,
    }
    pytest = ("-m", "pytest", "-n", "auto", "--timeout", "120", *arguments, *session.posargs)
    if not coverage:
        session.run("python", *pytest, env=environment)
        return
    session.run("coverage", "erase", env=environment)
    session.run("coverage", "run", *pytest, env=environment)
    # The wheel runs the request path in C; the Python twin must do the same.
    pure = {**environment, "OPSGUARD_PURE": "1"}
    session.run("coverage", "run", *pytest, *TWIN, env=pure)
    session.chdir(ROOT)  # where [tool.coverage.paths] finds the source of what site-packages ran
    session.run("coverage", "combine", "--quiet", env=environment)
    session.run("coverage", "report", env=environment)


def stage(target: Path) -> None:
    """Copy all but the packages to `target`: tests can import each other, but not the checkout."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in ("tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.md")):
        shutil.copy(path, target)


def fill(session: nox.Session, *requirements: str) -> None:
    """Install into the session's environment, unless that was done with this very pyproject.toml.

    pip needs seconds to find out that there is nothing to do.
    """
    stamp = Path(session.virtualenv.location, "filled")
    wanted = "\n".join([(ROOT / "pyproject.toml").read_text(), *requirements])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    session.install(*requirements)
    stamp.write_text(wanted)


def group(name: str) -> tuple[str, ...]:
    """The requirements of one dependency group."""
    return nox.project.dependency_groups(PYPROJECT, name)


def fast(session: nox.Session) -> tuple[str, ...]:
    """The requirements of the extra `fast`, where wheels exist: not for free-threaded builds."""
    code = "import sysconfig; print(sysconfig.get_config_var('Py_GIL_DISABLED') or 0)"
    free_threaded = str(session.run("python", "-c", code, silent=True, log=False)).strip() == "1"
    return () if free_threaded else tuple(PROJECT["optional-dependencies"]["fast"])
