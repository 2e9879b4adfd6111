"""The generation pass: time the configurations and generate all images, in any number of processes."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from tomesd_plus.evaluation.configurations import Configuration
from tomesd_plus.evaluation.experiment import Experiment, OnProgress
from tomesd_plus.evaluation.file_io import remove_leftovers
from tomesd_plus.evaluation.generation.conditions import describe
from tomesd_plus.evaluation.generation.sampling import Sampling, run_batch
from tomesd_plus.evaluation.generation.sharding import Share
from tomesd_plus.evaluation.generation.timing import equal_time_rows, measured_speeds
from tomesd_plus.evaluation.speed import load_speeds

POLL_SECONDS = 0.5


def generate_experiment(
    pipe: Any,
    model: str,
    experiment: Experiment,
    configurations: Sequence[Configuration],
    sampling: Sampling,
    batch_size: int = 1,
    share: Share | None = None,
    timed_runs: int = 5,
    equal_time: bool = True,
    on_progress: OnProgress | None = None,
) -> tuple[Experiment, int]:
    """Time the configurations and generate the images of this process's share; existing images and speeds are kept.

    Only process 0 measures speeds, before any image is generated; processes launched with it wait, so as not to
    disturb the times. The speeds determine the equal-time configurations. A shard on another machine has none of these
    unless ``speed.json`` of shard 0 is in its folder.

    Args:
        pipe: An unmodified text-to-image pipeline.
        model: The name, path or hub id from which it was loaded.
        experiment: What to generate, and where.
        configurations: The configurations, the baseline first (see ``complete``).
        sampling: Steps, guidance and size.
        batch_size: Images per batch.
        share: This process's part of the items.
        timed_runs: Timed runs per configuration; 0 for no speeds and no equal-time configurations.
        equal_time: For every faster configuration, add the baseline with the number of steps that fit in its time.
        on_progress: See :data:`~tomesd_plus.evaluation.experiment.OnProgress`.

    Returns:
        The experiment with all its configurations, and the number of items without an image.

    Raises:
        EvaluationError: A folder was made with another configuration.
    """
    share = share or Share()
    conditions = describe(pipe, model, sampling)
    # with other batches or processes, other items share a batch
    batch = {"size": batch_size, "processes": share.count if batch_size > 1 else 1}
    experiment = experiment.prepare(configurations, conditions, batch)
    chosen = list(configurations)
    if timed_runs:
        _measure(pipe, experiment, chosen, sampling, timed_runs, batch_size, share, on_progress)
        if equal_time:
            slower = equal_time_rows(chosen, load_speeds(experiment), sampling)
            chosen += [row for row in slower if row.folder not in {other.folder for other in chosen}]
            experiment = experiment.prepare(chosen, conditions, batch)
            _measure(pipe, experiment, chosen, sampling, timed_runs, batch_size, share, on_progress)
    total = len(chosen) * len(share.of(experiment.items))

    def on_images(count: int) -> None:
        if on_progress:
            on_progress("images", count, total)

    return experiment, generate_images(pipe, experiment, chosen, sampling, batch_size, share, on_images)


def generate_images(
    pipe: Any,
    experiment: Experiment,
    configurations: Sequence[Configuration],
    sampling: Sampling,
    batch_size: int = 1,
    share: Share | None = None,
    on_images: Callable[[int], None] | None = None,
) -> int:
    """Generate the missing images of an experiment; existing images are not changed.

    It can be interrupted at any time and called again. If an image of a batch is missing, the whole batch is generated
    again: the last bits of a matrix product may depend on the batch size, and with them pixels by 1/255.

    Args:
        pipe: An unmodified text-to-image pipeline.
        experiment: What to generate; with prepared folders.
        configurations: The configurations.
        sampling: Steps, guidance and size.
        batch_size: Images per batch.
        share: This process's part of the items.
        on_images: Called with the number of images of each batch, including existing ones.

    Returns:
        The number of items of this share without an image; text files in their folders say why.

    Raises:
        OSError: An image cannot be written. Images already written are kept.
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
                    made = run_batch(pipe, batch, configuration, sampling)
                for item, pixels, withheld in zip(batch, made.pixels, made.withheld, strict=True):
                    if item in missing:
                        folder.save(item, pixels, withheld)
            failures += sum(folder.failure(item).exists() for item in batch)
            if on_images:
                on_images(len(batch))
        remove_leftovers(path for item in items for path in (folder.image(item), folder.failure(item)))
    return failures


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for the files of other processes. If one of them fails, the launcher ends all of them."""
    while not condition():
        time.sleep(POLL_SECONDS)


def _measure(
    pipe: Any,
    experiment: Experiment,
    configurations: Sequence[Configuration],
    sampling: Sampling,
    timed_runs: int,
    batch_size: int,
    share: Share,
    on_progress: OnProgress | None,
) -> None:
    def on_run(total: int) -> None:
        if on_progress:
            on_progress(f"speeds of {len(configurations)} rows", 1, total)

    names = {configuration.folder for configuration in configurations}
    if share.index == 0:
        measured_speeds(pipe, experiment, configurations, sampling, timed_runs, batch_size, on_run)
    elif share.index < share.launched:
        size = len(experiment.items[:batch_size])
        wait_for(lambda: names <= load_speeds(experiment, timed_runs, size).keys())
