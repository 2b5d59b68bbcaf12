"""report.html in a headless Chromium: clicked through at desktop and phone width.

Skips, with the reason, where playwright or a Chromium is missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crpo_fast.report import write
from report_run import COLD, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"needs one of {', '.join(NAMES)}")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def run500(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "example")
    write([folder], folder / "report.html")
    return folder


class Page:
    """A page with everything that went wrong on it."""

    def __init__(self, browser: Any, file: Path, size: str, **options: Any) -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, has_touch=size == "phone", **options
        )
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.troubles.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.troubles.append(f"error: {e}"))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(file.as_uri())
        self.page.set_default_timeout(10_000)

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    def end(self) -> None:
        """Nothing was logged, nothing loaded but the file itself, nothing wider than the page."""
        assert self.troubles == []
        assert [u for u in self.requests if not u.startswith(("file:", "data:"))] == []
        assert self.overflow() <= 0
        self.context.close()


@pytest.fixture(params=["desktop", "phone"])
def opened(request: pytest.FixtureRequest, browser: Any, run500: Path) -> Iterator[Page]:
    page = Page(browser, run500 / "report.html", request.param)
    yield page
    page.end()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def chart(page: Any, title: str) -> Any:
    return page.locator("figure.chart", has=page.get_by_text(title, exact=True)).first


def number(text: str) -> float:
    return float(text.replace("\u2212", "-").replace(",", ""))


def test_headline_table_and_sections(opened: Page, run500: Path) -> None:
    page = opened.page
    evaluations = json.loads((run500 / "evaluations.json").read_text())
    before, after = (evaluations[c]["weighted_f1"] for c in ("before", "after"))
    assert page.locator("#headline").inner_text().split("\u2192") == [
        f"{before:.1f}",
        f"{after:.1f}",
    ]
    rows = page.locator("#scores tbody tr")
    assert rows.count() == 3
    assert (
        f"{evaluations['after']['per_dataset']['LID']['weighted_f1']:.1f}"
        in rows.nth(1).inner_text()
    )
    for link in page.locator("nav a").all():
        link.click()
        target = link.get_attribute("href")
        assert target is not None
        assert page.locator(target).bounding_box() is not None
    assert "nvidia" not in page.content().casefold()
    assert page.locator(".mat").count() == 2
    assert page.locator("#config").get_by_text("optim.lr").count() == 1


def test_curves_by_hover_and_keys(opened: Page, run500: Path) -> None:
    page = opened.page
    metrics = {r["step"]: r for r in lines(run500 / "metrics.jsonl")}
    svg = chart(page, "KL to the reference").locator("svg")
    svg.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    for title, key, output in (
        ("KL to the reference", "kl", 0),
        ("Gradient norm", "grad_norm", 0),
        ("Train/rollout mismatch", "mismatch", 0),
        ("1 stimulus", "stage_entropy/0", 0),
    ):
        text = chart(page, title).locator("output").inner_text()
        assert text.endswith(f"at {COLD + 2}"), text  # one crosshair for all charts
        assert number(text.split()[output]) == pytest.approx(metrics[COLD + 2][key], rel=2e-3)
    reward = chart(page, "Reward").locator("output").inner_text()
    assert number(reward.split()[1].rstrip(",")) == pytest.approx(
        metrics[COLD + 2]["reward"], rel=2e-3
    )
    controlled = chart(page, "5 mental_state")
    assert "target 0.08" in controlled.locator("output").inner_text()
    assert controlled.locator("polygon").count() == 1  # the band, half to twice the target
    page.keyboard.press("Escape")
    assert chart(page, "Gradient norm").locator("output").inner_text().endswith("at 500")
    svg.hover()
    assert not chart(page, "Gradient norm").locator("output").inner_text().endswith("at 500")
    page.get_by_text("All other metrics").click()
    chart(page, "reward/not_usable").wait_for(state="attached")  # drawn when first opened
    assert opened.overflow() <= 0


def test_tokens_by_hover_tap_and_keys(opened: Page, run500: Path) -> None:
    page = opened.page
    records = [r for r in lines(run500 / "samples.jsonl") if r["kind"] == "sample"]
    last = [r for r in records if r["step"] == records[-1]["step"]]
    cards = page.locator("#samples .card")
    assert cards.count() == 4
    tip = page.locator("#tip")
    token = cards.first.locator(".tk").nth(3)
    if page.viewport_size["width"] < 500:
        token.tap()
    else:
        token.hover()
    tip.wait_for(state="visible")  # scrolling to the token may be smooth
    text = tip.inner_text()
    assert f"{last[0]['entropy'][3]:.3f}" in text
    assert f"{abs(last[0]['logprobs'][3]):.3f}" in text
    assert "1.25e" in text or "0.000125" in text  # the weight
    assert "stimulus" in text
    box = cards.nth(1).locator(".toks")
    box.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    tip.wait_for(state="visible")  # scrolling to the token may be smooth
    assert f"{last[1]['entropy'][1]:.3f}" in tip.inner_text()
    active = box.get_attribute("aria-activedescendant")
    assert page.locator(f"[id='{active}']").inner_text().strip() == last[1]["tokens"][1].strip()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    assert "advantage +1.25" in cards.first.inner_text()
    assert "answer \u22120.90" in cards.nth(1).inner_text()


def test_steps_and_probes_by_keys(opened: Page) -> None:
    page = opened.page
    slider = page.get_by_label("step of the sampled completions")
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == f"step {COLD + 1}"
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == f"step {COLD + 5}"
    page.get_by_role("tab", name="Sampled completions").focus()
    page.keyboard.press("ArrowRight")
    tab = page.get_by_role("tab", name="Same prompt, step by step")
    assert tab.get_attribute("aria-selected") == "true"
    strip = page.get_by_label("answers by step")
    strip.get_by_role("button", name="310").click()
    probe = page.locator("#probe")
    assert "No at step 300, now Yes" in probe.inner_text()
    assert probe.locator("#stage-changes").inner_text() == "changed in: 5 mental_state"
    assert [t.strip() for t in probe.locator(".new").all_inner_texts()] == ["Yes", "Yes"]
    assert [t.strip() for t in probe.locator("del").all_inner_texts()] == ["No", "No"]
    page.get_by_role("button", name="later", exact=True).click()
    assert probe.locator("#stage-changes").inner_text() == "unchanged"
    page.get_by_role("tab", name="1 Dreaddit").focus()
    page.keyboard.press("End")
    assert page.get_by_role("tab", name="4 Dreaddit").get_attribute("aria-selected") == "true"


def test_theme_toggle_and_preference(browser: Any, run500: Path) -> None:
    def background(page: Any) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    found = {}
    for scheme in ("light", "dark"):
        opened = Page(browser, run500 / "report.html", "desktop", color_scheme=scheme)
        found[scheme] = background(opened.page)
        opened.page.locator("#theme").focus()
        opened.page.keyboard.press("Enter")
        found[scheme + " switched"] = background(opened.page)
        opened.end()
    assert found["light"] != found["dark"]
    assert found["light switched"] == found["dark"]
    assert found["dark switched"] == found["light"]


def test_every_part_is_reached_by_tab_and_shows_focus(browser: Any, run500: Path) -> None:
    opened = Page(browser, run500 / "report.html", "desktop")
    seen, script = (
        [],
        "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]",
    )
    for _ in range(60):
        opened.page.keyboard.press("Tab")
        tag, outline = opened.page.evaluate(script)
        if tag == "BODY":  # past the end
            break
        seen.append(tag.upper())
        assert outline != "none", f"{tag} shows no focus"
    assert {"A", "BUTTON", "SVG", "SUMMARY", "INPUT", "DIV"} <= set(seen)
    opened.end()


def test_several_runs_and_print(browser: Any, run500: Path, tmp_path: Path) -> None:
    twin = write_run(tmp_path / "twin", seed=3)
    file = write([run500, twin], tmp_path / "both.html")
    for size in SIZES:
        opened = Page(browser, file, size)
        page = opened.page
        assert page.locator("#comparison tbody tr").count() == 2
        assert chart(page, "Reward").locator("path.ln").count() == 2
        page.get_by_role("tab", name="twin").click()
        assert page.locator("#samples .card").count() == 4
        opened.end()
    opened = Page(browser, run500 / "report.html", "desktop", color_scheme="dark")
    opened.page.emulate_media(media="print")
    assert not opened.page.locator(".bar").is_visible()
    assert (
        opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert opened.page.pdf(format="A4")[:5] == b"%PDF-"
    opened.end()


def test_hostile_text_stays_text(browser: Any, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    folder = write_run(tmp_path / "evil", steps=130)
    for name in ("samples.jsonl", "evaluations.json", "config.toml", "starts.jsonl"):
        text = (folder / name).read_text()
        for word in ("Dreaddit", "runs/example", "a CPU", " stake", "answer_reward"):
            text = text.replace(word, evil)
        (folder / name).write_text(text)
    opened = Page(browser, write([folder], tmp_path / "e.html", show_text=True), "desktop")
    opened.page.on("dialog", lambda d: opened.troubles.append("dialog"))
    assert opened.page.get_by_text(evil).count() > 3
    assert opened.page.locator("img").count() == 0
    opened.end()
