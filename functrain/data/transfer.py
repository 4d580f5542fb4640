"""Copies of elements on the device where they are used, made beside the work that goes on there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree

# Devices whose copies can go on a stream of their own, from memory that is pinned.
_STREAMING = frozenset({"cuda", "xpu"})


def checked_device(given: Any) -> torch.device:
    """The argument `device` as a device with its index; `ArgumentError` where there is none such."""
    if isinstance(given, bool) or not isinstance(given, (str, int, torch.device)):
        raise ArgumentError(f'device takes a torch.device, or a name such as "cuda:0", got {given!r}')
    try:
        return torch.empty(0, device=given).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArgumentError(f"device={given!r} cannot be used here: {reason}") from error


class Transfer:
    """Copies to one device: a loader sends, whoever takes the element receives.

    On a GPU, copies are made from pinned memory on a stream of their own, next to what is computed. An event says when
    one is done: the receiver's stream waits for it (the program does not), and the copy's memory is not given to others
    before the receiver's stream is done with it. On other devices a copy is made when it is sent.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device) if device.type in _STREAMING else None
        self._stream: Any = self._module.Stream(device) if self._module else None

    def send(self, element: Tree) -> tuple[Tree, Any]:
        """The element with its tensors on the device, and the event to wait for, if any; other leaves stay as they are."""
        with self._beside(element):
            moved = tree.map(self._moved, element)
            return moved, self._stream.record_event() if self._stream else None

    def receive(self, element: Tree, event: Any) -> Tree:
        """The element, for work on the stream that is current where this is called."""
        if event is not None:
            current = self._module.current_stream(self.device)
            current.wait_event(event)
            for leaf in tree.leaves(element):
                if isinstance(leaf, Tensor) and leaf.device == self.device:
                    leaf.record_stream(current)
        return element

    def _beside(self, element: Tree) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        if any(isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in tree.leaves(element)):
            # Made on the loader's stream, and perhaps not yet done. Elsewhere there is nothing to wait for, and to wait for
            # the default stream would be to wait for training.
            self._stream.wait_stream(self._module.current_stream(self.device))
        return self._module.stream(self._stream)

    def _moved(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if self._stream is None:
            return leaf.to(self.device)
        # The allocator keeps pinned memory until the copy out of it is done.
        pinned = leaf.pin_memory() if leaf.device.type == "cpu" and leaf.layout == torch.strided else leaf
        return pinned.to(self.device, non_blocking=True)


__all__ = ["Transfer", "checked_device"]
