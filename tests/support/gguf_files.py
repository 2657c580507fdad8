"""GGUF files as users have them. Needs the package gguf."""

import gguf
import numpy as np
import torch
from builders import original_names

Kind = gguf.GGMLQuantizationType


def packable(name, tensor, kind):
    """As published files have it: matrices are packed, vectors and what is delicate are not."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    delicate = any(part in name for part in ("time_embedding", "head"))
    return tensor.ndim == 2 and tensor.shape[1] % block == 0 and not delicate


def k_quant(values, kind):
    """Random blocks of a K-quant: gguf-py unpacks these but cannot pack them. The scales are set, in float16."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(values.size).integers(0, 256, (values.size // block, size), dtype=np.uint8)
    scales = {Kind.Q4_K: [0, 2], Kind.Q5_K: [0, 2], Kind.Q6_K: [208]}[kind]
    for offset in scales:
        data[:, offset : offset + 2] = np.frombuffer(np.float16(1e-4).tobytes(), dtype=np.uint8)
    return data.reshape(*values.shape[:-1], -1)


def write_gguf(path, weights, kind, prefix="", pack=gguf.quants.quantize):
    """The original names, as published files have them; returns what the packed weights stand for in float32."""
    writer = gguf.GGUFWriter(path, "wan")
    meant = {}
    for name, tensor in original_names(weights).items():
        stored = kind if packable(name, tensor, kind) else Kind.F16 if name.endswith("head.weight") else Kind.F32
        values = pack(tensor.numpy(), stored) if stored == kind else gguf.quants.quantize(tensor.numpy(), stored)
        writer.add_tensor(prefix + name, values, raw_dtype=stored)
        meant[name] = torch.from_numpy(gguf.quants.dequantize(values, stored).astype(np.float32)).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant
