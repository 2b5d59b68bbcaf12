"""The pictures of the report in docs/pictures: python tests/report_pictures.py <run> [folder]

Takes a finished run on made-up posts (their text is shown). Needs playwright and a Chromium.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from crpo_fast.report import write

NAMES = ("chromium", "chromium-browser", "google-chrome")


def result(page: Page) -> None:
    """Headline, table and the first curves, on a light page."""
    curves = page.locator("#curves .grid").nth(1).bounding_box()
    assert curves is not None
    page.set_viewport_size({"width": 1280, "height": int(curves["y"] + curves["height"] / 2)})


def completions(page: Page) -> None:
    """The sampled completions of one step with a token's numbers, on a dark page."""
    page.evaluate("document.querySelector('.bar').style.position = 'static'")
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    page.locator("#traces").evaluate("node => scrollTo(0, node.offsetTop)")
    page.locator("#samples .card .tk.k2").nth(2).hover()
    page.wait_for_timeout(200)


def main(run: Path, folder: Path) -> None:
    """Write both pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    browser_path = next(path for name in NAMES if (path := shutil.which(name)))
    with tempfile.TemporaryDirectory() as work, sync_playwright() as driver:
        file = write([run], Path(work) / "report.html", show_text=True)
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name, prepare, scheme in (
            ("report_result", result, "light"),
            ("report_completions", completions, "dark"),
        ):
            size = {"width": 1280, "height": 960}
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(file.as_uri())
            prepare(page)
            page.screenshot(path=str(folder / f"{name}.png"))
            page.close()
        browser.close()


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else root / "docs" / "pictures")
