"""Runs one command as the N processes of a run: what local_workers.sh and ssh_workers.sh, which check flags, share.

Usage: workers.py local|ssh N|HOSTS GRACE_SECS run|print COMMAND ...

Each process has a keeper beside it, on its own host: this file again, called as `workers.py keep GRACE_SECS COMMAND`.
A keeper reads signals by name from its standard input and passes them on; when that input ends, whoever started it is
gone, and so it ends its process. So nothing is left behind, even when this script is killed or a connection breaks.
"""

import contextlib
import ctypes
import json
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FIRST_PORT = 2222
# Processes of one run mostly end together: one that is about to end by itself gets no signal on its way out.
END_TOGETHER_SECS = 1.0
# Never a question (nobody is there to answer), and a host that is gone is noticed after a minute and a half.
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30")


def _handle_signals(handler):
    """Sets a handler, but not of what was ignored at the start, as nohup ignores SIGHUP: that stays so."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------------- The keeper


def keep(command, grace_secs):
    """Runs a command in a session of its own, and returns its exit code; 128 + n when signal n ended it."""
    _handle_signals(lambda number, frame: None)  # Ignored, they would be ignored by the command as well.
    libc = ctypes.CDLL(None)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # PR_SET_PDEATHSIG: should the keeper be killed, so is the command.
            preexec_fn=lambda: libc.prctl(1, signal.SIGKILL),
        )
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    threading.Thread(target=_pass_signals_on, args=(process.pid, grace_secs), daemon=True).start()
    code = process.wait()
    _signal_group(process.pid, signal.SIGKILL)  # What the command has started, should it have left any.
    return code if code >= 0 else 128 - code


def _pass_signals_on(group, grace_secs):
    """Passes on what standard input names; at its end TERM. A while after the first TERM, KILL."""
    last_call = None
    ended = False
    while not ended:
        received = os.read(0, 4096)
        ended = not received
        for name in received.decode().split() or ["SIGTERM"]:
            _signal_group(group, signal.Signals[name])
            if name == "SIGTERM" and last_call is None:
                last_call = threading.Timer(grace_secs, _signal_group, (group, signal.SIGKILL))
                last_call.daemon = True
                last_call.start()


def _signal_group(group, number):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


# ---------------------------------------------------------------------------------------------------- The supervisor


def supervise(keepers, grace_secs):
    """Runs keepers side by side until all have ended; returns the exit code of the first that failed, or 0."""
    requests = []
    _handle_signals(lambda number, frame: requests.append(signal.Signals(number).name))
    processes = []
    try:
        for keeper in keepers:
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            # A session of its own, so that Ctrl-C comes from here alone, and once.
            processes.append(subprocess.Popen(keeper, bufsize=0, start_new_session=True, **pipes))
        return _until_all_end(processes, requests, grace_secs)
    except BrokenPipeError:  # Who read our output has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    finally:
        for process in processes:
            process.stdin.close()  # Ends what still runs.
        for process in processes:
            process.wait()


def _until_all_end(processes, requests, grace_secs):
    lines = Lines(processes)
    running = dict(enumerate(processes))
    failure = 0
    call = None  # When the others get SIGTERM because one has failed.
    give_up = None
    while running:
        lines.copy(timeout=0.1)
        for index, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[index]
            code = process.returncode if process.returncode >= 0 else 128 - process.returncode
            if code and not failure:
                failure, failed = code, index
                call = time.monotonic() + END_TOGETHER_SECS
        if call is not None and time.monotonic() > call:
            call = None
            if running and give_up is None:  # They may have got it already.
                requests.append("SIGTERM")
                lines.copy(timeout=0)
                print(f"[{failed}] ended with {failure}: the others get SIGTERM", file=sys.stderr, flush=True)
        while requests:
            name = requests.pop(0)
            for process in running.values():
                _tell(process, name)
            if name == "SIGTERM" and give_up is None:
                give_up = time.monotonic() + grace_secs + 10
        # A keeper kills in time. Only one that is stopped or out of reach needs this.
        if give_up is not None and time.monotonic() > give_up:
            for process in running.values():
                process.kill()
    lines.copy(timeout=0)
    lines.finish()
    return failure


def _tell(process, name):
    with contextlib.suppress(BrokenPipeError):  # It may just have ended.
        process.stdin.write(f"{name}\n".encode())


class Lines:
    """Copies what processes print, line by line, each with the number of its process before it."""

    def __init__(self, processes):
        self._selector = selectors.DefaultSelector()
        self._partial = {}
        for index, process in enumerate(processes):
            for source, sink in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
                key = (f"[{index}] ".encode(), sink)
                self._selector.register(source, selectors.EVENT_READ, key)
                self._partial[key] = b""

    def copy(self, timeout):
        """Copies the lines that are there, and waits for some so many seconds."""
        if not self._selector.get_map():
            time.sleep(timeout)
        while self._selector.get_map() and (ready := self._selector.select(timeout)):
            for source, _ in ready:
                chunk = os.read(source.fd, 65536)
                if not chunk:
                    self._selector.unregister(source.fileobj)
                *whole, self._partial[source.data] = (self._partial[source.data] + chunk).split(b"\n")
                self._write(source.data, whole)
            if timeout:
                return

    def finish(self):
        """Writes the last lines which no newline ends."""
        for key, text in self._partial.items():
            self._write(key, [text] if text else [])

    @staticmethod
    def _write(key, lines):
        prefix, sink = key
        sink.write(b"".join(prefix + line + b"\n" for line in lines))
        sink.flush()


# ------------------------------------------------------------------------------------------------------- The commands


def tf_config(addresses, index):
    """The environment variable TF_CONFIG of one process."""
    cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    return "TF_CONFIG=" + json.dumps(cluster, separators=(",", ":"))


def free_addresses(count):
    """Addresses on loopback whose ports are free now: all are bound at once, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


def parse_hosts(text):
    """`a,me@b:2222` or `@FILE` to ([destination for ssh, ...], [HOST:PORT, ...])."""
    if text.startswith("@"):
        with open(text[1:], encoding="utf-8") as file:
            entries = [line.partition("#")[0].strip() for line in file]
        entries = [entry for entry in entries if entry]
    else:
        entries = text.split(",")
    destinations, addresses = [], []
    for entry in entries:
        user, at, address = entry.rpartition("@")
        host, port = address, None
        if ":" in address.rpartition("]")[2]:  # Of IPv6 only with brackets: [fe80::1]:2222.
            host, _, port = address.rpartition(":")
        if not _is_name(user or "me") or not _is_name(host) or not _is_port(port):
            raise ValueError(
                f"A host must be HOST, HOST:PORT or USER@HOST:PORT. Received: {entry!r} of {text!r}"
            )
        # Processes of one host, without ports given, must not take the same.
        port = port or str(FIRST_PORT + sum(other.rpartition(":")[0] == host for other in addresses))
        destinations.append(user + at + host.strip("[]"))
        addresses.append(f"{host}:{port}")
    if not entries:
        raise ValueError(f"There must be at least one host. Received: none in {text!r}")
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"Every process must have an address of its own. Received: {', '.join(addresses)}")
    return destinations, addresses


def _is_name(text):
    """Whether ssh takes it for a name, and not for one of its flags."""
    return text != "" and not text.startswith("-") and not any(mark.isspace() for mark in text)


def _is_port(text):
    return text is None or (text.isdecimal() and 0 < int(text) < 65536)


def main(kind, argument, grace_secs, action, *command):
    if kind == "ssh":
        destinations, addresses = parse_hosts(argument)
    else:
        destinations, addresses = [None] * int(argument), free_addresses(int(argument))
    keepers = []
    for index, destination in enumerate(destinations):
        assigned = ["env", tf_config(addresses, index), *command]
        python = sys.executable if destination is None else "python3"
        keeper = [python, os.path.abspath(__file__), "keep", grace_secs, *assigned]
        if destination is not None:
            there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(keeper)}"
            keeper = [*SSH, "--", destination, there]
        if action == "print":
            print(shlex.join(assigned if destination is None else keeper))
        keepers.append(keeper)
    return 0 if action == "print" else supervise(keepers, int(grace_secs))


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        # Not sys.exit: the thread that reads standard input is never done.
        code = keep(sys.argv[3:], int(sys.argv[2]))
        sys.stderr.flush()
        os._exit(code)
    try:
        sys.exit(main(*sys.argv[1:]))
    except (ValueError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
