#!/bin/sh
# Install the programs that the benches compare with and measure by, from the
# distribution's own archive. Run as root; what is there already is left alone.
set -eu

packages="nginx docker-registry wrk curl"

missing=""
for package in $packages; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) || status=none
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "install-packages.sh: run as root to install:$missing" >&2
    exit 1
fi

# The packages bring services that would start at once, on ports and in
# directories of the system. The benches start their own: keep these asleep.
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
# Word splitting is wanted: one argument a package.
# shellcheck disable=SC2086
quietly --no-install-recommends install $missing < /dev/null
