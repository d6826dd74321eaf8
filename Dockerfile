# docker build -t relay . && docker run -p 2525:2525 -v spool:/var/lib/relay relay
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY relay ./relay
RUN python -m venv /opt/relay && /opt/relay/bin/pip install --no-cache-dir .

FROM python:3.12-slim
RUN useradd --system --uid 2525 --home-dir /var/lib/relay --create-home relay \
 && install -d -o relay -g relay -m 0700 /var/lib/relay/spool /run/relay \
 && install -d -o relay -g relay /var/log/relay
COPY --from=build /opt/relay /opt/relay
COPY conf/relay.yaml /etc/relay/relay.yaml
ENV PATH=/opt/relay/bin:$PATH \
    RELAY__QUEUE__PATH=/var/lib/relay/spool \
    RELAY__LOG__DELIVERY=/var/log/relay/delivery.log \
    RELAY__ADMIN__SOCKET=/run/relay/relay.sock \
    RELAY__LISTENERS='[{address: "0.0.0.0:2525"}]'
USER relay
WORKDIR /var/lib/relay
VOLUME /var/lib/relay
EXPOSE 2525
STOPSIGNAL SIGTERM
CMD ["relay", "serve", "-c", "/etc/relay/relay.yaml"]
