"""Every scheduler that the host calls compatible, and some more."""

from functools import partial

import diffusers
from conftest import make_pipeline
from pipeline_tools import Row, cells, check, draw

MORE = (
    "LCMScheduler",
    "TCDScheduler",
    "SASolverScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
)
VARIANTS = {
    "DPMSolverMultistepScheduler, Karras": {"use_karras_sigmas": True},
    "DPMSolverMultistepScheduler, SDE": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverMultistepScheduler, trailing": {"timestep_spacing": "trailing"},
    "EulerDiscreteScheduler, exponential": {"use_exponential_sigmas": True},
    "EulerDiscreteScheduler, velocity": {"prediction_type": "v_prediction"},
    "DDIMScheduler, zero signal at the end": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
}


def with_scheduler(name):
    pipe = make_pipeline("sd")
    kind = getattr(diffusers, name.partition(",")[0])
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **VARIANTS.get(name, {}))
    return pipe


MISSING = "dummy"  # in the module of what stands in for a class whose library is not installed
KINDS = {kind.__name__: kind for kind in make_pipeline("sd").scheduler.compatibles}
NAMES = sorted({*KINDS, *VARIANTS, *MORE})
ROWS = [
    Row(
        name,
        partial(with_scheduler, name),
        partial(draw, num_inference_steps=4),
        fast=("merging",) if name in KINDS else (),
        host_cannot="its library torchsde is not installed"
        if name in KINDS and MISSING in KINDS[name].__module__
        else "",
    )
    for name in NAMES
]


@cells(ROWS)
def test_cell(row, way, record_property):
    check(row, way, record_property)
