# Sourced by the other scripts: makes .venv in the repository, activates it and installs the requirements file named.
if [ ! -x .venv/bin/pip ]; then
    python=
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "error: Python 3.10 or newer is needed, and none is on the PATH" >&2
        exit 2
    fi
    if [ -e .venv ] && [ ! -e .venv/unfinished ]; then
        echo "error: .venv is there, but without pip: remove it, and it will be made anew" >&2
        exit 2
    fi
    mkdir -p .venv && touch .venv/unfinished
    "$python" -m venv .venv
    rm .venv/unfinished
fi
source .venv/bin/activate
# Installed once: the stamp is a copy of what was asked for.
stamp=.venv/$1
if ! cat requirements*.txt | cmp -s - "$stamp"; then
    echo "installing $1 into .venv"
    python -m pip show --quiet torch 2> /dev/null || echo "torch alone is several GB: this takes minutes, once"
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    cat requirements*.txt > "$stamp"
fi
