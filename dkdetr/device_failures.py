"""What a device raises of itself: it says nothing of the work it was given, and is never caught."""

import torch

DEVICE_FAILURES: tuple[type[Exception], ...] = (
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),  # since 2.8
)
"""RuntimeErrors all, as a kernel's or a picture's own are. After an AcceleratorError, an illegal
access say, the device answers nothing more: going on would blame whoever asks next."""
