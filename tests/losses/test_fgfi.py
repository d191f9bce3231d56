"""FGFI: imitation near objects."""

from __future__ import annotations

import math

import pytest
import torch

from kd_det.core.errors import KDError
from kd_det.losses import FGFILoss, TapSpec, fgfi_mask, imitation_loss
from tests import slow

STRIDES = (4, 8, 16)
SIZES = [(12, 20), (6, 10), (3, 5)]
C_S, C_T = 2, 3
ASSIGN = ["roi", "anchor", "all"]
NORMALIZERS = ["global", "level_mean", "level_sum"]


def grid(size, stride, ratios=(0.5, 1.0, 2.0)):
    """Anchors of side ``4 * stride`` in the order y, x, anchor."""
    rows = []
    for y in range(size[0]):
        for x in range(size[1]):
            for ratio in ratios:
                w, h = 4 * stride / math.sqrt(ratio), 4 * stride * math.sqrt(ratio)
                cx, cy = x * stride, y * stride
                rows.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    return torch.tensor(rows, dtype=torch.float64)


ANCHORS = [grid(size, stride) for size, stride in zip(SIZES, STRIDES, strict=True)]


def random_boxes(generator, count):
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([60, 30])
    side = 4 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60
    return torch.cat([corner, corner + side], dim=1)


@pytest.fixture
def boxes(generator):
    """Three images: boxes of all sizes, none, and three of which two touch no anchor."""
    large = torch.tensor([[-30.0, -40.0, 90.0, 80.0], [-50.0, -100.0, 250.0, 200.0]])
    outside = torch.tensor([[900.0, 900.0, 950.0, 950.0], [30.0, 8.0, 30.0, 24.0]])
    return [
        torch.cat([random_boxes(generator, 3), large.double()]),
        torch.zeros(0, 4, dtype=torch.float64),
        torch.cat([random_boxes(generator, 1), outside.double()]),
    ]


def slow_iou(a, b, one):
    w = min(a[2], b[2]) - max(a[0], b[0]) + one
    h = min(a[3], b[3]) - max(a[1], b[1]) + one
    if w <= 0 or h <= 0:
        return 0.0
    area_a = (a[2] - a[0] + one) * (a[3] - a[1] + one)
    area_b = (b[2] - b[0] + one) * (b[3] - b[1] + one)
    return w * h / (area_a + area_b - w * h)


def slow_counts_on(assign, box, best, level):
    """Whether a box that reaches ``best[l]`` on each level counts on ``level``."""
    if assign == "all":
        return True
    if assign == "anchor":
        return best.index(max(best)) == level
    area = (box[2] - box[0]) * (box[3] - box[1])
    if area <= 0:
        return level == 0
    absolute = math.floor(4 + math.log2(math.sqrt(area) / 224))
    return min(max(absolute - 2, 0), len(best) - 1) == level


def slow_masks(anchors, gt_boxes, sizes, threshold, assign, one=0.0):
    """Over boxes, cells and anchors, as the definition reads."""
    masks = [torch.zeros(len(gt_boxes), *size, dtype=torch.bool) for size in sizes]
    for image, boxes in enumerate(gt_boxes):
        for box in boxes.tolist():
            overlaps = [[slow_iou(a, box, one) for a in rows.tolist()] for rows in anchors]
            best = [max(values) for values in overlaps]
            for level, (height, width) in enumerate(sizes):
                if best[level] == 0 or not slow_counts_on(assign, box, best, level):
                    continue
                per_cell = len(overlaps[level]) // (height * width)
                for k, value in enumerate(overlaps[level]):
                    if value > threshold * best[level]:
                        cell = k // per_cell
                        masks[level][image, cell // width, cell % width] = True
    return masks


def slow_imitation(student, teacher, masks, normalizer):
    sums, counts = [], []
    for s, t, mask in zip(student, teacher, masks, strict=True):
        total, count = 0.0, 0
        for n, y, x in mask.nonzero().tolist():
            count += 1
            total += sum((a - b) ** 2 for a, b in zip(s[n, :, y, x], t[n, :, y, x], strict=True))
        sums.append(total)
        counts.append(count)
    if normalizer == "global":
        return sum(sums) / (2 * max(sum(counts), 1))
    levels = [total / (2 * max(count, 1)) for total, count in zip(sums, counts, strict=True)]
    return sum(levels) / (len(levels) if normalizer == "level_mean" else 1)


def build(**arguments):
    loss = FGFILoss([C_S] * 3, [C_T] * 3, STRIDES, **arguments).double()
    for parameter in loss.parameters():  # away from the near-zero start
        torch.nn.init.normal_(parameter)
    return loss


def pyramids(randn, images=3):
    student = [randn(images, C_S, *size, grad=True) for size in SIZES]
    teacher = [randn(images, C_T, *size) for size in SIZES]
    return student, teacher


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("assign", ASSIGN)
def test_mask_matches_slow_loop(boxes, assign, threshold):
    masks = fgfi_mask(ANCHORS, boxes, SIZES, STRIDES, threshold, assign)
    expected = slow_masks(ANCHORS, boxes, SIZES, threshold, assign)
    assert all(mask.any() for mask in expected)
    for mask, slow_mask in zip(masks, expected, strict=True):
        assert torch.equal(mask, slow_mask)


def test_inclusive_mask_matches_slow_loop(boxes):
    masks = fgfi_mask(ANCHORS[1:2], boxes, SIZES[1:2], inclusive=True)
    expected = slow_masks(ANCHORS[1:2], boxes, SIZES[1:2], 0.5, "all", one=1.0)
    assert torch.equal(masks[0], expected[0])


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_matches_slow_loop(randn, boxes, normalizer, relu):
    loss = build(normalizer=normalizer, assign="anchor", relu=relu)
    student, teacher = pyramids(randn)
    adapted = [
        slow.conv2d(slow.array(s), slow.array(conv.weight), slow.array(conv.bias), padding=1)
        for conv, s in zip(loss.adaptors, student, strict=True)
    ]
    adapted = [x.clip(min=0) if relu else x for x in adapted]
    masks = slow_masks(ANCHORS, boxes, SIZES, 0.5, "anchor")
    expected = slow_imitation(adapted, [slow.array(t) for t in teacher], masks, normalizer)
    value = loss(student, teacher, anchors=ANCHORS, gt_boxes=boxes)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_zero_when_equal(randn, boxes):
    loss = build()
    student, _ = pyramids(randn)
    teacher = [conv(x) for conv, x in zip(loss.adaptors, student, strict=True)]
    assert loss(student, teacher, anchors=ANCHORS, gt_boxes=boxes).item() == 0.0


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradcheck(randn, normalizer):
    sizes, strides = [(4, 5), (2, 3)], (8, 16)
    anchors = [grid(size, stride) for size, stride in zip(sizes, strides, strict=True)]
    gt_boxes = [torch.tensor([[2.0, 3.0, 20.0, 22.0]], dtype=torch.float64)]
    loss = FGFILoss([C_S] * 2, [C_T] * 2, strides, assign="all", normalizer=normalizer).double()
    names, parameters = zip(*loss.named_parameters(), strict=True)
    teacher = [randn(1, C_T, *size) for size in sizes]
    student = [randn(1, C_S, *size, grad=True) for size in sizes]

    def call(*tensors):
        state = dict(zip(names, tensors[2:], strict=True))
        context = {"anchors": anchors, "gt_boxes": gt_boxes}
        return torch.func.functional_call(loss, state, (list(tensors[:2]), teacher), context)

    assert torch.autograd.gradcheck(call, (*student, *parameters))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("images", [0, 2], ids=["no images", "no boxes"])
def test_empty_stays_in_graph(randn, images, normalizer):
    loss = build(normalizer=normalizer)
    student, teacher = pyramids(randn, images)
    gt_boxes = [torch.zeros(0, 4, dtype=torch.float64)] * images
    value = loss(student, teacher, anchors=ANCHORS, gt_boxes=gt_boxes)
    assert value.item() == 0.0
    value.backward()
    for tensor in (*student, *loss.parameters()):
        assert not tensor.grad.any()


@pytest.mark.parametrize(("threshold", "marked"), [(0.5, [True, False]), (0.4, [True, True])])
def test_overlap_must_exceed_the_threshold(threshold, marked):
    # The second anchor overlaps by exactly half of what the first one does.
    anchors = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]])
    (mask,) = fgfi_mask([anchors], [anchors[:1]], [(1, 2)], threshold=threshold)
    assert mask[0, 0].tolist() == marked


@pytest.mark.parametrize("assign", ASSIGN)
@pytest.mark.parametrize(
    "box", [[900.0, 900.0, 950.0, 950.0], [30.0, 8.0, 30.0, 24.0]], ids=["outside", "no width"]
)
def test_boxes_that_overlap_no_anchor_mark_nothing(assign, box):
    masks = fgfi_mask(ANCHORS, [torch.tensor([box]).double()], SIZES, STRIDES, assign=assign)
    assert not any(mask.any() for mask in masks)


@pytest.mark.parametrize("assign", ASSIGN)
def test_mask_of_no_images_is_empty(assign):
    masks = fgfi_mask(ANCHORS, [], SIZES, STRIDES, assign=assign)
    assert [tuple(mask.shape) for mask in masks] == [(0, *size) for size in SIZES]


def test_shape_error_names_both_shapes(randn, boxes):
    student, teacher = pyramids(randn)
    teacher[1] = randn(3, C_T, 5, 10)
    with pytest.raises(KDError, match=r"student \(3, 3, 6, 10\), teacher \(3, 3, 5, 10\)"):
        build()(student, teacher, anchors=ANCHORS, gt_boxes=boxes)


@pytest.mark.parametrize(
    ("side", "level"), [(20, 0), (111, 0), (112, 1), (223, 1), (224, 2), (448, 3), (2000, 4)]
)
def test_roi_rule_sends_a_224_pixel_box_to_p4_and_clamps(side, level):
    strides = (4, 8, 16, 32, 64)
    sizes = [(64 // s, 128 // s or 1) for s in strides]
    anchors = [
        grid(size, stride, ratios=(1.0,)) for size, stride in zip(sizes, strides, strict=True)
    ]
    masks = fgfi_mask(anchors, [torch.tensor([[0.0, 0.0, side, side]])], sizes, strides)
    assert [bool(mask.any()) for mask in masks] == [k == level for k in range(5)]


def test_a_mask_is_the_union_of_those_of_its_boxes(generator):
    boxes = random_boxes(generator, 3)
    together = fgfi_mask(ANCHORS, [boxes], SIZES, STRIDES, assign="all")
    apart = [fgfi_mask(ANCHORS, [box[None]], SIZES, STRIDES, assign="all") for box in boxes]
    for level, mask in enumerate(together):
        assert torch.equal(mask, apart[0][level] | apart[1][level] | apart[2][level])


def test_images_do_not_share_boxes(boxes):
    together = fgfi_mask(ANCHORS, boxes, SIZES, STRIDES)
    for image, own in enumerate(boxes):
        alone = fgfi_mask(ANCHORS, [own], SIZES, STRIDES)
        for level, mask in enumerate(together):
            assert torch.equal(mask[image], alone[level][0])


def test_normalizers_agree_on_one_level(randn):
    student, teacher = [randn(2, 3, 4, 6)], [randn(2, 3, 4, 6)]
    masks = [randn(2, 4, 6) > 0]
    values = [imitation_loss(student, teacher, masks, n) for n in NORMALIZERS]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_level_sum_is_level_mean_times_all_levels(randn):
    student, teacher = [randn(2, 3, 4, 6) for _ in range(3)], [randn(2, 3, 4, 6) for _ in range(3)]
    masks = [randn(2, 4, 6) > 0, randn(2, 4, 6) > 0, torch.zeros(2, 4, 6, dtype=torch.bool)]
    mean, total = (imitation_loss(student, teacher, masks, n) for n in ("level_mean", "level_sum"))
    torch.testing.assert_close(mean * 3, total)


def test_channels_are_summed(randn):
    student, teacher, mask = randn(2, 3, 4, 6), randn(2, 3, 4, 6), randn(2, 4, 6) > 0
    doubled = imitation_loss([student.repeat(1, 2, 1, 1)], [teacher.repeat(1, 2, 1, 1)], [mask])
    torch.testing.assert_close(doubled, 2 * imitation_loss([student], [teacher], [mask]))


def test_half_precision_is_computed_in_float32(half):
    student = torch.full((1, 3, 4, 6), 300.0, dtype=half, requires_grad=True)
    teacher, mask = torch.zeros_like(student), torch.ones(1, 4, 6, dtype=torch.bool)
    value = imitation_loss([student], [teacher], [mask])
    assert value.dtype == torch.float32
    assert torch.equal(value, imitation_loss([student.float()], [teacher.float()], [mask]))
    value.backward()
    assert student.grad.dtype == half


@pytest.mark.parametrize("assign", ["roi", "anchor", "all"])
def test_boxes_whose_area_is_no_half_number_mark_the_same_cells(half, assign):
    ys, xs = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    centres = torch.stack([xs, ys], dim=-1).view(-1, 2) * 128 + 64
    anchors = torch.cat([centres - 256, centres + 256], dim=1)
    boxes = torch.tensor([[0.0, 0.0, 400.0, 460.0]])
    (expected,) = fgfi_mask([anchors], [boxes], [(4, 4)], assign=assign)
    assert expected.any()
    for a, b in ((anchors.to(half), boxes.to(half)), (anchors.to(half), boxes)):
        (mask,) = fgfi_mask([a], [b], [(4, 4)], assign=assign)
        assert torch.equal(mask, expected)


def test_student_width_is_checked_before_the_convolution(randn, boxes, refuses):
    loss = FGFILoss([3], [5], [8])
    with refuses("FGFI", "3 channels", "(2, 4, "):
        loss(
            [randn(2, 4, 4, 4, dtype=torch.float32)],
            [randn(2, 5, 4, 4, dtype=torch.float32)],
            anchors=[torch.rand(16, 4)],
            gt_boxes=[torch.rand(1, 4)] * 2,
        )


def test_module_takes_half_precision_taps(randn, boxes, half):
    loss = build().float()
    student, teacher = ([x.to(half) for x in maps] for maps in pyramids(randn))
    context = {"anchors": ANCHORS, "gt_boxes": boxes}
    expected = loss([x.float() for x in student], [x.float() for x in teacher], **context)
    assert torch.equal(loss(student, teacher, **context), expected)


def test_autocast_does_not_lower_the_precision_of_the_error(randn):
    student, teacher = randn(2, 3, 4, 6).float(), randn(2, 3, 4, 6).float()
    masks = [torch.ones(2, 4, 6, dtype=torch.bool)]
    expected = imitation_loss([student], [teacher], masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(imitation_loss([student], [teacher], masks), expected)


def test_non_contiguous_input_gives_the_same_loss(randn, boxes):
    loss = build()
    student, teacher = (
        [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in maps]
        for maps in pyramids(randn)
    )
    assert not student[0].is_contiguous()
    context = {"anchors": ANCHORS, "gt_boxes": boxes}
    expected = loss([x.contiguous() for x in student], [x.contiguous() for x in teacher], **context)
    torch.testing.assert_close(loss(student, teacher, **context), expected)


def test_no_gradient_reaches_the_teacher(randn, boxes):
    student, teacher = pyramids(randn)
    for tensor in teacher:
        tensor.requires_grad_()
    build(assign="all")(student, teacher, anchors=ANCHORS, gt_boxes=boxes).backward()
    assert all(tensor.grad is None for tensor in teacher)
    assert all(tensor.grad.any() for tensor in student)


def test_adaptors_start_at_almost_zero():
    for conv in FGFILoss([16], [32], [8]).adaptors:
        assert conv.weight.abs().max() <= 2e-4
        assert conv.weight.std() > 5e-5
        assert not conv.bias.any()


def specs(*strides):
    return [TapSpec(256, stride=stride) for stride in strides]


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(specs(4, 8), specs(4, 16)), (specs(None), specs(None))],
    ids=["different", "unknown"],
)
def test_strides_must_be_known_and_equal(student, teacher):
    with pytest.raises(KDError, match="known, equal strides on both sides; received student"):
        FGFILoss.tap_arguments(student, teacher, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"assign": "anchors"}, "received 'anchors'; remedy: did you mean 'anchor'"),
        ({"normalizer": "level"}, "received 'level'; remedy: did you mean 'level_"),
        ({"threshold": 1.5}, "threshold between 0 and 1; received 1.5; remedy"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(KDError, match=message):
        FGFILoss([4], [4], [8], **arguments)


def test_missing_context_is_refused(randn):
    with pytest.raises(KDError, match="expected FGFI to get anchors and gt_boxes; received none"):
        build()(*pyramids(randn))


def test_anchors_of_another_map_are_refused(boxes):
    with pytest.raises(KDError, match=r"level 1 to be \[6 \* 10 \* A, 4\]; received \(719, 4\)"):
        fgfi_mask([ANCHORS[0], ANCHORS[0][1:]], boxes, SIZES[:2], STRIDES[:2])


def test_roi_rule_without_strides_is_refused(boxes):
    with pytest.raises(KDError, match="strides of the 3 levels for assign 'roi'; received None"):
        fgfi_mask(ANCHORS, boxes, SIZES)


def test_boxes_of_too_few_images_are_refused(randn, boxes):
    # A mask of one image would otherwise be broadcast over the batch.
    with pytest.raises(KDError, match=r"\(1, 12, 20\).*; remedy"):
        build()(*pyramids(randn), anchors=ANCHORS, gt_boxes=boxes[:1])
