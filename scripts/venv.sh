# Sourced by the other scripts: makes .venv in the repository, activates it and installs the requirements file named.
python=python3
for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
        python=$candidate
        break
    fi
done
if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv
fi
source .venv/bin/activate
# Installed once: the stamp is a copy of what was asked for.
stamp=.venv/$1
if ! cat requirements*.txt | cmp -s - "$stamp"; then
    echo "installing $1 into .venv: torch alone is several GB, so this takes minutes the first time"
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    cat requirements*.txt > "$stamp"
fi
