"""The verdict on a claim: what its 95 % interval says, and whether the effect is as large as the
poster's.

The margin is 1.0 FID on Inception features at N = 100: a third of the gain that the poster shows
for ratio 0.35 over its baseline (59.30 - 56.21 = 3.09). It was set on 2026-11-25, when the results
of the mini profile were known, and of the poster's size the rows of its table at 100 steps; it is
no preregistration for those. The rows at 1,000 steps were drawn afterwards. On other features and
at other N there is no margin: differences are described.
"""

FID_MARGIN = 1.0
MARGIN_IMAGES = 100
LEVEL = 0.05


def verdict(
    low: float, high: float, *, above: bool, null: float = 0.0, margin: float = 0.0, p: float = 0.0
) -> str:
    """ "supported", "contradicted", "effect under 1 FID" (the margin) or "inconclusive".

    The claim says that a quantity lies above `null` (or, with above=False, below it); low..high is
    its 95 % interval. "Effect under": the whole interval lies within `margin` of null. "Supported"
    and "contradicted": the whole interval lies on one side of null, and `p`, where it has been
    corrected for several tests, is below 0.05.
    """
    low, high = (low - null, high - null) if above else (null - high, null - low)
    if -margin < low and high < margin:
        return f"effect under {margin:g} FID"
    if p >= LEVEL or low <= 0 <= high:
        return "inconclusive"
    return "supported" if low > 0 else "contradicted"


def holm(p: list[float]) -> list[float]:
    """P values corrected for their number (Holm 1979, "A simple sequentially rejective multiple
    test procedure").
    """
    order, corrected, largest = sorted(range(len(p)), key=p.__getitem__), [0.0] * len(p), 0.0
    for i, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - i) * p[place]))
        corrected[place] = largest
    return corrected
