"""The names of the open-vocabulary COCO protocol (OV-COCO 48/17).

Source: Zareian et al., Open-Vocabulary Object Detection Using Captions (CVPR 2021), after Bansal
et al., Zero-Shot Object Detection (ECCV 2018); 15 of COCO's 80 names take no part in it.
"""

OVCOCO_BASE = frozenset(
    {
        "person", "bicycle", "car", "motorcycle", "train", "truck", "boat", "bench", "bird",
        "horse", "sheep", "bear", "zebra", "giraffe", "backpack", "handbag", "suitcase", "frisbee",
        "skis", "kite", "surfboard", "bottle", "fork", "spoon", "bowl", "banana", "apple",
        "sandwich", "orange", "broccoli", "carrot", "pizza", "donut", "chair", "bed", "toilet",
        "tv", "laptop", "mouse", "remote", "microwave", "oven", "toaster", "refrigerator", "book",
        "clock", "vase", "toothbrush",
    }
)  # fmt: skip

OVCOCO_NOVEL = frozenset(
    {
        "airplane", "bus", "cat", "dog", "cow", "elephant", "umbrella", "tie", "snowboard",
        "skateboard", "cup", "knife", "cake", "couch", "keyboard", "sink", "scissors",
    }
)  # fmt: skip

assert len(OVCOCO_BASE) == 48
assert len(OVCOCO_NOVEL) == 17
assert not OVCOCO_BASE & OVCOCO_NOVEL
