"""Strict sections of pipeline.toml.

Every command reads the same file. Each section is a frozen struct beside the code that uses it; this module holds the
three sections both stages must agree on and the reader. Values are never coerced ("1e-4" is not a number), unknown keys
are errors that name the nearest known key, and all problems of a file are reported together. A command checks the sections
it reads and leaves the others alone, so stage one runs on a machine where stage two's options are not settled yet.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from shards.errors import ConfigError
from shards.printable import redact_values

SECTIONS = ("model", "features", "sequence", "text", "audio", "preprocess", "lora", "loss", "train", "eval", "wandb")

# The system turn of the released voice-cloning examples (boson-ai/higgs-audio examples/generation.py with its
# quiet-room scene; the transformers model card uses the same words).
RELEASED_SYSTEM_PROMPT = (
    "Generate audio following instruction.\n\n"
    "<|scene_desc_start|>\nAudio is recorded from a quiet room.\n<|scene_desc_end|>"
)


class ModelSection(msgspec.Struct, frozen=True, kw_only=True):
    """Which language model and which codec: folders, or hub ids with a pinned revision.

    The default revisions are the last ones of the older (boson) layout: the repositories were rewritten in place in
    April 2026, and only these are known to stay what they are. Both layouts load.
    """

    base: str = "bosonai/higgs-audio-v2-generation-3B-base"
    revision: str = "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"
    codec: str = "bosonai/higgs-audio-v2-tokenizer"
    codec_revision: str = "9d4988fbd4ad07b4cac3a5fa462741a41810dbec"


class FeaturesSection(msgspec.Struct, frozen=True, kw_only=True):
    """What stage one computes besides codec codes."""

    whisper: Literal["mel", "encoder", "none"] = "mel"
    whisper_model: str = "openai/whisper-large-v3"  # for "encoder"
    whisper_revision: str = "06f233fe06e710322aca913c1bc4249a0d71fce1"


class SequenceSection(msgspec.Struct, frozen=True, kw_only=True):
    """How a sample becomes a sequence; applied when reading, so changing it never means encoding again."""

    layout: Literal["clone", "as_written"] = "clone"
    # "auto": "whisper+codes" where the checkpoint has a Whisper tower, else "codes".
    conditioning: Literal["auto", "codes", "whisper+codes"] = "auto"
    system_prompt: str = RELEASED_SYSTEM_PROMPT
    reference_text_dropout: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0  # share of samples in training


Config = TypeVar("Config", bound=msgspec.Struct)


def read_config(kind: type[Config], path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read the sections that `kind` names from a TOML file, then apply `section.key=value` overrides.

    `path` None means ./pipeline.toml where it exists, else the defaults. Raises ConfigError listing every problem.
    """
    if path is None and Path("pipeline.toml").is_file():
        path = Path("pipeline.toml")
    problems: list[str] = []
    given = _read_toml(path) if path is not None else {}
    where = {section: str(path) for section in given}
    for section in given:
        if section not in SECTIONS:
            problems.append(f"{path}: unknown section [{section}]{_nearest(section, SECTIONS)}")
    section_types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for override in overrides:
        _apply_override(override, given, where, section_types, problems)
    sections = {
        name: _read_section(name, section_type, given.get(name, {}), where.get(name, "--set"), problems)
        for name, section_type in section_types.items()
    }
    if problems:
        raise ConfigError("\n".join(problems))
    return kind(**sections)


def to_toml(config: msgspec.Struct) -> str:
    """The resolved configuration as TOML text; `read_config` of it gives the same one, but for tokens in URLs, now `***`."""
    lines: list[str] = []
    for section, values in redact_values(msgspec.to_builtins(config)).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    """JSON's strings, numbers, booleans and lists are TOML as well; its objects are not."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def parse_toml(text: str) -> dict[str, Any]:
    """Raises tomllib.TOMLDecodeError (a ValueError) for whatever is no TOML, ten thousand brackets too."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("nested too deeply") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give an existing file with --config") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None


def _apply_override(
    override: str,
    given: dict[str, Any],
    where: dict[str, str],
    section_types: dict[str, Any],
    problems: list[str],
) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        problems.append(f"--set {override}: expected SECTION.KEY=VALUE, for example train.seed=1")
        return
    if section not in section_types:
        problems.append(f"--set {override}: this command reads no [{section}]{_nearest(section, section_types)}")
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word: --set model.base=out/tiny/model
    where.setdefault(section, "--set")
    given[section] = {**given.get(section, {}), key: value}


def _read_section(name: str, section_type: Any, given: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(given, dict):
        problems.append(f"{where}: [{name}] must be a section, got {given!r}")
        return None
    types = get_type_hints(section_type, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in types:
            problems.append(f"{where}: unknown key {name}.{key}{_nearest(key, types)}")
            continue
        if types[key] is float and type(value) is int:
            value = float(value)  # TOML writes 1 for 1.0
        try:
            values[key] = msgspec.convert(value, type=types[key])
        except msgspec.ValidationError as error:
            hint = f"; one of {', '.join(_choices(types[key]))}" if "enum" in str(error) else ""
            problems.append(f"{where}: {name}.{key} = {value!r}: {error}{hint}")
    section = section_type(**values)
    problems += [f"{where}: {problem}" for problem in _crossed_limits(name, section)]
    return section


def _crossed_limits(name: str, section: Any) -> Iterable[str]:
    """Where a smallest value lies above the largest one, so that nothing could pass."""
    for field in msgspec.structs.fields(section):
        most = "max_" + field.name.removeprefix("min_")
        if field.name.startswith("min_") and hasattr(section, most):
            low, high = getattr(section, field.name), getattr(section, most)
            if low > high:
                yield f"{name}.{field.name} = {low} lies above {name}.{most} = {high}: nothing could pass"


def _choices(kind: Any) -> list[str]:
    """What may stand in a key of fixed words, or of fixed words and numbers, as a person would say it."""
    if get_origin(kind) is Literal:
        return [repr(word) for word in get_args(kind)]
    if get_origin(kind) in (Union, UnionType):
        return [choice for part in get_args(kind) for choice in _choices(part)]
    return ["a number"]


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
