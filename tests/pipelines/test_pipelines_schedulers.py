"""Every scheduler that the host calls compatible."""

from functools import partial

from conftest import make_pipeline
from diffusers import LCMScheduler
from pipeline_tools import Row, cells, check, draw


def with_scheduler(kind):
    pipe = make_pipeline("sd")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


KINDS = sorted({*make_pipeline("sd").scheduler.compatibles, LCMScheduler}, key=lambda kind: kind.__name__)
MISSING = "dummy"  # in the module of what stands in for a class whose library is not installed
ROWS = [
    Row(
        kind.__name__, partial(with_scheduler, kind),
        partial(draw, num_inference_steps=4), fast=("merging",),
        host_cannot="" if MISSING not in kind.__module__ else "its library torchsde is not installed",
    )
    for kind in KINDS
]


@cells(ROWS)
def test_cell(row, way, record_property):
    check(row, way, record_property)
