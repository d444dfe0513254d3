"""Headless Chromium, driven by Debian's driver: nothing is downloaded, and nothing but this machine is reached."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from debian import need
from selenium import webdriver
from selenium.common.exceptions import JavascriptException, StaleElementReferenceException

PATIENCE_SECONDS = 60.0
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# What is below the edge of the window may wait to be drawn until one scrolls there.
_SPINNERS = """
return [...document.querySelectorAll('[class*=spin i], [class*=skeleton i], [aria-busy=true]')].filter(one => {
  const place = one.getBoundingClientRect()
  return place.height > 0 && place.bottom > 0 && place.top < innerHeight
}).length
"""
# `innerText` is what a person sees.
_SHOWN = "return document.body ? document.body.innerText : ''"


class Page:
    """The one tab of a browser."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def open(self, address: str, *, width: int = 1400, height: int = 900) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        self.driver.get("about:blank")  # a page that is open already would only be moved to another #place
        self.driver.get(address)

    def colors(self, scheme: str, media: str = "screen") -> None:
        """What the reader prefers: `light` or `dark`; and what it is read on, `screen` or `print`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def text(self) -> str:
        return self.driver.execute_script(_SHOWN)

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        """The first true value of ``condition``."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if found := condition():
                    return found
            except (StaleElementReferenceException, JavascriptException):
                pass  # it was drawn anew meanwhile
            if time.monotonic() > give_up_at:
                raise AssertionError(f"not seen within {PATIENCE_SECONDS:g} s: {what}; but: {self.text()[:3000]}")
            time.sleep(0.2)

    def until_shown(self, *texts: str) -> None:
        for text in texts:
            self.until(repr(text), lambda text=text: text in self.text())

    def until_still(self) -> None:
        """Nothing in sight turns, and two pictures half a second apart are the same."""
        self.until("no spinner", lambda: self.driver.execute_script(_SPINNERS) == 0)
        pictures = [b""]

        def still() -> bool:
            time.sleep(0.5)
            pictures.append(self.driver.get_screenshot_as_png())
            return pictures[-1] == pictures[-2]

        self.until("a still picture", still)

    def take(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is shown, or of the whole page."""
        options = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(picture))


@contextmanager
def chromium() -> Iterator[Page]:
    """A browser with a profile of its own, which is gone afterwards."""
    driver_path = need("chromedriver", package="chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(need("chromium", package="chromium"))
    for option in OPTIONS:
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(driver_path)))
    try:
        driver.set_page_load_timeout(PATIENCE_SECONDS)
        yield Page(driver)
    finally:
        driver.quit()
