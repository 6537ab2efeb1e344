"""gdb -batch -x bench/lab/avx2_only.py --args python COMMAND: ONNX Runtime as on a processor with AVX2 alone.

ONNX Runtime chooses its kernels by what the processor says of itself and has no switch to leave some out. Run by gdb,
this stops the program at every instruction of the library that asks (CPUID, XGETBV) and clears the bits of AVX-512,
AVX-VNNI and AMX in the answer. All of them are asked while the library loads; after that the program runs at full
speed. Processes that it starts are not changed.
"""

import subprocess

import gdb  # type: ignore[import-not-found]  # the module that gdb gives to its scripts

LIBRARY = "onnxruntime_pybind11_state"
CPUID_7 = {"ebx": (16, 17, 21, 28, 30, 31), "ecx": (1, 6, 11, 12, 14), "edx": (8, 22, 23, 24, 25)}  # AVX-512, AMX
CPUID_7_1 = {"eax": (4, 5), "edx": (4, 5, 10)}  # AVX-VNNI, bfloat16 of AVX-512
XGETBV = {"eax": (5, 6, 7)}  # the system saves the registers of AVX-512


def main() -> None:
    for setting in ("pagination off", "confirm off", "print thread-events off"):
        gdb.execute(f"set {setting}")
    for signals in ("all", "SIGINT"):  # they are the program's; "all" leaves out those that gdb uses itself
        gdb.execute(f"handle {signals} nostop noprint pass", to_string=True)
    gdb.execute(f"catch load {LIBRARY}")
    gdb.execute("run")
    asking = find_asking()
    for address in asking:
        gdb.execute(f"break *{address:#x}", to_string=True)
    num_cleared = 0
    gdb.execute("continue", to_string=True)
    while gdb.selected_inferior().pid:
        instruction = asking[value("pc")]
        asked = instruction, value("eax"), value("ecx")
        gdb.execute("stepi", to_string=True)
        match asked:
            case "xgetbv", _, _:
                num_cleared += clear(XGETBV)
            case "cpuid", 7, 0:
                num_cleared += clear(CPUID_7)
            case "cpuid", 7, 1:
                num_cleared += clear(CPUID_7_1)
        gdb.execute("continue", to_string=True)
    print(f"AVX2 alone: {num_cleared} registers changed")


def find_asking() -> dict[int, str]:
    """The addresses, in the process, of the library's instructions that ask: "cpuid" or "xgetbv"."""
    mapped = [
        line.split() for line in gdb.execute("info proc mappings", to_string=True).splitlines() if LIBRARY in line
    ]
    base, path = int(mapped[0][0], 16), mapped[0][-1]
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], check=True, capture_output=True, text=True)
    words = (line.split() for line in listing.stdout.splitlines())
    return {base + int(line[0][:-1], 16): line[1] for line in words if line[1:] in (["cpuid"], ["xgetbv"])}


def value(register: str) -> int:
    return int(gdb.parse_and_eval(f"(unsigned long)${register}")) & (2**64 - 1 if register == "pc" else 2**32 - 1)


def clear(registers: dict[str, tuple[int, ...]]) -> int:
    """Clear bits of registers; how many of them had one set."""
    num_changed = 0
    for register, bits in registers.items():
        before = value(register)
        after = before & ~sum(1 << bit for bit in bits)
        num_changed += after != before
        gdb.execute(f"set ${register} = {after}")
    return num_changed


main()
