"""CUDA graphs: replay a batch of a known shape with one launch instead of hundreds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import torch
from torch import Tensor

_MOST = 64  # graphs that are kept, each with its inputs and results
_CAPTURING = Lock()  # torch captures one graph at a time in a process


class GraphCache:
    """Capture a function as a CUDA graph for every input shape that is seen more than once.

    On a small batch a GPU finishes an operation before the next one is launched. A shape is not
    captured the first time, because capturing takes at least as long as running the function twice.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()
        self._memory: tuple[object, torch.cuda.Stream] | None = None  # shared by all graphs
        self._lock = Lock()

    @property
    def captured(self) -> int:
        """The number of captured graphs."""
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
        """Return ``function(*inputs)``, one thread at a time: graphs read fixed input buffers.

        Args:
            key: the shapes of the inputs, and whatever else the function depends on.
            function: works on GPU tensors without synchronising, in inference mode.
            inputs: copied into the buffers.
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
        # casts in autocast's cache would be freed before the next replay
        uncached = torch.autocast(
            kind,
            torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        # torch captures on the current device, which need not be the model's
        with _CAPTURING, torch.cuda.device(inputs[0].device), uncached:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a warm-up run, in which libraries allocate
                function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
                self.results = function(*self.inputs)

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.results
