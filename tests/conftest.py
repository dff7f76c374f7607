"""The tests find the repository's files; without a GPU the kernels run in Triton's interpreter."""
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)      # the sizes here are small: more threads only wait for each other
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def quick_sort():
    """Triton's interpreter takes a second for a tl.sort; here numpy sorts for it. Compiled code is as it is."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        def sort(x, dim):
            return tl.core.tensor(TensorHandle(np.sort(x.handle.data, axis=dim), x.handle.dtype), x.type)
        tl.sort = sort
