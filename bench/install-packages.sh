#!/bin/sh
# Install the programs that the benches compare with and measure by, from the
# distribution's own archive. Run as root; what is there already is left alone.
set -eu

exec "$(dirname "$0")/../tests/install-packages.sh" nginx docker-registry wrk curl
