"""How far counts lie from the distribution they should follow."""

import math

import torch


def chi_square_excess(counts, probs):
    """Standard deviations by which chi-square lies above its mean (Wilson-Hilferty); below 4 for a true sampler.

    Cells that expect fewer than ten draws are counted as one; a draw of probability 0 is infinitely wrong.
    """
    if counts[probs == 0].any():
        return math.inf
    draws = counts.sum()
    expected, rare = probs * draws, probs * draws < 10
    counts = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])) + 1e-300
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    variance = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)
