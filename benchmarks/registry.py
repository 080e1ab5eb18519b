"""Every program by name, in the order they are run and shown."""

from __future__ import annotations

from benchmarks.program import Program
from benchmarks.programs import (
    code,
    features,
    flood,
    gate,
    growth,
    hello,
    imports,
    json_peers,
    keys,
    limits,
    primitives,
    quick,
    replaced,
    scale,
    shared,
    stores,
    workers,
)

PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        gate.PROGRAM,
        gate.LIMITED,
        replaced.PROGRAM,
        quick.PROGRAM,
        quick.LIMITED,
        quick.START,
        quick.LIMITED_START,
        json_peers.PROGRAM,
        limits.PROGRAM,
        keys.PROGRAM,
        shared.PROGRAM,
        stores.PROGRAM,
        flood.PROGRAM,
        hello.PROGRAM,
        features.PROGRAM,
        code.PROGRAM,
        primitives.PROGRAM,
        growth.PROGRAM,
        workers.PROGRAM,
        scale.PROGRAM,
        imports.PROGRAM,
    )
}
