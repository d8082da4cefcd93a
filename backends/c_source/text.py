"""The text of model.h, model.c and model_test.c."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxcompress.meta import tensor_meta

from ..native.planner import PlannedStep, Planner
from ..native.views import View
from .core import Core, Port
from .definitions import Definitions, wrapped

if TYPE_CHECKING:
    from .export import CSource

_C_TYPES = {
    torch.uint8: "uint8_t", torch.int8: "int8_t", torch.bool: "uint8_t", torch.int32: "int32_t", torch.int64: "int64_t",
}  # fmt: skip


def _signature(name: str, core: Core) -> str:
    arguments = [f"const {_C_TYPES[p.dtype]} *{p.name}" for p in core.inputs]
    arguments += [f"{_C_TYPES[p.dtype]} *{p.name}" for p in core.outputs]
    return f"int {name}_run({', '.join(arguments)})"


def _shape(port: Port) -> str:
    return "{" + ", ".join(map(str, port.shape)) + "}"


# -------------------------------------------------------------------------------------------------------- header


def header_text(name: str, core: Core, source: CSource) -> str:
    prefix = name.upper()
    ports = [_macros(f"{prefix}_INPUT{i}", p) for i, p in enumerate(core.inputs)]
    ports += [_macros(f"{prefix}_OUTPUT{i}", p) for i, p in enumerate(core.outputs)]
    return f"""/* An integer-only network, written by fxcompress. Compile with any C99 compiler:

       cc -std=c99 -O2 -c {name}.c fxc_kernels.c
       cc -std=c99 -O2 -o {name}_test {name}_test.c {name}.c fxc_kernels.c && ./{name}_test

   No heap, no floating point. One call at a time: the arena is static. A value stands for scale * (value - zero_point); the macros of
   scales are for the application, no code here reads them. */

#ifndef {prefix}_H
#define {prefix}_H

#include <stdint.h>

#define {prefix}_FLASH_BYTES {source.flash_bytes} /* weights {source.weight_bytes}, other constants {source.constant_bytes}, parameters {source.parameter_bytes} (32-bit pointers) */
#define {prefix}_ARENA_BYTES {source.arena_bytes} /* static; inputs take {source.input_bytes} and outputs {source.output_bytes} bytes of the caller */

{"".join(ports)}
#ifdef __cplusplus
extern "C" {{
#endif

/* 0, or the number of indices outside an embedding table. Tensors are dense, shapes as above, last dimension innermost. */
{_signature(name, core)};

#ifdef __cplusplus
}}
#endif
#endif
"""


def _macros(prefix: str, port: Port) -> str:
    lines = [
        f"/* {port.name}: {_C_TYPES[port.dtype]} {_shape(port)}{', channels last' if port.moved else ''} */",
        f"#define {prefix}_SIZE {port.elements}",
        f"#define {prefix}_SHAPE {_shape(port)}",
    ]
    if port.scale is not None:
        lines += [_macro(f"{prefix}_SCALE", port.scale), _macro(f"{prefix}_ZERO_POINT", port.zero_point)]
    return "\n".join(lines) + "\n\n"


def _macro(name: str, value: Tensor) -> str:
    values = [repr(v) for v in value.flatten().tolist()]
    return f"#define {name} {values[0]}" if len(values) == 1 else f"#define {name}S {{{', '.join(values)}}}"


# -------------------------------------------------------------------------------------------------------- source


def source_text(name: str, planner: Planner, definitions: Definitions, core: Core) -> str:
    calls = [_call(step, planner, definitions, core) for step in planner.steps]
    has_arena = any("arena.bytes" in call for call in calls)
    counts = any("&bad_indices" in call for call in calls)
    arena = (
        f"\nstatic union {{ int64_t aligned; uint8_t bytes[{name.upper()}_ARENA_BYTES]; }} arena;\n"
        if has_arena
        else ""
    )
    unused = [f"  (void){p.name};\n" for p in core.inputs if not any(p.name in call for call in calls)]
    body = "".join([*unused, "  int32_t bad_indices = 0;\n" if counts else "", *calls])
    return f"""/* An integer-only network, written by fxcompress: see {name}.h. */

#include "{name}.h"

#include <stddef.h>

#include "fxc_kernels.h"

{definitions.text()}{arena}
{_signature(name, core)} {{
{body}  return {"bad_indices" if counts else "0"};
}}
"""


def _call(step: PlannedStep, planner: Planner, definitions: Definitions, core: Core) -> str:
    """One step: a comment with its place in the user's model, its inputs, the call of its kernel."""
    params = definitions.struct(step.params, step.node.name)
    inputs = [_address(view, planner, definitions, core, step.node.name) for view in step.inputs]
    out = _address(step.out, planner, definitions, core, step.node.name)
    units, op = step.kernel.units(step.params), step.kernel.op
    origin = str(tensor_meta(step.node).origin).replace("*/", "* /")
    place = "" if origin == "<graph>" else f", {origin}"
    call = f"fxc_{op}_scalar(&{params}, {'in' if inputs else 'NULL'}, {out}, 0, {units}, NULL);"
    operands = f"    const void *in[{len(inputs)}];\n" if inputs else ""
    operands += "".join(f"    in[{i}] = {a};\n" for i, a in enumerate(inputs))
    return f"  {{ /* {step.node.name}{place} */\n{operands}    {call}\n  }}\n"


def _address(view: View, planner: Planner, definitions: Definitions, core: Core, hint: str) -> str:
    buffer, offset = view.buffer, view.byte_offset
    if buffer is planner.counters["index"]:
        return "&bad_indices"
    if buffer.fixed is not None:
        return definitions.address(buffer.fixed + offset, f"{hint}_weight", is_weight=True)
    if buffer.external is not None:
        name = [*core.inputs, *core.outputs][buffer.external].name
        offset //= view.tensor.element_size()
        return f"{name} + {offset}" if offset else name
    return f"arena.bytes + {buffer.offset + offset}"


# -------------------------------------------------------------------------------------------------------- test


def test_text(name: str, core: Core, inputs: list[list[Tensor]], outputs: list[list[Tensor]]) -> str:
    """``inputs[call][i]`` and ``outputs[call][i]`` are the tensors of one recorded call."""
    arrays = [_recorded(f"given_{p.name}", [call[i] for call in inputs]) for i, p in enumerate(core.inputs)]
    arrays += [_recorded(f"expected_{p.name}", [call[i] for call in outputs]) for i, p in enumerate(core.outputs)]
    found = "".join(f"  static {_C_TYPES[p.dtype]} {p.name}[{p.elements}];\n" for p in core.outputs)
    arguments = [f"given_{p.name}[call]" for p in core.inputs] + [p.name for p in core.outputs]
    checks = "".join(
        f"    wrong += memcmp({p.name}, expected_{p.name}[call], sizeof {p.name}) != 0;\n" for p in core.outputs
    )
    return f"""/* Runs recorded calls of {name}_run and compares every output value: exit status 0 if all are equal. */

#include <stdio.h>
#include <string.h>

#include "{name}.h"

enum {{ CALLS = {len(inputs)} }};

{"".join(arrays)}
int main(void) {{
{found}  int call, wrong = 0;
  for (call = 0; call < CALLS; ++call) {{
    wrong += {name}_run({", ".join(arguments)}) != 0;
{checks}  }}
  printf("%d calls, %d wrong\\n", CALLS, wrong);
  return wrong != 0;
}}
"""


def _recorded(name: str, calls: list[Tensor]) -> str:
    rows = "},\n{".join(wrapped(t.to(torch.uint8) if t.dtype == torch.bool else t) for t in calls)
    return f"static const {_C_TYPES[calls[0].dtype]} {name}[CALLS][{calls[0].numel()}] = {{{{\n{rows}}}}};\n"
