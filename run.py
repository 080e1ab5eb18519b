"""Run a task of this checkout: ``python3 run.py demo``, ``python3 run.py tests``.

Needs Python 3.11 or newer with venv and pip, nothing else, and no root: Debian's "externally
managed" Python will do. The first call makes an environment of its own under ``.nox/`` and puts
nox into it; later calls start at once. Any session of noxfile.py can be named, and what follows
the name goes to it: ``python3 run.py tests -k proxies``. Without a name it lists them.

Standard library only. Old syntax on purpose: any Python must be able to read this file as far as
the line that says it is too old.
"""

import os
import subprocess
import sys

OLDEST = (3, 11)
REQUIREMENT = "nox>=2025.5.1"
ROOT = os.path.dirname(os.path.abspath(__file__))
HOME = os.path.join(ROOT, ".nox", "runner")
PYTHON = os.path.join(HOME, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))


def main(arguments):
    if sys.version_info < OLDEST:
        return "run.py needs Python %d.%d or newer; this is %s (%s)." % (
            OLDEST + (sys.version.split()[0], sys.executable)
        )
    problem = prepare()
    if problem:
        return problem
    command = [PYTHON, "-m", "nox", "--noxfile", os.path.join(ROOT, "noxfile.py")]
    if arguments:
        rest = arguments[1:]
        command += ["--session", arguments[0], "--"] + (rest[1:] if rest[:1] == ["--"] else rest)
    else:
        command.append("--list")
    sys.stdout.flush()
    if os.name == "nt":
        return subprocess.call(command)
    # Replaces this process, so that Ctrl-C and the exit status are nox's own.
    return os.execv(command[0], command)


def prepare():
    """Make the environment unless it is there and whole; returns what is wrong, or None.

    The stamp is written last and names interpreter and requirement: an interrupted run, another
    Python or a newer checkout starts over. Nothing outside ``.nox/runner`` is touched.
    """
    stamp = os.path.join(HOME, "ready")
    wanted = "%s\n%s\n%s\n" % (sys.version, sys.prefix, REQUIREMENT)
    if os.path.exists(PYTHON) and read(stamp) == wanted:
        return None
    print("Preparing an environment in %s (once) ..." % os.path.relpath(HOME))
    sys.stdout.flush()
    # A user-wide "install --user" or "require virtualenv" has no place in our own environment.
    environment = dict(os.environ, PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1")
    try:
        pip = make(environment)
        subprocess.check_call(pip + ["install", "--quiet", REQUIREMENT], env=environment)
        with open(stamp, "w") as file:
            file.write(wanted)
    except ImportError:
        return "This Python has no venv module. On Debian or Ubuntu: apt install python3-venv"
    except LookupError as error:
        return str(error)
    except (OSError, subprocess.CalledProcessError) as error:
        return "Could not prepare %s: %s" % (HOME, error)
    return None


def make(environment):
    """Make the empty environment; returns the command that is its pip.

    Debian and Ubuntu ship ensurepip in a package apart. Without it the environment gets no pip
    of its own, and this Python's pip (22.3 or newer) installs into it from outside.
    """
    import importlib.util
    import venv

    symlinks = os.name != "nt"
    if importlib.util.find_spec("ensurepip"):
        try:
            venv.create(HOME, clear=True, symlinks=symlinks, with_pip=True)
        except subprocess.CalledProcessError:
            pass  # ensurepip is there and does not work: as if it were not
        else:
            return [PYTHON, "-m", "pip"]
    if not importlib.util.find_spec("pip"):
        raise LookupError(
            "This Python has neither pip nor ensurepip (%s).\n"
            "On Debian or Ubuntu: apt install python3-venv   (or python3-pip)" % sys.executable
        )
    venv.create(HOME, clear=True, symlinks=symlinks, with_pip=False)
    return [sys.executable, "-m", "pip", "--python", PYTHON]


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except (IOError, OSError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
