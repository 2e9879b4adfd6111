"""The first pass: generate the images of every configuration, each item once, in any number of processes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tomesd_plus.evaluation.configurations import Configuration
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.files import remove_leftovers
from tomesd_plus.evaluation.generate import GeneratedBatch, Sampling, generate_batch
from tomesd_plus.evaluation.items import Item, Share

POLL_SECONDS = 0.5


def generate_images(
    pipe: Any,
    experiment: Experiment,
    configurations: Sequence[Configuration],
    sampling: Sampling,
    batch_size: int = 1,
    share: Share | None = None,
    on_images: Callable[[int], None] | None = None,
) -> int:
    """Generate what is missing of an experiment; what is there already is left as it is.

    Stop it at any moment and call it again. Of each batch only the images that are missing are generated; a matrix
    product's last bits may depend on the size of a batch, so pixels may differ by one in 255 from those of another.

    Args:
        pipe: A text-to-image pipeline, untouched.
        experiment: What to generate; its folders are open.
        configurations: The ways to run the pipeline.
        sampling: Steps, guidance and size.
        batch_size: Images at a time.
        share: This process's part of the items.
        on_images: Called with the number of images that have come, those that were there included.

    Returns:
        How many items of this share gave no image, so far; their folders say why.

    Raises:
        OSError: An image cannot be written. All that were written stay.
    """
    failures = 0
    items = (share or Share()).of(experiment.items)
    for configuration in configurations:
        folder = experiment.folder(configuration)
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            missing = [item for item in batch if not folder.is_done(item)]
            if missing:
                with configuration.switched_on(pipe):
                    made = run_batch(pipe, missing, configuration, sampling)
                for item, pixels, withheld in zip(missing, made.pixels, made.withheld, strict=True):
                    folder.save(item, pixels, withheld)
            failures += sum(folder.failure(item).exists() for item in batch)
            if on_images:
                on_images(len(batch))
        remove_leftovers(folder.path)
    return failures


def run_batch(
    pipe: Any,
    items: Sequence[Item],
    configuration: Configuration,
    sampling: Sampling,
    on_step: Callable[[int], None] | None = None,
) -> GeneratedBatch:
    """Generate one batch under a configuration that is switched on."""
    sampling = replace(sampling, steps=configuration.steps or sampling.steps)
    seeds = [item.noise_seed(configuration.seed_offset) for item in items]
    with _fixed_global_generator(pipe.unet.device):
        return generate_batch(pipe, [item.prompt for item in items], seeds, sampling, on_step)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until other processes' files have come. A launcher ends all its processes when one of them fails."""
    while not condition():
        time.sleep(POLL_SECONDS)


@contextmanager
def _fixed_global_generator(device: torch.device) -> Iterator[None]:
    """For what draws from PyTorch's global generator, as tomesd does: the same numbers for every image."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
