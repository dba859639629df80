"""Compiles the native kernels while a wheel is built, editable or not; a wheel is complete without it."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPILER = "common/native/compiler.py"


class CustomBuildHook(BuildHookInterface[Any]):
    """What hatchling calls; the name is its own."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one of this platform; say so if that did not work."""
        compiler = _load(Path(self.root) / COMPILER)
        named = os.environ.get("CXX", "").strip()
        reason = compiler.compile_library([named] if named else compiler.COMPILERS)
        if reason is not None:
            self.app.display_warning(
                f"expertmesh: the native kernels are left out, since {reason}; models run more "
                "slowly without it: install g++ or clang++, or name a compiler in CXX, and install again"
            )
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"].append(compiler.LIBRARY.relative_to(self.root).as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"


def _load(path: Path) -> ModuleType:
    """Import a file: the project is not on the path of an isolated build."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is missing: build from a complete source tree")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
