"""The machine code of every kernel configuration we ship, compiled ahead of time: no GPU is needed.

A configuration passes if no register spills, its tile fits the GPU's shared memory, and attention multiplies on the
matrix units. `python -m tests.test_compile_kernels [all]` prints the table.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A100; consumer Ampere; Ada; H100 and H200; B200; consumer Blackwell.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Per block: CUDA C++ Programming Guide, table of compute capabilities.
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# mma.sync; wgmma, by whole warp groups; tcgen05, with accumulators in tensor memory.
MATRIX_INSTRUCTION = {**dict.fromkeys(ARCHITECTURES, "HMMA"), 90: "HGMMA", 100: "UTC[A-Z]*MMA"}

TYPES = {  # of arguments; other pointers have the tensors' dtype, other scalars are i32
    **dict.fromkeys(("slopes_ptr", "lse_ptr", "delta_ptr"), "*fp32"),
    **dict.fromkeys(("weight_ptr", "bias_ptr", "x_bias_ptr", "mean_ptr", "rstd_ptr", "partial_ptr"), "*fp32"),
    "loss_ptr": "*fp32",
    **dict.fromkeys(("gradient_ptr", "momentum_ptr", "found_inf_ptr"), "*fp32"),
    **dict.fromkeys(("keep_scale", "eps", "beta", "rest", "shrink", "scale"), "fp32"),
    **dict.fromkeys(("cu_seqlens_ptr", "windows_ptr"), "*i32"),
    **dict.fromkeys(("seed_ptr", "labels_ptr"), "*i64"),
}
ROWS = {"kv_desc": "BLOCK_N", "q_desc": "BLOCK_M", "dout_desc": "BLOCK_M"}  # of a descriptor's tiles in attention_flash
FP8 = {  # of arguments in the FP8 configurations, whose other tensors are bf16
    **dict.fromkeys(("out_ptr", "q_ptr", "q_t_ptr"), "*fp8e4nv"),
    "dx_ptr": "*fp8e5",
    "scale_ptr": "*fp32",
    "amax_ptr": "*i32",
    "out_t_ptr": "*fp8e4nv",
    "dx_t_ptr": "*fp8e5",
}
ONLY_FP8 = {"scale_ptr", "amax_ptr", "out_t_ptr", "dx_t_ptr"}  # None in the others


def configurations(everything):
    """(file, kernel, arch, dtype, size, arguments that are None); size: D, C, V or F, whichever the kernel has."""
    found = []
    for arch in ARCHITECTURES if everything else (80, 90, 120):
        for dtype in ("bf16", "fp16", "fp32") if everything else ("bf16",):
            for kernel in ("forward", "dq", "dkv"):
                for D in (16, 32, 64, 128) if everything else (64,):
                    found.append(("attention_flash", kernel, arch, dtype, D, ()))
                if everything:
                    found.append(("attention_flash", kernel, arch, dtype, 64, ("slopes_ptr",)))
    for dtype in ("bf16", "fp16") if everything else ("bf16",):
        for kernel in ("forward", "backward"):
            for D in (16, 32, 64) if everything else (64,):
                for none in ((), ("windows_ptr",), ("slopes_ptr",))[: None if everything else 1]:
                    found.append(("attention_window", kernel, 90, dtype, D, none))
    for arch in ARCHITECTURES if everything else (80, 90):
        for dtype in ("bf16", "fp16", "fp32") if everything else ("bf16",):
            for C in (64, 200, 768, 1024, 4096, 8192) if everything else (768,):
                # Dropout and residual; residual alone; neither.
                neither = ("x_bias_ptr", "seed_ptr", "residual_ptr", "z_ptr")
                for none in ((), ("seed_ptr",), neither)[: None if everything else 2]:
                    found.append(("layernorm", "forward", arch, dtype, C, none))
                # Both gradients; dz alone, without dropout; dx alone, without a residual.
                for none in ((), ("seed_ptr", "dx_ptr"), ("dz_ptr", "dnext_ptr"))[: None if everything else 2]:
                    found.append(("layernorm", "backward", arch, dtype, C, none))
            for V in (64, 30_528, 32_768) if everything else (30_528,) if dtype == "bf16" else ():
                found.append(("cross_entropy", "cross_entropy", arch, dtype, V, ()))
            for F in (48, 3072, 4096) if everything else (3072,):
                for none in ((), ("seed_ptr",))[: None if everything else 1]:
                    found += [("geglu", kernel, arch, dtype, F, none) for kernel in ("forward", "backward")]
            if dtype == "bf16":
                found += [("muon", kernel, arch, dtype, 0, ()) for kernel in ("look_ahead", "move")]
    for arch in (89, 90, 100, 120) if everything else (90,):
        found += [("geglu", kernel, arch, "fp8", 3072, ()) for kernel in ("forward", "backward")]
        for C in (768, 1024, 3072) if everything else (768,):
            found += [("fp8", "quantize", arch, "fp8", C, none) for none in ((), ("partial_ptr",))]
    return found


def compile_one(configuration):
    """One row of the table: the configuration and what its machine code uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    file, name, arch, dtype, size, none = configuration
    module = importlib.import_module(f"kernels.{file}")
    kernel = getattr(module, f"{name}_kernel")
    element_size = 4 if dtype == "fp32" else 2
    if file == "attention_flash":
        launch = {"D": size, **module.launch_config(name, size, element_size, arch // 10)}
    elif file == "attention_window":
        launch = {"H": 12, "D": size, "BLOCK": module.BLOCK, **module.LAUNCH[name]}
    elif file == "muon":
        launch = {"BLOCK": module.BLOCK}
    else:
        launch = (module.launch_config_fp8 if dtype == "fp8" else module.launch_config)(size)
        if (file, name) == ("layernorm", "backward"):
            launch["SUM_DX"] = True
    options = {key: launch.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in launch}
    types, element = (TYPES | FP8, "bf16") if dtype == "fp8" else (TYPES, dtype)
    if dtype != "fp8":
        none = (*none, *(ONLY_FP8 & set(kernel.arg_names)))
    if file == "attention_flash" and not module.takes_descriptors(element_size, arch // 10):
        none = (*none, *(argument for argument in kernel.arg_names if argument.endswith("_desc")))
    constants = {**launch, **dict.fromkeys(none)}
    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_desc"):
            rows = launch["BLOCK"] if file == "attention_window" else launch[ROWS[argument]]
            signature[argument] = f"tensordesc<{element}[{rows},{size}]>"
        elif argument.endswith("_ptr"):
            signature[argument] = types.get(argument, f"*{element}")
            aligned[(i,)] = [["tt.divisibility", 16]]  # as from PyTorch's allocator
        else:
            signature[argument] = types.get(argument, "i32")
            if argument == "numel":  # a multiple of 16 in any matrix of ours, which Triton notices at each launch
                aligned[(i,)] = [["tt.divisibility", 16]]
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
        "file": file,
        "kernel": name,
        "arch": arch,
        "dtype": dtype,
        "size": size,
        "without": ",".join(argument.removesuffix("_ptr") for argument in none if argument not in ONLY_FP8),
        "launch": str(list({**launch, **options}.values())),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        "matrix": len(re.findall(rf"\b{MATRIX_INSTRUCTION[arch]}\b", sass)),
        "fp8_moves": len(re.findall(r"convert_layout.*xf8", compiled.asm["ttgir"])),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128\b|\bUTMALDG\b", sass)),
    }


def compile_in_subprocess(*arguments):
    """Rows of the table. In a process of its own: with TRITON_INTERPRET set on import, triton cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_compile_kernels", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def faults(row):
    found = []
    # LayerNorm may spill in fp32, which bf16 training never uses.
    if (row["stack"] or row["local"]) and not (row["dtype"] == "fp32" and row["file"] == "layernorm"):
        found.append("spills registers")
    if row["shared"] > SHARED_KB[row["arch"]] * 1024:
        found.append("uses too much shared memory")
    if row["file"].startswith("attention") and row["dtype"] != "fp32" and not row["matrix"]:
        found.append("does not use the matrix units")
    if row["fp8_moves"]:
        found.append("changes the layout of an FP8 tile, which on Hopper stores wrong bytes (see kernels/fp8.py)")
    if not row["wide_loads"]:
        found.append("has no 16-byte load")
    return found


def check_table(rows):
    for row in rows:
        print(row)
    assert not [(faults(row), row) for row in rows if faults(row)]


def test_configurations_in_common_use():
    check_table(compile_in_subprocess())


@pytest.mark.slow
def test_all_configurations():
    check_table(compile_in_subprocess("all"))


def test_a_spill_would_be_noticed():
    """dq with rows of 128 elements in half the threads needs more than 255 registers."""
    (row,) = compile_in_subprocess("spill")
    assert "spills registers" in faults(row)


def main(which):
    """Compile on all cores, and print one JSON object per line."""
    module = importlib.import_module("kernels.attention_flash")  # once, before the pool forks
    chosen = configurations(which == "all")
    if which == "spill":
        module.LAUNCH["dq"][128, 2] = (128, 64, 4, 1)
        chosen = [("attention_flash", "dq", 80, "bf16", 128, ())]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for row in pool.map(compile_one, chosen):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["common"])
