"""The scoring pass: compute the metrics of all configurations of an experiment."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.experiment import Experiment, ImageFolder, OnProgress
from tomesd_plus.evaluation.file_io import files_digest
from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.items import Item
from tomesd_plus.evaluation.scoring.estimates import clip_score, distances, fidelities
from tomesd_plus.evaluation.scoring.extractors import extract
from tomesd_plus.evaluation.scoring.reference import Reference, load_reference, reference_version
from tomesd_plus.evaluation.scoring.results import Result, load_results
from tomesd_plus.evaluation.scoring.score_cache import Part, load_parts
from tomesd_plus.evaluation.scoring.tables import save_results
from tomesd_plus.evaluation.speed import load_speeds
from tomesd_plus.metrics.features import ClipFeatures, Extractor
from tomesd_plus.metrics.fidelity import Metric, psnr, ssim
from tomesd_plus.metrics.intervals import Estimate

SCRATCH = ".features-"
OnCount = Callable[[int], None] | None


@dataclass(frozen=True)
class Scoring:
    """Scoring options.

    Args:
        extractors: Feature extractors for distances; those of CLIP also give CLIP scores.
        reference: A folder of images, a data set's id, or a ``.npz`` file of statistics; ``None`` for no distances.
        reference_split, reference_column: Split and column of a data set.
        resamples: Bootstrap resamples for intervals; 0 for no intervals.
        lpips: The metric LPIPS, if it is to be computed.
    """

    extractors: Sequence[Extractor] = ()
    reference: str | None = None
    reference_split: str = "validation"
    reference_column: str | None = None
    resamples: int = 100
    lpips: Metric | None = None


def score(out: Path, scoring: Scoring, on_progress: OnProgress | None = None) -> list[Result]:
    """Score every configuration of an experiment.

    Images are read in batches and features are stored on the disk, so memory does not grow with their number. Scores
    are cached in the folders of the images, so it can be interrupted at any time and called again. The table also
    includes earlier scores by extractors that are not in ``scoring``.

    Args:
        out: The experiment's folder.
        scoring: Extractors, reference and intervals.
        on_progress: See :data:`~tomesd_plus.evaluation.experiment.OnProgress`; units are images or resamples.

    Raises:
        EvaluationError: Images are missing, or the reference cannot be used.

    Returns:
        A row for each configuration.
    """
    experiment = Experiment.load(out)
    experiment.baseline  # noqa: B018  raises an error if there is none
    if missing := experiment.missing():
        which = ", ".join(f"{count} of {name!r}" for name, count in missing.items())
        raise EvaluationError(
            f"images are yet to be generated: {which}. Run the generate pass again, or delete the folders"
        )
    with _scratch(out) as scratch:
        scorer = Scorer(experiment, scoring, scratch, on_progress)
        rows = _earlier(out)
        for name in experiment.configurations:
            rows[name] = scorer.row(name)
            save_results([rows[other] for other in experiment.configurations if other in rows], out)
    return [rows[name] for name in experiment.configurations]


def _earlier(out: Path) -> dict[str, Result]:
    """The rows of an earlier table, which are kept until they are scored again."""
    try:
        return {row.images_at.name: row for row in load_results(out)}
    except EvaluationError:
        return {}


class Scorer:
    """Scores the configurations of an experiment one by one; loads references on first use."""

    def __init__(
        self, experiment: Experiment, scoring: Scoring, scratch: Path, on_progress: OnProgress | None = None
    ) -> None:
        self.experiment = experiment
        self.scoring = scoring
        self.scratch = scratch
        self.on_progress = on_progress
        self.speeds = load_speeds(experiment)
        self.references: dict[str, Reference] = {}
        self.metrics: list[dict[str, Metric]] = [{"PSNR dB": psnr, "SSIM": ssim}]
        if scoring.lpips:
            self.metrics.append({"LPIPS": scoring.lpips})  # cached separately, so that it can be added later
        self.against = ""
        if scoring.reference is not None:
            version = reference_version(scoring.reference, scoring.reference_split, scoring.reference_column)
            self.against = f" against {scoring.reference} ({version})"

    def row(self, name: str) -> Result:
        """Score one configuration: compute the parts that are not cached, and combine all parts."""
        folder, baseline = self.experiment.folder(name), self.experiment.baseline
        title = folder.manifest["configuration"]["name"]
        made = [item for item in self.experiment.items if folder.image(item).exists()]
        pairs = [item for item in made if baseline.image(item).exists()] if folder != baseline else []
        images = files_digest(folder.image(item) for item in made)
        compared = files_digest(other.image(item) for item in pairs for other in (folder, baseline))
        known = load_parts(folder.path, {images, compared})
        resamples = f", {self.scoring.resamples} resamples"
        fidelities = {", ".join(metrics) + resamples: metrics for metrics in self.metrics if pairs}
        extractors = {e.name + self.against + resamples: e for e in self.scoring.extractors}
        new = [*(pairs for of in fidelities if of not in known), *(made for of in extractors if of not in known)]
        tick = self._ticks(title, sum(map(len, new)))
        parts = []
        for of, metrics in fidelities.items():
            if of not in known:
                known[of] = self._compared(folder, pairs, metrics, Part(of, compared), tick)
                known[of].save(folder.path)
            parts.append(known.pop(of))
        for of, extractor in extractors.items():
            if of not in known:
                known[of] = self._extracted(folder, made, extractor, Part(of, images), tick)
                known[of].save(folder.path)
            parts.append(known.pop(of))
        return self._combine(folder, made, pairs, parts, list(known.values()))

    def _compared(
        self, folder: ImageFolder, items: Sequence[Item], metrics: dict[str, Metric], part: Part, tick: OnCount
    ) -> Part:
        baseline = self.experiment.baseline
        images = Images.of_paths([folder.image(item) for item in items])
        originals = Images.of_paths([baseline.image(item) for item in items])
        estimates, notes = fidelities(images, originals, metrics, self.scoring.resamples, tick)
        if originals.unreadable:
            notes.append(f"{len(set(originals.unreadable))} images of the baseline cannot be read.")
        return replace(part, metrics=estimates, notes=notes, unreadable=_reasons(images))

    def _extracted(
        self, folder: ImageFolder, items: Sequence[Item], extractor: Extractor, part: Part, tick: OnCount
    ) -> Part:
        images = Images.of_paths([folder.image(item) for item in items])
        reference = self._reference(extractor)
        features, kept = extract(extractor, images, self.scratch / "images.npy", tick)
        metrics: dict[str, Estimate] = {}
        notes: list[str] = []
        if reference and len(kept) >= 2:
            resamples = self.scoring.resamples
            on_resample = self._ticks(f"{folder.manifest['configuration']['name']}, intervals", resamples)
            metrics, notes = distances(extractor, features, reference, resamples, on_resample)
        if isinstance(extractor, ClipFeatures) and kept:
            prompts = [items[index].prompt for index in kept]
            name = f"CLIP score ({extractor.name})"
            metrics[name] = clip_score(extractor, features, prompts, self.scoring.resamples)
        sources = {extractor.name: reference.source} if reference else {}
        skipped = {extractor.name: reference.skipped} if reference and reference.skipped else {}
        return replace(
            part, metrics=metrics, notes=notes, unreadable=_reasons(images), references=sources, skipped=skipped
        )

    def _combine(
        self, folder: ImageFolder, made: Sequence[Item], pairs: Sequence[Item], parts: list[Part], others: list[Part]
    ) -> Result:
        """Make a row from the requested parts, and from other cached parts that add metrics."""
        for other in others:
            if not other.metrics.keys() & {name for part in parts for name in part.metrics}:
                parts = [*parts, other]
        manifest = folder.manifest
        name = manifest["configuration"]["name"]
        skipped = self.experiment.skipped_prompts
        notes = [f"{skipped} empty prompts were left out."] if skipped else []
        if folder != self.experiment.baseline and (alone := len(made) - len(pairs)):
            notes.append(f"{name}: {alone} images have no baseline image to compare with: no PSNR, SSIM or LPIPS.")
        fidelity = {metric for metrics in self.metrics for metric in metrics}
        for part in parts:
            own = f"{name}: " if part.metrics.keys() & fidelity else ""
            notes += [f"{own}{note}" for note in part.notes]
        unreadable = {file: reason for part in parts for file, reason in part.unreadable.items()}
        failed = [item for item in self.experiment.items if folder.failure(item).exists()]
        reasons = {folder.failure(item).read_text(encoding="utf-8").strip() for item in failed}
        notes += _losses(name, len(failed), reasons, unreadable)
        return Result(
            name, folder.path, len(made) - len(unreadable), len(failed), len(unreadable),
            sorted({item.seed + manifest["configuration"]["seed_offset"] for item in self.experiment.items}),
            self.experiment.prompts, manifest,
            {name: estimate for part in parts for name, estimate in part.metrics.items()},
            {name: source for part in parts for name, source in part.references.items()},
            self.speeds.get(folder.path.name), list(dict.fromkeys(notes)), unreadable,
            {name: skipped for part in parts for name, skipped in part.skipped.items()},
        )  # fmt: skip

    def _reference(self, extractor: Extractor) -> Reference | None:
        if self.scoring.reference is not None and extractor.name not in self.references:
            self.references[extractor.name] = load_reference(
                self.scoring.reference, extractor, self.scratch / f"reference-{len(self.references)}.npy",
                self.scoring.reference_split, self.scoring.reference_column, self._ticks("reference", 0),
            )  # fmt: skip
        return self.references.get(extractor.name)

    def _ticks(self, name: str, total: int) -> OnCount:
        on_progress = self.on_progress
        return (lambda count: on_progress(f"score: {name}", count, total)) if on_progress else None


def _reasons(images: Images) -> dict[str, str]:
    return {Path(name).name: reason for name, reason in sorted(images.unreadable.items())}


def _losses(name: str, failed: int, reasons: Iterable[str], unreadable: Mapping[str, str]) -> list[str]:
    notes = []
    if failed:
        notes.append(f"{name}: {failed} items have no image: {'; '.join(sorted(reasons))}.")
    if files := [f"{file} ({reason})" for file, reason in sorted(unreadable.items())]:
        notes.append(f"{name}: {len(files)} images cannot be read: {', '.join(files[:3])}.")
    if notes:
        notes.append(
            f"{name}: distances are over fewer images than those of complete rows, which alone makes them larger."
        )
    return notes


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A temporary folder for features; removes those of killed processes of this machine first."""
    own = f"{SCRATCH}{platform.node()}-"
    for old in out.glob(f"{own}*"):
        process = old.name.removeprefix(own).split("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f"{own}{os.getpid()}-") as name:
        yield Path(name)
