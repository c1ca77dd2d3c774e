"""The notebook explore in JupyterLab, driven in headless Chromium: `make test-browser`, which
installs Playwright.

LAFQ_SCREENSHOTS names a folder for a picture of the page as it is in the end.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import urllib3

from lafq.study import workspace

playwright = pytest.importorskip(
    "playwright.sync_api", reason="make test-browser installs Playwright"
)

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
MISSING = "no Chromium was found, and Playwright fetched none: put `chromium` on PATH"
ANSWERS = urllib3.Retry(100, backoff_factor=0.1, backoff_max=1)
MINUTES = 3 * 60 * 1000  # milliseconds: a condition not met by then never will be


@pytest.fixture
def page():
    with playwright.sync_playwright() as driver:
        found = next((path for path in map(shutil.which, NAMES) if path), None)
        if not found and not Path(driver.chromium.executable_path).is_file():
            install = [sys.executable, "-m", "playwright", "install", "chromium"]
            if subprocess.run(install, capture_output=True, check=False).returncode:
                pytest.fail(MISSING, pytrace=False)
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        # Tall, since JupyterLab leaves out of the page what cannot be seen.
        page = browser.new_page(viewport={"width": 1400, "height": 2600})
        page.set_default_timeout(MINUTES)
        yield page
        browser.close()


@pytest.fixture
def lab(tmp_path):
    """The address of JupyterLab on this machine with a copy of the notebook, its results and
    settings in a folder of their own.
    """
    (tmp_path / "notebooks").mkdir()
    shutil.copy(workspace.NOTEBOOKS / "explore.ipynb", tmp_path / "notebooks")
    weights = Path("results") / "small" / "weights"
    shutil.copytree(workspace.ROOT / weights, tmp_path / "output" / weights)
    kinds = ("CONFIG", "DATA", "RUNTIME")
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in kinds}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0"
    token = "--IdentityProvider.token=explore"
    where = f"--ServerApp.root_dir={tmp_path / 'notebooks'}"
    command = [sys.executable, "-m", "jupyterlab", *flags.split(), token, where]
    environment = os.environ | folders | {"LAFQ_OUTPUT": str(tmp_path / "output")}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        # It answers some time after it says that it runs.
        urllib3.PoolManager(retries=ANSWERS).request("GET", f"http://127.0.0.1:{port}/api")
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token=explore"
    except urllib3.exceptions.MaxRetryError:
        pytest.fail(
            "JupyterLab did not start:\n" + (tmp_path / "server.log").read_text(), pytrace=False
        )
    finally:
        server.terminate()
        server.wait()


def bytes_of(page, image):
    source = image.get_attribute("src")
    return page.evaluate(
        "async (url) => Array.from(new Uint8Array(await (await fetch(url)).arrayBuffer()))", source
    )


def test_a_moved_slider_changes_the_picture_and_the_bytes(page, lab):
    page.goto(lab)
    # Cells that are run before the kernel has answered are never run.
    page.locator(".jp-StatusBar-TextItem", has_text=re.compile(r"\| Idle$")).wait_for()
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    text, image, slider = (
        page.locator(".widget-html-content"),
        page.locator("img.widget-image"),
        page.get_by_role("slider"),
    )
    playwright.expect(text).to_contain_text("MiB stored", timeout=MINUTES)
    before, picture, source = text.inner_text(), bytes_of(page, image), image.get_attribute("src")
    slider.focus()
    page.keyboard.press("ArrowRight")
    playwright.expect(image).not_to_have_attribute("src", source, timeout=MINUTES)
    after = text.inner_text()
    stored = [float(re.search(r"MiB stored\s+([\d.]+)", said)[1]) for said in (before, after)]
    assert stored[1] > stored[0]
    assert bytes_of(page, image) != picture
    if folder := os.environ.get("LAFQ_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "explore.png")
