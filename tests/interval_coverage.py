"""How often intervals hold the truth."""

import numpy as np

LEAST_COVERAGE = 0.91
"""Of a 95% interval in 500 simulations; 0.95 less four standard errors. Cells near 0 and 1 are discrete and lie above."""


def coverage(intervals, truth):
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))
