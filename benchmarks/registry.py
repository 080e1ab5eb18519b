"""Every program by name, in the order they are run and shown."""

from __future__ import annotations

from benchmarks.program import Program
from benchmarks.programs import (
    features,
    gate,
    growth,
    hello,
    imports,
    json_peers,
    primitives,
    quick,
)

PROGRAMS: dict[str, Program] = {
    module.PROGRAM.name: module.PROGRAM
    for module in (gate, quick, json_peers, hello, features, primitives, growth, imports)
}
