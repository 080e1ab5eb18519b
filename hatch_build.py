"""Builds `opsguard._speed`, the request path in C, and on Linux `opsguard._shared`, the memory in
which workers share limits, where they can be built; else the wheel is pure.

Nothing here fails a build: without a compiler, without Python's headers, without a GIL, on Windows
or with ``OPSGUARD_PURE=1`` the library is installed without the modules, and works the same.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULES = (
    Path("opsguard", "_speed"),
    *([Path("opsguard", "_shared")] if sys.platform == "linux" else []),
)
LOADS = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location

name, path = sys.argv[1:]
loader = ExtensionFileLoader(name, path)
made = module_from_spec(spec_from_file_location(name, path, loader=loader))
loader.exec_module(made)
"""


class BuildHook(BuildHookInterface[Any]):
    """Hatchling's hook, for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """An editable install gets the modules beside their sources, a wheel from a folder."""
        editable = version == "editable"
        if not editable:
            self._folder = tempfile.TemporaryDirectory()
        for module in MODULES:
            name = f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
            made = Path(self.root, name) if editable else Path(self._folder.name, Path(name).name)
            if self._made(made, module.with_suffix(".c")) and not editable:
                build_data["pure_python"] = False
                build_data["infer_tag"] = True
                build_data["force_include"][str(made)] = name

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self._folder.cleanup()

    def _made(self, target: Path, source: Path) -> bool:
        why = obstacle()
        if why is None:
            try:
                compile_to(target, Path(self.root, source))
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                target.unlink(missing_ok=True)
                output = getattr(error, "stderr", None) or str(error)
                why = f"the compiler did not get through: {output.strip()[-2000:]}"
        if why is not None:
            self.app.display_info(f"opsguard: {source.stem} stays in Python: {why}")
        return why is None


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


def compile_to(target: Path, source: Path) -> None:
    """Compile and link in one go, with the flags that Python itself was built with, and load the
    result in a process of its own. Raises OSError or SubprocessError.
    """
    said = sysconfig.get_config_vars()
    paths = sysconfig.get_paths()
    command = [
        *shlex.split(said.get("LDSHARED") or "cc -shared"),
        *shlex.split(said.get("CFLAGS") or "-O2"),
        *shlex.split(said.get("CCSHARED") or ""),
        *(
            "-O2",
            "-Werror=implicit-function-declaration",
            "-fvisibility=hidden",
            "-ffp-contract=off",  # every machine rounds as Python does
            "-g0",
            "-I",
            paths["include"],
            "-I",
            paths["platinclude"],
        ),
        *(str(source), "-o", str(target)),
    ]
    name = f"opsguard.{source.stem}"
    for step in (command, [sys.executable, "-c", LOADS, name, str(target)]):
        subprocess.run(step, check=True, capture_output=True, text=True, timeout=300)
