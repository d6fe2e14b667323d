"""What a step would cost on a GPU, estimated from what JAX compiles for one that is not there.

    python benchmark/gpu_compile.py                                   # all RL scripts, for an H100
    python benchmark/gpu_compile.py gempo_neg.py --top 20 --flags "--env-id Humanoid-v5"
    python benchmark/gpu_compile.py gempo_neg.py --gpu a100 --hlo-folder hlo

It compiles `train_step` and `act` of a script ahead of time for a described GPU, as XLA does on a
machine that has it, and counts in the result: kernels launched, bytes that travel between kernels
and memory, and the floating-point operations of the matrix products (FLOPs, two a multiply-add).

Needs `pip install "jax[cuda12]"` (for its compiler; about 6 GB) and no GPU. Ends with one line where
this plugin is missing. The environment variables that JAX needs for it are set below.

The estimate is a roofline: a kernel takes the longest of

- 2 us, the time to launch it,
- its bytes at the memory's peak bandwidth,
- its FLOPs at the peak rate of their type (float32 products run as TF32, JAX's default on a GPU),

and kernels run one after another. **This is an estimate, not a measurement.** It is too low where a
kernel does not reach the peak, which is the rule, and does not count the arithmetic of elementwise
operations (products of a single row are compiled to such). It is too high where what one kernel
writes is still in the cache when the next one reads it (50 MB on an H100: most activations here),
and where CUDA graphs launch faster. XLA chooses kernels by timing them where it has a GPU; without
one, autotuning is off, and so the choice of kernels for matrix products may differ. Where XLA then
finds no Triton kernel for a product, the program is compiled with cuBLAS's alone, and a line says
so. A loop of unknown length is counted as one round, and of a conditional the branch with more
kernels; the wait for its predicate is not counted.
"""

import importlib.metadata
import json
import math
import os
import pathlib
import re
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field

import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.sweep import is_training_script, load_script  # noqa: E402 (the line above finds it)

# ============================================= GPUS ==============================================


@dataclass(frozen=True)
class GPU:
    """A described GPU: peak rates for the estimate, the rest for XLA's choice of kernels."""

    name: str
    bandwidth: float  # bytes a second
    flops: dict  # operations a second of dense matrix products, by the type of their inputs
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of a core
    clock_ghz: float
    memory: int  # bytes
    l2_cache: int  # bytes
    core_shared_memory: int  # bytes
    block_shared_memory: int  # bytes a block may ask for
    capability: tuple[int, int]

    @property
    def target_config(self) -> str:
        """XLA's GpuTargetConfigProto, as text."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 8 }}
            gpu_device_info {{
                cuda_compute_capability {{
                    major: {self.capability[0]} minor: {self.capability[1]}
                }}
                core_count: {self.cores}
                fpus_per_core: {self.lanes}
                clock_rate_ghz: {self.clock_ghz}
                memory_bandwidth: {self.bandwidth:.0f}
                device_memory_size: {self.memory}
                l2_cache_size: {self.l2_cache}
                shared_memory_per_core: {self.core_shared_memory}
                shared_memory_per_block: 49152
                shared_memory_per_block_optin: {self.block_shared_memory}
                threads_per_warp: 32
                threads_per_block_limit: 1024
                threads_per_core_limit: 2048
                registers_per_core_limit: 65536
                registers_per_block_limit: 65536
                block_dim_limit_x: 2147483647
                block_dim_limit_y: 65535
                block_dim_limit_z: 65535
            }}"""


# Bandwidth and rates: NVIDIA's data sheets (H100 SXM, A100 SXM 80 GB), without sparsity. The rest:
# CUDA C++ Programming Guide, table of compute capabilities, and what the devices report.
GPUS = {
    "h100": GPU(
        name="NVIDIA H100 80GB HBM3",
        bandwidth=3.35e12,
        flops={"f32": 494.7e12, "bf16": 989.4e12, "f16": 989.4e12, "f64": 66.9e12},
        cores=132,
        lanes=128,
        clock_ghz=1.98,
        memory=85 * 10**9,
        l2_cache=50 * 2**20,
        core_shared_memory=228 * 2**10,
        block_shared_memory=227 * 2**10,
        capability=(9, 0),
    ),
    "a100": GPU(
        name="NVIDIA A100-SXM4-80GB",
        bandwidth=2.039e12,
        flops={"f32": 156e12, "bf16": 312e12, "f16": 312e12, "f64": 19.5e12},
        cores=108,
        lanes=64,
        clock_ghz=1.41,
        memory=85 * 10**9,
        l2_cache=40 * 2**20,
        core_shared_memory=164 * 2**10,
        block_shared_memory=163 * 2**10,
        capability=(8, 0),
    ),
}
LAUNCH_SECONDS = 2e-6  # the least that a kernel takes; launches of small ones follow each other so

# ======================================== READING OF HLO =========================================
TYPE_BYTES = {"pred": 1, "c64": 8, "c128": 16, "token": 0}  # others end with their number of bits


@dataclass
class Array:
    """Type and shape of an array."""

    type: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        if self.type in TYPE_BYTES:
            return self.size * TYPE_BYTES[self.type]
        bits = int(re.search(r"\d+", self.type).group())
        return self.size * bits // 8


@dataclass
class Instruction:
    """A line of HLO. `outputs` has several arrays where the value is a tuple, nested ones flat."""

    name: str
    outputs: list[Array]
    opcode: str
    operands: list[str]  # names
    text: str  # what stands in the operands' brackets
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.outputs)

    @property
    def called(self) -> list[str]:
        """Names of the computations that a fusion, call or conditional runs."""
        pattern = r"(?:calls|to_apply|true_computation|false_computation)=(%[\w.\-]+)"
        branches = self.attribute(r"branch_computations=\{(.*?)\}") or ""
        return re.findall(pattern, self.attributes) + re.findall(r"%[\w.\-]+", branches)

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes, or None."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None


@dataclass
class Computation:
    """A function of HLO: its instructions by name, in order, and who uses what."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    users: dict[str, list[Instruction]] = field(default_factory=lambda: defaultdict(list))

    @property
    def root(self) -> Instruction:
        return next(line for line in self.instructions.values() if line.is_root)


def closing_bracket(text: str, start: int) -> int:
    """Where the bracket closes that opens at `start`."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
        if depth == 0:
            return place
    raise ValueError(f"no closing bracket in {text}")


def parse_arrays(text: str) -> list[Array]:
    """The arrays of a type such as `(f32[2,3]{1,0}, s32[])`."""
    arrays = []
    for type_name, sizes in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text):
        shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        arrays.append(Array(type_name, shape))
    return arrays


def parse_instruction(line: str) -> Instruction:
    """`[ROOT] %name = type opcode(operands), attributes`."""
    name, right = line.split(" = ", 1)
    is_tuple = right.startswith("(")
    type_end = closing_bracket(right, 0) + 1 if is_tuple else right.index(" ")
    opcode_end = right.index("(", type_end)
    operands_end = closing_bracket(right, opcode_end)
    text = right[opcode_end + 1 : operands_end]
    return Instruction(
        name=name.removeprefix("ROOT "),
        outputs=parse_arrays(right[:type_end]),
        opcode=right[type_end:opcode_end].strip(),
        operands=re.findall(r"%[\w.\-]+", text),
        text=text,
        attributes=right[operands_end + 1 :],
        is_root=name.startswith("ROOT "),
    )


def parse_hlo(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a compiled module's text by name, and the name of the entry."""
    text = re.sub(r"/\*.*?\*/", "", text)
    computations, entry, computation = {}, "", None
    for line in text.splitlines():
        if re.match(r"(ENTRY )?%\S+ \(.*\{$", line):
            words = line.split()
            is_entry = words[0] == "ENTRY"
            name = words[1] if is_entry else words[0]
            entry = name if is_entry else entry
            computation = computations[name] = Computation()
        elif line.startswith("}"):
            computation = None
        elif computation is not None and " = " in line:
            instruction = parse_instruction(line.strip())
            computation.instructions[instruction.name] = instruction
            for operand in set(instruction.operands):
                computation.users[operand].append(instruction)
    return computations, entry


# =========================================== COUNTING ============================================
# Instructions that launch nothing: they name or rename values, or end what another one started.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
FREE |= {"add-dependency", "opt-barrier", "partition-id", "replica-id"}
FREE |= {"async-done", "async-update", "copy-done", "fusion-done"}
RENAMES = {"bitcast", "convert", "reshape"}  # inside a fusion, where they move nothing
READS_PART = {"dynamic-slice", "slice", "gather"}
WRITES_PART = {"dynamic-update-slice", "scatter"}


@dataclass
class Kernel:
    """A kernel, or a library's call, and how often a call of the program launches it."""

    name: str
    output: str  # type and shape of its first output
    source: str  # the JAX operation it comes from
    launches: int
    bytes: float  # of one launch
    flops: dict[str, float]  # of one launch, by the type of the inputs

    def seconds(self, gpu: GPU) -> float:
        """One launch by the roofline."""
        products = sum(flops / gpu.flops[kind] for kind, flops in self.flops.items())
        return max(LAUNCH_SECONDS, self.bytes / gpu.bandwidth, products)


def product_flops(line: Instruction, computation: Computation) -> dict[str, float]:
    """Operations of a matrix product by the type of its inputs: HLO's own or cuBLAS's."""
    is_library = line.opcode == "custom-call" and "__cublas" in line.attributes
    if line.opcode == "convolution" or "__cudnn$conv" in line.attributes:
        raise ValueError(f"convolutions are not counted: {line.name}")
    if line.opcode != "dot" and not is_library:
        return {}
    pattern = r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]'
    contracted = (line.attribute(pattern) or "").replace('"', "").split(",")  # none: outer product
    left = computation.instructions[line.operands[0]].outputs[0]
    length = math.prod(left.shape[int(axis)] for axis in contracted if axis)
    return {left.type: 2.0 * line.outputs[0].size * length}


def fusion_flops(name: str, computations: dict[str, Computation]) -> dict[str, float]:
    """Operations of all matrix products inside a fusion, by type."""
    total = defaultdict(float)
    for line in computations[name].instructions.values():
        if line.opcode == "fusion":
            flops = fusion_flops(line.called[0], computations)
        else:
            flops = product_flops(line, computations[name])
        for kind, count in flops.items():
            total[kind] += count
    return dict(total)


def final_users(name: str, computation: Computation) -> list[tuple[str, Instruction]]:
    """Who uses a value inside a fusion, under which name, renamings looked through."""
    users = []
    for user in computation.users[name]:
        if user.opcode in RENAMES and not user.is_root:
            users += final_users(user.name, computation)
        else:
            users.append((name, user))
    return users


def read_bytes(parameter: Instruction, computation: Computation) -> float:
    """Bytes that a fusion reads of a parameter: of what is only sliced, the slices."""
    total = 0
    for name, user in final_users(parameter.name, computation):
        is_whole = name not in user.operands[:1] or name in user.operands[1:]
        if user.opcode in READS_PART and not is_whole:
            total += user.bytes
        elif user.opcode not in WRITES_PART or is_whole:
            return parameter.bytes
    return min(total, parameter.bytes)


def written_bytes(name: str, computation: Computation) -> float:
    """Bytes that a fusion writes for the value `name`: of an update in place, the new part."""
    line = computation.instructions[name]
    while line.opcode in RENAMES:
        line = computation.instructions[line.operands[0]]
    if line.opcode == "tuple":
        return sum(written_bytes(element, computation) for element in line.operands)
    if line.opcode in WRITES_PART:
        updates = line.operands[1] if line.opcode == "dynamic-update-slice" else line.operands[-1]
        return computation.instructions[updates].bytes
    return computation.instructions[name].bytes


def instruction_bytes(
    line: Instruction, computation: Computation, computations: dict[str, Computation]
) -> float:
    """Bytes that a kernel reads and writes; an operand that is read twice is counted once."""
    operands = [computation.instructions[name] for name in dict.fromkeys(line.operands)]
    if line.opcode == "fusion":
        fused = computations[line.called[0]]
        parameters = [p for p in fused.instructions.values() if p.opcode == "parameter"]
        read = sum(read_bytes(parameter, fused) for parameter in parameters)
        return read + written_bytes(fused.root.name, fused)
    if line.opcode in READS_PART:
        return 2 * line.bytes
    if line.opcode in WRITES_PART:
        return 2 * written_bytes(line.name, computation)
    if line.opcode == "custom-call":  # its s8 output is scratch space
        written = sum(array.bytes for array in line.outputs if array.type != "s8")
        return sum(operand.bytes for operand in operands) + written
    return sum(operand.bytes for operand in operands) + line.bytes


def describe_kernel(
    line: Instruction, computation: Computation, computations: dict[str, Computation], launches: int
) -> Kernel:
    """The kernel that an instruction becomes."""
    if line.opcode == "fusion":
        flops = fusion_flops(line.called[0], computations)
    else:
        flops = product_flops(line, computation)
    output = line.outputs[0]
    sizes = ",".join(map(str, output.shape))
    return Kernel(
        name=re.sub(r"[.\d]+$", "", line.name.removeprefix("%")),
        output=f"{output.type}[{sizes}]",
        source=line.attribute(r'op_name="([^"]*)"') or "",
        launches=launches,
        bytes=instruction_bytes(line, computation, computations),
        flops=flops,
    )


def count_computation(
    name: str, computations: dict[str, Computation], launches: int = 1
) -> list[Kernel]:
    """The kernels of a computation that is run `launches` times, those of what it calls included.

    A loop's body counts as often as XLA knows that it runs, of a conditional the costlier branch.
    """
    kernels = []
    computation = computations[name]
    for line in computation.instructions.values():
        if line.opcode in FREE:
            continue
        if line.opcode == "while":  # the condition of a loop of known length is not evaluated
            rounds = line.attribute(r'"known_trip_count":\{"n":"(\d+)"') or "1"
            body = line.attribute(r"body=(%[\w.\-]+)")
            kernels += count_computation(body, computations, launches * int(rounds))
        elif line.opcode in ("call", "async-start"):
            kernels += count_computation(line.called[0], computations, launches)
        elif line.opcode == "conditional":
            branches = [count_computation(b, computations, launches) for b in line.called]
            kernels += max(branches, key=len)
        else:
            kernels.append(describe_kernel(line, computation, computations, launches))
    return kernels


def count_kernels(text: str) -> list[Kernel]:
    """All kernels that one call of a compiled program launches, from its HLO text."""
    computations, entry = parse_hlo(text)
    return count_computation(entry, computations)


# =========================================== COMPILING ===========================================
def require_plugin() -> None:
    """Exit with one line if JAX has no CUDA plugin to compile with."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if not any(plugin.name.startswith("xla_cuda") for plugin in plugins):
        raise SystemExit('gpu_compile.py needs the CUDA plugin: pip install "jax[cuda12]"')


def set_environment() -> None:
    """What JAX needs to compile for a GPU that is not there; before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # all that is computed here
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no driver, whose version it would check
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"  # nothing can be timed


def find_scripts() -> list[pathlib.Path]:
    """The repository's scripts that have a `train_step` and an `act`."""
    paths = sorted(ROOT.glob("gempo_*.py")) + sorted(ROOT.glob("baselines/*.py"))
    return [path for path in paths if is_training_script(path)]


def describe_gpu(gpu: GPU):
    """A sharding that places arrays on the described GPU; from here on JAX says that it has one."""
    import jax
    from jax.experimental import topologies

    jax.default_backend = lambda: "gpu"  # scripts ask it whether to unroll their loops
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=gpu.target_config, topology="1x1x1"
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compile_script(path: pathlib.Path, flags: str, gpu: GPU) -> dict[str, tuple[str, float]]:
    """HLO text and seconds of compiling of `train_step` and `act`, with a script's own flags.

    Nothing is computed: shapes take the place of the agent and of the replay buffer.
    """
    import jax
    import jax.numpy as jnp

    on_gpu = describe_gpu(gpu)
    script = load_script(path)
    args = tyro.cli(script.Args, args=shlex.split(flags))
    script.check_args(args)
    env = script.make_env(args.env_id)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    env.close()

    def describe(function, *inputs):
        shapes = jax.eval_shape(function, *inputs)
        return jax.tree.map(lambda x: x.update(sharding=on_gpu), shapes)

    key = describe(lambda: jax.random.key(0))
    step = describe(lambda: jnp.int32(0))
    agent = describe(lambda key: script.create_agent(args, *dims, key), key)
    buffer = describe(lambda: script.create_buffer(args.buffer_size, *dims))

    def first_rows(buffer):
        return jax.tree.map(lambda stored: stored[: args.num_envs], buffer.storage)

    transitions = describe(first_rows, buffer)
    programs = {
        "train_step": script.train_step.lower(agent, buffer, transitions, key, step),
        "act": script.act.lower(agent, transitions.obs, key, step, training=True),
    }
    compiled = {}
    for name, program in programs.items():
        start = time.perf_counter()
        try:
            text = program.compile().as_text()
        except jax.errors.JaxRuntimeError as error:  # Triton has no tiles for a product's shape
            reason = str(error)[:150]
            print(f"{path.name}: {name} without Triton's products: {reason}", file=sys.stderr)
            text = program.compile({"xla_gpu_enable_triton_gemm": False}).as_text()
        compiled[name] = text, time.perf_counter() - start
    return compiled


# ============================================ TABLES =============================================
def summarize(kernels: list[Kernel], gpu: GPU) -> dict[str, float]:
    """Sums over all launches: how many, gigabytes, GFLOPs, and the estimate in milliseconds."""
    return {
        "kernels": sum(kernel.launches for kernel in kernels),
        "GB": sum(kernel.launches * kernel.bytes for kernel in kernels) / 1e9,
        "GFLOP": sum(kernel.launches * sum(kernel.flops.values()) for kernel in kernels) / 1e9,
        "ms": sum(kernel.launches * kernel.seconds(gpu) for kernel in kernels) * 1e3,
    }


def costliest(kernels: list[Kernel], gpu: GPU, count: int) -> list[dict]:
    """The `count` costliest groups of kernels with the same name and output, costliest first."""
    groups = defaultdict(list)
    for kernel in kernels:
        groups[kernel.name, kernel.output].append(kernel)
    rows = []
    for (name, output), group in groups.items():
        sources = [kernel.source for kernel in group]
        source = max(sources, key=sources.count)
        rows.append(summarize(group, gpu) | {"name": name, "output": output, "source": source})
    return sorted(rows, key=lambda row: -row["ms"])[:count]


def print_script(name: str, compiled: dict, gpu: GPU, top: int) -> None:
    """The table of a script: both programs, a step (their sum), and a step's costliest groups."""
    print(f"\n{name} on {gpu.name}, an estimate")
    print(f"{'':14}{'kernels':>9}{'GB':>9}{'GFLOP':>9}{'ms':>9}{'compiling':>12}")
    step_kernels = []
    for program, (text, seconds) in compiled.items():
        kernels = count_kernels(text)
        step_kernels += kernels
        print_row(program, summarize(kernels, gpu), f"{seconds:10.1f} s")
    print_row("a step", summarize(step_kernels, gpu))
    print(f"the {top} costliest groups of kernels of a step")
    for row in costliest(step_kernels, gpu, top):
        end = row["source"].split("/")[-1]
        print_row("", row, f"  {row['name']} {row['output']} ({end})")


def print_row(title: str, row: dict, end: str = "") -> None:
    """One line of the table."""
    numbers = f"{row['kernels']:9,}{row['GB']:9.3f}{row['GFLOP']:9.2f}{row['ms']:9.3f}"
    print(f"{title:14}{numbers}{end}", flush=True)


@dataclass(frozen=True)
class Args:
    """Which scripts, for which GPU."""

    scripts: tyro.conf.Positional[
        tuple[pathlib.Path, ...]
    ] = ()  # files; none: all RL scripts of the repository
    gpu: str = "h100"  # h100 or a100
    flags: str = ""  # the script's own, such as "--env-id Humanoid-v5 --num-particles 32"
    top: int = 10  # how many of the costliest groups of kernels to print
    hlo_folder: pathlib.Path | None = None  # where to write the compiled programs' HLO text
    json: bool = False  # print one JSON object a script instead of the table


def main(args: Args) -> None:
    """Compile, count and print."""
    if args.gpu not in GPUS:
        raise SystemExit(f"--gpu must be one of {', '.join(GPUS)}, got {args.gpu}")
    for path in args.scripts:
        if not path.is_file():
            raise SystemExit(f"scripts must be files, got {path}")
        if not is_training_script(path):
            allowed = ", ".join(str(script.relative_to(ROOT)) for script in find_scripts())
            raise SystemExit(f"scripts must be {allowed} or copies of them, got {path}")
    if args.top < 1:
        raise SystemExit(f"--top must be a whole number, at least 1, got {args.top}")
    require_plugin()
    set_environment()
    gpu = GPUS[args.gpu]
    for path in args.scripts or find_scripts():
        compiled = compile_script(path, args.flags, gpu)
        if args.hlo_folder is not None:
            args.hlo_folder.mkdir(parents=True, exist_ok=True)
            for program, (text, _) in compiled.items():
                (args.hlo_folder / f"{path.stem}.{program}.txt").write_text(text)
        if args.json:
            figures = {"script": path.stem, "gpu": gpu.name}
            for program, (text, seconds) in compiled.items():
                sums = summarize(count_kernels(text), gpu)
                figures[program] = sums | {"compile_s": seconds}
            print(json.dumps(figures), flush=True)
        else:
            print_script(path.name, compiled, gpu, args.top)


if __name__ == "__main__":
    main(tyro.cli(Args))
