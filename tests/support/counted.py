"""Kernels and bytes of what torch is asked for, counted from the operations alone: nothing is computed on the meta device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("addmm", "mm", "linear", "_addmm_activation", "bmm", "_scaled_mm")
NOTHING = ("empty", "empty_like", "_unsafe_view", "detach")


class Counted(TorchDispatchMode):
    """Counts what runs inside: kernels beside the matrix products, and the bytes that each of them reads and writes.

    kernels: (name, bytes) of each, in their order. products: names of the matrix products. inside: whether it counts now.
    """

    def __init__(self):
        super().__init__()
        self.kernels: list[tuple[str, int]] = []
        self.products: list[str] = []
        self.inside = False

    def __enter__(self):
        self.inside = True
        return super().__enter__()

    def __exit__(self, *error):
        self.inside = False
        return super().__exit__(*error)

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.kernels)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            self.products.append(name)
        elif name not in NOTHING and not _is_view(func):
            self.kernels.append((name, _traffic(func, name, args, kwargs or {}, result)))
        return result


def _is_view(func) -> bool:
    return any(made.alias_info is not None and not made.alias_info.is_write for made in func._schema.returns)


def _traffic(func, name, args, kwargs, result) -> int:
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    moved = 0
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not written or (argument.name == "self" and name != "copy_")
        moved += (read + written) * _nbytes(given.get(argument.name))
    fresh = all(made.alias_info is None for made in func._schema.returns)
    return moved + (_nbytes(result) if fresh else 0)


def _nbytes(values) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
