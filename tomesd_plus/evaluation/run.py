"""The whole first pass: open the folders, measure speed, add rows of equal time, generate the images."""

from collections.abc import Callable, Sequence
from typing import Any

from tomesd_plus.evaluation.configurations import BASELINE, Configuration
from tomesd_plus.evaluation.experiment import Experiment, describe
from tomesd_plus.evaluation.generate import Sampling
from tomesd_plus.evaluation.generation import generate_images, wait_for
from tomesd_plus.evaluation.items import Share
from tomesd_plus.evaluation.speed import equal_time_rows, load_speeds, measured_speeds

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it came just now, and how much there is of it."""


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
        on_progress: See :data:`OnProgress`.

    Returns:
        The experiment with all its configurations, and how many items gave no image.

    Raises:
        EvaluationError: A folder was made with another configuration.
    """
    share = share or Share()
    conditions = describe(pipe, model, sampling)
    experiment = experiment.opened(configurations, conditions)
    chosen = list(configurations)
    if timed_runs:
        _measure(pipe, experiment, chosen, sampling, timed_runs, batch_size, share, on_progress)
        if equal_time:
            slower = equal_time_rows(chosen, load_speeds(experiment), sampling)
            chosen += [row for row in slower if row.folder not in {other.folder for other in chosen}]
            experiment = experiment.opened(chosen, conditions)
            if share.index == 0:
                _measure(pipe, experiment, chosen, sampling, timed_runs, batch_size, share, on_progress)
    total = len(chosen) * len(share.of(experiment.items))

    def on_images(count: int) -> None:
        if on_progress:
            on_progress("images", count, total)

    return experiment, generate_images(pipe, experiment, chosen, sampling, batch_size, share, on_images)


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
    names = {configuration.folder for configuration in configurations}
    if share.index == 0:
        new = len(names - load_speeds(experiment).keys() - {BASELINE.folder})
        total = (timed_runs + 1) * (new + 1)

        def on_run() -> None:
            if on_progress:
                on_progress(f"speeds of {new + 1} rows", 1, total)

        measured_speeds(pipe, experiment, configurations, sampling, timed_runs, batch_size, on_run)
    elif share.index < share.launched:
        wait_for(lambda: names <= load_speeds(experiment).keys())
