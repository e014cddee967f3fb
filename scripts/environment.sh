#!/usr/bin/env bash
# environment.sh PYTHON VENV READY: install what pyproject.toml asks for into VENV, in the versions of
# constraints.txt, then write READY.
#
# READY is written last.  An installation that was interrupted leaves VENV/.installing behind, and
# the next call starts from an empty environment; one that ended is only brought up to date: what is
# not asked for any more stays.
set -euo pipefail
python=$1 venv=$2 ready=$3

create() {
    local found
    found=$("$python" --version 2>/dev/null) || found="not there"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: '$python' is $found; hauberk needs Python 3.11 or newer." \
            "Name one: make demo PYTHON=python3.11" >&2
        exit 1
    fi
    if ! "$python" -m venv --clear "$venv"; then
        echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
}

if [[ -e $venv/.installing || ! -x $venv/bin/python ]]; then
    create
fi
touch "$venv/.installing"
rm -f "$ready"

echo "Installing into $venv; the first time this takes some minutes."
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
# First pip itself: dependency groups need 25.1.
"${pip[@]}" install --quiet --constraint constraints.txt pip
"${pip[@]}" install --quiet --constraint constraints.txt --editable . --group dev


# See there: only where torchvision cannot be imported as it is.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -f "$site/torchvision_without_cuda.pth"
if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
    cp scripts/torchvision_without_cuda.py "$site/_torchvision_without_cuda.py"
    echo 'import _torchvision_without_cuda' > "$site/torchvision_without_cuda.pth"
fi

rm "$venv/.installing"
touch "$ready"
