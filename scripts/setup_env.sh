# Sourced by run.sh and test.sh. Enters the project's folder and prepares its virtual environment, .venv.

fail() {
    echo "error: $*" >&2
    exit 1
}

# setup_env REQUIREMENTS...: installs each file, unless it has not changed since it was installed.
setup_env() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    # If pip does not run, .venv is missing or was interrupted. Making it again completes it.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
    local file
    for file in "$@"; do
        cmp -s "$file" ".venv/installed-$file" && continue
        echo "Installing $file into .venv, once: some minutes (with a CUDA build of torch, several GB)."
        .venv/bin/python -m pip install -qq --disable-pip-version-check -r "$file" ||
            fail "pip could not install $file; its reason is above"
        cp "$file" ".venv/installed-$file"
    done
}

make_venv() {
    local python="" candidate candidates=(python3 python3.13 python3.12 python3.11)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$candidate && break
    done
    [[ -n $python ]] ||
        fail "Python 3.11 or newer is needed and ${candidates[*]} is not; install one or name it: PYTHON=/path/to/python3"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv"
    echo "Making the virtual environment .venv with $("$python" --version)."
    "$python" -m venv .venv && .venv/bin/python -m pip --version >/dev/null ||
        fail "$python -m venv .venv did not work, for the reason above; delete the folder .venv and try again"
    rm -f .venv/installed-*
}
