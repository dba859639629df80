"""Puts a fake NPU into a process that imports torch_npu; found by Python because PYTHONPATH names this
folder.

FAKE_CANN names the folder of the libraries. A process that never imports torch_npu is left as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import cast

# `import torch` would otherwise import torch_npu, in processes that do without.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


class _FakeNpuFinder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch_npu":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _FakeNpuLoader(spec.loader)
        return spec


class _FakeNpuLoader(Loader):
    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.path.append(str(Path(__file__).parents[3]))
        from tests.npu import fake_npu

        fake_npu.load_cann(Path(os.environ["FAKE_CANN"]))
        self._real.exec_module(module)
        fake_npu.run_all_threads_on_cpu()

    def __getattr__(self, name: str) -> object:
        return getattr(cast(object, self.__dict__["_real"]), name)


if "FAKE_CANN" in os.environ:
    sys.meta_path.insert(0, _FakeNpuFinder())
