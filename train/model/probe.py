"""One seeded input for any model: what it says to it shows whether two models of one shape are the same."""

from __future__ import annotations

import torch
from torch import Tensor

from shards.delay_pattern import CODEBOOK_SIZE
from train.model.attention import Documents
from train.model.decoder import HiggsAudio

TEXT_ROWS, AUDIO_ROWS = 16, 24


@torch.no_grad()
def probe_logits(model: HiggsAudio, seed: int = 0, audio_rows: int = AUDIO_ROWS) -> Tensor:
    """[n] float32: text logits of 16 seeded tokens and audio logits of seeded columns behind them, as one document."""
    config, draw = model.config, torch.Generator().manual_seed(seed)
    text_ids = torch.randint(config.vocab_size, (TEXT_ROWS,), generator=draw)
    codes = torch.randint(CODEBOOK_SIZE, (audio_rows, config.num_codebooks), generator=draw)
    rows = torch.arange(TEXT_ROWS + audio_rows)
    document = Documents(rows, rows, torch.tensor([0, len(rows)], dtype=torch.int32), longest=len(rows))
    hidden = model.model(text_ids, codes, rows, document.attend("padded"))
    text = model.text_lm_head(hidden[:TEXT_ROWS])
    audio = model.audio_lm_head(hidden[TEXT_ROWS:])
    return torch.cat((text.flatten(), audio.flatten())).float()
