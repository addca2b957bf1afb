"""Random faults in tiny runs of several processes, again and again: what soak.sh, which checks the flags, runs.

Usage: soak.py FAULTS SEED N,N FOLDER run|print

    FOLDER/data          the prepared text
    FOLDER/whole_N       the run in N processes that nothing interrupts
    FOLDER/run_N         the one that has the faults; when it is finished and compared, it starts anew
    FOLDER/logs          what the processes of the last starts have printed
    FOLDER/soak.jsonl    a line for each fault, and one for each finished run

The processes of a start are forked from one that has imported TensorFlow, which saves most of the time.
"""

import ctypes
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMISED_SECS = 60  # After a fault, every process has ended.
START_SECS = 900  # Without a fault, a start does its first steps within this time on any machine.
STEPS, SAVE_EVERY, MOST_STEPS_BEFORE_FAULT = 100, 10, 18
LOST, STOPPED = 69, 75
KINDS = (
    *("kill_chief", "kill_other", "stop_chief", "stop_other", "term"),
    *("kill_chief_in_save", "kill_other_in_save", "flip_bit", "truncate", "lose_index"),
)
MARK = "damaged_by_soak"
DAMAGES = ("flip_bit", "truncate", "lose_index")
SETTINGS = {
    "TRAIN_STEPS": STEPS,
    "GLOBAL_BATCH_SIZE": 8,
    "WINDOW": 5,
    "EMBED_DIM": 8,
    "HIDDEN_DIM": 12,
    "NUM_LAYERS": 1,
    "DROPOUT": 0.3,
    "NUM_SAMPLED": 64,
    "SEED": 5,
    "LOG_EVERY": 1,
    "EVAL_EVERY": 10 * STEPS,
    "SAVE_EVERY": SAVE_EVERY,
    "experiment.Experiment.probe_tokens": 0,
}


def planned(number, *, seed, sizes):
    """The fault of a number: a dict, the same each time."""
    generator = random.Random(f"{seed}/{number}")
    size = sizes[number % len(sizes)]
    kind = generator.choice(KINDS)
    rank = 0 if "chief" in kind else generator.randrange(0 if kind == "term" else 1, size)
    return {
        "fault": number,
        "processes": size,
        "kind": kind,
        "rank": rank,
        "after_steps": generator.randint(1, MOST_STEPS_BEFORE_FAULT),
        "after_secs": round(generator.uniform(0, 0.05), 3),
        "operation": generator.randint(1, 18 if rank == 0 else 4),
        "place": generator.random(),
    }


# ------------------------------------------------------------------------------------------------- One process


def become(module, arguments, log, operation):
    """Makes a forked process the command; with an operation, one that is killed in its next save."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: should the soak be killed, so is this.
    for descriptor in (1, 2):
        with open(log, "a") as file:
            os.dup2(file.fileno(), descriptor)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(ROOT)
    # Every process writes some of each save, as where tables are large.
    from lmscale.checkpoints.directory import Checkpoints

    assert Checkpoints.__init__.__kwdefaults__ is not None
    Checkpoints.__init__.__kwdefaults__["block_mib"] = 1e-3
    if operation is not None:
        die_in_save(operation)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def die_in_save(operation):
    """Kills this process at the n-th operation on files of a save, or at the end of one that has fewer."""
    import tensorflow as tf

    from lmscale.checkpoints.directory import Checkpoints

    save, num_operations, is_saving = Checkpoints.save, 0, False

    def deadly(function):
        def counted(*args, **kwargs):
            nonlocal num_operations
            num_operations += is_saving
            if num_operations == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    def deadly_save(self, *args, **kwargs):
        nonlocal is_saving
        is_saving = True
        save(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = deadly_save
    for module, names in (
        (tf.raw_ops, ("SaveV2", "MergeV2Checkpoints")),
        (os, ("fsync", "mkdir", "unlink", "rmdir", "rename", "replace")),
    ):
        for name in names:
            setattr(module, name, deadly(getattr(module, name)))


def fork_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "lmscale.run", "lmscale.configuration"])
    return context


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Start:
    """One start of a run: its processes, by rank, and what they have printed."""

    def __init__(self, size, *, workdir, data, logs, deadly=None):
        """`deadly`: {rank: operation of its next save at which the process is killed}."""
        self.logs = [logs / f"{workdir.name}.{rank}" for rank in range(size)]
        logs.mkdir(parents=True, exist_ok=True)
        bindings = {"DATA_DIR": str(data), **SETTINGS}
        common = [
            f"--gin_file={ROOT / 'configs' / 'quickstart.gin'}",
            f"--workdir={workdir}",
            "--cpu_devices=1",
            f"--coordinator=127.0.0.1:{free_port()}",
            f"--num_processes={size}",
            *(f"--gin_param={name} = {value!r}" for name, value in bindings.items()),
        ]
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.write_text("")
            arguments = [*common, f"--process_id={rank}"]
            operation = (deadly or {}).get(rank)
            process = fork_server().Process(
                target=become, args=("lmscale.train", arguments, str(log), operation)
            )
            process.start()
            self.processes.append(process)

    def printed(self, rank=0):
        return self.logs[rank].read_text(errors="replace")

    def step(self):
        """The last step that this start has logged, or None."""
        steps = re.findall(r"\] step (\d+)  sampled_loss", self.printed())
        return int(steps[-1]) if steps else None

    def resumed_at(self):
        """The step that it went on from; 0 if it began at the beginning."""
        found = re.search(r"resuming at step (\d+)$", self.printed(), re.MULTILINE)
        return int(found[1]) if found else 0

    def wait(self, secs, *, ranks=None):
        """Waits for processes to end; returns whether all have."""
        deadline = time.monotonic() + secs
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                process.join(max(deadline - time.monotonic(), 0))
        return all(
            p.exitcode is not None for r, p in enumerate(self.processes) if ranks is None or r in ranks
        )

    def has_ended(self):
        return any(process.exitcode is not None for process in self.processes)

    def send(self, rank, number):
        if self.processes[rank].exitcode is None:
            os.kill(self.processes[rank].pid, number)

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def codes(self):
        return [process.exitcode for process in self.processes]


# --------------------------------------------------------------------------------------------------- One fault


def saved_steps(workdir):
    """Steps of the published checkpoints, ascending."""
    return sorted(int(path.name[5:]) for path in (workdir / "checkpoints").glob("step_*"))


def damaged_steps(workdir):
    """Those of them that are damaged: one stays until the run removes it, or saves that step again."""
    return [
        step
        for step in saved_steps(workdir)
        if (workdir / "checkpoints" / f"step_{step:08d}" / MARK).exists()
    ]


def damage(workdir, kind, place):
    """Damages the newest checkpoint, and marks it."""
    directory = workdir / "checkpoints" / f"step_{saved_steps(workdir)[-1]:08d}"
    (directory / MARK).touch()
    if kind == "lose_index":
        (directory / "tensors.index").unlink()
        return
    files = sorted(path for path in directory.iterdir() if path.name != MARK and path.stat().st_size)
    path = files[int(place * 1000) % len(files)]
    content = bytearray(path.read_bytes())
    position = int(place * len(content))
    if kind == "flip_bit":
        content[position] ^= 1 << int(place * 8)
        path.write_bytes(content)
    else:
        path.write_bytes(content[:position])


class Soak:
    def __init__(self, folder, *, seed, sizes):
        self.folder, self.seed, self.sizes = folder, seed, sizes
        self.journal = folder / "soak.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def lines(self):
        if not self.journal.exists():
            return []
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def note(self, line):
        with self.journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = {name: value for name, value in line.items() if value not in (None, [], "")}
        print(" ".join(f"{name}={value}" for name, value in shown.items()), flush=True)

    def start(self, size, *, workdir=None, deadly=None):
        return Start(
            size,
            workdir=workdir or self.folder / f"run_{size}",
            data=self.folder / "data",
            logs=self.folder / "logs",
            deadly=deadly,
        )

    def prepare(self):
        """Makes the data and the uninterrupted runs, unless they are there."""
        if not (self.folder / "data" / "manifest.json").exists():
            prepare_data(self.folder)
        for size in self.sizes:
            workdir = self.folder / f"whole_{size}"
            if (workdir / "finished.json").exists():
                continue
            started = self.start(size, workdir=workdir)
            if not started.wait(START_SECS) or any(started.codes()):
                started.kill()
                raise OSError(
                    f"the run that nothing interrupts must finish. Received: {started.codes()}. See {self.folder}/logs"
                )
            print(f"uninterrupted: {workdir}", flush=True)

    def run(self, number):
        """Puts in the fault of a number, as soon as a start of its run lives long enough."""
        plan = planned(number, seed=self.seed, sizes=self.sizes)
        while not self._try(plan):
            pass

    def _try(self, plan):
        size, kind, rank = plan["processes"], plan["kind"], plan["rank"]
        workdir = self.folder / f"run_{size}"
        begin = time.monotonic()
        problems = []
        if kind in DAMAGES and len(saved_steps(workdir)) - len(damaged_steps(workdir)) < 2:
            kind = "kill_other"  # There is nothing that it could fall back to.
            rank = max(rank, 1)
        if kind in DAMAGES:
            damage(workdir, kind, plan["place"])
        whole = sorted(set(saved_steps(workdir)) - set(damaged_steps(workdir)))
        expected = whole[-1] if whole else 0
        num_damaged = sum(step > expected for step in damaged_steps(workdir))
        deadly = {rank: plan["operation"]} if kind.endswith("_in_save") else {}
        started = self.start(size, deadly=deadly)
        try:
            due = expected + plan["after_steps"]
            deadline = time.monotonic() + START_SECS
            while not started.has_ended() and time.monotonic() < deadline:
                if (started.step() or 0) >= due and not deadly:
                    break
                time.sleep(0.02)
            if not started.has_ended() and time.monotonic() >= deadline:
                problems.append("hang before the fault")
            is_delivered = not started.has_ended() or bool(deadly)
            fault_at = time.monotonic()
            if is_delivered and not deadly:
                time.sleep(plan["after_secs"])
                number = signal.SIGTERM if kind == "term" or kind in DAMAGES else signal.SIGKILL
                started.send(rank, signal.SIGSTOP if kind.startswith("stop") else number)
            others = [other for other in range(size) if other != rank or number_ends(kind)]
            if not started.wait(PROMISED_SECS, ranks=others):
                problems.append(f"hang: {started.codes()}")
            ended_secs = time.monotonic() - fault_at
            started.kill()
            codes = started.codes()
        except BaseException:
            started.kill()
            raise
        problems += self._problems(started, kind, rank, codes, expected, num_damaged)
        is_finished = codes == [0] * size
        if is_finished:
            problems += self._compare(size)
        line = {
            **plan,
            "kind": kind,
            "expected": expected,
            "resumed_at": started.resumed_at(),
            "reached": started.step(),
            "codes": codes,
            "ended_secs": round(ended_secs, 1),
            "secs": round(time.monotonic() - begin, 1),
            "finished": is_finished,
            "problems": problems,
        }
        for name in ("after_steps", "after_secs", "operation", "place"):
            del line[name]
        if is_finished and kind not in DAMAGES:
            line["fault"] = None  # It came too late: the run was over.
        self.note(line)
        if problems:
            kept = self.folder / f"problem_{plan['fault']}"
            shutil.copytree(self.folder / "logs", kept, dirs_exist_ok=True)
        if is_finished:
            shutil.rmtree(workdir, ignore_errors=True)
        return line["fault"] is not None

    def _problems(self, started, kind, rank, codes, expected, num_damaged):
        """What is not as promised of a start that was to pass over so many checkpoints, to the expected step."""
        problems = []
        text = started.printed()
        reached_training = started.step() is not None
        if reached_training and started.resumed_at() != expected:
            problems.append(f"resumed at {started.resumed_at()} instead of {expected}")
        if expected and "starting over" in text:
            problems.append("silent restart")
        num_reported = text.count("DAMAGED CHECKPOINT")
        if num_reported != num_damaged and reached_training:
            problems.append(f"{num_reported} damaged checkpoints instead of {num_damaged}")
        if codes == [0] * len(codes):
            return problems
        if number_ends(kind):
            wanted = [[STOPPED] * len(codes)]
        else:
            wanted = [[-signal.SIGKILL if r == rank else LOST for r in range(len(codes))]]
        if codes not in wanted:
            problems.append(f"codes {codes} instead of {wanted[0]}")
        if not reached_training:
            problems.append("ended before its first step")
        return problems

    def _compare(self, size):
        """Compares the last checkpoint with that of the run that nothing interrupted."""
        import numpy as np
        import tensorflow as tf

        values = []
        for name in ("whole", "run"):
            prefix = self.folder / f"{name}_{size}" / "checkpoints" / f"step_{STEPS:08d}" / "tensors"
            reader = tf.train.load_checkpoint(str(prefix))
            values.append({key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()})
        whole, run = values
        if whole.keys() != run.keys():
            return [f"other tensors: {sorted(whole.keys() ^ run.keys())}"]
        differ = [
            key for key, x in whole.items() if np.asarray(x).tobytes() != np.asarray(run[key]).tobytes()
        ]
        return [f"other bits in {', '.join(sorted(differ))}"] if differ else []


def number_ends(kind):
    """Whether the fault asks the process to end, and so ends all of them in good order."""
    return kind == "term" or kind in DAMAGES


def prepare_data(folder):
    """Writes and prepares a made-up text of 300 words in which one says something about the next."""
    generator = random.Random(0)
    words = [f"w{number}" for number in range(300)]
    folder.mkdir(parents=True, exist_ok=True)
    names = {"train": 4000, "valid": 300, "test": 200}
    for name, count in names.items():
        ids = [min(int(generator.paretovariate(0.6)) - 1, len(words) - 1) for _ in range(count // 2)]
        text = " ".join(f"{words[i]} {words[i * 7 % len(words)]}" for i in ids)
        (folder / f"{name}.txt").write_text(text + "\n")
    arguments = [f"--{name}={folder / name}.txt" for name in names]
    arguments += ["--tokenizer=whitespace", f"--output={folder / 'data'}"]
    process = fork_server().Process(
        target=become, args=("lmscale.prepare", arguments, str(folder / "prepare.log"), None)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise OSError(
            f"the text must be prepared. Received: exit code {process.exitcode}. See {folder}/prepare.log"
        )


def summary(lines):
    """What the journal says altogether, as a dict."""
    faults = [line for line in lines if line["fault"] is not None]
    problems = [problem for line in lines for problem in line["problems"]]

    def count(word):
        return sum(word in problem for problem in problems)

    return {
        "faults": len(faults),
        "by_kind": {kind: sum(line["kind"] == kind for line in faults) for kind in KINDS},
        "finished_runs": sum(line["finished"] for line in lines),
        "hangs": count("hang"),
        "wrong_resumes": count("resumed at"),
        "silent_restarts": count("silent restart"),
        "other_bits": count("other bits") + count("other tensors"),
        "other_problems": len(problems)
        - sum(map(count, ("hang", "resumed at", "silent restart", "other bits", "other tensors"))),
        "slowest_end_secs": max((line["ended_secs"] for line in faults), default=0),
        "mean_secs": round(sum(line["secs"] for line in lines) / max(len(lines), 1), 1),
    }


def main(num_faults, seed, sizes, folder, action):
    num_faults, seed, sizes = int(num_faults), int(seed), [int(size) for size in sizes.split(",")]
    if action == "print":
        for number in range(num_faults):
            print(json.dumps(planned(number, seed=seed, sizes=sizes)))
        return 0
    soak = Soak(Path(folder).resolve(), seed=seed, sizes=sizes)
    soak.prepare()
    done = sum(line["fault"] is not None for line in soak.lines())
    for number in range(done, num_faults):
        soak.run(number)
    found = summary(soak.lines())
    print(json.dumps(found))
    return int(any(line["problems"] for line in soak.lines()))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        sys.exit(main(*sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
