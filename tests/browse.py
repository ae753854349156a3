"""Open pages about hostile data in a browser that reports what they do: nothing may run.

    python tests/browse.py write FOLDER    with this package: a report and a trace, markup for a subject
    python tests/browse.py open FOLDER     with Playwright and a Chromium: what ran, what was asked for

Playwright is not among the tests' packages; `test_compare.py` and `test_trace_report.py` look at such pages
with Chromium alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

EVIL = (
    "</script></title><script>window.ran = 1; alert(1)</script><img src=x onerror='window.ran=1;alert(2)'>"
    "<svg onload=alert(3)><a href=javascript:alert(4)>x</a><iframe src=//example.org></iframe>"
    "{{7*7}}${alert(5)}<!--<script>"
)


def write(folder: Path) -> None:
    """A report and a trace page."""
    from test_compare import case, header
    from test_compare import write as run_file

    from easyedit_mdm.report.compare import compare
    from easyedit_mdm.tracing import TraceConfig
    from easyedit_mdm.tracing.job import TraceJob, trace

    tokens = {"tokens": [EVIL], "step": [0], "confidence": [0.5]}
    one = case(0, target_new=EVIL, subject=EVIL, prompt=EVIL, history={"pre": tokens, "post": tokens})
    one["post"]["multi_step"]["rewrite"]["text"] = EVIL
    failed = {"case_id": 1, "subject": EVIL, "target_new": EVIL, "error": EVIL}
    folder.mkdir(parents=True, exist_ok=True)
    compare([run_file(folder / "run.jsonl", header(label=EVIL), one, failed)], folder / "report", resamples=5)
    job = TraceJob(["twin-llama"], prompt=f"{EVIL} was born in", subject=EVIL)
    trace(job, folder / "trace", TraceConfig(samples=1), resamples=5)


def opened(page: Path) -> dict[str, object]:
    """What a page does when it is opened, every part of it shown and clicked on."""
    from playwright.sync_api import sync_playwright

    told: dict[str, list[str]] = {"dialogs": [], "errors": [], "requests": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page()
        tab.on("dialog", lambda box: (told["dialogs"].append(box.message), box.dismiss()))
        tab.on("pageerror", lambda error: told["errors"].append(str(error)))
        tab.on("console", lambda line: told["errors"].append(line.text) if line.type == "error" else None)
        tab.on("request", lambda asked: told["requests"].append(asked.url))
        tab.goto(page.resolve().as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(box => box.open = true)")
        tab.wait_for_timeout(1000)
        ran = tab.evaluate("window.ran === undefined ? 0 : 1")
        foreign = tab.evaluate("document.querySelectorAll('img, iframe, a[href^=\"javascript:\"]').length")
        browser.close()
    others = [url for url in told["requests"] if url != page.resolve().as_uri()]
    return {"page": page.name, **told, "requests": others, "ran": ran, "foreign_elements": foreign}


if __name__ == "__main__":
    what, place = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        write(place)
    else:
        for found in sorted(place.rglob("*.html")):
            print(json.dumps(opened(found)))
