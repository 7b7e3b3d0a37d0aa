"""
Chromium, driven as by a person: by keyboard, and by what can be seen and heard.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains

from .processes import environment, free_port

# It makes no requests of its own; as root it has no sandbox.
QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)
READABLE = 4.5
"""Minimum contrast of text: WCAG 2.2, 1.4.3."""
PICTURES = "ECRPROXY_PICTURES"
"""The environment variable with a directory for new pictures for the docs."""
LARGEST_PICTURE = 150_000
CONTRAST = """
const channel = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const parse = (color) => color.match(/[0-9.]+/g).map(Number);
const light = ([red, green, blue]) =>
  0.2126 * channel(red / 255) + 0.7152 * channel(green / 255) + 0.0722 * channel(blue / 255);
const behind = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const color = parse(getComputedStyle(each).backgroundColor);
    if (color.length < 4 || color[3]) return color;
  }
  return [255, 255, 255];
};
const found = [];
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement;
  if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
  const pair = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((one, two) => two - one);
  found.push([(pair[0] + 0.05) / (pair[1] + 0.05), texts.currentNode.data.trim()]);
}
return found.sort((one, two) => one[0] - two[0])[0];
"""


class Browser:
    """
    One window.

    @param scripts: whether pages may run any.
    """

    def __init__(self, home: Path, *, scripts: bool = True) -> None:
        home.mkdir()
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for each in (*QUIET, f"--user-data-dir={home / 'profile'}"):
            options.add_argument(each)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        if not scripts:
            options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
        # A port that it chose by itself could be some connection's by the time that it is bound.
        service = Service("/usr/bin/chromedriver", port=free_port(), env=environment(home))
        self.driver: Any = webdriver.Chrome(options=options, service=service)
        self.size(1200, 1000)

    def close(self) -> None:
        self.driver.quit()

    def tell(self, command: str, **parameters: Any) -> Any:
        """
        Send a command of the DevTools protocol.
        """
        return self.driver.execute_cdp_cmd(command, parameters)

    def run(self, script: str) -> Any:
        """
        Run a script in the page, and return its result.
        """
        return self.driver.execute_script(script)

    def size(self, width: int, height: int) -> None:
        """
        Set the size; narrow is a phone.
        """
        shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.tell("Emulation.setDeviceMetricsOverride", **shape)

    def dark(self, *, dark: bool) -> None:
        """
        Set the system's dark or light mode.
        """
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[feature])

    def press(self, key: str) -> None:
        """
        Press a key.
        """
        ActionChains(self.driver).send_keys(key).perform()

    def texts(self, selector: str) -> list[str]:
        """
        Return the visible texts of a selector's elements.
        """
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText)"
        found: list[str] = self.driver.execute_script(script, selector)
        return found

    def worst_contrast(self) -> tuple[float, str]:
        """
        Find the text with the lowest contrast, and the ratio as WCAG defines it.
        """
        ratio, text = self.run(CONTRAST)
        return ratio, text

    def spoken(self) -> list[tuple[str, str]]:
        """
        Return role and name of everything that a screen reader finds.
        """
        nodes = self.tell("Accessibility.getFullAXTree")["nodes"]
        return [(each["role"]["value"], each.get("name", {}).get("value", "")) for each in nodes if not each["ignored"]]

    def complaints(self) -> list[str]:
        """
        Return the console's messages, except Chromium's own about its first page.
        """
        said: list[str] = [each["message"] for each in self.driver.get_log("browser")]
        return [each for each in said if not each.startswith("chrome://")]

    def asked(self) -> set[str]:
        """
        Return the URLs that pages requested since the last call.
        """
        events = [json.loads(each["message"])["message"] for each in self.driver.get_log("performance")]
        sent = [each["params"] for each in events if each["method"] == "Network.requestWillBeSent"]
        return {each["request"]["url"] for each in sent if each["documentURL"].startswith("http")}

    def picture(self, path: Path) -> None:
        """
        Take a screenshot.
        """
        path.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"]))
