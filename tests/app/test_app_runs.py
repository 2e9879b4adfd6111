"""Runs of the app's backend: cancelled, followed, failed, and several at once; none leaves anything behind."""

import threading

import pytest
import torch
from app_tools import STEPS, picture, untouched
from conftest import make_pipeline

from gradio_app import words
from gradio_app.backend import Backend
from gradio_app.runs import Cancelled, follow
from gradio_app.settings import Candidate


@pytest.fixture
def backend(pipe):
    return Backend(pipe, "a/model")


@pytest.mark.parametrize("after", [0, 1, STEPS + 2])  # in the warm-up, without merging, with merging and a cache
def test_a_cancelled_run_leaves_the_pipeline_as_it_was(backend, after):
    fresh = Backend(make_pipeline("sd")).compare(picture(), Candidate())
    stop = threading.Event()
    told = []

    def on_progress(what, done, total):
        told.append(done)
        if done >= after:
            stop.set()

    with pytest.raises(Cancelled):
        backend.compare(picture(), Candidate(cache_interval=2), on_progress, stop)
    assert max(told) == after
    assert untouched(backend.pipe)
    result = backend.compare(picture(), Candidate())
    assert torch.equal(result.baseline.pixels, fresh.baseline.pixels)
    assert torch.equal(result.merged.pixels, fresh.merged.pixels)


def test_a_run_that_waits_for_its_turn_can_be_cancelled(backend):
    ended = threading.Event()

    def call(on_progress, stop):
        try:
            return backend.compare(picture(), Candidate(), on_progress, stop)
        except Cancelled:
            ended.set()

    with backend._lock:  # another user's run
        waiting = follow(call)
        assert next(waiting) is None  # while there is nothing to tell it can be closed all the same
        waiting.close()
        assert ended.wait(30)
    assert not backend.remembers(picture())
    assert backend.compare(picture(), Candidate()).removed


def test_closing_a_followed_run_stops_it(backend):
    ended = threading.Event()

    def call(on_progress, stop):
        try:
            return backend.compare(picture(steps=100), Candidate(), on_progress, stop)
        finally:
            ended.set()

    run = follow(call)
    assert next(run).total == 200
    run.close()
    assert ended.wait(30) and not backend.remembers(picture(steps=100)) and untouched(backend.pipe)


def test_a_followed_run_returns_and_raises_what_the_call_does():
    def collected(run):
        result = yield from run
        yield result

    events = [each for each in collected(follow(lambda on_progress, stop: on_progress("a", 1, 2) or "result")) if each]
    assert [(event.what, event.done, event.total) for event in events[:-1]] == [("a", 1, 2)] and events[-1] == "result"
    with pytest.raises(ZeroDivisionError):
        list(follow(lambda on_progress, stop: 1 / 0))


def test_a_failed_run_leaves_the_pipeline_as_it_was(backend, monkeypatch):
    fresh = Backend(make_pipeline("sd")).compare(picture(), Candidate())
    backend.compare(picture(seed=1), Candidate())

    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(backend.pipe.vae, "decode", fail)
        for seed in (0, 1):  # without merging, and with it
            with pytest.raises(RuntimeError) as raised:
                backend.compare(picture(seed=seed), Candidate(cache_interval=2))
    assert words.in_words(raised.value) == "Out of memory. Choose a smaller size."
    assert untouched(backend.pipe) and not backend.remembers(picture())
    result = backend.compare(picture(), Candidate())
    assert torch.equal(result.baseline.pixels, fresh.baseline.pixels)
    assert torch.equal(result.merged.pixels, fresh.merged.pixels)


def test_a_run_that_fails_while_sdxl_decodes_in_float32_leaves_it_in_half_precision(monkeypatch):
    pipe = make_pipeline("sdxl").to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    backend = Backend(pipe)

    def fail(*arguments, **options):
        assert pipe.vae.dtype == torch.float32
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe.vae, "decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        backend.compare(picture(), Candidate(ratio=0))
    assert pipe.vae.dtype == torch.float16


def test_users_at_once_get_their_own_pictures(backend):
    asked = [(picture(seed=seed), Candidate(ratio=ratio)) for seed, ratio in ((0, 0.25), (1, 0.75), (0, 0.5), (2, 0))]
    alone = [Backend(make_pipeline("sd")).compare(*each) for each in asked]
    together = [None] * len(asked)

    def ask(index):
        together[index] = backend.compare(*asked[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, shared in zip(alone, together, strict=True):
        assert shared.candidate == own.candidate and shared.removed == own.removed
        assert torch.equal(shared.baseline.pixels, own.baseline.pixels)
        assert torch.equal(shared.merged.pixels, own.merged.pixels)
