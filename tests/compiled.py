"""torch.compile without a compiler: graphs are traced and counted, and run by torch as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import fx, nn


@contextmanager
def counted_graphs(fullgraph: bool = True) -> Iterator[list[fx.GraphModule]]:
    """Let modules that are compiled inside of the context use the backend aot_eager, and yield the list of its graphs.

    fullgraph: raise an error where a graph breaks.
    """
    graphs: list[fx.GraphModule] = []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def compile_module(module: nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, fullgraph=fullgraph)

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", compile_module)
        yield graphs
    torch._dynamo.reset()
