"""boson's own way from a ChatML row to a batch: `prepare_chatml_sample`, `ChatMLDatasetSample`, its collator.

Only the boson environment can import it. Samples and collators are made anew for every batch: the collator overwrites the
labels it is given.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample
from transformers import WhisperFeatureExtractor

from shards.sample import Sample
from shards.sequence import AUDIO_OUT, WHISPER, Audio, Sequence, Text, WhisperClip, assemble


def as_written_row(sample: Sample) -> dict[str, Any]:
    """The ChatML row a sample was made from."""
    facts = sample.facts
    messages = []
    for turn in facts.turns:
        content: list[dict[str, str]] = []
        for item in turn.items:
            if isinstance(item, int):
                content.append({"type": "text", "text": facts.texts[item]})
            else:
                content.append({"type": "audio", "audio_url": f"{item}.wav"})
        messages.append({"role": turn.role, "content": content})
    return {"messages": messages, "start_index": facts.start_index}


def clone_row(sample: Sample, system_prompt: str) -> dict[str, Any]:
    """The released cloning conversation as a ChatML row; `start_index` masks all but the last turn."""
    facts = sample.facts
    reference_text, target_text = facts.texts[facts.reference_text], facts.texts[facts.target_text]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": reference_text},
        {"role": "assistant", "content": [{"type": "audio", "audio_url": "reference.wav"}]},
        {"role": "user", "content": target_text},
        {"role": "assistant", "content": [{"type": "audio", "audio_url": "target.wav"}]},
    ]
    return {"messages": messages, "start_index": 4}


def dataset_sample(
    row: dict[str, Any], tokenizer: Any, codes: list[np.ndarray], waves: list[np.ndarray] | None = None
) -> ChatMLDatasetSample:
    """`codes` [K, T] and `waves` [n] at 16 kHz of the row's audios, in the order of their places."""
    from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent

    messages = [
        Message(
            role=message["role"],
            content=message["content"]
            if isinstance(message["content"], str)
            else [
                TextContent(item["text"]) if item["type"] == "text" else AudioContent(audio_url=item["audio_url"])
                for item in message["content"]
            ],
        )
        for message in row["messages"]
    ]
    ids, labels, _, _ = prepare_chatml_sample(
        ChatMLSample(messages=messages, start_index=row["start_index"]), tokenizer
    )
    assert ids is not None, "boson could not read the row"
    waves = waves or [np.zeros(0, np.float32) for _ in codes]
    starts = np.cumsum([0] + [part.shape[1] for part in codes])[:-1]
    wave_starts = np.cumsum([0] + [len(wave) for wave in waves])[:-1]
    return ChatMLDatasetSample(
        input_ids=torch.tensor(ids),
        label_ids=torch.tensor(labels),
        audio_ids_concat=torch.from_numpy(np.concatenate(codes, axis=1).astype(np.int64)),
        audio_ids_start=torch.from_numpy(starts),
        audio_waveforms_concat=torch.from_numpy(np.concatenate(waves)),
        audio_waveforms_start=torch.from_numpy(wave_starts),
        audio_sample_rate=torch.full((len(codes),), 16000),
        audio_speaker_indices=torch.full((len(codes),), -1),
    )


def collate(samples: list[ChatMLDatasetSample], whisper: bool = False) -> Any:
    """A batch of the released settings, or with Whisper features."""
    extractor = SimpleNamespace(feature_extractor=WhisperFeatureExtractor(feature_size=128))
    collator = HiggsAudioSampleCollator(
        whisper_processor=extractor if whisper else None,
        audio_in_token_id=WHISPER,
        audio_out_token_id=AUDIO_OUT,
        pad_token_id=128001,
        audio_stream_bos_id=1024,
        audio_stream_eos_id=1025,
        encode_whisper_embed=whisper,
        return_audio_in_tokens=True,
        audio_num_codebooks=8,
        use_delay_pattern=True,
    )
    return collator(samples)


def our_sequence(sample: ChatMLDatasetSample, clips: list[WhisperClip] | None = None) -> Sequence:
    """Our sequence of boson's ids and labels, whatever its layout: placeholders become audio, the rest stays text.

    Only for rows our layouts cannot say (several references); elsewhere the builder is the one under test.
    """
    ids, labels = sample.input_ids.numpy().astype(np.int32), sample.label_ids.numpy()
    segments: list[Text | Audio] = []
    references = iter(clips or [])
    number = 0
    for token, label in zip(ids, labels, strict=True):
        if token in (WHISPER, AUDIO_OUT):
            codes = sample.get_audio_codes(number).numpy()
            is_target = bool(token == AUDIO_OUT)
            segments.append(Audio(codes, is_target, None if is_target else next(references, None)))
            number += 1
        else:
            segments.append(Text(np.array([token]), learned=bool(label != -100)))
    return assemble(segments)
