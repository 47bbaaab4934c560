"""The floors of the house: who may import whom, and what no module may be called."""

from __future__ import annotations

import ast
import importlib
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
DRAWERS = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
PROMISED_DEPENDENCIES = {"torch", "transformers"}


def imports_of(path: Path) -> set[str]:
    """Top-level names a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names.add((node.module or "").split(".")[0])
    return names


def violations(root: Path) -> list[str]:
    found = []
    for floor, allowed in MAY_IMPORT.items():
        for path in sorted((root / floor).rglob("*.py")):
            forbidden = imports_of(path) & (set(MAY_IMPORT) | {"tests"}) - allowed
            found += [f"{path.relative_to(root)} imports {name}" for name in sorted(forbidden)]
    return found


def modules(root: Path) -> list[Path]:
    return [path for floor in MAY_IMPORT for path in sorted((root / floor).rglob("*.py"))]


def test_floors_hold(repository: Path):
    assert violations(repository) == []


def test_the_checker_sees_a_planted_violation(tmp_path: Path):
    for floor in MAY_IMPORT:
        (tmp_path / floor).mkdir()
    (tmp_path / "shards" / "bad.py").write_text("def f():\n    from train.model import HiggsAudio\n")
    (tmp_path / "train" / "bad.py").write_text("import preprocess.codec\nimport tools\n")
    assert violations(tmp_path) == [
        "shards/bad.py imports train",
        "train/bad.py imports preprocess",
        "train/bad.py imports tools",
    ]


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


def console_scripts(repository: Path) -> dict[str, str]:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]["scripts"]


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
    for path in sorted((repository / floor).glob("*.py")):
        if path.stem != "__main__":
            importlib.import_module(f"{floor}.{path.stem}" if path.stem != "__init__" else floor)
