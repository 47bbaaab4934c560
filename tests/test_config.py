"""pipeline.toml: the file at the top tells the truth, overrides pass the same checks, all problems are reported together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from preprocess.config import PreprocessConfig
from shards.config import SECTIONS, read_config, to_toml
from shards.errors import ConfigError
from train.config import TrainConfig


@pytest.mark.parametrize("kind", [PreprocessConfig, TrainConfig])
def test_the_file_at_the_top_holds_every_key_with_its_default(kind, repository: Path):
    """Every key is listed, and an unedited file changes nothing."""
    written = tomllib.loads((repository / "pipeline.toml").read_text())
    defaults = msgspec.to_builtins(kind(**{f.name: f.type() for f in msgspec.structs.fields(kind)}))
    assert set(written) <= set(SECTIONS)
    for section, values in defaults.items():
        assert list(written[section].items()) == list(values.items()), section  # in the class's order too
    assert msgspec.to_builtins(read_config(kind, repository / "pipeline.toml")) == defaults


def test_a_resolved_configuration_reads_back(tmp_path: Path):
    config = read_config(TrainConfig, None, ["train.seed=3", "lora.targets=['a.b']", "model.base=some/folder"])
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read_config(TrainConfig, tmp_path / "config.toml") == config
    assert config.lora.targets == ["a.b"]


def test_all_problems_are_reported_together(tmp_path: Path):
    path = tmp_path / "pipeline.toml"
    path.write_text(
        '[train]\nlearning_rat = 1e-4\nseed = "1"\n[los]\n[loss]\ntext_loss_weight = -1\n[lora]\nmode = "all"\n'
    )
    with pytest.raises(ConfigError) as error:
        read_config(TrainConfig, path, ["train.batch_tokens", "preprocess.seed=1"])
    lines = str(error.value).splitlines()
    assert len(lines) == 7
    text = str(error.value)
    assert "unknown section [los]; did you mean 'loss'?" in text
    assert "unknown key train.learning_rat; did you mean 'learning_rate'?" in text
    assert "train.seed = '1': Expected `int`, got `str`" in text
    assert "loss.text_loss_weight = -1" in text
    assert "'comprehensive', 'audio_focused', 'attention_only', 'custom'" in text
    assert "expected SECTION.KEY=VALUE" in text
    assert "this command reads no [preprocess]" in text


@pytest.mark.parametrize(
    ("setting", "choices"),
    [
        ("train.batch_tokens=many", "one of a number, 'auto'"),
        ("train.warmup_steps=few", "one of a number, 'auto'"),
        ("train.attention=varlen", "one of 'auto', 'padded'"),
    ],
)
def test_what_may_stand_in_a_key_is_said_in_words(setting, choices):
    with pytest.raises(ConfigError, match=choices) as error:
        read_config(TrainConfig, None, [setting])
    assert "typing" not in str(error.value)


@pytest.mark.parametrize(
    "setting",
    [
        "loss.codebook_weights=[inf,1,1,1,1,1,1,1]",
        "loss.codebook_weights=[1e308,1e308,1,1,1,1,1,1]",
        "loss.audio_loss_weight=inf",
        "train.learning_rate=inf",
        "train.weight_decay=inf",
        "train.cache_gb=inf",
        f"train.seed={2**64}",
    ],
)
def test_numbers_beyond_what_can_be_computed_are_refused(setting: str):
    with pytest.raises(ConfigError, match=re.escape(setting.split("=")[0]) + r" = .*: Expected `\w+` <= "):
        read_config(TrainConfig, None, [setting])


def test_sections_of_other_commands_are_left_alone(tmp_path: Path):
    path = tmp_path / "pipeline.toml"
    path.write_text("[train]\nnonsense = 1\n[preprocess]\nseed = 4\n")
    assert read_config(PreprocessConfig, path).preprocess.seed == 4


def test_an_unreadable_file_is_explained(tmp_path: Path):
    path = tmp_path / "pipeline.toml"
    path.write_text("[train\n")
    with pytest.raises(ConfigError, match="not readable as TOML"):
        read_config(TrainConfig, path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("text.min_chars=2000", r"text.min_chars = 2000 lies above text.max_chars = 1000: nothing could pass"),
        (
            "preprocess.max_duration_s=0.2",
            r"preprocess.min_duration_s = 0.5 lies above preprocess.max_duration_s = 0.2",
        ),
        ("text.max_chars_per_s=1", r"text.min_chars_per_s = 2.0 lies above text.max_chars_per_s = 1.0"),
    ],
)
def test_limits_that_nothing_could_pass_are_refused(setting: str, words: str):
    from preprocess.config import PreprocessConfig

    with pytest.raises(ConfigError, match=words):
        read_config(PreprocessConfig, None, [setting])


@pytest.mark.parametrize("text", ["a = " + "[" * 20_000, "[text", "\x00", "a = 1\na = 2"])
def test_whatever_is_no_toml_is_one_line(tmp_path: Path, text: str):
    path = tmp_path / "pipeline.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"pipeline\.toml: not readable as TOML") as caught:
        read_config(TrainConfig, path)
    assert "\n" not in str(caught.value)
