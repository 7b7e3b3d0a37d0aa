"""
The pages of what is in the cache, and their buttons, in a real browser.
"""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from .browser import LARGEST_PICTURE, PICTURES, READABLE, Browser
from .chain import Chain
from .conftest import COUNTS, MakeChain, Open
from .images import Image, Images
from .processes import eventually, free_port

SIZES = ((360, 740), (1280, 800), (2560, 1440))
"""A phone, a laptop, a wall."""


def pull(chain: Chain, image: Image) -> None:
    assert chain.daemon.ask(f"/v2/{image.repository}/manifests/{image.tag}").status == 200
    for digest in image.layers:
        assert chain.daemon.ask(f"/v2/{image.repository}/blobs/{digest}").status == 200


def click(browser: Browser, words: str) -> None:
    """
    Click a visible link or button by its words.
    """
    found = [each for each in browser.driver.find_elements("css selector", "a, button") if each.text == words]
    found[0].click()


def heading(browser: Browser) -> str:
    return "".join(browser.texts("h1"))


def done(browser: Browser) -> str:
    """
    Wait until a dialog tells of the end.
    """
    eventually(lambda: browser.texts("#leave") == ["Close"], "the work ends")
    return browser.texts("#told")[0]


@pytest.fixture
def origin() -> str:
    return f"127.0.0.1:{free_port()}"


def settings(origin: str, count: str = "1") -> dict[str, str]:
    host, _, port = origin.partition(":")
    return {"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface={host}", "PROXY_WORKER_PROCESSES": count}


@COUNTS
def test_an_image_is_verified_purged_and_fetched_by_buttons(
    make_chain: MakeChain, images: Images, browse: Open, origin: str, count: str
) -> None:
    """
    Each asks first, and then tells how far it is; the console has no errors, and nothing else is asked.
    """
    chain, image = make_chain(settings=settings(origin, count)), images.single
    pull(chain, image)
    browser = browse()
    browser.driver.get(f"http://{origin}/")
    click(browser, "Cache contents")
    eventually(lambda: heading(browser) == "What is in the cache", "the list of repositories")
    click(browser, image.repository)
    eventually(lambda: heading(browser) == image.repository, "the repository's page")
    eventually(lambda: browser.run("location.reload()") is None and browser.texts("#askers ~ table") != [], "who asked")
    eventually(lambda: any("127.0.0.1" in each for each in browser.texts("#askers ~ table tbody th")), "the client")
    click(browser, image.tag)
    eventually(lambda: heading(browser) == f"{image.repository}:{image.tag}", "the image's page")

    click(browser, "Verify")
    assert browser.run("return document.getElementById('doing').open")
    (asked,) = browser.texts("#asked")
    assert re.fullmatch(rf"Verify [^ ]+/{image.repository}:{image.tag}\?", asked), asked
    assert not browser.run("return document.getElementById('progress').checkVisibility()")
    browser.driver.find_element("id", "do").click()
    assert re.match(r"Done: \d+ files are good, 0 corrupt; ", done(browser))
    browser.driver.find_element("id", "leave").click()
    eventually(lambda: not browser.run("return document.getElementById('doing').open"), "the dialog is closed")

    click(browser, "Purge")
    browser.press(Keys.ESCAPE)
    assert not browser.run("return document.getElementById('doing').open")
    assert chain.daemon.ask(f"/v2/{image.repository}/blobs/{image.layers[0]}").headers["x-cache-status"] == "HIT"
    click(browser, "Purge")
    browser.driver.find_element("id", "do").click()
    assert re.match(r"Done: \d+ entries and \d+ files removed, ", done(browser))
    assert not any((chain.daemon.cache / "content").rglob(f"{image.layers[0].partition(':')[2]}*"))

    browser.driver.find_element("id", "leave").click()
    eventually(lambda: heading(browser) == image.repository, "the repository's page: the image has none any more")
    browser.driver.find_element("id", "wanted").send_keys(image.tag)
    click(browser, "Prefetch")
    assert browser.texts("#asked") == [f"Prefetch {image.repository}:{image.tag}?"]
    browser.driver.find_element("id", "do").click()
    told = done(browser)
    assert told.startswith("Done: "), told
    assert any((chain.daemon.cache / "content").rglob(f"{image.layers[0].partition(':')[2]}*"))
    browser.driver.find_element("id", "leave").click()
    eventually(lambda: browser.texts("#images ~ table tbody th")[:1] != [], "it is listed again")
    assert browser.complaints() == []
    assert {each.partition("//")[2].partition("/")[0] for each in browser.asked()} == {origin}


def test_a_prefetch_shows_its_progress_and_can_be_stopped(
    make_chain: MakeChain, images: Images, browse: Open, origin: str, hold: Path
) -> None:
    """
    The bar stands where the bucket does; what fails is told.
    """
    chain = make_chain(front=("--hold", str(hold)), settings=settings(origin))
    browser, image = browse(), images.big
    hold.unlink()
    pull(chain, images.single)
    hold.touch()
    browser.driver.get(f"http://{origin}/contents")
    browser.driver.find_elements("css selector", "#repositories ~ table tbody .quiet a")[0].click()
    eventually(lambda: browser.texts("#asked") == [""], "the registry's page")

    def begin(wanted: str) -> None:
        field = browser.driver.find_element("id", "wanted")
        field.clear()
        field.send_keys(wanted)
        click(browser, "Prefetch")
        browser.driver.find_element("id", "do").click()

    begin(f"{image.repository}:{image.tag}")
    eventually(lambda: browser.run("return document.getElementById('progress').value") > 0, "the bar moves")
    assert browser.texts("#leave") == ["Stop"]
    browser.driver.find_element("id", "leave").click()
    assert done(browser).startswith("Stopped, after ")
    hold.unlink()
    browser.driver.find_element("id", "leave").click()
    eventually(lambda: not browser.run("return document.getElementById('doing').open"), "the page is loaded again")
    begin("team/absent:none")
    assert done(browser).startswith("Failed: ")


@pytest.fixture
def first(make_chain: MakeChain, images: Images, origin: str) -> str:
    """
    Return the address of the page of all repositories.
    """
    chain = make_chain(settings=settings(origin))
    for each in (images.single, images.multi):
        chain.daemon.ask(f"/v2/{each.repository}/manifests/{each.tag}")
    pull(chain, images.single)
    return f"http://{origin}/contents"


def every(browser: Browser, first: str) -> list[str]:
    """
    Return the addresses of a page of each kind, by following links.
    """
    found = [first]
    for selector in ("#repositories ~ table tbody .quiet a", "#repositories ~ table tbody th > a", "#images ~ table a"):
        browser.driver.get(found[-1])
        found.append(browser.run(f"return document.querySelector('{selector}').href"))
    return found


def test_fit_any_screen_and_can_be_read(first: str, browse: Open) -> None:
    """
    On a phone, a laptop and a wall, light and dark, with the dialog open: no horizontal scrolling, enough contrast.
    """
    browser = browse()
    for page in every(browser, first):
        for width, height in SIZES:
            browser.size(width, height)
            for dark in (False, True):
                browser.dark(dark=dark)
                browser.driver.get(page)
                if "registry=" in page:
                    click(browser, "Purge")
                    ratio, text = browser.worst_contrast()
                    assert ratio >= READABLE, (page, width, dark, text)
                    box = "document.getElementById('doing').getBoundingClientRect()"
                    assert 0 <= browser.run(f"return {box}.left") < browser.run(f"return {box}.right") <= width
                    browser.press(Keys.ESCAPE)
                assert browser.run("return document.documentElement.scrollWidth") == width, (page, width)
                ratio, text = browser.worst_contrast()
                assert ratio >= READABLE, (page, width, dark, text)


def test_can_be_used_with_a_keyboard_and_read_out(first: str, browse: Open) -> None:
    """
    Each control has a visible focus and a name; the dialog keeps the focus, and gives it back.
    """
    browser = browse()
    for page in every(browser, first):
        browser.driver.get(page)
        spoken = browser.spoken()
        roles = [role for role, _ in spoken]
        for landmark in ("banner", "main", "contentinfo"):
            assert roles.count(landmark) == 1, landmark
        named = (
            "RootWebArea",
            "region",
            "heading",
            "button",
            "link",
            "textbox",
            "navigation",
            "columnheader",
            "rowheader",
        )
        assert [each for each in spoken if each[0] in named and not each[1]] == [], page
        levels = browser.run("return [...document.querySelectorAll('h1, main h2')].map((each) => +each.tagName[1])")
        assert all(after - before <= 1 for before, after in pairwise(levels))
    while "Purge" not in browser.texts(":focus"):
        browser.press(Keys.TAB)
        assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press(Keys.ENTER)
    assert browser.texts(":focus") == ["Cancel"]
    assert ("dialog", browser.texts("#asked")[0]) in browser.spoken()
    browser.press(Keys.ESCAPE)
    assert browser.texts(":focus") == ["Purge"]


def test_a_picture_of_one_is_small(
    make_chain: MakeChain, images: Images, browse: Open, origin: str, tmp_path: Path
) -> None:
    """
    The picture in the documents is of such a page, after two pulls.
    """
    chain, image = make_chain(settings=settings(origin)), images.single
    for _ in range(2):
        pull(chain, image)
    browser = browse()
    browser.size(1100, 760)
    browser.driver.get(every(browser, f"http://{origin}/contents")[2])
    eventually(lambda: browser.run("location.reload()") is None and browser.texts("#askers ~ table") != [], "who asked")
    picture = Path(os.environ.get(PICTURES) or tmp_path) / "contents.png"
    browser.picture(picture)
    assert 10_000 < picture.stat().st_size < LARGEST_PICTURE


def test_without_scripts_they_show_all_and_have_no_buttons(first: str, browse: Open) -> None:
    browser = browse(scripts=False)
    browser.driver.get(every(browser, first)[1])
    assert browser.texts("#repositories ~ table tbody th") != []
    assert [each for each in browser.driver.find_elements("css selector", "button") if each.is_displayed()] == []
    assert "need scripts" in browser.texts("noscript")[0]
