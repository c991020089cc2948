#!/usr/bin/env bash
# From a fresh clone to every figure with one command. ./run_all.sh --help says what can be chosen.
set -euo pipefail
trap 'exit 130' INT

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"

show_help() {
    cat <<'HELP'
Usage: ./run_all.sh [--profile NAME|FILE.yaml] [--jobs N] [--slurm[=FOLDER]]
       ./run_all.sh --update [--jobs N]
       ./run_all.sh --test[=fast] [--jobs N]
       ./run_all.sh --lab
       ./run_all.sh --course

Sets up a Python environment if there is none yet, then runs the suite: measurements, notebooks, figures, claims and
the page results/NAME/index.html. Interrupted, the same command goes on from where it was.

  --profile NAME  what to measure: a file profiles/NAME.yaml (default: pocket, which needs no network), or any
                  other by its path, FILE.yaml
  --jobs N        how many jobs run side by side (default: the number of cores);
                  with --test: how many tests, each on one core (default: the number of cores, at most 4)
  --slurm         hand the jobs to a SLURM cluster; what it asks for is in workflow/slurm/config.yaml, or in
                  the config.yaml of FOLDER
  --update        run the pocket profile, then refresh the committed notebooks, figures and README from it
  --test          run the tests (tests/README.md says which there are) and the pocket profile, then check the
                  notebooks' saved outputs; --test=fast: the quick tests alone, two minutes
  --lab           open the notebooks in JupyterLab
  --course        make the students' version of the assignments, course/release/, from course/source/
  --help          show this text

Environment variables:
  SELFREPAIR_USE_ACTIVE=1  install into the conda or virtual environment that is active, instead of
                           .venv in the repository
  TORCH_INDEX_URL=URL      the package index that PyTorch alone is installed from (empty: the one of everything
                           else). By default, Linux without an NVIDIA GPU takes PyTorch's own index of CPU
                           builds, which are smaller by gigabytes, if it can be reached

The set-up needs Python 3.11 or newer. It is done again only if requirements.lock, pyproject.toml, the
repository's folder or the Python version changes, or if it was interrupted. With uv on the PATH it takes less.
HELP
}

say() { printf 'run_all.sh: %s\n' "$1" >&2; }

# fail MESSAGE [STATUS]
fail() {
    say "error: $1"
    exit "${2:-1}"
}

# fail_usage MESSAGE [VALUE]: the value is quoted, so that the message stays on one line whatever it holds.
fail_usage() {
    local message=$1
    if (($# > 1)); then message+=" $(printf '%q' "$2")"; fi
    fail "$message (see ./run_all.sh --help)" 2
}

# refuse_folder: Snakemake's formatting and the scripts that pip writes do not take these paths, and say so at great length.
refuse_folder() {
    local why=
    case "$ROOT" in
        *$'\n'*) why="a line break" ;;
        *[{}]*) why="a brace" ;;
        *[[:space:]]*[\&\;\(\)]* | *[\&\;\(\)]*[[:space:]]*) why="a space and one of & ; ( )" ;;
    esac
    [[ -z "$why" ]] || fail "the repository's folder $(printf '%q' "$ROOT") has $why in its path, which other tools fail on: move it"
    [[ -n "${HOME:-}" || ~ != / ]] || fail "this user has no home folder: set HOME to a folder that you may write to"
}

count_cores() {
    local cores
    cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || true)"
    printf '%s\n' "${cores:-1}"
}

known_profiles() {
    local file
    for file in "$ROOT"/profiles/*.yaml; do
        if [[ -f "$file" ]]; then printf ' %s' "$(basename -- "$file" .yaml)"; fi
    done
}

PROFILE=pocket
PROFILE_FILE= # of a profile that was given by its path
JOBS=
SLURM=
TESTS=
MODE=run
while (($# > 0)); do
    option=$1
    shift
    case "$option" in
        --profile | --jobs)
            (($# > 0)) || fail_usage "$option needs a value"
            value=$1
            shift
            ;;
        --profile=* | --jobs=* | --slurm=* | --test=*)
            value=${option#*=}
            option=${option%%=*}
            ;;
        --slurm) value=$ROOT/workflow/slurm ;;
        --test) value=all ;;
    esac
    case "$option" in
        --profile)
            PROFILE=$value
            PROFILE_FILE=
            if [[ "$value" == *.yaml || "$value" == *.yml ]]; then
                [[ -f "$value" ]] || fail_usage "no such file of a profile:" "$value"
                PROFILE_FILE="$(CDPATH='' cd -- "$(dirname -- "$value")" && pwd -P)/$(basename -- "$value")"
                PROFILE="$(basename -- "${value%.*}")"
                case "$PROFILE_FILE" in # which Snakemake would not read as it stands
                    *$'\n'* | *[{}]* | *' #'* | *': '*) fail_usage "--profile needs a path without line breaks, braces, ' #' and ': ', not" "$value" ;;
                esac
            fi
            [[ "$PROFILE" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail_usage "--profile needs a profile's name (letters, digits, . _ -) or its file, not" "$value"
            ;;
        --jobs)
            [[ "$value" =~ ^[1-9][0-9]{0,3}$ ]] || fail_usage "--jobs needs a whole number from 1 to 9999, not" "$value"
            JOBS=$value
            ;;
        --slurm)
            [[ -f "$value/config.yaml" ]] || fail_usage "--slurm needs a folder with a config.yaml, not" "$value"
            SLURM="$(CDPATH='' cd -- "$value" && pwd -P)"
            ;;
        --test | --lab | --update | --course)
            [[ "$MODE" == run || "$MODE" == "${option#--}" ]] || fail_usage "--test, --lab, --update and --course exclude each other"
            MODE=${option#--}
            if [[ "$MODE" == test ]]; then
                [[ "$value" == all || "$value" == fast ]] || fail_usage "--test takes fast or nothing, not" "$value"
                TESTS=$value
            fi
            ;;
        --help | -h)
            show_help
            exit 0
            ;;
        *) fail_usage "unknown option" "$option" ;;
    esac
done
# Said before the set-up, which takes minutes the first time.
if [[ "$MODE" == update && "$PROFILE" != pocket ]]; then
    fail_usage "--update refreshes what is committed of the pocket profile, not of" "$PROFILE"
fi
if [[ -n "$PROFILE_FILE" ]]; then
    if [[ -f "$ROOT/profiles/$PROFILE.yaml" && ! "$PROFILE_FILE" -ef "$ROOT/profiles/$PROFILE.yaml" ]]; then
        fail_usage "there is a profile $PROFILE already, whose results lie in results/$PROFILE: rename" "$PROFILE_FILE"
    fi
elif [[ "$MODE" == run && ! -f "$ROOT/profiles/$PROFILE.yaml" ]]; then
    fail_usage "no profile $PROFILE; there are:$(known_profiles), or give the path of a .yaml file"
fi

OWN_ENVIRONMENT=1
ENVIRONMENT="$ROOT/.venv"
if [[ "${SELFREPAIR_USE_ACTIVE:-}" == 1 ]]; then
    if [[ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]]; then
        OWN_ENVIRONMENT=0
        ENVIRONMENT="${VIRTUAL_ENV:-$CONDA_PREFIX}"
    else
        say "SELFREPAIR_USE_ACTIVE=1, but no environment is active: using $ENVIRONMENT"
    fi
fi
PYTHON="$ENVIRONMENT/bin/python"
STAMP="$ENVIRONMENT/selfrepair-lock.sha256" # hash of what the finished set-up was made from
UNFINISHED="$ENVIRONMENT/selfrepair-unfinished"

# recent_enough PYTHON MODULE: whether it is Python 3.11 or newer and has the module.
recent_enough() {
    "$1" -c "import sys, $2; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if recent_enough "$candidate" ensurepip; then # without it, venv makes environments that lack pip
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer with its venv module is needed; looked for python3.11, python3.12, python3.13 and python3"
}

wanted_stamp() {
    "$PYTHON" - "$ROOT" <<'PYTHON'
import hashlib, os, sys

root = sys.argv[1]
digest = hashlib.sha256()
for name in ("requirements.lock", "pyproject.toml"):
    with open(os.path.join(root, name), "rb") as file:
        digest.update(file.read())
digest.update(os.fsencode(root) + b"\0%d.%d" % sys.version_info[:2])  # the package is installed by its folder
print(digest.hexdigest())
PYTHON
}

is_set_up() {
    [[ -x "$PYTHON" && -s "$STAMP" ]] && [[ "$(<"$STAMP")" == "$(wanted_stamp)" ]]
}

# lock_set_up PYTHON: one set-up at a time. The lock is on file descriptor 9, so the kernel frees it when this script ends.
lock_set_up() {
    exec 9<"$ROOT/requirements.lock"
    "$1" - <<'PYTHON' || true
import sys

try:
    import fcntl

    try:
        fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("run_all.sh: waiting for another set-up of this repository", file=sys.stderr)
        fcntl.flock(9, fcntl.LOCK_EX)
except (ImportError, OSError):
    pass  # a file system or platform without such locks
PYTHON
}

CPU_BUILDS=https://download.pytorch.org/whl/cpu

# torch_index: the index that PyTorch is installed from; nothing for the one of everything else.
torch_index() {
    if [[ -n "${TORCH_INDEX_URL+set}" ]]; then
        printf '%s\n' "$TORCH_INDEX_URL"
    elif [[ "$(uname -s)" == Linux ]] && ! has_nvidia_gpu; then
        if "$PYTHON" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)' "$CPU_BUILDS/" >/dev/null 2>&1; then
            printf '%s\n' "$CPU_BUILDS"
        else
            say "PyTorch's index of CPU builds can't be reached: PyTorch comes from where everything else does"
        fi
    fi
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# install ARGUMENTS: by uv where there is one, else (or if it fails) by pip.
install() {
    if command -v uv >/dev/null; then
        if uv pip install --python "$PYTHON" "$@" 9<&-; then return; fi
        say "uv could not install this, pip is tried"
    fi
    "$PYTHON" -m pip install --disable-pip-version-check "$@" 9<&- ||
        fail "the set-up failed, pip says above why; the same command starts it again"
}

set_up() {
    local base
    if ((OWN_ENVIRONMENT)); then
        base="$(find_python)"
    else
        base="$PYTHON"
        recent_enough "$base" pip || fail "the active environment $ENVIRONMENT has no Python 3.11 or newer with pip"
    fi
    lock_set_up "$base"
    if ! is_set_up; then install_all "$base"; fi # else the set-up that this one waited for has done it
    exec 9<&-
}

# install_all PYTHON: leaves $STAMP only if everything is installed.
install_all() {
    local torch index
    local from_index=()
    say "setting up $ENVIRONMENT (some minutes, once)"
    if ((OWN_ENVIRONMENT)) && { [[ -e "$UNFINISHED" ]] || ! recent_enough "$PYTHON" pip; }; then
        "$1" -m venv --clear "$ENVIRONMENT" 9<&- || fail "could not make $ENVIRONMENT with $1"
    fi
    : >"$UNFINISHED"
    rm -f -- "$STAMP"

    torch="$(grep -o '^torch==[^ ;]*' "$ROOT/requirements.lock")" || fail "requirements.lock has no line torch==VERSION"
    index="$(torch_index)"
    if [[ -n "$index" ]]; then from_index=(--index-url "$index"); fi
    # PyTorch's builds differ in their hashes; then everything else by its hash; then what a CUDA build needs.
    install --no-deps ${from_index[@]+"${from_index[@]}"} "$torch"
    install --no-deps --require-hashes -r "$ROOT/requirements.lock"
    install ${from_index[@]+"${from_index[@]}"} "$torch"
    install --no-deps --no-build-isolation -e "$ROOT"

    wanted_stamp >"$STAMP.new"
    mv -f -- "$STAMP.new" "$STAMP"
    rm -f -- "$UNFINISHED"
}

refuse_folder
cd -- "$ROOT"
export PYTHONNOUSERSITE=1
IFS=: read -r -a on_path <<<"${PYTHONPATH:-}"
for folder in ${on_path[@]+"${on_path[@]}"}; do
    if [[ -d "$folder/selfrepair" && ! "$folder" -ef "$ROOT/shared" ]]; then
        say "PYTHONPATH names another library, in $folder: this repository's own is used"
    fi
done
export PYTHONPATH="$ROOT/shared${PYTHONPATH:+:$PYTHONPATH}"
if ! is_set_up; then set_up; fi
export PATH="$ENVIRONMENT/bin:$PATH"
export JUPYTER_PREFER_ENV_PATH=1 # the notebooks' kernel "python3" is this environment's, not the user's

# profile_for_snakemake: its name, or its file, if Snakemake would read the name as a number (007 as 7) or a truth value.
profile_for_snakemake() {
    if [[ -n "$PROFILE_FILE" ]]; then
        printf '%s\n' "$PROFILE_FILE"
    elif [[ "$PROFILE" =~ ^[A-Za-z] && ! "$PROFILE" =~ ^([Nn][Aa][Nn]|[Ii][Nn][Ff].*|[Tt]rue|[Ff]alse)$ ]]; then
        printf '%s\n' "$PROFILE"
    else
        printf 'profiles/%s.yaml\n' "$PROFILE"
    fi
}

run_workflow() {
    local where=(--workflow-profile "$ROOT/workflow/default" --cores "${JOBS:-$(count_cores)}")
    if [[ -n "$SLURM" ]]; then where=(--workflow-profile "$SLURM" ${JOBS:+--jobs "$JOBS"}); fi
    "$PYTHON" -m snakemake --logger selfrepair "${where[@]}" --config profile="$(profile_for_snakemake)" out="results/$PROFILE"
}

case "$MODE" in
    run)
        run_workflow
        said="results/$PROFILE/logs/summary/summary.log" # the comparison with the published numbers, and where the page is
        if [[ -f "$said" ]]; then cat -- "$said"; fi
        ;;
    update)
        run_workflow
        exec "$PYTHON" -m selfrepair.cli.main update
        ;;
    lab)
        [[ "$(id -u)" != 0 ]] || fail "JupyterLab does not start for root unless told to: $PYTHON -m jupyterlab --allow-root notebooks"
        exec "$PYTHON" -m jupyterlab notebooks
        ;;
    course)
        "$PYTHON" -m selfrepair.course.seed
        cd -- course
        for folder in source/*/; do
            name="$(basename -- "$folder")"
            "$PYTHON" -m nbgrader generate_assignment "$name" --force --log-level=WARN ||
                fail "nbgrader could not make the release of $name and says above why"
        done
        cat <<NEXT
course/release/ holds what students get: no solution, no hidden test.
Next (in course/, with $ENVIRONMENT/bin on the PATH; course/README.md says more):
  nbgrader validate source/A1/A1.ipynb    # the solution passes all tests
  hand out release/A1/ and students.md, and put what comes back into submitted/STUDENT/A1/A1.ipynb
  nbgrader autograde A1                   # then: nbgrader generate_feedback A1, nbgrader export
NEXT
        ;;
    test)
        export HF_HUB_OFFLINE=1
        workers="$(count_cores)"
        if ((workers > 4)); then workers=4; fi # each takes memory, and seconds to start
        side_by_side=(-n "${JOBS:-$workers}" --dist loadscope --no-loadscope-reorder)
        if [[ "$TESTS" == fast ]]; then OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest "${side_by_side[@]}" -m fast tests; fi
        status=0
        OMP_NUM_THREADS=1 "$PYTHON" -m pytest "${side_by_side[@]}" -m "not slurm and not after_run" tests || status=$?
        "$PYTHON" -m pytest -m slurm tests || status=$? # with the machine for itself
        if compgen -G 'notebooks/*.ipynb' >/dev/null; then
            run_workflow || status=$? # side by side; the notebooks then read what it measured
            "$PYTHON" -m pytest -m after_run tests || status=$?
            "$PYTHON" -m pytest "${side_by_side[@]}" --nbval-lax --nbval-current-env --nbval-cell-timeout=1200 notebooks/ || status=$?
        fi
        exit "$status"
        ;;
esac
