"""The processes of a run, as the environment or flags describe them."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes of a run, and which of them this one is.

    Attributes:
      size: number of processes, at least 1.
      rank: number of this process, 0 to size - 1.
      hosts: of each rank, its host's name or IP address (IPv6 without brackets). None: the environment does not say.
      addresses: of each rank, `host:port` (IPv6 in brackets), where it listens. None: not known before processes tell
        each other; or there is one process, which needs none.
      local_rank: number of this process among those of its host, or None: not known.
      local_size: processes of its host, or None: not known.
      source: what says so: "TF_CONFIG", "Slurm", "Open MPI", "flags", "none" and so on.
      coordinator: `host:port` where rank 0 takes the addresses of the others, or None: no need, or not known.
      addresses_given: whether the source gives the addresses with their ports, in place of the rule for ports.
      unknown_hosts: where hosts is None and that matters, the reason: a sentence for the message.
      warning: what to tell the user about a run that goes on, or None.
    """

    size: int
    rank: int
    hosts: tuple[str, ...] | None
    addresses: tuple[str, ...] | None
    local_rank: int | None
    local_size: int | None
    source: str
    coordinator: str | None = None
    addresses_given: bool = False
    unknown_hosts: str | None = None
    warning: str | None = None

    def __post_init__(self):
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"A process's rank must be from 0 to {self.size - 1}, below the number of processes. Received from "
                f"{self.source}: rank={self.rank}, size={self.size}. See to the launcher."
            )
        for name in ("hosts", "addresses"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != self.size:
                raise ValueError(
                    f"{name} must be one for each process. Received from {self.source}: {len(entries)} {name} of "
                    f"{self.size} processes. See to the launcher."
                )

    @property
    def is_chief(self) -> bool:
        """Whether this is the process that writes what one process writes for all."""
        return self.rank == 0

    def name(self, rank: int | None = None) -> str:
        """What messages call a process: `process 3 of 4 (host:port)`; its rank counts from 0. None: this one."""
        rank = self.rank if rank is None else rank
        where = self.addresses or self.hosts
        if where is None and rank == 0 and self.coordinator is not None:
            where = (self.coordinator,)
        text = f"process {rank} of {self.size}"
        return text if where is None else f"{text} ({where[rank]})"

    def check_reachable(self) -> None:
        """Checks that the processes can find each other.

        Raises:
          ValueError: if there are several, of which neither addresses nor a coordinator are known.
        """
        if self.size > 1 and self.addresses is None and self.coordinator is None:
            reason = self.unknown_hosts or f"{self.source} tells sizes and ranks, but no hosts."
            raise ValueError(
                f"Each of {self.size} processes must know where the others are. Received from {self.source}: rank "
                f"{self.rank} of {self.size}, and not all hosts: {reason} Pass --coordinator=HOST:PORT, with the "
                "host of rank 0 and a free port of it, the same to all processes."
            )
