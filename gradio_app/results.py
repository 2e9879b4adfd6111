"""What a run gives: images with their cost, and a candidate's beside the baseline's."""

from dataclasses import dataclass, field

from torch import Tensor

from gradio_app.settings import Candidate


@dataclass(frozen=True)
class Shot:
    """A picture and what it cost.

    Args:
        pixels: (3, height, width) in [0, 1], float32, on the CPU.
        seconds: The whole call: text encoding, denoising, decoding.
        memory_mib: Peak, MiB: what PyTorch allocated on a GPU, or the process's resident memory on a CPU.
    """

    pixels: Tensor
    seconds: float
    memory_mib: float


@dataclass(frozen=True)
class Result:
    """A candidate's picture beside the baseline's.

    Args:
        candidate: What was asked for.
        baseline, merged: The pictures.
        psnr: In dB, to the baseline's picture; ``None`` if the two are identical.
        ssim: 1 for equal pictures.
        removed: Share of tokens removed at each level, over all steps.
        cached_steps: Steps that ran the outer layers only.
        skipped_steps: Steps that ran nothing.
        steps: Of each picture; some schedulers make more of them than were asked for.
        merge_maps: (rows, columns) by step, from 0, and level: how many tokens each was merged with, itself counted.
        remembered: The baseline is of an earlier run, and so is its time.
        warmed_up: The first run of its kind: an untimed warm-up went before.
        notes: What else there is to know, a sentence each.
        code: A script that gives the candidate's picture.
    """

    candidate: Candidate
    baseline: Shot
    merged: Shot
    psnr: float | None
    ssim: float
    code: str
    steps: int
    removed: dict[int, float] = field(default_factory=dict)
    cached_steps: int = 0
    skipped_steps: int = 0
    merge_maps: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    remembered: bool = False
    warmed_up: bool = False
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """The baseline's time divided by the candidate's."""
        return self.baseline.seconds / self.merged.seconds
