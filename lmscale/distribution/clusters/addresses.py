"""Addresses, `host:port` and `[IPv6]:port`, and the ports that all processes compute alike."""

import re

# Above Linux's ephemeral ports (32768 to 60999), of which any may be taken by a connection that goes out.
FIRST_PORT = 61440
NUM_PORTS = 4096
# Where each process has a network address of its own, nobody else takes TensorFlow's customary port.
PORT_OF_POD = 2222


def split_address(text, *, name):
    """Host and port of an address.

    Args:
      text: str, `host:port`; an IPv6 address has brackets around it.
      name: what the user calls it, for the message.

    Returns:
      host: str, without brackets.
      port: int, 1 to 65535.

    Raises:
      ValueError: if it is no address.
    """
    match = re.fullmatch(r"(?:\[([^\[\]\s/]+)\]|([^\[\]\s/:]+)):([0-9]{1,5})", text)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise ValueError(
            f"{name} must be an address HOST:PORT, with a port of 1 to 65535 and an IPv6 address in brackets, as "
            f"[2001:db8::1]:2222. Received: {text!r}. Write it so."
        )
    return match[1] or match[2], int(match[3])


def join_address(host, port):
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def local_ranks(hosts):
    """Of each process, the number of those before it on its host.

    Args:
      hosts: of each process, in the order of ranks.

    Returns:
      A list of as many numbers.
    """
    seen = {}
    ranks = []
    for host in hosts:
        ranks.append(seen.get(host, 0))
        seen[host] = ranks[-1] + 1
    return ranks


def computed_addresses(hosts, *, port, start):
    """An address for each process that every other one computes alike, without talking to it.

    Args:
      hosts: of each process, in the order of ranks.
      port: the first process of a host takes this one, the next ones those that follow; or None.
      start: where port is None, the port of a host's first process. Those that follow stay below 65536.

    Returns:
      A tuple of addresses.

    Raises:
      ValueError: if the ports that follow `port` end before the processes of a host do.
    """
    ranks = local_ranks(hosts)
    if port is None:
        ports = [start + rank if start + rank <= 65535 else start + rank - NUM_PORTS for rank in ranks]
    else:
        ports = [port + rank for rank in ranks]
    if max(ports) > 65535 or min(ports) < 1:
        raise ValueError(
            "port must leave a port up to 65535 to each process of a host. Received: "
            f"port={port} and {max(ranks) + 1} processes on a host. Give --port=N of at most {65535 - max(ranks)}."
        )
    return tuple(join_address(host, port) for host, port in zip(hosts, ports, strict=True))


def port_of_job(number):
    """The port of a host's first process in a batch job, so that two jobs on a host rarely meet."""
    return FIRST_PORT + number % NUM_PORTS


def is_same_host(one, other):
    """Whether two names may be of one host: equal, or one is the other's name without its domain."""
    one, other = one.lower(), other.lower()
    if one == other:
        return True
    if re.fullmatch(r"[0-9.]+|.*:.*", one) or re.fullmatch(r"[0-9.]+|.*:.*", other):
        return False
    short = one.partition(".")[0], other.partition(".")[0]
    return short[0] == short[1] and ("." not in one or "." not in other)
