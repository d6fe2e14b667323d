"""The counting on small HLO texts by numbers worked out by hand; and all scripts, compiled for a GPU."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmark import gpu_compile

H100 = gpu_compile.GPUS["h100"]
PATH = str(ROOT / "benchmark" / "gpu_compile.py")


def count(text):
    """{name: kernel} of a text, whose kernels have different names."""
    kernels = gpu_compile.count_kernels(text)
    by_name = {kernel.name: kernel for kernel in kernels}
    assert len(by_name) == len(kernels)
    return by_name


FUSION = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%fused_add (p.0: f32[8,4], p.1: f32[4]) -> f32[8,4] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = f32[4]{0} parameter(1)
  %wide = f32[8,4]{1,0} broadcast(%p.1), dimensions={1}
  ROOT %add = f32[8,4]{1,0} add(%p.0, %wide)
}

ENTRY %main (x: f32[8,4], b: f32[4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %renamed = f32[4]{0} bitcast(%b)
  ROOT %loop_add_fusion.3 = f32[8,4]{1,0} fusion(%x, %renamed), kind=kLoop, calls=%fused_add, metadata={op_name="jit(f)/add"}
}
"""  # noqa: E501 (HLO has an instruction a line)


def test_a_fusion_is_one_kernel_that_reads_its_operands_and_writes_its_output():
    kernel = count(FUSION)["loop_add_fusion"]
    assert kernel.launches == 1
    assert kernel.bytes == 4 * (32 + 4 + 32)
    assert kernel.flops == {}
    assert (kernel.output, kernel.source) == ("f32[8,4]", "jit(f)/add")


# A product inside a fusion, with a batch axis, and cuBLAS's, whose second output is scratch space.
PRODUCTS = """HloModule jit_f, is_scheduled=true

%gemm (a: bf16[2,8,16], b: bf16[2,16,4]) -> f32[2,8,4] {
  %a = bf16[2,8,16]{2,1,0} parameter(0)
  %b = bf16[2,16,4]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[2,8,4]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
}

ENTRY %main (a: bf16[2,8,16], b: bf16[2,16,4], c: f32[32,8], d: f32[32,64]) -> f32[2,8,4] {
  %a.1 = bf16[2,8,16]{2,1,0} parameter(0)
  %b.1 = bf16[2,16,4]{2,1,0} parameter(1)
  %c = f32[32,8]{1,0} parameter(2)
  %d = f32[32,64]{1,0} parameter(3)
  %library.1 = (f32[8,64]{1,0}, s8[1000]{0}) custom-call(%c, %d), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
  ROOT %gemm_fusion.1 = f32[2,8,4]{2,1,0} fusion(%a.1, %b.1), kind=kCustom, calls=%gemm
}
"""  # noqa: E501 (HLO has an instruction a line)


def test_products_in_fusions_and_of_the_library_are_counted():
    kernels = count(PRODUCTS)
    assert kernels["gemm_fusion"].flops == {"bf16": 2 * (2 * 8 * 4) * 16}
    assert kernels["gemm_fusion"].bytes == 2 * (256 + 128) + 4 * 64
    assert kernels["library"].flops == {"f32": 2 * (8 * 64) * 32}
    assert kernels["library"].bytes == 4 * (256 + 2048 + 512)


# Two loops, one in the other, of 20 and 3 rounds; the outer one slices an array and counts.
LOOPS = """HloModule jit_f, is_scheduled=true

%inner_body (t.1: (s32[], f32[10])) -> (s32[], f32[10]) {
  %t.1 = (s32[], f32[10]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %v.1 = f32[10]{0} get-tuple-element(%t.1), index=1
  %negate.1 = f32[10]{0} negate(%v.1)
  ROOT %out.1 = (s32[], f32[10]{0}) tuple(%i.1, %negate.1)
}

%inner_condition (t.2: (s32[], f32[10])) -> pred[] {
  %t.2 = (s32[], f32[10]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%t.2), index=0
  %three = s32[] constant(3)
  ROOT %compare.2 = pred[] compare(%i.2, %three), direction=LT
}

%fused_slice (p.3: f32[100,10], i.3: s32[]) -> f32[1,10] {
  %p.3 = f32[100,10]{1,0} parameter(0)
  %i.3 = s32[] parameter(1)
  %zero.3 = s32[] constant(0)
  ROOT %slice.3 = f32[1,10]{1,0} dynamic-slice(%p.3, %i.3, %zero.3), dynamic_slice_sizes={1,10}
}

%outer_body (t.4: (s32[], f32[10], /*index=2*/f32[100,10])) -> (s32[], f32[10], f32[100,10]) {
  %t.4 = (s32[], f32[10]{0}, /*index=2*/f32[100,10]{1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%t.4), index=0
  %table = f32[100,10]{1,0} get-tuple-element(%t.4), index=2
  %slice_fusion.4 = f32[1,10]{1,0} fusion(%table, %i.4), kind=kLoop, calls=%fused_slice
  %row = f32[10]{0} bitcast(%slice_fusion.4)
  %start.4 = (s32[], f32[10]{0}) tuple(%i.4, %row)
  %while.4 = (s32[], f32[10]{0}) while(%start.4), condition=%inner_condition, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
  %v.4 = f32[10]{0} get-tuple-element(%while.4), index=1
  ROOT %out.4 = (s32[], f32[10]{0}, f32[100,10]{1,0}) tuple(%i.4, %v.4, %table)
}

%outer_condition (t.5: (s32[], f32[10], f32[100,10])) -> pred[] {
  %t.5 = (s32[], f32[10]{0}, f32[100,10]{1,0}) parameter(0)
  %i.5 = s32[] get-tuple-element(%t.5), index=0
  %twenty = s32[] constant(20)
  ROOT %compare.5 = pred[] compare(%i.5, %twenty), direction=LT
}

ENTRY %main (t.6: (s32[], f32[10], f32[100,10])) -> (s32[], f32[10], f32[100,10]) {
  %t.6 = (s32[], f32[10]{0}, f32[100,10]{1,0}) parameter(0)
  ROOT %while.6 = (s32[], f32[10]{0}, f32[100,10]{1,0}) while(%t.6), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"20"},"known_init_step":{"init":"0","step":"1"}}
}
"""  # noqa: E501 (HLO has an instruction a line)


def test_a_loop_counts_as_often_as_it_runs_and_a_slice_reads_only_itself():
    kernels = count(LOOPS)
    assert set(kernels) == {"slice_fusion", "negate"}
    assert kernels["slice_fusion"].launches == 20
    assert kernels["slice_fusion"].bytes == 4 * (10 + 1 + 10)
    assert kernels["negate"].launches == 60
    assert kernels["negate"].bytes == 4 * (10 + 10)


def test_a_loop_of_unknown_length_counts_once():
    kernels = count(LOOPS.replace('"known_trip_count":{"n":"20"},', ""))
    assert kernels["negate"].launches == 3


# What a replay buffer of 1,000 rows does: a row is written in place, 5 rows are gathered.
BUFFER = """HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%fused_write (p.1: f32[1000,3], row.1: f32[1,3], i.1: s32[]) -> f32[1000,3] {
  %p.1 = f32[1000,3]{1,0} parameter(0)
  %row.1 = f32[1,3]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update.1 = f32[1000,3]{1,0} dynamic-update-slice(%p.1, %row.1, %i.1, %zero.1)
}

%fused_gather (p.2: f32[1000,3], rows.2: s32[5]) -> (f32[5,3], f32[5,3]) {
  %p.2 = f32[1000,3]{1,0} parameter(0)
  %rows.2 = s32[5]{0} parameter(1)
  %column = s32[5,1]{1,0} bitcast(%rows.2)
  %gather.2 = f32[5,3]{1,0} gather(%p.2, %column), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,3}
  %double.2 = f32[5,3]{1,0} add(%gather.2, %gather.2)
  ROOT %both.2 = (f32[5,3]{1,0}, f32[5,3]{1,0}) tuple(%gather.2, %double.2)
}

ENTRY %main (buffer: f32[1000,3], row: f32[1,3], i: s32[], rows: s32[5]) -> (f32[1000,3], f32[5,3]) {
  %buffer = f32[1000,3]{1,0} parameter(0)
  %row = f32[1,3]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %rows = s32[5]{0} parameter(3)
  %write_fusion.1 = f32[1000,3]{1,0} fusion(%buffer, %row, %i), kind=kLoop, calls=%fused_write
  %gather_fusion.1 = (f32[5,3]{1,0}, f32[5,3]{1,0}) fusion(%write_fusion.1, %rows), kind=kLoop, calls=%fused_gather
  %batch = f32[5,3]{1,0} get-tuple-element(%gather_fusion.1), index=1
  ROOT %out = (f32[1000,3]{1,0}, f32[5,3]{1,0}) tuple(%write_fusion.1, %batch)
}
"""  # noqa: E501 (HLO has an instruction a line)


def test_a_buffer_written_in_place_and_gathered_from_costs_its_rows():
    kernels = count(BUFFER)
    assert kernels["write_fusion"].bytes == 4 * (3 + 1 + 3)
    assert kernels["gather_fusion"].bytes == 4 * (15 + 5 + 2 * 15)


CONDITIONAL = """HloModule jit_f, is_scheduled=true

%copies (t.1: (f32[6], f32[6])) -> f32[6] {
  %t.1 = (f32[6]{0}, f32[6]{0}) parameter(0)
  %v.1 = f32[6]{0} get-tuple-element(%t.1), index=0
  %copy.1 = f32[6]{0} copy(%v.1)
  ROOT %negate.1 = f32[6]{0} negate(%copy.1)
}

%keeps (t.2: (f32[6], f32[6])) -> f32[6] {
  %t.2 = (f32[6]{0}, f32[6]{0}) parameter(0)
  ROOT %v.2 = f32[6]{0} get-tuple-element(%t.2), index=1
}

ENTRY %main (p: pred[], t: (f32[6], f32[6])) -> f32[6] {
  %p = pred[] parameter(0)
  %t = (f32[6]{0}, f32[6]{0}) parameter(1)
  ROOT %cond = f32[6]{0} conditional(%p, %t, %t), true_computation=%keeps, false_computation=%copies
}
"""


@pytest.mark.parametrize("is_listed", [False, True])
def test_a_conditional_costs_its_costlier_branch(is_listed):
    text = CONDITIONAL
    if is_listed:
        old = "true_computation=%keeps, false_computation=%copies"
        text = text.replace(old, "branch_computations={%keeps, %copies}")
    kernels = count(text)
    assert set(kernels) == {"copy", "negate"}
    assert kernels["copy"].bytes == kernels["negate"].bytes == 48


def test_convolutions_are_refused_rather_than_counted_as_free():
    text = FUSION.replace("add(%p.0, %wide)", "convolution(%p.0, %wide), window={size=1}")
    with pytest.raises(ValueError, match="convolutions are not counted"):
        count(text)


def kernel(bytes=0.0, flops=None, launches=1):
    return gpu_compile.Kernel("a", "f32[1]", "", launches, bytes, flops or {})


def test_the_roofline_is_the_longest_of_launch_memory_and_products():
    assert kernel().seconds(H100) == 2e-6
    assert kernel(bytes=3.35e9).seconds(H100) == pytest.approx(1e-3)
    assert kernel(flops={"bf16": 989.4e9}).seconds(H100) == pytest.approx(1e-3)
    assert kernel(flops={"f32": 494.7e9}).seconds(H100) == pytest.approx(1e-3)
    # Products of two types follow each other; they hide the traffic, and it hides them.
    both = {"bf16": 989.4e9, "f32": 494.7e9}
    assert kernel(bytes=3.35e9, flops=both).seconds(H100) == pytest.approx(2e-3)
    assert kernel(bytes=3 * 3.35e9, flops=both).seconds(H100) == pytest.approx(3e-3)


def test_sums_and_groups_count_every_launch():
    kernels = [kernel(bytes=3.35e6, launches=20), kernel(flops={"f32": 494.7e9})]
    sums = gpu_compile.summarize(kernels, H100)
    assert sums == pytest.approx({"kernels": 21, "GB": 0.067, "GFLOP": 494.7, "ms": 1.04})
    small = gpu_compile.Kernel("b", "f32[1]", "", 5, 0.0, {})
    rows = gpu_compile.costliest([*kernels, small], H100, 10)
    assert [(row["name"], row["kernels"]) for row in rows] == [("a", 21), ("b", 5)]
    assert gpu_compile.costliest([*kernels, small], H100, 1) == rows[:1]


TRAINING = ", ".join(str(path.relative_to(ROOT)) for path in gpu_compile.find_scripts())


def run(*words):
    command = [sys.executable, PATH, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def has_plugin():
    try:
        gpu_compile.require_plugin()
    except SystemExit:
        return False
    return True


def test_one_line_where_the_plugin_is_missing():
    if has_plugin():
        pytest.skip("the plugin is here")
    done = run()
    assert done.returncode == 1
    assert done.stderr == 'gpu_compile.py needs the CUDA plugin: pip install "jax[cuda12]"\n'


@pytest.mark.parametrize(
    "words, line",
    [
        (["--gpu", "h1000"], "--gpu must be one of h100, a100, got h1000"),
        (["nowhere.py"], "scripts must be files, got nowhere.py"),
        (["bandit.py"], f"scripts must be {TRAINING} or copies of them, got bandit.py"),
        (["--top", "0"], "--top must be a whole number, at least 1, got 0"),
    ],
)
def test_bad_flags_end_with_one_line(words, line):
    done = run(*words)
    assert (done.returncode, done.stderr) == (1, line + "\n")


def test_finds_the_scripts():
    names = [path.stem for path in gpu_compile.find_scripts()]
    assert {"gempo_exp", "gempo_linear", "gempo_neg", "gempo_square", "td3"} <= set(names)
    assert not {"dna_guidance", "dna_finetune"} & set(names)


@pytest.mark.slow
@pytest.mark.parametrize("path", gpu_compile.find_scripts(), ids=lambda path: path.stem)
def test_scripts_compile_for_a_gpu(path):
    if not has_plugin():
        pytest.skip('needs the CUDA plugin: pip install "jax[cuda12]"')
    done = run(path, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["script"] == path.stem
    assert figures["train_step"]["GFLOP"] > 0  # acting on one row may have no matrix product
    for program in ("train_step", "act"):
        sums = figures[program]
        assert sums["kernels"] > 1 and sums["GB"] > 0
        assert sums["ms"] >= sums["kernels"] * 2e-3 * (1 - 1e-6)  # 2 us a launch at least
