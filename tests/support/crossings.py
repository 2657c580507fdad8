"""Who waits for the device."""

from torch.utils._python_dispatch import TorchDispatchMode

from rolling_kv.bench.gauges import tensors_in


class Crossings(TorchDispatchMode):
    """Notes each operation that copies between the devices, and whether somebody waits for it."""

    def __init__(self):
        super().__init__()
        self.waiting, self.free = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given, made = tensors_in((args, kwargs)), tensors_in(result)
        # Numbers, which CPU tensors without dimensions are, go along with any operation between others.
        calculating = len(given) > 1 and "copy" not in str(function)
        devices = {tensor.device.type for tensor in given + made if tensor.ndim or not calculating}
        if "check_errors" in str(function):  # torch.linalg reads on the CPU whether the device has failed
            self.waiting.append(str(function))
        if len(devices) > 1:
            (self.free if kwargs.get("non_blocking") else self.waiting).append(str(function))
        return result
