"""Every page of the site in a headless Chromium, on a phone and on a desk: it fits, can be read, and needs no mouse."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from .blocks import ROOT

pytestmark = pytest.mark.slow
PHONE, DESK = (390, 844), (1280, 900)
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, without a log."""

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[str]:
    """The address of the site, built anew."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1800)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def address(site: str, page: str) -> str:
    return f"{site}/{'' if page == 'index' else f'{page}/'}"


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_can_be_read_and_needs_no_mouse(page, size, chromium, site):
    chromium.open(address(site, page), *size)
    found = chromium.look()
    assert found.texts > 20 and found.controls > 2
    assert found.width <= size[0]
    assert (found.errors, found.faint, found.unreached, found.unseen, found.lost) == ([], [], [], [], [])


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read_in_the_dark(page, chromium, site):
    chromium.open(address(site, page), *DESK, dark=True)
    # The theme's script sets it once it runs, which a page that has loaded does not wait for.
    chromium.until("getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)'")
    found = chromium.look(keyboard=False)
    assert (found.errors, found.faint) == ([], [])


def test_menu_and_search_open_by_keyboard_on_a_phone(chromium, site):
    for name, opened in [("__drawer", ".md-sidebar--primary"), ("__search", ".md-search__inner")]:
        chromium.open(address(site, "tutorial"), *PHONE)
        shown = f"getComputedStyle(document.querySelector('{opened}')).visibility"
        assert chromium.evaluate(shown) == "hidden"
        chromium.evaluate(f"document.querySelector('.md-header__button[for={name}]').focus()")
        chromium.press("Enter")
        assert chromium.evaluate(f"document.getElementById('{name}').checked")
        assert chromium.evaluate(shown) == "visible"


def test_what_a_page_lacks_is_found(chromium, tmp_path):
    """The checks can fail: a page with one fault of each kind."""
    page = Path(tmp_path, "page.html")
    page.write_text(
        """<!DOCTYPE html><html lang="en"><meta name="viewport" content="width=device-width, initial-scale=1">
        <link rel="icon" href="data:,"><title>Faults</title>
        <style>#same:focus { outline: none } .far { position: absolute; left: -9999px }</style>
        <p style="color: #999">faint</p><p style="opacity: .5">half</p><p style="color: #767676">just enough</p>
        <p style="color: #949494; font-size: 24px">large</p><p style="color: #fff; opacity: 0">not there</p>
        <div style="background: #333"><b style="color: #ccc">light</b> <i style="color: #777">dim</i></div>
        <svg height="20" width="90"><text y="15" fill="#bbb">drawn</text></svg>
        <div style="width: 500px">wide</div>
        <a href="#a">seen</a> <a href="#b" id="same">same</a> <span tabindex="0">span</span>
        <label for="hidden" style="cursor: pointer">label</label><input type="checkbox" id="hidden" style="display: none">
        <a href="#c" class="far">far</a>
        <script>console.error("said")</script><img src="none.png" alt="">"""
    )
    chromium.open(page.as_uri(), *PHONE)
    found = chromium.look()
    assert found.width > 390
    words = sorted(line.split('"')[1] for line in found.faint)
    assert words == ["dim", "drawn", "faint", "half"]
    assert any("said" in line for line in found.errors) and any("none.png" in line for line in found.errors)
    assert ["label" in line for line in found.unreached] == [True]
    assert ["same" in line for line in found.unseen] == [True]
    assert ["far" in line for line in found.lost] == [True]
