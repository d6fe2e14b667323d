"""Train scripts x environments x seeds x flags side by side with Ray, and go on after interruptions.

    python benchmark/sweep.py --scripts gempo_neg baselines/sac --env-ids Hopper-v5 Ant-v5 \
        --seeds 1 2 3 -- --total-timesteps 200000
    python benchmark/sweep.py --scripts gempo_neg --env-ids Hopper-v5 -- --ell 0 -0.1 -0.3
    python benchmark/sweep.py --scripts gempo_neg --address auto --gpus-per-run 0.25  # a cluster

Flags after `--` go to the scripts. A flag with several values is one more axis of the table; a flag
that only some of the scripts have goes to those alone. Every run has a folder in --output-path,
named after what it is,

    {script}__{env_id}__{seed}__{hash of the flags}/

with runs/{run} (TensorBoard and checkpoints), log.txt and lock in it; `index.jsonl` beside it gets
a line whenever a run starts or ends. A run is finished once its process exits with 0. An
--output-path has the runs of one version of a script: another version is refused, and where a script
is edited while the sweep trains, the runs that start after that fail.

Started again, the same command skips finished runs, resumes the others from their newest
checkpoint, and leaves failed ones (any other exit, as on divergence, which would happen again)
unless --retry-failed is given. A run whose process or machine is lost waits for its turn again.
Where Ray itself dies, the sweep ends, and the same command goes on. Ctrl-C and SIGTERM let the runs
write a checkpoint. On a cluster, --output-path and this folder have to be at the same place on
every machine.
"""

import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
OWN_FLAGS = ("--env-id", "--seed", "--resume", "--extend-to")  # the sweep's business
INTERRUPTED = 128 + signal.SIGINT  # exit codes of a script that was told to stop
TERMINATED = 128 + signal.SIGTERM
POLL_SECONDS = 0.2  # how often a process is looked at
STOP_SECONDS = 120  # how long a process may take to stop
REPORT_SECONDS = 120  # how often the running runs' last lines are printed
MAX_RESTARTS = 20  # how often a lost run is started again before it counts as failed
# Environment variables that the runs get on every machine of a cluster, by how they begin.
TOLD_VARIABLES = ("JAX_", "XLA_", "MUJOCO_", "WANDB_", "PYTHONPATH")
FAILED_LINES = 5  # lines of a failed run's log that are printed at the end


@dataclass(frozen=True)
class Args:
    scripts: tuple[str, ...] = ("gempo_exp", "gempo_linear", "gempo_square", "gempo_neg")
    """names (gempo_neg, baselines/sac) or paths of scripts"""
    env_ids: tuple[str, ...] = ("HalfCheetah-v5",)
    """gymnasium ids; `module:id` imports the module first"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seeds, at least 0
    output_path: pathlib.Path = pathlib.Path("runs/sweep")  # folder of the index and the runs
    address: str | None = None
    """a Ray cluster, `auto` for the one of this machine; None starts a local one and ends it"""
    cpus_per_run: float = 1.0  # CPU cores of a run; also limits its threads, to at least 1
    gpus_per_run: float = 0.0
    """share of a GPU of a run, which gets that share of its memory; 0 trains on the CPU"""
    num_cpus: int | None = None  # CPU cores of the local Ray; None: those this process may use
    retry_failed: bool = False  # whether runs that failed in an earlier sweep are tried again


@dataclass(frozen=True)
class Run:
    """One row of the table: a script (its path), and what it is called with."""

    script: str
    env_id: str
    seed: int
    flags: tuple[tuple[str, ...], ...]  # (("--ell", "-0.1"), ("--save-model",)), by name

    @property
    def name(self) -> str:
        return pathlib.Path(self.script).stem

    @property
    def path(self) -> str:
        """The script's path, from this repository's root if it lies there, which may be moved."""
        path = pathlib.Path(self.script)
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

    @property
    def folder(self) -> str:
        """Its folder's name, the same whenever the same run is asked for."""
        digest = hashlib.sha1(join(self.flags).encode()).hexdigest()[:8]
        env_id = "".join(c if c.isalnum() or c in "-._" else "-" for c in self.env_id)
        return f"{self.name}__{env_id}__{self.seed}__{digest}"


def join(flags) -> str:
    """The flags of a run as they are typed."""
    return shlex.join(word for words in flags for word in words)


# ============================================ SCRIPTS ============================================
def find_script(name: str) -> pathlib.Path | None:
    """The script at this path, or of this name here, in the repository or in its baselines/."""
    file = name if name.endswith(".py") else f"{name}.py"
    for folder in (pathlib.Path(), ROOT, ROOT / "baselines"):
        path = folder / file
        if path.is_file():
            return path.resolve()
    return None


def is_training_script(path: pathlib.Path) -> bool:
    """Whether a file defines `train_step`, `act` and `make_env`; read, it is not imported.

    The four scripts and the baselines for reinforcement learning do; bandit.py does not.
    """
    text = path.read_text(errors="replace")
    names = re.findall(r"^(?:def )?(\w+)", text, re.MULTILINE)
    return {"train_step", "act", "make_env"} <= set(names)


def load_script(path: pathlib.Path) -> ModuleType:
    """The script of this file as a module, also where another file of its name is imported already.

    The same file is loaded once.
    """
    path = path.resolve()
    earlier = sys.modules.get(path.stem)
    if earlier is not None and getattr(earlier, "__file__", None) == str(path):
        return earlier
    sys.path.insert(0, str(path.parent))  # as `python script.py` does
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = script  # dataclasses look their module up there
    spec.loader.exec_module(script)
    return script


def hash_source(script: str) -> str:
    """SHA-256 of a script's file; empty if it cannot be read."""
    try:
        source = pathlib.Path(script).read_bytes()
    except OSError:
        return ""
    return hashlib.sha256(source).hexdigest()


def read_defaults(script: pathlib.Path) -> dict[str, object]:
    """{field: default} of the script's class Args and its bases; read, the script is not imported.

    Empty if it has no such class. A default that is computed is given as None.
    """
    try:
        tree = ast.parse(script.read_text())
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise SystemExit(f"{script} cannot be read: {error}") from None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return class_defaults(classes, "Args")


def class_defaults(classes: dict[str, ast.ClassDef], name: str) -> dict[str, object]:
    """{field: default} of the class `name`, its bases among `classes` included."""
    if name not in classes:
        return {}
    defaults = {}
    for base in classes[name].bases:
        defaults |= class_defaults(classes, ast.unparse(base))
    for field in classes[name].body:
        if not isinstance(field, ast.AnnAssign):
            continue
        try:
            default = ast.literal_eval(field.value)
        except (ValueError, TypeError):  # none, or one that is computed
            default = None
        defaults[field.target.id] = default
    return defaults


# =========================================== THE TABLE ===========================================
def has_flag(defaults: dict, flag: str) -> bool:
    """Whether a script with these fields has the flag; --no-save-model is one of save_model."""
    name = flag.removeprefix("--").replace("-", "_")
    return name in defaults or name.removeprefix("no_") in defaults


def parse_flags(words: list[str]) -> dict[str, list[str]]:
    """{flag: values} of words such as `--ell 0 -0.1 --save-model`.

    Exits with one line on words that are no flags.
    """
    flags = {}
    values = None  # those of the last flag
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            if flag in OWN_FLAGS:
                own = ", ".join(OWN_FLAGS)
                raise SystemExit(f"{flag} must not be given after --: {own} are the sweep's")
            if flag in flags:
                raise SystemExit(f"{flag} must be given once, followed by all its values")
            values = [value] if equals else []
            flags[flag] = values
        elif values is None:
            what = "flags of the scripts (--name value ...)"
            raise SystemExit(f"-- must be followed by {what}, got {word}")
        else:
            values.append(word)
    return flags


def combinations(flags: dict[str, list[str]], defaults: dict) -> Iterator:
    """Every choice of one value for each of the flags that a script with these fields has."""
    axes = []
    for flag, values in sorted(flags.items()):
        if has_flag(defaults, flag):
            axes.append([(flag, value) for value in values] or [(flag,)])
    return itertools.product(*axes)


def list_runs(args: Args, words: list[str]) -> list[Run]:
    """All runs of the table, seed by seed, so that a part of it has every variant.

    Exits with one line on bad input.
    """
    scripts = {}  # path: fields
    for name in args.scripts:
        path = find_script(name)
        defaults = read_defaults(path) if path else {}
        if "env_id" not in defaults:
            allowed = "names such as gempo_neg or baselines/sac, or files with such an Args"
            raise SystemExit(f"--scripts must be {allowed}, got {name}")
        scripts[path] = defaults
    if len({path.stem for path in scripts}) < len(scripts):
        raise SystemExit(f"--scripts must have different names, got {' '.join(args.scripts)}")

    flags = parse_flags(words)
    for flag in flags:
        owners = [path.stem for path, defaults in scripts.items() if has_flag(defaults, flag)]
        if not owners:
            allowed = f"a flag of one of the scripts, {' '.join(args.scripts)}"
            raise SystemExit(f"{flag} must be {allowed}")
        if len(owners) < len(scripts):
            print(f"{flag} goes to {', '.join(owners)} alone: the other scripts do not have it")

    runs = []
    for seed, env_id, path in itertools.product(args.seeds, args.env_ids, scripts):
        for choice in combinations(flags, scripts[path]):
            runs.append(Run(str(path), env_id, seed, choice))
    return list(dict.fromkeys(runs))  # a value that is given twice is one run


def check_args(args: Args) -> None:
    """Exit with one line if a flag is out of its range."""

    def require(flag, is_allowed, allowed):
        if not is_allowed:
            name = flag.replace("_", "-")
            raise SystemExit(f"--{name} must be {allowed}, got {getattr(args, flag)}")

    cpus, gpus = args.cpus_per_run, args.gpus_per_run
    require("scripts", args.scripts, "one or more names")
    require("env_ids", args.env_ids and all(args.env_ids), "one or more gymnasium ids")
    seeds_allowed = args.seeds and min(args.seeds) >= 0
    require("seeds", seeds_allowed, "one or more whole numbers, at least 0")
    require("cpus_per_run", 0 < cpus < math.inf, "a finite number above 0")
    gpus_allowed = 0 <= gpus <= 1 or gpus in range(2, 1000)
    require("gpus_per_run", gpus_allowed, "from 0 to 1, or a whole number")
    is_node = args.address is None or "://" not in args.address
    require("address", is_node, "auto or HOST:PORT, of a cluster of which this machine is a node")
    if args.num_cpus is not None:
        is_enough = args.num_cpus >= max(cpus, 1)
        require("num_cpus", is_enough, "a whole number, at least --cpus-per-run")
        is_local = args.address is None
        require("num_cpus", is_local, "left out with --address, since a cluster has its own")


# ============================================ ONE RUN ============================================
# Runs in the training process before the script. The kernel kills it when the Ray worker ends,
# however that ends, so that it never trains beside its replacement (Linux; elsewhere the
# replacement waits for the lock).
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
    """The run in `folder`/runs with the newest checkpoint, relative to `folder`; None without."""
    paths = folder.glob("runs/*/checkpoints/*")
    paths = [path for path in paths if path.name.isdigit()]
    if not paths:
        return None
    newest = max(paths, key=os.path.getmtime)
    return str(newest.parents[1].relative_to(folder))


class Origin(NamedTuple):
    """Of the sweep, what a Ray worker on another machine does not know."""

    folder: str  # where it was started
    variables: dict[str, str]  # those environment variables that concern the runs
    sha256: str  # of the run's script


def training_env(cpus: float, gpus: float, origin: Origin) -> dict[str, str]:
    """Environment variables of a run: runs side by side share the machine, not their threads."""
    env = os.environ | origin.variables
    env["PYTHONUNBUFFERED"] = "1"
    # An environment's id may name a module here, or in the folder where the sweep was started.
    paths = [str(ROOT), origin.folder, env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    threads = str(max(1, int(cpus)))
    env["OMP_NUM_THREADS"] = threads
    env["PJRT_NPROC"] = threads  # XLA's
    if gpus:
        share = 0.9 * min(gpus, 1)  # the rest is what CUDA takes besides
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{share:.3f}"
    else:
        env["JAX_PLATFORMS"] = "cpu"
    return env


def describe_machine() -> str:
    """The processor's name and the number of cores."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    name = model[1] if model else platform.processor() or "CPU"
    return f"{name}, {os.cpu_count()} cores"


def train(run: Run, folder: pathlib.Path, cpus: float, gpus: float, origin: Origin) -> int | None:
    """Train `run` in `folder`, from its newest checkpoint if there is one; Popen's exit code.

    Runs in a Ray worker. If the script is not what it was when the sweep began, the exit code is 1.
    Once the file `stop` lies beside `folder`, a new run does not begin (None), and one in progress
    is told to write a checkpoint and to end.
    """
    stop = folder.parent / "stop"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, open(folder / "log.txt", "a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the training process inherits it: one trains in a folder
        if stop.exists():
            return None
        if hash_source(run.script) != origin.sha256:
            log.write(f"{run.script} is not what it was when the sweep began: not started\n")
            return 1
        resumed = newest_checkpoint(folder)
        if resumed:
            words = ["--resume", resumed]
        else:
            # What a lost run began is repeated by its seed.
            shutil.rmtree(folder / "runs", ignore_errors=True)
            words = ["--env-id", run.env_id, "--seed", str(run.seed), *itertools.chain(*run.flags)]
        log.write(f"# {describe_machine()}\n")
        log.write(f"$ python {pathlib.Path(run.script).name} {shlex.join(words)}\n")
        log.flush()
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(os.getpid()), run.script, *words],
            cwd=folder,
            env=training_env(cpus, gpus, origin),
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


# =========================================== THE FILES ===========================================
def read_index(path: pathlib.Path) -> dict[str, dict]:
    """{run folder: its newest entry} of an index.jsonl; a line cut off by a crash is left out."""
    entries = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                entries[entry["folder"]] = entry
    return entries


def tail(path: pathlib.Path, count: int = 1) -> list[str]:
    """The last lines of a file that are not empty; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = text.replace("\r", "\n").split("\n")  # \r: a progress bar
    lines = [line.rstrip() for line in lines if line.strip()]
    return lines[-count:] if count else []


def describe_commit() -> str:
    """The commit of this folder, `unknown` without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def describe_device(log: pathlib.Path) -> str:
    """The accelerator that the script named in its log, else the machine that `train` did."""
    text = log.read_text(errors="replace") if log.exists() else ""
    machines = re.findall(r"^# (.+)$", text, re.MULTILINE)
    devices = re.findall(r"^\S+ on (.+): tensorboard --logdir ", text, re.MULTILINE)
    if devices and devices[-1] != "cpu":
        return devices[-1]
    return machines[-1] if machines else "unknown"


# =========================================== THE SWEEP ===========================================
class NodeDied(Exception):
    """The Ray node of this machine has died, and what ran on it."""


class Sweep:
    """The runs of a sweep: each is waiting, running, finished or failed.

    The index also has `lost` and `stopped`, after which a run waits again.
    """

    def __init__(self, args: Args, runs: list[Run]):
        self.args = args
        self.runs = runs
        self.output = args.output_path.resolve()
        self.index = self.output / "index.jsonl"
        self.hashes = {run.script: hash_source(run.script) for run in runs}
        earlier = read_index(self.index)
        for run in runs:
            self.require_same_script(run, earlier.get(run.folder, {}))
        # Other seeds and flags of the same scripts, too: plot.py shows them side by side.
        for run in {run.path: run for run in runs}.values():
            for entry in earlier.values():
                if entry.get("path") == run.path:
                    self.require_same_script(run, entry)
        self.stop = self.output / "stop"
        self.stop.unlink(missing_ok=True)
        self.commit = describe_commit()
        self.shared = set.intersection(*(set(run.flags) for run in runs))
        self.restarts = dict.fromkeys(runs, 0)
        self.report_time = time.monotonic()
        self.start_times = {}
        self.log_sizes = {}  # of the logs, when their runs were submitted
        self.refs = {}  # Ray's reference of a submitted run: the run
        ended = {"finished"} if args.retry_failed else {"finished", "failed"}
        self.states = {}
        self.sources = {}  # the SHA-256 of a run's script when the run last started
        for run in runs:
            entry = earlier.get(run.folder, {})
            self.sources[run] = entry.get("sha256", "")
            state = entry.get("state")
            self.states[run] = state if state in ended else "waiting"

    def require_same_script(self, run: Run, entry: dict) -> None:
        """Exit with one line if another script than `run`'s began that of `entry`, of the index.

        One that an older version of this file wrote has neither path nor hash: it is accepted.
        """
        path = entry.get("path")
        sha256 = entry.get("sha256")
        if not path or not sha256:
            return
        if path == run.path and sha256 == self.hashes[run.script]:
            return
        begins_anew = newest_checkpoint(self.output / entry["folder"]) is None
        if entry["state"] == "failed" and begins_anew:  # its script may have been mended
            return
        script = f"{path} of commit {entry['commit']}"
        change = "has changed since" if path == run.path else f"is not {run.path}"
        cure = "give another --output-path, so that no results are mixed"
        raise SystemExit(f"{entry['folder']} was begun with {script}, which {change}: {cure}")

    def label(self, run: Run) -> str:
        """What a run is, with the flags that not all runs have."""
        own_flags = join(flag for flag in run.flags if flag not in self.shared)
        return f"{run.name} {run.env_id} seed {run.seed} {own_flags}".rstrip()

    def log(self, run: Run) -> pathlib.Path:
        return self.output / run.folder / "log.txt"

    def counts(self) -> str:
        states = list(self.states.values())
        names = ("finished", "running", "waiting", "failed")
        return ", ".join(f"{states.count(name)} {name}" for name in names)

    def note(self, run: Run, state: str, exit_code: int | None = None) -> None:
        """Write a run's new state to the index and to the screen."""
        self.states[run] = "waiting" if state in ("lost", "stopped") else state
        now = time.time()
        if state == "running":
            self.start_times[run] = now
            self.sources[run] = self.hashes[run.script]
        seconds = now - self.start_times.get(run, now)
        folders = (self.output / run.folder / "runs").glob("*")
        entry = {
            "folder": run.folder,
            "state": state,
            "script": run.name,
            "path": run.path,
            "sha256": self.sources[run],
            "env_id": run.env_id,
            "seed": run.seed,
            "flags": join(run.flags),
            "exit_code": exit_code,
            "seconds": round(seconds, 1),
            "runs": sorted(str(path.relative_to(self.output)) for path in folders),
            "device": describe_device(self.log(run)),
            "commit": self.commit,
        }
        with open(self.index, "a") as file:
            file.write(json.dumps(entry) + "\n")
        line = f"{self.counts()} | {self.label(run)}: {state}"
        if state != "running":
            line += f" after {seconds:.0f} s: {' '.join(tail(self.log(run)))}"
        print(line, flush=True)

    def report(self) -> None:
        """Now and then, print the last line of each running run."""
        if time.monotonic() - self.report_time > REPORT_SECONDS:
            self.report_time = time.monotonic()
            for run in self.runs:
                line = " ".join(tail(self.log(run)))
                if self.states[run] == "running" and not line.startswith("$"):
                    print(f"{self.label(run)}: {line}", flush=True)

    def note_started(self) -> None:
        """Note which submitted runs have begun: those whose log has grown."""
        for run in self.refs.values():
            if self.states[run] == "waiting" and self.log_size(run) > self.log_sizes[run]:
                self.note(run, "running")

    def log_size(self, run: Run) -> int:
        log = self.log(run)
        return log.stat().st_size if log.exists() else 0

    def settle(self, run: Run, exit_code: int | None) -> bool:
        """Note how a run ended (None: with its worker); whether it has to be started again."""
        by_signal = exit_code is None or exit_code < 0 or exit_code in (INTERRUPTED, TERMINATED)
        if by_signal and self.restarts[run] < MAX_RESTARTS:
            self.restarts[run] += 1
            self.note(run, "lost", exit_code)
            return True
        self.note(run, "finished" if exit_code == 0 else "failed", exit_code)
        return False

    def submit(self, ray, run: Run) -> None:
        """Let Ray train a run as soon as there is room for it."""
        cpus, gpus = self.args.cpus_per_run, self.args.gpus_per_run
        # Ray's own retries are off: `settle` decides, since it sees exit codes as well.
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(train)
        self.log_sizes[run] = self.log_size(run)
        variables = {name: x for name, x in os.environ.items() if name.startswith(TOLD_VARIABLES)}
        origin = Origin(os.getcwd(), variables, self.hashes[run.script])
        ref = task.remote(run, self.output / run.folder, cpus, gpus, origin)
        self.refs[ref] = run

    def exit_code(self, ray, ref) -> int | None:
        """A run's exit code, None if its worker or its machine is gone; NodeDied if Ray is."""
        try:
            return ray.get(ref)
        except ray.exceptions.LocalRayletDiedError:
            raise NodeDied from None
        except ray.exceptions.RayTaskError as error:  # of `train` itself, as on a full disk
            log = self.log(self.refs[ref])
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a") as file:
                file.write(f"{error}\n")
            return 1
        except ray.exceptions.RayError:
            return None

    def run_all(self, ray) -> None:
        """Train every waiting run, and lost ones again, until all have ended.

        Raises NodeDied, and KeyboardInterrupt once the runs have been told to stop.
        """
        try:
            for run in self.runs:
                if self.states[run] == "waiting":
                    self.submit(ray, run)
            while self.refs:
                ready, _ = ray.wait(list(self.refs), timeout=1)
                self.note_started()
                self.report()
                if has_died(ray):
                    raise NodeDied
                for ref in ready:
                    code = self.exit_code(ray, ref)
                    run = self.refs.pop(ref)
                    if self.settle(run, code):
                        self.submit(ray, run)
        except NodeDied:
            self.note_running("lost")
            raise
        except KeyboardInterrupt:
            print("stopping: the runs write their checkpoints", flush=True)
            self.note_started()
            self.stop_all(ray)
            self.note_running("stopped")
            raise

    def stop_all(self, ray) -> None:
        """Tell all runs to stop, and wait for them as long as Ray's node lives.

        Those that finish all the same are noted as finished.
        """
        self.stop.touch()
        end = time.monotonic() + STOP_SECONDS + 30
        refs = list(self.refs)
        with contextlib.suppress(NodeDied):
            while refs and not has_died(ray) and time.monotonic() < end:
                ended, refs = ray.wait(refs, timeout=1)
                for ref in ended:
                    if self.exit_code(ray, ref) == 0:
                        self.note(self.refs[ref], "finished", 0)

    def note_running(self, state: str) -> None:
        """Note the runs that are running as lost or stopped."""
        for run in self.runs:
            if self.states[run] == "running":
                self.note(run, state)


def start_ray(args: Args):
    """Ray, connected to the cluster or started here without a dashboard.

    Exits with one line if it cannot be, or if no run would fit in it.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import: nothing is reported
    # Ray's new behaviour, without its warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise SystemExit("benchmark/sweep.py needs Ray: pip install -e '.[sweep]'") from None
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if args.address:
        try:
            ray.init(args.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = f"got {args.address}: {' '.join(str(error).split())}"
            message = f"--address must be that of a running Ray cluster, {reason}"
            raise SystemExit(message) from None
    else:
        has_affinity = hasattr(os, "sched_getaffinity")  # Linux: the cores this process may use
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        ray.init(
            "local",
            num_cpus=args.num_cpus or cores,
            object_store_memory=100 * 2**20,  # bytes; a run returns one number
            include_dashboard=False,
            **quiet,
        )
    for name, needed in (("CPU", args.cpus_per_run), ("GPU", args.gpus_per_run)):
        most = max(node["Resources"].get(name, 0) for node in ray.nodes())
        if needed > most:
            allowed = f"at most {most:g}, what a machine of Ray has"
            raise SystemExit(f"--{name.lower()}s-per-run must be {allowed}, got {needed:g}")
    return ray


def has_died(ray) -> bool:
    """Whether the Ray node that was started here has ended; Ray itself takes 10 to 60 s to see it.

    From then on every run that is submitted fails at once.
    """
    node = ray._private.worker._global_node  # no public function tells it
    names = {name for name, _ in node.dead_processes()}
    return "raylet" in names or "gcs_server" in names


def open_output(path: pathlib.Path):
    """Make the sweep's folder, and keep other sweeps out of it while the returned file is open."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "index.jsonl", "a")  # noqa: SIM115 (held until the process ends)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        entries = (path / "index.jsonl").read_bytes()
        if entries and not entries.endswith(b"\n"):  # the last one was cut off by a crash
            lock.write("\n")
            lock.flush()
    except OSError as error:
        allowed = "a folder that can be written and that no other sweep is using"
        raise SystemExit(f"--output-path must be {allowed}, got {path}: {error}") from None
    return lock


def raise_interrupt(number, frame):
    raise KeyboardInterrupt


def main(args: Args, words: list[str]) -> None:
    """Run the sweep; exits with 1 if a run failed or Ray died, with 130 if it was stopped."""
    check_args(args)
    runs = list_runs(args, words)
    lock = open_output(args.output_path)
    sweep = Sweep(args, runs)
    print(f"{len(runs)} runs, {join(sorted(sweep.shared)) or 'default flags'}")
    print(f"{sweep.counts()}; tensorboard --logdir {args.output_path}", flush=True)
    exit_code = 0
    if "waiting" in sweep.states.values():
        ray = start_ray(args)
        signal.signal(signal.SIGTERM, raise_interrupt)  # after Ray has set its own
        try:
            sweep.run_all(ray)
        except NodeDied:
            line = f"the Ray node of this machine died, {sweep.counts()}: the same command goes on"
            raise SystemExit(line) from None
        except KeyboardInterrupt:
            exit_code = INTERRUPTED
        finally:
            ray.shutdown()
        print(sweep.counts())
    for run in runs:
        if sweep.states[run] == "failed":
            print(f"\n{sweep.label(run)} failed; the last lines of {sweep.log(run)}:")
            for line in tail(sweep.log(run), FAILED_LINES):
                print(f"    {line}")
            exit_code = exit_code or 1
    lock.close()
    raise SystemExit(exit_code)


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own_words, script_words = sys.argv[1:split], sys.argv[split + 1 :]
    main(tyro.cli(Args, description=__doc__, args=own_words), script_words)
