"""The rules of the house that a tool can check. CONTRIBUTING.md says why they are there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.source import (
    EVERYTHING,
    PRODUCT,
    ROOT,
    Function,
    body_lines,
    dotted,
    files,
    imports,
    module_name,
    nodes,
    tree_of,
    words,
)

MAX_FILE_LINES = 400
MAX_MODEL_FILE_LINES = 600
MAX_FUNCTION_LINES = 50
MODEL_FILE = Path("router/model/deepseek.py")

BANNED_WORDS = {
    *(
        "base",
        "context",
        "data",
        "factory",
        "handler",
        "helper",
        "helpers",
        "impl",
        "info",
        "manager",
        "misc",
    ),
    *("processor", "util", "utils", "wrapper"),
}
EMPTY_INITS = (
    "common",
    "common/quantization",
    "common/native",
    "expert_worker",
    "expertmesh",
    "expertmesh/cli",
    "expertmesh/doctor",
    "expertmesh/doctor/facts",
    "expertmesh/doctor/findings",
    "router",
    "router/front",
    "router/model",
    "router/placement",
)

# These run with neither torch nor safetensors: they start in milliseconds and outlive what torch may do.
TORCH_FREE = (
    *("expertmesh", "router/front", "router/__main__", "router/messages", "router/sequence", "router/plan"),
    *("router/placement", "router/scheduler", "router/block_allocator", "router/tokenizer", "router/tuning"),
    "router/chat",
    *(
        "expert_worker/__main__",
        "expert_worker/agent",
        "expert_worker/control_service",
        "expert_worker/executor_link",
        "expert_worker/registration",
        "expert_worker/messages",
    ),
    *(
        "common/config",
        "common/config_changes",
        "common/config_file",
        "common/config_origin",
        "common/config_problems",
        "common/config_rules",
        "common/deepseek_section",
        "common/expertmesh_section",
        "common/model_json",
        "common/mindie",
        "common/mindie_model",
        "common/mindie_tls",
        "common/model_config",
        "common/not_built",
        "common/npu_limits",
        "common/npu_windows",
        "common/own_address",
        "common/placement",
        "common/section",
        "common/quantization/description",
        "common/errors",
    ),
    *("common/channel", "common/child_process", "common/grpc_server", "common/interceptors", "common/logs"),
    "common/health",
    *("common/kept_child", "common/progress_counter", "common/row_limits"),
    *("common/json_file", "common/lifeline", "common/link_probe", "common/lldp"),
    *(
        "common/rank_table",
        "common/reload_class",
        "common/row_limits",
        "common/topology",
        "common/topology_check",
    ),
    *("common/checkpoint_headers", "common/tensor_names", "common/weight_sizes", "common/kv_cache_size"),
    *("common/environment", "common/host_memory", "common/rank_seats", "common/preflight"),
    *("common/preflight_fleet", "common/preflight_group", "common/preflight_memory", "common/preflight_npu"),
    "common/native",
)
EDGES = (
    *("expertmesh/", "router/front/", "router/__main__.py"),
    *("expert_worker/agent.py", "expert_worker/control_service.py", "expert_worker/registration.py"),
    "expert_worker/__main__.py",
    *("common/grpc_server.py", "common/health.py", "common/interceptors.py"),
)
# What each package may be imported by: path prefixes.
IMPORTED_ONLY_BY = {
    "grpc": EDGES,
    "protos": EDGES,
    "safetensors": ("common/checkpoint.py",),
    "torch.distributed": ("common/process_group.py", "common/exchange/"),
    "transformers": (),
    "pickle": (),
    "marshal": (),
    "multiprocessing": (),
}
FORBIDDEN_CALLS = {
    "torch.load": "reads pickles; read safetensors with common.checkpoint",
    "torch.save": "writes pickles",
    "eval": "executes text",
    "exec": "executes text",
    "os.system": "runs a shell",
}
OBJECT_COLLECTIVES = {
    *("all_gather_object", "broadcast_object_list", "gather_object", "recv_object_list"),
    *("scatter_object_list", "send_object_list"),
}
# The configuration reads the environment; those that start processes hand it on.
ENVIRONMENT = (
    "common/config.py",
    "common/environment.py",
    "common/child_process.py",
    "expertmesh/processes.py",
    "expertmesh/__main__.py",
    # doctor looks at what they would inherit.
    "expertmesh/doctor/facts/environment.py",
)
# The commands of people print, and a service says on stdout where it listens and that it is ready.
PRINTING = ("expertmesh/", "router/__main__.py", "router/front/", "expert_worker/__main__.py")


def is_below(path: Path, prefixes: tuple[str, ...]) -> bool:
    return path.as_posix().startswith(prefixes) if prefixes else False


def product_nodes() -> Iterator[tuple[Path, ast.AST]]:
    for path in files(*PRODUCT):
        for node in nodes(path):
            yield path, node


def where(path: Path, node: ast.AST) -> str:
    return f"{path}:{getattr(node, 'lineno', 0)}"


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in files(*EVERYTHING)}
    limits = {path: MAX_MODEL_FILE_LINES if path == MODEL_FILE else MAX_FILE_LINES for path in lengths}
    assert {str(path): length for path, length in lengths.items() if length > limits[path]} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        f"{where(path, node)} {node.name}": body_lines(node)
        for path, node in product_nodes()
        if isinstance(node, Function) and body_lines(node) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_names_say_what_the_one_job_is() -> None:
    named = [(str(path), path.stem) for path in files(*EVERYTHING)]
    for path in files(*EVERYTHING):
        # A function in CamelCase is an RPC, whose name the wire contract gives.
        named += [
            (where(path, node), node.name)
            for node in nodes(path)
            if isinstance(node, ast.ClassDef) or (isinstance(node, Function) and not node.name[0].isupper())
        ]
    is_test = re.compile(r"test_|given_")
    vague = [
        f"{place} {name}"
        for place, name in named
        if BANNED_WORDS & set(words(name))
        if not is_test.match(name)
    ]
    assert vague == []


@pytest.mark.parametrize("package", EMPTY_INITS)
def test_importing_a_package_runs_nothing(package: str) -> None:
    assert (ROOT / package / "__init__.py").read_text() == ""


@pytest.mark.parametrize("package", sorted(IMPORTED_ONLY_BY))
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    def is_it(name: str) -> bool:
        return name == package or name.startswith(f"{package}.")

    allowed = IMPORTED_ONLY_BY[package]
    importers = [path for path in files(*PRODUCT) if any(map(is_it, imports(path)))]
    assert [str(path) for path in importers if not is_below(path, allowed)] == []


def test_roles_are_strangers_and_common_knows_none_of_them() -> None:
    roles = {"router", "expert_worker", "expertmesh"}
    forbidden = {role: roles - {role} for role in roles} | {"common": roles}
    meetings = [
        f"{path} imports {name}"
        for path in files(*PRODUCT)
        for name in imports(path)
        if name.split(".")[0] in forbidden[path.parts[0]]
    ]
    assert meetings == []


def test_nothing_executes_what_it_reads() -> None:
    found = []
    for path, node in product_nodes():
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS:
                found.append(f"{where(path, node)} {name}: {FORBIDDEN_CALLS[name]}")
            if name.split(".")[-1] in OBJECT_COLLECTIVES:
                found.append(f"{where(path, node)} {name}: object collectives travel as pickles")
            if any(keyword.arg == "shell" for keyword in node.keywords):
                found.append(f"{where(path, node)} {name}: runs a shell")
    assert found == []


def is_bare_except(node: ast.AST) -> bool:
    return isinstance(node, ast.ExceptHandler) and node.type is None


def is_assert(node: ast.AST) -> bool:
    return isinstance(node, ast.Assert)


@pytest.mark.parametrize("is_found", [is_bare_except, is_assert])
def test_checks_are_errors_with_a_sentence(is_found: Callable[[ast.AST], bool]) -> None:
    assert [where(path, node) for path, node in product_nodes() if is_found(node)] == []


def test_the_environment_is_read_in_one_place() -> None:
    readers = {
        where(path, node)
        for path, node in product_nodes()
        if dotted(node) in {"os.environ", "os.getenv"} and not is_below(path, ENVIRONMENT)
    }
    assert readers == set()


def test_only_commands_print() -> None:
    printers = [
        where(path, node)
        for path, node in product_nodes()
        if isinstance(node, ast.Call) and dotted(node.func) == "print" and not is_below(path, PRINTING)
    ]
    assert printers == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(path) for path in files(*EVERYTHING) if (ROOT / path).read_text() and not docstring(path)]
    assert silent == []


def docstring(path: Path) -> str | None:
    return ast.get_docstring(tree_of(path))


def test_no_file_names_a_path_of_one_machine() -> None:
    machine = re.compile(r"(?<![\w.}$*])/(?:work|tmp|root|home)/")
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".proto", ".sh", ""}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: there is no list of the project's own files")
    paths = [ROOT / line for line in listed.stdout.splitlines() if Path(line).suffix in suffixes]
    texts = {path: path.read_text(errors="replace") for path in paths if path.is_file()}
    assert [str(path) for path, text in texts.items() if machine.search(text)] == []


def test_what_must_not_need_torch_imports_without_it() -> None:
    modules = [module_name(path) for path in files(*PRODUCT) if is_torch_free(path)]
    script = (
        "import sys, importlib\n"
        "for blocked in ('torch', 'safetensors', 'transformers'): sys.modules[blocked] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *modules], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def is_torch_free(path: Path) -> bool:
    name = path.with_suffix("").as_posix()
    return any(name == one or name.startswith(f"{one}/") for one in TORCH_FREE)


@pytest.mark.skipif(find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
def test_the_committed_protos_are_those_of_the_proto_files(tmp_path: Path) -> None:
    kinds = ("python", "mypy", "mypy_grpc", "grpc_python")
    sources = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "protos").glob("*.proto"))]
    programs = [
        f"--plugin={name}={path}"
        for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
        if (path := Path(sys.executable).parent / name).exists()
    ]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I.",
        *programs,
        *(f"--{kind}_out={tmp_path}" for kind in kinds),
    ]
    subprocess.run([*command, *sources], cwd=ROOT, check=True, capture_output=True)
    generated = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "protos").glob("*_pb2*.py*")}
    assert committed == generated, "run: make protos"
