"""A process is killed, stopped or asked to end: all end, in time and saying why, and the rerun loses nothing saved.

One work directory goes through all of it, start after start: each start is also the rerun after the fault before.
"""

import functools
import re
import signal
import time

import faulty_runs
import tiny_runs
from faulty_runs import INTERRUPTED, LAST_STEP, LOST, PROMISED_SECS, STOPPED

NAMES = [r"process 0 of 2 \(127\.0\.0\.1:\d+\)", r"process 1 of 2 \(127\.0\.0\.1:\d+\)"]


class Story:
    """A run that is started again and again."""

    def __init__(self, directory, *, data_dir, reference):
        self.workdir = directory / "run"
        self._directory, self._data_dir, self._reference = directory, data_dir, reference
        self._num_starts = 0

    def start(self, **kwargs):
        """Starts the run, and waits until it has done some steps beyond what it resumed from."""
        saved = tiny_runs.checkpoint_steps(self.workdir)
        self._num_starts += 1
        log = self._directory / f"log_{self._num_starts}"
        processes = faulty_runs.start(2, workdir=self.workdir, data_dir=self._data_dir, log=log, **kwargs)
        if saved:
            resuming = re.compile(r"resuming at step (\d+)\n")
            resumed_at = processes[0].wait_until(lambda: resuming.findall(processes[0].stderr))
            # Nothing is lost but the steps since the last save; nor does it start over.
            assert resumed_at == [str(saved[-1])]
        return processes

    def check_saved(self):
        """The newest checkpoint is bit for bit that of the uninterrupted run at the same step."""
        step = tiny_runs.checkpoint_steps(self.workdir)[-1]
        if step % faulty_runs.SAVE_EVERY == 0:
            tiny_runs.assert_same_bits(
                tiny_runs.tensors(self.workdir, step), tiny_runs.tensors(self._reference, step)
            )
        return step


def check_lost(processes, *, lost, words):
    """The others end within the promised time with 69, and name the lost one; which is then killed for good."""
    begin = time.monotonic()
    other = processes[1 - lost]
    assert other.wait() == LOST
    assert time.monotonic() - begin < PROMISED_SECS
    (error,) = faulty_runs.errors(other)
    assert re.match(f"{NAMES[lost]} {words}", error)
    assert "Run the same command again" in error
    processes[lost].kill()
    return processes[lost].wait()


def test_whatever_ends_a_process_the_rerun_goes_on_bit_for_bit(data_dir, reference, tmp_path):
    story = Story(tmp_path, data_dir=data_dir, reference=reference)

    # Killed: a process that is not the chief, then the chief.
    processes = story.start()
    faulty_runs.until_step(processes, 25)
    processes[1].send(signal.SIGKILL)
    assert check_lost(processes, lost=1, words="has gone without a word") == -signal.SIGKILL
    assert story.check_saved() >= 20

    processes = story.start()
    faulty_runs.until_step(processes, tiny_runs.checkpoint_steps(story.workdir)[-1] + 5)
    processes[0].send(signal.SIGKILL)
    assert check_lost(processes, lost=0, words="has gone without a word") == -signal.SIGKILL
    story.check_saved()

    # Stopped: with the flag's default, which must keep the promise; then the chief, with less silence.
    processes = story.start()
    faulty_runs.until_step(processes, tiny_runs.checkpoint_steps(story.workdir)[-1] + 3)
    processes[1].send(signal.SIGSTOP)
    assert check_lost(processes, lost=1, words=r"has not been heard of for \d+ s") == -signal.SIGKILL
    story.check_saved()

    processes = story.start(flags=["--silence_secs=4"])
    faulty_runs.until_step(processes, tiny_runs.checkpoint_steps(story.workdir)[-1] + 3)
    processes[0].send(signal.SIGSTOP)
    assert check_lost(processes, lost=0, words=r"has not been heard of for \d+ s") == -signal.SIGKILL
    story.check_saved()

    # Asked to end: one of them saves with all others at the same step.
    processes = story.start()
    faulty_runs.until_step(processes, tiny_runs.checkpoint_steps(story.workdir)[-1] + 3)
    while processes[1].is_running():  # However often it is asked.
        processes[1].send(signal.SIGTERM)
        time.sleep(0.01)
    assert tiny_runs.wait_for_all(processes) == [STOPPED, STOPPED]
    message = re.search(
        rf"stopped by SIGTERM to {NAMES[1]} after step (\d+); the checkpoint is saved", processes[0].stderr
    )
    assert int(message[1]) == tiny_runs.checkpoint_steps(story.workdir)[-1]
    assert int(message[1]) == tiny_runs.steps_done(story.workdir)

    # A second Ctrl-C, while the first waits for a save, ends all at once, without the save.
    saved = tiny_runs.checkpoint_steps(story.workdir)[-1]
    due = (saved // faulty_runs.SAVE_EVERY + 1) * faulty_runs.SAVE_EVERY
    slow = functools.partial(faulty_runs.sleep_in_saves, 60)
    processes = story.start(before={0: slow, 1: slow})
    faulty_runs.until_step(processes, due)
    for _ in range(2):
        time.sleep(2.0)  # Two that arrive as one would be the first.
        processes[1].send(signal.SIGINT)
    assert tiny_runs.wait_for_all(processes) == [INTERRUPTED, INTERRUPTED]
    (error,) = faulty_runs.errors(processes[0])
    assert re.match(f"{NAMES[1]} was interrupted", error)
    assert tiny_runs.checkpoint_steps(story.workdir)[-1] == saved

    processes = story.start()
    assert tiny_runs.wait_for_all(processes) == [0, 0], processes[0].stderr
    assert story.check_saved() == LAST_STEP
    assert [line["step"] for line in tiny_runs.metrics(story.workdir)] == list(range(1, LAST_STEP + 1))
    assert tiny_runs.without_times(tiny_runs.metrics(story.workdir)) == tiny_runs.without_times(
        tiny_runs.metrics(reference)
    )


def test_a_signal_before_the_first_step_ends_all_with_its_number(data_dir, tmp_path):
    slow = functools.partial(faulty_runs.sleep_before_training, 60)
    processes = faulty_runs.start(
        2, workdir=tmp_path / "run", data_dir=data_dir, log=tmp_path / "log", before={0: slow, 1: slow}
    )
    processes[1].wait_until(lambda: "building" in processes[1].stderr)
    processes[1].send(signal.SIGTERM)
    assert tiny_runs.wait_for_all(processes) == [128 + signal.SIGTERM] * 2
    (error,) = faulty_runs.errors(processes[0])
    assert re.match(f"{NAMES[1]} was asked to end, with exit code 143", error)


def test_processes_that_are_paused_go_on(data_dir, tmp_path):
    """Longer than TensorFlow's own patience of ten seconds: one of them for less than --silence_secs, then both."""
    processes = faulty_runs.start(
        2, workdir=tmp_path / "run", data_dir=data_dir, log=tmp_path / "log", flags=["--silence_secs=30"]
    )
    for step, paused in ((10, [1]), (30, [0, 1])):
        faulty_runs.until_step(processes, step)
        for rank in paused:
            processes[rank].send(signal.SIGSTOP)
        time.sleep(14)
        for rank in paused:
            processes[rank].send(signal.SIGCONT)
    assert tiny_runs.wait_for_all(processes) == [0, 0]


def test_an_error_that_nobody_expects_reaches_the_chief(data_dir, tmp_path):
    processes = faulty_runs.start(
        2,
        workdir=tmp_path / "run",
        data_dir=data_dir,
        log=tmp_path / "log",
        flags=["--silence_secs=3"],
        before={1: functools.partial(faulty_runs.fail_at_step, 5)},
    )
    assert tiny_runs.wait_for_all(processes) == [1, 1]
    assert re.search(f"^error: {NAMES[1]} failed:\nTraceback", processes[0].stderr, re.MULTILINE)
    for process in processes:
        assert "RuntimeError: a bug\nof two lines" in process.stderr


def test_a_process_that_is_killed_while_all_restore(data_dir, reference, tmp_path):
    """The other, which waits for its rows, ends; the checkpoint is as it was."""
    story = Story(tmp_path, data_dir=data_dir, reference=reference)
    small = faulty_runs.save_in_small_blocks
    processes = story.start(before={0: small, 1: small})
    faulty_runs.until_step(processes, faulty_runs.SAVE_EVERY + 3)
    processes[1].send(signal.SIGKILL)
    check_lost(processes, lost=1, words="has gone without a word")
    for lost in (1, 0):
        before = {lost: faulty_runs.die_in_restore, 1 - lost: small}
        processes = faulty_runs.start(
            2, workdir=story.workdir, data_dir=data_dir, log=tmp_path / f"killed_{lost}", before=before
        )
        assert check_lost(processes, lost=lost, words="has gone without a word") == -signal.SIGKILL
        assert "resuming at step" not in processes[0].stderr
    processes = story.start(before={0: small, 1: small})
    assert tiny_runs.wait_for_all(processes) == [0, 0], processes[0].stderr
    assert story.check_saved() == LAST_STEP
