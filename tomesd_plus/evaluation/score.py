"""The second pass: from folders of images to a table."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tomesd_plus.evaluation.configurations import BASELINE
from tomesd_plus.evaluation.distances import (
    Features,
    Kernel,
    Statistics,
    frechet_distance,
    gaussian_kernel,
    kernel_distance,
    polynomial_kernel,
)
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.features import ClipFeatures, Extractor, InceptionFeatures, clip_scores, extract
from tomesd_plus.evaluation.fidelity import Metric, fidelity, psnr, ssim
from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.intervals import Estimate, mean_estimate, resampling_weights
from tomesd_plus.evaluation.reference import Reference, load_reference
from tomesd_plus.evaluation.results import Result, save_results
from tomesd_plus.evaluation.run import OnProgress
from tomesd_plus.evaluation.speed import load_speeds

SCRATCH = ".features-"


@dataclass(frozen=True)
class Scoring:
    """What to score with.

    Args:
        extractors: Networks for distances; CLIP ones give CLIP scores too.
        reference: A folder of pictures, a data set's id, or a ``.npz`` file of statistics; no distances without.
        reference_split, reference_column: Of a data set.
        resamples: Bootstrap resamples for the intervals; 0 for none.
        lpips: The metric, if it is wanted.
    """

    extractors: Sequence[Extractor] = ()
    reference: str | None = None
    reference_split: str = "validation"
    reference_column: str | None = None
    resamples: int = 100
    lpips: Metric | None = None


def score(out: Path, scoring: Scoring, on_progress: OnProgress | None = None) -> list[Result]:
    """Score every configuration of an experiment.

    Images are read one batch at a time and features lie on the disk, so memory does not grow with their number. The
    results are written after every row.

    Args:
        out: The experiment's folder.
        scoring: Extractors, reference, intervals.
        on_progress: Called with what is done, how many images it was done to just now, and to how many in all (0 where
            that is not known before).

    Raises:
        EvaluationError: Images are missing, or the reference cannot be used.
    """
    experiment = Experiment.load(out)
    if experiment.configurations[:1] != (BASELINE.folder,):
        raise EvaluationError(f"{out} has no images of the baseline: run the generate pass again")
    if missing := experiment.missing():
        which = ", ".join(f"{count} of {name!r}" for name, count in missing.items())
        raise EvaluationError(
            f"images are yet to be generated: {which}. Run the generate pass again, or delete the folders"
        )
    rows: list[Result] = []
    with _scratch(out) as scratch:
        references = _references(scoring, scratch, on_progress)
        for name in experiment.configurations:
            rows.append(_score_one(experiment, name, scoring, references, scratch, on_progress))
            save_results(rows, out)
    return rows


def distance_names(extractor: Extractor) -> dict[str, Kernel | None]:
    """What distances over an extractor's features are called, with their kernel; ``None`` is the Fréchet distance.

    FID and KID are distances over InceptionV3's features; those over any other's say whose.
    """
    if isinstance(extractor, InceptionFeatures):
        return {"FID": None, "KID": polynomial_kernel}
    names: dict[str, Kernel | None] = {
        f"Fréchet distance ({extractor.name})": None,
        f"kernel distance ({extractor.name})": polynomial_kernel,
    }
    if isinstance(extractor, ClipFeatures):
        names[f"CMMD ({extractor.name})"] = gaussian_kernel
    return names


def distances(
    extractor: Extractor, features: Features, reference: Reference, resamples: int
) -> tuple[dict[str, Estimate], list[str]]:
    """All distances of generated pictures' features (count ≥ 2, dimensions) to a reference, and notes."""
    estimates, notes = {}, []
    count, dimensions = features.shape
    weights = resampling_weights(count, resamples)
    for name, kernel in distance_names(extractor).items():
        if kernel is None:
            resampled = [frechet_distance(reference.statistics, Statistics.of(features, row)) for row in weights]
            value = frechet_distance(reference.statistics, Statistics.of(features))
            estimates[name] = Estimate.of(value, torch.tensor(resampled), count)
        elif reference.features is None:
            notes.append(f"{name} is left out: {reference.source} has no features, only their mean and covariance.")
        else:
            all_weights = torch.cat([torch.ones(1, count), weights])
            values = kernel_distance(features, reference.features, kernel, all_weights, reference.within(kernel))
            estimates[name] = Estimate.of(values[0].item(), values[1:], count)
    for whose, number in (("generated", count), ("reference", reference.statistics.count)):
        if number is not None and number <= dimensions:
            notes.append(
                f"{number} {whose} images for the {dimensions} dimensions of {extractor.name}: the covariance is "
                "singular and the Fréchet distance far too large; compare only rows of the same number of images."
            )
    return estimates, notes


def _references(scoring: Scoring, scratch: Path, on_progress: OnProgress | None) -> dict[str, Reference]:
    if scoring.reference is None:
        return {}
    return {
        extractor.name: load_reference(
            scoring.reference, extractor, scratch / f"reference-{index}.npy", scoring.reference_split,
            scoring.reference_column, _named("reference", 0, on_progress),
        )
        for index, extractor in enumerate(scoring.extractors)
    }  # fmt: skip


def _score_one(
    experiment: Experiment,
    name: str,
    scoring: Scoring,
    references: dict[str, Reference],
    scratch: Path,
    on_progress: OnProgress | None,
) -> Result:
    folder, baseline = experiment.folder(name), experiment.folder(experiment.configurations[0])
    manifest = folder.manifest
    made = [item for item in experiment.items if folder.image(item).exists()]
    passes = len(scoring.extractors) + (folder != baseline)
    tick = _named(manifest["configuration"]["name"], passes * len(made), on_progress)
    images = Images.of_paths([folder.image(item) for item in made])
    metrics: dict[str, Estimate] = {}
    notes = [f"{experiment.skipped_prompts} empty prompts were left out."] if experiment.skipped_prompts else []
    unreadable: set[str] = set()
    if folder != baseline:
        pairs = [item for item in made if baseline.image(item).exists()]
        candidates = Images.of_paths([folder.image(item) for item in pairs])
        originals = Images.of_paths([baseline.image(item) for item in pairs])
        compared, lost = _fidelity(candidates, originals, scoring, tick)
        metrics |= compared
        notes += lost
        unreadable |= set(candidates.unreadable)
    for extractor in scoring.extractors:
        features, kept = extract(extractor, images, scratch / "images.npy", tick)
        unreadable |= set(images.unreadable)
        if extractor.name in references and len(kept) >= 2:
            figures, remarks = distances(extractor, features, references[extractor.name], scoring.resamples)
            metrics |= figures
            notes += remarks
        if isinstance(extractor, ClipFeatures) and kept:
            scores = _clip_scores(extractor, features, [made[index].prompt for index in kept])
            metrics[f"CLIP score ({extractor.name})"] = mean_estimate(scores, scoring.resamples)
    for reference in references.values():
        if reference.unreadable:
            notes.append(f"{reference.unreadable} images of {reference.source} cannot be read and were left out.")
    failed = [item for item in experiment.items if folder.failure(item).exists()]
    reasons = {folder.failure(item).read_text().strip() for item in failed}
    notes += _losses(manifest["configuration"]["name"], len(failed), reasons, unreadable)
    offset = manifest["configuration"]["seed_offset"]
    return Result(
        manifest["configuration"]["name"], folder.path, len(made) - len(unreadable), len(failed), len(unreadable),
        sorted({item.seed + offset for item in experiment.items}), experiment.prompts, manifest, metrics,
        {name: reference.source for name, reference in references.items()}, load_speeds(experiment).get(name), notes,
    )  # fmt: skip


def _fidelity(
    images: Images, originals: Images, scoring: Scoring, on_images: Callable[[int], None] | None
) -> tuple[dict[str, Estimate], list[str]]:
    wanted: dict[str, Metric] = {"PSNR dB": psnr, "SSIM": ssim}
    if scoring.lpips:
        wanted["LPIPS"] = scoring.lpips
    result = fidelity(images, originals, wanted, on_images)
    estimates = {
        name: mean_estimate(torch.tensor(values), scoring.resamples)
        for name, values in result.values.items()
        if values
    }
    return estimates, [f"{result.unequal} pairs of images differ in size and were left out."] if result.unequal else []


def _clip_scores(extractor: ClipFeatures, features: np.ndarray, prompts: Sequence[str]) -> torch.Tensor:
    parts = []
    for start in range(0, len(prompts), extractor.batch_size):
        texts = extractor.of_texts(prompts[start : start + extractor.batch_size])
        parts.append(clip_scores(torch.tensor(features[start : start + extractor.batch_size]), texts))
    return torch.cat(parts)


def _losses(name: str, failed: int, reasons: Iterable[str], unreadable: Iterable[str]) -> list[str]:
    notes = []
    if failed:
        notes.append(f"{name}: {failed} items gave no image: {'; '.join(sorted(reasons))}.")
    if files := sorted(Path(file).name for file in unreadable):
        notes.append(f"{name}: {len(files)} images cannot be read: {', '.join(files[:3])}.")
    if notes:
        notes.append(
            f"{name}: distances are over fewer images than those of whole rows, which alone makes them larger."
        )
    return notes


def _named(name: str, total: int, on_progress: OnProgress | None) -> Callable[[int], None] | None:
    return (lambda count: on_progress(f"score: {name}", count, total)) if on_progress else None


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder for features, gone afterwards; what a killed run left is removed first."""
    for old in out.glob(f"{SCRATCH}*"):
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=SCRATCH) as name:
        yield Path(name)
