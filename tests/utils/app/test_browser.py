"""The page in a browser, as a visitor meets it: what is pressed shows, and nothing comes from other hosts."""

import json
import shutil
from urllib.parse import urlsplit

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.helpers.browser.chromium import PROGRAMS, Chromium, find_chromium
from utils.app.jobs import CANCELLED, WAITING
from utils.app.page import TABS
from utils.app.tabs.metrics import ALONE
from utils.app.tabs.watch import REFRESH_SECONDS
from utils.training.trackers import write_flags

TAB = "button[role=tab]"
SHOWN = "[...document.images].some(image => image.offsetParent && image.naturalWidth > 0)"
TEXTS_END_BEFORE_ARROWS = """[...document.querySelectorAll("input[role=combobox]")].every(input => {
    const end = input.getBoundingClientRect().right - parseFloat(getComputedStyle(input).paddingRight);
    return !input.offsetParent || end < input.parentElement.querySelector("svg").getBoundingClientRect().left;
})"""
CHOSEN = """[...document.querySelectorAll("input[role=combobox]")].some(
    input => input.offsetParent && input.getAttribute("aria-label").startsWith({!r}) && input.value == {!r})"""
STATUS = "[...document.querySelectorAll('textarea')].some(area => area.offsetParent && area.value.includes({!r}))"

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason=f"no Chromium: none of {', '.join(PROGRAMS)} is on the PATH"
)


@pytest.fixture
def browser(page, tmp_path):
    """A browser that shows the page; nothing of its console or of its requests may be amiss at the end."""
    browser = Chromium(find_chromium() or "", tmp_path)
    try:
        browser.call("Page.navigate", url=page.local_url)
        browser.wait_for(f"document.querySelectorAll('{TAB}').length >= {len(TABS)}")
        yield browser
        browser.wait(0.5)
        assert browser.errors() == []
        own = urlsplit(page.local_url).netloc
        elsewhere = [address for address in browser.addresses() if urlsplit(address).netloc not in ("", own)]
        assert browser.addresses() and not elsewhere
    finally:
        browser.close()


def test_draw_shows_images_and_every_tab_opens(browser):
    assert not browser.evaluate(SHOWN) and browser.evaluate(TEXTS_END_BEFORE_ARROWS)
    browser.press("Draw", "button.primary")
    browser.wait_for(SHOWN)
    browser.wait_for(STATUS.format("weights ema"))
    for tab in TABS:
        browser.press(tab, TAB)
        browser.wait_for(f"document.querySelector('{TAB}[aria-selected=true]').textContent.trim() == {tab!r}")


def test_metrics_follow_the_choice_and_say_what_is_refused(browser, runs):
    stages = {"first": "image_vae", "second": "image_vae", "other": "vocoder"}
    for name, stage in stages.items():
        (runs / "compared" / name).mkdir(parents=True)
        metrics = {"stage": stage, "step": 4, "scores": {"model": {"psnr_db": 20.0}}}
        (runs / "compared" / name / "metrics.json").write_text(json.dumps(metrics))
    try:
        # The page was started before there were these; `other` is the newest.
        browser.press("Metrics", TAB)
        browser.wait_for(CHOSEN.format("first", "compared/other"))
        browser.wait_for(CHOSEN.format("second", ALONE))
        browser.choose("compared/first", "first")
        browser.wait_for(CHOSEN.format("second", "compared/second"))
        browser.wait_for(STATUS.format("measured under the same conditions"))
        browser.choose("compared/other", "second")
        browser.wait_for(STATUS.format("choose two of one stage"))
        assert not browser.evaluate(STATUS.format("python evaluate.py"))
        browser.choose("nonsense", "first")
        browser.wait_for(STATUS.format("is neither a run with a checkpoint nor one"))
    finally:
        shutil.rmtree(runs / "compared")


def test_names_end_before_arrows_on_a_phone(browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.wait_for("innerWidth == 390")
    browser.wait(0.5)
    assert browser.evaluate(TEXTS_END_BEFORE_ARROWS)


def test_a_job_that_waits_says_so_and_is_stopped(browser, page):
    with page.jobs.lock:  # As a cancelled job has it that still loads its checkpoint.
        browser.press("Draw", "button.primary")
        browser.wait_for(STATUS.format(WAITING))
        browser.press("Stop")
        browser.wait_for(STATUS.format(CANCELLED))


def test_watch_follows_a_run_while_it_is_open(browser, runs):
    folder = runs / "vocoder" / "followed"
    with SummaryWriter(str(folder)) as writer:
        write_flags(writer, {"max_steps": 100})
        writer.add_scalar("train/loss", 0.5, 10)
        writer.add_image("images/mel", np.full((3, 8, 16), 200, np.uint8), 10)
        writer.flush()
        browser.press("Watch", TAB)
        browser.wait_for(CHOSEN.format("run", "vocoder/followed"))  # It is the newest, also for a page started before.
        browser.wait_for(STATUS.format("step 10/100 (10 %)"))
        browser.wait_for(SHOWN)
        browser.wait_for("[...document.querySelectorAll('svg, canvas')].some(plot => plot.clientHeight > 100)")
        writer.add_scalar("train/loss", 0.25, 20)
        writer.flush()
        browser.wait_for(STATUS.format("step 20/100 (20 %)"))
    browser.press("Draw", TAB)
    browser.wait(2)
    n_requests = len(browser.addresses())
    browser.wait(REFRESH_SECONDS + 1)
    assert len(browser.addresses()) == n_requests  # A tab that nobody sees asks for nothing.
