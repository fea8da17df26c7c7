# What the launchers share: --print, and the words of a command line.

die() { echo "$(basename "$0"): $*" >&2; exit 1; }

# Runs a command, or prints it where --print was given.
run() {
  if [[ -n ${PRINT:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Writes standard input to a file, or prints both.
write() {
  if [[ -n ${PRINT:-} ]]; then
    echo "# $1"
    cat
  else
    cat > "$1"
  fi
}

# Arguments quoted for another shell.
quoted() { printf '%q ' "$@"; }

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit "${1:-0}"; }

[[ ${1:-} == --print ]] && { PRINT=1; shift; }
case ${1:-} in "" | -h | --help) usage ;; esac
ACTION=$1
shift
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
