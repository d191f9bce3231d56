"""Graphs: matrices of both sides in one order and on one scale."""

from __future__ import annotations

import torch

from kd_det.losses.irg.graph import edge_matrix
from kd_det.visualize.canvas import to_pixels
from kd_det.visualize.graphs import Nodes, edge_grid, head_grid

GROUPS = torch.tensor([2, 0, 2, 1, 0])
ORDER = [1, 4, 3, 0, 2]
NODES = Nodes("images", GROUPS, {0: "cat", 1: "dog", 2: "owl"}, "true class")


def test_edges_are_ordered_by_group_and_share_a_scale(rows, cells, randn):
    layers = [
        (tap, edge_matrix(randn(5, 3)), edge_matrix(randn(5, 7))) for tap in ("stage1", "stage2")
    ]
    grid = rows(edge_grid(layers, NODES, "graph"))
    for row, (tap, s, t) in zip(grid, layers, strict=True):
        assert row[0].get_ylabel() == tap
        for axes, matrix in zip(row, (s, t, t - s), strict=True):
            expected = [[matrix[i, j].item() for j in ORDER] for i in ORDER]
            torch.testing.assert_close(cells(axes), torch.tensor(expected))
    sides = {(a.images[0].norm.vmin, a.images[0].norm.vmax) for row in grid for a in row[:2]}
    assert len(sides) == 1
    assert {row[2].images[0].norm.vmin for row in grid} == {-grid[0][2].images[0].norm.vmax}


def test_groups_are_named_at_their_middle(rows, randn):
    edges = edge_matrix(randn(5, 3))
    ((axes, *_),) = rows(edge_grid([("p", edges, edges)], NODES, "graph"))
    assert axes.get_xticks().tolist() == [0.5, 2, 3.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "owl"]


def test_heads_show_edges_over_the_mean_edge(rows, cells, randn):
    student, teacher = (randn(3, 5, 5).softmax(dim=2) for _ in range(2))
    grid = rows(head_grid([("a → b", student, teacher)], NODES, "graph"))
    assert len(grid) == 2
    for row, graphs in zip(grid, (student, teacher), strict=True):
        for axes, graph in zip(row, graphs, strict=True):
            expected = [[5 * graph[i, j].item() for j in ORDER] for i in ORDER]
            torch.testing.assert_close(cells(axes), torch.tensor(expected))
    scales = {(a.images[0].norm.vmin, a.images[0].norm.vmax) for row in grid for a in row}
    assert len(scales) == 1
    ((low, high),) = scales
    assert low + high == 2


def test_a_graph_of_equal_nodes_can_be_drawn():
    zeros = torch.zeros(5, 5)
    assert to_pixels(edge_grid([("p", zeros, zeros)], NODES, "graph")).float().std() > 0
