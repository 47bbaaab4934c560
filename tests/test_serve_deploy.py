"""Dockerfile and systemd unit: neither is run here, so what they name is held against the repository."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def steps(repository: Path) -> list[tuple[str, str]]:
    """(instruction, its arguments) of the Dockerfile."""
    text = (repository / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(None, 1)[1]) for line in lines]


def options_of_serve() -> set[str]:
    from tools.serve.cli import main

    return {name for one in main.params for name in one.opts}


def test_the_image_holds_what_the_package_is_made_of(steps, project, repository):
    copied = [source for name, given in steps if name == "COPY" for source in given.split()[:-1]]
    assert all((repository / source).exists() for source in copied)
    ignored = (repository / ".dockerignore").read_text(encoding="utf-8").split()
    assert not set(copied) & set(ignored)
    made_of = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {*made_of, "pyproject.toml", project["project"]["readme"]} <= set(copied)
    (install,) = [given for name, given in steps if name == "RUN" and "pip install" in given]
    (extra,) = re.findall(r"\.\[(\w+)\]", install)
    assert extra in project["project"]["optional-dependencies"]
    assert "constraints.txt" in copied
    assert "-c constraints.txt" in install
    python = next(given for name, given in steps if name == "FROM").removeprefix("python:").split("-")[0]
    assert project["project"]["requires-python"] == f">={python}"


def test_the_image_runs_serve_as_a_user_without_rights(steps, project):
    order = [name for name, _ in steps]
    user = dict(steps)["USER"]
    assert user not in ("root", "0")
    assert f" {user} " in next(given for name, given in steps if "useradd" in given)
    assert "RUN" not in order[order.index("USER") :], "what is made behind USER would be the user's own"
    (entry,) = [given for name, given in steps if name == "ENTRYPOINT"]
    assert entry.strip('[]"') in project["project"]["scripts"]
    words = re.findall(r'"([^"]*)"', dict(steps)["CMD"])
    assert {word for word in words if word.startswith("--")} <= options_of_serve()
    voices, port = words[words.index("--voices") + 1], words[words.index("--port") + 1]
    owned = next(given for name, given in steps if "chown" in given)
    assert voices in owned
    assert voices in dict(steps)["VOLUME"]
    assert dict(steps)["EXPOSE"] == port
    assert dict(re.findall(r"(\w+)=(\S+)", dict(steps)["ENV"]))["HF_HOME"].startswith(owned.split()[-1])


def test_the_unit_stops_after_the_grace_and_writes_where_it_may(repository):
    text = (repository / "deploy" / "voice-serve.service").read_text(encoding="utf-8")
    given = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    words = shlex.split(given["ExecStart"])
    assert words[0].endswith("/bin/serve")
    assert {word for word in words if word.startswith("--")} <= options_of_serve()
    assert float(given["TimeoutStopSec"]) > float(words[words.index("--grace-s") + 1]) + 15
    assert words[words.index("--voices") + 1] == f"/var/lib/{given['StateDirectory']}"
    assert given["Environment"] == f"HF_HOME=/var/cache/{given['CacheDirectory']}"
    assert given["User"] != "root"
