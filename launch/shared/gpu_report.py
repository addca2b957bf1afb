"""The parts of gpu_report.sh: runs their commands, reads what they have left, and writes the report.

Only the standard library here: each command is a process of its own, so that none can take the report down.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECONDS_OF_A_COMMAND = 1800
NARROW = ("bfloat16", "float16")
# Of the loss of a step, against float32 on the CPU. The first steps of a run; later ones drift apart.
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}

# What the interpreter that runs this has: see the part `tensorflow`.
DEVICES = """
import json, tensorflow as tf
gpus = tf.config.list_physical_devices("GPU")
details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
print(json.dumps({"tensorflow": tf.__version__, "build": dict(tf.sysconfig.get_build_info()),
    "gpus": [{k: str(v) for k, v in d.items()} for d in details]}, default=str))
"""
# Arguments: the gin file, the folder of the trace, then bindings.
PROFILE = """
import sys, tensorflow as tf
from lmscale import configuration
from lmscale.data.token_files import PreparedData
from lmscale.distribution.strategies import make_strategy
from lmscale.trainer import Trainer
cpu, gin_file, folder, *bindings = sys.argv[1:]
strategy = make_strategy(cpu_devices=1 if cpu == "cpu" else None)
experiment = configuration.load([gin_file], bindings).experiment
trainer = Trainer(experiment, data=PreparedData.open(experiment.data_dir), strategy=strategy)
for _ in range(3):
    trainer.train_steps()["loss"].numpy()
tf.profiler.experimental.start(folder)
for step in range(10):
    with tf.profiler.experimental.Trace("train", step_num=step, _r=1):
        trainer.train_steps()["loss"].numpy()
tf.profiler.experimental.stop()
"""


class PartFailedError(Exception):
    """What a part has found is wrong, or there is nothing to be found."""


@dataclasses.dataclass
class Part:
    """Some commands, {label: words}, and `read`, which makes JSON of what they have left."""

    name: str
    commands: dict
    read: Callable
    skipped: str | None = None
    variables: dict = dataclasses.field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------ Parts


class Parts:
    """The parts, from what is known beforehand."""

    def __init__(self, *, output, cpu, num_gpus):
        self._output = output
        self._cpu = cpu
        self._python = sys.executable
        self._num_gpus = num_gpus
        self._steps = 6 if cpu else 50
        self._sizes = (
            {"EMBED_DIM": 8, "HIDDEN_DIM": 8, "NUM_LAYERS": 1, "NUM_SAMPLED": 16, "WINDOW": 5} if cpu else {}
        )

    def all(self):
        """All of them, in their order."""
        return [
            self._machine(),
            self._tensorflow(),
            self._losses(),
            self._steps_per_call(),
            self._bench("step_time", ["10000", "100000", "1000000"], sides="lmscale,lmscale_bfloat16"),
            self._bench("peers", ["33278"], sections="step_time"),
            self._bench("memory", ["793470"]),
            self._profile(),
            self._nccl(),
        ]

    def data(self):
        """The command that prepares the book."""
        book = "data/tiny-austen"
        splits = [f"--{split}={book}/{split}.txt" for split in ("train", "valid", "test")]
        return [
            self._python,
            "-m",
            "lmscale.prepare",
            *splits,
            f"--output={self._data()}",
            "--tokenizer=whitespace",
        ]

    def _data(self):
        return str(self._output / "data")

    def _bindings(self, **settings):
        values = {
            "DATA_DIR": self._data(),
            "TRAIN_STEPS": self._steps,
            "LOG_EVERY": 1,
            "EVAL_EVERY": self._steps,
            "SAVE_EVERY": self._steps,
            "experiment.Experiment.eval_tokens": 2000,
            "experiment.Experiment.probe_tokens": 0,
            **self._sizes,
            **settings,
        }
        return [f"{name} = {value!r}" for name, value in values.items()]

    def _train(self, workdir, *, cpu_devices=None, **settings):
        cpu_devices = cpu_devices or (1 if self._cpu else None)
        return [
            *(
                self._python,
                "-m",
                "lmscale.train",
                "--gin_file=configs/quickstart.gin",
                f"--workdir={workdir}",
            ),
            *([f"--cpu_devices={cpu_devices}"] if cpu_devices else []),
            *(f"--gin_param={binding}" for binding in self._bindings(**settings)),
        ]

    def _gpus(self, count):
        """The environment of a command that is to see so many GPUs: the first ones."""
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = listed.split(",") if listed else [str(i) for i in range(count)]
        return {} if self._cpu else {"CUDA_VISIBLE_DEVICES": ",".join(names[:count])}

    def _machine(self):
        commands = {"smi": ["nvidia-smi"], "topology": ["nvidia-smi", "topo", "-m"]}
        return Part("machine", commands, lambda logs: {name: log.read_text() for name, log in logs.items()})

    def _tensorflow(self):
        def read(logs):
            found = json.loads(logs["devices"].read_text().splitlines()[-1])
            if not found["gpus"] and not self._cpu:
                raise PartFailedError(
                    f"TensorFlow sees no GPU; it was built with {found['build']}. Is launch/setup.sh --gpu done?"
                )
            return found

        return Part("tensorflow", {"devices": [self._python, "-c", DEVICES]}, read)

    def _losses(self):
        folder = self._output / "losses"
        names = {"cpu_float32": {"cpu_devices": 1}, "float32": {}}
        names |= {dtype: {"experiment.Experiment.compute_dtype": dtype} for dtype in NARROW}
        commands = {name: self._train(folder / name, **settings) for name, settings in names.items()}

        def read(logs):
            runs = {name: metrics(folder / name) for name in logs}
            expected = losses(runs["cpu_float32"])
            results = {name: summary(lines) for name, lines in runs.items()}
            for name, tolerance in TOLERANCES.items():
                pairs = [(a, b) for a, b in zip(losses(runs[name]), expected, strict=True) if a is not None]
                results[name]["steps_compared"] = len(pairs)
                results[name]["largest_difference"] = max(abs(a / b - 1) for a, b in pairs)
                results[name]["tolerance"] = tolerance
            wrong = [name for name in TOLERANCES if results[name]["largest_difference"] > TOLERANCES[name]]
            if wrong:
                raise PartFailedError(f"the losses of {', '.join(wrong)} are not those of the CPU: {results}")
            return results

        return Part("losses", commands, read, variables=self._gpus(1))

    def _steps_per_call(self):
        folder = self._output / "steps_per_call"
        steps, every = (12, 4) if self._cpu else (200, 20)
        settings = {"TRAIN_STEPS": steps, "LOG_EVERY": every, "EVAL_EVERY": steps, "SAVE_EVERY": steps}
        commands = {
            str(k): self._train(folder / str(k), **settings, **{"experiment.Experiment.steps_per_call": k})
            for k in (1, min(10, every))
        }
        return Part(
            "steps_per_call",
            commands,
            lambda logs: {name: summary(metrics(folder / name)) for name in logs},
            variables=self._gpus(1),
        )

    def _bench(self, name, vocab_sizes, *, sections=None, sides=None):
        folder = self._output / name
        tiny = {
            "embed_dim": 8,
            "num_layers": 1,
            "batch_size": 4,
            "window": 3,
            "num_sampled": 16,
            "repeats": 1,
        }
        settings = {"sections": sections or name, "output": folder, "vocab_sizes": ",".join(vocab_sizes)}
        if sides:
            settings["sides"] = sides
        if self._cpu:
            settings |= tiny | {"vocab_sizes": "100"}
        command = [
            self._python,
            "-m",
            "lmscale.bench",
            *(f"--{key}={value}" for key, value in settings.items()),
        ]
        return Part(
            name,
            {"bench": command},
            lambda logs: json.loads((folder / "results.json").read_text()),
            variables=self._gpus(1),
        )

    def _profile(self):
        folder = self._output / "profile"
        kind = "cpu" if self._cpu else "gpu"
        command = [
            self._python,
            "-c",
            PROFILE,
            kind,
            "configs/quickstart.gin",
            str(folder),
            *self._bindings(),
        ]

        def read(logs):
            traces = sorted(str(path) for path in folder.rglob("*.xplane.pb"))
            if not traces:
                raise PartFailedError(f"there is no trace in {folder}")
            return {"traces": traces, "show": f"tensorboard --logdir={folder}"}

        return Part("profile", {"trace": command}, read, variables=self._gpus(1))

    def _nccl(self):
        folder = self._output / "nccl"
        two_processes = self._train(folder / "two_processes")
        commands = {
            "one": self._train(folder / "one", cpu_devices=1 if self._cpu else None),
            "two": self._train(folder / "two", cpu_devices=2 if self._cpu else None),
            "two_processes": ["launch/local_workers.sh", "2", "--", *two_processes],
        }
        skipped = None
        if not self._cpu and self._num_gpus < 2:
            skipped = f"two GPUs are needed, and nvidia-smi lists {self._num_gpus}"

        def read(logs):
            runs = {name: metrics(folder / name) for name in logs}
            expected = losses(runs["one"])
            results = {name: summary(lines) for name, lines in runs.items()}
            for name in ("two", "two_processes"):
                pairs = zip(losses(runs[name]), expected, strict=True)
                results[name]["largest_difference"] = max(abs(a / b - 1) for a, b in pairs)
                if results[name]["largest_difference"] > TOLERANCES["float32"]:
                    raise PartFailedError(f"the losses of {name} are not those of one device: {results}")
            return results

        return Part("nccl", commands, read, skipped=skipped, variables=self._gpus(2))


def metrics(workdir):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "train" / "metrics.jsonl").read_text().splitlines()]


def losses(lines):
    """The training loss of each line; None where no step of it was good."""
    return [line["sampled_loss_nats"] for line in lines]


def summary(lines):
    """What the lines of a run say: first and last loss, time of a step without the first ones, memory, loss scale."""
    good = [loss for loss in losses(lines) if loss is not None]
    seconds = [line["step_secs"] for line in lines][len(lines) // 3 :]
    memory = [value for tag, value in lines[-1].items() if tag.startswith("memory_mib/")]
    found = {
        "steps": lines[-1]["step"],
        "first_loss": good[0],
        "last_loss": good[-1],
        "median_step_ms": 1000 * statistics.median(seconds),
        "memory_mib": max(memory, default=None),
        "skipped_steps": lines[-1]["skipped_steps"],
    }
    if "loss_scale" in lines[-1]:
        found["loss_scale"] = lines[-1]["loss_scale"]
        found["overflowed_steps"] = sum(line["overflowed_steps"] for line in lines)
    return found


# ---------------------------------------------------------------------------------------------------------- Running


def run_command(words, log, variables):
    """Runs a command with its output in a file; raises PartFailedError, with the end of it, unless it succeeds."""
    print(f"+ {shlex.join(words)[:300]}", file=sys.stderr, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stdout, log.with_suffix(".stderr").open("w") as stderr:
        try:
            code = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=os.environ | variables,
                timeout=SECONDS_OF_A_COMMAND,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise PartFailedError(f"{log.stem} took more than {SECONDS_OF_A_COMMAND} s") from None
        except OSError as error:
            raise PartFailedError(f"{words[0]}: {error.strerror}") from error
    if code:
        end = "\n".join(log.with_suffix(".stderr").read_text(errors="replace").splitlines()[-5:])
        raise PartFailedError(f"{log.stem} ended with {code}: {end}")


def run_part(part, output):
    """{"status": "ok", "failed" or "skipped", ...} of a part, whatever happens in it."""
    if part.skipped:
        return {"status": "skipped", "reason": part.skipped}
    start = time.monotonic()
    logs = {label: output / "logs" / part.name / f"{label}.log" for label in part.commands}
    result = {"commands": {label: shlex.join(words) for label, words in part.commands.items()}}
    try:
        for label, words in part.commands.items():
            run_command(words, logs[label], part.variables)
        result |= {"status": "ok", "results": part.read(logs)}
    except Exception as error:  # Of whatever kind: the others go on.
        kind = "" if isinstance(error, PartFailedError) else f"{type(error).__name__}: "
        result |= {"status": "failed", "reason": f"{kind}{error}"}
    return result | {"seconds": round(time.monotonic() - start, 1)}


# ----------------------------------------------------------------------------------------------------------- Report


def markdown(report):
    """The report for people."""
    lines = [
        "# GPU report",
        "",
        f"Written {report['written']} on {report['host']}"
        + (": a rehearsal on the CPU, whose numbers mean nothing." if report["rehearsal"] else "."),
        "",
        "| part | status | seconds | |",
        "|---|---|---|---|",
    ]
    for name, part in report["parts"].items():
        reason = " ".join(part.get("reason", "").replace("|", r"\|").split())
        lines.append(f"| {name} | {part['status']} | {part.get('seconds', '')} | {reason[:300]} |")
    for name, part in report["parts"].items():
        results = part.get("results")
        if results is None:
            continue
        lines += ["", f"## {name}", ""]
        if name in ("losses", "steps_per_call", "nccl"):
            columns = list(dict.fromkeys(key for row in results.values() for key in row))
            lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for row_name, row in results.items():
                cells = [row.get(column, "") for column in columns]
                cells = [f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells]
                lines.append(f"| {row_name} | {' | '.join(cells)} |")
        elif name == "machine":
            lines += ["```", *results["smi"].splitlines(), *results["topology"].splitlines(), "```"]
        elif name in ("step_time", "peers", "memory"):
            lines.append(f"In {name}/report.md, beside this file.")
        else:
            lines += ["```", json.dumps(results, indent=1), "```"]
    return "\n".join(lines) + "\n"


def count_gpus():
    """GPUs that nvidia-smi lists."""
    try:
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return (
        sum(line.startswith("GPU ") for line in result.stdout.splitlines()) if result.returncode == 0 else 0
    )


def main():
    parser = argparse.ArgumentParser(prog="gpu_report.sh", allow_abbrev=False)
    parser.add_argument("--print", action="store_true", dest="show")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", default="runs/gpu_report", type=Path)
    parser.add_argument("--parts")
    flags = parser.parse_args()
    output = flags.output.absolute()
    all_parts = Parts(output=output, cpu=flags.cpu, num_gpus=count_gpus())
    parts = {part.name: part for part in all_parts.all()}
    wanted = flags.parts.split(",") if flags.parts else list(parts)
    if unknown := [name for name in wanted if name not in parts]:
        parser.error(f"--parts must be of {', '.join(parts)}. Received: {', '.join(unknown)}")
    if flags.show:
        print(shlex.join(all_parts.data()))
        for name in wanted:
            for words in parts[name].commands.values():
                variables = [f"{key}={value}" for key, value in parts[name].variables.items()]
                print(f"{name}: {shlex.join([*(['env'] if variables else []), *variables, *words])}")
        return 0
    for name in ("losses", "steps_per_call", "nccl", "profile"):
        if name in wanted:  # A run that has finished would not be done again.
            shutil.rmtree(output / name, ignore_errors=True)
    report = {"host": os.uname().nodename, "rehearsal": flags.cpu, "parts": {}}
    if not (output / "data" / "manifest.json").is_file():
        try:
            run_command(all_parts.data(), output / "logs" / "data.log", {})
        except PartFailedError as error:
            print(f"the data: {error}", file=sys.stderr)
    for name in wanted:
        print(f"[gpu_report] {name}", file=sys.stderr, flush=True)
        report["parts"][name] = run_part(parts[name], output)
        report["written"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (output / "report.md").write_text(markdown(report))
    print((output / "report.md").read_text())
    return int(any(part["status"] == "failed" for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
