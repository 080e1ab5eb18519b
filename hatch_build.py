"""Builds the modules of `opsguard` in C where they can be built: the request path (`_speed`), its
usual limit and key (`_limits`), and on Linux the memory in which workers share limits (`_shared`).
Else the wheel is pure.

What serves every request is laid out by a profile of the usual one, see `training.py`: with GCC,
and where what opsguard needs can be imported. Elsewhere it is compiled as any C.

Nothing here fails a build: without a compiler, without Python's headers, without a GIL or with
``OPSGUARD_PURE=1`` the library is installed without the modules, and works the same. On Windows it
is installed without them, too, but cannot be imported: it needs ``fcntl``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("opsguard")
MODULES = ("_speed", "_limits", *(["_shared"] if sys.platform == "linux" else []))
"""A later one may import an earlier one."""
TRAINED = ("_speed",)
"""Those that each request runs through."""
LOADS = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location

sys.modules["opsguard"] = type(sys)("opsguard")  # none but what is made here
for name, path in zip(sys.argv[1::2], sys.argv[2::2]):
    loader = ExtensionFileLoader(name, path)
    made = module_from_spec(spec_from_file_location(name, path, loader=loader))
    sys.modules[name] = made
    loader.exec_module(made)
"""


class BuildHook(BuildHookInterface[Any]):
    """Hatchling's hook, for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """An editable install gets the modules beside their sources, a wheel from a folder of
        ours.
        """
        if version == "editable":
            self._made(Path(self.root, PACKAGE))
            return
        self._folder = tempfile.TemporaryDirectory()
        for made in self._made(Path(self._folder.name)):
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["force_include"][str(made)] = str(PACKAGE / made.name)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self._folder.cleanup()

    def _made(self, folder: Path) -> list[Path]:
        """The modules that could be built. One that could not takes along those that import it."""
        made: list[Path] = []
        for name in MODULES:
            target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
            why = obstacle() or self._fault(target, Path(self.root, PACKAGE, f"{name}.c"), made)
            if why is None:
                made.append(target)
            else:
                self.app.display_info(f"opsguard: {name} stays in Python: {why}")
        return made

    def _fault(self, target: Path, source: Path, before: Sequence[Path]) -> str | None:
        """Why the module could not be built; None: it was."""
        fault = None
        for build in (train_to, compile_to) if source.stem in TRAINED else (compile_to,):
            if fault is not None:
                self.app.display_info(f"opsguard: {source.stem}: {fault}")
            try:
                build(target, source, before)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                target.unlink(missing_ok=True)
                said = isinstance(error, subprocess.CalledProcessError) and error.stderr
                fault = (
                    f"{build.__name__} did not get through: {(said or str(error))[-2000:].strip()}"
                )
            else:
                return None
        return fault


def obstacle() -> str | None:
    """Why the module is not built on this interpreter; None if nothing speaks against it."""
    if os.environ.get("OPSGUARD_PURE", "0") not in ("", "0"):
        return "OPSGUARD_PURE is set"
    if sys.implementation.name != "cpython":
        return "it is for CPython"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "it needs the GIL"
    if sys.platform == "win32":
        return "it is not for Windows"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's headers are not installed"
    return None


def compile_to(target: Path, source: Path, before: Sequence[Path] = ()) -> None:
    """Compile and link in one go, with the flags that Python itself was built with, and load the
    result in a process of its own, behind the modules `before` it. Raises OSError or
    SubprocessError.
    """
    run(compiler(target, source))
    check(target, before)


def check(target: Path, before: Sequence[Path]) -> None:
    """Load it in a process of its own."""
    loads = [sys.executable, "-c", LOADS]
    for made in (*before, target):
        loads += [f"opsguard.{made.name.partition('.')[0]}", str(made)]
    run(loads)


def train_to(target: Path, source: Path, before: Sequence[Path] = ()) -> None:
    """As `compile_to`, by a profile: compile so that the branches taken are counted, serve some
    requests with that, and compile anew. Raises the same, and ValueError if nothing was counted.
    """
    root = source.parent.parent.resolve()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()  # the counts are found by the name of what is compiled
        left_out = shutil.ignore_patterns("*.so", "*.c", "*.h", "__pycache__")
        package = shutil.copytree(root / PACKAGE, place / PACKAGE, ignore=left_out)
        package.chmod(0o700)  # the sources may be read-only
        trained = package / target.name
        run(
            compiler(trained, source, "-fprofile-generate", "-fprofile-update=prefer-atomic"), place
        )
        # What is set for an app, what sends the counts elsewhere, and who measures the folder.
        others = ("OPSGUARD_", "GCOV_", "COVERAGE_")
        environ = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        paths = (place, root / "adapters", environ.get("PYTHONPATH"))
        environ["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
        run([sys.executable, "-B", "-P", str(root / "training.py")], place, environ)
        if not any(package.glob("*.gcda")):
            raise ValueError("the training left no counts")
        # What was not run there is compiled as if there was no profile.
        learned = ("-fprofile-use", "-fprofile-partial-training", "-DTRAINED=1")
        run(compiler(trained, source, *learned), place)
        target.unlink(missing_ok=True)  # who runs the one before keeps it
        shutil.copy(trained, target)
    check(target, before)


def compiler(target: Path, source: Path, *flags: str) -> list[str]:
    """The command that compiles and links. The environment's ``CFLAGS`` are added to those of
    Python, as other builders of modules have it.
    """
    said = sysconfig.get_config_vars()
    paths = sysconfig.get_paths()
    return [
        *shlex.split(said.get("LDSHARED") or "cc -shared"),
        *shlex.split(said.get("CFLAGS") or "-O2"),
        *shlex.split(said.get("CCSHARED") or ""),
        *(
            "-O2",
            "-Werror=implicit-function-declaration",
            "-fvisibility=hidden",
            "-fno-plt",  # a call into Python is one jump, not two with a line of the cache more
            "-ffp-contract=off",  # Python rounds after each operation, and so does every machine
            "-g0",
            "-I",
            paths["include"],
            "-I",
            paths["platinclude"],
        ),
        *flags,
        *shlex.split(os.environ.get("CFLAGS", "")),  # who builds packages sets them, and goes last
        *(str(source.resolve()), "-o", str(target.resolve())),
    ]


def run(
    command: Sequence[str], folder: Path | None = None, environ: dict[str, str] | None = None
) -> None:
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",  # a compiler names files as they are
        timeout=300,
        cwd=folder,
        env=environ,
    )
