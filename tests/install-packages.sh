#!/bin/sh
# Install packages of the distribution's own archive: install-packages.sh PACKAGE...
# Run as root; what is there already is left alone. One that is named with a
# question mark is done without where the archive doesn't have it.
set -euf

missing=""
for package in "$@"; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "${package%\?}" 2>/dev/null) || status=none
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "install-packages.sh: run as root to install:$missing" >&2
    exit 1
fi

# The packages bring services that would start at once, on ports and in
# directories of the system. Tests and benches start their own: keep these asleep.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT INT TERM
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi

export DEBIAN_FRONTEND=noninteractive
quietly() {
    apt-get --quiet --quiet --yes -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@"
}
quietly update
wanted=""
for package in $missing; do
    case "$package" in
    *\?) apt-cache show "${package%\?}" > /dev/null 2>&1 || continue ;;
    esac
    wanted="$wanted ${package%\?}"
done
# Word splitting is wanted: one argument a package.
# shellcheck disable=SC2086
quietly --no-install-recommends install $wanted < /dev/null
