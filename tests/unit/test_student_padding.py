"""What padding may change (the backbone's borders, the neck's norm) and what it may not."""

import torch
from tiny_student import image_batch, text_embeddings, tiny_student
from torch import Tensor, nn

from dkdetr.structures import ImageBatch, StudentOutput
from dkdetr.student.neck import downsample_mask

F64 = torch.float64


class GivenLevels(nn.Module):
    """In the place of the neck: the picture's part of each map is fixed, the rest is noise."""

    def __init__(self, size_hw: tuple[int, int]) -> None:
        super().__init__()
        self.size_hw = size_hw

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        levels = []
        for number, stride in enumerate((8, 16, 32, 64)):
            generator = torch.Generator().manual_seed(number)
            height, width = (side // stride for side in self.size_hw)
            inside = torch.randn(1, 32, height, width, generator=generator, dtype=F64)
            padded_hw = [side * 8 // stride for side in maps[0].shape[-2:]]
            noise = torch.Generator().manual_seed(100 + number)
            level = 50 * torch.randn(1, 32, *padded_hw, generator=noise, dtype=F64)
            level[:, :, :height, :width] = inside
            levels.append(level)
        return levels


def detect(padded_hw: tuple[int, int]) -> StudentOutput:
    student = tiny_student(dtype=F64)
    student.trunk.neck = GivenLevels((128, 192))  # pyright: ignore[reportAttributeAccessIssue]
    images = image_batch([(128, 192)], padded_hw=padded_hw, dtype=F64)
    return student(images, text_embeddings(F64))


def test_beyond_the_neck_padding_changes_nothing():
    plain = detect((128, 192))
    for padded_hw in ((128, 256), (256, 192), (320, 384)):
        padded = detect(padded_hw)
        for one, other in (
            (plain.logits, padded.logits),
            (plain.detection.boxes_cxcywh, padded.detection.boxes_cxcywh),
            (plain.anchors_cxcywh, padded.anchors_cxcywh),
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_no_query_lies_in_padding():
    images = image_batch([(64, 96), (96, 64)], padded_hw=(192, 192))
    encoder = tiny_student()(images, text_embeddings()).encoder
    per_level = encoder.valid.split([24 * 24, 12 * 12, 6 * 6, 3 * 3], dim=1)
    finest = per_level[0].view(2, 24, 24)
    assert finest[0, :8, :12].any()
    assert not finest[0, 8:].any()
    assert not finest[0, :, 12:].any()
    assert not finest[1, 12:].any()


def test_the_company_of_a_batch_changes_nothing():
    student, text = tiny_student(dtype=F64), text_embeddings(F64)
    both = image_batch(dtype=F64)
    together = student(both, text)
    for image in range(2):
        alone = ImageBatch(
            both.pixels[image : image + 1],
            both.padding_mask[image : image + 1],
            both.image_sizes_hw[image : image + 1],
            both.original_sizes_hw[image : image + 1],
            (image,),
        )
        output = student(alone, text)
        torch.testing.assert_close(output.logits[:, 0], together.logits[:, image])
        torch.testing.assert_close(
            output.detection.boxes_cxcywh[:, 0], together.detection.boxes_cxcywh[:, image]
        )


def test_a_coarser_padding_mask_is_the_nearest():
    sizes = [(128, 136, 6, 9), (1024, 800, 128, 100), (135, 141, 17, 18), (13, 7, 1, 7)]
    for height, width, rows, columns in sizes:
        mask = torch.rand(2, height, width, generator=torch.Generator().manual_seed(height)) > 0.5
        nearest = nn.functional.interpolate(mask[:, None].float(), size=(rows, columns))[:, 0]
        assert torch.equal(downsample_mask(mask, (rows, columns)), nearest.bool())
