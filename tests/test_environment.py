"""The places that say what to install agree with each other, and run_all.sh sets it up and passes its
options on."""

import ast
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from snakemake.cli import parse_config

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
#: A pin each, with what it holds for and its hashes.
PINS = re.findall(
    r"^([a-z0-9-]+)==(\S+)(?: ; (.*?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
    (ROOT / "requirements.lock").read_text(encoding="utf-8"),
    re.MULTILINE,
)
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
SCRIPT = (ROOT / "run_all.sh").read_text(encoding="utf-8")


def locked() -> dict[str, Version]:
    """What is installed by it here."""
    return {
        name: Version(version)
        for name, version, condition, _ in PINS
        if not condition or Marker(condition).evaluate()
    }


def needed() -> list[str]:
    project = PYPROJECT["project"]
    return (
        project["dependencies"]
        + project["optional-dependencies"]["dev"]
        + project["optional-dependencies"]["course"]
        + PYPROJECT["build-system"]["requires"]
    )


def drift(requirement: str, pins: Mapping[str, Version]) -> str | None:
    """What is wrong with the pin of a requirement, or None."""
    wanted = Requirement(requirement)
    pin = pins.get(canonicalize_name(wanted.name))
    if pin is None:
        return f"{wanted.name} is not in requirements.lock"
    if not wanted.specifier.contains(pin, prereleases=True):
        return f"requirements.lock has {wanted.name} {pin}, pyproject.toml wants {wanted.specifier}"
    return None


# --- the lock file
# -------------------------------------------------------------------------------------------------


def test_lock_holds_sorted_exact_pins_with_hashes_only():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    hashes = "".join(of_pin for *_, of_pin in PINS).splitlines()
    assert len(PINS) + len(hashes) == sum(not line.startswith("#") for line in lines)
    names = [name for name, *_ in PINS]
    assert names == sorted(names)
    assert len({(name, condition) for name, _, condition, _ in PINS}) == len(PINS), (
        "a package is pinned twice"
    )
    assert "pip" not in names
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))], (
        "gigabytes for all"
    )


def test_lock_says_how_it_is_made():
    command = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()[1].split()
    assert {"--universal", "--generate-hashes"} <= {*command} and command[1:5] == [
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
    ]
    extras = {name for option, name in pairwise(command) if option == "--extra"}
    assert extras == {"dev", "course"}
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"--python-version {oldest}" in " ".join(command)


def test_nothing_is_missing_of_what_is_installed():
    """The lock is installed without asking what its packages need: it holds all of that."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("requirement", needed())
def test_lock_has_what_pyproject_asks_for(requirement):
    assert drift(requirement, locked()) is None


@pytest.mark.parametrize(
    "requirement, pin, complaint",
    [
        ("Foo_bar>=1,<2", "1.9", None),
        ("foo-bar>=1,<2", "2.0", "requirements.lock has foo-bar 2.0, pyproject.toml wants <2,>=1"),
        ("foo-bar>=1.10", "1.9", "requirements.lock has foo-bar 1.9, pyproject.toml wants >=1.10"),
        ("other", "1.9", "other is not in requirements.lock"),
    ],
)
def test_drift_is_noticed(requirement, pin, complaint):
    assert drift(requirement, {"foo-bar": Version(pin)}) == complaint


# --- environment.yml and the Python version
# ------------------------------------------------------------------------


def test_environment_yml_leaves_versions_to_the_lock():
    """Pip refuses an editable package beside hashes, in the one list that conda hands it."""
    assert [part.split("=")[0] for part in ENVIRONMENT["dependencies"]] == ["python", "pip"]
    assert ENVIRONMENT["name"] == PYPROJECT["project"]["name"]
    told = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "SELFREPAIR_USE_ACTIVE=1 ./run_all.sh\n" in told


def test_python_version_bounds_agree():
    bound = SpecifierSet(PYPROJECT["project"]["requires-python"])
    (lowest,) = [Version(part.version) for part in bound if part.operator == ">="]
    (conda,) = [part.split("=")[1] for part in ENVIRONMENT["dependencies"] if str(part).startswith("python=")]
    assert bound.contains(conda)
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{lowest.major}{lowest.minor}"
    assert f"sys.version_info < ({lowest.major}, {lowest.minor})" in SCRIPT
    assert f"Python {lowest} or newer" in SCRIPT
    looked_for = re.search(r"for candidate in (.*); do", SCRIPT)[1].split()
    assert looked_for[-1] == "python3"
    assert all(bound.contains(name.removeprefix("python")) for name in looked_for[:-1])


# --- run_all.sh
# ----------------------------------------------------------------------------------------------------

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="run_all.sh needs bash")

# Stands in for Python: runs programs given by -c or on standard input, "makes" environments and writes down
# every other call.
STAND_IN = f"""#!/bin/sh
case "$1" in
    -c | -) exec "{sys.executable}" "$@" ;;
esac
echo "$*" >>"$CALLS"
case "$2" in
    venv)
        for folder in "$@"; do :; done
        rm -rf "$folder"
        mkdir -p "$folder/bin"
        cp "$0" "$folder/bin/python"
        ;;
    pip) if [ -n "${{SLOW_PIP-}}" ]; then sleep 30; fi ;;
esac
case "$*" in
    *"${{FAIL_AT-nothing}}"*) exit 3 ;;
esac
"""


class Clone:
    """A copy of what run_all.sh needs, in a folder with spaces, with a stand-in for Python; the user is not root."""

    def __init__(self, folder: Path, name: str = "a b"):
        self.root = folder / name / "clone"
        self.elsewhere = folder / "some where"
        self.calls_file = folder / "calls"
        programs = folder / "programs"
        for made in (self.root / ".ci", self.root / "profiles", self.elsewhere, programs):
            made.mkdir(parents=True)
        for name in ("run_all.sh", ".ci/run", "requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "profiles" / "pocket.yaml").touch()
        self.stand_in = programs / "python3.11"
        self.stand_in.write_text(STAND_IN)
        self.stand_in.chmod(0o755)
        self.be_user(1000)
        hidden = (
            "PYTHONPATH",
            "SELFREPAIR_USE_ACTIVE",
            "VIRTUAL_ENV",
            "CONDA_PREFIX",
            "TORCH_INDEX_URL",
            "OMP_NUM_THREADS",
        )
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment |= {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "TORCH_INDEX_URL": "",
        }
        self.put("nvidia-smi", "exit 9")
        self.put("uv", "exit 2")  # as if there were none

    def be_user(self, number: int) -> None:
        self.put("id", f"echo {number}")

    def put(self, name: str, script: str) -> None:
        """A program of this name, before all others."""
        program = self.stand_in.with_name(name)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def run(
        self, *options: str, script: str = "run_all.sh", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        command = ["bash", str(self.root / script), *options]
        return subprocess.run(
            command,
            cwd=self.elsewhere,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        """What Python was asked to do in the last run."""
        return self.calls_file.read_text().splitlines()

    @property
    def installation(self) -> list[str]:
        pip = "-m pip install --disable-pip-version-check"
        return [
            f"{pip} --no-deps torch=={locked()['torch']}",
            f"{pip} --no-deps --require-hashes -r {self.root}/requirements.lock",
            f"{pip} torch=={locked()['torch']}",
            f"{pip} --no-deps --no-build-isolation -e {self.root}",
        ]

    def installation_from(self, index: str) -> list[str]:
        """With PyTorch from this one."""
        torch = f"torch=={locked()['torch']}"
        return [call.replace(torch, f"--index-url {index} {torch}") for call in self.installation]

    @property
    def making(self) -> str:
        return f"-m venv --clear {self.root}/.venv"

    def add_notebook(self) -> None:
        (self.root / "notebooks").mkdir()
        (self.root / "notebooks" / "01_one.ipynb").touch()


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


WORKERS = min(4, len(os.sched_getaffinity(0)))
SIDE_BY_SIDE = f"-n {WORKERS} --dist loadscope --no-loadscope-reorder"
TESTS = [f"-m pytest {SIDE_BY_SIDE} -m not slurm and not after_run tests", "-m pytest -m slurm tests"]
NBVAL = "--nbval-lax --nbval-current-env --nbval-cell-timeout=1200"


def workflow(clone: Clone, cores: int = len(os.sched_getaffinity(0))) -> str:
    """A run of the pocket profile on this machine."""
    where = f"--workflow-profile {clone.root}/workflow/default --cores {cores}"
    return f"-m snakemake --logger selfrepair {where} --config profile=pocket out=results/pocket"


def checks_of_notebooks(clone: Clone) -> list[str]:
    of_the_run = "-m pytest -m after_run tests"
    return [workflow(clone), of_the_run, f"-m pytest {SIDE_BY_SIDE} {NBVAL} notebooks/"]


@needs_bash
def test_help_lists_every_option_from_any_folder(clone):
    done = clone.run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    cases = re.findall(r"^ +(-[-a-z |]*)\)$", SCRIPT, flags=re.MULTILINE)
    options = {option for case in cases for option in case.split(" | ") if option.startswith("--")}
    assert options == {"--profile", "--jobs", "--slurm", "--test", "--lab", "--update", "--course", "--help"}
    assert all(re.search(rf"^  {option}[ =[]", done.stdout, flags=re.MULTILINE) for option in options)
    assert all(name in done.stdout for name in ("SELFREPAIR_USE_ACTIVE=1", "TORCH_INDEX_URL"))
    assert clone.calls == [], "nothing may be set up for --help"


@needs_bash
@pytest.mark.parametrize(
    "options",
    [
        ["--nonsense"],
        ["stray"],
        ["two\nlines"],
        ["--jobs"],
        ["--jobs", "0"],
        ["--jobs=two"],
        ["--jobs", "1\n2"],
        ["--profile"],
        ["--profile", ""],
        ["--profile", "../pocket"],
        ["--profile", "no-such-profile"],
        ["--test", "--lab"],
        ["--update", "--test"],
        ["--course", "--lab"],
        ["--test=quick"],
        ["--test="],
        ["--slurm=/nowhere"],
        ["--update", "--profile", "paper"],
    ],
)
def test_wrong_options_are_one_line_and_status_2(clone, options):
    done = clone.run(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"run_all\.sh: error: .*\n", done.stderr)
    assert clone.calls == []


@needs_bash
def test_an_unknown_profile_is_answered_with_those_there_are(clone):
    (clone.root / "profiles" / "paper.yaml").touch()
    assert "no profile pokcet; there are: paper pocket" in clone.run("--profile", "pokcet").stderr


@needs_bash
def test_first_run_installs_and_second_does_not(clone):
    assert clone.run("--jobs", "3").returncode == 0
    main_job = workflow(clone, 3)
    assert clone.calls == [clone.making, *clone.installation, main_job]
    done = clone.run("--jobs=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert clone.calls == [main_job]


@needs_bash
@pytest.mark.parametrize("changed", ["requirements.lock", "pyproject.toml"])
def test_a_changed_list_is_installed_into_the_same_environment(clone, changed):
    clone.run("--test")
    with (clone.root / changed).open("a") as file:
        file.write("# changed\n")
    assert clone.run("--test").returncode == 0
    assert clone.calls == [*clone.installation, *TESTS]
    clone.run("--test")
    assert clone.calls == TESTS


@needs_bash
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_failed_set_up_stops_and_is_made_anew(clone, step):
    done = clone.run("--test", FAIL_AT=clone.installation[step])
    assert done.returncode == 1
    assert "the set-up failed" in done.stderr
    assert clone.calls == [clone.making, *clone.installation[: step + 1]]
    assert clone.run("--test").returncode == 0
    assert clone.calls == [clone.making, *clone.installation, *TESTS]


@needs_bash
def test_a_killed_set_up_is_made_anew(clone):
    clone.calls_file.write_text("")
    process = subprocess.Popen(
        ["bash", str(clone.root / "run_all.sh"), "--test"],
        env=clone.environment | {"SLOW_PIP": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while len(clone.calls) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, 9)
    process.wait()
    assert clone.calls == [clone.making, clone.installation[0]]
    assert clone.run("--test").returncode == 0
    assert clone.calls == [clone.making, *clone.installation, *TESTS]


@needs_bash
def test_two_set_ups_at_once_install_once(clone):
    clone.calls_file.write_text("")
    command = ["bash", str(clone.root / "run_all.sh"), "--test"]
    both = [subprocess.Popen(command, env=clone.environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert sorted(clone.calls) == sorted([clone.making, *clone.installation, *TESTS, *TESTS])


@needs_bash
def test_torch_alone_comes_from_its_own_index(clone):
    clone.run("--test", TORCH_INDEX_URL="file:///an/index")
    assert clone.calls[1:5] == clone.installation_from("file:///an/index")


@needs_bash
@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("reachable", [False, True])
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one build")
def test_cpu_builds_are_taken_without_a_gpu_where_they_can_be_reached(clone, has_gpu, reachable):
    clone.put("nvidia-smi", "echo GPU 0: one" if has_gpu else "exit 9")
    del clone.environment["TORCH_INDEX_URL"]
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        index = f"http://127.0.0.1:{server.server_port}"
        script = SCRIPT.replace("CPU_BUILDS=https://download.pytorch.org/whl/cpu", f"CPU_BUILDS={index}")
        assert script != SCRIPT
        (clone.root / "run_all.sh").write_text(script)
        if reachable:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        done = clone.run("--test", no_proxy="127.0.0.1")
        if reachable:
            server.shutdown()
    from_cpu_builds = clone.installation_from(index)
    assert clone.calls[1:5] == (from_cpu_builds if reachable and not has_gpu else clone.installation)
    assert ("can't be reached" in done.stderr) == (not reachable and not has_gpu)


@needs_bash
@pytest.mark.parametrize("works", [True, False])
def test_uv_installs_where_there_is_one_and_pip_if_it_fails(clone, works):
    clone.put("uv", f'echo "uv $*" >>"$CALLS"\nexit {0 if works else 2}')
    done = clone.run("--test")
    by_uv = [
        call.replace(
            "-m pip install --disable-pip-version-check",
            f"uv pip install --python {clone.root}/.venv/bin/python",
        )
        for call in clone.installation
    ]
    both = [call for pair in zip(by_uv, clone.installation, strict=True) for call in pair]
    assert clone.calls[1:-2] == (by_uv if works else both)
    assert done.stderr.count("uv could not install") == (0 if works else 4)


@needs_bash
@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_the_active_environment_is_used_only_if_asked_for(clone, tmp_path, variable):
    active = tmp_path / "active environment"
    (active / "bin").mkdir(parents=True)
    shutil.copy(clone.stand_in, active / "bin" / "python")
    clone.run("--test", **{variable: str(active)})
    assert clone.making in clone.calls
    shutil.rmtree(clone.root / ".venv")

    assert (
        clone.run("--test", SELFREPAIR_USE_ACTIVE="1", FAIL_AT="-r ", **{variable: str(active)}).returncode
        == 1
    )
    assert clone.run("--test", SELFREPAIR_USE_ACTIVE="1", **{variable: str(active)}).returncode == 0
    assert clone.calls == [*clone.installation, *TESTS], "an environment that is not ours is never made anew"
    assert not (clone.root / ".venv").exists()
    clone.run("--test", SELFREPAIR_USE_ACTIVE="1", **{variable: str(active)})
    assert clone.calls == TESTS


@needs_bash
def test_without_a_recent_python_it_says_so_in_one_line(clone, tmp_path):
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        old = clone.stand_in.with_name(name)
        old.write_text("#!/bin/sh\nexit 1\n")
        old.chmod(0o755)
    done = clone.run()
    assert done.returncode == 1
    assert re.fullmatch(r"run_all\.sh: error: Python 3\.11 or newer .*\n", done.stderr)
    assert not (clone.root / ".venv").exists()


@needs_bash
@pytest.mark.parametrize(
    "failing, status",
    [
        ("nothing", 0),
        ("-m not slurm", 3),
        ("-m slurm", 3),
        ("snakemake", 3),
        ("-m after_run", 3),
        ("--nbval-lax", 3),
    ],
)
def test_tests_and_notebook_tests_all_run_and_any_failing_fails(clone, failing, status):
    clone.add_notebook()
    assert clone.run("--test", FAIL_AT=failing).returncode == status
    assert clone.calls[-5:] == [*TESTS, *checks_of_notebooks(clone)]


@needs_bash
def test_the_quick_loop_is_the_quick_tests_alone(clone):
    clone.add_notebook()
    assert clone.run("--test=fast", "--jobs", "7").returncode == 0
    assert clone.calls[-1] == "-m pytest -n 7 --dist loadscope --no-loadscope-reorder -m fast tests"
    assert clone.run("--test=fast", FAIL_AT="-m fast").returncode == 3
    assert len(clone.calls) == 1


@needs_bash
def test_ci_runs_the_tests(clone):
    clone.add_notebook()
    assert clone.run(script=".ci/run").returncode == 0
    assert clone.calls[-5:] == [*TESTS, *checks_of_notebooks(clone)]
    assert clone.run(script=".ci/run", FAIL_AT="-m not slurm").returncode == 3


@needs_bash
def test_releases_of_all_assignments_are_made(clone):
    for name in ("A1", "A2"):
        (clone.root / "course" / "source" / name).mkdir(parents=True)
    done = clone.run("--course")
    made = [f"-m nbgrader generate_assignment {name} --force --log-level=WARN" for name in ("A1", "A2")]
    assert done.returncode == 0
    assert clone.calls[-3:] == ["-m selfrepair.course.seed", *made]
    assert "nbgrader autograde A1" in done.stdout
    done = clone.run("--course", FAIL_AT="generate_assignment A1")
    assert (done.returncode, clone.calls[-1]) == (1, made[0])
    assert done.stderr.endswith("could not make the release of A1 and says above why\n")


@needs_bash
def test_lab_opens_the_notebooks(clone):
    clone.run("--lab")
    assert clone.calls[-1] == "-m jupyterlab notebooks"


@needs_bash
def test_lab_tells_root_how(clone):
    """JupyterLab itself refuses, as a line among many."""
    clone.run("--lab")
    clone.be_user(0)
    done = clone.run("--lab")
    assert (done.returncode, clone.calls) == (1, [])
    told = f"{clone.root}/.venv/bin/python -m jupyterlab --allow-root notebooks"
    assert re.fullmatch(rf"run_all\.sh: error: JupyterLab .*: {re.escape(told)}\n", done.stderr)


@needs_bash
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("two\nlines", "a line break"),
        ("a{}b", "a brace"),
        ("{a", "a brace"),
        ("a & b", "a space and one of & ; ( )"),
        ("a ;b", "a space and one of & ; ( )"),
        ("(a) b", "a space and one of & ; ( )"),
    ],
)
def test_folders_that_other_tools_fail_on_are_refused_at_once(tmp_path, name, why):
    clone = Clone(tmp_path, name)
    done = clone.run()
    assert (done.returncode, done.stdout, clone.calls) == (1, "", [])
    assert re.fullmatch(
        rf"run_all\.sh: error: .* has {re.escape(why)} in its path, .*: move it\n", done.stderr
    )
    assert clone.run("--help").returncode == 0


@needs_bash
@pytest.mark.parametrize("name", ["a&b", "a;b", "(a)", "a b", "ä$HOME'\"", "[a]*?"])
def test_other_folders_are_not_refused(tmp_path, name):
    clone = Clone(tmp_path, name)
    assert clone.run().returncode == 0 and clone.calls[-1] == workflow(clone)


@needs_bash
def test_a_profile_may_be_given_by_its_path(clone):
    """Results go to a folder of its name, unless a profile of the repository has that already."""
    folder = clone.elsewhere / "my profiles"
    folder.mkdir()
    for name in ("mine.yaml", "pocket.yaml", "1.5.yml"):
        (folder / name).touch()
    for name in ("mine.yaml", "1.5.yml"):
        assert clone.run("--profile", str(folder / name)).returncode == 0
        of_profile, of_out = clone.calls[-1].split("--config ")[1].rsplit(" ", 1)
        found = parse_config([of_profile, of_out])
        assert found == {"profile": str(folder / name), "out": f"results/{Path(name).stem}"}
    done = clone.run("--profile", str(folder / "pocket.yaml"))
    assert done.returncode == 2 and "there is a profile pocket already" in done.stderr
    own = clone.run(f"--profile={clone.root}/profiles/pocket.yaml")
    assert own.returncode == 0 and clone.calls[-1].endswith("out=results/pocket")
    assert "no such file of a profile" in clone.run("--profile", str(folder / "none.yaml")).stderr


@pytest.mark.parametrize("profile", ["007", "1.10", "1e3", "nan", "Infinity", "True", "null", "paper-small"])
def test_a_profiles_name_is_no_number(clone, profile):
    """Snakemake reads what it is given as numbers and truth values where it can."""
    (clone.root / "profiles" / f"{profile}.yaml").touch()
    assert clone.run("--profile", profile).returncode == 0
    *_, of_profile, of_out = clone.calls[-1].split()
    found = parse_config([of_profile, of_out])
    assert found["profile"] in (profile, f"profiles/{profile}.yaml") and found["out"] == f"results/{profile}"


@needs_bash
def test_the_library_of_another_clone_is_not_used(clone, tmp_path):
    """That of this one goes before it on the path, and that is said."""
    other = tmp_path / "other" / "shared"
    (other / "selfrepair").mkdir(parents=True)
    shows = clone.stand_in.with_name("python3.11")
    shows.write_text(STAND_IN.replace('"$CALLS"\ncase', '"$CALLS"\necho "$PYTHONPATH" >"$CALLS.path"\ncase'))
    done = clone.run("--test", PYTHONPATH=f"{other}:/elsewhere")
    said = f"run_all.sh: PYTHONPATH names another library, in {other}: this repository's own is used"
    assert said in done.stderr.splitlines()
    path = Path(f"{clone.calls_file}.path").read_text().strip()
    assert path == f"{clone.root}/shared:{other}:/elsewhere"
    done = clone.run("--test", PYTHONPATH=f"{clone.root}/shared")
    assert (done.returncode, done.stderr) == (0, "")


@needs_bash
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="root alone can be another user"
)
def test_a_user_without_a_home_folder_is_told(clone):
    """A user id without an entry in passwd, as containers have, and no HOME."""
    rights = "+dac_override,+dac_read_search,+fowner"
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", f"--inh-caps={rights}"]
    environment = {name: value for name, value in clone.environment.items() if name != "HOME"}
    done = subprocess.run(
        [*user, f"--ambient-caps={rights}", "bash", clone.root / "run_all.sh"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"run_all\.sh: error: this user has no home folder: set HOME .*\n", done.stderr)


# --- the Snakefile, without run_all.sh


def snakemake(folder: Path, *config: str, **environment: str) -> list[str]:
    """What a run of the Snakefile says that fails."""
    command = ["-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "1", "--config"]
    done = subprocess.run(
        [sys.executable, *command, "out=results", *config],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if "error" in line.lower()]


@pytest.mark.slow("a run uses the environment and library of its own clone")
def test_snakemake_uses_its_own_environment_and_this_library(tmp_path):
    """Though neither is on the paths, and another library is; the name of a file stays one."""
    (tmp_path / "selfrepair").mkdir()
    (tmp_path / "selfrepair" / "__init__.py").write_text("raise SystemExit('another library')")
    (said,) = snakemake(tmp_path, "profile=007.yaml", PATH=os.defpath, PYTHONPATH=str(tmp_path))
    assert said.startswith("selfrepair: error: 007.yaml: no such profile")


def test_a_number_for_a_profile_is_one_line(tmp_path):
    (said,) = snakemake(tmp_path, "profile=007")
    assert said.startswith(
        "error: Snakemake takes the name of the profile for 7; give its file: --config profile="
    )


@pytest.mark.slow("a command says if its library is another clone's")
def test_a_command_says_if_its_library_is_another_clones(tmp_path):
    """PYTHONPATH goes before what is installed; stages of the workflow use the workflow's library anyway."""
    script = tmp_path / ".venv" / "bin" / "selfrepair"
    script.parent.mkdir(parents=True)
    script.write_text("import sys; from selfrepair.cli.main import main; sys.exit(main())")
    (tmp_path / "shared" / "selfrepair").mkdir(parents=True)
    said = {}
    for command in ("heads none.zarr", "plan --profile none"):
        done = subprocess.run(
            [sys.executable, script, *command.split()],
            env=os.environ | {"PYTHONPATH": str(ROOT / "shared")},
            capture_output=True,
            text=True,
        )
        said[command] = done.stderr.splitlines()
    library = (
        f"selfrepair: using the library {ROOT / 'shared' / 'selfrepair'}, not {tmp_path}/shared/selfrepair"
    )
    assert said["heads none.zarr"][0] == f"{library}: PYTHONPATH names it"
    assert ["error: " in line for line in said["heads none.zarr"]] == [False, True]
    assert ["error: " in line for line in said["plan --profile none"]] == [True]


# --- other locales


#: What reads or writes text, by where its encoding goes if it is not named.
READS_TEXT = {"open": 2, "read_text": 0, "write_text": 1, "TextIOWrapper": 1}


def without_encoding(tree: ast.AST) -> list[str]:
    """Calls that read or write text in whatever encoding the user's locale has."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        named = {word.arg for word in call.keywords}
        given = [*map(ast.unparse, call.args), *(ast.unparse(word.value) for word in call.keywords)]
        is_binary = any(re.fullmatch(r"'[rwax+]*b[rwax+]*'", text) for text in given)
        of_another = ast.unparse(call.func) in ("os.open", "Image.open", "gzip.open")
        if name in READS_TEXT and not (is_binary or of_another or "encoding" in named):
            if len(call.args) <= READS_TEXT[name]:
                found.append(ast.unparse(call))
        as_text = any(word.arg == "text" and ast.unparse(word.value) == "True" for word in call.keywords)
        if as_text and "encoding" not in named:
            found.append(ast.unparse(call))
    return found


def test_calls_without_an_encoding_are_found():
    calls = "a.read_text(); open('x'); open(b, 'rb'); a.read_text('utf-8'); run(c, text=True); A(text=b)"
    assert without_encoding(ast.parse(calls)) == ["a.read_text()", "open('x')", "run(c, text=True)"]


def test_no_text_is_read_in_the_locales_encoding():
    """UTF-8 files are read as such under a Latin-1 locale too, by the library and in notebooks."""
    sources = {file: file.read_text(encoding="utf-8") for file in (ROOT / "shared").rglob("[!.]*.py")}
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        sources[file] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = {file.name: without_encoding(ast.parse(source)) for file, source in sources.items()}
    assert {name: calls for name, calls in found.items() if calls} == {}


LATIN_1 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}


def test_facts_profiles_and_claims_are_read_in_any_locale():
    program = (
        "import locale; from selfrepair.text.facts import own_facts; "
        "from selfrepair.analysis.rules import load_claims; from selfrepair.run.profiles import load_profile; "
        "print(locale.getpreferredencoding(), len(own_facts()) > 9, len(load_claims()) > 9, load_profile('pocket').name)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | LATIN_1, capture_output=True, text=True, check=True)
    encoding, *rest = done.stdout.split()
    assert "utf" not in encoding.lower() and rest == ["True", "True", "pocket"]


def test_what_a_locale_cannot_print_does_not_stop_a_command():
    command = [sys.executable, "-m", "selfrepair.cli.main", "sweep", "--help"]
    done = subprocess.run(command, env=os.environ | LATIN_1, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "cuda:1 \\u2026 (default auto)" in done.stdout


@needs_bash
def test_slurm_and_update_run_the_workflow(clone):
    folder = clone.root / "workflow" / "slurm"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert clone.run("--jobs", "7", "--slurm").returncode == 0
    where = f"--workflow-profile {folder.resolve()} --jobs 7"
    assert (
        clone.calls[-1]
        == f"-m snakemake --logger selfrepair {where} --config profile=pocket out=results/pocket"
    )
    assert clone.run("--update", "--jobs=3").returncode == 0
    assert clone.calls[-2:] == [workflow(clone, 3), "-m selfrepair.cli.main update"]
    assert clone.run("--update", "--jobs=3", FAIL_AT="--cores 3").returncode == 3
    assert clone.calls[-1] == workflow(clone, 3), "nothing is refreshed from a run that failed"


@needs_bash
def test_run_ends_with_what_its_summary_said(clone):
    (log,) = re.findall(
        r"^rule summary:.*?^    log:\n +OUT / (.+?),\n",
        (ROOT / "Snakefile").read_text(),
        flags=re.MULTILINE | re.DOTALL,
    )
    file = clone.root.joinpath("results", "pocket", *re.findall(r'"(.+?)"', log))
    file.parent.mkdir(parents=True)
    file.write_text("gpt2: correlation 0.99\n")
    assert clone.run().stdout == "gpt2: correlation 0.99\n"


def test_scripts_are_executable():
    assert all(os.access(ROOT / name, os.X_OK) for name in ("run_all.sh", ".ci/run"))


# --- how to cite
# ---------------------------------------------------------------------------------------------------


def test_citation_names_this_version_and_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version = re.search(
        r'__version__ = "(.*)"', (ROOT / "shared/selfrepair/__init__.py").read_text(encoding="utf-8")
    )[1]
    assert str(citation["version"]) == version
    assert citation["license"] == PYPROJECT["project"]["license"]
    papers = {paper["identifiers"][0]["value"]: paper["year"] for paper in citation["references"]}
    assert papers == {"arXiv:2402.15390": 2024, "arXiv:2307.15771": 2023}
