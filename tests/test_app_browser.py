"""The app in a real browser: `make app-test`. Needs the extra `app`, playwright and Debian's chromium.

Screenshots of the tour, at 1280 and 390 pixels, are written to build/app.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if not os.environ.get("EASYEDIT_MDM_BROWSER"):
    pytest.skip("the browser's tour: make app-test", allow_module_level=True)

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
from playwright.sync_api import Page, expect, sync_playwright

from easyedit_mdm.app.blocks import launch

SHOTS = Path(__file__).parent.parent / "build" / "app"
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
expect.set_options(timeout=300_000)  # an edit on a busy core


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    page = launch(block=False)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )


def opened(browser: Any, address: str, size: tuple[int, int], elsewhere: list[str]) -> Page:
    """A tab of its own, with the twin loaded; what it asks of other addresses goes on the list."""
    tab = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, accept_downloads=True
    ).new_page()
    tab.on(
        "request",
        lambda r: None if r.url.startswith((address, "data:", "blob:")) else elsewhere.append(r.url),
    )
    tab.goto(address)
    expect(tab.locator("#message")).to_contain_text("twin-llada is loaded")
    return tab


def shot(tab: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.wait_for_timeout(2500)  # the canvas fills
    tab.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def typed(tab: Page, prompt: str, subject: str, target: str) -> None:
    for name, text in (("prompt", prompt), ("subject", subject), ("target", target)):
        tab.locator(f"#{name} textarea, #{name} input").first.fill(text)
    tab.locator("#edit").click()


@pytest.mark.parametrize("size", list(SIZES))
def test_the_tour(browser, address, size, tmp_path):
    """Pick a fact, watch, keep, download, undo; a wrong input; nothing is asked of another address, and
    nothing is wider than the window.
    """
    elsewhere: list[str] = []
    tab = opened(browser, address, SIZES[size], elsewhere)
    shot(tab, f"{size}-1-start")
    tab.locator("#pick input").click()
    tab.get_by_role("option").nth(1).click()
    expect(tab.locator("#prompt textarea, #prompt input").first).not_to_have_value("")
    tab.locator("#edit").click()
    expect(tab.locator("#message")).to_contain_text("Done")
    expect(tab.locator("#canvas section")).to_have_count(3)
    shot(tab, f"{size}-2-edited")
    tab.locator("#keep-own").click()
    expect(tab.locator("#message")).to_contain_text("carries 1 edit")
    expect(tab.locator("#stack li")).to_have_count(1)
    tab.locator("#make").click()
    expect(tab.locator("#message")).to_contain_text("edit.zip is ready")
    with tab.expect_download() as started:
        tab.locator("#result a").first.click()
    assert started.value.suggested_filename == "edit.zip"
    tab.get_by_text("Dials").click()
    shot(tab, f"{size}-3-kept")
    tab.locator("#undo").click()
    expect(tab.locator("#stack")).to_contain_text("carries no edit")
    typed(tab, "Tamos Latre was born in", "Nobody", "Zoter")
    expect(tab.locator("#message [role=alert]")).to_contain_text("is not in prompt")
    tab.locator("#model input").fill("no-such-model")
    tab.locator("#model input").press("Enter")
    tab.locator("#load").click()
    expect(tab.locator("#message [role=alert]")).to_contain_text("no-such-model")
    shot(tab, f"{size}-4-wrong")
    report = tmp_path / "report.html"
    report.write_text("<h1>A report</h1>")
    tab.get_by_text("Open a report").click()
    tab.locator("#report input[type=file]").set_input_files(report)
    expect(tab.frame_locator("#report iframe").locator("h1")).to_have_text("A report")
    tab.locator("#report iframe").scroll_into_view_if_needed()
    tab.wait_for_timeout(1000)
    tab.screenshot(path=SHOTS / f"{size}-5-report.png")
    assert tab.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    assert elsewhere == []
    tab.context.close()


def test_two_tabs(browser, address):
    """What one tab keeps is not in the other's model."""
    tabs = [opened(browser, address, SIZES["wide"], []) for _ in range(2)]
    typed(tabs[0], "Tamos Latre was born in", "Tamos Latre", "Zoter")
    expect(tabs[0].locator("#message")).to_contain_text("Done")
    tabs[0].locator("#keep-plain").click()
    expect(tabs[0].locator("#stack li")).to_have_count(1)
    expect(tabs[1].locator("#stack")).to_contain_text("carries no edit")
    tabs[1].locator("#undo").click()
    expect(tabs[1].locator("#message [role=alert]")).to_contain_text("no edit to take back")
    typed(tabs[1], "Tamos Latre was born in", "Tamos Latre", "Zoter")
    expect(tabs[1].locator("#message")).to_contain_text("Done")
    before = tabs[1].locator("#canvas section").first
    expect(before).to_contain_text("not written")
    typed(tabs[0], "Tamos Latre was born in", "Tamos Latre", "Zoter")
    expect(tabs[0].locator("#message")).to_contain_text("Done")
    expect(tabs[0].locator("#canvas section").first).to_contain_text("✓ written")
    for tab in tabs:
        tab.context.close()
