"""The app's page in a real browser: headless Chromium, driven by Playwright."""

import re

import pytest

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
from app_tools import LONG, ask, choose, expect, figure, pictures, set_number, wait

from gradio_app.screenshots import BROWSER
from tomesd_plus import PRESETS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium, or put one on the PATH"),
]
LAPTOP = {"width": 1366, "height": 768}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, app_url):
    """Opens pages, each of a user of its own; with no preset unless asked for, to set everything by hand."""
    contexts = []

    def open_page(theme="light", preset=None, **viewport):
        context = browser.new_context(viewport=LAPTOP | viewport)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LONG)
        page.goto(f"{app_url}?__theme={theme}")
        page.locator("#prompt textarea").wait_for()
        expect(page.locator("#preset input")).to_have_value("quality")
        if preset != "quality":
            choose(page, preset or "none: set it below")
            expect(page.locator("#ratio input[type=number]")).to_be_enabled(enabled=preset is None)
        if preset is None:  # the fields stand as the preset sets them: merging alone from here
            set_number(page, "ratio", 0.5)
            set_number(page, "cache", 1)
        return page

    yield open_page
    for context in contexts:
        context.close()


def test_type_generate_move_the_ratio(open_page):
    page = open_page()
    page.locator("#negative textarea, #negative input").first.fill("red")
    ask(page)
    wait(page)
    first = pictures(page)
    assert first[0] != first[1] and all(address.endswith(".png") for address in first)
    whole, shown = page.locator("#slider").bounding_box(), page.locator("#slider img").first.bounding_box()
    assert shown["height"] <= whole["height"] + 1  # the whole picture is seen
    assert re.fullmatch(r"[\d.]+×", figure(page, "Speed-up")) and re.fullmatch(r"[\d.]+ dB", figure(page, "PSNR"))
    psnr, removed, curve = figure(page, "PSNR"), figure(page, "Tokens removed"), page.locator("#curve").inner_html()
    set_number(page, "ratio", 0.75)
    expect(page.locator("#status .done")).to_contain_text("remembered")
    second = pictures(page)
    assert second[0] == first[0] and second[1] != first[1]
    assert float(figure(page, "PSNR").split()[0]) < float(psnr.split()[0])
    assert figure(page, "Tokens removed") != removed and figure(page, "Tokens removed").startswith("75%")
    assert page.locator("#curve").inner_html() != curve
    set_number(page, "ratio", 0)
    expect(page.locator("#figures")).to_contain_text("identical")
    assert len(set(pictures(page))) == 1
    page.locator("#prompt textarea").fill("a large star on a red background")
    set_number(page, "ratio", 0.5)
    expect(page.locator("#status")).to_contain_text("Press Compare")


def test_the_first_run_is_said_to_begin_with_a_warm_up(open_page):
    page = open_page(preset="quality")
    expect(page.locator("#status")).to_contain_text("warm-up")
    page.locator("#width input").fill("72")
    ask(page)
    wait(page)
    expect(page.locator("#status")).to_contain_text("an untimed warm-up went before")
    page.locator("button#cancel").click()  # nothing is under way
    expect(page.locator("#status")).to_contain_text("an untimed warm-up went before")


def test_difference_merge_map_and_code(open_page):
    page = open_page()
    ask(page, steps=4)
    wait(page)
    page.get_by_role("tab", name="Difference").click()
    expect(page.locator("#difference img")).to_be_visible()
    page.get_by_role("tab", name="Merge map").click()
    overlay = page.locator("#overlay img")
    expect(page.locator("#overlay-note")).to_contain_text("tokens are in a group")
    before = overlay.get_attribute("src")
    page.locator("#step input[type=number]").fill("1")
    expect(overlay).not_to_have_attribute("src", before)
    page.get_by_role("tab", name="Code").click()
    expect(page.locator("#code")).to_contain_text("a large star on a blue background")


def test_the_page_opens_with_the_best_preset(open_page):
    page = open_page(preset="quality")
    expect(page.locator("#ratio input[type=number]")).to_be_disabled()
    expect(page.locator("#curve")).to_contain_text(PRESETS["quality"].description)
    ask(page, steps=9)
    wait(page)
    expect(page.locator("#status")).to_contain_text("Of 9 steps 4 were cached, 0 skipped")
    page.get_by_role("tab", name="Code").click()
    expect(page.locator("#code")).to_contain_text('preset(pipe, "quality")')


def test_a_preset_takes_the_place_of_the_other_settings(open_page):
    page = open_page(preset="balanced")
    expect(page.locator("#ratio input[type=number]")).to_be_disabled()
    expect(page.locator("#cache input[type=number]")).to_have_value("3")
    expect(page.locator("#curve")).to_contain_text(PRESETS["balanced"].description)
    ask(page)
    wait(page)
    expect(page.locator("#status")).to_contain_text("Of 3 steps 1 were cached, 0 skipped")
    page.get_by_role("tab", name="Code").click()
    expect(page.locator("#code")).to_contain_text('preset(pipe, "balanced"')


def test_examples_are_there_to_be_clicked(open_page):
    page = open_page()
    page.locator("#examples, .gallery").get_by_text("ladybug", exact=True).first.click()
    expect(page.locator("#prompt textarea")).to_have_value(re.compile("ladybug"))


def test_explore_shows_a_grid_and_a_plot(open_page):
    page = open_page()
    page.locator("#steps input[type=number]").fill("3")  # of two, presets run both in full
    page.get_by_role("tab", name="Explore").click()
    page.locator("button#explore").click()
    wait(page, "#explore-status")
    expect(page.locator("#grid img")).to_have_count(7)
    expect(page.locator("#plot circle")).to_have_count(6)


@pytest.fixture
def long_run(app_backend):
    """Begins a run of 200 steps on a page; gives how many calls of the UNet there were since."""
    calls = []
    counting = app_backend.pipe.unet.register_forward_hook(lambda *_: calls.append(None))

    def begin(page, seed):
        for side in ("width", "height"):
            page.locator(f"#{side} input").fill("128")
        calls.clear()
        ask(page, steps=100, seed=seed)
        expect(page.locator("#status")).to_contain_text(re.compile(r"step [1-9]\d* of 200"))
        return lambda: len(calls)

    yield begin
    counting.remove()


def test_cancel_stops_the_run_and_the_next_one_works(open_page, long_run):
    page = open_page()
    calls = long_run(page, seed=77)
    page.locator("button#cancel").click()
    expect(page.locator("#status")).to_contain_text("Cancelled")
    while "Cancelled" in page.locator("#status").inner_text():  # until the run is closed, gradio overlooks a press
        ask(page, steps=2, seed=77)
        page.wait_for_timeout(500)
    wait(page)
    assert len(set(pictures(page))) == 2
    assert calls() < 200


@pytest.mark.parametrize("request_is", ["late", "lost"])
def test_a_cancelled_run_tells_nothing_more(open_page, long_run, request_is):
    """Whether gradio's own request to cancel takes long or does nothing, the run is stopped, and that stays."""
    page = open_page()
    if request_is == "late":
        page.route("**/cancel", lambda route: (page.wait_for_timeout(1500), route.continue_()))
    else:
        page.route("**/cancel", lambda route: route.fulfill(json={"success": True}))
    calls = long_run(page, seed=78)
    page.locator("button#cancel").click()
    expect(page.locator("#status")).to_contain_text("Cancelled")
    page.wait_for_timeout(2000)
    expect(page.locator("#status")).to_contain_text("Cancelled")
    assert calls() < 200


def test_exploring_can_be_cancelled(open_page):
    page = open_page()
    page.locator("#steps input[type=number]").fill("100")
    page.get_by_role("tab", name="Explore").click()
    page.locator("button#explore").click()
    expect(page.locator("#explore-status")).to_contain_text(re.compile(r"step [1-9]\d* of \d00"))
    page.locator("button#stop").click()
    expect(page.locator("#explore-status")).to_contain_text("Cancelled")
    expect(page.locator("#plot circle")).to_have_count(0)


def test_two_pages_at_once_keep_their_own_settings_and_pictures(open_page):
    pages = {ratio: open_page() for ratio in (0.25, 0.75)}
    for ratio, page in pages.items():
        set_number(page, "ratio", ratio)
        page.locator("#schedule input").click()
        page.get_by_role("option", name="constant").click()
    for page in pages.values():
        ask(page, seed=5)
    for ratio, page in pages.items():
        wait(page)
        assert figure(page, "Tokens removed").startswith(f"{ratio:.0%}")
        assert page.locator("#ratio input[type=number]").input_value() == str(ratio)
    few, many = (pictures(page) for page in pages.values())
    assert few[0].split("/")[-2] == many[0].split("/")[-2] and few[1].split("/")[-2] != many[1].split("/")[-2]


def test_an_error_is_told_in_words(open_page):
    page = open_page()
    ask(page, prompt=" ")
    expect(page.get_by_text("The prompt is empty").first).to_be_visible()
    page.locator("#width input").fill("60")
    ask(page)
    expect(page.locator("#status .failed")).to_contain_text("multiple of 8")
    page.locator("#width input").fill("64")
    ask(page)
    wait(page)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [LAPTOP, {"width": 1440, "height": 900}], ids=["1366", "1440"])
def test_one_screen_without_scrolling(open_page, theme, viewport):
    page = open_page(theme, **viewport)
    for tab in ("Compare", "Explore"):
        page.get_by_role("tab", name=tab).click()
        needed = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert needed == [viewport["width"], viewport["height"]]
    colour = page.locator(".top b").evaluate("title => getComputedStyle(title).color")
    assert (int(re.search(r"\d+", colour)[0]) > 150) == (theme == "dark")


def test_one_screen_without_scrolling_with_results(open_page):
    page = open_page()
    ask(page)
    wait(page)
    for tab in ("Both pictures", "Difference", "Merge map", "Code"):
        page.get_by_role("tab", name=tab).click()
        needed = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert needed == [LAPTOP["width"], LAPTOP["height"]], tab


def test_the_page_asks_no_other_server(browser, app_url):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(app_url)
    page.locator("#prompt textarea").wait_for()
    page.close()
    assert asked and all(address.startswith((app_url, "data:", "blob:")) for address in asked)


def test_a_page_that_is_left_stops_its_run(open_page, long_run):
    left = open_page()
    calls = long_run(left, seed=79)
    left.close()
    page = open_page()
    ask(page, steps=2, seed=78)
    wait(page)
    assert calls() < 200


TOO_WIDE = """() => [...document.querySelectorAll('body *')]
    .filter(each => !each.closest('.cm-scroller') && each.getBoundingClientRect().width > innerWidth + 1)
    .map(each => `${each.tagName}#${each.id}.${each.className}`)"""
CONTROLS = {
    "Compare": ["prompt", "negative", "seed", "steps", "guidance", "width", "height", "preset", "ratio", "schedule",
                "more-at", "merged", "levels", "cache", "compare", "cancel", "slider", "figures", "status"],
    "Explore": ["prompt", "tried", "explore", "stop", "plot", "grid", "explore-status"],
}  # fmt: skip


def open_tab(page, name):
    """Click a tab, or its place behind the dots: which of the two is known once the page has been laid out."""
    for attempt in range(10):
        try:
            tab = page.get_by_role("tab", name=name)
            if tab.count() and tab.first.is_visible():
                tab.first.click(timeout=3000)
            else:
                page.locator(".overflow-menu > button:visible").last.click(timeout=3000)
                page.locator(".overflow-dropdown button", has_text=name).click(timeout=3000)
            return
        except sync_api.Error:  # it has moved meanwhile
            if attempt == 9:
                raise


def test_a_phones_width(open_page):
    """One column: nothing is wider than the screen, nothing is to be scrolled sideways, and all can be touched."""
    page = open_page(width=390, height=844)
    for tab, status in (("Compare", "#status"), ("Explore", "#explore-status")):
        page.get_by_role("tab", name=tab).click()
        for run in (False, True):
            if run:
                page.locator("#steps input[type=number]").fill("3")
                page.locator(f"button#{tab.lower()}").click()
                wait(page, status)
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            assert page.evaluate(TOO_WIDE) == []
        for name in CONTROLS[tab]:
            box = page.locator(f"#{name}").first.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 391 and box["width"] >= 80, (name, box)
            if name in ("prompt", "negative", "steps", "guidance", "preset", "ratio", "tried", "slider", "grid"):
                assert box["width"] > 300, (name, box)  # no narrow column beside an empty one
        for button in page.locator("button.lg:visible, button.primary:visible").all():
            assert button.bounding_box()["height"] >= 36
        for field in page.locator("input[type=number]:visible, textarea:visible").all():
            assert field.evaluate("each => parseFloat(getComputedStyle(each).fontSize)") >= 16  # else phones zoom in
    for picture in page.locator("#grid .thumbnail-item img").all():
        box = picture.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 391
    page.get_by_role("tab", name="Compare").click()
    for name, shown in (("Merge map", "#overlay"), ("Code", "#code"), ("Difference", "#difference")):
        open_tab(page, name)
        page.locator(shown).wait_for()
        assert page.evaluate(TOO_WIDE) == [] and page.evaluate("document.documentElement.scrollWidth") == 390
