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

# Any image with Python 3.11 or later and its venv.
ARG BASE=docker.io/library/python:3.12-slim

FROM ${BASE} AS build
WORKDIR /src
COPY requirements.lock ./
# Each library as requirements.lock has it, by its hash.
RUN python3 -m venv /opt/relay \
 && /opt/relay/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY relay ./relay
RUN /opt/relay/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps . \
 && /opt/relay/bin/pip uninstall --yes --quiet pip

FROM ${BASE}
RUN useradd --uid 2525 --user-group --home-dir /var/lib/relay --no-create-home --shell /usr/sbin/nologin relay \
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
