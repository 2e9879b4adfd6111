"""Take the README's pictures of the app: ``python -m gradio_app.screenshots docs``. Needs Playwright and Chromium."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from gradio_app.backend import Backend
from gradio_app.ui import build_demo, launch_options
from tomesd_plus.evaluation.generation.models import load_model

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "a large ladybug on a pink gradient background"
WAIT = 600_000  # ms
SHOWN = "[...document.querySelectorAll('#slider img, #grid img')].every(image => image.complete)"


def take_screenshots(folder: Path) -> None:
    """Write ``app-compare.png`` and ``app-explore.png``: each tab after a run on the embedded pipeline."""
    demo = build_demo(Backend(load_model()))
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.set_default_timeout(WAIT)
        for tab, status in (("Compare", "#status"), ("Explore", "#explore-status")):
            page.goto(f"{url}?__theme=light")
            page.locator("#prompt textarea").fill(PROMPT)
            if tab == "Compare":
                page.locator("#preset input").click()
                page.get_by_role("option", name="balanced").click()
            page.get_by_role("tab", name=tab).click()
            page.locator(f"button#{tab.lower()}").click()
            page.locator(f"{status} .done").wait_for()
            page.wait_for_function(SHOWN)
            page.screenshot(path=folder / f"app-{tab.lower()}.png")
        browser.close()
    demo.close()


if __name__ == "__main__":
    take_screenshots(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
