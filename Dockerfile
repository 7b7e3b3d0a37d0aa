# A base with python3 (3.11 to 3.13), its venv module and the CA certificates that the registry is checked against.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /source
# What runs has no pip of its own: the build's installs into it. Others' code is what its hashes say.
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/ecrproxy
COPY requirements.lock ./
RUN /opt/build/bin/pip --python /opt/ecrproxy/bin/python install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY setup.cfg pyproject.toml README.rst LICENSE ./
COPY ecrproxy ecrproxy
COPY twisted twisted
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && /opt/build/bin/pip --python /opt/ecrproxy/bin/python install --no-cache-dir --no-deps /wheels/*.whl \
    && /opt/build/bin/pip --python /opt/ecrproxy/bin/python check \
    # twistd caches its list of plugins beside them, where the daemon's own user may not write.
    && /opt/ecrproxy/bin/twistd --help > /dev/null \
    && install -d -m 0700 -o 65532 -g 65532 /opt/image/cache

FROM ${BASE}
LABEL org.opencontainers.image.title="ecrproxy" \
      org.opencontainers.image.description="Caching pull-through proxy for Amazon ECR" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /opt/ecrproxy /opt/ecrproxy
COPY --from=build --chown=65532:65532 /opt/image/ /

ENV PROXY_CACHE_DIR=/cache PYTHONSAFEPATH=1 HOME=/
VOLUME /cache
EXPOSE 5000
WORKDIR /
# As root, the entrypoint gives the cache directory to user 65532 and becomes that user; as any other, it changes nothing.
# docker stop waits for 10 s by default: PROXY_DRAIN_SECONDS wants --stop-timeout 45.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["/opt/ecrproxy/bin/python", "-m", "ecrproxy.healthcheck"]
ENTRYPOINT ["/opt/ecrproxy/bin/python", "-m", "ecrproxy.entrypoint"]
