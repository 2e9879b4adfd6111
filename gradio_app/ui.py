"""The page: its fields, where they stand, and what happens when one is used."""

import os
from collections.abc import Callable, Generator, Mapping
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: the app uses no network

import gradio as gr

from gradio_app import drawings, words
from gradio_app.backend import Backend
from gradio_app.handlers import CUSTOM, Handlers, Shown, level_choices
from gradio_app.settings import MAX_GUIDANCE, MAX_INTERVAL, MAX_PROMPT, MAX_RATIO, MAX_SEED, MAX_STEPS, MERGED
from tomesd_plus import CosineSchedule
from tomesd_plus.evaluation.generation.models import usual_guidance
from tomesd_plus.evaluation.names import TINY
from tomesd_plus.presets import PRESETS
from tomesd_plus.schedules import AUTO, SCHEDULES

CSS = Path(__file__).parent / "style.css"
FONT = ["system-ui", "sans-serif"]  # no web fonts: the app uses no network
PICTURE_HEIGHT = "max(280px, calc(100vh - 372px))"  # what the other fields leave of one screen
MAP_HEIGHT = "max(170px, calc(100vh - 484px))"
GRID_HEIGHT = "max(380px, calc(100vh - 220px))"
MAX_WAITING = 32  # runs in the queue; further ones are refused
KEPT_SECONDS = 3600  # a page's last result, on the server
MAX_PAGES = 256  # whose last results are kept
OPENING = "quality"  # of the presets by name the furthest above fewer steps, and never below (results/presets.csv)
RATIOS = ("0.1", "0.25", "0.4", "0.5", "0.6", "0.75")
RUN: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipeline", "show_progress": "hidden"}
LIVE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build_demo(backend: Backend) -> gr.Blocks:
    """The page of a backend. Launch it with :func:`launch_options`."""
    handlers = Handlers(backend)
    tiny = backend.model == TINY
    with gr.Blocks(title="Token merging, compared", analytics_enabled=False, fill_width=True,
                   delete_cache=(600, 3600)) as demo:  # fmt: skip
        gr.HTML(
            f'<div class="top"><b>Token merging, compared</b> <span>The same seed with and without '
            f"<i>tomesd_plus</i>. Model: {escape(backend.model)}, {escape(backend.device)}</span></div>"
        )
        with gr.Row(equal_height=False, elem_classes="small-pictures" if tiny else None):
            with gr.Column(scale=0, min_width=270):
                picture = _picture_fields(backend, tiny)
            with gr.Column(scale=1, min_width=600), gr.Tabs():
                with gr.Tab("Compare", id="compare"), gr.Row(equal_height=False):
                    with gr.Column(scale=0, min_width=290):
                        with gr.Row():
                            compare = gr.Button("Compare", variant="primary", elem_id="compare", min_width=80)
                            cancel = gr.Button("Cancel", variant="secondary", elem_id="cancel", min_width=80)
                        candidate, curve = _candidate_fields(backend)
                    with gr.Column(scale=1, min_width=320):
                        results = _results(backend)
                with gr.Tab("Explore", id="explore"), gr.Row(equal_height=False):
                    with gr.Column(scale=0, min_width=290):
                        tried = gr.CheckboxGroup(
                            [*((f"ratio {ratio}", ratio) for ratio in RATIOS), *zip(backend.presets, backend.presets)],
                            value=["0.25", "0.5", "0.75", *PRESETS], label="What to try", elem_id="tried",
                            info="Ratios with the other settings of Compare; presets as they are.",
                        )  # fmt: skip
                        with gr.Row():
                            explore = gr.Button("Explore", variant="primary", elem_id="explore", min_width=80)
                            stop = gr.Button("Cancel", variant="secondary", elem_id="stop", min_width=80)
                        plot = gr.HTML(drawings.scatter([]), elem_id="plot")
                    with gr.Column(scale=1, min_width=320):
                        grid = gr.Gallery(label="Same prompt, same seed", format="png", columns=4, height=GRID_HEIGHT,
                                          object_fit="contain", interactive=False, elem_id="grid")  # fmt: skip
                        explore_status = gr.HTML(words.status(words.EXPLORE_WELCOME), elem_id="explore-status")
                        numbers = gr.JSON(visible=False)

        fields = [*picture.values(), *candidate.values()]
        compared = results | {"seed": picture["seed"]}
        explored = {"grid": grid, "numbers": numbers, "plot": plot, "status": explore_status, "seed": picture["seed"]}
        preset, *others = candidate.values()
        runs = [
            gr.on([compare.click, picture["prompt"].submit], _by_name(handlers.compare, compared), fields,
                  list(compared.values()), api_name="compare", **RUN),
            gr.on([candidate["ratio"].release, candidate["cache_interval"].release],
                  _by_name(handlers.compare_again, compared), fields, list(compared.values()),
                  api_visibility="private", trigger_mode="always_last", **RUN),
        ]  # fmt: skip
        exploring = explore.click(
            _by_name(handlers.explore, explored),
            [
                tried,
                *picture.values(),
                *(field for name, field in candidate.items() if name not in ("preset", "ratio")),
            ],
            list(explored.values()),
            api_name="explore",
            **RUN,
        )
        status = results["status"]
        cancel.click(handlers.cancel, cancels=runs, **LIVE)
        stop.click(handlers.cancel, cancels=[exploring], **LIVE)
        for run, line in [*((run, status) for run in runs), (exploring, explore_status)]:
            run.then(None, line, line, js=words.ENDED, **LIVE)  # once a cancelled run tells nothing more
        gr.on([field.change for field in candidate.values()], handlers.curve, list(candidate.values()), curve,
              trigger_mode="always_last", **LIVE)  # fmt: skip
        preset.input(handlers.preset, preset, others, **LIVE)
        # for a page only: callers of the API set what they name, and the others stay as they are declared
        demo.load(lambda: [OPENING, *handlers.preset(OPENING)], None, [preset, *others], **LIVE)
        gr.on([results["step"].input, results["level"].input], handlers.overlay,
              [results[name] for name in ("view", "step", "level")], [results["overlay"], results["overlay_note"]],
              trigger_mode="always_last", **LIVE)  # fmt: skip
    demo.queue(max_size=MAX_WAITING)
    return demo


def launch_options() -> dict[str, Any]:
    """What ``build_demo(…).launch`` is to be given for the looks of the page."""
    theme = gr.themes.Default(
        primary_hue="teal", neutral_hue="slate", spacing_size="sm", radius_size="md", text_size="sm",
        font=FONT, font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    return {
        "theme": theme,
        "css_paths": CSS,
        "footer_links": ["api"],
        "ssr_mode": False,
        "state_session_capacity": MAX_PAGES,
    }


def _by_name(
    handler: Callable[..., Generator[Shown, None, None]], components: Mapping[str, Any]
) -> Callable[..., Generator[dict[Any, Any], None, None]]:
    """A handler as gradio takes it, with components for their names; its signature is that of the API."""

    @wraps(handler)
    def by_component(*values: Any) -> Generator[dict[Any, Any], None, None]:
        for shown in handler(*values):
            yield {components[name]: value for name, value in shown.items()}

    return by_component


def _picture_fields(backend: Backend, tiny: bool) -> dict[str, Any]:
    """What both pictures have in common, in the order of :func:`gradio_app.handlers.picture_from`."""
    limits = backend.limits
    examples = words.EXAMPLES[tiny]
    prompts = list(examples.values())
    prompt = gr.Textbox(prompts[0], label="Prompt: what the picture shows", lines=2, max_lines=2,
                        max_length=MAX_PROMPT, elem_id="prompt")  # fmt: skip
    gr.Examples(
        [[text] for text in prompts],
        [prompt],
        label="Examples to click",
        example_labels=list(examples),
        elem_id="examples",
    )
    negative = gr.Textbox("", label="Negative prompt: what it avoids", lines=1, max_lines=1,
                          max_length=MAX_PROMPT, elem_id="negative")  # fmt: skip
    with gr.Row():
        seed = gr.Number(0, label="Seed", minimum=0, maximum=MAX_SEED, precision=0, min_width=80, elem_id="seed")
        chance = gr.Checkbox(False, label="Random", min_width=80, container=False, elem_id="random")
    steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="Steps (more: slower)", buttons=[], elem_id="steps")
    guidance = gr.Slider(0, MAX_GUIDANCE, usual_guidance(backend.model), step=0.5, elem_id="guidance",
                         label="Guidance by the prompt", buttons=[])  # fmt: skip
    sides = []
    with gr.Row():
        for name in ("Width", "Height"):
            sides.append(
                gr.Number(limits.side, label=name, minimum=limits.smallest, maximum=limits.largest,
                          step=limits.multiple, precision=0, min_width=80, elem_id=name.lower())
            )  # fmt: skip
    names = ("prompt", "negative_prompt", "seed", "random_seed", "steps", "guidance_scale", "width", "height")
    return dict(zip(names, (prompt, negative, seed, chance, steps, guidance, *sides), strict=True))


def _candidate_fields(backend: Backend) -> tuple[dict[str, Any], gr.HTML]:
    """What is compared, in the order of :func:`gradio_app.handlers.candidate_from`, and the curve."""
    finest = backend.limits.levels[0]
    presets = [("none: set it below", CUSTOM)] + [(name, name) for name in backend.presets]
    preset = gr.Dropdown(presets, value=CUSTOM, label="Preset", elem_id="preset")
    ratio = gr.Slider(0, MAX_RATIO, 0.5, step=0.05, label="Ratio: tokens merged", buttons=[],
                      elem_id="ratio")  # fmt: skip
    with gr.Row():
        schedule = gr.Dropdown([*SCHEDULES, AUTO], value="cosine", label="Schedule", min_width=80, elem_id="schedule")
        more_at = gr.Dropdown([("early steps", "noisy"), ("late steps", "clean")], value="noisy",
                              label="More merging at", min_width=80, elem_id="more-at")  # fmt: skip
    curve = gr.HTML(drawings.curve(CosineSchedule()), elem_id="curve")
    names = [("full" if level == 1 else f"down to 1/{level}", level) for level in backend.limits.levels]
    with gr.Row():
        merged = gr.Dropdown(list(MERGED), value=next(iter(MERGED)), label="What is merged", min_width=80, scale=3,
                             elem_id="merged")  # fmt: skip
        level = gr.Dropdown(names, value=finest, label="Resolutions", min_width=80, scale=2, elem_id="levels")
    cache = gr.Slider(1, MAX_INTERVAL, 1, step=1, label="Full step every (1: no cache)", buttons=[],
                      elem_id="cache")  # fmt: skip
    return {
        "preset": preset,
        "ratio": ratio,
        "schedule": schedule,
        "more_at": more_at,
        "merged": merged,
        "max_downsample": level,
        "cache_interval": cache,
    }, curve


def _results(backend: Backend) -> dict[str, Any]:
    """What a comparison gives; callers of the API get the first ones first."""
    finest = backend.limits.levels[0]
    with gr.Tabs():
        with gr.Tab("Both pictures", id="both"):
            slider = gr.ImageSlider(label="Left: without merging. Right: with it", format="png", interactive=False,
                                    height=PICTURE_HEIGHT, max_height=2000, elem_id="slider")  # fmt: skip
        with gr.Tab("Difference", id="difference"):
            difference = gr.Image(label="Difference, 4 times as strong", format="png", interactive=False,
                                  height=PICTURE_HEIGHT, elem_id="difference")  # fmt: skip
        with gr.Tab("Merge map", id="map"):
            with gr.Row():
                step = gr.Slider(1, 25, 1, step=1, label="Step", buttons=[], elem_id="step")
                level = gr.Radio(
                    level_choices([finest]), value=finest, label="Level (1: full resolution)", elem_id="level"
                )
            overlay = gr.Image(label="Merged tokens: yellow pairs, red large groups", format="png", interactive=False,
                               height=MAP_HEIGHT, elem_id="overlay")  # fmt: skip
            overlay_note = gr.HTML("", elem_id="overlay-note")
        with gr.Tab("Code", id="code"):
            code = gr.Code("# Compare first: the code of that picture will stand here.", language="python",
                           label="Gives the very same picture", interactive=False, lines=18, max_lines=18,
                           elem_id="code")  # fmt: skip
    figures = gr.HTML(words.empty_figures(), elem_id="figures")
    status = gr.HTML(words.status(words.WELCOME), elem_id="status")
    return {
        "pictures": slider,
        "numbers": gr.JSON(visible=False),
        "code": code,
        "difference": difference,
        "overlay": overlay,
        "overlay_note": overlay_note,
        "step": step,
        "level": level,
        "figures": figures,
        "view": gr.State(None, time_to_live=KEPT_SECONDS),
        "status": status,
    }
