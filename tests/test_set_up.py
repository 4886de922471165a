"""set_up.sh in copies of its folder, with stand-ins for python, conda and apt-get on PATH: nothing is installed."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT

SET_UP, CASES = ROOT / "set_up.sh", ROOT / "tests" / "cases"  # there, stand-ins for python and conda
Done = subprocess.CompletedProcess[str]
SHELLS = [
    "bash",
    pytest.param("zsh", marks=pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")),
]


class Project:
    """A folder with set_up.sh and a requirements.txt, and another folder that stands first on PATH."""

    def __init__(self, root: Path) -> None:
        self.folder, self.bin, self.home = root / "the project", root / "bin", root / "home"
        self.log, self.conda_prefix = root / "log", root / "conda envs" / "cs224n_dfp"
        self.prefix = self.folder.resolve() / ".venv" / "cs224n_dfp"
        self.folder.mkdir()
        self.bin.mkdir()
        (self.home / "nltk_data/corpora/wordnet").mkdir(parents=True)
        shutil.copy(SET_UP, self.folder)
        (self.folder / "requirements.txt").write_text("torch==2.13.0\n")
        (self.folder / "requirements-dev.txt").write_text("pytest\n")
        self.log.touch()
        self.program("python3.11", (CASES / "python.sh").read_text())
        # These and no others: neither this machine's conda, nor its apt-get, nor its Pythons.
        for tool in ["bash", "zsh", "sh", "cat", "cksum", "cp", "dirname", "env", "mkdir", "rm", "sleep"]:
            if path := shutil.which(tool):
                (self.bin / tool).symlink_to(path)
        self.program("id", "#!/bin/sh\necho 1000\n")
        self.environment = {"PATH": self.bin, "HOME": self.home, "FAKE_BIN": self.bin, "FAKE_LOG": self.log}
        self.environment |= {"FAKE_CONDA": self.conda_prefix.parent}

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, script: str = 'source "$SET_UP"', shell: str = "bash", **environment: str) -> Done:
        """Runs a script in another folder; $SET_UP names the copy of set_up.sh."""
        flags = ["-f", "-c"] if shell == "zsh" else ["--norc", "-c"]
        given = {**self.environment, "SET_UP": self.folder / "set_up.sh", **environment}
        line = [str(self.bin / shell), *flags, script]
        return subprocess.run(line, cwd=self.home, env=given, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[str]:
        """What was called since the last look."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def made(project: Project) -> Project:
    """A project with its environment."""
    assert project.run().returncode == 0
    project.calls()
    return project


STATUS, WHICH = 'source "$SET_UP"; echo "status $?"', 'source "$SET_UP" && command -v python'


@pytest.mark.parametrize("shell", SHELLS)
def test_without_conda_a_venv_beside_the_script_is_made_and_active_and_made_once(project: Project, shell: str) -> None:
    done = project.run(f"{STATUS}; command -v python", shell)
    assert done.stdout == f"set_up.sh: cs224n_dfp is active\nstatus 0\n{project.prefix}/bin/python\n"
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["making", "installing", "installed,"]
    assert project.calls() == ["venv", f"pip for {project.prefix}/bin/python"]
    start = time.perf_counter()
    done = project.run(WHICH, shell)
    assert time.perf_counter() - start < 1
    assert (done.stdout, done.stderr) == (f"set_up.sh: cs224n_dfp is active\n{project.prefix}/bin/python\n", "")
    assert project.calls() == []


@pytest.mark.parametrize("shell", SHELLS)
def test_conda_is_used_where_it_is_installed(project: Project, shell: str) -> None:
    project.program("conda", (CASES / "conda.sh").read_text())
    script = 'source "$SET_UP"; echo "status $? $CONDA_DEFAULT_ENV"'
    assert project.run(script, shell).stdout.endswith("status 0 cs224n_dfp\n")
    assert not project.prefix.exists()
    calls = project.calls()
    assert "conda create -n cs224n_dfp python=3.11 pip -y -q" in calls
    assert f"pip for {project.conda_prefix}/bin/python" in calls
    assert project.run(script, shell).stdout.endswith("status 0 cs224n_dfp\n")
    assert not [call for call in project.calls() if "create" in call or "pip" in call]


def test_a_conda_environment_without_a_python_is_completed_and_one_of_an_older_python_is_named(
    project: Project,
) -> None:
    project.program("conda", (CASES / "conda.sh").read_text())
    project.conda_prefix.mkdir(parents=True)
    assert project.run().returncode == 0
    assert "conda install -n cs224n_dfp python=3.11 pip -y -q" in project.calls()
    done = project.run(FAKE_VERSION="3.8.1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no Python 3.11 or later" in done.stderr
    assert [call for call in project.calls() if not call.startswith("conda run")] == []


@pytest.mark.parametrize("shell", SHELLS)
def test_sourcing_leaves_nothing_but_the_activation(project: Project, shell: str) -> None:
    functions = "declare -F" if shell == "bash" else "print -l ${(k)functions}"
    names = "compgen -v" if shell == "bash" else "print -l ${(k)parameters}"
    state = f"{{ {functions}; {names}; set -o; shopt 2>/dev/null; trap; pwd; umask; }}"
    script = f"""
        cd /; trap 'echo bye' EXIT; trap : USR1; set -u
        before=; after=; status_of_it=
        before=$({state})
        source "$SET_UP" >/dev/null; status_of_it=$?
        after=$({state})
        [ $status_of_it = 0 ] && [ "$before" ] && printf '%s\n' "BEFORE" "$before" "AFTER" "$after"
    """
    lines = project.run(script, shell).stdout.splitlines()
    before = {"", *lines[lines.index("BEFORE") + 1 : lines.index("AFTER")]}
    after = {"", *lines[lines.index("AFTER") + 1 : lines.index("bye")]}
    of_activation = {"VIRTUAL_ENV", "deactivate", "declare -f deactivate"}
    of_the_shell = {"PIPESTATUS", "_", "OLDPWD", "BASH_REMATCH"}
    assert before - after - of_the_shell == set()
    assert after - before - of_the_shell - of_activation == set()
    assert "VIRTUAL_ENV" in after


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("how", ["", "FAKE_PIP_FAILS"], ids=["succeeding", "failing"])
def test_a_strict_shell_keeps_its_options_and_goes_on(project: Project, shell: str, how: str) -> None:
    script = 'set -euo pipefail\nsource "$SET_UP" || echo "status $?"\nset +o'
    done = project.run(script, shell, **({how: "1"} if how else {}))
    assert ("status 1" if how else "set_up.sh: cs224n_dfp is active") in done.stdout.splitlines()
    assert {f"set -o {name}" for name in ("errexit", "nounset", "pipefail")} <= set(done.stdout.splitlines())


@pytest.mark.parametrize("shell", SHELLS)
def test_a_failing_install_is_one_line_and_is_tried_again(project: Project, shell: str) -> None:
    done = project.run(f"{STATUS}; typeset -f _cs224n_dfp", shell, FAKE_PIP_FAILS="1")
    assert done.stdout.endswith("status 1\n")
    assert done.stderr.splitlines()[-2:] == [
        "ERROR: no such package",
        "set_up.sh: installing the requirements failed, see above; source this again to go on",
    ]
    project.calls()
    assert project.run(shell=shell).returncode == 0
    assert project.calls() == [f"pip for {project.prefix}/bin/python"]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_changed_requirements_are_installed(made: Project, name: str) -> None:
    (made.folder / name).write_text("torch==2.14.0\n")
    assert made.run().returncode == 0
    assert made.calls() == [f"pip for {made.prefix}/bin/python"]


def test_an_environment_moved_with_its_folder_is_made_again_and_one_that_is_not_sourced_is_told_of(
    made: Project,
) -> None:
    made.folder = made.folder.rename(made.folder.parent / "moved")
    assert made.run(WHICH).stdout.endswith(f"{made.folder.resolve()}/.venv/cs224n_dfp/bin/python\n")
    assert made.calls()[0] == "venv"
    done = made.run('bash "$SET_UP"; echo "status $?"')  # executed, it says how to activate
    assert done.stderr.endswith("to activate the environment in this shell: source set_up.sh\n")
    assert done.stdout == "status 0\n"


def test_a_python_that_is_too_old_and_a_conda_that_makes_no_environment_are_one_line(project: Project) -> None:
    done = project.run(STATUS, FAKE_VERSION="3.8.1")
    assert done.stdout == "status 1\n"
    assert done.stderr.startswith("set_up.sh: no Python 3.11 or later with venv found") and done.stderr.count("\n") == 1
    project.program("conda", '#!/bin/sh\n[ "$1" != run ]\n')
    done = project.run(STATUS)
    assert done.stdout == "status 1\n" and project.calls() == []
    expected = ["set_up.sh: conda could not make the environment cs224n_dfp, see above"]
    assert done.stderr.splitlines()[1:] == expected


def test_a_half_made_environment_is_made_again(project: Project) -> None:
    assert project.run(FAKE_VENV_STOPS="1").returncode == 1
    assert project.calls() == ["venv"]
    assert project.run().returncode == 0 and project.calls() == ["venv", f"pip for {project.prefix}/bin/python"]


def test_a_relative_path_is_found_whatever_cdpath_says_and_a_shim_without_a_conda_behind_it_is_none(
    project: Project,
) -> None:
    project.program("conda", "#!/bin/sh\nexit 127\n")
    done = project.run('cd ..; CDPATH=.:/; source "the project/set_up.sh" && command -v python')
    assert done.stdout.endswith(f"{project.prefix}/bin/python\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_an_interrupt_leaves_the_shell_usable(project: Project, shell: str) -> None:
    """Ctrl-C at a terminal, in an interactive shell, while pip runs."""
    flags = ["-f", "-i"] if shell == "zsh" else ["--norc", "-i"]
    environment = {**project.environment, "FAKE_PIP_WAITS": "1", "TERM": "dumb", "PS1": "$ "}
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(project.folder)
        os.execve(project.bin / shell, [shell, *flags], environment)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        while text not in seen:
            ready, _, _ = select.select([terminal], [], [], 20)
            assert ready, f"no {text!r} after {seen!r}"
            seen += os.read(terminal, 1024).decode()

    try:
        os.write(terminal, b"source set_up.sh\n")
        wait_for("installing")
        while "pip" not in project.log.read_text():
            time.sleep(0.02)
        os.write(terminal, b"\x03")
        wait_for("interrupted")
        os.write(terminal, b'typeset -f _cs224n_dfp; echo "al""ive in $PWD"\n')
        wait_for(f"alive in {project.folder}")
        os.write(terminal, b"exit\n")
    finally:
        os.close(terminal)  # hangs up, should the shell still be there
        os.waitpid(child, 0)
    assert "_cs224n_dfp ()" not in seen


def test_wordnet_that_cannot_be_had_is_one_line_once_and_no_failure(project: Project) -> None:
    shutil.rmtree(project.home / "nltk_data")
    script = project.folder / "set_up.sh"
    script.write_text(script.read_text().replace("/usr/", f"{project.bin}/"))  # hides what this system has
    project.program("id", "#!/bin/sh\necho 0\n")
    project.program("apt-get", '#!/bin/sh\necho apt-get >>"$FAKE_LOG"\nexit 100\n')
    done = project.run()
    assert done.returncode == 0
    assert sum("no WordNet found" in line for line in done.stderr.splitlines()) == 1
    assert project.calls()[2:] == ["apt-get", "apt-get", "nltk"]
    assert project.run().stderr == "" and project.calls() == []


def test_with_a_real_python_the_environment_holds_pip_and_works(project: Project) -> None:
    (project.bin / "python3.11").unlink()
    (project.bin / "python3").symlink_to(sys.executable)
    for name in ("requirements.txt", "requirements-dev.txt"):
        (project.folder / name).write_text("# nothing: no network in tests\n")
    script = 'source "$SET_UP" && python -c "import sys, pip; print(sys.prefix)"; deactivate'
    assert project.run(script).stdout.splitlines()[-1] == str(project.prefix)
    stamp = project.prefix / "set_up_stamp"
    made = stamp.stat().st_mtime_ns
    assert project.run(script).stdout == f"set_up.sh: cs224n_dfp is active\n{project.prefix}\n"
    assert stamp.stat().st_mtime_ns == made
