"""The report as one HTML page without a single reference to anything outside it."""

from __future__ import annotations

import base64
import hashlib
import os
from html import escape
from pathlib import Path

from launcher.report import curves, sections
from launcher.report.look import SCRIPT, STYLE
from launcher.report.records import read
from launcher.report.totals import summarize


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what the run directory holds, and return its path.

    Absent or damaged files leave gaps that the page names. Raises FileNotFoundError if `run` is no
    directory.
    """
    records = read(run)
    totals = summarize(records)
    body = "".join(
        section(records, totals)
        for section in (
            sections.header,
            sections.tiles,
            curves.evaluation,
            curves.training,
            sections.plan_against_actual,
            sections.timeline,
            sections.config,
        )
    )
    # Whoever opens the page while it is rewritten sees the old one or the new one.
    path = run / "report.html"
    draft = run / f".report.{os.getpid()}.html"
    # A name or message cut inside a surrogate pair must not cost the report.
    try:
        draft.write_text(_page(records.name, body), encoding="utf-8", errors="replace")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _page(title: str, body: str) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} – Trainyard report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
