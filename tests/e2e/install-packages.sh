#!/bin/sh
# Install the real programs that the end-to-end tests drive, from the
# distribution's own archive. Run as root; what is there already is left alone.
set -euf

packages="docker.io docker-registry skopeo podman haproxy nginx debootstrap prometheus python3-venv containerd curl openssl apache2-utils libfaketime man-db mandoc"
packages="$packages chromium chromium-driver fonts-inter zsh fish proot"

# Newer releases keep the docker command in a package of its own, which older ones don't have.
[ -x /usr/bin/docker ] || packages="$packages docker-cli?"
# Node.js as the machine has it, from wherever; else the distribution's.
command -v npm > /dev/null || packages="$packages nodejs npm"
# systemd's own program that starts a daemon with a socket, as systemd does.
[ -x /usr/bin/systemd-socket-activate ] || packages="$packages systemd"

# Word splitting is wanted: one argument a package.
# shellcheck disable=SC2086
exec "$(dirname "$0")/../install-packages.sh" $packages
