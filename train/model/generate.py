"""One prompt spoken to its end: the short way into `train.model.generation`.

In: a model and the prompt of `SequenceBuilder.prompt`. Out: raw codes. The first column is all BOS, codebook k starts k
columns later, and from the first EOS on codebook k is forced to EOS k + 1 columns after it: the rules of transformers'
`HiggsAudioV2DelayPatternLogitsProcessor`, so greedy codes equal its `generate`. Repetition-aware sampling (RAS) redraws
a code that filled the recent window, as in both reference implementations.

The ranks of a sharded model speak together: each computes the same column, and all go on with the one that the first has
drawn, so that none can end before the others.
"""

from __future__ import annotations

from collections.abc import Callable

from shards.sequence import Sequence
from train.model.decoder import HiggsAudio
from train.model.generation.engine import Engine
from train.model.generation.request import FRAMES_PER_SECOND, GREEDY, Request, Sampling, Speech
from train.world import ALONE, World

__all__ = ["GREEDY", "Sampling", "Speech", "generate"]


def generate(
    model: HiggsAudio,
    prompt: Sequence,
    max_frames: int,
    sampling: Sampling = GREEDY,
    world: World = ALONE,
    interrupted: Callable[[], bool] = lambda: False,
) -> Speech:
    """Continue a prompt until end of speech or `max_frames` frames (25 per second). Every rank must call this.

    `interrupted` is asked after every second of speech, by every rank at the same column, with the same answer.
    """
    engine = Engine(model, world=world)
    request = engine.submit(Request(prompt, max_frames, sampling))
    seconds = 0
    while not request.is_done:
        engine.advance()
        if request.num_columns // FRAMES_PER_SECOND > seconds:
            seconds = request.num_columns // FRAMES_PER_SECOND
            if interrupted():
                request.cancel()
    return request.speech()
