"""
The status page in a real browser.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from .asking import answers, ask, download
from .browser import LARGEST_PICTURE, PICTURES, READABLE
from .conftest import MakeChain, Open
from .images import Images
from .installing import CHECKOUT
from .processes import Process, environment, eventually, free_port


@pytest.fixture(scope="module")
def example(home: Path) -> Iterator[str]:
    """
    Return the address of a page that has something of everything.
    """
    port = free_port()
    process = Process(
        [sys.executable, "-m", "tests.e2e.example", str(port)], environment(home), home / "example.log", CHECKOUT
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        process.wait_until(answers(url))
        yield url
    finally:
        process.stop()


def test_figures_move_while_a_pull_runs(make_chain: MakeChain, images: Images, browse: Open, hold: Path) -> None:
    """
    The progress of a blob and the number of its followers are shown while two clients pull, without a reload; the page
    uses only the daemon, and the console has no errors.
    """
    port = free_port()
    settings = {"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface=127.0.0.1", "PROXY_BLOB_CONNECTIONS": "1"}
    chain = make_chain(front=("--hold", str(hold)), settings=settings)
    browser, origin = browse(), f"http://127.0.0.1:{port}/"
    browser.driver.get(origin)
    assert browser.texts("#way ~ p") == ["Nothing is on its way."]
    browser.run("window.kept = true")
    blob = f"{chain.daemon.url}/v2/{images.big.repository}/blobs/{images.big.layers[0]}"

    def value() -> int:
        return int(browser.run("return document.querySelector('progress')?.value ?? 0"))

    with ThreadPoolExecutor() as clients:
        pulls = [clients.submit(download, blob) for _ in range(2)]
        eventually(lambda: value() > 0, "the page shows the transfer")
        eventually(lambda: browser.texts("#way ~ table tbody .number") == ["2"], "both clients are seen to follow")
        size = browser.run("return document.querySelector('progress').max")
        eventually(lambda: value() >= size // 2, "the bar is where the blob is held")
        hold.unlink()
        assert {each.result().size for each in pulls} == {size}
    eventually(lambda: browser.texts("#way ~ p") == ["Nothing is on its way."], "the end is seen")
    eventually(lambda: "64 MiB" in browser.texts(".figure")[5], "the bytes from upstream are shown")
    eventually(lambda: browser.texts("#saving ~ table tbody th") == [images.big.repository], "who joined saved bytes")
    assert browser.run("return window.kept")
    assert browser.complaints() == []
    assert {re.match(r"\w+://[^/]+/", each)[0] for each in browser.asked()} == {origin}  # type: ignore[index]


def test_workers_are_seen_as_one(make_chain: MakeChain, images: Images, hold: Path) -> None:
    """
    Traffic and transfers of all workers are shown together.
    """
    port = free_port()
    settings = {"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface=127.0.0.1", "PROXY_WORKER_PROCESSES": "2"}
    chain = make_chain(front=("--hold", str(hold)), settings=settings)
    hold.unlink()

    def status() -> Any:
        return ask(f"http://127.0.0.1:{port}/status.json").json()

    blob = f"/v2/{images.single.repository}/blobs/{images.single.layers[0]}"
    for _ in range(40):
        assert chain.daemon.ask(blob).status == 200
    eventually(lambda: sum(each["count"] for each in status()["answers"].values()) == 40, "all answers are told")
    (saved,) = status()["repositories"]
    assert saved["repository"] == images.single.repository
    assert saved["answers"] == 39
    hold.touch()
    with ThreadPoolExecutor() as clients:
        for _ in range(4):
            clients.submit(download, f"{chain.daemon.url}/v2/{images.big.repository}/blobs/{images.big.layers[0]}")
        eventually(lambda: sum(each["followers"] for each in status()["transfers"]) == 4, "four clients follow")
        hold.unlink()


def test_a_daemon_that_ends_is_seen_to(make_chain: MakeChain, browse: Open) -> None:
    """
    Old data is marked as such; when the daemon is back, it is new.
    """
    port = free_port()
    chain = make_chain(settings={"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface=127.0.0.1"})
    browser = browse()
    browser.driver.get(f"http://127.0.0.1:{port}/")
    assert browser.texts("#stale") == [""]
    chain.daemon.process.terminate()
    eventually(lambda: "does not answer" in browser.texts("#stale")[0], "the page tells")
    chain.daemon.restart()
    eventually(lambda: browser.texts("#stale") == [""], "the page is well again")


def test_an_ecr_that_is_away_is_read_first(make_chain: MakeChain, images: Images, browse: Open) -> None:
    """
    What fails, why, and what still works: at the top of a page that is open already.
    """
    port = free_port()
    chain = make_chain(settings={"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface=127.0.0.1"})
    path = f"/v2/{images.single.repository}/manifests/{images.single.tag}"
    assert chain.daemon.ask(path).status == 200
    browser = browse()
    browser.driver.get(f"http://127.0.0.1:{port}/")
    assert browser.texts(".word") == ["Ready"]
    chain.cut()
    assert chain.daemon.ask(path).status == 200
    eventually(lambda: browser.texts(".word") == ["Can't fetch from upstream, serves what is cached"], "the page tells")
    assert browser.driver.title == "ecrproxy: can't fetch from upstream, serves what is cached"
    reasons = ask(f"http://127.0.0.1:{port}/readyz").json()["reasons"]
    assert browser.texts(".health li") == reasons
    assert images.single.repository in reasons[0]
    assert "can't be reached" in reasons[0]
    for width in (320, 1200):
        browser.size(width, 800)
        assert browser.run("return document.documentElement.scrollWidth") == width
        assert browser.run("return document.querySelector('.health').getBoundingClientRect().top") < 100
    assert chain.daemon.ask("/v2/team/absent/manifests/1").status >= 500

    def failures() -> list[str]:
        return browser.texts("#failures ~ table tbody td")

    eventually(lambda: len(failures()) == 1, "what failed is seen")
    assert failures()[0].startswith("team/absent/manifests/1 50")
    assert failures()[0].endswith("last for 127.0.0.1")
    eventually(lambda: browser.texts(".word")[0].endswith("; 1 request failed in the last 1 min"), "that it did, too")
    ratio, text = browser.worst_contrast()
    assert ratio >= READABLE, text


def test_without_scripts_it_shows_all_and_loads_itself_again(example: str, browse: Open) -> None:
    """
    Charts, bars and tables are there, and later data too.
    """
    browser = browse(scripts=False)
    browser.driver.get(example)
    assert browser.run("return document.getElementById('pause').hidden")
    assert len(browser.driver.find_elements("css selector", "svg.chart, progress, meter")) == 6
    moments: list[str] = []

    def later() -> bool:
        moments.extend(browser.texts(".moment time"))  # none while it loads
        return len(set(moments)) > 1

    eventually(later, "it has loaded itself again")


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_fits_any_width(example: str, browse: Open, width: int) -> None:
    """
    From a small phone to a desktop, without horizontal scrolling.
    """
    browser = browse()
    browser.size(width, 800)
    browser.driver.get(example)
    browser.run("document.querySelector('details').open = true")
    assert browser.run("return document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("dark", [False, True])
def test_can_be_read_in_light_and_dark(example: str, browse: Open, *, dark: bool) -> None:
    """
    By the system's mode, with enough contrast for every text.
    """
    browser = browse()
    browser.dark(dark=dark)
    browser.driver.get(example)
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 3 * 128) == dark
    browser.run("document.querySelector('details').open = true")
    ratio, text = browser.worst_contrast()
    assert ratio >= READABLE, text


def test_can_be_used_with_a_keyboard(example: str, browse: Open) -> None:
    """
    Every control is reached in reading order, with a visible focus; opened parts stay open.
    """
    browser = browse()
    browser.driver.get(example)
    seen = []
    for _ in range(10):
        browser.press(Keys.TAB)
        assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert browser.run("return document.activeElement.getBoundingClientRect().top") >= 0
        seen.append(browser.run("return document.activeElement.textContent"))
        if seen[-1] == "The last 15 min in numbers":
            browser.press(Keys.ENTER)
    assert seen == [
        "Skip to the figures",
        "Cache contents",
        "Pause",
        "15 min",
        "6 h",
        "3 days",
        "The last 15 min in numbers",
        "status.json",
        "metrics",
        "readyz",
    ]
    moments = browser.texts(".moment time")
    eventually(lambda: browser.texts(".moment time") != moments, "the page is up to date again")
    assert browser.run("return document.querySelector('details').open")
    assert browser.run("return document.activeElement.textContent") == "readyz"


def test_can_be_skipped_to_and_paused(example: str, browse: Open) -> None:
    """
    For reading without changes.
    """
    browser = browse()
    browser.driver.get(example)
    browser.press(Keys.TAB)
    browser.press(Keys.ENTER)
    eventually(lambda: browser.run("return document.activeElement.id") == "figures", "the figures have the focus")
    browser.driver.find_element("id", "pause").click()
    assert browser.texts("#pause") == ["Go on"]
    moments = browser.texts(".moment time")
    browser.driver.find_element("id", "pause").click()
    eventually(lambda: browser.texts(".moment time") != moments, "it goes on")
    assert browser.texts("#pause") == ["Pause"]


def test_can_be_read_out(example: str, browse: Open) -> None:
    """
    In Chromium's accessibility tree: landmarks, headings and tables, and a name for whatever has a meaning.
    """
    browser = browse()
    browser.driver.get(example)
    spoken = browser.spoken()
    roles = [role for role, _ in spoken]
    for landmark in ("banner", "main", "contentinfo", "navigation"):
        assert roles.count(landmark) == 1, landmark
    assert {"columnheader", "rowheader", "heading", "table", "status"} <= set(roles)
    named = ("RootWebArea", "region", "heading", "button", "link", "image", "img", "progressbar", "progressIndicator")
    assert [each for each in spoken if each[0] in (*named, "meter", "columnheader", "rowheader") and not each[1]] == []
    names = [name for _, name in spoken]
    assert "Hit ratio in the last 15 min" in " ".join(names)
    assert "Cache filled" in names
    assert sum(name.startswith("team/ml/trainer-cuda sha256:") for role, name in spoken if "progress" in role) == 2


def test_pictures_of_it_are_small(example: str, browse: Open, tmp_path: Path) -> None:
    """
    The pictures in the documents are of this page, and cost their readers little.
    """
    directory = Path(os.environ.get(PICTURES) or tmp_path)
    browser = browse()
    for name, width, height in (("light", 1100, 960), ("dark", 1100, 960), ("phone", 360, 1240)):
        browser.size(width, height)
        browser.dark(dark=name == "dark")
        browser.driver.get(example)
        picture = directory / f"status-{name}.png"
        browser.picture(picture)
        assert 10_000 < picture.stat().st_size < LARGEST_PICTURE
