"""Devices that lack a kernel: plain operations in its place give the same, tried by forcing them on a CPU."""

import pytest
import torch
from conftest import generate, make_pipeline
from hypothesis import given, settings
from test_plan import plans
from torch.nn.functional import embedding_bag

from tomesd_plus import apply_token_merging, tomesd
from tomesd_plus.matching import make_cells
from tomesd_plus.matching import plan as plan_module
from tomesd_plus.tomesd import bipartite_match, draw_destinations


@pytest.fixture
def without_kernels(monkeypatch):
    """Plain operations only: the kernel, if it is called nonetheless, raises as a device without it."""

    def missing(*args, **options):
        raise NotImplementedError("The operator 'aten::_embedding_bag' is not currently implemented for this device")

    monkeypatch.setattr(plan_module, "WITH_KERNEL", set())
    monkeypatch.setattr(tomesd, "WITH_KERNEL", set())
    monkeypatch.setattr(plan_module, "embedding_bag", missing)


@settings(deadline=None, max_examples=60)
@given(plans())
def test_the_twin_gives_the_kernels_means(case):
    plan, metric, _ = case
    with pytest.MonkeyPatch.context() as patch:
        kernel = {dtype: plan.merge(metric.to(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
        patch.setattr(plan_module, "WITH_KERNEL", set())
        for dtype, expected in kernel.items():
            merged = plan.merge(metric.to(dtype))
            assert merged.dtype == dtype
            torch.testing.assert_close(merged, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            alone = plan.sizes == 1
            assert torch.equal(merged[alone], expected[alone])


def test_sums_beyond_float16_do_not_overflow(without_kernels):
    plan = plan_module.MergePlan.from_inverse(torch.tensor([[0]]), torch.zeros(1, 4, dtype=torch.int64))
    rows = torch.full((1, 4, 1), 60000.0, dtype=torch.float16)
    assert plan.merge(rows).item() == 60000


def test_gradients_pass_through_the_twin(without_kernels):
    plan = plan_module.MergePlan.from_inverse(torch.tensor([[0, 3]]), torch.tensor([[0, 0, 0, 1]]))
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plan.merge, x)


def test_a_generation_without_kernels_gives_the_same_picture(without_kernels, monkeypatch):
    pipe = make_pipeline("sd")
    untouched = generate(pipe)
    report = apply_token_merging(pipe, ratio=0.5)
    twin = generate(pipe)
    assert report.steps[-1].removed
    monkeypatch.setattr(plan_module, "WITH_KERNEL", {"cpu"})
    monkeypatch.setattr(plan_module, "embedding_bag", embedding_bag)
    kernel = generate(pipe)
    assert (twin - kernel).abs().max() < 1e-4 < (twin - untouched).abs().max()


def test_the_drop_in_needs_no_kernels(without_kernels, monkeypatch):
    metric = torch.randn(2, 64, 8)
    plan = bipartite_match(metric, draw_destinations(8, 8, (2, 2), None, metric.device), 32)
    twin = plan.merge(metric)
    monkeypatch.setattr(tomesd, "WITH_KERNEL", {"cpu"})
    torch.testing.assert_close(twin, plan.merge(metric))


def test_only_pinned_memory_is_copied_without_waiting(monkeypatch):
    """A copy to MPS that is not waited for may read what has been freed: pytorch/pytorch issues 139550 and 189690."""
    seen = []
    move = torch.Tensor.to

    def to(tensor, *arguments, **options):
        seen.append((str(arguments[0]), options.get("non_blocking", False)))
        return move(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    make_cells(4, 4).to("meta")
    assert seen == [("meta", False)] * 2


def test_indices_and_means_need_no_double_precision(without_kernels, monkeypatch):
    """MPS has no float64: none is made while merging."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoDoubles(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            made = function(*arguments, **(options or {}))
            assert not (isinstance(made, torch.Tensor) and made.dtype == torch.float64), function
            return made

    pipe = make_pipeline("sd")
    unet = pipe.unet
    report = apply_token_merging(pipe, ratio=0.5, proportional_attention=True)
    pipe.scheduler.set_timesteps(4)
    with NoDoubles(), torch.no_grad():
        unet(torch.randn(2, 4, 16, 16), pipe.scheduler.timesteps[0], torch.randn(2, 7, 16))
    assert report.steps[-1].removed
