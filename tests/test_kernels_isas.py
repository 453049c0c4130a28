"""What EDGEQ_ISA compiles for has nothing that a machine may lack on which the instruction set
runs.
"""

import re

import llvmlite.binding as llvm
import pytest

from edgeq.kernels import isa as isas

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
TRIPLES = [(isa.NAME, X86) for isa in isas.modules().values() if "x86_64" in isa.CPU]
TRIPLES += [(isa.NAME, ARM) for isa in isas.modules().values() if "aarch64" in isa.CPU]

# LLVM may use these unasked, by LLVM's names; what came with AVX2 and AVX-512 is in all that have
# them (psABI's levels x86-64-v3 and v4).
UNASKED = {
    "avx", "avx2", "avx512bf16", "avx512bitalg", "avx512bw", "avx512cd", "avx512dq", "avx512f",
    "avx512fp16", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512vl", "avx512vnni",
    "avx512vpopcntdq", "avxifma", "avxneconvert", "avxvnni", "avxvnniint8", "bmi", "bmi2", "f16c",
    "fma", "fma4", "gfni", "lzcnt", "movbe", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3", "tbm",
    "vpclmulqdq", "xop",
}  # fmt: skip
LEVELS = {"avx2": "x86-64-v3", "avx512f": "x86-64-v4"}


def machine(triple: str, cpu: str = "", features: str = "") -> llvm.TargetMachine:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="static"
    )


def features_of(cpu: str, features: str) -> set[str]:
    """Of those above: LLVM inlines a function only where its caller has all that it has."""
    text = f'target triple = "{X86}"\n'
    for i, name in enumerate(sorted(UNASKED)):
        one = f'"target-cpu"="x86-64" "tune-cpu"="{cpu}" "target-features"="+{name}"'
        all_ = f'"target-cpu"="{cpu}" "target-features"="{features}"'
        text += f"""
            define internal i32 @one{i}(i32 %x) {one} {{ %y = add i32 %x, {i + 1} ret i32 %y }}
            define i32 @all{i}(i32 %x) {all_} {{ %y = call i32 @one{i}(i32 %x) ret i32 %y }}"""
    module = llvm.parse_assembly(text)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine(X86), options)
    passes.getModulePassManager().run(module, passes)
    bodies = {i: str(module.get_function(f"all{i}")) for i in range(len(UNASKED))}
    return {name for i, name in enumerate(sorted(UNASKED)) if "call" not in bodies[i]}


def test_features_are_seen() -> None:
    assert "gfni" in features_of("icelake-server", "")
    assert features_of("x86-64", "") == set()
    assert features_of("x86-64", "+avx") >= {"avx", "ssse3"}


@pytest.mark.parametrize("name", [name for name, triple in TRIPLES if triple == X86])
def test_x86(name: str) -> None:
    isa = isas.modules()[name]
    level = [LEVELS[need] for need in sorted(isa.NEEDS, key=len) if need in LEVELS]
    everywhere = features_of(level[-1] if level else "x86-64", ",".join(f"+{n}" for n in isa.NEEDS))
    cpu, features = isa.CPU["x86_64"], isas.needed(isa)
    assert isa.NEEDS <= features_of(cpu, features) <= everywhere


# What LLVM makes of plain code, on Arm: instructions that a CPU may lack.
PLAIN = """
define <16 x i8> @xor(<16 x i8> %a, <16 x i8> %b, <16 x i8> %c) {
  %d = xor <16 x i8> %a, %b  %e = xor <16 x i8> %d, %c  ret <16 x i8> %e }
define <16 x i8> @clear(<16 x i8> %a, <16 x i8> %b, <16 x i8> %c) {
  %n = xor <16 x i8> %c, splat (i8 -1)
  %d = and <16 x i8> %b, %n  %e = xor <16 x i8> %d, %a  ret <16 x i8> %e }
define <2 x i64> @turn(<2 x i64> %a, <2 x i64> %b) {
  %d = xor <2 x i64> %a, %b
  %e = call <2 x i64> @llvm.fshl.v2i64(<2 x i64> %d, <2 x i64> %d, <2 x i64> splat (i64 7))
  ret <2 x i64> %e }
define <8 x bfloat> @narrow(<8 x float> %a) {
  %b = fptrunc <8 x float> %a to <8 x bfloat>  ret <8 x bfloat> %b }
define <4 x i32> @divide(<4 x i32> %a, <4 x i32> %b) {
  %c = sdiv <4 x i32> %a, %b  ret <4 x i32> %c }
define i32 @smaller(i32 %a, i32 %b) {
  %c = call i32 @llvm.smin.i32(i32 %a, i32 %b)  ret i32 %c }
"""
LACKED = re.compile(r"\b(?:eor3|bcax|xar|rax1|bfcvtn?2?|smin\tw\d+.*|z\d+\.[bhsd])\b")


def plain(cpu: str, features: str = "") -> set[str]:
    module = llvm.parse_assembly(f'target triple = "{ARM}"\n{PLAIN}')
    return set(LACKED.findall(machine(ARM, cpu, features).emit_assembly(module)))


def test_instructions_are_seen() -> None:
    assert {"eor3", "bcax", "bfcvtn"} <= plain("apple-a15")
    assert any(word.startswith("z") for word in plain("neoverse-v2"))


@pytest.mark.parametrize("name", [name for name, triple in TRIPLES if triple == ARM])
def test_arm(name: str) -> None:
    isa = isas.modules()[name]
    assert plain(isa.CPU["aarch64"], isas.needed(isa)) == set()
