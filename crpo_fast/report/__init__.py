"""report.html: what a run did, on one page that needs no network.

python -m crpo_fast.report <run> [<run> ...] [--show-text] [--out file]

folder  a run's files          curves, scores, viewer  what is shown of them
words, privacy  what is hidden    page  data and HTML    *.js, *.css, *.html  the page itself
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from crpo_fast.report.folder import ReportError
from crpo_fast.report.page import page_data, render

__all__ = ["ReportError", "page_data", "render", "write", "write_at_end"]


def write(runs: Sequence[str | Path], out: str | Path, *, show_text: bool = False) -> Path:
    """Write the report of one or several runs to ``out``, whole or not at all; returns its path.

    Args:
        runs: run folders, finished or not.
        out: the HTML file.
        show_text: show posts, and completions without anything hidden.

    Raises:
        ReportError: a folder is no run.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    html = render(page_data(runs, show_text=show_text))
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(out)
    return out


def write_at_end(run: Path, say: Callable[[str], None]) -> None:
    """<run>/report.html when training ends, however it ends.

    A report that fails is named and ends nothing: the weights are saved by then.
    """
    try:
        say(f"report: {write([run], run / 'report.html')}")
    except Exception as error:
        again = f"python -m crpo_fast.report {run}"
        say(f"report.html was not written ({type(error).__name__}: {error}). Try {again}")
