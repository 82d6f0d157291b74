# SPDX-License-Identifier: GPL-2.0-or-later
# Sourced by the commands beside it: makes a virtual environment from a lock file, once, and
# leaves its interpreter in $python.  Nothing is installed on the machine, except python3-venv
# where it is missing and we are root.

fail() { echo "${0##*/}: $1" >&2; exit "$2"; }

root=$(cd "$(dirname "$0")/.." && pwd)
lock=$root/ci/${lock:-requirements.txt}

command -v python3 > /dev/null || fail "python3 is needed: apt-get install python3 python3-venv" 3
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed; python3 is $(python3 --version)" 3

cache=${VFIO_CPR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vfio-cpr-suite}
mkdir -p "$cache" 2> /dev/null && [ -w "$cache" ] ||
    fail "the cache directory $cache cannot be written; name another in VFIO_CPR_CACHE" 3

# Its name says what is in it, so that a change of either makes another one.
venv=$cache/venv-$( (python3 --version; cat "$lock") | sha256sum | cut -c1-12)
python=$venv/bin/python
if [ ! -e "$venv/complete" ]; then
    exec 9> "$venv.lock"
    flock 9
    if [ ! -e "$venv/complete" ]; then
        echo "setting up the virtual environment" >&2
        rm -rf "$venv"
        if ! python3 -c 'import ensurepip' 2> /dev/null && [ "$(id -u)" = 0 ]; then
            apt-get install -qq -y python3-venv > /dev/null 2>&1 ||
                { apt-get update -qq && apt-get install -qq -y python3-venv; } > /dev/null 2>&1
        fi
        python3 -m venv "$venv" > "$venv.log" 2>&1 ||
            fail "python3 -m venv failed (see $venv.log): apt-get install python3-venv" 3
        "$python" -m pip install --quiet --disable-pip-version-check --require-hashes \
            --requirement "$lock" >> "$venv.log" 2>&1 ||
            fail "the Python packages could not be installed: $(tail -n 1 "$venv.log")" 3
        touch "$venv/complete"
        rm -f "$venv.log"
    fi
    exec 9>&-
fi

# Kept from run to run, and not in the source tree: what pytest makes of its plugins takes seconds.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX="$cache/bytecode"
