"""Other projects' figures, measured once elsewhere, and not again here.

Some of them want a build with CUDA; some are on the package index (mmcv, DCNv4), untried here.

One NVIDIA H100 80GB, torch 2.11 + CUDA 13.0, triton 3.6, transformers 5.17, 16 CPU cores; random
inputs and weights, medians after warm-up. They stand beside ours only for the same sizes on the
same card.
"""

ATTENTION = """\
batch 8 of 1024 px: 21,760 tokens, 8 heads x 32, 4 levels x 4 points; forward / with backward, ms
| implementation | encoder fp32 | encoder fp16 | encoder bf16 | decoder 300, fp32 |
|---|---|---|---|---|
| transformers, grid_sample | 16.8 / 54.9 | 19.5 / 70.5 | 19.4 / 70.3 | 0.71 / 2.12 |
| the same, torch.compile | 22.3 / 45.4 | - | 18.6 / 58.3 | 0.42 / 1.85 |
| original CUDA op | 3.00 / 10.8 | - | - | 0.063 / 0.32 |
| mmcv CUDA op | 2.56 / 12.6 | 3.61 / 29.5 | - | 0.070 / 0.43 |
| DCNv4 FlashDeformAttn | 1.19 / 11.9 | 0.65 / 12.1 | 0.74 / - | wrong at 300 queries |
| msda-triton | 1.86 / 9.8 | 1.58 / 6.25 | - | 0.10 / 0.60 |
Aims: encoder bf16 with backward <= 3.5 ms, fp32 <= 4.5 ms; decoder, 320 queries, <= 0.15 ms."""

STEP = """\
batch 8 of 1024 px, 300 queries, 1,203 labels, AdamW and clipping
| peer | mode | ms | images/s | peak GiB |
|---|---|---|---|---|
| transformers as installed | TF32 / bf16 | 518 / 507 | 15.4 / 15.8 | 42 |
| transformers with the original op, without the encoder's loss | TF32 / bf16 | 320 / 309 | 25.0 / 25.9 | 24 |
| original Deformable DETR | TF32 | 423 | 18.9 | 35 |
Aims: 100 images/s, 20 GiB. Large-scale jitter to 1024 on a CPU: 31.5 images/s a process."""  # noqa: E501

TEACHER = """\
CLIP ViT-B/32 in the loop of a 309 ms step: 20 crops an image +12..19%, 300 crops +37..61%.
Aim: distillation from the cache at most 3% of the step."""

CACHE = """\
| path | crops/s |
|---|---|
| Pillow and CLIP's preprocess, 1 process / 16 workers | 291 / 2,858 |
| roi_align crops (not antialiased) and transformers' CLIP, fp16, end to end | 23,800 |
| encoder: bf16 / compiled / minimal ViT, fused QKV, compiled | 27,900 / 34,500 / 46,600 |
| JPEG 640x480, images/s: nvJPEG in batches / a CPU core | 7,833 / 340-480 |
Aim: 45,000 crops/s from JPEG to sealed Zarr, 300 crops an image."""

INFERENCE = """\
1024 px: transformers with the original op: batch 8 87 ms (92 images/s), batch 1 31-46 ms;
the original: 104 ms, 53 ms. Aims: 300 images/s, 8 ms."""

READER = """\
1,002 images/s (zarr-python), 51,000 (mmap), one process. Aims: 5,000 in memory, Zarr 800."""

SCORING = """\
lvis-api: 28 s for 1,000 images x 300 detections x 1,203 classes on 2 cores. Aim: a tenth."""
