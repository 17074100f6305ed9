"""The documentation site in a browser: no page is wider than the window, nothing fails to load."""

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.shape.source import ROOT

WIDTHS = (400, 1600)
MIN_PAGES = 20
LOOK = """<script>
onload = () => {
  const found = {};
  for (const frame of document.getElementsByTagName("iframe"))
    found[frame.name] = frame.contentDocument.documentElement.scrollWidth - frame.clientWidth;
  document.title = JSON.stringify(found);
};
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_the_site_at_any_width(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    assert len(pages) > MIN_PAGES
    frames = [
        f'<iframe name="{page} {width}" src="{page}" style="width:{width}px;height:900px;border:0"></iframe>'
        for page in pages
        for width in WIDTHS
    ]
    (site / "look.html").write_text(f"<!DOCTYPE html><title></title>{LOOK}{''.join(frames)}")
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = ["--headless", "--no-sandbox", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile"]
        address = f"http://localhost:{server.server_port}/look.html"
        words = ["chromium", *options, "--dump-dom", address]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=250)
        server.shutdown()
    (title,) = re.findall(r"<title>(.+?)</title>", done.stdout)
    found = json.loads(html.unescape(title))
    assert len(found) == len(frames)
    assert {place: pixels for place, pixels in found.items() if pixels > 0} == {}
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
