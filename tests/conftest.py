"""For all tests: shapes and types of dkdetr's functions are checked, torch keeps to one thread."""

import os

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before any test module imports dkdetr: the hook only sees modules imported after it. Its shapes
# hold in tests alone; users pay nothing for them.
install_import_hook("dkdetr", "shape_checks.checked")
torch.set_num_threads(1)
# In a job that Slurm has put back, whoever meets a lock waits for it.
os.environ.pop("SLURM_RESTART_COUNT", None)

# The same examples in every run, and no deadline: a busy machine is not a failure.
settings.register_profile("dkdetr", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("dkdetr")
