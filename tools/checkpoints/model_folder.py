"""Writes a model folder in either layout: config, weights in shards of 5 GB, tokenizer, generation settings.

In: tensors under native names. Out: a folder that is complete or not there. The text head is always kept: without it
there is no way back to the older layout, whose class needs it to end its turn. A Whisper tower keeps boson's names in both
layouts; the native class has no place for it, so `HiggsAudioV2ForConditionalGeneration` leaves it out and says so.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from preprocess.sound_edits import AudioSection
from preprocess.text import Normalizer
from shards.config import SequenceSection
from shards.encoders.tensor_files import load_tensors
from shards.errors import CheckpointError
from shards.json_file import read_json_object
from shards.terminal import progress_bar, system_fault
from shards.writer import sync_folder, sync_tree, write_bytes, write_json
from tools.checkpoints.merge_proof import MergeProof, Rounding
from train.model.conditioning import Conditioning
from train.model.config import ModelConfig, boson_config, native_config, read_model_config
from train.model.decoder import HiggsAudio
from train.model.lora import PEFT_PREFIX, group_of, read_adapter_config
from train.model.quantized import Quantization, refuse_quantized
from train.model.weights import boson_name, load_model, native_name, stored_dtype

Layout = Literal["native", "boson"]
VOICE_FILE = "higgs_voice.json"
PROOF_FILE = "merge.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)


class Voice(msgspec.Struct, frozen=True, kw_only=True):
    """higgs_voice.json: what a merged model was trained with, and therefore must be spoken with."""

    base: str
    base_revision: str
    adapter: str
    step: int
    codec: str
    codec_revision: str
    codec_fingerprint: str
    sequence: SequenceSection
    normalize: list[Normalizer] = []  # text.normalize of the texts it was trained on
    audio: AudioSection = AudioSection()  # [audio]: what was done to the clips it was trained on


def convert_model(folder: Path, out: Path, layout: Layout) -> int:
    """Write the model of `folder`, in either layout, as `layout` into `out`; returns the number of tensors.

    Every tensor is checked by loading the model. Raises CheckpointError.
    """
    refuse_quantized(folder, "they cannot be written in another layout")
    config = read_model_config(folder)
    with progress_bar("converting", 2) as done:
        model = load_model(folder, stored_dtype(folder), conditioning=own_conditioning(folder))
        done()
        num_tensors = write_converted(model, folder, config, out, layout)
        done()
    return num_tensors


def write_converted(model: HiggsAudio, folder: Path, config: ModelConfig, out: Path, layout: Layout) -> int:
    known = read_json_object(folder / "config.json", "a model's config").get("audio_tokenizer_id")
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_model_folder(out, state, config, layout, tokenizer_dir=folder, codec=known)
    return len(state)


def convert_adapter(folder: Path, out: Path, layout: Layout) -> int:
    """Write the peft adapter of `folder` with the layer names of `layout` into `out`; returns the number of tensors.

    `target_modules` are suffixes that fit both layouts, so only tensors are renamed.
    """
    from shards.encoders.tensor_files import save_tensors

    read_adapter_config(folder / "adapter_config.json")  # a damaged one is not copied on
    rename = boson_name if layout == "boson" else native_name
    tensors = load_tensors(folder / "adapter_model.safetensors")
    renamed = {PEFT_PREFIX + rename(name.removeprefix(PEFT_PREFIX)): tensor for name, tensor in tensors.items()}
    with new_folder(out, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        save_tensors(renamed, partial / "adapter_model.safetensors")
        shutil.copyfile(folder / "adapter_config.json", partial / "adapter_config.json")
    return len(renamed)


def own_conditioning(folder: Path) -> Conditioning:
    """How a finished model takes its reference: with its own tower, where it has one."""
    sizes = read_model_config(folder).whisper
    if sizes is None:
        return Conditioning("the checkpoint has no Whisper tower")
    return Conditioning("the checkpoint's own Whisper tower", folder, sizes, has_projector=True)


def write_model_folder(
    out: Path,
    state: dict[str, Tensor],
    config: ModelConfig,
    layout: Layout,
    tokenizer_dir: Path,
    codec: str | None = None,
    voice: Voice | None = None,
    proof: MergeProof | None = None,
    quantization: Quantization | None = None,
    reports: Mapping[str, Any] = {},
    texts: Mapping[str, str] = {},
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """`state` under native names. `codec` is written for vLLM-Omni, which reads `audio_tokenizer_id`.

    `reports`: JSON files besides, by name. `texts`: other files. `check` is given the finished folder before it gets its name.
    """
    dtype = str(state["audio_lm_head.weight"].dtype).removeprefix("torch.")
    if layout == "boson":
        state = {boson_name(name): tensor for name, tensor in state.items()}
        settings: dict[str, Any] = {**boson_config(config), "torch_dtype": dtype}
    else:
        settings = {**native_config(config), "dtype": dtype}
    if codec:
        settings["audio_tokenizer_id"] = codec
    if quantization:
        settings["quantization_config"] = msgspec.to_builtins(quantization)
    with new_folder(out, sum(tensor.nbytes for tensor in state.values())) as partial:
        save_torch_state_dict(state, partial, max_shard_size="5GB")
        write_json(partial / "config.json", settings)
        if layout == "boson":
            write_json(partial / "generation_config.json", {"bos_token_id": 128000, "eos_token_id": 128001})
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, partial / name)
        if proof:
            write_json(partial / PROOF_FILE, proof)
        for name, report in reports.items():
            write_json(partial / name, report)
        for name, text in texts.items():
            write_bytes(partial / name, text.encode())
        if voice:
            write_json(partial / VOICE_FILE, voice)
        elif (tokenizer_dir / VOICE_FILE).is_file():  # a merged model in another layout is still that voice
            shutil.copyfile(tokenizer_dir / VOICE_FILE, partial / VOICE_FILE)
        check(partial)


@contextmanager
def new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary folder to fill with about `num_bytes`; it becomes `out` when nothing went wrong, else it is removed.

    Raises CheckpointError where it cannot be written.
    """
    check_empty(out)
    place = out.absolute()  # "." has no name
    partial = place.with_name(f".{place.name}.tmp")
    held = hold_partial(out, partial)
    try:
        for left in partial.iterdir():  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        require_room(out, partial, num_bytes)
        yield partial
        sync_tree(partial)  # a name that outlives a power cut must not stand for half a file
        if place.exists():
            place.rmdir()  # empty, checked above
        partial.rename(place)
        sync_folder(place.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        what = system_fault(error) if isinstance(error, OSError) else str(error).splitlines()[0]
        raise CheckpointError(f"{out}: not written: {what}; {room_needed(num_bytes)}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # room for the next one
        raise
    finally:
        os.close(held)


def hold_partial(out: Path, partial: Path) -> int:
    """A descriptor of the folder, locked until it is closed or its process dies. Raises CheckpointError where another has it.

    Two that write one OUT would otherwise put their files into one folder.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        held = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{out}: not written: {system_fault(error)}") from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise CheckpointError(f"{out}: another process is writing it; wait for that one, or give another OUT") from None
    except OSError:
        pass  # a network file system without locks
    return held


def require_room(out: Path, partial: Path, num_bytes: int) -> None:
    """Raises CheckpointError before anything is written where the disk is too full. Quotas show only when it is written."""
    free = shutil.disk_usage(partial).free
    if free < num_bytes:
        raise CheckpointError(f"{out}: not written: {free / 1e9:.1f} GB are free there; {room_needed(num_bytes)}")


def room_needed(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB are needed there: make room, or give an OUT on another disk"


def check_empty(out: Path) -> None:
    """Raises CheckpointError when something is there already, or nothing can be put there: before work of minutes.

    Whether it can is tried, because the bits of a folder say nothing of a read-only disk, and root may write in spite of them.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; give a folder")
    if os.path.ismount(out):
        raise CheckpointError(f"{out}: a disk is mounted here, which cannot be renamed to; give a folder inside it")
    try:
        if out.exists() and any(out.iterdir()):
            raise CheckpointError(f"{out}: exists and is not empty; give another folder")
        nearest = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
        with tempfile.TemporaryDirectory(prefix=f".{out.absolute().name[:32]}.", dir=nearest):
            pass
    except OSError as error:
        raise CheckpointError(f"{out}: not written: {system_fault(error)}; give an OUT that you may write to") from None


def merged_state(model: HiggsAudio, rounding: Rounding | None = None) -> dict[str, Tensor]:
    """Native names; every adapter added to its weight in fp32 by peft and rounded once to the model's dtype.

    The model is the merged one afterwards. `rounding` counts what was lost.
    """
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                layer: Any = module  # every kind of LoRA layer has what follows; the base class does not declare it
                base = layer.get_base_layer()
                dtype = base.weight.dtype
                base.float()
                before = base.weight.detach().clone()
                layer.merge(adapter_names=["default"])
                after = base.weight.detach()
                base.to(dtype)
                if rounding:
                    rounding.add(group_of(f"{name}.lora_A"), before, after, base.weight)
    return {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }
