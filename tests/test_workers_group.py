"""Who belongs together: each way to start several processes, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from opsguard.workers.group import Process, manager

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs the /proc of Linux"
)

ROOT = Path(__file__).parents[1]


def ran(folder: Path, program: str, *before: str) -> list[str]:
    """The words that a program printed, a file of its own, started as a shell does."""
    file = folder / "program.py"
    file.write_text(textwrap.dedent(program))
    path = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
    output = subprocess.check_output(
        [sys.executable, *before, str(file)],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        timeout=60,
    )
    return output.split()


def test_a_process_on_its_own_is_its_own_manager(tmp_path: Path) -> None:
    """Whoever started it: two apps of one shell are two groups."""
    program = """
        import os
        from opsguard.workers.group import Process, manager
        print(manager().name, Process.of(os.getpid()).name)
    """
    first, second = ran(tmp_path, program), ran(tmp_path, program)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0] != second[0]


def test_workers_of_this_test_run_are_groups_of_their_own() -> None:
    """pytest-xdist starts programs, not forks."""
    assert manager() == Process.of(os.getpid())


def test_a_name_has_pid_start_and_pid_namespace() -> None:
    me = Process.of(os.getpid())
    pid, start, namespace = map(int, me.name.split("-"))
    assert (pid, namespace) == (os.getpid(), Path("/proc/self/ns/pid").stat().st_ino)
    assert start > 0
    assert Process.parse(me.name) == me
    assert me.here
    assert me.alive


def test_where_there_is_no_proc_the_pid_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(Path, "stat", missing)
    me = Process.of(os.getpid())
    assert me.name == str(os.getpid())
    assert Process.parse(me.name) == me
    assert not me.alive


@pytest.mark.parametrize("name", ["", "x", "1-2", "1-2-x", "1--2", "-1", "1-2-3-4", "²", "1-2-3 "])
def test_other_names_are_nobody(name: str) -> None:
    assert Process.parse(name) is None


def test_a_process_that_ended_is_not_alive() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        found = Process.of(process.pid)
        assert found.alive
        process.kill()
    assert not found.alive


@pytest.mark.parametrize("asked", ["before", "after"])
def test_a_forked_child_belongs_where_its_parent_does(asked: str, tmp_path: Path) -> None:
    """Also if nobody asked before the fork, and its children do as well."""
    program = f"""
        import os, sys
        from opsguard.workers.group import manager
        if {asked == "before"}:
            manager()
        me = os.getpid()
        for _ in range(2):
            if os.fork():
                os.wait()
                break
        print(manager().pid == me, flush=True)
    """
    assert ran(tmp_path, program) == ["True"] * 3


def test_a_daemon_s_group_outlives_its_first_parent(tmp_path: Path) -> None:
    """Servers that go to the background fork twice; the app may be there before."""
    program = """
        import os
        from opsguard.workers.group import manager
        first = os.getpid()
        if os.fork():
            os._exit(0)
        os.setsid()
        if os.fork():
            os._exit(0)
        while os.path.exists(f"/proc/{first}") and os.getppid() != 1:
            pass
        print(manager().pid == first, manager().start > 0, flush=True)
    """
    assert ran(tmp_path, program) == ["True", "True"]


SPAWNS = """
    import multiprocessing, os, sys
    from opsguard.workers.group import manager

    def tell(queue):
        from opsguard.workers.group import manager
        queue.put(manager().name)

    # As in the main module of an app that starts its own workers: made here, in each of them.
    found = manager()

    if __name__ == "__main__":
        context = multiprocessing.get_context({method!r})
        queue = context.Queue()
        children = [context.Process(target=tell, args=(queue,)) for _ in range(2)]
        [child.start() for child in children]
        names = [queue.get(timeout=30) for _ in children]
        [child.join() for child in children]
        print(manager().name, *names)
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_processes_of_multiprocessing_belong_to_the_one_that_made_them(
    method: str, tmp_path: Path
) -> None:
    """Asked while the child still imports the main module of its parent."""
    names = ran(tmp_path, SPAWNS.format(method=method))
    assert len(names) == 3
    assert len(set(names)) == 1


@pytest.mark.parametrize("asked", ["manager()", ""], ids=["asked", "only imported"])
def test_a_fork_server_that_imported_the_app_ahead_is_nobody_s_manager(
    asked: str, tmp_path: Path
) -> None:
    """As it is started with the main module from Python 3.14 on."""
    (tmp_path / "ahead.py").write_text(
        f"from opsguard.workers.group import manager\n{asked}\n"
        "def tell(queue):\n    queue.put(manager().name)\n"
    )
    program = """
        import multiprocessing
        from ahead import tell
        from opsguard.workers.group import manager

        if __name__ == "__main__":
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["ahead"])
            queue = context.Queue()
            children = [context.Process(target=tell, args=(queue,)) for _ in range(2)]
            [child.start() for child in children]
            print(manager().name, *[queue.get(timeout=30) for _ in children])
            [child.join() for child in children]
    """
    names = ran(tmp_path, program)
    assert len(names) == 3
    assert len(set(names)) == 1


def test_a_pool_that_a_worker_forks_stays_in_the_worker_s_group(tmp_path: Path) -> None:
    program = """
        import multiprocessing
        from opsguard.workers.group import manager

        def name(_=0):
            return manager().name

        def work(queue):
            # Closed, not ended by a signal: there coverage saves once more, which can hang a worker
            # that is just leaving.
            pool = multiprocessing.get_context("fork").Pool(2)
            queue.put([name(), *pool.map(name, range(2))])
            pool.close()
            pool.join()

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            worker = context.Process(target=work, args=(queue,))
            worker.start()
            print(name(), *queue.get(timeout=30))
            worker.join()
    """
    names = ran(tmp_path, program)
    assert len(names) == 4
    assert len(set(names)) == 1


def test_a_manager_whose_pid_is_used_again_is_no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """It began after us, so it did not start us."""
    with subprocess.Popen(["sleep", "60"]) as later:
        monkeypatch.setattr("opsguard.workers.group._arbiter", lambda: later.pid)
        monkeypatch.setattr("opsguard.workers.group._manager", None)
        assert manager() == Process.of(os.getpid())
        later.kill()
    monkeypatch.setattr("opsguard.workers.group._manager", None)
    assert manager() == Process.of(os.getpid())


def test_gunicorn_s_arbiter_is_known_by_what_we_look_for() -> None:
    """If this fails, gunicorn has changed: see `_arbiter`. The real servers' tests tell more."""
    arbiter = pytest.importorskip("gunicorn.arbiter")
    assert arbiter.Arbiter.spawn_worker.__code__.co_filename == arbiter.__file__
    assert arbiter.Arbiter.spawn_worker.__code__.co_varnames[0] == "self"
    assert "pid" in arbiter.Arbiter.start.__code__.co_names


@pytest.mark.parametrize(
    "change",
    ["del arbiter.Arbiter", "arbiter.Arbiter = None", "arbiter.__file__ = 'elsewhere'"],
)
def test_a_gunicorn_that_is_not_as_expected_means_the_process_itself(
    change: str, tmp_path: Path
) -> None:
    pytest.importorskip("gunicorn")
    program = f"""
        import os
        from gunicorn import arbiter
        from opsguard.workers.group import manager

        class Mine(arbiter.Arbiter):
            def __init__(self): pass
            log = cfg = property(lambda self: self)

        {change}
        print(manager().pid == os.getpid())
    """
    assert ran(tmp_path, program) == ["True"]
