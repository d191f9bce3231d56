"""Layers written from their definitions in plain loops, for fast code to be compared with.

Everything takes and returns float64 numpy arrays.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np


def array(tensor):
    return tensor.detach().double().numpy()


def conv2d(x, weight, bias=None, stride=1, padding=0):
    images, channels, height, width = x.shape
    out_channels, _, rows, columns = weight.shape
    out_height = (height + 2 * padding - rows) // stride + 1
    out_width = (width + 2 * padding - columns) // stride + 1
    y = np.zeros((images, out_channels, out_height, out_width))
    for n, k, i, j in np.ndindex(*y.shape):
        total = 0.0 if bias is None else bias[k]
        for c, a, b in product(range(channels), range(rows), range(columns)):
            r, q = i * stride + a - padding, j * stride + b - padding
            if 0 <= r < height and 0 <= q < width:
                total += x[n, c, r, q] * weight[k, c, a, b]
        y[n, k, i, j] = total
    return y


def conv_transpose2d(x, weight, bias, stride, padding):
    images, _, height, width = x.shape
    _, out_channels, rows, columns = weight.shape
    out_height = (height - 1) * stride - 2 * padding + rows
    out_width = (width - 1) * stride - 2 * padding + columns
    y = np.zeros((images, out_channels, out_height, out_width))
    y += bias[None, :, None, None]
    for n, c, i, j in np.ndindex(*x.shape):
        for k, a, b in product(range(out_channels), range(rows), range(columns)):
            r, q = i * stride + a - padding, j * stride + b - padding
            if 0 <= r < out_height and 0 <= q < out_width:
                y[n, k, r, q] += x[n, c, i, j] * weight[c, k, a, b]
    return y


def batch_norm(x, weight, bias, eps=1e-5):
    """With the statistics of the batch, as in training."""
    y = np.zeros_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = values.sum() / values.size
        variance = ((values - mean) ** 2).sum() / values.size
        y[:, c] = (values - mean) / math.sqrt(variance + eps) * weight[c] + bias[c]
    return y


def nearest(x, size):
    y = np.zeros((*x.shape[:2], *size))
    for i, j in np.ndindex(*size):
        y[:, :, i, j] = x[:, :, i * x.shape[2] // size[0], j * x.shape[3] // size[1]]
    return y


def bilinear(x, size):
    """Pixel centres keep their relative place; the border value is repeated outside."""

    def neighbours(index, length, count):
        place = max((index + 0.5) * length / count - 0.5, 0.0)
        low = min(int(place), length - 1)
        return low, min(low + 1, length - 1), place - low

    y = np.zeros((*x.shape[:2], *size))
    for i, j in np.ndindex(*size):
        top, bottom, v = neighbours(i, x.shape[2], size[0])
        left, right, h = neighbours(j, x.shape[3], size[1])
        upper = x[:, :, top, left] * (1 - h) + x[:, :, top, right] * h
        lower = x[:, :, bottom, left] * (1 - h) + x[:, :, bottom, right] * h
        y[:, :, i, j] = upper * (1 - v) + lower * v
    return y


def adaptive_avg_pool(x, size):
    height, width = x.shape[2:]
    y = np.zeros((*x.shape[:2], size, size))
    for n, c, i, j in np.ndindex(*y.shape):
        rows = range(i * height // size, -(-(i + 1) * height // size))
        columns = range(j * width // size, -(-(j + 1) * width // size))
        cells = [x[n, c, r, q] for r, q in product(rows, columns)]
        y[n, c, i, j] = sum(cells) / len(cells)
    return y


def mean_square(x):
    return sum(value * value for value in x.flat) / x.size


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))
