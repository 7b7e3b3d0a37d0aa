# A base with python3 (3.11 to 3.13), its venv module and the CA certificates that the registry is checked against.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /source
COPY setup.cfg pyproject.toml README.rst LICENSE ./
COPY ecrproxy ecrproxy
COPY twisted twisted
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
# What runs has no pip of its own: the build's installs into it.
RUN python3 -m venv --without-pip /opt/ecrproxy \
    && /opt/build/bin/pip --python /opt/ecrproxy/bin/python install --no-cache-dir /wheels/*.whl

FROM ${BASE}
COPY --from=build /opt/ecrproxy /opt/ecrproxy
# twistd caches its list of plugins beside them, where the daemon's own user may not write.
RUN /opt/ecrproxy/bin/twistd --help > /dev/null \
    && mkdir -m 0700 /cache \
    && chown 65532:65532 /cache

ENV PROXY_CACHE_DIR=/cache PYTHONSAFEPATH=1
VOLUME /cache
EXPOSE 5000
WORKDIR /
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["/opt/ecrproxy/bin/python", "-m", "ecrproxy.healthcheck"]
ENTRYPOINT ["/opt/ecrproxy/bin/twistd", "-n", "--pidfile=", "ecr-proxy"]
