# Functions of .ci/run and .ci/release: tests in other environments, and the release files. Needs $scratch.
# shellcheck shell=bash
step() {
    printf '\n── %s\n' "$1"
}

# Install uv into the active environment; if that fails, print what needs it, and return 1.
have_uv() {
    python -m pip install --quiet uv && return
    step "uv cannot be installed: the other environments and the release files are not checked"
    return 1
}

# find_python VERSION: print the path of an interpreter that uv finds, or that pyenv has installed.
find_python() {
    uv python find --no-python-downloads "$1" 2>/dev/null ||
        find "${PYENV_ROOT:-$HOME/.pyenv}/versions" -path "*/$1.*/bin/python" 2>/dev/null | grep --max-count 1 .
}

# tests_on PYTHON RESOLUTION TEST...: run the tests of this folder in a new environment with its dependencies.
tests_on() {
    local python=$1 resolution=$2 venv=$scratch/leg
    shift 2
    uv venv --quiet --clear --python "$python" "$venv"
    uv pip install --quiet --python "$venv" --resolution "$resolution" '.[test]'
    "$venv/bin/python" -m pytest -n auto -q "$@"
}

# other_environments TEST...: the minimum versions, and every supported Python from 3.12 on this machine.
other_environments() {
    step "the minimum versions of all direct dependencies"
    tests_on "$(command -v python)" lowest-direct "$@"
    for version in 3.12 3.13 3.14; do
        if python=$(find_python "$version"); then
            step "Python $version"
            tests_on "$python" highest "$@"
        else
            step "skipped: Python $version is not on this machine"
        fi
    done
}

# release_files TEST...: build twice, compare, check the metadata, and run the tests from the unpacked sdist.
release_files() {
    step "a reproducible build, and an sdist that contains its own tests"
    python -m pip install --quiet twine
    for build in one two; do uv build --quiet --out-dir "$scratch/$build" .; done
    diff --recursive "$scratch/one" "$scratch/two"
    twine check --strict "$scratch"/one/*.whl "$scratch"/one/*.tar.gz
    tar --extract --gzip --directory "$scratch" --file "$scratch"/one/*.tar.gz
    (cd "$scratch"/lianlian_async-*/ && python -m pytest -n auto -q "$@")
}
