"""``tomesd-plus evaluate``: what configurations cost in quality and save in time, over many prompts."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tomesd_plus.cli.checks import Stage, check_features, check_options
from tomesd_plus.cli.common import check_writable, load, quiet, run, say
from tomesd_plus.cli.options import Device, Dtype, Guidance, Model, Scheduler, Size, Steps, sampling_from
from tomesd_plus.cli.progress import shown_progress
from tomesd_plus.cli.report import print_report
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.names import EMBEDDED, INCEPTION, TINY

if TYPE_CHECKING:
    from tomesd_plus.evaluation.configurations import Configuration
    from tomesd_plus.evaluation.scoring.score import Scoring

Conf = Annotated[
    list[str] | None,
    typer.Option("--configuration", "-c", help="Such as 'merge: 0.5', 'cache: 3', 'tomesd: 0.5'; repeatable."),
]
Reference = Annotated[
    str | None,
    typer.Option(help="Folder of images, data set id, or .npz file. Default with 'tiny' features: embedded."),
]


def evaluate_command(
    context: typer.Context,
    stage: Annotated[Stage, typer.Argument(help="generate, score, or both: all.")] = Stage.all,
    out: Annotated[Path, typer.Option(help="The evaluation's folder; an existing one is resumed.")] = Path(
        "evaluation"
    ),
    configuration: Conf = None,
    configurations: Annotated[Path | None, typer.Option(help="A YAML file of configurations.")] = None,
    model: Model = TINY,
    prompts: Annotated[
        str, typer.Option(help="A .txt, .tsv, .csv, .json, .jsonl or .parquet file, a data set id, or 'embedded'.")
    ] = EMBEDDED,
    column: Annotated[str | None, typer.Option(help="Column of the prompts. Default: prompt, caption, text …")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set of prompts.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first n prompts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="First seed of each prompt.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Images per prompt, with consecutive seeds.")] = 1,
    steps: Steps = 25,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    size: Size = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 1,
    shard: Annotated[str | None, typer.Option(help="i/n, i from 0: generate only this part of the images.")] = None,
    timed_runs: Annotated[int, typer.Option(min=0, help="Timings of each configuration; 0: no speeds.")] = 5,
    noise_floor: Annotated[bool, typer.Option(help="Add the baseline with other seeds.")] = True,
    equal_time: Annotated[bool, typer.Option(help="Add the baseline with fewer steps, in equal time.")] = True,
    features: Annotated[
        list[str] | None,
        typer.Option(help="inception, tiny (embedded), or a CLIP's id or folder; repeatable. Default: see below."),
    ] = None,
    inception_weights: Annotated[str | None, typer.Option(help="A file. Default: downloaded.")] = None,
    reference: Reference = None,
    reference_split: Annotated[str, typer.Option(help="Split of a data set of images.")] = "validation",
    reference_column: Annotated[str | None, typer.Option(help="Its column. Default: image …")] = None,
    resamples: Annotated[int, typer.Option(min=0, help="Bootstrap resamples for 95 % intervals; 0: none.")] = 100,
    lpips: Annotated[
        bool | None, typer.Option("--lpips/--no-lpips", help="LPIPS. Default: on if its weights are available.")
    ] = None,
) -> None:
    """Speed, fidelity, distances to real images and CLIP scores of configurations, beside the baseline.

    Generates images, then scores them; `evaluate generate` and `evaluate score` do only one of the two. It can be
    stopped at any time and run again. `torchrun` and `accelerate launch` run it in many processes. Default features:
    the embedded CLIP for the embedded model, else InceptionV3 if there is a reference. A model's safety checker is
    off: it would decide which images a row has.
    """
    quiet()
    from tomesd_plus.evaluation.experiment import Experiment
    from tomesd_plus.evaluation.generation.prompts import load_prompts
    from tomesd_plus.evaluation.generation.run import generate_experiment, wait_for
    from tomesd_plus.evaluation.generation.sharding import Share
    from tomesd_plus.evaluation.items import make_items
    from tomesd_plus.evaluation.reporting.report import write_report
    from tomesd_plus.evaluation.scoring.score import score
    from tomesd_plus.evaluation.speed import SPEED_FILE, load_speeds

    share = run(lambda: Share.here(shard))
    check_options(context, stage, share)
    alone = share.count == share.launched  # no other shards whose images scoring would have to wait for
    scoring = None
    if stage is not Stage.generate and share.index == 0 and alone:  # first: what is missing is said before the work
        scoring = run(lambda: _scoring(features or _default_features(out, model, stage, reference), device,
                                       inception_weights, reference, lpips))  # fmt: skip
        scoring = replace(scoring, reference_split=reference_split, reference_column=reference_column,
                          resamples=resamples)  # fmt: skip
    if stage is not Stage.score:
        chosen = run(lambda: _configurations(configuration, configurations, noise_floor))
        sampling = sampling_from(steps, guidance, size, model)
        given = run(lambda: load_prompts(prompts, column, split, limit))
        items = tuple(make_items(given.entries, range(seed, seed + seeds)))
        check_writable(out)
        pipe, _ = load(model, device, dtype, safety_checker=False, scheduler=scheduler)
        with shown_progress(share) as on_progress:
            experiment, failures = run(
                partial(generate_experiment, pipe, model, Experiment(out, items, given.source, given.skipped), chosen,
                        sampling, batch_size, share, timed_runs, equal_time, on_progress)
            )  # fmt: skip
        say(f"Images: {out}" + (f"; {failures} items gave none, the *.failed files say why" if failures else ""))
        if timed_runs and equal_time and not load_speeds(experiment):
            say(f"No rows of equal time: shard 0 measures speeds. Put its {SPEED_FILE} into {out} and run this again.")
        if stage is Stage.all and not alone:
            say(f"Once all shards are done and in one folder: tomesd-plus evaluate score --out {out}")
        if scoring and share.launched > 1:
            if experiment.missing():
                say("Waiting for the other processes' images.")
            wait_for(lambda: not experiment.missing())
    if scoring is None:
        return
    with shown_progress(share) as on_progress:
        results = run(lambda: score(out, scoring, on_progress))
    print_report(results, run(lambda: write_report(results, out)), out)


def _configurations(texts: list[str] | None, path: Path | None, noise_floor: bool) -> "list[Configuration]":
    from tomesd_plus.evaluation.configurations import complete, load_configurations, parse_configuration

    chosen = [*(load_configurations(path) if path else []), *map(parse_configuration, texts or [])]
    return complete(chosen or [parse_configuration("merge: 0.5")], noise_floor)


def _scoring(
    names: list[str], device: str | None, weights: str | None, reference: str | None, lpips: bool | None
) -> "Scoring":
    from tomesd_plus.evaluation.generation.devices import local_device
    from tomesd_plus.evaluation.scoring.extractors import load_extractor, load_lpips
    from tomesd_plus.evaluation.scoring.score import Scoring

    check_features(names, reference, weights)
    device = local_device(device)
    if reference is None and names == [TINY]:
        reference = EMBEDDED
    metric = None
    if lpips is not False:
        try:
            metric = load_lpips(device)
        except EvaluationError as error:
            if lpips:
                raise
            say(f"LPIPS is left out. {error}")
    return Scoring([load_extractor(name, device, weights) for name in names], reference, lpips=metric)


def _default_features(out: Path, model: str, stage: Stage, reference: str | None) -> list[str]:
    from tomesd_plus.evaluation.experiment import Experiment

    if stage is Stage.score:
        experiment = Experiment.load(out)
        model = experiment.baseline.manifest["model"]
    if model == TINY:
        return [TINY]
    return [INCEPTION] if reference else []
