"""Reading transformers' calls: grids, steps, and how rarely a GPU's timestep is waited for."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from transformer_tools import make_transformer

from tomesd_plus.host import transformers
from tomesd_plus.host.transformers import TransformerReader, blocks_of, grid_of, transformer_of


def ids(rows, columns, first=(0.0, 0.0, 0.0)):
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1) + torch.tensor(first)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(0.0, 0.0, 0.0), (1.0, 3.0, 5.0)]))
def test_a_grid_is_read_off_its_ids(rows, columns, first):
    assert grid_of(ids(rows, columns, first)) == (rows, columns)
    assert grid_of(ids(rows, columns, first)[None].bfloat16()) == (rows, columns)


@pytest.mark.parametrize(
    "other",
    [
        torch.cat([ids(4, 4), ids(4, 4, (1.0, 0.0, 0.0))]),  # a picture and its reference
        ids(4, 4)[torch.randperm(16, generator=torch.Generator().manual_seed(0))],
        ids(4, 4)[:-1],
        ids(4, 4) * 0.5,
        ids(4, 4)[:, :2],
        torch.zeros(0, 3),
        torch.zeros(16, 3),
    ],
)
def test_other_ids_are_no_grid(other):
    assert grid_of(other) is None


class Pipe:
    """As much of a pipeline as the reader asks."""

    def __init__(self, steps=6):
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(steps)
        self.transformer = make_transformer("flux")

    def step(self, t):
        self.scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))


def read(reader, model, t, dtype=torch.float32, batch=1):
    arguments = {
        "hidden_states": torch.zeros(batch, 16, 16), "encoder_hidden_states": torch.zeros(batch, 7, 32),
        "img_ids": ids(4, 4), "timestep": t.expand(batch).to(dtype) / 1000,
    }  # fmt: skip
    return reader(model, (), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("calls", [1, 2])
def test_flux_is_given_the_schedulers_own_timestep_and_a_gpu_is_asked_once_a_generation(monkeypatch, dtype, calls):
    pipe, asked = Pipe(), []
    number = transformers._number
    monkeypatch.setattr(transformers, "_on_host", lambda timestep: False)
    monkeypatch.setattr(transformers, "_number", lambda timestep: asked.append(1) or number(timestep))
    reader = TransformerReader(pipe)
    for generation in range(2):
        pipe.scheduler.set_timesteps(6)
        for index, t in enumerate(pipe.scheduler.timesteps):
            for _ in range(calls):  # with true guidance there are two
                reading = read(reader, pipe.transformer, t, dtype, batch=2)
                assert reading.timestep.storage_offset() == index and reading.text_tokens == 7
                assert reading.sample.shape == (2, 1, 4, 4)
            pipe.step(t)
        assert len(asked) == (generation + 1) * calls


@pytest.mark.parametrize("on_host", [True, False])
def test_a_scheduler_that_does_not_run_is_not_believed(monkeypatch, on_host):
    pipe = Pipe()
    monkeypatch.setattr(transformers, "_on_host", lambda timestep: on_host)
    reader = TransformerReader(pipe)
    for value in (1000.0, 700.0, 400.0, 100.0):
        assert float(read(reader, pipe.transformer, torch.tensor(value)).timestep) == pytest.approx(value)
    pipe.step(pipe.scheduler.timesteps[0])  # and then stands still
    found = [float(read(reader, pipe.transformer, torch.tensor(v)).timestep) for v in (300.0, 200.0, 150.0)]
    assert found == pytest.approx([300.0, 200.0, 150.0])


def test_another_threads_pipeline_may_have_another_scheduler(monkeypatch):
    pipe = Pipe()
    monkeypatch.setattr(transformers, "_on_host", lambda timestep: False)
    reader, found = TransformerReader(pipe), []
    read(reader, pipe.transformer, pipe.scheduler.timesteps[0])
    pipe.step(pipe.scheduler.timesteps[0])

    def other():
        found.append(float(read(reader, pipe.transformer, torch.tensor(123.0)).timestep))

    read(reader, pipe.transformer, pipe.scheduler.timesteps[1])
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == pytest.approx([123.0])
    assert read(reader, pipe.transformer, pipe.scheduler.timesteps[1]).timestep.storage_offset() == 1


@pytest.mark.parametrize("on_host", [True, False])
def test_both_calls_of_a_step_are_at_one_timestep_though_another_threads_scheduler_goes_on(monkeypatch, on_host):
    pipe, latents, text = Pipe(), torch.zeros(1, 16, 16), torch.zeros(1, 7, 32)
    monkeypatch.setattr(transformers, "_on_host", lambda timestep: on_host)
    reader, other = TransformerReader(pipe), FlowMatchEulerDiscreteScheduler()
    monkeypatch.setattr(TransformerReader, "_first_thread", lambda reader: on_host)
    other.set_timesteps(9)

    def step(t, meanwhile):
        found = []
        for between in (lambda: None, meanwhile):
            between()
            given = {"hidden_states": latents, "encoder_hidden_states": text, "img_ids": ids(4, 4)}
            found.append(reader(pipe.transformer, (), given | {"timestep": t.expand(1) / 1000}).timestep)
        assert torch.is_tensor(found[0]) == torch.is_tensor(found[1]) and float(found[0]) == float(found[1])
        assert float(found[0]) == pytest.approx(float(t))

    step(other.timesteps[0], lambda: [pipe.step(t) for t in pipe.scheduler.timesteps[:2]])
    step(other.timesteps[1], lambda: pipe.scheduler.set_timesteps(6))
    pipe.step(pipe.scheduler.timesteps[0])
    step(other.timesteps[0], lambda: pipe.scheduler.set_timesteps(6))


def test_copies_and_models_alone_read_values():
    pipe = Pipe()
    for reader in (
        copy.deepcopy(TransformerReader(pipe)),
        TransformerReader(pipe.transformer),
        TransformerReader(SimpleNamespace()),
    ):
        assert read(reader, pipe.transformer, torch.tensor(250.0)).timestep == 250.0


def test_models_are_told_apart():
    class Own(SD3Transformer2DModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Renamed(SD3Transformer2DModel):
        pass

    model = make_transformer("sd3")
    assert transformer_of(model) is model and transformer_of(torch.compile(model)) is model
    assert transformer_of(AutoencoderKL()) is None and transformer_of(None) is None
    model.__class__ = Renamed
    assert transformer_of(model) is model
    model.__class__ = Own
    with pytest.raises(TypeError, match="not in a Own"):
        transformer_of(SimpleNamespace(transformer=model))
    assert list(blocks_of(make_transformer("flux"))) == [
        "transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1",
    ]  # fmt: skip
