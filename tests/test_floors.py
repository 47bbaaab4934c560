"""The floors of the house: who may import whom, and what no module may be called."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

MAY_IMPORT = {
    "shards": {"shards"},
    "preprocess": {"preprocess", "shards"},
    "train": {"train", "shards"},
    "tools": {"tools", "train", "preprocess", "shards"},
}
# The wings of `train`: which of its other wings each may import. The spine (files right under train/) may import all; of the
# spine a wing may import only the files named here, which import no wing themselves or only `model`.
WINGS = {
    "data": {"data", "model"},
    "model": {"model"},
    "evaluation": {"evaluation", "data", "model"},
    "run_folder": {"run_folder", "model"},
}
SPINE_FOR_WINGS = {"config", "heap", "world"}
TORCH_IN_SHARDS = "encoders"  # the only folder of `shards` that may import torch
DRAWERS = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
# Everything that is shown passes shards/terminal.py, which makes it printable. Exceptions hold no text from outside: stage
# one's bar shows counts, the signal handler may only write constant bytes.
OUTPUT = "shards/terminal.py"
OUTPUT_CALLS = {
    "print",
    "click.echo",
    "click.secho",
    "sys.stdout.write",
    "sys.stderr.write",
    "pprint.pprint",
    "traceback.print_exc",
    "warnings.warn",
    "logging.Formatter",
    "logging.basicConfig",
}
OUTPUT_EXCEPTIONS = {
    "preprocess/report.py": {"rich.console", "rich.progress"},
    "train/signals.py": {"os.write"},
}
PROMISED_DEPENDENCIES = {"torch", "transformers"}


def imported_modules(path: Path) -> set[str]:
    """Full names of the modules a file may import, inside functions too: `from a.b import c` may mean a.b or a.b.c."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def violations(root: Path) -> list[str]:
    found = []
    for floor, allowed in MAY_IMPORT.items():
        for path in sorted((root / floor).rglob("*.py")):
            floors = {name.split(".")[0] for name in imported_modules(path)}
            forbidden = floors & (set(MAY_IMPORT) | {"tests"}) - allowed
            found += [f"{path.relative_to(root)} imports {name}" for name in sorted(forbidden)]
    return found + wing_violations(root) + torch_violations(root) + output_violations(root)


def wing_violations(root: Path) -> list[str]:
    """Imports within `train` that run against the one-way order of its wings."""
    found = []
    for wing, allowed in WINGS.items():
        for path in sorted((root / "train" / wing).rglob("*.py")):
            parts = {name.split(".")[1] for name in imported_modules(path) if name.startswith("train.")}
            forbidden = {part for part in parts if is_room(root, part)} - allowed - SPINE_FOR_WINGS
            found += [f"{path.relative_to(root)} imports train.{part}" for part in sorted(forbidden)]
    return found


def is_room(root: Path, name: str) -> bool:
    return (root / "train" / name).is_dir() or (root / "train" / f"{name}.py").is_file()


def torch_violations(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "shards").rglob("*.py")):
        inside = TORCH_IN_SHARDS in path.relative_to(root).parts
        heavy = {name.split(".")[0] for name in imported_modules(path)} & {"torch", "torchaudio", "transformers"}
        found += [f"{path.relative_to(root)} imports {name}" for name in sorted(heavy) if not inside]
    return found


def output_violations(root: Path) -> list[str]:
    """Places that show something to a person without shards/terminal.py."""
    found = []
    for path in modules(root):
        name = path.relative_to(root).as_posix()
        nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        used = {call for call in (ast.unparse(node.func) for node in nodes) if call in OUTPUT_CALLS}
        used |= {"os.write" for node in nodes if ast.unparse(node).startswith(("os.write(1,", "os.write(2,"))}
        used |= {
            module for module in imported_modules(path) if module.split(".")[0] == "rich" and module.count(".") == 1
        }
        used -= OUTPUT_EXCEPTIONS.get(name, set())
        found += [f"{name} uses {what}; print with shards.terminal" for what in sorted(used) if name != OUTPUT]
    return found


def modules(root: Path) -> list[Path]:
    return [path for floor in MAY_IMPORT for path in sorted((root / floor).rglob("*.py"))]


def test_floors_hold(repository: Path):
    assert violations(repository) == []


def test_the_checker_sees_a_planted_violation(tmp_path: Path):
    for floor in MAY_IMPORT:
        (tmp_path / floor).mkdir()
    (tmp_path / "shards" / "bad.py").write_text("def f():\n    from train.model.decoder import HiggsAudio\n")
    (tmp_path / "train" / "bad.py").write_text("import preprocess.codec\nimport tools\n")
    assert violations(tmp_path) == [
        "shards/bad.py imports train",
        "train/bad.py imports preprocess",
        "train/bad.py imports tools",
    ]


def test_the_checker_sees_output_past_the_terminal(tmp_path: Path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "bad.py").write_text(
        "import click, sys\nfrom rich.console import Console\n"
        "def f(x):\n    print(x)\n    click.echo(x, err=True)\n    sys.stderr.write(x)\n    Console().print(x)\n"
    )
    used = [line.split(" uses ")[1].split(";")[0] for line in output_violations(tmp_path)]
    assert used == ["click.echo", "print", "rich.console", "sys.stderr.write"]


def test_packages_are_ours(repository: Path):
    for floor in MAY_IMPORT:
        module = importlib.import_module(floor)
        assert Path(str(module.__file__)).parent == repository / floor, "a dependency owns this name"


def test_names_and_opening_words(repository: Path):
    for path in modules(repository):
        is_package_file = path.stem.startswith("__")
        assert is_package_file or path.stem not in sys.stdlib_module_names, f"{path} is named like the standard library"
        assert path.stem not in DRAWERS, f"{path} is a drawer"
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} does not say what it is for"


def test_every_test_name_is_a_sentence_of_at_most_60_characters(repository: Path):
    for path in sorted((repository / "tests").glob("test_*.py")):
        functions = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
        ]
        names = [node.name for node in functions if node.name.startswith("test_")]
        assert names, f"{path} holds no test"
        assert not [name for name in names if len(name) > 60], f"{path}: say it shorter"


def console_scripts(repository: Path) -> dict[str, str]:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]["scripts"]


def test_every_command_begins_under_a_name_of_our_own(repository: Path):
    """`tools`, `train` and the others are names of other projects too: see higgs_voice_pipeline.py."""
    scripts = console_scripts(repository)
    assert scripts == {name: f"higgs_voice_pipeline:{name.replace('-', '_')}" for name in scripts}


def test_every_command_exists_and_helps_without_loading_torch(repository: Path):
    for name, target in console_scripts(repository).items():
        module, function = target.split(":")
        code = (
            f"import sys; sys.argv = [{name!r}, '--help']\n"
            f"from {module} import {function} as command\n"
            "try:\n    command()\nexcept SystemExit as ended:\n    assert not ended.code\n"
            f"loaded = {sorted(PROMISED_DEPENDENCIES)!r}\n"
            "print('LOADED', [name for name in loaded if name in sys.modules])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert "Usage:" in result.stdout
        assert "LOADED []" in result.stdout, f"{name} --help loads a heavy library"


@pytest.mark.parametrize("floor", sorted(MAY_IMPORT))
def test_every_module_imports_without_a_gpu_or_the_hub(floor: str, repository: Path):
    """In a process of its own that sees neither: a module that asks for one while it is imported fails here."""
    names = [
        ".".join(path.relative_to(repository).with_suffix("").parts).removesuffix(".__init__")
        for path in modules(repository)
        if path.is_relative_to(repository / floor) and path.stem != "__main__"
    ]
    code = (
        "import importlib, socket, sys\n"
        "def refuse(*given): raise AssertionError(f'the network was asked for {given}')\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized(), 'an import started CUDA'\n"
    )
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=repository, env=os.environ | hidden, capture_output=True, text=True
    )
    assert len(names) > 5
    assert done.returncode == 0, done.stderr
