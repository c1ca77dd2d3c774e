import math

import pandas as pd
import pytest

from lafq.study.damage import bits_of_equal_damage

ROWS = pd.DataFrame({"budget_bits": [2.0, 3.0, 4.0], "damage": [1e-2, 1e-4, 1e-6]})


@pytest.mark.parametrize(
    ("damage", "bits"), [(1e-4, 3), (1e-3, 2.5), (1e-1, math.nan), (1e-7, math.nan)]
)
def test_bits_of_equal_damage_lie_between_two_rows_and_never_outside(damage, bits):
    assert bits_of_equal_damage(ROWS, damage) == pytest.approx(bits, nan_ok=True)
