"""The training loop that all three models share: a time budget, EMA, resumable, one line of progress a minute."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .ahead import ahead

MOST_STEPS = 10**9


class Clock:
    """Training time and steps so far; saved and restored with the rest."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.step = 0
        self.elapsed = 0.0  # seconds

    @property
    def progress(self) -> float:
        """Share of the budget that is used, in [0, 1]."""
        return min(1.0, self.elapsed / (60 * self.minutes))

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.elapsed = int(state["step"]), state["elapsed"]


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Any, Clock], Tensor],
    folder: Path,
    minutes: float,
    learning_rate: float,
    save_every: float = 4.0,
    on_save: Callable[[nn.Module, Clock], None] | None = None,
    make: Callable[[int], Any] = lambda step: None,
    workers: int = 0,
) -> nn.Module:
    """Train for a number of minutes and return the model with its averaged weights.

    Args:
        model: The module to train.
        loss_of: ``(model, batch, clock) -> loss``.
        folder: Where checkpoints go. A run that finds one there goes on from it.
        minutes: Training time in all, earlier runs counted in.
        learning_rate: Peak of AdamW's rate; rises over the first 2 % of the time, then falls as a cosine to 1 %.
        save_every: Minutes between checkpoints.
        on_save: ``(averaged model, clock) -> None``, called at each checkpoint, for sample sheets.
        make: ``step -> batch``, a pure function, so that a resumed run sees the data that an unbroken one would see.
        workers: Processes that make batches ahead.
    """
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    clock = Clock(minutes)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    accelerator.register_for_checkpointing(clock, ema)
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():  # killed between two renames
        old.rename(folder)
    if folder.exists():
        accelerator.load_state(str(folder))
        ema.to(accelerator.device)
        accelerator.print(f"{folder.name}: going on from step {clock.step}, minute {clock.elapsed / 60:.1f}")

    def save() -> None:
        _replace(folder, lambda new: accelerator.save_state(str(new)))
        if on_save and accelerator.is_main_process:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            on_save(model, clock)
            ema.restore(model.parameters())

    batches = ahead(make, clock.step, MOST_STEPS, workers)
    average, printed, saved = None, clock.elapsed, clock.elapsed
    while clock.progress < 1:
        start = time.monotonic()
        rise = min(1.0, clock.progress / 0.02 + 0.01)
        fall = 0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * clock.progress)).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rise * fall
        with accelerator.autocast():  # also where a part of the model is called, and not the whole
            loss = loss_of(model, next(batches), clock)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        clock.step += 1
        clock.elapsed += time.monotonic() - start
        if clock.elapsed - printed > 60:
            printed = clock.elapsed
            accelerator.print(
                f"{folder.name}: minute {clock.elapsed / 60:.1f} of {minutes}, step {clock.step}, loss {average:.4f}",
                flush=True,
            )
        if clock.elapsed - saved > 60 * save_every:
            saved = clock.elapsed
            save()
    save()
    ema.copy_to(model.parameters())
    return accelerator.unwrap_model(model).eval()


def _replace(folder: Path, save: Callable[[Path], None]) -> None:
    """Save beside the old checkpoint, then put the new one in its place: a run killed here finds one of them."""
    new, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)
    save(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
