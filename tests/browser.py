"""Chromium without a window, for tests of pages: it opens a file, and says what the page wrote to the console and asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

WIDTH, HEIGHT = 1400, 1000


def find_chromium() -> tuple[str, str]:
    """Chromium and its driver; the test is skipped where there are none."""
    pytest.importorskip("selenium", reason="selenium isn't installed: pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium or its driver isn't installed: apt-get install chromium chromium-driver")
    return chromium, driver


@dataclass
class Browser:
    """A running Chromium; `driver` is selenium's."""

    driver: Any

    def open(self, path: Path, scheme: str = "light") -> None:
        """Open a file under a colour scheme, after the messages of earlier pages were dropped."""
        self.set_scheme(scheme)
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.as_uri())

    def set_scheme(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script that returns one."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def get(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """The text of an element, also where it isn't shown."""
        return str(self.get(selector).get_attribute("textContent"))

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def point_at(self, element: Any, share_x: float, share_y: float) -> None:
        """Move the pointer to a place of an element, as shares of its width and height."""
        from selenium.webdriver import ActionChains

        size = element.rect
        x, y = round(size["width"] * (share_x - 0.5)), round(size["height"] * (share_y - 0.5))
        ActionChains(self.driver).move_to_element_with_offset(element, x, y).perform()

    def complaints(self) -> list[str]:
        """What was written to the console since the page was opened, errors of scripts and of the policy included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]


@contextmanager
def start_browser() -> Iterator[Browser]:
    """A browser, which is ended after use."""
    chromium, path = find_chromium()
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, service=webdriver.ChromeService(path))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
