"""Pruna's own evaluation of what ours does, by the metrics that need no network."""

import pruna_tools  # noqa: F401
import pytest
from datasets import Dataset
from pruna import SmashConfig, smash
from pruna.data.pruna_datamodule import PrunaDataModule
from pruna.evaluation.evaluation_agent import EvaluationAgent
from pruna.evaluation.metrics.metric_elapsed_time import ThroughputMetric, TotalTimeMetric
from pruna.evaluation.metrics.metric_torch import TorchMetricWrapper
from pruna.evaluation.task import Task

from tomesd_plus import load_tiny_pipeline
from tomesd_plus.tiny import held_out_captions

ONCE = {"n_iterations": 1, "n_warmup_iterations": 0, "device": "cpu"}


def evaluated(agent, model):
    model.inference_handler.model_args |= {"num_inference_steps": 4, "guidance_scale": 3.0}
    return {result.name: result.result for result in agent.evaluate(model)}


def test_the_evaluation_agent():
    captions = Dataset.from_dict({"text": held_out_captions()[300:302]})
    data = PrunaDataModule.from_datasets((captions,) * 3, "prompt_collate", dataloader_args={"batch_size": 1})
    metrics = [
        TorchMetricWrapper("psnr"),
        TorchMetricWrapper("ssim"),
        TotalTimeMetric(**ONCE),
        ThroughputMetric(**ONCE),
    ]
    agent = EvaluationAgent(Task(metrics, data, device="cpu"))

    def model(*algorithms):
        pipe = load_tiny_pipeline()
        pipe.set_progress_bar_config(disable=True)
        return smash(pipe, SmashConfig(list(algorithms), device="cpu"))

    base = evaluated(agent, model())
    assert base["total_time"] > 0 and "psnr" not in base
    merged, again, cached = (evaluated(agent, model(*each)) for each in (["tome_sd"], [], ["tome_sd", "tome_cache"]))
    assert again["psnr"] == float("inf") or again["psnr"] > 100
    assert 25 < merged["psnr"] < 100 and merged["ssim"] == pytest.approx(1, abs=0.1)
    assert cached["psnr"] < merged["psnr"]
