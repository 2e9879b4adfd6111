"""The first pass: folders, speeds, rows of equal time, and each image once, in any number of processes."""

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
    """Generate all images of this process's share, and speeds where it is the first; what is there already stays.

    Speeds are measured by process 0 alone, before images are generated; processes launched with it wait meanwhile, so
    as not to disturb. They tell which rows of equal time there are. A shard on a machine of its own has no such rows
    unless ``speed.json`` of shard 0 is in its folder.

    Args:
        pipe: A text-to-image pipeline, untouched.
        model: What it was loaded from.
        experiment: What to generate, and where.
        configurations: The ways to run the pipeline, the baseline first (see ``complete``).
        sampling: Steps, guidance and size.
        batch_size: Images at a time.
        share: This process's part of the items.
        timed_runs: How often each configuration is timed; 0 for no speeds and no rows of equal time.
        equal_time: Add, for every configuration that is faster, the baseline with as many steps as fit in its time.
        on_progress: See :data:`~tomesd_plus.evaluation.experiment.OnProgress`.

    Returns:
        The experiment with all its configurations, and how many items gave no image.

    Raises:
        EvaluationError: A folder was made with another configuration.
    """
    share = share or Share()
    conditions = describe(pipe, model, sampling)
    batch = {"size": batch_size, "processes": share.count if batch_size > 1 else 1}  # each takes every so many-th item
    experiment = experiment.opened(configurations, conditions, batch)
    chosen = list(configurations)
    if timed_runs:
        _measure(pipe, experiment, chosen, sampling, timed_runs, batch_size, share, on_progress)
        if equal_time:
            slower = equal_time_rows(chosen, load_speeds(experiment), sampling)
            chosen += [row for row in slower if row.folder not in {other.folder for other in chosen}]
            experiment = experiment.opened(chosen, conditions, batch)
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
    """Generate what is missing of an experiment; what is there already is left as it is.

    Stop it at any moment and call it again. Where an image of a batch is missing the whole batch runs again: a matrix
    product's last bits may depend on its size, so pixels may differ by one in 255 from those of another batch size.

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
    """Wait until other processes' files have come. A launcher ends all its processes when one of them fails."""
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
