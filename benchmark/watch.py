"""Play episodes of a trained agent as its evaluation does, print the returns, and show the first.

    python benchmark/watch.py runs/HalfCheetah-v5__gempo_linear__1__1700000000  # in a window
    python benchmark/watch.py runs/... --output cheetah.gif --width 240 --height 180 --seconds 5
    python benchmark/watch.py runs/... --output cheetah.mp4 --width 640 --seconds 30

A path is a run's folder (its newest checkpoint, else its saved model) or one of those files. The
agent acts by the run's own flags. By default the episodes are those of the evaluation at the
checkpoint's step, with the same returns. The file is unpickled: watch only what you trust.
"""

import gzip
import importlib.util
import math
import os
import pathlib
import pickle
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.envs.mujoco import MujocoEnv
from PIL import Image, ImageOps

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.sweep import find_script, load_script  # noqa: E402 (the line above finds it)
from gempo_linear import find_file, one_line  # noqa: E402 (equal in all scripts)


@dataclass(frozen=True)
class Args:
    paths: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]
    """a run's folder, a checkpoint or a saved model; of several, as of runs/*, the newest"""
    output: pathlib.Path | None = None
    """file of the first episode, .gif or .mp4; None: a window, where there is a display"""
    episodes: int | None = None  # episodes to play; None: as many as the run's evaluation
    seed: int | None = None  # seed of the episodes; None: that of the evaluation at the step
    width: int = 480  # width of a frame in pixels
    height: int = 360  # height of a frame in pixels
    seconds: float = 10.0  # length of the file at most, at the environment's own speed
    skip: int | None = None
    """steps from one frame to the next (a .gif has at most 50 frames a second); None: at most 30"""
    colors: int = 128  # colours of a .gif; fewer make a smaller file


class Saved(NamedTuple):
    """What a checkpoint or a saved model holds for watching."""

    script: ModuleType
    args: Any  # the run's flags
    agent: Any
    step: int | None  # environment steps made when a checkpoint was written


class Watched(gym.Wrapper):
    """Counts an episode's return and steps, and keeps its frames, `max_frames` at most."""

    def __init__(self, env: gym.Env, skip: int = 1, max_frames: int = 0):
        super().__init__(env)
        self.skip = skip
        self.max_frames = max_frames
        self.frames = []
        self.episode_return = 0.0
        self.num_steps = 0

    def reset(self, **kwargs):
        result = self.env.reset(**kwargs)
        self.keep_frame()
        return result

    def step(self, action):
        result = self.env.step(action)
        _, reward, _, _, _ = result
        self.episode_return += reward
        self.num_steps += 1
        self.keep_frame()
        return result

    def keep_frame(self) -> None:
        if self.num_steps % self.skip == 0 and len(self.frames) < self.max_frames:
            self.frames.append(self.env.render())


def check_args(args: Args) -> None:
    """Exit with one line if a flag is out of its range, or if what it needs is missing."""

    def require(flag, is_allowed, allowed):
        if not is_allowed:
            raise SystemExit(f"--{flag} must be {allowed}, got {getattr(args, flag)}")

    for flag in ("episodes", "width", "height", "skip"):
        value = getattr(args, flag)
        require(flag, value is None or value >= 1, "a whole number, at least 1")
    require("seed", args.seed is None or 0 <= args.seed < 2**32, "from 0 to 2**32 - 1")
    if not args.paths:
        raise SystemExit("paths must name a run's folder, a checkpoint or a saved model")
    require("seconds", 0 < args.seconds < math.inf, "a finite number above 0")
    require("colors", 2 <= args.colors <= 256, "a whole number from 2 to 256")
    if args.output is not None:
        suffix = args.output.suffix
        require("output", suffix in (".gif", ".mp4"), "a file that ends in .gif or .mp4")
        require("output", args.output.parent.is_dir(), "in a folder that exists")
        has_moviepy = importlib.util.find_spec("moviepy") is not None
        if suffix == ".mp4" and not has_moviepy:
            raise SystemExit("an .mp4 needs moviepy: pip install -e '.[video]'; a .gif does not")


def load(path: pathlib.Path) -> Saved:
    """The agent in a file or in a run's folder, by the script that wrote it.

    Exits with one line if it cannot be used.
    """
    path = find_file(path)
    try:
        with gzip.open(path) as file:
            content = pickle.load(file)
        name = content["script"]
    except Exception as error:  # of any kind: the file may hold anything
        raise SystemExit(f"{path} cannot be used: {one_line(error)}") from None
    script_path = find_script(name)
    if script_path is None:
        where = f"which is neither here nor in {ROOT}"
        raise SystemExit(f"{path} was written by {name}.py, {where}")
    script = load_script(script_path)
    args, agent = script.load_agent(path)
    return Saved(script, args, agent, content.get("step"))


def has_display() -> bool:
    is_set = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return sys.platform != "linux" or is_set


def make_rendered(script: ModuleType, env_id: str, args: Args) -> gym.Env:
    """The environment as the script makes it, drawn into frames or, without --output, a window."""
    env = script.make_env(env_id)
    spec = gym.spec(env.unwrapped.spec.id)  # gymnasium's own entry, which gym.make follows
    original = spec.kwargs
    drawing = {"render_mode": "human" if args.output is None else "rgb_array"}
    if isinstance(env.unwrapped, MujocoEnv):  # others have a size of their own
        drawing |= {"width": args.width, "height": args.height}
        model = env.unwrapped.model
        cameras = [model.camera(i).name for i in range(model.ncam)]
        if "track" in cameras:  # it follows the body, which may run out of the default view
            drawing["camera_name"] = "track"
    env.close()
    spec.kwargs = original | drawing
    try:
        env = script.make_env(env_id)
    except SystemExit:
        # It takes no size or camera: `write_film` fits its frames to --width and --height.
        spec.kwargs = original | {"render_mode": drawing["render_mode"]}
        env = script.make_env(env_id)
    finally:
        spec.kwargs = original
    try:
        env.reset()
        env.render()
    except Exception as error:  # of any kind: the environment may be the user's own
        raise SystemExit(f"{env_id} cannot be drawn: {one_line(error)}") from None
    return env


def steps_per_second(env: gym.Env) -> float:
    """How many steps of an environment are a second of its own time."""
    rate = env.metadata.get("render_fps", 30)
    unwrapped = env.unwrapped
    is_shimmy = type(unwrapped).__module__.startswith("shimmy.dm_control")
    if is_shimmy and rate == unwrapped.metadata["render_fps"]:
        return 1 / unwrapped.dt  # shimmy's own number is the duration of a step in milliseconds
    return rate


def play(saved: Saved, args: Args) -> tuple[list[Watched], float]:
    """The episodes, played, and the frames a second of the first."""
    script, run_args, agent, step = saved
    seed = args.seed
    if seed is None:  # as `train` has it; a saved model is of the end
        rounds = math.ceil(run_args.total_timesteps / run_args.num_envs)
        seed = run_args.seed + script.EVAL_SEED_STRIDE * (step or rounds * run_args.num_envs)
    is_drawn = args.output is not None or has_display()
    script.choose_renderer(replace(run_args, capture_video=is_drawn))
    episodes = args.episodes or run_args.eval_episodes
    envs = [Watched(script.make_env(run_args.env_id)) for _ in range(episodes)]
    rate = steps_per_second(envs[0])
    skip = args.skip or math.ceil(rate / 30)
    if args.output is not None and args.output.suffix == ".gif":
        # Viewers slow down a GIF of more than 50 frames a second.
        skip = max(skip, math.ceil(rate / 50))
    if is_drawn:
        env = make_rendered(script, run_args.env_id, args)
        max_frames = 0 if args.output is None else math.ceil(args.seconds * rate / skip)
        envs[0] = Watched(env, skip, max_frames)
    script.evaluate(agent, envs, seed)
    for env in envs:
        env.close()
    return envs, rate / skip


def write_film(frames: list[np.ndarray], rate: float, args: Args) -> None:
    """Write frames to --output, `rate` a second; exits with one line if it cannot be written."""
    size = (args.width, args.height)
    images = [ImageOps.fit(Image.fromarray(frame), size) for frame in frames]
    try:
        if args.output.suffix == ".gif":
            write_gif(args.output, images, rate, args.colors)
        else:
            from moviepy import ImageSequenceClip

            clip = ImageSequenceClip([np.asarray(image) for image in images], fps=rate)
            clip.write_videofile(str(args.output), logger=None)
    except OSError as error:
        raise SystemExit(f"--output {args.output} cannot be written: {error}") from None
    megabytes = args.output.stat().st_size / 1e6
    print(f"{args.output}: {len(frames)} frames, {rate:g} a second, {megabytes:.2f} MB")


def write_gif(path: pathlib.Path, images: list[Image.Image], rate: float, colors: int) -> None:
    """Write a GIF that repeats, with the same `colors` in all frames, which keeps it small."""
    some = images[:: math.ceil(len(images) / 8)]
    sample = np.concatenate([np.asarray(image) for image in some])
    palette = Image.fromarray(sample).quantize(colors)
    no_dither = Image.Dither.NONE
    first, *others = [image.quantize(palette=palette, dither=no_dither) for image in images]
    # A GIF has durations of whole centiseconds: so that their sum is right, not all are equal.
    ends = np.rint(100 * np.arange(len(images) + 1) / rate).astype(int)
    durations = [10 * int(centiseconds) for centiseconds in np.diff(ends)]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)


def find_newest(paths: tuple[pathlib.Path, ...]) -> pathlib.Path:
    """Of several files and runs' folders the newest file; folders without an agent are left out."""
    files = []
    for path in paths:
        try:
            files.append(find_file(path))
        except SystemExit:  # such as runs/cache among runs/*
            if len(paths) == 1:
                raise
    if not files:
        raise SystemExit(f"none of {len(paths)} paths holds a checkpoint or a saved model")
    newest = max(files, key=lambda file: file.stat().st_mtime if file.exists() else 0)
    if len(files) > 1:
        print(f"of {len(files)} the newest: {newest}")
    return newest


def main(args: Args) -> None:
    """Load, play, print and show."""
    check_args(args)
    newest = find_newest(args.paths)
    saved = load(newest)
    if args.output is None and not has_display():
        print("no display: --output film.gif shows the first episode")
    what = "saved model" if saved.step is None else f"step {saved.step:,}"
    print(f"{saved.args.env_id}, {saved.script.__name__}, {what}", flush=True)
    envs, rate = play(saved, args)
    returns = [env.episode_return for env in envs]
    for i, env in enumerate(envs):
        print(f"episode {i + 1}: return {env.episode_return:.1f} in {env.num_steps} steps")
    print(f"mean return {np.mean(returns):.1f}, standard deviation {np.std(returns):.1f}")
    if args.output is not None:
        write_film(envs[0].frames, rate, args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
