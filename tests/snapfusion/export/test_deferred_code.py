"""Graphs whose Python code is generated when they are called."""

import operator

from torch.fx import GraphModule, symbolic_trace

from snapfusion.export.deferred_code import deferred_code


def test_code_is_generated_by_the_first_call_after_a_change():
    with deferred_code():
        graph = symbolic_trace(lambda x: x + 2)
        (addition,) = (node for node in graph.graph.nodes if node.op == "call_function")
        assert graph(3) == 5
        addition.target = operator.mul
        graph.recompile()
        assert "def forward" not in str(graph)
        assert graph(3) == 6
        assert "x * 2" in graph.code
        later = symbolic_trace(lambda x: -x)
    assert later(3) == -3


def test_graphs_are_compiled_at_once_outside():
    before = GraphModule.recompile
    with deferred_code():
        assert GraphModule.recompile is not before
    assert GraphModule.recompile is before
    assert "x + 2" in symbolic_trace(lambda x: x + 2).code
