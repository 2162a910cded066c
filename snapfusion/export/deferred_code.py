"""Keeps torch from generating Python code for graphs that are only interpreted.

A lowering rewrites a module's graph in dozens of passes, and once for each call of a delegate. After each
change torch writes the source of a `forward` and compiles it, although the passes interpret the graph: a
fifth of the time that an 8-bit UNet takes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule
from torch.fx.graph import _PyTreeCodeGen


@contextlib.contextmanager
def deferred_code() -> Iterator[None]:
    """Within it, a graph's `forward` is generated when it is first called after a change."""
    generate = GraphModule.recompile

    def forward(module: GraphModule, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - of any graph
        generate(module)
        return type(module).forward(module, *args, **options)

    def defer(module: GraphModule) -> None:
        codegen = module.graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            module._in_spec, module._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
        # Debug messages are formatted with the source, whether or not they are shown.
        module._code = ""
        # Each graph module has a class of its own.
        type(module).forward = forward

    GraphModule.recompile = defer  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        GraphModule.recompile = generate  # type: ignore[method-assign]
