# Sourced by the other scripts: creates .venv in the repository, activates it and installs the given requirements file.
if [ ! -x .venv/bin/pip ]; then
    python=
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "error: no Python 3.10 or newer on the PATH: install one" >&2
        exit 2
    fi
    if [ -e .venv ] && [ ! -e .venv/unfinished ]; then
        echo "error: .venv has no pip: remove .venv and run this again" >&2
        exit 2
    fi
    mkdir -p .venv && touch .venv/unfinished
    "$python" -m venv .venv
    rm .venv/unfinished
fi
source .venv/bin/activate
# Install once: the stamp is a copy of the requirements.
stamp=.venv/$1
if ! cat requirements*.txt | cmp -s - "$stamp"; then
    echo "installing $1 into .venv"
    python -m pip show --quiet torch 2> /dev/null || echo "torch takes several GB: the first installation takes minutes"
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    cat requirements*.txt > "$stamp"
fi
