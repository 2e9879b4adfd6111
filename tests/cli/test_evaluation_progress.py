"""What a job's log gets to read."""

import pytest

from tomesd_plus.cli import progress
from tomesd_plus.evaluation.generation import Share


def test_a_log_gets_lines_now_and_then_and_at_the_end(capsys, monkeypatch):
    seconds = iter([0, 1, 2, 41, 42, 100])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with progress.shown_progress(Share()) as on_progress:
        for _ in range(5):
            on_progress("images", 1, 5)
    assert capsys.readouterr().err.splitlines() == [
        "tomesd-plus: images: 3 of 5, 0.075/s, 27 s left",
        "tomesd-plus: images: 5 of 5, 0.0505/s, 0 s left",
    ]


@pytest.mark.parametrize(("share", "shows"), [(Share(0, 2, 2), True), (Share(1, 2, 2), False), (Share(1, 2, 1), True)])
def test_one_process_of_a_launch_shows_it(share, shows):
    with progress.shown_progress(share) as on_progress:
        assert (on_progress is not None) is shows
