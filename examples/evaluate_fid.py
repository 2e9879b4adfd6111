"""tomesd's protocol: FID of class-conditional photographs with and without merging, at equal steps and seeds.

    python examples/evaluate_fid.py MODEL CLASSES REFERENCE [FOLDER]

CLASSES is a text file with a class a line (ImageNet's 1,000), REFERENCE a folder of 5,000 validation images or
pytorch-fid's statistics of them. It resumes, and runs under torchrun. Without arguments: a first look at the embedded
pipeline, whose distance is not FID.
"""

import sys
from pathlib import Path

from tomesd_plus.evaluation.configurations import complete, parse_configuration
from tomesd_plus.evaluation.experiment import Experiment
from tomesd_plus.evaluation.generation import Sampling, Share, generate_experiment, load_model, load_prompts
from tomesd_plus.evaluation.generation.devices import local_device
from tomesd_plus.evaluation.generation.run import wait_for
from tomesd_plus.evaluation.items import make_items
from tomesd_plus.evaluation.reporting import write_report
from tomesd_plus.evaluation.scoring import Scoring, as_markdown, load_extractor, score

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # those of tomesd's table

if len(sys.argv) > 3:
    model, classes, reference, *rest = sys.argv[1:]
    out, features, device = Path(rest[0] if rest else "evaluate_fid"), "inception", local_device("cuda")
    names = [name for _, name in load_prompts(classes).entries]
    prompts, seeds = [f"A high quality photograph of a {name}." for name in names], range(2)  # 2,000 images
    sampling = Sampling(steps=50, guidance_scale=7.5, height=512, width=512)  # PLMS is SD 1.5's own scheduler
    configurations = [parse_configuration(f"{kind}: {ratio}") for ratio in RATIOS for kind in ("tomesd", "merge")]
else:
    model, reference, out, features, device = "tiny", "embedded", Path("evaluate_fid"), "tiny", "cpu"
    prompts, seeds = [f"a large {name} on a blue background" for name in ("dog", "star")], range(1)
    sampling = Sampling(steps=3, guidance_scale=3)
    configurations = [parse_configuration("tomesd: 0.5"), parse_configuration("merge: 0.5")]

share = Share.here()
extractor = load_extractor(features, device)  # first, so that missing weights are said before the work
items = make_items(((f"{index:06}", prompt) for index, prompt in enumerate(prompts)), seeds)
experiment, _ = generate_experiment(
    load_model(model, device, safety_checker=False), model, Experiment(out, tuple(items), "a class a prompt"),
    complete(configurations), sampling, share=share,
    timed_runs=1 if model == "tiny" else 5, equal_time=model != "tiny",
)  # fmt: skip
if share.index == 0:
    wait_for(lambda: not experiment.missing())  # the other processes' images
    results = score(out, Scoring([extractor], reference))
    write_report(results, out)
    print(as_markdown(results))
