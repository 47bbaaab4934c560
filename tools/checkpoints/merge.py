"""Merge: a checkpoint's adapter into its base model, as one model folder.

In: a run or checkpoint folder. Out: a folder that transformers, boson's class and `speak` load, with `higgs_voice.json`, which
says how prompts must be built and which codec its codes belong to, so that speech is made exactly as it was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from preprocess.sound_edits import AudioSection
from preprocess.text import TextSection
from shards.config import FeaturesSection, ModelSection, SequenceSection

if TYPE_CHECKING:
    from torch import Tensor

    from tools.checkpoints.merge_proof import MergeProof
    from tools.checkpoints.model_folder import Layout, Voice
    from train.model.conditioning import Conditioning
    from train.model.config import ModelConfig


AUTO, BASE_DTYPE = "auto", "base"
NAME_THEM = "name those it was trained with: --base, --codec, --whisper"


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The sections of a checkpoint's config.toml that a merged model must remember."""

    model: ModelSection
    features: FeaturesSection
    sequence: SequenceSection
    text: TextSection
    audio: AudioSection


@dataclass(frozen=True)
class MovedTo:
    """Where base, codec and Whisper tower lie now; None: where the checkpoint's config.toml says."""

    base: str | None = None
    codec: str | None = None
    whisper: str | None = None

    def applied(self, config: CheckpointConfig) -> CheckpointConfig:
        model, features = config.model, config.features
        if self.base:
            model = msgspec.structs.replace(model, base=self.base, revision="")
        if self.codec:
            model = msgspec.structs.replace(model, codec=self.codec, codec_revision="")
        if self.whisper:
            features = msgspec.structs.replace(features, whisper_model=self.whisper, whisper_revision="")
        return msgspec.structs.replace(config, model=model, features=features)


@dataclass(frozen=True)
class Chosen:
    """A sound checkpoint whose base, codec and tower are those that it was trained with."""

    folder: Path
    why: str
    step: int
    config: CheckpointConfig
    base_dir: Path
    codec_dir: Path
    conditioning: Conditioning

    def voice(self) -> Voice:
        """What the merged folder must remember, to speak as was trained."""
        from shards.artifacts import codec_fingerprint
        from tools.checkpoints.model_folder import Voice

        model = self.config.model
        return Voice(
            base=model.base,
            base_revision=model.revision,
            adapter=str(self.folder / "adapter"),
            step=self.step,
            codec=model.codec,
            codec_revision=model.codec_revision,
            codec_fingerprint=codec_fingerprint(self.codec_dir),
            sequence=self.config.sequence,
            normalize=self.config.text.normalize,
            audio=self.config.audio,
        )


def merge_checkpoint(
    run: Path,
    out: Path,
    layout: Layout = "native",
    moved_to: MovedTo = MovedTo(),
    which: str = AUTO,
    dtype: str = BASE_DTYPE,
) -> MergeProof:
    """Write the merged model folder; returns what was merged and how exactly.

    Raises CheckpointError, also where base, codec, tokenizer or tower are not those that the checkpoint was trained with.
    """
    import dataclasses

    from shards.terminal import print_line
    from tools.checkpoints.model_folder import check_empty, write_model_folder
    from tools.checkpoints.sound import still_there

    folder, why = choose_checkpoint(run, which)
    check_empty(out)
    with still_there(folder):
        chosen = open_checkpoint(folder, why, moved_to)
        texts = card_files(folder)
        print_line(
            f"merging step {chosen.step} ({why}): loading, merging and proving it takes a minute for a model of 3B"
        )
        state, model_config, proof = merged_and_proven(chosen, dtype)
    write_model_folder(
        out,
        state,
        dataclasses.replace(model_config, is_random=False),
        layout,
        tokenizer_dir=chosen.base_dir,
        codec=chosen.config.model.codec,
        voice=chosen.voice(),
        proof=proof,
        texts=texts,
    )
    return proof


def open_checkpoint(folder: Path, why: str, moved_to: MovedTo) -> Chosen:
    """The checkpoint and the files it was trained on. Raises CheckpointError where it is damaged or they are others."""
    from shards.artifacts import resolve
    from shards.config import read_config
    from tools.checkpoints.sound import require_sound
    from train.model.conditioning import decide_conditioning
    from train.run_folder.checkpoint_folders import read_step
    from train.run_folder.identity import check_model_files, find_model_files

    step = read_step(folder)
    require_sound(folder)
    config = moved_to.applied(read_config(CheckpointConfig, require_config(folder / "config.toml")))
    base_dir = resolve(config.model.base, config.model.revision, "model.base")
    codec_dir = resolve(config.model.codec, config.model.codec_revision, "model.codec")
    conditioning = decide_conditioning(config.sequence, config.features, base_dir)
    files = find_model_files(base_dir, codec_dir, conditioning)
    check_model_files(folder, files, config.model, config.features, NAME_THEM)
    return Chosen(folder, why, step, config, base_dir, codec_dir, conditioning)


def merged_and_proven(chosen: Chosen, dtype: str) -> tuple[dict[str, Tensor], ModelConfig, MergeProof]:
    """Base + adapter in the dtype asked for, the base's settings, and that the merged model says what both together say.

    Raises CheckpointError where it does not.
    """
    import torch

    from shards.terminal import progress_bar
    from tools.checkpoints.merge_proof import MergeProof, Rounding, check_logits, greedy_codes, likeliest_codes
    from tools.checkpoints.model_folder import merged_state
    from tools.checkpoints.quantize_effect import same_frames
    from train.model.lora import load_adapter
    from train.model.probe import probe_logits
    from train.model.weights import load_model, stored_dtype

    base_dir = chosen.base_dir
    wanted = stored_dtype(base_dir) if dtype == BASE_DTYPE else getattr(torch, dtype)
    with progress_bar("merging and proving", 5) as done:
        model = load_model(base_dir, wanted, conditioning=chosen.conditioning).eval()
        base_logits = probe_logits(model)
        done()
        load_adapter(model, chosen.folder / "adapter")
        adapted_logits, adapted_likeliest = probe_logits(model), likeliest_codes(model)
        done()
        adapted_codes = greedy_codes(model, base_dir)
        done()
        rounding = Rounding()
        state = merged_state(model, rounding)
        done()
        changes, differs = check_logits(base_logits, adapted_logits, probe_logits(model), wanted)
        equal, said = same_frames(adapted_codes, greedy_codes(model, base_dir))
        likeliest = int((likeliest_codes(model) == adapted_likeliest).all(dim=-1).sum())
        done()
    name = str(wanted).removeprefix("torch.")
    proof = MergeProof(chosen.step, chosen.why, name, changes, differs, rounding.groups(), said, equal, likeliest)
    return state, model.config, proof


def card_files(checkpoint: Path) -> dict[str, str]:
    """README.md of the merged folder, as the hub wants it, and its picture."""
    from tools.checkpoints.card import card, gather

    facts = gather(checkpoint, "merged")
    return {"README.md": card(facts), **({"curves.svg": facts.curves} if facts.curves else {})}


def choose_checkpoint(run: Path, which: str = AUTO) -> tuple[Path, str]:
    """(checkpoint folder, why this one). `which`: auto, best, newest, or a step; a checkpoint's own folder is itself.

    auto: the best where held-out data have judged one, else the newest. Raises CheckpointError.
    """
    from shards.errors import CheckpointError
    from tools.checkpoints.evaluations import run_of
    from tools.checkpoints.sound import pinned, say_if_written
    from train.run_folder.checkpoint_folders import best_checkpoint, own_checkpoints, read_step, why_best

    if (run / "COMPLETE").is_file():
        if which != AUTO:
            raise CheckpointError(f"{run}: is one checkpoint; --which {which} chooses among those of a RUN folder")
        say_if_written(run_of(run))
        return pinned(run), "named"
    say_if_written(run)
    best = best_checkpoint(run)
    if which == "best" or (which == AUTO and best is not None and (best / "COMPLETE").is_file()):
        if best is None or not (best / "COMPLETE").is_file():
            raise CheckpointError(
                f"{run}: no best checkpoint: nothing was held out (train.validation_fraction, train.validation_data); "
                "give --which newest or a step"
            )
        return best, f"best of the run: {why_best(best)}"
    if which in (AUTO, "newest"):
        return find_checkpoint(run), "newest of the run"
    steps = {str(read_step(folder)): folder for folder in own_checkpoints(run)}
    if which not in steps:
        raise CheckpointError(
            f"{run}: no checkpoint of step {which}; there are {', '.join(steps) or 'none'}, or best, newest"
        )
    return steps[which], "named by its step"


def find_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run folder, or the checkpoint folder itself, whatever its name.

    Of a run, only those that it named itself: a copy beside them is taken when it is named.
    """
    from shards.errors import CheckpointError
    from tools.checkpoints.sound import pinned
    from train.run_folder.checkpoint_folders import resumable_checkpoints

    if (run / "COMPLETE").is_file():
        return pinned(run)
    folders = resumable_checkpoints(run)
    if not folders and (run / "config.json").is_file():
        raise CheckpointError(
            f"{run}: is a model's folder, finished already; give the RUN or checkpoint it was made of"
        )
    if not folders:
        raise CheckpointError(
            f"{run}: no complete checkpoint here; give the RUN folder of `train` or a checkpoint folder"
        )
    return folders[-1]


def require_config(path: Path) -> Path:
    from shards.errors import CheckpointError

    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete")
    return path
