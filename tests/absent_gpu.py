"""GPUs that are not here: Triton compiles for them, and nothing is launched."""

import subprocess
from pathlib import Path


class AbsentGPU:
    """What Triton asks a driver for while it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a device of its own: Triton remembers what it compiled for one

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes, path: Path) -> str:
    """What a compiled kernel takes: its stack is where registers spill to."""
    import triton

    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-res-usage", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
