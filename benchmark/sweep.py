"""Train scripts x environments x seeds x flags side by side with Ray, and go on where a sweep was interrupted.

    python benchmark/sweep.py --scripts gempo_neg gempo_linear --env-ids Hopper-v5 Ant-v5 --seeds 1 2 3 -- --ell -0.1
    python benchmark/sweep.py --scripts gempo_neg --env-ids Hopper-v5 -- --ell 0 -0.05 -0.1 -0.2 -0.3  # five variants
    python benchmark/sweep.py --scripts gempo_neg --env-ids Hopper-v5 --address auto --gpus-per-run 0.25  # a cluster

Flags after `--` go to the scripts. A flag with several values is one more axis of the table; a flag that only some of
the scripts have goes to those alone. Every run has a folder in --output-path, named after what it is,

    {script}__{env_id}__{seed}__{hash of the flags}/    with runs/{run} (TensorBoard and checkpoints), log.txt, lock

and `index.jsonl` there gets a line whenever a run starts or ends; a run is finished once its process exits with 0.
Started again, the same command skips finished runs, resumes the others from their newest checkpoint, and leaves
failed ones (any other exit, as on divergence, which would happen again) unless --retry-failed is given. A run whose
process or machine is lost waits for its turn again. Ctrl-C and SIGTERM let the runs write a checkpoint. On a cluster,
--output-path and this folder have to be at the same place on every machine.
"""

import ast
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
OWN_FLAGS = ("--env-id", "--seed", "--resume")  # the sweep sets them
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit codes of a script that was told to stop
POLL_SECONDS, STOP_SECONDS = 0.2, 120  # how often a process is looked at, how long it may take to stop


@dataclass(frozen=True)
class Args:
    scripts: tuple[str, ...] = ("gempo_exp", "gempo_linear", "gempo_square", "gempo_neg")  # names or paths of scripts
    env_ids: tuple[str, ...] = ("HalfCheetah-v5",)  # gymnasium ids; `module:id` imports the module first
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seeds, at least 0
    output_path: pathlib.Path = pathlib.Path("runs/sweep")  # folder of the index, the logs and the runs
    address: str | None = None  # a Ray cluster, `auto` for the one of this machine; None starts a local one and ends it
    cpus_per_run: float = 1.0  # CPU cores of a run; also limits its threads, to at least 1
    gpus_per_run: float = 0.0  # share of a GPU of a run, which gets that share of its memory; 0 trains on the CPU
    num_cpus: int | None = None  # CPU cores of the local Ray; None: those that this process may use
    num_gpus: int | None = None  # GPUs of the local Ray; None: all
    max_restarts: int = 20  # how often a lost run is started again before it counts as failed
    retry_failed: bool = False  # whether runs that failed in an earlier sweep are tried again
    last_lines: int = 5  # lines of a failed run's log that are printed at the end


@dataclass(frozen=True)
class Run:
    """One row of the table: a script (its path), and what it is called with."""

    script: str
    env_id: str
    seed: int
    flags: tuple[tuple[str, ...], ...]  # (("--ell", "-0.1"), ("--save-model",)), in alphabetical order

    @property
    def name(self) -> str:
        return pathlib.Path(self.script).stem

    @property
    def folder(self) -> str:
        """Its folder's name, the same whenever the same run is asked for."""
        digest = hashlib.sha1(join(self.flags).encode()).hexdigest()[:8]
        env_id = "".join(c if c.isalnum() or c in "-._" else "-" for c in self.env_id)
        return f"{self.name}__{env_id}__{self.seed}__{digest}"


def join(flags) -> str:
    """The flags of a run as they are typed."""
    return shlex.join(word for words in flags for word in words)


# ==================================================== THE TABLE ====================================================
def read_defaults(script: pathlib.Path) -> dict[str, object] | None:
    """{field: default} of the script's class Args, None without one; read, not imported. Computed defaults are None."""
    tree = ast.parse(script.read_text())
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"), None)
    if body is None:
        return None
    defaults = {}
    for field in body:
        if isinstance(field, ast.AnnAssign):
            defaults[field.target.id] = None
            with contextlib.suppress(ValueError, TypeError):  # no default, or one that is computed
                defaults[field.target.id] = ast.literal_eval(field.value)
    return defaults


def has_flag(fields: dict | None, flag: str) -> bool:
    """Whether a script with these fields of Args has the flag (`--no-save-model` is one of save_model)."""
    name = flag.removeprefix("--").replace("-", "_")
    return fields is None or name in fields or name.removeprefix("no_") in fields


def parse_flags(words: list[str]) -> dict[str, list[str]]:
    """{flag: values} of words such as `--ell 0 -0.1 --save-model`; SystemExit on words that are no flags."""
    flags, values = {}, None
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            if (flag := flag.replace("_", "-")) in OWN_FLAGS:
                raise SystemExit(f"{flag} must not be given after --: the sweep sets {', '.join(OWN_FLAGS)} itself")
            if flag in flags:
                raise SystemExit(f"{flag} must be given once, followed by all its values")
            values = flags[flag] = [value] if equals else []
        elif values is None:
            raise SystemExit(f"-- must be followed by flags of the scripts (--name value ...), got {word}")
        else:
            values.append(word)
    return flags


def find_script(name: str) -> pathlib.Path:
    """The script of this name in this folder, or at this path; SystemExit without one."""
    for path in (pathlib.Path(name), ROOT / name, ROOT / f"{name}.py"):
        if path.suffix == ".py" and path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in ROOT.glob("gempo_*.py")))
    raise SystemExit(f"--scripts must be script files or of {known}, got {name}")


def list_runs(args: Args, words: list[str]) -> list[Run]:
    """All runs of the table, seed by seed so that a part of it has every variant; SystemExit on bad input."""
    fields = {script: read_defaults(script) for script in map(find_script, args.scripts)}
    flags = parse_flags(words)
    for flag in flags:
        names = [script.stem for script in fields if has_flag(fields[script], flag)]
        if not names:
            raise SystemExit(f"{flag} must be a flag of one of the scripts, {' '.join(args.scripts)}")
        if len(names) < len(fields):
            print(f"{flag} goes to {', '.join(names)} alone: the other scripts do not have it")
    runs = {}  # a dictionary as an ordered set: to a script without a swept flag, its values are the same run
    for seed, env_id, script in itertools.product(args.seeds, args.env_ids, fields):
        own = [[(flag, value) for value in values] or [(flag,)] for flag, values in sorted(flags.items())
               if has_flag(fields[script], flag)]  # fmt: skip
        for choice in itertools.product(*own):
            runs[Run(str(script), env_id, seed, choice)] = None
    if len({run.folder for run in runs}) < len(runs):
        raise SystemExit(f"--scripts must have different names, got {' '.join(args.scripts)}")
    return list(runs)


def check_args(args: Args) -> None:
    """Exit with one line if a flag is out of its range."""
    whole, share = "a whole number, at least", args.gpus_per_run
    rules = [
        ("scripts", "one or more names", bool(args.scripts)),
        ("env_ids", "one or more gymnasium ids", all(args.env_ids) and bool(args.env_ids)),
        ("seeds", "one or more whole numbers, at least 0", bool(args.seeds) and min(args.seeds, default=-1) >= 0),
        ("cpus_per_run", "a finite number above 0", 0 < args.cpus_per_run < math.inf),
        ("gpus_per_run", "from 0 to 1, or a whole number", 0 <= share <= 1 or share in range(2, 1000)),
        ("num_cpus", f"{whole} --cpus-per-run", args.num_cpus is None or args.num_cpus >= max(args.cpus_per_run, 1)),
        ("num_gpus", f"{whole} --gpus-per-run", args.num_gpus is None or args.num_gpus >= max(share, 0)),
        ("max_restarts", f"{whole} 0", args.max_restarts >= 0),
        ("last_lines", f"{whole} 0", args.last_lines >= 0),
    ]
    for name, allowed, is_allowed in rules:
        if not is_allowed:
            raise SystemExit(f"--{name.replace('_', '-')} must be {allowed}, got {getattr(args, name)}")
    if args.address and (args.num_cpus is not None or args.num_gpus is not None):
        raise SystemExit("--num-cpus and --num-gpus must not be given with --address: the cluster has its own")


# ===================================================== ONE RUN =====================================================
# Runs in the training process before the script. The kernel kills it when the Ray worker ends, however that ends, so
# that it never trains beside its replacement (Linux; elsewhere the replacement waits for the lock).
LAUNCHER = """
import os, sys
import ctypes
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != int(sys.argv[1]):
    os._exit(137)  # the worker ended before that call
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def newest_checkpoint(folder: pathlib.Path) -> str | None:
    """The run in `folder`/runs that has the newest checkpoint, relative to `folder`; None without any."""
    steps = [path for path in folder.glob("runs/*/checkpoints/*") if path.name.isdigit()]
    run = max(steps, key=lambda path: path.stat().st_mtime, default=None)
    return run and str(run.parents[1].relative_to(folder))


def training_env(cpus: float, gpus: float) -> dict[str, str]:
    """Environment variables of a run, so that runs side by side share the machine and not each other's threads."""
    threads = str(max(1, int(cpus)))
    env = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads, "PJRT_NPROC": threads}
    if gpus:
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * min(gpus, 1):.3f}"  # the rest: what CUDA takes besides
    else:
        env.setdefault("JAX_PLATFORMS", "cpu")
    return env


def describe_machine() -> str:
    """The processor's name and the number of cores."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return f"{lines[0].partition(':')[2].strip() if lines else platform.processor() or 'CPU'}, {os.cpu_count()} cores"


def train(run: Run, folder: pathlib.Path, cpus: float, gpus: float) -> int | None:
    """Train `run` in `folder`, from its newest checkpoint if there is one; the exit code (as that of Popen).

    Runs in a Ray worker. Once the file `stop` lies beside `folder`, a new run does not begin (None), and one in
    progress is told to write a checkpoint and to end.
    """
    stop = folder.parent / "stop"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, open(folder / "log.txt", "a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the training process inherits it: two never train in one folder
        if stop.exists():
            return None
        if resumed := newest_checkpoint(folder):
            words = ["--resume", resumed]
        else:
            shutil.rmtree(folder / "runs", ignore_errors=True)  # a lost run's beginning, which its seed repeats
            words = ["--env-id", run.env_id, "--seed", str(run.seed), *itertools.chain(*run.flags)]
        log.write(f"# {describe_machine()}\n$ python {pathlib.Path(run.script).name} {shlex.join(words)}\n")
        log.flush()
        command = [sys.executable, "-c", LAUNCHER, str(os.getpid()), run.script, *words]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=training_env(cpus, gpus),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
        while process.poll() is None and not stop.exists():
            time.sleep(POLL_SECONDS)
        process.terminate()  # nothing happens if it has ended
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


# ==================================================== THE SWEEP ====================================================
def read_index(path: pathlib.Path) -> dict[str, dict]:
    """{run folder: its newest entry} of an index.jsonl; a line that was cut off by a crash is left out."""
    entries = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            entries[entry["folder"]] = entry
    return entries


def tail(path: pathlib.Path, lines: int = 1) -> list[str]:
    """The last lines of a file that are not empty; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
            text = file.read().decode(errors="replace").replace("\r", "\n")
    except OSError:
        return []
    return [line.rstrip() for line in text.split("\n") if line.strip()][-lines:] if lines else []


def describe_commit() -> str:
    """The commit of this folder, `unknown` without git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def describe_device(log: pathlib.Path) -> str:
    """The accelerator that the script named in its log, else the machine that `train` named there."""
    device = "unknown"
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        before, found, _ = line.partition(": tensorboard --logdir ")
        if found and (kind := before.rpartition(" on ")[2]) != "cpu":
            device = kind
        elif line.startswith("# "):
            device = line.removeprefix("# ")
    return device


class Sweep:
    """The state of every run, the index on disk, and the table on the screen."""

    def __init__(self, args: Args, runs: list[Run]):
        self.args, self.runs, self.output = args, runs, args.output_path.resolve()
        self.index, self.stop = self.output / "index.jsonl", self.output / "stop"
        self.stop.unlink(missing_ok=True)
        self.commit = describe_commit()
        self.shared = set.intersection(*(set(run.flags) for run in runs))
        self.restarts, self.began, self.log_sizes = dict.fromkeys(runs, 0), {}, {}
        earlier, ended = read_index(self.index), ("finished",) if args.retry_failed else ("finished", "failed")
        states = {run: earlier.get(run.folder, {}).get("state") for run in runs}
        self.states = {run: state if state in ended else "waiting" for run, state in states.items()}

    def own_flags(self, run: Run) -> str:
        """The flags that not all runs have."""
        return join(flag for flag in run.flags if flag not in self.shared)

    def label(self, run: Run) -> str:
        return f"{run.name} {run.env_id} seed {run.seed} {self.own_flags(run)}".rstrip()

    def log(self, run: Run) -> pathlib.Path:
        return self.output / run.folder / "log.txt"

    def log_size(self, run: Run) -> int:
        return self.log(run).stat().st_size if self.log(run).exists() else 0

    def note(self, run: Run, state: str, exit_code: int | None = None) -> None:
        """Write a run's new state to the index, and as a line to a screen that is no terminal."""
        self.states[run] = "waiting" if state == "lost" else state
        if state == "running":
            self.began[run] = time.time()
        seconds = round(time.time() - self.began.get(run, time.time()), 1)
        folders = (self.output / run.folder / "runs").glob("*")
        entry = {"folder": run.folder, "state": state, "script": run.name, "env_id": run.env_id, "seed": run.seed}
        entry |= {"flags": join(run.flags), "exit_code": exit_code, "seconds": seconds}
        entry |= {"runs": sorted(str(path.relative_to(self.output)) for path in folders)}
        entry |= {"device": describe_device(self.log(run)), "commit": self.commit, "time": int(time.time())}
        with open(self.index, "a") as file:
            file.write(json.dumps(entry) + "\n")
        if not sys.stdout.isatty():
            result = f" after {seconds:.0f} s: {' '.join(tail(self.log(run)))}" if state != "running" else ""
            print(f"{self.counts()} | {self.label(run)}: {state}{result}", flush=True)

    def settle(self, run: Run, exit_code: int | None) -> bool:
        """Note how a run ended (None: its worker was lost) and return whether it has to be started again."""
        lost = exit_code is None or exit_code < 0 or exit_code in STOPPED  # by a signal, not by an error
        if lost and self.restarts[run] < self.args.max_restarts:
            self.restarts[run] += 1
            self.note(run, "lost", exit_code)
            return True
        self.note(run, "finished" if exit_code == 0 else "failed", exit_code)
        return False

    def counts(self) -> str:
        states = list(self.states.values())
        return ", ".join(f"{states.count(state)} {state}" for state in ("finished", "running", "waiting", "failed"))

    def table(self, *states: str):
        """A table of the runs in these states, in this order, with the last line of each."""
        from rich.table import Table

        table = Table(title=self.counts(), title_justify="left", expand=True)
        for column in ("script", "environment", "seed", "flags", "state"):
            table.add_column(column, overflow="fold")
        table.add_column("last line", ratio=1, no_wrap=True)
        for run in sorted(
            (run for run in self.runs if self.states[run] in states), key=lambda run: states.index(self.states[run])
        ):
            again = f", started again {self.restarts[run]} times" if self.restarts[run] else ""
            cells = (run.name, run.env_id, str(run.seed), self.own_flags(run), self.states[run] + again)
            table.add_row(*cells, " ".join(tail(self.log(run))))
        return table


def start_ray(args: Args):
    """Ray, connected to the cluster or started here without a dashboard; SystemExit if no run would fit in it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import: nothing is reported
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's new behaviour, without its warning
    try:
        import ray
    except ImportError:
        raise SystemExit("benchmark/sweep.py needs Ray: pip install -e '.[sweep]'") from None
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if args.address:
        try:
            ray.init(args.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise SystemExit(f"--address must be that of a running Ray cluster, got {args.address}: {reason}") from None
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        resources = {"num_cpus": args.num_cpus or cores, "num_gpus": args.num_gpus}
        resources |= {"object_store_memory": 100 * 2**20}  # bytes; a run returns one number
        ray.init("local", include_dashboard=False, **resources, **quiet)
    for name, flag, needed in (("CPU", "cpus", args.cpus_per_run), ("GPU", "gpus", args.gpus_per_run)):
        if needed > (most := max((node["Resources"].get(name, 0) for node in ray.nodes()), default=0)):
            raise SystemExit(f"--{flag}-per-run must be at most {most:g}, what a machine of Ray has, got {needed:g}")
    return ray


def run_all(ray, sweep: Sweep) -> None:
    """Train every waiting run, and lost ones again, until all have ended; KeyboardInterrupt stops them first."""
    args, refs = sweep.args, {}
    # Ray's own retries are off: `settle` decides, since it sees exit codes as well.
    task = ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=0)(train)

    def submit(run):
        sweep.log_sizes[run] = sweep.log_size(run)
        refs[task.remote(run, sweep.output / run.folder, args.cpus_per_run, args.gpus_per_run)] = run

    def note_begun(runs):
        for run in runs:
            if sweep.states[run] == "waiting" and sweep.log_size(run) > sweep.log_sizes[run]:
                sweep.note(run, "running")

    def result(ref):
        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # of `train` itself, as on a full disk
            sweep.log(refs[ref]).parent.mkdir(parents=True, exist_ok=True)
            with open(sweep.log(refs[ref]), "a") as log:
                log.write(f"{error}\n")
            return 1
        except ray.exceptions.RayError:  # the worker or its machine is gone
            return None

    try:
        for run in sweep.runs:
            if sweep.states[run] == "waiting":
                submit(run)
        while refs:
            ready, _ = ray.wait(list(refs), timeout=1)
            note_begun(refs.values())
            for ref in ready:
                code, run = result(ref), refs.pop(ref)
                if sweep.settle(run, code):
                    submit(run)
    except KeyboardInterrupt:
        print("stopping: the runs write their checkpoints", flush=True)
        sweep.stop.touch()
        ray.wait(list(refs), num_returns=len(refs), timeout=STOP_SECONDS + 30)
        note_begun(refs.values())
        for run in refs.values():
            if sweep.states[run] == "running":
                sweep.note(run, "stopped")
        raise


def main(args: Args, words: list[str]) -> None:
    """Run the sweep; SystemExit with 1 if a run failed, with 130 if the sweep was stopped."""
    from rich.console import Console
    from rich.live import Live

    check_args(args)
    runs = list_runs(args, words)
    try:
        args.output_path.mkdir(parents=True, exist_ok=True)
        lock = open(args.output_path / "index.jsonl", "a")  # noqa: SIM115 (held until the process ends)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        reason = f"that no other sweep is using, got {args.output_path}: {error}"
        raise SystemExit(f"--output-path must be a folder that can be written and {reason}") from None
    sweep = Sweep(args, runs)
    print(f"{len(runs)} runs, {join(sorted(sweep.shared)) or 'default flags'}")
    print(f"{sweep.counts()}; tensorboard --logdir {args.output_path}", flush=True)
    exit_code = 0
    if "waiting" in sweep.states.values():
        ray = start_ray(args)

        def stop(*_):
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, stop)  # after Ray has set its own
        live = Live(get_renderable=lambda: sweep.table("running"), refresh_per_second=1, vertical_overflow="crop")
        try:
            with live if sys.stdout.isatty() else contextlib.nullcontext():
                run_all(ray, sweep)
        except KeyboardInterrupt:
            exit_code = STOPPED[1]
        finally:
            ray.shutdown()
    Console(width=None if sys.stdout.isatty() else 160).print(sweep.table("finished", "stopped", "waiting", "failed"))
    for run in (run for run, state in sweep.states.items() if state == "failed"):
        print(f"\n{sweep.label(run)} failed; the last lines of {sweep.log(run)}:")
        print("".join(f"    {line}\n" for line in tail(sweep.log(run), args.last_lines)), end="")
        exit_code = exit_code or 1
    raise SystemExit(exit_code)


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, description=__doc__, args=sys.argv[1:split]), sys.argv[split + 1 :])
