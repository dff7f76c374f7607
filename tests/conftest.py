"""The tests find the repository's files; without a GPU the kernels run in Triton's interpreter."""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)      # the sizes here are small: more threads only wait for each other
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# How a test starts processes: forked ones need not import torch once more, but cannot take over a GPU.
HOW = "spawn" if torch.cuda.is_available() or sys.platform != "linux" else "fork"
