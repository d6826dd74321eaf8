# docker build -t relay .
# docker run -d --name relay -v relay:/var/lib/relay relay
#
# Without a configuration it relays for its own network: containers beside it, not the host, not
# whoever comes through a published port. For those say who may relay:
#
#   docker run -d -p 127.0.0.1:2525:2525 -v relay:/var/lib/relay \
#       -e RELAY__HOSTNAME=relay.example.net -e 'RELAY__ACCESS__NETWORKS=[172.17.0.1]' relay
#
# or mount a file of your own at /etc/relay/relay.yaml. Delivery log and program log are JSON lines on
# its output. HTTP interface and page, for neighbours: RELAY__ADMIN__HTTP=0.0.0.0:8025 and
# RELAY__ADMIN__API_KEYS_FILE=/run/secrets/api-keys; every secret may stand in a file that way.
# SIGTERM drains: give it the time, `docker stop --time 90`. examples/compose.yaml and
# examples/kubernetes/ have whole installations; docs/operating.md the rest.
#
# For another processor: docker build --platform linux/arm64 -t relay .

# Any Debian with Python 3.11 or later.
ARG BASE=docker.io/library/python:3.12-slim

FROM ${BASE} AS build
# Debian's own Python has its venv in a package apart; what runs needs none.
RUN apt-get update -qq && apt-get install -qq --yes --no-install-recommends binutils \
      $(python3 -c 'import ensurepip' 2>/dev/null || echo python3-venv)
WORKDIR /src
COPY requirements.lock ./
# Each library as requirements.lock has it, by its hash. pip stays behind in this stage.
RUN python3 -m venv /builder \
 && python3 -m venv --without-pip /opt/relay \
 && /builder/bin/pip --python /opt/relay/bin/python3 install --no-cache-dir --no-compile \
      --disable-pip-version-check --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY relay ./relay
RUN /builder/bin/pip --python /opt/relay/bin/python3 install --no-cache-dir --no-compile \
      --disable-pip-version-check --no-deps . \
 # What nothing here reads: libraries that colour code and compile C, sources and symbols of what is
 # compiled, tests and pages of libraries, and pydantic's former version.
 && /builder/bin/pip --python /opt/relay/bin/python3 uninstall --quiet --yes \
      --disable-pip-version-check pygments markdown-it-py mdurl pycparser \
 && cd /opt/relay/lib/python3*/site-packages && rm -r cffi pydantic/v1 asyncpg/_testbase \
 && find /opt/relay/lib -type f \( -name '*.c' -o -name '*.h' -o -name '*.pyx' -o -name '*.pxd' \
      -o -name '*.pxi' -o -name '*.pyi' -o -name '_test*.so' \) -delete \
 && find /opt/relay/lib -type d \( -name tests -o -name test -o -name docs \) \
      -prune -exec rm -r {} + \
 && find /opt/relay/lib -name '*.so' -exec strip --strip-unneeded {} + \
 && /opt/relay/bin/python3 -m compileall -q /opt/relay/lib

FROM ${BASE}
RUN useradd --no-log-init --uid 2525 --user-group --home-dir /var/lib/relay --no-create-home \
      --shell /usr/sbin/nologin relay \
 && install -d -o relay -g relay -m 0700 /var/lib/relay \
 && install -d -m 0755 /etc/relay
COPY --from=build /opt/relay /opt/relay
COPY conf/container.yaml /etc/relay/relay.yaml
ENV PATH=/opt/relay/bin:/usr/local/bin:/usr/bin:/bin \
    RELAY_CONFIG=/etc/relay/relay.yaml
USER 2525:2525
WORKDIR /var/lib/relay
VOLUME /var/lib/relay
EXPOSE 2525 8025
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=25s --start-period=20s CMD ["relay", "health"]
CMD ["relay", "serve", "--own-networks"]
