"""A reader of GGUF files, version 2 and 3: their metadata, and tensors of four types as float32.

Whatever such a file says of its counts, lengths and offsets is checked against its size.
"""
import math
import struct

import numpy as np

STRING = 8
ARRAY = 9
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}    # as struct names them
BLOCK = 32                         # values that share a scale in the last two types
TYPES = {                          # number: name, and what a value or a block of them is made of
    0: ("F32", np.dtype("<f4")),
    1: ("F16", np.dtype("<f2")),
    3: ("Q4_1", np.dtype([("scale", "<f2"), ("least", "<f2"), ("steps", "u1", BLOCK // 2)])),
    8: ("Q8_0", np.dtype([("scale", "<f2"), ("steps", "i1", BLOCK)]))}


class Reader:
    """The values of a file, one after the other; one that ends beyond the file is a ValueError."""

    def __init__(self, content):
        self.content = content
        self.at = 0

    def take(self, count):
        if count > len(self.content) - self.at:
            raise ValueError("it is cut off, or a length in it is wrong")
        self.at += count
        return self.content[self.at - count:self.at]

    def number(self, kind):
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def text(self):
        return self.take(self.number("Q")).tobytes().decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner = self.number("I")
            count = self.number("Q")
            if inner == STRING:
                return [self.text() for _ in range(count)]        # ends where the file does
            letter = known(NUMBERS, inner, "array")
            content = self.take(count * struct.calcsize("<" + letter))
            return np.frombuffer(content, "<" + letter).tolist()
        return self.number(known(NUMBERS, kind, "value"))


def known(table, number, what):
    if number not in table:
        read = ", ".join(map(str, table))
        raise ValueError(f"it has a {what} of type {number}; nanoSEA reads {read}")
    return table[number]


def read(path):
    """A file -> {key: value}, {name: float32 array}; a ValueError says what is wrong with it."""
    try:
        if path.stat().st_size < 24:
            raise ValueError("it is too short for a GGUF file")
        return parse(Reader(np.memmap(path, np.uint8, "r")))
    except (ValueError, struct.error, OSError) as error:
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from None


def parse(reader):
    if reader.take(4).tobytes() != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; nanoSEA reads 2 and 3")
    tensors = reader.number("Q")
    values = reader.number("Q")
    metadata = {}
    for _ in range(values):
        key = reader.text()
        metadata[key] = reader.value(reader.number("I"))
    infos = [tensor_info(reader) for _ in range(tensors)]
    # The tensors' bytes begin at the next multiple of the alignment.
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2 ** 16:
        raise ValueError(f"its alignment is {alignment!r}")
    reader.take(-reader.at % alignment)
    content = reader.take(len(reader.content) - reader.at)
    if sum(size for *_, size in infos) > len(content):
        raise ValueError("it is cut off, or its tensors overlap")
    return metadata, {name: tensor(content, *rest) for name, *rest in infos}


def tensor_info(reader):
    """The entry of a tensor: name, shape, its type's number, and where its bytes are."""
    name = reader.text()
    dimensions = reader.number("I")
    if not 1 <= dimensions <= 4:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = [reader.number("Q") for _ in range(dimensions)]       # the innermost first
    number = reader.number("I")
    offset = reader.number("Q")
    kind, layout = known(TYPES, number, f"tensor {name}")
    values = BLOCK if kind.startswith("Q") else 1
    if shape[0] % values:
        raise ValueError(f"{name} has rows of {shape[0]} values, which {kind} cannot hold")
    size = math.prod(shape) // values * layout.itemsize
    return name, shape[::-1], number, offset, size


def tensor(content, shape, number, offset, size):
    """Bytes as float32 values."""
    if offset + size > len(content):
        raise ValueError("it is cut off, or an offset in it is wrong")
    kind, layout = TYPES[number]
    stored = content[offset:offset + size].view(layout)
    if not kind.startswith("Q"):
        return stored.astype(np.float32).reshape(shape)
    scale = stored["scale"].astype(np.float32)[:, None]
    if kind == "Q8_0":
        return (scale * stored["steps"]).reshape(shape)
    # Two steps a byte: the lower halves are a block's first 16 values, the upper ones the rest.
    steps = np.concatenate([stored["steps"] & 15, stored["steps"] >> 4], axis=1)
    return (scale * steps + stored["least"].astype(np.float32)[:, None]).reshape(shape)
