"""Pages of the site that `make site` builds, in headless Chromium at the width of a laptop and of a
telephone.
"""

import pytest
from test_sliders import page  # noqa: F401  (a fixture)

from lafq.study import workspace

PAGES = ("README.html", "docs/claims.html", "notebooks/05_ratio_sweep.html")


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_fits_its_window_and_logs_no_error(page, name, width):  # noqa: F811
    errors = []
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((workspace.BUILD / "site" / name).as_uri())
    assert page.locator("h1").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not [
        line for line in errors if "Failed to load resource" not in line
    ]  # badges, without a network
