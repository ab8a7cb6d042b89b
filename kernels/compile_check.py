"""Compile every Triton kernel for an H100/H200 (sm_90) without a GPU: `python -m longtake.kernels.compile_check`.

Prints registers, shared memory and local memory of each variant; exits 1 if one does not compile, spills, wants more
shared memory than a program can have, or has a matrix product too short for its layout. Must run without
TRITON_INTERPRET.
"""

# Triton has no type stubs.
# mypy: disable-error-code="import-untyped, no-untyped-call"
from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longtake.kernels.compile_cases import (
    UNALIGNED,
    Case,
    cases,
    fp8_cases,
    other_cases,
    principal_cases,
    transform_cases,
)

SHARED_BYTES = 227 << 10  # that a program can have on an H100 or H200


def compile_case(case: Case) -> Any:
    """Compile one variant; pointers and strides count as multiples of 16, as the wrappers ensure."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            constants[(i,)] = case.constants[name]
        else:
            signature[name] = case.types[name]
            if name not in UNALIGNED:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case.options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers, stack and local bytes of a compiled kernel, as the disassembler reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def short_products(compiled: Any) -> list[str]:
    """Products over fewer terms than their operands' layout spans, "16 of 64": Triton to 3.7 may count some twice.

    mma.sync takes 8 kWidth terms of a layout, and Triton chooses kWidth by the narrowest type that an operand was
    computed from, whatever the product's length (mended by its pull request 11691). Its interpreter is right.
    """
    operand = r"tt\.dot .*?tensor<\d+x(\d+)x\w+, #ttg\.dot_op<{opIdx = 0, parent = #\w+, kWidth = (\d+)}>>"
    found = [(int(terms), 8 * int(width)) for terms, width in re.findall(operand, compiled.asm["ttgir"])]
    return [f"{terms} of {span}" for terms, span in found if terms < span]


def main() -> int:
    """Compile all cases (or those whose name holds --only); print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="part of a name")
    only = parser.parse_args().only
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("compile_check compiles: unset TRITON_INTERPRET.")
    refused = 0
    print(
        f"{'kernel':<28}{'registers':>10}{'shared':>8}{'local':>7}{'16 B loads':>12}{'16 B stores':>13}{'smaller':>9}"
    )
    for case in chain(cases(), transform_cases(), principal_cases(), fp8_cases(), other_cases()):
        if only not in case.name:
            continue
        compiled = compile_case(case)
        used = resources(compiled)
        local = used["STACK"] + used["LOCAL"]
        short = short_products(compiled)
        refused += local > case.local or compiled.metadata.shared > SHARED_BYTES or bool(short)
        accesses = re.findall(r"\b(ld|st)\.global\.([\w.:]*)", compiled.asm["ptx"])
        wide = [kind for kind, shape in accesses if "v4.b32" in shape or "v2.b64" in shape]
        print(
            f"{case.name:<28}{used['REG']:>10}{compiled.metadata.shared:>8}{local:>7}"
            f"{wide.count('ld'):>12}{wide.count('st'):>13}{len(accesses) - len(wide):>9}"
            + "".join(f"  product of {terms} terms" for terms in short)
        )
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
