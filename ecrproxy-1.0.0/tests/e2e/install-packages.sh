#!/bin/sh
# Install the real programs that the end-to-end tests drive, from the
# distribution's own archive. Run as root; what is there already is left alone.
set -eu

packages="docker.io docker-registry skopeo podman haproxy debootstrap prometheus python3-venv curl openssl apache2-utils man-db mandoc"

have() {
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing=""
for package in $packages; do
    have "$package" || missing="$missing $package"
done
# Newer releases keep the docker command in a package of its own.
if [ ! -x /usr/bin/docker ]; then
    missing="$missing docker-cli"
fi
# systemd's own program that starts a daemon with a socket, as systemd does.
if [ ! -x /usr/bin/systemd-socket-activate ]; then
    missing="$missing systemd"
fi
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "install-packages.sh: run as root to install:$missing" >&2
    exit 1
fi

# The packages bring services that would start at once, on ports and in
# directories of the system. The tests start their own: keep these asleep.
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
case "$missing" in
*docker-cli*)
    # Where docker.io still carries the command there is no such package.
    apt-cache show docker-cli > /dev/null 2>&1 || missing=${missing% docker-cli}
    ;;
esac
# Word splitting is wanted: one argument a package.
# shellcheck disable=SC2086
quietly --no-install-recommends install $missing < /dev/null
