"""The rules of the house, read from the source: who may import whom, and what importing may do.

Each rule is a function from parsed modules to complaints. It is run on the packages as installed,
and on small planted modules that break it, so that a rule that has gone blind is noticed.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

# The house from the ground up. A room imports from floors below it. From its own floor it imports
# other rooms by their front door only, and never in a circle. Type-only imports may look up.
FLOORS: dict[str, set[str]] = {
    "values": {
        "accelerator",
        "addresses",
        "calls",
        "clock",
        "context",
        "enforcing",
        "exceptions",
        "forks",
        "http",
        "ids",
        "marks",
        "patterns",
        "policies",
        "rates",
        "settings",
    },
    "primitives": {
        *("errors", "failures", "hardening", "health", "keys", "lifecycle", "limiter"),
        *("logging", "metrics", "problems", "redaction", "tracing", "views", "workers"),
    },
    "composer": {
        *("admission", "endpoints", "exchange", "guard", "inspection", "plan", "ports"),
        *("runtime", "steps"),
    },
    "front": {"opsguard"},
    "protocols": {"opsguard_asgi", "opsguard_wsgi"},
    "frameworks": {"opsguard_django", "opsguard_fastapi", "opsguard_flask"},
    "tools": {"__main__", "cli", "demo", "testing"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
HEIGHT = {floor: height for height, floor in enumerate(FLOORS)}

# An adapter translates: it speaks to the composer, in values. Primitives are not its business.
SEEN_BY_ADAPTERS = {"values", "composer", "front", "protocols"}

# The framework that each adapter is for, by the names it may import.
ADAPTERS: dict[str, set[str]] = {
    "opsguard_asgi": set(),
    "opsguard_wsgi": set(),
    "opsguard_fastapi": {"fastapi", "starlette"},
    "opsguard_flask": {"flask", "werkzeug"},
    "opsguard_django": {"django"},
}
PACKAGES = ("opsguard", *ADAPTERS)

FRAMEWORKS = {
    *("aiohttp", "bottle", "cherrypy", "django", "falcon", "fastapi", "flask", "litestar"),
    *("pyramid", "quart", "sanic", "starlette", "tornado", "werkzeug"),
}

# What `import opsguard` leaves alone: it costs time or memory that not every app has to pay.
HEAVY = FRAMEWORKS | {
    *("click", "granian", "gunicorn", "limits", "opentelemetry.exporter", "opentelemetry.sdk"),
    *("orjson", "psutil", "pydantic_settings", "redis", "rich", "sentry_sdk", "sqlalchemy"),
    "uvicorn",
}

# Read once, at install or at import, or through a parameter; never in the body of a function.
AMBIENT = {
    *("datetime.datetime.now", "datetime.datetime.today", "datetime.datetime.utcnow"),
    *("os.environ", "os.environb", "os.getenv"),
    *("time.monotonic", "time.monotonic_ns", "time.perf_counter"),
    *("time.perf_counter_ns", "time.time", "time.time_ns"),
    *("uuid.uuid1", "uuid.uuid4"),
}
# `Settings.load(environ=None)` means the process's environment; it is the one place that asks.
EXCUSED = {("settings", "os.environ")}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module or name: `target` is its dotted path, the longest that is a module."""

    line: int
    target: str
    names: tuple[str, ...]
    type_only: bool


@dataclass(frozen=True, slots=True)
class Module:
    """One parsed file, by the dotted name it is imported under."""

    name: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        return room(self.name)

    def at(self, line: int, complaint: str) -> str:
        return f"{self.name}:{line} {complaint}"


# All that opsguard/__init__.py may define; `__getattr__` for names that are costly to import.
FRONT = (["__all__"], ["__version__"], ["__getattr__"])

Rule = Callable[[list[Module]], Iterator[str]]


def room(name: str) -> str:
    """The room that a module of ours belongs to: `metrics` for `opsguard.metrics.store`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "opsguard" and len(parts) > 1 else parts[0]


def within(name: str, packages: Iterable[str]) -> bool:
    """Whether `name` is one of `packages` or lies below one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def parse(sources: dict[str, str]) -> list[Module]:
    """Modules from {path relative to the folder that is imported from: source text}."""
    names = {path: path.removesuffix(".py").removesuffix("/__init__") for path in sources}
    names = {path: name.replace("/", ".") for path, name in names.items()}
    known = set(names.values())
    modules = []
    for path, source in sources.items():
        tree = ast.parse(source, path)
        package = names[path] if path.endswith("/__init__.py") else names[path].rpartition(".")[0]
        modules.append(Module(names[path], tree, tuple(_imports(tree, package, known))))
    return modules


def _imports(tree: ast.Module, package: str, known: set[str]) -> Iterator[Import]:
    type_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        unseen = id(node) in type_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, (), unseen)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found = Import(node.lineno, base, (alias.name,), unseen)
                yield Import(node.lineno, inner, (), unseen) if inner in known else found


def no_framework_in_the_core(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        allowed = ADAPTERS.get(module.room, set())
        for found in module.imports:
            framework = found.target.split(".")[0]
            if framework in FRAMEWORKS - allowed and module.room not in FLOORS["tools"]:
                yield module.at(found.line, f"imports {framework}")


def every_room_has_a_floor(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.room not in FLOOR_OF:
            yield module.at(1, f"is in the room {module.room!r}: give it a floor in FLOORS")


def imports_go_down(modules: list[Module]) -> Iterator[str]:
    for module, found, target in _between_rooms(modules):
        ours, theirs = FLOOR_OF.get(module.room), FLOOR_OF.get(target)
        if found.type_only or ours is None or theirs is None:
            continue
        if HEIGHT[theirs] > HEIGHT[ours]:
            yield module.at(found.line, f"imports {found.target}: {theirs} is above {ours}")
        elif module.room in ADAPTERS and (theirs == ours or theirs not in SEEN_BY_ADAPTERS):
            yield module.at(found.line, f"imports {found.target}: an adapter only translates")
        elif ours == theirs and found.target != f"opsguard.{target}":
            yield module.at(found.line, f"imports {found.target}: go through its front door")


def nothing_private_leaves_its_room(modules: list[Module]) -> Iterator[str]:
    for module, found, _ in _between_rooms(modules):
        private = [
            part
            for part in (*found.target.split("."), *found.names)
            if part.startswith("_") and not part.endswith("__")
        ]
        if private:
            yield module.at(found.line, f"imports {private[0]} from {found.target}")


def no_circles(modules: list[Module]) -> Iterator[str]:
    graph: dict[str, set[str]] = {}
    for module, found, target in _between_rooms(modules):
        if not found.type_only:
            graph.setdefault(module.room, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "rooms import each other in a circle: " + " -> ".join(error.args[1])


def adapters_folder_is_no_package(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for found in module.imports:
            if within(found.target, ["adapters"]):
                yield module.at(found.line, f"imports {found.target}: a second copy would load")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and str(node.value).startswith("adapters.opsguard"):
                yield module.at(node.lineno, f"names {node.value!r}: a second copy would load")


def public_modules_have_all(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        private = any(part.startswith("_") for part in module.name.split("."))
        if private or not any(map(_defines, module.tree.body)):
            continue
        if not any("__all__" in _bound(node) for node in module.tree.body):
            yield module.at(1, "has public names and no __all__")


def front_only_names(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.name != "opsguard":
            continue
        for node in module.tree.body:
            bound = _bound(node)
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            imported = isinstance(node, ast.Import | ast.ImportFrom | ast.If)
            if not (docstring or imported or bound[:1] in FRONT):
                yield module.at(node.lineno, "is more than names: opsguard/__init__.py only names")
            if "__all__" in bound and isinstance(node, ast.Assign):
                names = ast.literal_eval(node.value)
                if list(names) != sorted(names):
                    yield module.at(node.lineno, "__all__ is not sorted")


def calls_are_flat(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for node in ast.walk(module.tree):
            if getattr(node, "name", None) == "__call__" and _depth(node) > 2:
                yield module.at(
                    node.lineno, f"__call__ nests {_depth(node)} levels; two are enough"
                )


def nothing_ambient_in_bodies(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.room in FLOORS["tools"]:
            continue
        names = _global_names(module.tree)
        bodies = (
            statement
            for node in ast.walk(module.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for statement in node.body
        )
        for node in {node for body in bodies for node in ast.walk(body)}:
            if isinstance(node, ast.Attribute | ast.Name):
                path = _dotted(node, names)
                ambient = path in AMBIENT or (within(path, ["random"]) and path != "random.Random")
                if ambient and (module.room, path) not in EXCUSED:
                    yield module.at(node.lineno, f"reads {path} in a function body: inject it")


def _between_rooms(modules: list[Module]) -> Iterator[tuple[Module, Import, str]]:
    for module in modules:
        for found in module.imports:
            target = room(found.target)
            if within(found.target, PACKAGES) and target != module.room:
                yield module, found, target


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement at module level defines; imports define none of a module's own."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    leaves = [leaf for target in targets if target for leaf in ast.walk(target)]
    return [leaf.id for leaf in leaves if isinstance(leaf, ast.Name)]


def _defines(node: ast.stmt) -> bool:
    return any(not name.startswith("_") for name in _bound(node))


def _depth(function: ast.AST) -> int:
    """How deep the blocks of a function nest; a function inside starts its own count."""
    blocks = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar, ast.With)
    blocks = (*blocks, ast.AsyncWith, ast.Match)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)

    def below(node: ast.AST) -> int:
        deepest = 0
        for name, field in ast.iter_fields(node):
            chained = isinstance(node, ast.If) and name == "orelse" and len(field) == 1
            for child in field if isinstance(field, list) else [field]:
                if not isinstance(child, ast.AST) or isinstance(child, functions):
                    continue
                elif_ = chained and isinstance(child, ast.If)
                deepest = max(deepest, below(child) + (isinstance(child, blocks) and not elif_))
        return deepest

    return below(function)


def _global_names(tree: ast.Module) -> dict[str, str]:
    """What imported names stand for: {"now": "time.time"} for ``from time import time as now``."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


RULES: tuple[Rule, ...] = (
    no_framework_in_the_core,
    every_room_has_a_floor,
    imports_go_down,
    nothing_private_leaves_its_room,
    no_circles,
    adapters_folder_is_no_package,
    public_modules_have_all,
    front_only_names,
    calls_are_flat,
    nothing_ambient_in_bodies,
)


def folder(package: str) -> Path:
    """Where a package of ours is, without importing it."""
    spec = find_spec(package)
    assert spec, f"{package} is not installed"
    assert spec.origin, f"{package} has no __init__.py"
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    sources = {}
    for package in PACKAGES:
        home = folder(package)
        for path in sorted(home.rglob("*.py")):
            sources[path.relative_to(home.parent).as_posix()] = path.read_text("utf-8")
    return parse(sources)


def readable(value: Rule | str) -> str:
    return value.replace("\n", "; ") if isinstance(value, str) else value.__name__


@pytest.mark.parametrize("rule", RULES, ids=readable)
def test_the_house_keeps_its_rules(rule: Rule, modules: list[Module]) -> None:
    complaints = list(rule(modules))

    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (no_framework_in_the_core, "opsguard/guard.py", "import flask"),
        (
            no_framework_in_the_core,
            "opsguard/metrics/http.py",
            "def f():\n from starlette import x",
        ),
        (no_framework_in_the_core, "opsguard_asgi/__init__.py", "import starlette.routing"),
        (no_framework_in_the_core, "opsguard_flask/__init__.py", "import django.http"),
        (every_room_has_a_floor, "opsguard/utils.py", ""),
        (imports_go_down, "opsguard/clock.py", "from opsguard.metrics import Metrics"),
        (imports_go_down, "opsguard/metrics/http.py", "def f():\n import opsguard.guard"),
        (imports_go_down, "opsguard/metrics/http.py", "from .. import guard"),
        (imports_go_down, "opsguard/guard.py", "from opsguard import OpsGuard"),
        (imports_go_down, "opsguard/guard.py", "import opsguard_asgi"),
        (imports_go_down, "opsguard_asgi/__init__.py", "import opsguard_fastapi"),
        (imports_go_down, "opsguard_asgi/__init__.py", "from opsguard.metrics import Metrics"),
        (imports_go_down, "opsguard_asgi/__init__.py", "import opsguard_wsgi"),
        (imports_go_down, "opsguard_flask/__init__.py", "from opsguard.cli import main"),
        (imports_go_down, "opsguard/logging/access.py", "from opsguard.metrics.store import Store"),
        (nothing_private_leaves_its_room, "opsguard/guard.py", "from opsguard.metrics import _x"),
        (nothing_private_leaves_its_room, "opsguard/guard.py", "import opsguard.logging._lines"),
        (no_circles, "opsguard/metrics.py", "import opsguard.logging"),
        (adapters_folder_is_no_package, "opsguard/guard.py", "import adapters.opsguard_asgi"),
        (adapters_folder_is_no_package, "opsguard/guard.py", "x = 'adapters.opsguard_django'"),
        (public_modules_have_all, "opsguard/guard.py", "class Runtime: pass"),
        (front_only_names, "opsguard/__init__.py", "import os\nos.getpid()"),
        (front_only_names, "opsguard/__init__.py", "__all__ = ['b', 'a']"),
        (
            calls_are_flat,
            "opsguard_asgi/__init__.py",
            "class A:\n def __call__(self):\n  if 1:\n   for x in y:\n    with z: pass",
        ),
        (nothing_ambient_in_bodies, "opsguard/ids.py", "import time\ndef f(): time.time()"),
        (
            nothing_ambient_in_bodies,
            "opsguard/ids.py",
            "from os import environ as e\ndef f(): e[1]",
        ),
        (nothing_ambient_in_bodies, "opsguard/ids.py", "import random\ndef f(): random.random()"),
    ],
    ids=readable,
)
def test_a_planted_violation_is_found(rule: Rule, path: str, source: str) -> None:
    """No rule has gone blind: each complains about one small module that breaks it."""
    planted = {"opsguard/guard.py": "", "opsguard/logging.py": "import opsguard.metrics"}

    assert list(rule(parse(planted | {path: source})))


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (no_framework_in_the_core, "opsguard_flask/__init__.py", "import werkzeug"),
        (imports_go_down, "opsguard/guard.py", "from opsguard.metrics.store import Store"),
        (imports_go_down, "opsguard/logging/x.py", "from opsguard.metrics import Metrics"),
        (imports_go_down, "opsguard_flask/x.py", "from opsguard_flask.y import z"),
        (imports_go_down, "opsguard/__init__.py", "from opsguard.guard import OpsGuard"),
        (
            imports_go_down,
            "opsguard/context.py",
            "if TYPE_CHECKING:\n from opsguard.guard import Exchange",
        ),
        (public_modules_have_all, "opsguard/guard.py", "import os\n_x = 1\n__all__ = []"),
        (public_modules_have_all, "opsguard/_native.py", "x = 1"),
        (front_only_names, "opsguard/__init__.py", "'x'\n__version__ = '1'\n__all__ = ['a', 'b']"),
        (
            calls_are_flat,
            "opsguard_asgi/__init__.py",
            "def __call__():\n if 1:\n  if 2: 3\n elif 4: 5\n elif 6:\n  def f():\n   if 7: 8",
        ),
        (nothing_ambient_in_bodies, "opsguard/ids.py", "import time\ndef f(clock=time.time): ..."),
        (nothing_ambient_in_bodies, "opsguard/ids.py", "def f(self, time): self.time.time()"),
    ],
    ids=readable,
)
def test_what_is_allowed_passes(rule: Rule, path: str, source: str) -> None:
    """No rule complains about what the house allows."""
    assert not list(rule(parse({path: source})))


def test_nobody_imports_the_adapters_folder() -> None:
    """Tests and benchmarks import `opsguard_flask` as users do, not `adapters.opsguard_flask`."""
    here = Path(__file__).parents[1]
    sources = {
        path.relative_to(here).as_posix(): path.read_text("utf-8")
        for place in ("tests", "benchmarks", "docs")
        for path in (here / place).rglob("*.py")
    }

    complaints = [
        complaint
        for complaint in adapters_folder_is_no_package(parse(sources))
        if " imports " in complaint
    ]

    assert sources
    assert not complaints, "\n".join(complaints)


# Run in a fresh process: what the modules in argv[2] do when they are imported after those in
# argv[1]. Reading below a folder of sys.path is what importing means, and a metrics client may
# ask the kernel when it booted; every other file, and any write, is reported.
WATCH = """
import importlib, json, os, sys, threading

before, subjects = (list(filter(None, names.split(","))) for names in sys.argv[1:])
if "django" in before:
    from django.conf import settings
    settings.configure(OPSGUARD={"service": "architecture"})
    importlib.import_module("django").setup()
for name in before:
    importlib.import_module(name)

deeds = []
readable = tuple(filter(None, [*sys.path, sys.prefix, sys.base_prefix, "/proc/", "/sys/"]))
acts = ("os.exec", "os.fork", "os.mkdir", "os.posix_spawn", "os.putenv", "os.remove", "os.rename",
        "os.system", "shutil.", "signal.", "socket.", "subprocess.", "tempfile.")
start = threading.Thread.start

def watch(event, args):
    if event == "open":
        path, _, flags = args
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or not (isinstance(path, str) and path.startswith(readable)):
            deeds.append(f"open {path!r}")
    elif event.startswith(acts):
        deeds.append(event)

def watched_start(thread):
    deeds.append(f"thread {thread.name}")
    start(thread)

threading.Thread.start = watched_start
known = set(sys.modules)
sys.addaudithook(watch)
missing = []
for name in subjects:
    module = importlib.import_module(name)
    missing += [f"{name}.{x}" for x in getattr(module, "__all__", ()) if not hasattr(module, x)]
    missing += [f"{name}.{x} twice" for x in getattr(module, "__all__", ())
                if list(module.__all__).count(x) > 1]
print(json.dumps({
    "deeds": deeds,
    "loaded": sorted(set(sys.modules) - known),
    "threads": threading.active_count(),
    "missing": missing,
}))
"""


def watch(before: Iterable[str], subjects: Iterable[str], place: Path) -> dict[str, list[str]]:
    """What importing `subjects` did in a process of its own that had imported `before`."""
    (place / "opsguard.toml").write_text("service = 'not to be read'\n")
    (place / ".env").write_text("OPSGUARD_SERVICE=not to be read\n")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COVERAGE_", "PYTHON", "DJANGO_", "OTEL_"))
    }
    paths = {str(folder(name).parent) for name in PACKAGES}
    environment["PYTHONPATH"] = os.pathsep.join([*paths, str(place / "lib")])
    result = subprocess.run(
        [sys.executable, "-B", "-P", "-c", WATCH, ",".join(before), ",".join(subjects)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    report: dict[str, list[str]] = json.loads(result.stdout)
    return report


FRAMEWORK_MODULES = {
    "opsguard": (),
    "opsguard_asgi": (),
    "opsguard_wsgi": (),
    "opsguard_fastapi": ("fastapi",),
    "opsguard_flask": ("flask",),
    "opsguard_django": ("django", "django.core.handlers.asgi", "django.core.handlers.wsgi"),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_starts_nothing_and_loads_nothing_heavy(package: str, tmp_path: Path) -> None:
    """No thread, process, socket, file; no SDK, driver, settings parser, other framework."""
    report = watch(FRAMEWORK_MODULES[package], [package], tmp_path)

    assert report["deeds"] == []
    assert report["threads"] == 1
    heavy = HEAVY - ADAPTERS.get(package, set())
    assert [name for name in report["loaded"] if within(name, heavy)] == []


def test_the_watcher_sees_what_an_import_does(tmp_path: Path) -> None:
    """The check above is not blind: a module that misbehaves in every way is reported in full."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mischief.py").write_text(
        "import socket, threading, limits\n"
        "__all__ = ['absent', 'here', 'here']\n"
        "here = open('opsguard.toml'), open('made', 'w'), socket.socket()\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )

    report = watch([], ["mischief"], tmp_path)

    assert "limits" in report["loaded"]
    assert {"open 'opsguard.toml'", "open 'made'"} <= set(report["deeds"])
    assert any(deed.startswith("socket.") for deed in report["deeds"])
    assert any(deed.startswith("thread ") for deed in report["deeds"])
    assert report["threads"] == 2
    assert report["missing"] == ["mischief.absent", "mischief.here twice", "mischief.here twice"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_in_all_exists(package: str, modules: list[Module], tmp_path: Path) -> None:
    """`__all__` of every module is honest: each name is there, once."""
    names = [
        module.name
        for module in modules
        if within(module.name, [package]) and not module.name.endswith("__main__")
    ]

    report = watch(FRAMEWORK_MODULES[package], names, tmp_path)

    assert report["missing"] == []
