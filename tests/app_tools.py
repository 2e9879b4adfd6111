"""What the tests of the app share: of its backend, and of its page in a browser."""

from importlib import import_module

from conftest import hooks

from gradio_app.settings import Picture
from tomesd_plus import ToMeProcessor

STEPS = 3


def picture(**options):
    fields = {"prompt": "a cat", "negative_prompt": "", "seed": 0, "steps": STEPS, "guidance_scale": 3.0}
    return Picture(**(fields | {"width": 32, "height": 32} | options))


def untouched(pipe):
    return not hooks(pipe) and not any(isinstance(p, ToMeProcessor) for p in pipe.unet.attn_processors.values())


# The page in a browser ----------------------------------------------------------------------------------------------

LONG = 120_000  # ms: a busy machine takes long for anything


def expect(locator):
    """Playwright's, imported when it is first used: the backend's tests do without."""
    expect_ = import_module("playwright.sync_api").expect
    expect_.set_options(timeout=LONG)
    return expect_(locator)


def ask(page, prompt="a large star on a blue background", steps=3, seed=0):
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#steps input[type=number]").fill(str(steps))
    page.locator("#seed input").fill(str(seed))
    page.locator("button#compare").click()


def wait(page, status="#status"):
    expect(page.locator(f"{status} .running")).to_have_count(0)
    expect(page.locator(f"{status} .done")).to_be_visible(timeout=LONG)


def figure(page, name):
    return page.locator("#figures .card", has_text=name).locator("b").inner_text()


def pictures(page):
    """Addresses of the two pictures, which are names of their contents."""
    images = page.locator("#slider img")
    expect(images).to_have_count(2)
    return [image.get_attribute("src") for image in images.all()]


def choose(page, preset):
    page.locator("#preset input").click()
    page.get_by_role("option", name=preset).click()


def set_number(page, name, value):
    """As a person does: with the keyboard in the number beside the slider."""
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.blur()
