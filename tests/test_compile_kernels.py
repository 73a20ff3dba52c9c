"""The machine code of every shipped kernel configuration, made ahead of time: no GPU is needed.

A configuration is right when no register is spilled to memory, the tile fits the shared memory of the GPU, and
attention multiplies on the matrix units. `python tests/test_compile_kernels.py [all]` prints the table.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED_KB = {80: 163, 90: 227}  # per block: CUDA C++ Programming Guide, table of compute capabilities
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA"}  # mma.sync; wgmma, a warp group at a time

POINTERS_32 = ("cu_seqlens_ptr", "slopes_ptr", "lse_ptr", "delta_ptr", "weight_ptr", "bias_ptr")
POINTERS_32 += ("mean_ptr", "rstd_ptr", "partial_ptr")
SCALARS = {"keep_scale": "fp32", "eps": "fp32"}  # all others are i32


def configurations(everything):
    """(file, kernel, arch, dtype, size, None arguments): size is the head size D, or the row length C."""
    found = []
    for arch in (80, 90):
        for dtype in ("bf16", "fp16"):
            for kernel in ("forward", "dq", "dkv"):
                for D in (16, 32, 64, 128) if everything else (64,):
                    found.append(("attention", kernel, arch, dtype, D, ()))
                    if everything:
                        found.append(("attention", kernel, arch, dtype, D, ("slopes_ptr",)))
            if dtype == "fp16" and not everything:
                continue
            for C in (64, 200, 768, 1024, 4096, 8192) if everything else (768,):
                # Dropout and residual; residual alone; neither.
                for none in ((), ("seed_ptr",), ("seed_ptr", "residual_ptr", "z_ptr")):
                    found.append(("layernorm", "forward", arch, dtype, C, none))
                # Both gradients; dx alone, without a residual; dz alone, without dropout.
                for none in ((), ("dz_ptr",), ("seed_ptr", "dx_ptr")):
                    found.append(("layernorm", "backward", arch, dtype, C, none))
    return found


def compile_one(configuration):
    """One row of the table: the configuration and what its machine code takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    file, name, arch, dtype, size, none = configuration
    module = importlib.import_module(f"kernels.{file}")
    kernel = getattr(module, f"{name}_kernel")
    if file == "attention":
        values = module.LAUNCH[name][size, 2]
        launch = {"D": size, **dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values))}
    else:
        launch = module.launch_config(size)
    options = {key: launch.pop(key) for key in ("num_warps", "num_stages") if key in launch}
    constants = {**launch, **dict.fromkeys(none)}
    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            wide = {"seed_ptr": "*i64", "cu_seqlens_ptr": "*i32"}.get(argument, "*fp32")
            signature[argument] = wide if argument in POINTERS_32 or argument == "seed_ptr" else f"*{dtype}"
            aligned[(i,)] = [["tt.divisibility", 16]]  # as PyTorch's allocator gives them
        else:
            signature[argument] = SCALARS.get(argument, "i32")
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([tools / command[0], *command[1:], cubin.name], capture_output=True, text=True).stdout
            for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return {
        "kernel": f"{file}.{name}",
        "arch": arch,
        "dtype": dtype,
        "size": size,
        "without": ",".join(argument.removesuffix("_ptr") for argument in none),
        "launch": str(list({**launch, **options}.values())),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        "matrix": len(re.findall(rf"\b{MATRIX_INSTRUCTION[arch]}\b", sass)),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128\b", sass)),
    }


def main(everything):
    """Compile on all cores; one JSON object a line."""
    sys.path.insert(0, str(ROOT))
    importlib.import_module("kernels")  # once, before the pool forks
    with ProcessPoolExecutor() as pool:
        for row in pool.map(compile_one, configurations(everything)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main("all" in sys.argv[1:])
