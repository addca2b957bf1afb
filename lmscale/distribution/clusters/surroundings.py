"""What a launcher's function may look at, and how it reads numbers and lists from variables."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping

from lmscale.distribution.clusters.addresses import computed_addresses, local_ranks
from lmscale.distribution.clusters.description import Cluster

# What messages advise where a launcher's variables are of no use.
PASS_FLAGS = "pass --coordinator=HOST:PORT --num_processes=N --process_id=I, which win over the environment"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """An environment, and the rest of a machine that may complete it.

    Attributes:
      environment: {name: value}.
      port: the user's first port of each host, or None.
      hostname: () -> this host's name.
      read_file: path -> text, or OSError.
      read_metadata: attribute of this cloud instance -> text, or None if there is none.
    """

    environment: Mapping[str, str]
    port: int | None
    hostname: Callable[[], str]
    read_file: Callable[[str], str]
    read_metadata: Callable[[str], str | None]

    def text(self, name: str) -> str | None:
        """A variable without blanks around it. Empty is as if unset: shells and templates write it so."""
        return self.environment.get(name, "").strip() or None

    def has_any(self, *names: str) -> bool:
        return any(self.text(name) is not None for name in names)

    def required(self, name: str, *, because: str) -> str:
        """A variable that must be set.

        Args:
          name: of the variable.
          because: what is set that makes it necessary.

        Raises:
          ValueError: if it is not set, or empty.
        """
        text = self.text(name)
        if text is None:
            raise ValueError(
                f"{name} must be set: {because}. Received: none. Start the processes with the launcher, which sets "
                f"it; or {PASS_FLAGS}, as --num_processes=1 does for one process alone."
            )
        return text

    def number(self, name: str) -> int | None:
        """A variable's number, 0 or more, or None if it is unset.

        Raises:
          ValueError: if it is no such number.
        """
        text = self.text(name)
        if text is None:
            return None
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise ValueError(
                f"{name} must be a number, 0 or more. Received: {name}={text!r}. See to the launcher, or unset it."
            )
        return int(text)

    def required_number(self, name: str, *, because: str) -> int:
        self.required(name, because=because)
        number = self.number(name)
        assert number is not None
        return number

    def size_and_rank(self, size_name: str, rank_name: str) -> tuple[int, int]:
        """A number of processes and the rank of this one, from two variables.

        Raises:
          ValueError: if one is not set, or they do not fit.
        """
        found = [name for name in (size_name, rank_name) if self.text(name) is not None]
        because = f"{' and '.join(found) or 'another variable of the launcher'} is set"
        size = self.required_number(size_name, because=because)
        rank = self.required_number(rank_name, because=because)
        if not rank < size:
            raise ValueError(
                f"{rank_name} must be below {size_name}. Received: {rank_name}={rank}, {size_name}={size}. See to "
                "the launcher, or unset both."
            )
        return size, rank

    def check_equal(self, name: str, expected: int, *, of: str) -> None:
        """Checks a number that is there twice.

        Args:
          name: of a variable; it may be unset.
          expected: what it must be.
          of: where that comes from.

        Raises:
          ValueError: if it is another number.
        """
        number = self.number(name)
        if number is not None and number != expected:
            raise ValueError(
                f"{name} must agree with {of}. Received: {name}={number}, and {expected} from the other. See to the "
                f"launcher; or {PASS_FLAGS}."
            )

    def json(self, name: str, *, kind: type) -> object:
        """The JSON value of a variable that is set.

        Args:
          name: of the variable.
          kind: dict or list.

        Raises:
          ValueError: if it is not JSON, or of another kind.
        """
        text = self.text(name)
        what = "a list" if kind is list else "an object"
        assert text is not None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{name} must be {what} in JSON. Received: {text!r} ({error}). Correct it, or unset it."
            ) from error
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be {what} in JSON. Received: {text!r}. Correct it, or unset it.")
        return value

    def lines(self, name: str) -> list[str] | None:
        """Words at the starts of the lines of the file that a variable names; None if there is no such file."""
        path = self.text(name)
        if path is None:
            return None
        try:
            text = self.read_file(path)
        except (OSError, ValueError):
            return None
        return [line.split()[0] for line in text.splitlines() if line.strip()]

    def this_host(self) -> str:
        """This host's name as the environment has it, for a process that talks to none but those of its host."""
        for name in ("SLURMD_NODENAME", "PMIX_HOSTNAME"):
            if (host := self.text(name)) is not None:
                return host
        return "localhost"

    def one_process(self, source: str, *, host: str | None = None, warning: str | None = None) -> Cluster:
        """This process alone."""
        if host is None:
            host = self.text("SLURMD_NODENAME") or self.text("HOSTNAME") or "localhost"
        return Cluster(
            size=1,
            rank=0,
            hosts=(host,),
            addresses=None,
            local_rank=0,
            local_size=1,
            source=source,
            warning=warning,
        )

    def cluster(self, source: str, *, rank: int, hosts, start: int) -> Cluster:
        """Processes whose hosts are known, and whose ports are computed.

        Args:
          source: as of Cluster.
          rank: of this process.
          hosts: of each rank.
          start: the port of each host's first process, unless the user gives one.
        """
        hosts = tuple(hosts)
        if len(hosts) == 1:
            return self.one_process(source, host=hosts[0])
        return Cluster(
            size=len(hosts),
            rank=rank,
            hosts=hosts,
            addresses=computed_addresses(hosts, port=self.port, start=start),
            local_rank=local_ranks(hosts)[rank],
            local_size=hosts.count(hosts[rank]),
            source=source,
        )

    def cluster_without_hosts(
        self, source: str, *, size: int, rank: int, local_rank=None, local_size=None, reason: str
    ) -> Cluster:
        """Processes whose hosts nobody tells."""
        if size == 1:
            return self.one_process(source)
        return Cluster(
            size=size,
            rank=rank,
            hosts=None,
            addresses=None,
            local_rank=local_rank,
            local_size=local_size,
            source=source,
            unknown_hosts=reason,
        )
