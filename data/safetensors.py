"""A reader and a writer of safetensors: a header's length, the header in JSON, the tensors' bytes.

Whatever such a file says of its types, shapes and offsets is checked against its size.
"""
import json
import math

import torch

DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path):
    """{name: tensor}, views of the file; nothing is allocated that the header asks for."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is cut off or holds no weights; delete it and fetch it again")
        text = file.read(length)
    start = 8 + length
    try:
        header = dict(json.loads(text))
        header.pop("__metadata__", None)
        spans = {name: check_entry(name, entry) for name, entry in header.items()}
        end = check_order(spans.values())
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({error}); fetch it again") from None
    if end != size - start:
        cause = "is cut off" if end > size - start else "has bytes of no tensor"
        raise ValueError(f"{path} {cause}; delete it and fetch it again")
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[start:]
    return {name: view(content[begin:end], header[name]) for name, (begin, end) in spans.items()}


def check_entry(name, entry):
    """Where a tensor begins and ends, if that is as its type and shape say."""
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is {entry['dtype']}, which is none of {', '.join(DTYPES)}")
    for number in (begin, end, *entry["shape"]):
        if type(number) is not int or not 0 <= number < 2 ** 63:
            raise ValueError(f"{name} has {number!r} for a size")
    width = DTYPES[entry["dtype"]].itemsize
    if end - begin != width * math.prod(entry["shape"]):
        raise ValueError(f"{name} has {end - begin} bytes, which are not {entry['shape']}")
    return begin, end


def check_order(spans):
    """Where the last tensor ends; each must begin where the one before it does."""
    last = 0
    for begin, end in sorted(spans):
        if begin != last:
            raise ValueError("tensors overlap or leave gaps")
        last = end
    return last


def view(content, entry):
    """Bytes as a tensor; they are copied where they do not lie as their type must."""
    dtype = DTYPES[entry["dtype"]]
    if content.storage_offset() % dtype.itemsize:
        content = content.clone()
    return content.view(dtype).view(entry["shape"])


def write(file, weights):
    """{name: tensor} into an open file."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + weight.nbytes
        header[name] = dict(dtype=NAMES[weight.dtype], shape=list(weight.shape),
                            data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for weight in weights.values():
        file.write(weight.contiguous().flatten().view(torch.uint8).numpy())
