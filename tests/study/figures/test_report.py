import pytest

from lafq.study.figures import report
from lafq.study.workspace import profile_parameters


@pytest.mark.parametrize("profile", ["mini", "paper"])
def test_figures_name_the_width_of_their_profile(profile):
    assert report.MODELS[profile] == f"width {profile_parameters(profile)['WIDTH']}"
