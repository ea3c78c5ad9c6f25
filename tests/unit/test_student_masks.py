"""The mask head against an implementation in loops, and what it may and may not touch."""

import math
from dataclasses import replace

import pytest
import torch

from dkdetr.student.build import build_student
from dkdetr.student.mask_head import (
    NUM_DYNAMIC_PARAMETERS,
    DynamicMasks,
    aligned_upsample,
    dynamic_attention,
    encode_relative,
    picture_positions,
)
from tests.tiny_student import (
    TEXT_DIM,
    image_batch,
    teacher_regions,
    text_embeddings,
    tiny_config,
    tiny_student,
)

HEIGHT, WIDTH = 3, 4


def with_masks(seed: int = 0, dtype: torch.dtype = torch.float32, **student):
    return tiny_student(tiny_config(mask_head=True, **student), seed=seed, dtype=dtype)


def made_up(num_queries: int = 3, dtype: torch.dtype = torch.float64) -> DynamicMasks:
    """Two pictures in a map of 3 x 4; the second has one row and two columns of padding."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    padding = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    padding[1, 2:] = True
    padding[1, :, 2:] = True
    features = draw(2, HEIGHT * WIDTH, 8)
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    places = torch.stack(((columns + 0.5) / WIDTH, (rows + 0.5) / HEIGHT), dim=-1).to(dtype)
    return DynamicMasks(
        queries=features,
        values=features.masked_fill(padding.flatten(1)[..., None], 0.0),
        positions=picture_positions(padding, dtype).flatten(1, 2),
        reference_points=places.flatten(0, 1).expand(2, -1, -1),
        map_hw=(HEIGHT, WIDTH),
        parameters=draw(1, 2, num_queries, NUM_DYNAMIC_PARAMETERS),
        centres=torch.rand(1, 2, num_queries, 2, generator=generator, dtype=dtype),
        padding_mask=padding.repeat_interleave(4, 1).repeat_interleave(4, 2),
        stride=2.0,
        masks_at_once=2,
    )


def sample(image: list[list[float]], x: float, y: float) -> float:
    """The bilinear value at pixel coordinates whose wholes are the pixels' middles; 0 outside."""
    left, top = math.floor(x), math.floor(y)
    total = 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < HEIGHT and 0 <= column < WIDTH:
                total += image[row][column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return total


def in_loops(masks: DynamicMasks, image: int, query: int) -> list[list[float]]:
    """One query's map, number by number, from method A.4 and the parameters' order."""
    p = masks.parameters[0, image, query].tolist()
    centre = masks.centres[0, image, query].tolist()
    rows = 2 if image == 1 else HEIGHT
    columns = 2 if image == 1 else WIDTH
    feature = masks.queries[image].tolist()
    drawn = []
    for row in range(HEIGHT):
        line = []
        for column in range(WIDTH):
            # Counted over the picture only; a row of padding has no columns and the reverse.
            y = min(row + 1, rows) / rows if column < columns else 0.0
            x = min(column + 1, columns) / columns if row < rows else 0.0
            code = []
            for angle in ((y - centre[1]) * 2 * math.pi, (x - centre[0]) * 2 * math.pi):
                code += [math.sin(angle), math.cos(angle)]
                code += [math.sin(angle / 100), math.cos(angle / 100)]
            asked = [f + c for f, c in zip(feature[row * WIDTH + column], code, strict=True)]

            def dot(start: int, asked: list[float] = asked) -> float:
                return sum(p[start + channel] * asked[channel] for channel in range(8))

            gathered = []
            for head in range(4):
                logits = [dot(288 + 8 * (4 * head + k)) + p[416 + 4 * head + k] for k in range(4)]
                top = max(logits)
                shares = [math.exp(value - top) for value in logits]
                for channel in (2 * head, 2 * head + 1):
                    values = [
                        [
                            0.0
                            if image == 1 and (r >= 2 or c >= 2)
                            else feature[r * WIDTH + c][channel]
                            for c in range(WIDTH)
                        ]
                        for r in range(HEIGHT)
                    ]
                    total = 0.0
                    for k in range(4):
                        at = 2 * (4 * head + k)
                        dx, dy = dot(8 * at) + p[256 + at], dot(8 * at + 8) + p[256 + at + 1]
                        share = shares[k] / sum(shares)
                        total += share * sample(values, column + dx, row + dy)
                    gathered.append(max(total, 0.0))
            line.append(sum(p[432 + c] * gathered[c] for c in range(8)) + p[440])
        drawn.append(line)
    return drawn


def test_equals_an_implementation_in_loops():
    masks = made_up()
    masks = replace(masks, parameters=0.5 * masks.parameters)
    for image in range(2):
        for query in range(3):
            index = torch.tensor([image]), torch.tensor([query])
            parameters = masks.parameters[0][index]
            encoding = encode_relative(masks.positions[index[0]], masks.centres[0][index])
            drawn = dynamic_attention(
                masks.queries[index[0]] + encoding,
                masks.values[index[0]],
                masks.reference_points[index[0]],
                parameters,
                (HEIGHT, WIDTH),
            )[0]
            expected = torch.tensor(in_loops(masks, image, query), dtype=torch.float64)
            torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
            single = replace(
                masks,
                **{
                    name: getattr(masks, name).float()
                    for name in ("queries", "values", "positions", "reference_points", "parameters",
                                 "centres")
                },
            )  # fmt: skip
            full = single.logits(0, *index)[0]
            wanted = aligned_upsample(expected[None], 4)[0].float()
            torch.testing.assert_close(full, wanted, atol=1e-5, rtol=1e-5)


def test_441_numbers_of_these_shapes():
    assert NUM_DYNAMIC_PARAMETERS == 32 * 8 + 32 + 16 * 8 + 16 + 8 + 1 == 441


def test_gradients_are_those_of_finite_differences():
    masks = made_up(num_queries=1)
    index = torch.tensor([1]), torch.tensor([0])

    def drawn(parameters: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        padding = masks.padding_mask[:, ::4, ::4].flatten(1)[..., None]
        values = features.masked_fill(padding, 0.0)
        moved = replace(masks, parameters=parameters, queries=features, values=values)
        return moved.logits(0, *index)

    parameters = (0.3 * masks.parameters).requires_grad_()
    features = masks.queries.clone().requires_grad_()
    assert torch.autograd.gradcheck(drawn, (parameters, features), eps=1e-7, atol=1e-5)


def test_aligned_upsampling_by_hand():
    ramp = torch.tensor([[[0.0, 4.0], [0.0, 4.0]]])
    larger = aligned_upsample(ramp, 4)
    assert larger.shape == (1, 8, 8)
    # Place o shows (o - 2) / 4, held between the first and the last place.
    torch.testing.assert_close(larger[0, 3], torch.tensor([0.0, 0, 0, 1, 2, 3, 4, 4]))
    torch.testing.assert_close(aligned_upsample(ramp.mT, 4)[0, :, 5], larger[0, 3])


def test_positions_count_the_picture_only():
    padding = torch.tensor([[[False, False, True], [True, True, True]]])
    x, y = picture_positions(padding, torch.float64)[0].unbind(-1)
    assert x[0].tolist() == pytest.approx([0.5, 1, 1], abs=1e-5)
    assert y[:, 0].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_off_it_is_not_there():
    plain, with_head = tiny_student(), with_masks()
    names = set(with_head.state_dict()) - set(plain.state_dict())
    assert all(name.startswith("mask_head.") for name in names)
    assert names
    assert plain(image_batch(), text_embeddings()).masks is None


def test_detections_do_not_notice_the_head():
    plain, with_head = tiny_student(), with_masks()
    with_head.load_state_dict(plain.state_dict(), strict=False)
    ours = plain(image_batch(), text_embeddings(), teacher_regions())
    theirs = with_head(image_batch(), text_embeddings(), teacher_regions())
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.detection.boxes_cxcywh, theirs.detection.boxes_cxcywh)


def test_masks_are_of_detection_queries_and_do_not_notice_kd_queries():
    student = with_masks(dtype=torch.float64)
    images = image_batch(dtype=torch.float64)
    text = text_embeddings(torch.float64)
    alone = student(images, text).masks
    together = student(images, text, teacher_regions(dtype=torch.float64)).masks
    assert together.parameters.shape == (2, 2, 12, 441)
    index = torch.tensor([0, 1]), torch.tensor([11, 3])
    for layer in (0, -1):
        torch.testing.assert_close(alone.logits(layer, *index), together.logits(layer, *index))


def test_sizes_and_padding():
    masks = with_masks()(image_batch(((64, 96), (96, 64))), text_embeddings()).masks
    # 128 pixels, the finest level at stride 8, four times finer: a mask's pixel is two wide.
    assert masks.stride == 2
    assert masks.logits(0, torch.tensor([0]), torch.tensor([0])).shape == (1, 64, 64)
    assert (~masks.padding_mask[0]).sum() == 32 * 48
    assert not masks.padding_mask[1, :48, :32].any()
    config = tiny_config(mask_head=True)
    assert config.student.mask_side(128) == 64
    assert config.student.mask_side(100) == 52


def test_a_batch_s_company_changes_no_mask():
    student = with_masks(dtype=torch.float64)
    pair = image_batch(dtype=torch.float64)
    text = text_embeddings(torch.float64)
    together = student(pair, text).masks.logits(-1, torch.tensor([1]), torch.tensor([2]))
    one = replace(
        pair,
        pixels=pair.pixels[1:],
        padding_mask=pair.padding_mask[1:],
        image_sizes_hw=pair.image_sizes_hw[1:],
        original_sizes_hw=pair.original_sizes_hw[1:],
        image_ids=pair.image_ids[1:],
    )
    alone = student(one, text).masks.logits(-1, torch.tensor([0]), torch.tensor([2]))
    torch.testing.assert_close(together, alone)


def test_masks_teach_the_queries_and_the_trunk_but_not_the_boxes():
    student = with_masks()
    masks = student(image_batch(), text_embeddings()).masks
    masks.logits(-1, torch.tensor([0, 1]), torch.tensor([0, 5])).square().sum().backward()
    taught = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(any(name.startswith(part) for name in taught) for part in (
        "mask_head.encoder", "mask_head.projection", "mask_head.norm", "mask_head.linear1",
        "mask_head.linear3", "decoder.layers.1", "trunk.encoder", "trunk.backbone",
    ))  # fmt: skip
    assert not any("box_head" in name or name.startswith("classifiers") for name in taught)


@pytest.mark.parametrize("embed_dim", [32, 64])
def test_any_width_and_a_finer_level(embed_dim):
    config = tiny_config(
        mask_head=True, embed_dim=embed_dim, backbone={"stages": (2, 3), "extra_levels": 1}
    )
    student = build_student(config, text_dim=TEXT_DIM).eval()
    masks = student(image_batch(), text_embeddings()).masks
    assert masks.stride == 1
    assert masks.logits(0, torch.tensor([0]), torch.tensor([0])).shape == (1, 128, 128)


def test_half_precision_around_it_leaves_its_arithmetic_alone():
    student = with_masks()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = student(image_batch(), text_embeddings()).masks
    for tensor in (masks.queries, masks.values, masks.parameters, masks.reference_points):
        assert tensor.dtype is torch.float32
    logits = masks.logits(0, torch.tensor([0]), torch.tensor([0]))
    assert logits.dtype is torch.float32
    assert logits.isfinite().all()
