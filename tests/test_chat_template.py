"""The clone layout against transformers' own processor: `apply_chat_template` on real clips, ids and columns.

The template lives on the hub, out of reach; the one here says in our words what the released one renders for a cloning
conversation (read against it: NOTES.md, 2026-11-23). What expands it, encodes the clips and
delays the codes is the real processor.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from preprocess.audio import CODEC_RATE, AudioLimits, decode
from shards.cloning import cloning_sample
from shards.config import SequenceSection
from shards.encoders.codec import load_codec, pad_to_frames
from shards.sequence import AUDIO_OUT, SequenceBuilder

transformers = pytest.importorskip("transformers", minversion="5.3", reason="the processor came with 5.3")

SCENE = "Audio is recorded from a quiet room."
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'scene' %}"
    "{{ '\n\n<|scene_desc_start|>\n' + message['content'][0]['text'] + '\n<|scene_desc_end|>' }}"
    "{% else %}"
    "{% if not loop.first %}<|eot_id|>{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'audio' %}<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>{% else %}{{ item['text']|trim }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}<|eot_id|>"
)
DELAY_TOKEN = 128014  # the processor's id of the last 7 columns of an audio; boson and we use AUDIO_OUT throughout


def test_clone_ids_and_columns_equal_the_processors(tiny_dir: Path, tokenizer, repository):
    processor = transformers.HiggsAudioV2Processor(
        feature_extractor=transformers.DacFeatureExtractor(
            feature_size=1, hop_length=1, sampling_rate=24000, return_attention_mask=True
        ),
        tokenizer=transformers.AutoTokenizer.from_pretrained(tiny_dir / "model", pad_token="<|end_of_text|>"),
        audio_tokenizer=transformers.HiggsAudioV2TokenizerModel.from_pretrained(tiny_dir / "codec"),
        chat_template=TEMPLATE,
    )
    folder = repository / "tests" / "data" / "arabic-mini"
    # Whole frames: at other lengths two extractors of the released repositories pad differently.
    reference, target = (
        pad_to_frames(decode((folder / name).read_bytes(), AudioLimits()).at(CODEC_RATE))
        for name in ("spk_03_06.flac", "spk_00_36.flac")
    )
    said, wanted = "الجسر الجديد يربط ضفتي النهر.", "هل تعرف الطريق؟"
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Generate audio following instruction."}]},
        {"role": "scene", "content": [{"type": "text", "text": SCENE}]},
        {"role": "user", "content": [{"type": "text", "text": said}]},
        {"role": "assistant", "content": [{"type": "audio", "audio": reference}]},
        {"role": "user", "content": [{"type": "text", "text": wanted}]},
        {"role": "assistant", "content": [{"type": "audio", "audio": target}]},
    ]
    theirs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, sampling_rate=24000, return_tensors="pt"
    )

    codec = load_codec(tiny_dir / "codec")
    sample = cloning_sample(tokenizer, said, codec.encode(reference), wanted)
    sample = dataclasses.replace(sample, target_codes=codec.encode(target))
    ours = SequenceBuilder(tokenizer, SequenceSection()).training(sample)
    ids = theirs["input_ids"][0].numpy()
    assert (ids == DELAY_TOKEN).sum() == 2 * 7
    np.testing.assert_array_equal(ours.token_ids, np.where(ids == DELAY_TOKEN, AUDIO_OUT, ids))
    np.testing.assert_array_equal(ours.codes, theirs["audio_input_ids"][0].numpy().T)
