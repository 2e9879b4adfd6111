"""See which layers merged, how much at which step, and which were left alone and why."""

from tomesd_plus import LinearSchedule, load_tiny_pipeline, token_merging

pipe = load_tiny_pipeline()
with token_merging(pipe, ratio={1: LinearSchedule(noisy=0.7, clean=0.3), 2: 0.25}) as report:
    pipe("a large star on a green background", num_inference_steps=10)
print(report)
for step in report.steps:
    print(f"step {step.index}, noise level {step.noise_level:.2f}: {step.removed}")
