"""Compiles the fake CANN for the torch_npu that is installed: `python -m tests.npu.fake_cann.build DIR`.

Which libraries and symbols there must be is read from the package itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCES = ("runtime.c", "operators.c", "hccl.c")
MAIN = "libascendcl.so"
OPENED_BY_NAME = ("libopapi.so", "libruntime.so")
"""Libraries that torch_npu opens when it first needs them."""
SYMBOL = re.compile(rb"(?<![A-Za-z0-9_])(?:acl[a-z]*[A-Z0-9]|Hccl)[A-Za-z0-9_]+(?=\0)")
UNDEFINED = re.compile(r"(?:acl|Hccl|rt[A-Z]|Msprof)\w+")
DEFINED = re.compile(r"\b((?:acl|Hccl)\w+)\s*\(")
WORKSPACE = "GetWorkspaceSize"
CANN_LIBRARY = re.compile(r"lib(?:hccl|ascendcl|acl_|ge_|graph)\w*\.so")
IS_NO_FUNCTION = {"HcclComm"}


def build(directory: Path) -> None:
    """Write the libraries to a new directory, or leave one alone that has them already."""
    if (directory / MAIN).exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    libraries = _package_libraries()
    source = "".join((here / name).read_text(encoding="ascii") for name in SOURCES)
    defined = {*DEFINED.findall(source), *re.findall(r"REFUSED\((\w+)\)", source)}
    filled = [
        f"{'OPERATOR' if name.startswith('aclnn') else 'REST'}({name})\n"
        for name in sorted(_symbols(libraries) - defined - IS_NO_FUNCTION)
    ]
    (directory / "filled.inc").write_text("".join(filled), encoding="ascii")
    _compile(directory, MAIN, [f"-I{directory}", *(str(here / name) for name in SOURCES), "-lpthread"])
    (directory / "empty.c").write_text("int fake_cann_is_empty;\n", encoding="ascii")
    # The others need the first one, so that a symbol looked up in any of them is found.
    depends = [str(directory / "empty.c"), "-Wl,--no-as-needed", f"-L{directory}", "-lascendcl"]
    for name in sorted({*_needed(libraries), *OPENED_BY_NAME} - {MAIN}):
        _compile(directory, name, [*depends, "-Wl,-rpath,$ORIGIN"])


def _compile(directory: Path, name: str, arguments: list[str]) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("there is no C compiler: install gcc, or name one in CC")
    unfinished = directory / f"{name}.{os.getpid()}"
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", "-o", str(unfinished)]
    subprocess.run([*command, *arguments], check=True)
    unfinished.replace(directory / name)


def _package_libraries() -> list[Path]:
    spec = find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torch_npu is not installed: run scripts/setup_npu.sh")
    package = Path(spec.origin).parent
    own = ("libtorch_npu.so", "libtensorpipe.so", "libnpu_profiler.so")
    return [*package.glob("_C*.so"), *(package / "lib" / name for name in own)]


def _symbols(libraries: list[Path]) -> set[str]:
    names: set[str] = set()
    for library in libraries:
        names |= {name.decode() for name in SYMBOL.findall(library.read_bytes())}
        for line in _run("nm", "-D", "--undefined-only", str(library)).splitlines():
            name = line.split()[-1].partition("@")[0]
            if UNDEFINED.fullmatch(name):
                names.add(name)
    # The compiler keeps short strings in the code itself, where they are not found: each of a pair implies
    # the other.
    bare = {name.removesuffix(WORKSPACE) for name in names if name.startswith("aclnn")}
    return names | bare | {name + WORKSPACE for name in bare}


def _needed(libraries: list[Path]) -> set[str]:
    found: set[str] = set()
    for library in libraries:
        found |= set(re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "-d", str(library))))
    return {name for name in found if CANN_LIBRARY.fullmatch(name)}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    build(Path(sys.argv[1]))
