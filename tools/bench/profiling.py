"""What a step of ours spends its time on, and whether it waits for the GPU without saying so.

In: a variant. Out: the kernels with the most time of one profiled step and the number of synchronisations in it; and of forward
and backward, run while torch forbids synchronising calls, the first that it met.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from shards.printable import first_line
from tools.bench.steps import WARM_UP, Shared, Variant, cleaned_up, make_model, make_packs
from train.config import LossSection, TrainSection
from train.model.lora import lora_parameters
from train.model.loss import LossCounts, step_losses
from train.optim import make_optimizer
from train.step import StepSettings, train_step

NUM_KERNELS = 15
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def top_kernels(shared: Shared, variant: Variant) -> dict[str, Any]:
    """ms of one step by kernel, the largest first; operators on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = shared.device == "cuda"
    with cleaned_up():
        model = make_model(shared, variant)
        optimizer = make_optimizer([parameter for _, parameter in lora_parameters(model)], TrainSection())
        batch, settings = make_packs(shared, variant.batch_tokens)[0], StepSettings(0, 1e-4, LossSection())

        def step() -> None:
            train_step(model, optimizer, [batch], settings, LossCounts.of([batch], shared.world), shared.world)

        for _ in range(WARM_UP[shared.device]):
            step()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=kinds, acc_events=True) as profiler:
            step()
            if on_gpu:
                torch.cuda.synchronize()
    events: list[Any] = list(profiler.key_averages())
    micros = [(event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in events]
    if on_gpu:  # kernels only: an operator's row holds the time of what it launched
        micros = [(event.key, event.self_device_time_total) for event in events if event.device_type.name == "CUDA"]
    largest = sorted(micros, key=lambda pair: -pair[1])[:NUM_KERNELS]
    waits = {name: sum(event.count for event in events if event.key == name) for name in WAITS}
    return {
        "kernels_ms": {name: time / 1e3 for name, time in largest},
        "all_kernels_ms": sum(time for _, time in micros) / 1e3,
        "num_launches": sum(event.count for event in events if event.key.startswith("cudaLaunchKernel")),
        "waits": waits,
    }


def count_waits(shared: Shared, variant: Variant) -> dict[str, Any]:
    """Forward and backward of one pack under "error"; the one wait that a step has, for its loss, stands behind them."""
    with cleaned_up():
        model = make_model(shared, variant)
        batch = make_packs(shared, variant.batch_tokens)[0]
        counts = LossCounts.of([batch], shared.world)
        counts = dataclasses.replace(counts, audio=counts.audio.to(shared.world.device))

        def learn() -> None:
            step_losses(model(batch), counts, LossSection(), ramp=1.0).total.backward()

        learn()  # the first one allocates
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            learn()
        except RuntimeError as error:
            return {"waits": True, "first": first_line(error)}
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"waits": False}
