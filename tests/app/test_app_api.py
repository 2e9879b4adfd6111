"""The app's API, called by anybody: through gradio's client, against a running app."""

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import numpy as np
import pytest
from conftest import make_pipeline
from PIL import Image

pytest.importorskip("gradio_client")

from gradio_client import Client
from gradio_client.exceptions import AppError

from gradio_app.backend import Backend
from gradio_app.settings import Candidate, Picture
from tomesd_plus import load_tiny_pipeline
from tomesd_plus.evaluation.images import to_image

OPTIONS = {"prompt": "a large star on a blue background", "steps": 3, "schedule": "constant"}


@pytest.fixture(scope="module")
def client(app_url):
    client = Client(app_url, verbose=False)
    yield client
    client.close()


def compare(client, **options):
    """Both pictures as arrays, the figures, the code."""
    pictures, figures, code, *_ = client.predict(api_name="/compare", **(OPTIONS | options))
    assert all(path.endswith(".png") for path in pictures)  # lossless
    return *(np.asarray(Image.open(path)) for path in pictures), figures, code


def test_compare_gives_the_backends_pictures_figures_and_code(client):
    picture = Picture(OPTIONS["prompt"], "", 5, 3, 3.0, 64, 48)
    own = Backend(load_tiny_pipeline()).compare(picture, Candidate(ratio=0.7, schedule="constant"))
    baseline, merged, figures, code = compare(client, seed=5, height=48, ratio=0.7)
    assert (baseline == np.asarray(to_image(own.baseline.pixels))).all() and baseline.shape == (48, 64, 3)
    assert (merged == np.asarray(to_image(own.merged.pixels))).all() and (merged != baseline).any()
    assert figures["psnr"] == pytest.approx(own.psnr) and figures["ssim"] == pytest.approx(own.ssim)
    assert figures["removed"] == {"1": pytest.approx(0.7, abs=0.01)}
    assert code == own.code.strip()


def test_explore_gives_a_grid_with_figures(client):
    grid, figures, plot, *_ = client.predict(tried=["0.25", "fast"], api_name="/explore", **OPTIONS)
    assert [each["name"] for each in figures] == ["ratio 0.25", "fast"]
    assert len(grid) == 3 and grid[0]["caption"].startswith("without merging")
    assert plot.count("<circle") == 2


def test_users_at_once_get_their_own_pictures(client, app_url):
    ratios = (0.25, 0.75)
    clients = [Client(app_url, verbose=False) for _ in ratios]
    with ThreadPoolExecutor(len(ratios)) as pool:
        together = list(pool.map(lambda user, ratio: compare(user, seed=9, ratio=ratio), clients, ratios))
    for user in clients:
        user.close()
    for (_, merged, figures, _), ratio in zip(together, ratios, strict=True):
        assert figures["removed"]["1"] == pytest.approx(ratio, abs=0.01)
        assert (merged == compare(client, seed=9, ratio=ratio)[1]).all()


def test_a_random_seed_is_told(client):
    results = [client.predict(api_name="/compare", **OPTIONS, random_seed=True) for _ in range(2)]
    (first, second), (picture, other) = ([r[-1] for r in results], [np.asarray(Image.open(r[0][0])) for r in results])
    assert first != second and (picture != other).any()
    again, *_ = compare(client, seed=first)
    assert (again == picture).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a" * 501}, "at most 500"),
        ({"negative_prompt": "a" * 501}, "at most 500"),
        ({"steps": 1000}, "100"),
        ({"steps": 2.5}, "whole number"),
        ({"width": 4096}, "128"),
        ({"width": 60}, "multiple of 8"),
        ({"height": -8}, "32"),
        ({"seed": 2**40}, "4294967295"),
        ({"guidance_scale": 1e9}, "30"),
        ({"ratio": 0.9}, "0.75"),
        ({"schedule": "sine"}, "sine"),
        ({"preset": "best"}, "best"),
        ({"max_downsample": 16}, "16"),
        ({"cache_interval": 0}, "1"),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_words(client, options, told):
    with pytest.raises(AppError, match=told):
        client.predict(api_name="/compare", **(OPTIONS | options))


def test_nothing_to_explore_is_refused_in_words(client):
    with pytest.raises(AppError, match="Choose 1 to 9"):
        client.predict(tried=[], api_name="/explore", **OPTIONS)


def test_a_full_queue_is_told(monkeypatch):
    from gradio_app import ui

    monkeypatch.setattr(ui, "MAX_WAITING", 1)
    backend = Backend(make_pipeline("sd"))
    demo = ui.build_demo(backend)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **ui.launch_options())
    user = Client(url, verbose=False)
    try:
        with backend._lock:  # another user's run goes on all the while
            jobs = [user.submit(api_name="/compare", **OPTIONS, width=32, height=32)]
            next(iter(jobs[0]))  # it has left the queue, and waits for its turn
            jobs += [user.submit(api_name="/compare", **OPTIONS, width=32, height=32) for _ in range(3)]
            ended, _ = wait(jobs[1:], timeout=30, return_when=FIRST_COMPLETED)
            assert ended and all("full" in str(job.exception()) for job in ended)
    finally:
        user.close()
        demo.close()


def test_a_cancelled_job_gives_way_to_the_next(client, app_backend):
    before, merged, *_ = compare(client, seed=3)
    job = client.submit(api_name="/compare", **(OPTIONS | {"steps": 100, "seed": 3, "width": 128, "height": 128}))
    assert next(iter(job))  # what comes first says that it waits or runs
    job.cancel()
    after, merged_after, figures, _ = compare(client, seed=3)
    assert figures["remembered"]
    assert (after == before).all() and (merged_after == merged).all()
    assert not app_backend.remembers(Picture(OPTIONS["prompt"], "", 3, 100, 3.0, 128, 128))
