"""What the tests of MHGD share: a loss, maps, and its formulas in plain loops."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from kd_det.losses import MHGDLoss
from tests.slow import array

CHANNELS = (3, 4, 6)
SIZES = [(4, 4), (3, 3), (1, 2)]  # the last with fewer pixels than channels
OTHER_SIZES = [(5, 4), (2, 3), (2, 2)]


def build(**arguments):
    """A ready loss whose statistics and parameters are not the initial ones."""
    loss = MHGDLoss(CHANNELS, CHANNELS, **{"heads": 3, **arguments}).double()
    for module in loss.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor)
    loss.finish_pre_stage()
    return loss


def pyramid(randn, sizes=SIZES, samples=5, channels=CHANNELS, grad=False):
    return [randn(samples, c, *size, grad=grad) for c, size in zip(channels, sizes, strict=True)]


def slow_similarity(pair, front, back, batch_statistics=False):
    """S[h, i, j], number by number."""

    def project(rows, weight, bn):
        rows = rows @ array(weight)
        mean, variance = array(bn.running_mean), array(bn.running_var)
        if batch_statistics:
            mean, variance = rows.mean(axis=0), ((rows - rows.mean(axis=0)) ** 2).mean(axis=0)
        return (rows - mean) / np.sqrt(variance + 1e-5) * array(bn.weight) + array(bn.bias)

    key = project(back, pair.w_key, pair.bn_key)
    query = project(front, pair.w_query, pair.bn_query)
    samples, width = len(front), key.shape[1] // pair.heads
    s = np.zeros((pair.heads, samples, samples))
    for h, i, j in np.ndindex(*s.shape):
        for dim in range(width):
            column = dim * pair.heads + h
            s[h, i, j] += key[i, column] * query[j, column]
    return s


def slow_softmax(row):
    exponentials = [math.exp(value) for value in row]
    return np.array([e / sum(exponentials) for e in exponentials])


def slow_transfer(student, teacher):
    total = 0.0
    for h, i in np.ndindex(*student.shape[:2]):
        q = slow_softmax([math.tanh(value) for value in student[h, i]])
        p = slow_softmax([math.tanh(value) for value in teacher[h, i]])
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(q, p, strict=True))
    return total


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)
