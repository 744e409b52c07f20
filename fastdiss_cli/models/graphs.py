"""Replay on a GPU what it has done before: one launch in place of hundreds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import torch
from torch import Tensor

_MOST = 64  # graphs that are kept, each with its input and its results
_CAPTURING = Lock()  # torch captures one graph at a time in a process


class GraphCache:
    """Captures a function as a CUDA graph for each shape of its inputs that comes again.

    A GPU is done with an operation on a small batch before the next one is launched. The first time
    a shape is not captured, because that takes as long as running the function twice.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()
        self._memory: tuple[object, torch.cuda.Stream] | None = None  # that all graphs share
        self._lock = Lock()

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return sum(graph is not None for graph in self._graphs.values())

    def has_seen(self, key: Hashable) -> bool:
        """Return whether a key has been asked for recently; from now on it has."""
        with self._lock:
            known = key in self._graphs
            self._graphs.setdefault(key, None)
            self._graphs.move_to_end(key)
            if len(self._graphs) > _MOST:
                self._graphs.popitem(last=False)
            return known

    def run(
        self, key: Hashable, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return ``function(*inputs)``; one thread at a time, because the inputs have one place.

        Args:
            key: what the function depends on besides, and the shapes of the inputs.
            function: of tensors on the GPU, without waiting for it, under inference mode.
            inputs: copied.
        """
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                if self._memory is None:
                    stream = torch.cuda.Stream(inputs[0].device)
                    self._memory = torch.cuda.graph_pool_handle(), stream
                graph = self._graphs[key] = _Graph(function, inputs, *self._memory)
            return tuple(x.clone() for x in graph.replay(inputs))


class _Graph:
    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        pool: object,
        stream: torch.cuda.Stream,
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        kind = "cuda"
        # what autocast keeps would be freed before the next replay
        uncached = torch.autocast(
            kind,
            torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        # torch takes the current device, which need not be that of the model
        with _CAPTURING, torch.cuda.device(inputs[0].device), uncached:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a first run, in which libraries allocate
                function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
                self.results = function(*self.inputs)

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.results
