"""The tests find the repository's files; without a GPU the kernels run in Triton's interpreter."""
import dataclasses
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
def quick_interpreter():
    """Half of what Triton's interpreter does is to no purpose here. Compiled code is as it is."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    # A tl.sort takes it a second: numpy sorts for it.
    def sort(x, dim):
        handle = interpreter.TensorHandle(np.sort(x.handle.data, axis=dim), x.handle.dtype)
        return tl.core.tensor(handle, x.type)
    tl.sort = sort

    # It works out which integers overflow, and without its option debug tells nobody.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # It puts itself in the place of tl's functions at every call of a function in a kernel: once is enough.
    patch = interpreter._patch_lang

    def patch_once(function):
        libraries = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        if any(tl.core.is_builtin(library.load) for library in libraries):
            return patch(function)
    interpreter._patch_lang = patch_once
